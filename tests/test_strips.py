"""Decoding in strips: the picture of the whole decoder, and no more at a time than a strip.

float32; errors are relative to the largest value of the whole decoder's output.
"""

from dataclasses import replace

import keras
import numpy as np
import pytest
from helpers import randomize

from stable_diffusion import Decoder, StableDiffusion, strips
from stable_diffusion.config import TINY

TOLERANCE = 1e-5
JIT = keras.backend.backend() == "jax"  # which is slow without
H, W = 64, 48  # pixels


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(H, W, download_weights=False, config=TINY.vae)
    model.compile(jit_compile=JIT)
    randomize(model, np.random.default_rng(0))
    return model


@pytest.fixture(scope="module")
def latent():
    return np.random.default_rng(1).standard_normal((2, H // 8, W // 8, 4)).astype("float32")


@pytest.mark.parametrize(
    ("most", "strip"),
    [
        (1, 10_000),
        (1, 5_000),  # rows that don't divide the height
        (1, 1),  # one row at a time
        (4_000, 3_000),  # the coarser levels at once
    ],
)
def test_the_same_picture(decoder, latent, most, strip):
    expected = np.asarray(decoder.predict_on_batch(latent))
    found = strips.decode_in_strips(decoder, latent, most, strip)
    assert found.shape == expected.shape == (2, H, W, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


def test_a_single_image(decoder, latent):
    expected = np.asarray(decoder.predict_on_batch(latent[:1]))
    found = strips.decode_in_strips(decoder, latent[:1], 1, 10_000)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, decoder, latent):
    """About as near to float32's picture as the whole decoder in that dtype."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        half = Decoder(H, W, download_weights=False, config=TINY.vae)
    finally:
        keras.config.set_dtype_policy(before)
    half.compile(jit_compile=JIT)
    half.set_weights([weight.astype("float32") for weight in decoder.get_weights()])
    expected = np.asarray(decoder.predict_on_batch(latent))
    whole = np.asarray(half.predict_on_batch(latent), "float32")
    found = strips.decode_in_strips(half, latent, 1, 10_000)
    assert found.dtype == np.float32
    error, of_whole = np.std(found - expected), np.std(whole - expected)
    assert 0 < error <= 1.2 * of_whole and of_whole < 0.05 * np.std(expected)


def test_strips_are_bounded(decoder, latent, monkeypatch):
    seen, convert = [], strips.ops.convert_to_tensor

    def spy(x, *args, **kwargs):
        if isinstance(x, np.ndarray) and x.ndim == 4:
            seen.append(x[0].size)
        return convert(x, *args, **kwargs)

    monkeypatch.setattr(strips.ops, "convert_to_tensor", spy)
    strips.decode_in_strips(decoder, latent, 1, 10_000)
    row = W * TINY.vae.widths[1]  # features in the longest row
    assert max(seen) <= 10_000 + 2 * row
    assert len(seen) > 50


def test_small_pictures_are_decoded_at_once(decoder, latent, monkeypatch):
    monkeypatch.setattr(strips, "_apply", None)
    expected = np.asarray(decoder.predict_on_batch(latent))
    np.testing.assert_array_equal(strips.decode_in_strips(decoder, latent), expected)


def test_another_model_decodes_by_itself(latent):
    model = keras.Sequential([keras.Input((8, 6, 4)), keras.layers.UpSampling2D(8)])
    assert strips.decode_in_strips(model, latent, 1, 1).shape == (2, H, W, 4)


def test_pictures_over_512_are_decoded_in_strips(monkeypatch):
    """The pipeline asks for it by the features of its decoder, not of its checkpoint."""
    seen = []
    monkeypatch.setattr(strips, "_apply", lambda layer, x, strip: seen.append(layer) or x)
    config = replace(TINY, vae=replace(TINY.vae, widths=(16, 256, 32, 32)))
    latent = np.zeros((1, 64, 64, 4), "float32")
    for size, in_strips in ((512, False), (576, True)):
        model = StableDiffusion(size, size, jit_compile=JIT, weights=None, config=config)
        if not in_strips:
            monkeypatch.setattr(model.decoder, "predict_on_batch", lambda x: x)
        strips.decode_in_strips(model.decoder, latent)
        assert bool(seen) == in_strips
