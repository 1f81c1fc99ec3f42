"""Fixtures of several test modules, and how tests are shared out. Helpers are in helpers.py."""

import gc
import os
import weakref

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


_free = {}  # models of pipelines that are gone, by what they were built from


@pytest.fixture
def reused(monkeypatch):
    """Lets pipelines have the models of those that are gone, with their parameters loaded anew.

    To build a tiny model and its graph takes much longer than to run it. This is for tests of
    commands, whose models are gone when they end. Models of random parameters are built as always.
    """
    import keras

    from stable_diffusion.config import COMPONENTS
    from stable_diffusion.stable_diffusion import StableDiffusion

    build = StableDiffusion._build

    def build_or_reuse(self, component, make):
        if not self.checkpoint.loads:
            return build(self, component, make)
        config = getattr(self.config, COMPONENTS[component])
        size, policy = (self.img_height, self.img_width), keras.config.dtype_policy().name
        key = type(self), component, config, size, policy, self.jit_compile, keras.Model.compile
        free = _free.setdefault(key, [])
        used = free.pop() if free else None
        compiled = used and used.predict_function
        model = build(self, component, (lambda **given: used) if used else make)
        model.predict_function = compiled  # which `Model.compile` forgets
        weakref.finalize(self, free.append, model)
        return model

    monkeypatch.setattr(StableDiffusion, "_build", build_or_reuse)


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
