"""Images in and out: files of any kind, crops, and pixels as numbers."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stable_diffusion import images
from stable_diffusion.images import (
    MAX_PIXELS,
    WHITE,
    crop_image,
    fit_images,
    normalize_pixels,
    open_image,
    quantize_pixels,
    read_images,
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


def make_png(width, height, bits, colour, rows=b"", transparent=None):
    """Returns the bytes of a PNG. Pillow writes none with 16 bits and a transparent colour."""

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    if transparent is not None:
        parts.append(chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def test_grey_of_16_bits_may_have_a_transparent_value(tmp_path):
    rows = b"\0" + struct.pack(">4H", 0, 32896, 65535, 32897)  # the first byte is the filter
    (tmp_path / "a.png").write_bytes(make_png(4, 1, 16, 0, rows, [32896]))
    opened = np.asarray(open_image(tmp_path / "a.png", GREEN))
    assert opened[0].tolist() == [[0] * 3, list(GREEN), [255] * 3, [128] * 3]
    rows = b"\0" + struct.pack(">3H", 40000, 40000, 40000)
    (tmp_path / "b.png").write_bytes(make_png(1, 1, 16, 2, rows, [40000] * 3))
    with pytest.raises(ValueError, match="b.png can't be opened: a transparent colour among"):
        open_image(tmp_path / "b.png", GREEN)
    (tmp_path / "c.png").write_bytes(make_png(1, 1, 16, 2, rows))
    assert open_image(tmp_path / "c.png", GREEN).getpixel((0, 0)) == (156, 156, 156)


@pytest.mark.parametrize(
    "values, options, expected",
    [
        (np.array([[0.0, 0.5, 1.0]], "float32"), {}, [0, 128, 255]),
        (np.array([[0, 32896, 65535]], "uint16"), {}, [0, 128, 255]),
        (np.array([[0, 32896, 65535]], "uint16"), {"tiffinfo": {262: 0}}, [255, 127, 0]),
        (np.array([[0.0, 255.0]], "float32"), {}, "values are from 0 to 255, not from 0 to 1"),
        (np.array([[0.0, np.nan]], "float32"), {}, "values are from nan to nan"),
        (np.array([[0, 255]], "int32"), {}, "integers of 32 bits, or signed ones"),
    ],
)
def test_a_tiff_keeps_its_brightness_or_is_refused(values, options, expected, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif", **options)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"a.tif can't be opened: .*{expected}"):
            open_image(tmp_path / "a.tif")
    else:
        assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


def test_the_declared_size_is_checked_before_the_pixels_are_decoded(tmp_path):
    # Pillow itself warns of the first, and refuses the second.
    for width, message in ((10_001, "it has 10001 x 10000 pixels"), (18_000, "exceeds limit")):
        (tmp_path / "a.png").write_bytes(make_png(width, MAX_PIXELS // 10_000, 8, 2))
        with pytest.raises(ValueError, match=f"a.png can't be opened: .*{message}"):
            open_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(make_png(9_999, 10_000, 1, 0, bytes(12_510_000)))
    assert open_image(tmp_path / "a.png").size == (9_999, 10_000)


def test_a_named_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png can't be opened: there is no such file"):
        open_image(tmp_path / "a.png")


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


# Images that a model starts from


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype="uint8")


def write(folder, name, pixels=PIXELS, **options):
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: PIXELS,
        lambda folder: PIXELS.astype("float32"),
        lambda folder: PIXELS.astype("int64"),
        lambda folder: np.clip(PIXELS + 0.4, 0, 255),
        lambda folder: np.dstack([PIXELS, np.full((12, 16), 255, "uint8")]),
        lambda folder: Image.fromarray(PIXELS),
        lambda folder: write(folder, "a.png"),
        lambda folder: str(write(folder, "a.png")),
        lambda folder: Image.open(write(folder, "a.png")),
        lambda folder: PIXELS[None],
        lambda folder: [PIXELS],
    ],
)
def test_an_image_is_an_array_or_pillows_or_a_file(make, tmp_path):
    (image,) = read_images(make(tmp_path))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.array(image), PIXELS)


@pytest.mark.parametrize("shape", [(12, 16), (12, 16, 1)])
def test_grey_has_three_equal_channels(shape):
    (image,) = read_images(PIXELS[..., 0].reshape(shape))
    np.testing.assert_array_equal(np.array(image), np.stack([PIXELS[..., 0]] * 3, -1))


def test_several_of_any_kind(tmp_path):
    found = read_images([PIXELS, Image.fromarray(PIXELS), write(tmp_path, "a.png")])
    assert [np.array(image).tolist() for image in found] == [PIXELS.tolist()] * 3
    assert len(read_images(np.stack([PIXELS, PIXELS]))) == 2


def test_pillows_are_turned_and_on_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (30, 10))
    turned.info["exif"] = exif.tobytes()
    clear = Image.new("RGBA", (30, 10), (10, 10, 10, 0))
    turned, clear = read_images([turned, clear])
    assert turned.size == (10, 30) and clear.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS / 255, r"values from 0 to 255, not from 0 to 1\."),
        (PIXELS.astype("float32") * 2, "from 0 to 255, not from 0 to 510"),
        (np.full((12, 16, 3), np.nan), "not from nan to nan"),
        (PIXELS.astype("int64") - 1, "from 0 to 255, not from -1 to 254"),
        (PIXELS > 9, r"bool \(12, 16, 3\)"),
        (PIXELS[..., :2], r"uint8 \(12, 16, 2\)"),
        (np.zeros((1, 1, 3), "uint8"), "1 x 1 pixels; it needs at least 8 on each side"),
        (Image.new("RGB", (1, 1)), "1 x 1 pixels; it needs at least 8 on each side"),
        (np.zeros((0, 16, 3), "uint8"), "16 x 0 pixels"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "20000 x 20000 pixels"),
        (None, "must be a path, an image of Pillow's or an array"),
        ([], "at least one"),
        ("/no/such.png", "/no/such.png can't be opened: there is no such file"),
    ],
)
def test_images_that_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_images(image)


def test_other_sizes_are_scaled_and_cropped_which_is_said_once():
    found = [Image.fromarray(PIXELS)] * 3
    with pytest.warns(UserWarning) as said:
        fitted = fit_images(found, 12, 12)
    assert [str(one.message) for one in said] == [
        "An image of 16 x 12 pixels is scaled and cropped to 12 x 12."
    ]
    np.testing.assert_array_equal(fitted, np.stack([PIXELS[:, 2:14]] * 3))
    with pytest.warns(UserWarning, match="An image of 16 x 12 pixels is scaled to 32 x 24"):
        fit_images(found, 24, 32)
    np.testing.assert_array_equal(fit_images(found, 12, 16), np.stack([PIXELS] * 3))


@pytest.mark.parametrize("size", [(63, 48), (64, 48), (640, 479)])
def test_aspects_may_differ_by_rounding(size):
    assert images.has_aspect(size, (640, 480)) and not images.has_aspect((60, 48), (640, 480))
