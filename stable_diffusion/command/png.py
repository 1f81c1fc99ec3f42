"""Images as PNG files, with text that says how they were generated."""

import hashlib
from pathlib import Path

from stable_diffusion.replacing import replace_file


def write_png(path, pixels, text):
    """Writes an image as a PNG with text: the whole file or nothing.

    Args:
        path: path of the file; one that exists is replaced.
        pixels: uint8 array `(H, W, 3)`.
        text: dict of str to str, stored as the PNG's text chunks.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with replace_file(path) as written:
        Image.fromarray(pixels).save(written, "png", pnginfo=info)


def read_text(path: str | Path) -> dict[str, str]:
    """Returns the text of a PNG, as `write_png` stores it.

    Raises:
        ValueError: there is no such file, or it is damaged, not a PNG, or has more pixels than
            `images.MAX_PIXELS`, which are not decoded.
    """
    from stable_diffusion.images import open_bounded

    try:
        with open_bounded(path) as image:
            image.load()  # a PNG may have text after its pixels, and may end too early
            return dict(image.text)
    # Pillow raises errors of many types for broken files.
    except Exception as error:
        raise ValueError(f"{path} is not an intact PNG: {error}") from error


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file that an image is generated from, as its PNG says it.

    Raises:
        OSError: the file can't be read.
    """
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_generated(path, text, ignored=()):
    """Tells whether a file is an intact PNG with this text and no other but that of some keys."""
    try:
        found = read_text(path)
        return {key: value for key, value in found.items() if key not in ignored} == text
    except ValueError:
        return False
