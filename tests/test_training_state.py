"""States of runs, runs that stop at NaN, and the files beside them, with a model of two layers.

Whether a run goes on exactly depends on Keras' optimizers, and not on the model.
"""

import keras
import numpy as np
import pytest
from keras import ops

from stable_diffusion.training.callbacks import COLUMNS, Log, SaveState, StopAtNaN, read_log
from stable_diffusion.training.data import Stream, hash_streams
from stable_diffusion.training.distribution import check_backend
from stable_diffusion.training.folder import Example
from stable_diffusion.training.methods import Denoiser, Method
from stable_diffusion.training.optimizers import OPTIMIZERS, make_optimizer
from stable_diffusion.training.state import load_state, save_state

STEPS, STOP = 5, 3  # the last is between two updates, if gradients are accumulated


class Batches(keras.utils.PyDataset):
    """Batches that depend only on their number."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = first, last

    def __len__(self):
        return self.last - self.first

    def __getitem__(self, index):
        rng = np.random.default_rng(self.first + index)
        # Small, so that no gradient overflows in float16, which would skip an update.
        return 0.1 * rng.standard_normal((2, 3)), 0.1 * rng.standard_normal((2, 2, 1, 1))


class Values(keras.callbacks.Callback):
    """Keeps the parameters after each step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append([ops.convert_to_numpy(v.value).copy() for v in self.model.weights])


def make_model(optimizer="adam", dtype="float32", **options):
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    method = object.__new__(Method)
    try:
        inputs = keras.Input((3,))
        output = keras.layers.Reshape((2, 1, 1))(keras.layers.Dense(2, name="dense")(inputs))
        method.model = Denoiser(inputs, output)
        rate = make_optimizer(optimizer, 0.1, STEPS, "cosine", **options)
        return method.compile(rate, run_eagerly=True)
    finally:
        keras.config.set_dtype_policy(policy)


def fit(model, first, last, *callbacks):
    values = Values()
    model.fit(Batches(first, last), verbose=0, shuffle=False, callbacks=[values, *callbacks])
    return values.steps


def check_going_on(path, dtype="mixed_float16", **options):
    """Checks that a run that goes on has the parameters of one that did not stop."""
    model = make_model(dtype=dtype, **options)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == ("_f" in dtype)
    steps = fit(model, 0, STEPS, SaveState(path, STOP, STOP))
    assert any((a != b).any() for a, b in zip(steps[STOP - 1], steps[-1], strict=True))
    again = make_model(dtype=dtype, **options)
    again.optimizer.build(again.trainable_variables)  # as the command does
    assert load_state(path, again) == STOP
    for expected, found in zip(steps[STOP:], fit(again, STOP, STEPS), strict=True):
        assert all(map(np.array_equal, expected, found))
    assert all(map(np.array_equal, model.get_weights(), again.get_weights()))  # averages, with EMA


FEW = "AdamW", "Lion", "Nadam"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FEW else pytest.mark.large) for n in OPTIMIZERS],
)
def test_every_optimizer_goes_on_from_its_state(name, tmp_path):
    options = {"use_ema": True, "gradient_accumulation_steps": 2}
    check_going_on(tmp_path / "state.safetensors", optimizer=name, **options)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"use_ema": True}, {"gradient_accumulation_steps": 2}])
def test_every_option_goes_on_from_its_state(dtype, options, tmp_path):
    optimizer = "lion" if dtype == "bfloat16" else "adamw"
    check_going_on(tmp_path / "state.safetensors", dtype, optimizer=optimizer, **options)


def test_an_optimizer_that_would_learn_nothing_is_refused():
    with pytest.raises(ValueError, match="AdamW learns nothing in bfloat16, .* beta_2 of 0.999 is"):
        make_model("adamw", "bfloat16")
    make_model("adamw", "mixed_bfloat16")


def test_a_state_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path, monkeypatch):
    path, model = tmp_path / "state.safetensors", make_model()
    save_state(path, model, 3)
    good = path.read_bytes()
    for variable in (model.trainable_variables[0], model.optimizer.variables[-1]):
        value = ops.convert_to_numpy(variable.value).copy()
        for bad in (np.nan, np.inf):
            variable.assign(np.full_like(value, bad))
            with pytest.raises(ValueError, match="After step 4 .* is not finite. Try a smaller le"):
                save_state(path, model, 4)
            assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
        with monkeypatch.context() as patch:
            patch.setattr("stable_diffusion.training.state.check_finite", lambda *_: None)
            save_state(tmp_path / "bad.safetensors", model, 4)
        variable.assign(value)
        before = model.get_weights()
        with pytest.raises(ValueError, match="bad.safetensors can't be used: .* is not finite"):
            load_state(tmp_path / "bad.safetensors", model)
        assert all(map(np.array_equal, before, model.get_weights()))
        (tmp_path / "bad.safetensors").unlink()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_loss_that_is_not_finite_ends_the_run(bad, tmp_path):
    path, model = tmp_path / "state.safetensors", make_model()

    class Damage(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.weights[0].assign(bad * np.ones((3, 2)))

    log = Log(tmp_path / "loss.csv", 2, STEPS, verbose=False)
    saver = SaveState(path, 1, STEPS)
    with pytest.raises(ValueError, match=r"The loss of step 3 is (nan|inf)\. Try a smaller lear"):
        fit(model, 0, STEPS, log, StopAtNaN(), saver, Damage())
    assert load_state(path, make_model()) == 2
    assert [row["step"] for row in read_log(tmp_path / "loss.csv")] == [1, 2]


def test_a_state_knows_its_data(tmp_path):
    path, model = tmp_path / "state.safetensors", make_model()
    one = Example(tmp_path / "a.png", ("a cat",), "0123")
    first = hash_streams([Stream([one])])
    others = [
        Example(tmp_path / "a.png", ("a cat",), "4567"),
        Example(tmp_path / "a.png", ("a dog",), "0123"),
        Example(tmp_path / "a.png", ("a cat",), "0123", 2),
    ]
    fit(model, 0, 1, SaveState(path, 1, 1, data=first))
    assert load_state(path, model, first) == load_state(path, model) == 1
    for other in others:
        with pytest.raises(ValueError, match="is of a run with other images or captions"):
            load_state(path, model, hash_streams([Stream([other])]))


def test_damaged_lines_of_a_log_are_skipped(tmp_path):
    path = tmp_path / "loss.csv"
    header = ",".join(COLUMNS).encode()
    lines = [header, b"1,0.5,0.1,3", b"2,nan,0.1,3", b"nan,0.5,0.1,3", b"inf,0.5,0.1,3", b"3,0.5"]
    path.write_bytes(b"\n".join([*lines, b"\xff\x00,\x00", b'"4,0.5', b"5,0.25,0.1,3\r", b"6,0.1"]))
    assert [(row["step"], row["loss"]) for row in read_log(path)] == [(1, 0.5), (5, 0.25)]
    Log(path, 2, STEPS, first_step=4, verbose=False)  # writes the file anew
    assert path.read_bytes().split() == [header, b"1,0.5,0.1,3.0"]
    path.write_bytes(b"1,0.5,0.1,3\n")  # without the names of the columns
    assert len(read_log(path)) == 1


def test_training_needs_a_backend_that_trains_and_one_replica(monkeypatch):
    check_backend()
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(ValueError, match="needs KERAS_BACKEND=tensorflow, jax or torch. With op"):
        check_backend()
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")

    class Two:
        num_replicas_in_sync = 2

    monkeypatch.setattr(tf.distribute, "get_strategy", Two)
    with pytest.raises(ValueError, match="one device, not a strategy of 2 replicas"):
        check_backend()
