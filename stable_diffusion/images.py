"""Images in and out: files of any kind to arrays, and pixels to what the models compute with."""

import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000  # of an image that is opened
MIN_SIDE = 8  # pixels of an image that a model starts from
WHITE = (255, 255, 255)
CENTRE = (0.5, 0.5)
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # two tags of a TIFF, and a value


def normalize_pixels(pixels):
    """Converts uint8 pixels to what the image encoder expects: float32 in [-1, 1]."""
    return np.asarray(pixels, "float32") / 127.5 - 1.0


def quantize_pixels(decoded):
    """Converts what the decoder returns, nominally in [-1, 1], to uint8 pixels.

    Fractions are cut off and not rounded, as by KerasCV.
    """
    return np.clip((np.asarray(decoded, "float32") + 1) / 2 * 255, 0, 255).astype("uint8")


def open_image(path: str | Path, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Opens an image file as RGB: turned as its EXIF says, transparent parts on a colour.

    Grey of 12 or 16 bits is scaled to 8 bits, and floating-point grey from 0 (black) to 1 (white).

    Args:
        path: path of the file.
        background: colour under transparent parts, 0 to 255 each.

    Raises:
        ValueError: the file is no image, or a broken one; it has more than `MAX_PIXELS`, which are
            not decoded; or its values have no known range, such as integers of 32 bits.
    """
    try:
        with open_bounded(path) as opened:
            return _convert_image(opened, background)
    # Pillow raises errors of many types for broken files, also SyntaxError and struct.error.
    except Exception as error:
        raise ValueError(f"{path} can't be opened: {error}") from error


@contextmanager
def open_bounded(path: str | Path):
    """Yields an image of Pillow's whose pixels are not decoded yet, at most `MAX_PIXELS` of them.

    Raises:
        ValueError: there is no such file, or it has more pixels.
        Exception: those of many types that Pillow has for broken files.
    """
    if not Path(path).is_file():
        raise ValueError("there is no such file")  # a named pipe would wait for ever
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is ours
        with Image.open(path) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")
            yield opened


def _convert_image(opened, background):
    """Converts an opened image, whose pixels are not decoded yet, to RGB."""
    tile = getattr(opened, "tile", None)
    raw = tile[0][3] if tile else None  # how the file stores a pixel
    image = ImageOps.exif_transpose(opened)
    transparent = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _convert_grey(image, opened, transparent)
    elif transparent is not None and raw == "RGB;16B":
        raise ValueError("a transparent colour among colours of 16 bits is not supported")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image)
    return image.convert("RGB")


def _convert_grey(image, opened, transparent):
    """Converts grey of more than 8 bits, which Pillow would cut off at 255, to 8 bits.

    Args:
        image: the image, of the mode "F" or one that begins with "I".
        opened: the image as it was opened: its format and tags tell the range of the values.
        transparent: the value of transparent pixels, or None.
    """
    tags = getattr(opened, "tag_v2", {})
    if image.mode == "F":
        white = 1.0
    elif image.mode.startswith("I;16") and opened.format in ("TIFF", None):
        white = 2.0 ** tags.get(TIFF_BITS, (16,))[0] - 1
    elif opened.format in ("PNG", "PPM", "JPEG2000"):
        white = 65535.0  # also if the mode is "I", as in older versions of Pillow
    else:
        raise ValueError("integers of 32 bits, or signed ones, have no known white; use 16 bits")
    grey = np.array(image, "float32")
    low, high = grey.min(), grey.max()
    slack = white / 510  # half a level of 255
    if not (low >= -slack and high <= white + slack):  # also if some are not numbers
        raise ValueError(f"its values are from {low:g} to {high:g}, not from 0 to {white:g}")
    alpha = None if transparent is None else (grey != transparent).astype("uint8") * 255
    grey *= np.float32(255 / white)
    grey = np.clip(np.rint(grey, out=grey), 0, 255, out=grey).astype("uint8")
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    image = Image.fromarray(grey)
    return image if alpha is None else Image.merge("LA", [image, Image.fromarray(alpha)])


def crop_image(
    image: Image.Image,
    height: int,
    width: int,
    place: tuple[float, float] = CENTRE,
    flip: bool = False,
) -> np.ndarray:
    """Scales an image until it covers the size, and cuts off what stands out.

    Args:
        image: RGB.
        height, width: in pixels.
        place: of the crop, across and down: 0 is left or top, 1 right or bottom.
        flip: whether the result is mirrored.

    Returns:
        uint8 array `(height, width, 3)`.
    """
    box = find_box(image.size, height, width, place)
    seen = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.array(ImageOps.mirror(seen) if flip else seen)


def find_box(
    size: tuple[int, int], height: int, width: int, place: tuple[float, float] = CENTRE
) -> tuple[float, float, float, float]:
    """Returns the box of the largest part of an image that has the aspect of another size.

    Args:
        size: width and height of the image.
        height, width: the other size.
        place: of the part, see `crop_image`.

    Returns:
        Left, top, right and bottom: floats in pixels.
    """
    scale = max(height / size[1], width / size[0])
    room = (size[0] - width / scale) * place[0], (size[1] - height / scale) * place[1]
    box = (*room, room[0] + width / scale, room[1] + height / scale)
    return max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])


# --- Images that a model starts from, and what is painted of them --------------------------------


def read_images(images, background: tuple[int, int, int] = WHITE) -> list[Image.Image]:
    """Returns one image, or each of several, as Pillow's RGB.

    Args:
        images: a path, an image of Pillow's, or an array of numbers from 0 to 255 `(H, W)`,
            `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`; or a list of these, or an array `(B, H, W, C)`.
            Files and Pillow's are turned as their EXIF says.
        background: colour under transparent parts, 0 to 255 each.

    Raises:
        ValueError: something else; an image of less than `MIN_SIDE` pixels on a side, or more than
            `MAX_PIXELS`; or an array whose values end at 1, as of pixels from 0 to 1.
    """
    several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
    images = list(images) if several else [images]
    if not images:
        raise ValueError("image must be one image, or a list of at least one.")
    return [_read_image(image, background) for image in images]


def check_image(path: str | Path):
    """Checks the size of an image file that a model starts from, without decoding its pixels.

    Raises:
        ValueError: see `read_images`.
    """
    try:
        with open_bounded(path) as opened:
            size = opened.size
    except Exception as error:  # Pillow raises errors of many types for broken files
        raise ValueError(f"{path} can't be opened: {error}") from error
    _check_size(path, size)


def _read_image(image, background):
    if isinstance(image, str | Path):
        read = open_image(image, background)
    elif isinstance(image, Image.Image):
        _check_size("The image", image.size)
        read = _convert_image(image, background)
    else:
        read = _convert_image(_read_array(image), background)
    _check_size("The image", read.size)
    return read


def _check_size(name, size):
    width, height = size
    if min(size) < MIN_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels; it needs at least {MIN_SIDE} on each side, and "
            f"at most {MAX_PIXELS:,}."
        )


def _read_array(array):
    """Converts an array of pixels to an image of Pillow's."""
    array = np.asarray(array)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if (
        array.dtype.kind not in "uif"
        or array.ndim not in (2, 3)
        or array.shape[2:] not in ((), (3,), (4,))
    ):
        raise ValueError(
            f"image must be a path, an image of Pillow's or an array (H, W, 3), not "
            f"{array.dtype} {array.shape}."
        )
    _check_size("The image", array.shape[1::-1])
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255) or (array.dtype.kind == "f" and 0 < high <= 1):
        raise ValueError(f"image must have values from 0 to 255, not from {low:g} to {high:g}.")
    return Image.fromarray(np.rint(array).astype("uint8"))


def fit_images(images: list[Image.Image], height: int, width: int) -> np.ndarray:
    """Scales images to a size, and crops them in the middle, see `crop_image`.

    Warns once if an image has another size.

    Returns:
        uint8 array `(B, height, width, 3)`.
    """
    other = [image for image in images if image.size != (width, height)]
    if other:
        how = "scaled" if has_aspect(other[0].size, (width, height)) else "scaled and cropped"
        warnings.warn(
            f"An image of {other[0].width} x {other[0].height} pixels is {how} to {width} x "
            f"{height}.",
            stacklevel=3,
        )
    return np.stack([crop_image(image, height, width) for image in images])


def has_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Tells whether two sizes have the same aspect, but for rounding to whole pixels."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)
