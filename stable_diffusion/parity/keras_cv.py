"""Compares every layer of the models here with KerasCV's, given the same random parameters.

    python -m stable_diffusion.parity.keras_cv --model decoder
    python -m stable_diffusion.parity.keras_cv --summary

Prints for each layer the shape of its output and the largest relative error, max|a - b| / max|b|,
in float32. The pictures are twice as wide as high, so that exchanged axes show. Needs TensorFlow
and keras_cv, and 9 GB of memory for the UNets.

Reference: https://github.com/keras-team/keras-cv/tree/v0.9.0/keras_cv/src/models/stable_diffusion
"""

import argparse
import gc
import importlib.util
import math
from typing import NamedTuple

import keras
import numpy as np

import stable_diffusion
from stable_diffusion.checkpoints.building import uninitialized

MODELS = {  # the class, and its arguments, alike in both libraries
    "text_encoder": ("TextEncoder", ["tokens"]),
    "text_encoder_v2": ("TextEncoderV2", ["tokens"]),
    "diffusion_model": ("DiffusionModel", ["height", "width", "tokens"]),
    "diffusion_model_v2": ("DiffusionModelV2", ["height", "width", "tokens"]),
    "decoder": ("Decoder", ["height", "width"]),
    "image_encoder": ("ImageEncoder", []),
}
TOKENS, VOCABULARY, BATCH = 77, 49408, 2
# Of each kind of parameter, the mean and the standard deviation that keep activations near 1. No
# bias is zero and no gamma is one, because mistakes hide behind those.
DISTRIBUTIONS = {
    "kernel": lambda shape: (0, np.prod(shape[:-1]) ** -0.5),
    "embeddings": lambda shape: (0, 1),
    "gamma": lambda shape: (1, 0.3),
    "beta": lambda shape: (0, 0.3),
    "bias": lambda shape: (0, 0.3),
}


def missing():
    """Returns why the models can't be compared in this environment, or None where they can."""
    if (backend := keras.backend.backend()) != "tensorflow":
        return f"KerasCV is compared on the tensorflow backend, not on {backend}."
    if not importlib.util.find_spec("keras_cv"):
        return "KerasCV is not installed: pip install keras-cv==0.9.0"


def randomize(model, rng):
    """Sets all parameters of a built model or layer to random values; see `DISTRIBUTIONS`."""
    for weight in model.weights:
        mean, deviation = DISTRIBUTIONS[weight.name](weight.shape)
        value = rng.standard_normal(weight.shape, dtype="float32")
        value *= np.float32(deviation)
        value += np.float32(mean)
        weight.assign(value)


def relative_error(a, b):
    """Returns max|a - b| / max|b|, where b is the reference; NaN if that is zero or not finite."""
    a, b = (np.asarray(keras.ops.convert_to_numpy(x), "float64") for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"The shapes differ: {a.shape} and {b.shape}.")
    largest = np.max(np.abs(b))
    return float(np.max(np.abs(a - b)) / largest) if 0 < largest < np.inf else math.nan


def build_pair(model, height, width):
    """Returns one of `MODELS` as built here and by KerasCV, for pictures of a size in pixels."""
    from keras_cv.src.models import stable_diffusion as keras_cv  # the public one lacks V2's UNet

    name, arguments = MODELS[model]
    sizes = {"height": height, "width": width, "tokens": TOKENS}
    with uninitialized():
        return [
            getattr(library, name)(*[sizes[key] for key in arguments], download_weights=False)
            for library in (stable_diffusion, keras_cv)
        ]


def share_parameters(ours, theirs, rng):
    """Gives two built models or layers the same random parameters.

    `ours.set_weights(theirs.get_weights())` does the same with two more copies in memory.
    """
    randomize(theirs, rng)
    for ours_weight, theirs_weight in zip(ours.weights, theirs.weights, strict=True):
        ours_weight.assign(theirs_weight)


def random_inputs(model, size, rng):
    """Returns random inputs, in the order of `model.inputs`."""
    inputs = []
    for spec in model.inputs:
        shape = (BATCH, *spec.shape[1:])
        if spec.name == "tokens":
            inputs.append(rng.integers(0, VOCABULARY, shape, dtype="int32"))
        elif spec.name == "positions":
            inputs.append(np.tile(np.arange(TOKENS, dtype="int32"), (BATCH, 1)))
        else:  # the image encoder takes pictures of any size
            shape = (BATCH, size, 2 * size, 3) if None in shape else shape
            inputs.append(rng.standard_normal(shape, dtype="float32"))
    return inputs


def compare_layers(ours, theirs, inputs):
    """Returns a row `(name, shape, relative error)` for the output of each layer of two models."""

    def outputs(model):
        layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
        every = keras.Model(model.inputs, [layer.output for layer in layers])
        return zip([layer.name for layer in layers], every(inputs), strict=True)

    return [
        (name, tuple(a.shape), relative_error(a, b))
        for (name, a), (_, b) in zip(outputs(ours), outputs(theirs), strict=True)
    ]


def free_memory():
    """Collects models that nothing refers to any more; a pair of UNets holds 7 GB."""
    keras.backend.clear_session()
    gc.collect()


class Comparison(NamedTuple):
    """What `compare` found: rows of `compare_layers`, and the shapes of both models' parameters."""

    rows: list
    shapes: list
    expected_shapes: list


def compare(model, size, seed):
    """Compares one of `MODELS`, for pictures `size` high and twice as wide, as a `Comparison`."""
    rng = np.random.default_rng(seed)
    ours, theirs = build_pair(model, size, 2 * size)
    share_parameters(ours, theirs, rng)
    rows = compare_layers(ours, theirs, random_inputs(ours, size, rng))
    shapes, expected = ([tuple(w.shape) for w in model.weights] for model in (ours, theirs))
    del ours, theirs
    free_memory()
    return Comparison(rows, shapes, expected)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def picture_size(text):
    if not text.isdecimal() or int(text) < 64 or int(text) % 64:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of 64, not {text!r}")
    return int(text)


def seed_number(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, not {text!r}")
    return int(text)


def main(args=None):
    parser = Parser(description="Compares every layer with KerasCV's.")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--size", type=picture_size, default=64, help="height in pixels")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--summary", action="store_true", help="one line a model")
    args = parser.parse_args(args)
    if reason := missing():
        parser.error(reason)
    if args.summary:
        print(f"{'model':20}{'layers':>7}{'parameters':>13}{'largest error':>15}{'of output':>11}")
    for model in MODELS if args.model == "all" else [args.model]:
        rows, shapes, _ = compare(model, args.size, args.seed)
        parameters = sum(math.prod(shape) for shape in shapes)
        errors = [error for _, _, error in rows]
        if args.summary:
            figures = f"{len(rows):7}{parameters:13,}{np.max(errors):15.1e}{errors[-1]:11.1e}"
            print(f"{model:20}{figures}", flush=True)
        else:
            print(f"{model} ({parameters:,} parameters)")
            for name, shape, error in rows:
                print(f"  {name:24}{str(shape):24}{error:.1e}", flush=True)


if __name__ == "__main__":
    main()
