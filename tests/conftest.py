"""Fixtures of several test modules, and how tests are shared out. Helpers are in helpers.py."""

import pytest


@pytest.fixture(scope="session")
def few():
    """The `Config` of a model of few parameters, for training."""
    from helpers import FEW

    return FEW


@pytest.fixture(scope="session")
def weights(few, tmp_path_factory):
    """A checkpoint of it, with random parameters."""
    import keras

    from stable_diffusion import StableDiffusion

    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "few"
    StableDiffusion(jit_compile=False, weights=None, config=few).save(folder, dtype="float32")
    return folder


def pytest_ignore_collect(collection_path, config):
    """With `-m quick`, leaves files without quick tests out: importing them takes longer."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return True if "pytest.mark.quick" not in collection_path.read_text("utf-8") else None
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Two processes, but one for large tests: two full-size models fill the memory."""
    selected = config.option.markexpr
    return 0 if "large" in selected and "not large" not in selected else 2
