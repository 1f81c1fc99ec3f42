"""Compares every layer of the six models with KerasCV's, given the same random parameters.

    python -m stable_diffusion.parity.keras_cv --model decoder
    python -m stable_diffusion.parity.keras_cv --summary

It prints for each layer the shape of its output and the largest relative error in float32,
max|a - b| / max|b|. The images are twice as wide as high, so that exchanged axes show. It needs
TensorFlow, keras_cv and 9 GB of memory for the UNets.

Reference: https://github.com/keras-team/keras-cv/tree/v0.9.0/keras_cv/src/models/stable_diffusion
"""

import argparse
import gc
import importlib.util
import math
import sys
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np

from stable_diffusion.checkpoints.building import allocate_array, share_array, uninitialized
from stable_diffusion.decoder import Decoder
from stable_diffusion.diffusion_model import DiffusionModel, DiffusionModelV2
from stable_diffusion.image_encoder import ImageEncoder
from stable_diffusion.text_encoder import TextEncoder, TextEncoderV2

MODELS = {  # the class, which has the same name in KerasCV, and the arguments of both
    "text_encoder": (TextEncoder, ["tokens"]),
    "text_encoder_v2": (TextEncoderV2, ["tokens"]),
    "diffusion_model": (DiffusionModel, ["height", "width", "tokens"]),
    "diffusion_model_v2": (DiffusionModelV2, ["height", "width", "tokens"]),
    "decoder": (Decoder, ["height", "width"]),
    "image_encoder": (ImageEncoder, []),
}
TOKENS, VOCABULARY, BATCH = 77, 49408, 2
# The mean and the standard deviation of each kind of parameter, which keep activations near 1. No
# bias is 0 and no gamma is 1, because such values hide mistakes.
DISTRIBUTIONS = {
    "kernel": lambda shape: (0, np.prod(shape[:-1]) ** -0.5),
    "embeddings": lambda shape: (0, 1),
    "gamma": lambda shape: (1, 0.3),
    "beta": lambda shape: (0, 0.3),
    "bias": lambda shape: (0, 0.3),
}


def explain_absence():
    """Returns why this environment cannot compare the models, or None if it can."""
    if (backend := keras.backend.backend()) != "tensorflow":
        return f"KerasCV is compared on the tensorflow backend, not on {backend}."
    if not importlib.util.find_spec("keras_cv"):
        return "KerasCV is not installed: pip install keras-cv==0.9.0"


def randomize(model, rng):
    """Sets all parameters of a built model or layer to random values; see `DISTRIBUTIONS`."""
    for weight in model.weights:
        mean, deviation = DISTRIBUTIONS[weight.name](weight.shape)
        value = allocate_array(weight.shape, "float32")
        rng.standard_normal(out=value, dtype="float32")
        value *= np.float32(deviation)
        value += np.float32(mean)
        weight.assign(share_array(value))


def relative_error(a, b):
    """Returns max|a - b| / max|b|, where b is the reference; NaN if max|b| is 0 or not finite."""
    a, b = (np.asarray(keras.ops.convert_to_numpy(x), "float64") for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"The shapes differ: {a.shape} and {b.shape}.")
    largest = np.max(np.abs(b))
    return float(np.max(np.abs(a - b)) / largest) if 0 < largest < np.inf else math.nan


@contextmanager
def built_by_symbolic_calls(module):
    """Lets the layers of a module build their sublayers by a symbolic call, as our `Block` does.

    Keras would trace `call` with TensorFlow, once for each level of nesting: 6 times slower for
    KerasCV's UNet. Parameters and outputs are the same.
    """

    def compute_output_spec(self, *args, **kwargs):
        output = self.call(*args, **kwargs)
        return keras.KerasTensor(output.shape, output.dtype)

    with ExitStack() as stack:
        for cls in vars(module).values():
            if not isinstance(cls, type) or not issubclass(cls, keras.Layer):
                continue
            if not issubclass(cls, keras.Model):
                methods = {"compute_output_spec": compute_output_spec}
                if "build" not in vars(cls):
                    methods["build"] = lambda self, input_shape: None
                stack.enter_context(mock.patch.multiple(cls, **methods))
        yield


