"""Decoding images that are too large at once, in strips of rows: the same image, without seams.

Others decode tiles separately and blend them. That gives another image: GroupNorm's statistics are
then the tile's instead of the whole image's, and colours shift from tile to tile (about
30 dB with the embedded checkpoint). Here each layer goes over the whole feature map before the next
begins. Convolutions take a row more at both edges of a strip, GroupNorm's statistics are collected
from all strips first. What the backend holds at a time is a strip; the maps are in the memory of
the host.
"""

import numpy as np
from keras import layers, ops

from stable_diffusion.attention_block import AttentionBlock
from stable_diffusion.block import without_gradients
from stable_diffusion.decoder import Decoder
from stable_diffusion.resnet_block import ResnetBlock

MOST_FEATURES = 2**26  # of one image in a map: as many as an image of 512x512 pixels has
STRIP = 2**23  # features of one image in a strip of rows, 32 MB in float32


def decode_in_strips(model, latent, most=MOST_FEATURES, strip=STRIP):
    """Decodes latents.

    Args:
        model: the `Decoder`, of any size. Another model decodes the whole image at once.
        latent: float array `(B, h, w, 4)`.
        most: a layer is computed at once for maps of up to so many features of an image.
        strip: number of features of an image in a strip.

    Returns:
        float32 array `(B, H, W, 3)`.
    """
    if not isinstance(model, Decoder) or _largest(model) <= most:
        return np.asarray(model.predict_on_batch(latent), "float32")
    x = np.asarray(latent, "float32")
    with without_gradients():
        for layer in model.layers:
            x = _apply(layer, x, strip if x[0].size > most // 4 else x[0].size)
    return x


def _largest(model):
    """Returns the number of features of an image in the largest map of a decoder."""
    _, height, width, _ = model.output_shape
    return height * width * max(model.config.widths[:2])  # a stage starts as wide as the one before


def _apply(layer, x, strip):
    """Returns what a layer makes of a whole map."""
    if x[0].size <= strip or isinstance(layer, AttentionBlock):  # which bounds its own memory
        return _to_numpy(layer(x))
    if isinstance(layer, ResnetBlock):
        scale, offset = _normalization(layer.norm1, x, strip)
        within = _in_strips(lambda x: layer.conv1(ops.silu(x * scale + offset)), [x], strip)
        scale, offset = _normalization(layer.norm2, within, strip)

        def second_half(within, x):
            residual = layer.conv_shortcut(x) if layer.conv_shortcut else x
            x = layer.conv2(ops.silu(within * scale + offset))
            return ops.cast(residual, "float32") + ops.cast(x, "float32")

        return _in_strips(second_half, [within, x], strip)
    if isinstance(layer, layers.GroupNormalization):
        scale, offset = _normalization(layer, x, strip)
        return _in_strips(lambda x: x * scale + offset, [x], strip)
    return _in_strips(layer, [x], strip)


def _tops(maps, strip):
    """Returns the number of rows in a strip, and the first row of each."""
    rows = max(1, strip // max(x[0, 0].size for x in maps))
    return rows, range(0, maps[0].shape[1], rows)


def _in_strips(function, maps, strip):
    """Applies a function of strips, which sees one row more above and below, if there is one."""
    rows, tops = _tops(maps, strip)
    height, whole = maps[0].shape[1], None
    for top in tops:
        first, last = max(top - 1, 0), min(top + rows + 1, height)
        out = _to_numpy(function(*(ops.convert_to_tensor(x[:, first:last]) for x in maps)))
        scale = out.shape[1] // (last - first)  # 2, of a layer that repeats rows
        if whole is None:
            whole = np.empty((len(out), height * scale, *out.shape[2:]), "float32")
        out = out[:, (top - first) * scale :][:, : rows * scale]
        whole[:, top * scale : (top + rows) * scale] = out
    return whole


def _normalization(norm, x, strip):
    """Returns GroupNorm as a factor and a term for each channel, `(B, 1, 1, C)` both."""
    rows, tops = _tops([x], strip)
    counts, means, squares = [], [], []
    for top in tops:
        rows_of_x = x[:, top : top + rows]
        moments = ops.moments(ops.convert_to_tensor(rows_of_x), axes=(1, 2))
        mean, variance = map(_to_numpy, moments)
        counts.append(rows_of_x.shape[1])
        means.append(mean.astype("float64"))
        squares.append(variance + means[-1] ** 2)
    mean, square = (
        np.average(values, axis=0, weights=counts).reshape(len(x), norm.groups, -1).mean(-1)
        for values in (means, squares)
    )
    each = x.shape[-1] // norm.groups
    mean, variance = (np.repeat(v, each, axis=-1) for v in (mean, square - mean**2))
    # γ (x - μ) / √(σ² + ε) + β (Wu and He 2018, https://arxiv.org/abs/1803.08494, section 3)
    scale = _to_numpy(norm.gamma) / np.sqrt(variance + norm.epsilon)
    offset = _to_numpy(norm.beta) - mean * scale
    return scale[:, None, None].astype("float32"), offset[:, None, None].astype("float32")


def _to_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))
