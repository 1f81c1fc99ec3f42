"""Leaving out the text encoder's last layers, as some models are trained ("clip skip")."""

import keras

from stable_diffusion.block import compile_like, cut_model
from stable_diffusion.checks import check_int
from stable_diffusion.config import TextConfig


def skip_layers(encoder, count):
    """Returns an encoder without its last layers: the final LayerNorm follows an earlier one.

    Args:
        encoder: a `TextEncoder`. Its parameters are shared, not copied.
        count: how many layers are left out; 0 is the encoder itself, of any kind.

    Raises:
        ValueError: see `check_skip`.
    """
    count = check_skip(encoder, count)
    return cut_model(encoder, _cut_layers, count) if count else encoder


def check_skip(encoder, count):
    """Returns as an int how many of a text encoder's last layers are left out.

    Args:
        encoder: the text encoder, of any kind; or the `TextConfig` of one that is not built yet.
        count: the number. Only a `TextEncoder` can have another one than 0.

    Raises:
        ValueError: there are not so many layers.
    """
    config = encoder if isinstance(encoder, TextConfig) else getattr(encoder, "config", None)
    return check_int("clip_skip", count, 0, getattr(config, "depth", 1) - 1)


def _cut_layers(encoder, count):
    last = encoder.get_layer(f"layer_{encoder.config.depth - 1 - count}")
    output = encoder.layers[-1](last.output)
    model = keras.Model(encoder.inputs, output)
    compile_like(model, encoder)
    return model