def build_pair(model, height, width):
    """Builds one of `MODELS` for images of a size in pixels; returns ours and KerasCV's."""
    from keras_cv.src.models import stable_diffusion as theirs  # the public one lacks V2's UNet

    ours, names = MODELS[model]
    sizes = {"height": height, "width": width, "tokens": TOKENS}
    arguments = [sizes[name] for name in names]
    with uninitialized(), built_by_symbolic_calls(theirs.diffusion_model):
        return [
            constructor(*arguments, download_weights=False)
            for constructor in (ours, getattr(theirs, ours.__name__))
        ]


def share_parameters(ours, theirs, rng):
    """Gives two built models or layers the same random parameters.

    `ours.set_weights(theirs.get_weights())` does the same, but holds two more copies in memory.
    """
    randomize(theirs, rng)
    for ours_weight, theirs_weight in zip(ours.weights, theirs.weights, strict=True):
        ours_weight.assign(theirs_weight)


def make_inputs(model, size, rng):
    """Makes random inputs, in the order of `model.inputs`, for images `size` pixels high."""
    inputs = []
    for spec in model.inputs:
        shape = (BATCH, *spec.shape[1:])
        if spec.name == "tokens":
            inputs.append(rng.integers(0, VOCABULARY, shape, dtype="int32"))
        elif spec.name == "positions":
            inputs.append(np.tile(np.arange(TOKENS, dtype="int32"), (BATCH, 1)))
        else:  # the image encoder accepts images of any size
            shape = (BATCH, size, 2 * size, 3) if None in shape else shape
            inputs.append(rng.standard_normal(shape, dtype="float32"))
    return inputs


def compare_layers(ours, theirs, inputs):
    """Returns for the output of each layer a row `(name, shape, relative error)`."""

    def run_layers(model):
        layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
        every = keras.Model(model.inputs, [layer.output for layer in layers])
        return zip([layer.name for layer in layers], every(inputs), strict=True)

    return [
        (name, tuple(a.shape), relative_error(a, b))
        for (name, a), (_, b) in zip(run_layers(ours), run_layers(theirs), strict=True)
    ]


def free_memory():
    """Frees models that nothing refers to any more; a pair of UNets holds 7 GB."""
    keras.backend.clear_session()
    gc.collect()


class Comparison(NamedTuple):
    """What `compare_model` finds.

    Attributes:
        rows: those of `compare_layers`.
        shapes, expected_shapes: the shapes of our parameters and of KerasCV's, in their order.
    """

    rows: list
    shapes: list
    expected_shapes: list


def compare_model(model, size, seed):
    """Compares one of `MODELS` for images `size` pixels high; returns a `Comparison`."""
    rng = np.random.default_rng(seed)
    ours, theirs = build_pair(model, size, 2 * size)
    share_parameters(ours, theirs, rng)
    rows = compare_layers(ours, theirs, make_inputs(ours, size, rng))
    shapes, expected = ([tuple(w.shape) for w in model.weights] for model in (ours, theirs))
    del ours, theirs
    free_memory()
    return Comparison(rows, shapes, expected)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse_size(text):
    """Parses a size in pixels: a multiple of 64."""
    if not text.isdecimal() or int(text) < 64 or int(text) % 64:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of 64, not {text!r}")
    return int(text)


def parse_seed(text):
    """Parses a seed: an integer from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, not {text!r}")
    return int(text)


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser("stable_diffusion.parity.keras_cv", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=[*MODELS, "all"], default="all", help="default: all")
    add("--size", type=parse_size, default=64, help="height of the images in pixels (default: 64)")
    add("--seed", type=parse_seed, default=0, help="default: 0")
    add("--summary", action="store_true", help="print one line for each model")
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if reason := explain_absence():
        parser.error(reason)
    if args.summary:
        print(f"{'model':20}{'layers':>7}{'parameters':>13}{'largest error':>15}{'of output':>11}")
    for model in MODELS if args.model == "all" else [args.model]:
        rows, shapes, _ = compare_model(model, args.size, args.seed)
        parameters = sum(math.prod(shape) for shape in shapes)
        errors = [error for _, _, error in rows]
        if args.summary:
            figures = f"{len(rows):7}{parameters:13,}{np.max(errors):15.1e}{errors[-1]:11.1e}"
            print(f"{model:20}{figures}", flush=True)
        else:
            print(f"{model} ({parameters:,} parameters)")
            for name, shape, error in rows:
                print(f"  {name:24}{str(shape):24}{error:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
