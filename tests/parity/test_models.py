"""Compares the full-width models with KerasCV's, layer by layer.

The reference is keras_cv 0.9.0, on TensorFlow in float32, for pictures 64 pixels high and 128 wide.
The output of every layer agrees within 1e-5 of its largest value, each gradient within 1e-4.
"""

from math import prod

import keras
import numpy as np
import pytest
import tensorflow as tf

from stable_diffusion.config import SD1
from stable_diffusion.noise_scheduler import timestep_embedding
from stable_diffusion.parity import keras_cv as compare_keras_cv
from stable_diffusion.training.data import denoising_loss, make_targets

SIZE, TOLERANCE, GRADIENT_TOLERANCE = 64, 1e-5, 1e-4
PARAMETERS = {
    "text_encoder": 123_060_480,
    "text_encoder_v2": 340_387_840,
    "diffusion_model": 859_520_964,
    "diffusion_model_v2": 865_910_724,
    "decoder": 49_490_199,
    "image_encoder": 34_163_664,
}
LAYERS = {
    "text_encoder": 14,
    "text_encoder_v2": 25,
    "diffusion_model": 63,
    "diffusion_model_v2": 63,
    "decoder": 27,
    "image_encoder": 20,
}


class Repeating(np.random.Generator):
    """Repeats a block of random numbers, from another place for each array.

    To draw 860 million takes longer than all the rest. The length of the block is a prime, so that
    no two rows or columns of a tensor are equal.
    """

    BLOCK = 1_048_573

    def __init__(self, seed):
        super().__init__(np.random.PCG64(seed))
        self.block = super().standard_normal(self.BLOCK, dtype="float32")

    def standard_normal(self, size=None, dtype="float64", out=None):
        if out is None:
            return super().standard_normal(size, dtype)
        flat, start = out.reshape(-1), self.integers(self.BLOCK)
        for place in range(0, flat.size, self.BLOCK):
            part = flat[place : place + self.BLOCK]
            first = self.block[start : start + part.size]
            part[: first.size] = first
            part[first.size :] = self.block[: part.size - first.size]
        return out


def mark(model):  # a pair of UNets takes a minute: one version is enough for every day
    return pytest.param(model, marks=[pytest.mark.large] * model.endswith("_v2"))


@pytest.fixture(scope="module", params=map(mark, PARAMETERS))
def compared(request):
    """The model's name, and both models compared once; they are freed before the tests."""
    return request.param, compare_keras_cv.compare_model(request.param, SIZE, Repeating(0))


def test_parameters_have_the_same_order_and_shapes(compared):
    model, (_, shapes, expected) = compared
    assert shapes == expected
    assert sum(map(prod, shapes)) == PARAMETERS[model]


def test_every_layer_is_equal(compared):
    model, (rows, _, _) = compared
    assert len(rows) == LAYERS[model]
    assert {name: error for name, _, error in rows if not error <= TOLERANCE} == {}


@pytest.mark.large
def test_gradients_of_all_parameters_of_the_unet_are_equal():
    """Of the loss that `stable_diffusion.training` has, for equal latents, noise and timesteps."""
    rng = np.random.default_rng(0)
    ours, theirs = compare_keras_cv.build_pair("diffusion_model", SIZE, 2 * SIZE)
    compare_keras_cv.share_parameters(ours, theirs, rng)
    *_, context = compare_keras_cv.make_inputs(ours, SIZE, rng)
    timesteps = rng.integers(0, 1000, len(context))
    x0, noise = rng.standard_normal((2, len(context), *ours.output_shape[1:]), dtype="float32")
    latent, target = make_targets(SD1.schedule, x0, noise, timesteps)
    inputs = [latent, timestep_embedding(timesteps), context]

    def gradients(model):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(denoising_loss(target, model(inputs)))
        losses.append(float(loss))
        return tape.gradient(loss, [weight.value for weight in model.weights])

    losses = []
    pairs = list(zip(ours.weights, gradients(ours), gradients(theirs), strict=True))
    assert len(pairs) == 686
    assert losses[0] == pytest.approx(losses[1], rel=GRADIENT_TOLERANCE)
    errors = {weight.path: compare_keras_cv.relative_error(a, b) for weight, a, b in pairs}
    assert {path: e for path, e in errors.items() if not e <= GRADIENT_TOLERANCE} == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "vae"], "invalid choice: 'vae'"),
        (["--size", "100"], "must be a positive multiple of 64, not '100'"),
        (["--seed", "-1"], "must be an integer from 0, not '-1'"),
        (["--sumary", "1"], "unrecognized arguments: --sumary 1"),
    ],
)
def test_script_rejects_bad_arguments_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        compare_keras_cv.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in error
    assert error.count("\n") == 1
