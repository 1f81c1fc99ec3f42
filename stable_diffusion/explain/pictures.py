"""Pictures of arrays, small enough to stand inside a web page: PNG and WebP as data URIs."""

import base64
import io

import numpy as np
from PIL import Image

from stable_diffusion.explain.daam import colour_map

# Colours from negative over 0 to positive: five of ColorBrewer's "RdBu", blue to red.
DIVERGING = np.array([(5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)])
LEVELS = 63  # different colours of a sheet; an odd number has one for 0
GAP = 1  # cells between two tiles, transparent
QUALITY = 82  # of WebP, up to 100


def encode_photo(image, longest=None):
    """Encodes an image with many colours.

    Args:
        image: uint8 array `(H, W, 3)`.
        longest: the longest side in pixels that it may have; a larger one is scaled.

    Returns:
        str, a data URI of a WebP file.
    """
    image = Image.fromarray(image)
    if longest and max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _encode(image, "webp", quality=QUALITY, method=4)


def encode_values(values, limit, colours=DIVERGING):
    """Encodes an array as one picture, a pixel for each value.

    Args:
        values: float array `(h, w)`; nan is transparent.
        limit: value of the last colour; that of the first is -limit. Values beyond have the colours
            of the ends.
        colours: array `(any, 3)`, evenly spaced from -limit to limit.

    Returns:
        str, a data URI of a PNG file.
    """
    places = np.linspace(0, 1, len(colours))
    levels = np.linspace(0, 1, LEVELS)
    palette = np.stack([np.interp(levels, places, colours[:, n]) for n in range(3)], axis=-1)
    palette = np.concatenate([palette.round(), [(0, 0, 0)]]).astype("uint8")
    hidden = np.isnan(values)
    share = np.where(hidden, 0, values).clip(-limit, limit) / limit
    indices = np.where(hidden, LEVELS, ((share + 1) / 2 * (LEVELS - 1)).round()).astype("uint8")
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())  # from now on its values are indices
    options = {"transparency": LEVELS} if hidden.any() else {}
    return _encode(image, "png", optimize=True, bits=8, **options)


def arrange_tiles(values, columns=None):
    """Arranges the channels of an array as tiles, row by row.

    Args:
        values: float array `(h, w, C)`.
        columns: number of tiles in a row; None is about as many as rows, or twice that.

    Returns:
        Float array `(rows, columns)` with nan between the tiles.
    """
    height, width, count = values.shape
    columns = columns or count_columns(count)
    rows = -(-count // columns)
    shape = rows * (height + GAP) - GAP, columns * (width + GAP) - GAP
    sheet = np.full(shape, np.nan, "float32")
    for n in range(count):
        top, left = n // columns * (height + GAP), n % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = values[..., n]
    return sheet


def count_columns(count):
    """Returns how many tiles stand in a row: 2 of 4, 4 of 8, 4 of 16."""
    return 2 ** int(np.ceil(np.log2(max(count, 1)) / 2))


def encode_channels(values, limit):
    """Encodes the channels of a latent or feature map as a sheet of tiles.

    Args:
        values: float array `(h, w, C)`.
        limit: see `encode_values`.

    Returns:
        str, a data URI of a PNG file.
    """
    return encode_values(arrange_tiles(values), limit)


def encode_heat(heat, longest=32):
    """Encodes a heat map in the colours of `daam.colour_map`.

    Args:
        heat: float array `(h, w)` from 0 to 1.
        longest: the longest side in pixels that it may have; a larger one is scaled.

    Returns:
        str, a data URI of a WebP file.
    """
    return encode_photo(colour_map(heat), longest)


def find_components(features, count=3):
    """Returns a feature map's principal components: the directions in which channels vary most.

    Args:
        features: float array `(h, w, C)`.
        count: how many.

    Returns:
        uint8 array `(h, w, count)`: each component from its smallest to its largest value, but for
        the outermost hundredth; 0 where there are fewer channels.
    """
    height, width, channels = features.shape
    cells = features.reshape(-1, channels).astype("float64")
    cells = cells - cells.mean(axis=0)
    _, vectors = np.linalg.eigh(cells.T @ cells)
    vectors = vectors[:, ::-1][:, :count]
    vectors = vectors * np.where(vectors.sum(axis=0) < 0, -1, 1)  # a sign that is always the same
    found = np.zeros((height, width, count))
    found[..., : vectors.shape[1]] = (cells @ vectors).reshape(height, width, -1)
    low, high = np.percentile(found, [1, 99], axis=(0, 1))
    share = (found - low) / np.maximum(high - low, np.finfo("float32").tiny)
    return (255 * share.clip(0, 1)).round().astype("uint8")


def _encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format};base64,{base64.b64encode(file.getvalue()).decode()}"
