"""Fixtures of several test modules, and how tests are shared out. Helpers are in helpers.py."""

import pytest


@pytest.fixture(scope="session")
def few():
    """The `Config` of a model of few parameters, for training."""
    from stable_diffusion.config import Config, TextConfig, UNetConfig, VAEConfig

    return Config(
        TextConfig(16, 1, 2, 32),
        UNetConfig((16, 16), (2, 2), (True, False), 16, res_blocks=1, groups=8),
        VAEConfig((8, 8, 8, 8), res_blocks=1, groups=4),
        size=64,
    )


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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Gives the tests of a file to one process, for its fixtures, unless the file says otherwise.

    All large tests go to one process, because two full-size models of two processes do not fit
    into memory together.
    """
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.xdist_group("large"), append=False)
        elif not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
