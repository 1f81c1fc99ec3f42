"""Previews: small images of what the model expects so far, made after each step.

The mean colour of the pixels in a latent cell is nearly a linear function of the cell's channels.
So one matrix makes an image with one pixel for each cell, in less than a millisecond. For Stable
Diffusion's VAE the matrix is known; for any other it is fitted to what the decoder makes of noise.
The noise is smooth, because images are: white noise gives a matrix whose colours are pale (for the
embedded checkpoint 17.7 dB instead of 21.5; a matrix fitted to the very images has 22.2).
"""

from weakref import WeakKeyDictionary

import numpy as np

from stable_diffusion.config import SD1, TinyVAEConfig, undo_departures
from stable_diffusion.images import quantize_pixels
from stable_diffusion.strips import decode_in_strips

# Channels of a latent, scaled as the UNet knows it, to red, green and blue in [-1, 1]; and a last
# row that is added. Reference: https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py,
# `SD15.latent_rgb_factors`, and latent_preview.py for the range. The idea, and a first table:
# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204/2.
SD_COLOURS = np.array(
    [
        [0.3512, 0.2297, 0.3227],
        [0.3250, 0.4974, 0.2350],
        [-0.2829, 0.1762, 0.2721],
        [-0.2120, -0.2616, -0.7177],
        [0.0, 0.0, 0.0],
    ]
)
SD_VAES = SD1.vae, undo_departures(SD1).vae, TinyVAEConfig()  # TAESD has the same latents
FITTED_CELLS = 512  # at least so many are decoded for a fit
BLUR = 1.25  # cells: the deviation of the Gaussian that smooths noise for a fit

_fitted = WeakKeyDictionary()  # decoder to its colours, so that they are fitted once


def preview_latents(model, latent, decoder=None):
    """Makes previews of latents.

    Args:
        model: the `StableDiffusion`.
        latent: float array `(B, h, w, C)`, clean latents such as `x0`.
        decoder: a model that decodes them instead of the linear map, such as `model.decoder` or
            that of `tiny_vae.load_decoder`.

    Returns:
        uint8 array `(B, h, w, 3)`, a pixel for each cell; or `(B, H, W, 3)` if there is a decoder
        and it makes images of that size.
    """
    if decoder is not None:
        return quantize_pixels(decode_in_strips(decoder, latent))
    colours = find_colours(model, len(latent))
    return quantize_pixels(latent @ colours[:-1] + colours[-1])


def find_colours(model, batch_size=1):
    """Returns the linear map from latents to colours, float `(C + 1, 3)`, as `SD_COLOURS`.

    It is fitted when a decoder's map is first asked for. A decoder keeps its map, also if it gets
    other parameters later.

    Args:
        model: the `StableDiffusion`.
        batch_size: see `fit_colours`.
    """
    vae = model.config.vae
    if vae in SD_VAES:
        return SD_COLOURS
    decoder = model.decoder
    if decoder not in _fitted:
        shape = (*model.latent_shape[:2], vae.latent_channels)
        _fitted[decoder] = fit_colours(lambda z: decode_in_strips(decoder, z), shape, batch_size)
    return _fitted[decoder]


def fit_colours(decode, shape, batch_size=1):
    """Fits the linear map from latents to colours by least squares.

    Args:
        decode: function that decodes latents `(B, h, w, C)` to images `(B, H, W, 3)`.
        shape: of a latent, `(h, w, C)`.
        batch_size: how many latents are decoded at once. For another number than that of the
            images that are generated some backends would compile the decoder once more. It does not
            change the map.

    Returns:
        float64 array `(C + 1, 3)`, as `SD_COLOURS`.
    """
    height, width, channels = shape
    latents = smooth_noise(-(-FITTED_CELLS // (height * width)), shape)
    colours = []
    for first in range(0, len(latents), batch_size):
        some = latents[first : first + batch_size]
        images = decode(np.resize(some, (batch_size, *shape)))[: len(some)]  # repeats the first
        size = images.shape[1] // height, images.shape[2] // width  # of a cell, in pixels
        cells = np.reshape(images, (-1, height, size[0], width, size[1], 3))
        colours.append(cells.mean((2, 4), "float64").reshape(-1, 3))
    inputs = latents.reshape(-1, channels).astype("float64")
    inputs = np.concatenate([inputs, np.ones_like(inputs[:, :1])], axis=1)
    return np.linalg.lstsq(inputs, np.concatenate(colours), rcond=None)[0]


def smooth_noise(count, shape):
    """Returns normal noise, always the same, that a Gaussian of `BLUR` has smoothed.

    Args:
        count: number of arrays.
        shape: of each, `(h, w, C)`.

    Returns:
        float32 array `(count, h, w, C)` of unit variance.
    """
    noise = np.random.default_rng(0).standard_normal((count, *shape))
    frequencies = [np.fft.fftfreq(size) for size in shape[:2]]  # in cycles a cell
    gaussian = [np.exp(-2 * (np.pi * BLUR * each) ** 2) for each in frequencies]
    kept = np.outer(*gaussian)[..., None]
    smooth = np.fft.ifft2(np.fft.fft2(noise, axes=(1, 2)) * kept, axes=(1, 2)).real
    return (smooth / np.sqrt(np.mean(kept**2))).astype("float32")


def join_preview(model, callback, preview, decoder=None):
    """Returns a callback of `StableDiffusion.generate_image` that calls another, and a preview.

    Args:
        model: the `StableDiffusion`.
        callback: function of `(step, timestep, latent, x0)`, or None.
        preview: function of `(step, images)`, or None.
        decoder: see `preview_latents`.

    Raises:
        ValueError: the preview is no function, or there is only a decoder for it.
    """
    if not (preview is None or callable(preview)):
        raise ValueError(f"preview must be a function of (step, images), not {preview!r:.200}.")
    if preview is None and decoder is not None:
        raise ValueError("preview_decoder needs preview, a function of (step, images).")

    def show(step, timestep, latent, x0):
        if callback:
            callback(step, timestep, latent, x0)
        if preview:
            preview(step, preview_latents(model, x0, decoder))

    return show
