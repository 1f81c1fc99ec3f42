"""Fixtures of several test modules, and how tests are shared out. Helpers are in helpers.py."""

import functools
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

    if keras.backend.backend() != "jax":  # which is slow without a compiler
        monkeypatch.setattr(keras.Model, "compile", make_eager_compile(keras.Model.compile))


@functools.cache
def make_eager_compile(compiled):
    def compile(self, *args, **options):
        compiled(self, *args, **options | {"run_eagerly": True, "jit_compile": False})

    return compile


@pytest.fixture
def command(capfd):
    """Returns a function that runs stable-diffusion: its status, lines of output and errors."""
    from stable_diffusion.command import generate

    def run(*argv):
        capfd.readouterr()
        try:
            status = generate.main(list(argv))
        except SystemExit as error:
            status = error.code
        out, err = capfd.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


_free = {}  # models of pipelines that are gone, by what they were built from


@pytest.fixture
def reused(monkeypatch):
    """Lets pipelines have the models of those that are gone, with their parameters loaded anew.

    To build a tiny model and its graph takes much longer than to run it. A test that uses a model
    must keep its pipeline. Not reused are models of random parameters, and those whose parameters
    are others now, as those of a LoRA that was trained.
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
        free, used = _free.setdefault(key, []), None
        while free and used is None:
            used, parameters = free.pop()
            used = used if list_parameters(used) == parameters else None
        for weight in used.weights if used else ():  # as those of a new model start
            weight.assign(keras.ops.zeros(weight.shape, weight.dtype))
        compiled = used and used.predict_function
        model = build(self, component, (lambda **given: used) if used else make)
        model.predict_function = compiled  # which `Model.compile` forgets
        weakref.finalize(self, free.append, (model, list_parameters(model)))
        return model

    monkeypatch.setattr(StableDiffusion, "_build", build_or_reuse)


def list_parameters(model):
    return [(weight.path, tuple(weight.shape), weight.trainable) for weight in model.weights]


_shared = {}  # pipelines, by their config


def share_pipeline(config):
    """Returns a pipeline of random parameters, whose models are those of earlier test modules.

    So their graphs are built once. A test module may change parameters, and nothing else.
    """
    import keras
    import numpy as np
    from helpers import randomize

    from stable_diffusion import StableDiffusion
    from stable_diffusion.config import COMPONENTS

    jit = keras.backend.backend() == "jax"  # which is slow without
    new = StableDiffusion(jit_compile=jit, weights=None, config=config)
    first, rng = _shared.setdefault(config, new), np.random.default_rng(0)
    for component in COMPONENTS:
        randomize(getattr(first, component), rng)
        setattr(new, f"_{component}", getattr(first, component))
    return new


@pytest.fixture(scope="module")
def tiny_pipeline():
    """A pipeline of the config `TINY` with random parameters, see `share_pipeline`."""
    from stable_diffusion.config import TINY

    return share_pipeline(TINY)


@pytest.fixture(scope="module")
def few_pipeline(few):
    """A pipeline of the config `FEW` with random parameters, see `share_pipeline`."""
    return share_pipeline(few)


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


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that one process does not end long after the other."""
    longest = "test_training_methods.py", "test_stable_diffusion.py", "test_generate.py"
    items.sort(key=lambda item: item.path.name not in longest)


def pytest_collection_finish():
    """Lets Python's collector leave out what was imported: a tenth of the tests' time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Two processes, but one for large tests: two full-size models fill the memory."""
    selected = config.option.markexpr
    return 0 if "large" in selected and "not large" not in selected else 2
