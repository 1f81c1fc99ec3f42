"""Images in and out: files of any kind, crops, and pixels as numbers."""

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.images import (
    WHITE,
    crop_image,
    normalize_pixels,
    open_image,
    quantize_pixels,
)

pytestmark = pytest.mark.quick

GREEN = (0, 255, 0)


def save(path, mode="RGB", size=(4, 4), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    path = save(tmp_path / "a.jpg", size=(30, 10), exif=exif)
    assert open_image(path, WHITE).size == (10, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_on_the_colour(mode, tmp_path):
    options = {"transparency": 0} if mode == "P" else {}
    colour = {"RGBA": (10, 10, 10, 0), "LA": (10, 0), "P": 0}[mode]
    opened = open_image(save(tmp_path / "a.png", mode, colour=colour, **options), GREEN)
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == GREEN


def test_grey_of_16_bits_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 32896, "uint16")).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", WHITE).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_broken_picture_is_an_error_that_names_it(content, tmp_path):
    path = save(tmp_path / "a.png", size=(99, 99))
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(ValueError, match="a.png can't be opened"):
        open_image(path, WHITE)


def test_crops_cover_the_size_at_their_place():
    image = np.zeros((8, 16, 3), "uint8")
    image[:, 8:] = 255  # black on the left, white on the right
    image = Image.fromarray(image)
    assert (crop_image(image, 8, 8, (0, 0.5)) == 0).all()
    assert (crop_image(image, 8, 8, (1, 0.5)) == 255).all()
    middle = crop_image(image, 8, 8)
    assert (middle[:, :4] == 0).all() and (middle[:, 4:] == 255).all()
    np.testing.assert_array_equal(crop_image(image, 8, 8, flip=True), middle[:, ::-1])
    for size in ((64, 64), (24, 8), (8, 24)):
        assert crop_image(image, *size).shape == (*size, 3)


def test_pixels_become_floats_and_come_back():
    levels = np.arange(256, dtype="uint8").reshape(1, 16, 16, 1).repeat(3, -1)
    floats = normalize_pixels(levels)
    assert floats.dtype == np.float32 and (floats.min(), floats.max()) == (-1, 1)
    assert floats[0, 0, 0, 0] == -1 and floats[0, 7, 15, 0] == pytest.approx(127 / 127.5 - 1)
    again = quantize_pixels(floats + 1e-4)  # fractions are cut off
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, levels)


def test_what_is_out_of_range_is_clipped():
    decoded = np.array([-5, -1, -0.999, 0, 0.999, 1, 5], "float32")
    assert quantize_pixels(decoded).tolist() == [0, 0, 0, 127, 254, 255, 255]
