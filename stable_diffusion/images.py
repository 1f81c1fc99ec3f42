"""Images in and out: files of any kind to arrays, and pixels to what the models compute with."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

WHITE = (255, 255, 255)
CENTRE = (0.5, 0.5)


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

    Args:
        path: path of the file.
        background: colour under transparent parts, 0 to 255 each.

    Raises:
        ValueError: the file is no image, or a broken one.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                below = Image.new("RGBA", image.size, (*background, 255))
                image = Image.alpha_composite(below, image)
            elif image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
                grey = np.asarray(image, "float64")
                image = Image.fromarray(np.clip(grey / 257, 0, 255).astype("uint8"))
            return image.convert("RGB")
    # Pillow raises errors of many types for broken files, also SyntaxError and struct.error.
    except Exception as error:
        raise ValueError(f"{path} can't be opened: {error}") from error


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
    scale = max(height / image.height, width / image.width)
    room = (image.width - width / scale) * place[0], (image.height - height / scale) * place[1]
    box = (*room, room[0] + width / scale, room[1] + height / scale)
    box = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
    seen = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.array(ImageOps.mirror(seen) if flip else seen)
