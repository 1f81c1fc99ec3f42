"""Fixtures of several test modules, and how tests are shared out. Helpers are in helpers.py."""

import gc
import os

import pytest

gc.disable()  # until everything is imported, see pytest_collection_finish
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, so a thread in each
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@pytest.fixture
def eagerly(monkeypatch):
    """Lets models that are built in a test run eagerly, as tiny graphs take longer to build."""
    import keras

    if keras.backend.backend() == "jax":  # which is slow without a compiler
        return
    compiled = keras.Model.compile

    def compile(self, *args, **options):
        compiled(self, *args, **options | {"run_eagerly": True, "jit_compile": False})

    monkeypatch.setattr(keras.Model, "compile", compile)


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


def pytest_addoption(parser):
    group = parser.getgroup("faults", "tests/faults")
    group.addoption("--cases", type=int, help="number of damaged files of each kind")
    group.addoption("--case", default="", help="one of them only, such as 'lora peft 17'")
    group.addoption("--kills", type=int, help="number of kills")


def pytest_ignore_collect(collection_path, config):
    """With `-m quick`, leaves files without quick tests out: importing them takes longer."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return True if "pytest.mark.quick" not in collection_path.read_text("utf-8") else None
    return None


def pytest_collection_finish():
    """Lets Python's collector leave out what was imported: a tenth of the tests' time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Two processes, but one for large tests: two full-size models fill the memory."""
    selected = config.option.markexpr
    return 0 if "large" in selected and "not large" not in selected else 2
