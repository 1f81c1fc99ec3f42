"""Previews: the table of Stable Diffusion's VAE, the fit for any other, and the pipeline's option.

float32, on the backend that Keras has.
"""

from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers import FEW, ROOT

from stable_diffusion import StableDiffusion, previews
from stable_diffusion.config import COMPONENTS, SD1, SD2, TINY, TinyVAEConfig, undo_departures
from stable_diffusion.images import read_images

JIT = keras.backend.backend() == "jax"  # which is slow without


@pytest.fixture(scope="module")
def few():
    keras.utils.set_random_seed(0)
    model = StableDiffusion(weights=None, config=FEW, jit_compile=JIT)
    for part in COMPONENTS:
        getattr(model, part).run_eagerly = not JIT
    return model


def psnr(a, b):
    return -10 * np.log10(np.mean((np.asarray(a, "float64") - b) ** 2) / 255**2)


@pytest.mark.parametrize(
    "config",
    [SD1, SD2, undo_departures(SD1), undo_departures(SD2), replace(SD1, vae=TinyVAEConfig())],
)
def test_the_table_of_stable_diffusion(config):
    """By hand: 1.3512 / 2 * 255 = 172.3; the fifth cell is (-0.02995, 0.08099, 0.35398).

    No decoder is built.
    """
    model = SimpleNamespace(config=config)
    rest = [[0.1, -0.2, 0.3, -0.4], [0, 0, 9, 0]]
    latent = np.array([*np.eye(4), *rest]).reshape(1, 2, 3, 4)
    found = previews.preview_latents(model, latent)
    assert found.dtype == np.uint8 and found.shape == (1, 2, 3, 3)
    assert found.reshape(6, 3).tolist() == [
        [172, 156, 168],
        [168, 190, 157],
        [91, 149, 162],
        [100, 94, 35],
        [123, 137, 172],
        [0, 255, 255],
    ]


def linear_decoder(weights, calls=None):
    """Returns a function that decodes linearly to cells of 2x4 pixels, whose details cancel out."""
    detail = np.array([[1, -1, 2, -2], [3, -3, 4, -4]])[:, :, None] / 4

    def decode(latent):
        if calls is not None:
            calls.append(latent.shape)
        colours = latent @ weights[:-1] + weights[-1]
        cells = colours[:, :, None, :, None] + detail[:, None]
        batch, height, _, width = cells.shape[:4]
        return np.reshape(cells, (batch, height * 2, width * 4, 3)).astype("float32")

    return decode


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_the_fit_finds_a_linear_decoder(batch_size):
    weights, calls = np.random.default_rng(1).normal(size=(13, 3)), []
    decode = linear_decoder(weights, calls)
    found = previews.fit_colours(decode, (6, 10, 12), batch_size)
    np.testing.assert_allclose(found, weights, atol=1e-5)
    assert set(calls) == {(batch_size, 6, 10, 12)}, "the decoder is compiled for one batch"
    assert sum(shape[0] for shape in calls) * 60 >= previews.FITTED_CELLS


def test_a_cell_of_a_large_latent_is_found_too():
    weights = np.random.default_rng(1).normal(size=(5, 3))
    found = previews.fit_colours(linear_decoder(weights), (40, 24, 4))
    np.testing.assert_allclose(found, weights, atol=1e-5)


def test_noise_for_a_fit():
    noise = previews.smooth_noise(200, (16, 24, 3))
    assert noise.dtype == np.float32 and noise.shape == (200, 16, 24, 3)
    assert noise.mean() == pytest.approx(0, abs=0.03) and noise.std() == pytest.approx(1, abs=0.02)
    near, far = (np.mean(noise[:, :, n:] * noise[:, :, :-n]) for n in (1, 8))
    expected = np.exp(-1 / (4 * previews.BLUR**2))  # of neighbours that a Gaussian has smoothed
    assert near == pytest.approx(expected, abs=0.01) and abs(far) < 0.02


