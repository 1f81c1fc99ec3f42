"""Images as PNG files, with text that says how they were generated."""

from pathlib import Path

from stable_diffusion.files import replace_file


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
        ValueError: there is no such file, or it is damaged or not a PNG.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # a PNG may have text after its pixels, and may end too early
            return dict(image.text)
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not an intact PNG: {error}") from error


def is_generated(path, text):
    """Tells whether a file is an intact PNG with this text and no other."""
    try:
        return read_text(path) == text
    except ValueError:
        return False