def test_a_decoder_is_fitted_once(few, monkeypatch):
    fitted, fit = [], previews.fit_colours
    monkeypatch.setattr(previews, "fit_colours", lambda *a: fitted.append(a) or fit(*a))
    latent = np.random.default_rng(0).normal(size=(2, *few.latent_shape)).astype("float32")
    first = previews.preview_latents(few, latent)
    assert first.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(previews.preview_latents(few, latent), first)
    assert len(fitted) == 1
    linear = keras.Sequential(
        [keras.Input(few.latent_shape), keras.layers.Dense(3), keras.layers.UpSampling2D(8)]
    )
    monkeypatch.setattr(few, "_decoder", linear)
    kernel = np.random.default_rng(1).normal(size=(4, 3)) / 4
    few.decoder.set_weights([kernel, np.array([0.1, -0.2, 0.3])])
    other = previews.preview_latents(few, latent)
    assert len(fitted) == 2
    expected = few.decode_latents(latent)[:, ::8, ::8]
    np.testing.assert_allclose(other.astype(int), expected, atol=1)


def test_the_embedded_checkpoint(eagerly):
    """Measured: 21.7 dB for this image; 10.1 dB for its mean colour."""
    model = StableDiffusion(weights="emoji", jit_compile=JIT)
    latent = model.encode_images(read_images(ROOT / "weights/pictures/red_apple.png"))
    image = model.decode_latents(latent)
    cells = image.reshape(16, 8, 16, 8, 3).mean((1, 3))
    found = previews.preview_latents(model, latent)
    assert found.shape == (1, 16, 16, 3)
    assert psnr(found[0], cells) > 21.5


def test_the_images_stay_the_same(few):
    calls, seen = [], []
    options = {"num_steps": 2, "seed": [1, 2], "batch_size": 2, "verbose": 0}
    expected = few.text_to_image("a", **options, callback=lambda *step: calls.append(step))
    found = few.text_to_image(
        "a", **options, preview=lambda step, images: seen.append((step, images))
    )
    np.testing.assert_array_equal(found, expected)
    assert [step for step, _ in seen] == [0, 1]
    for (_, images), (_, _, _, x0) in zip(seen, calls, strict=True):
        np.testing.assert_array_equal(images, previews.preview_latents(few, x0))


def test_another_decoder_and_a_callback(few):
    order = []
    images = few.text_to_image(
        "a",
        num_steps=2,
        seed=1,
        verbose=0,
        callback=lambda *_: order.append("callback"),
        preview=lambda step, images: order.append(images),
        preview_decoder=few.decoder,
    )
    assert order[0] == order[2] == "callback"
    np.testing.assert_array_equal(order[3], images)  # the last x0 is the last latent


def test_other_tasks(few):
    """They number their steps from the first that they take; the photo keeps its size."""
    seen, photo = [], np.random.default_rng(0).integers(0, 256, (100, 90, 3), "uint8")
    mask = np.ones((100, 90))
    mask[40:60, 30:50] = 0
    options = {"seed": 1, "verbose": 0}
    show = {"preview": lambda step, images: seen.append((step, images.shape))}
    few.image_to_image("a", photo[:64, :64], strength=0.5, num_steps=4, **options, **show)
    assert seen == [(2, (1, 8, 8, 3)), (3, (1, 8, 8, 3))]
    seen.clear()
    painted = few.inpaint("a", photo, mask, crop=8, num_steps=2, **options, **show)
    assert painted.shape == (1, 100, 90, 3)
    assert seen == [(step, (1, 8, 8, 3)) for step in range(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preview": True}, r"preview must be a function of \(step, images\), not True"),
        ({"preview_decoder": "full"}, "preview_decoder needs preview"),
    ],
)
def test_wrong_previews(few, monkeypatch, options, message):
    monkeypatch.setattr(few, "encode_text", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        few.text_to_image("a", num_steps=2, verbose=0, **options)


def test_only_stable_diffusions_vae_has_the_table():
    assert TINY.vae not in previews.SD_VAES and undo_departures(TINY).vae not in previews.SD_VAES
