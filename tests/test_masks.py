"""Masks, the part of an image that is generated, and what of the image is kept."""

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.masks import SEAM, list_paintings, read_mask

pytestmark = pytest.mark.quick

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 48, 3), dtype="uint8")
MASK = np.ones((32, 48), bool)
MASK[8:20, 10:30] = False


def read(mask, image=IMAGE, size=(32, 48), **options):
    (painting,) = list_paintings(image, mask, *size, **options)
    return painting


def save(path, mask):
    Image.fromarray(mask).save(path)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: MASK,
        lambda folder: MASK[..., None],
        lambda folder: MASK.astype("float32") * 0.9,
        lambda folder: MASK.astype("int64"),
        lambda folder: np.where(MASK, 128, 127).astype("uint8"),
        lambda folder: Image.fromarray(MASK),
        lambda folder: Image.fromarray(np.where(MASK, 128, 127).astype("uint8")),
        lambda folder: Image.fromarray(np.where(MASK, 255, 0).astype("uint8")).convert("RGB"),
        lambda folder: save(folder / "mask.png", np.where(MASK, 200, 100).astype("uint8")),
        lambda folder: str(save(folder / "mask.png", MASK)),
        lambda folder: np.repeat(np.repeat(MASK, 3, 0), 3, 1),
        lambda folder: MASK[None],
    ],
)
def test_kinds_of_masks(make, tmp_path):
    painting = read(make(tmp_path))
    np.testing.assert_array_equal(painting.painted, ~MASK)
    np.testing.assert_array_equal(painting.seen_painted, ~MASK)
    np.testing.assert_array_equal(painting.seen, IMAGE)


def test_white_may_be_painted():
    np.testing.assert_array_equal(read_mask(MASK, white_keeps=False), ~MASK)
    np.testing.assert_array_equal(read_mask(MASK), MASK)


def test_a_stroke_is_painted_however_thin():
    """A pixel of a tenth of a latent cell is enough, also in a mask that is scaled down."""
    mask = np.ones((320, 480), bool)
    mask[100, 200:203] = False
    painting = read(mask)
    assert np.argwhere(painting.painted).tolist() == [[10, 20]]
    assert np.argwhere(painting.find_cells(8)[..., 0]).tolist() == [[1, 2]]
    assert painting.find_cells(8).shape == (4, 6, 1)


@pytest.mark.filterwarnings("ignore:An image of 48 x 32 pixels")
def test_masks_are_cropped_as_their_images():
    mask = np.ones((32, 48), bool)
    mask[:, 8:10] = False
    painting = read(mask, size=(32, 32))
    np.testing.assert_array_equal(painting.seen, IMAGE[:, 8:40])
    assert painting.painted[:, :2].all() and not painting.painted[:, 2:].any()


def test_several_images_and_masks():
    paintings = list_paintings([IMAGE, IMAGE[::-1]], [MASK, MASK[::-1]], 32, 48)
    np.testing.assert_array_equal(paintings[1].painted, ~MASK[::-1])
    for one in list_paintings(np.stack([IMAGE] * 2), MASK, 32, 48):
        np.testing.assert_array_equal(one.painted, ~MASK)


@pytest.mark.parametrize("shape", [(30, 36), (12, 20), (5, 5), (3, 40), (1, 1)])
def test_what_is_kept_is_exact_and_the_seam_is_narrow(shape):
    mask = np.ones((32, 48), bool)
    mask[1 : 1 + shape[0], 4 : 4 + shape[1]] = False
    generated = RNG.integers(0, 256, (32, 48, 3), dtype="uint8")
    result = read(mask).paste(generated)
    np.testing.assert_array_equal(result[mask], IMAGE[mask])
    inner = np.zeros_like(mask)
    y, x = (range(a + SEAM, a + n - SEAM) for a, n in zip((1, 4), shape, strict=True))
    inner[y.start : max(y.stop, 0), x.start : max(x.stop, 0)] = True
    np.testing.assert_array_equal(result[inner], generated[inner])
    assert SEAM <= 8


@pytest.mark.parametrize("shape", [(12, 20), (3, 40), (1, 1)])
def test_what_fits_already_is_not_changed(shape):
    """Also a stroke of one pixel: it's what was generated, with nothing of what was there."""
    mask = np.ones((32, 48), bool)
    mask[6 : 6 + shape[0], 4 : 4 + shape[1]] = False
    generated = np.where(mask[..., None], IMAGE, np.uint8(77))
    np.testing.assert_array_equal(read(mask).paste(generated), generated)


def test_the_seam_fits_what_is_beside_it():
    """A step of 90 at the edge of the mask becomes a ramp. What was there does not matter."""
    image, mask = np.full((32, 48, 3), 100, "uint8"), np.ones((32, 48), bool)
    image[:, 10:], mask[:, 10:] = 7, False
    row = read(mask, image).paste(np.full((32, 48, 3), 190, "uint8"))[16, 8:20, 0]
    expected = [100, 100, *(100 + 10 * k for k in range(1, SEAM + 1)), 190, 190]
    assert row.tolist() == expected


# Crop and paste


def test_cropped_the_model_sees_the_surroundings_only():
    image = RNG.integers(0, 256, (300, 400, 3), dtype="uint8")
    mask = np.ones((300, 400), bool)
    mask[100:120, 200:216] = False
    painting = read(mask, image, (32, 32), crop=6)
    assert painting.box == (192, 94, 224, 126)
    np.testing.assert_array_equal(painting.seen, image[94:126, 192:224])
    np.testing.assert_array_equal(painting.seen_painted, ~mask[94:126, 192:224])
    result = painting.paste(np.where(painting.seen_painted[..., None], np.uint8(9), painting.seen))
    assert result.shape == image.shape and (result[110, 208] == 9).all()
    np.testing.assert_array_equal(result[mask], image[mask])


@pytest.mark.parametrize("corner", [(0, 0), (0, 390), (290, 0), (290, 390)])
def test_at_the_edge_the_part_is_shifted_into_the_image(corner):
    mask = np.ones((300, 400), bool)
    mask[corner[0] : corner[0] + 10, corner[1] : corner[1] + 10] = False
    left, top, right, bottom = read(mask, np.zeros((300, 400, 3), "uint8"), (64, 64), crop=20).box
    assert left >= 0 and top >= 0 and right <= 400 and bottom <= 300
    assert (right - left, bottom - top) == (50, 50)


def test_a_part_that_is_wider_than_the_image():
    """What is missing above and below are the pixels at the edge; the aspect is kept."""
    image = RNG.integers(0, 256, (20, 100, 3), dtype="uint8")
    mask = np.ones((20, 100), bool)
    mask[5:15, 10:90] = False
    painting = read(mask, image, (80, 80), crop=0)
    assert painting.box == (10, -30, 90, 50)
    np.testing.assert_array_equal(painting.seen[30:50], image[:, 10:90])
    np.testing.assert_array_equal(painting.seen[0], image[0, 10:90])
    assert not painting.seen_painted[:30].any() and not painting.seen_painted[50:].any()
    generated = np.where(painting.seen_painted[..., None], 255 - painting.seen, painting.seen)
    result = painting.paste(generated)
    np.testing.assert_array_equal(result[mask], image[mask])
    np.testing.assert_array_equal(result[10, 50], generated[40, 40])


def test_cropped_and_scaled():
    """A large photo: each kept pixel stays, and the generated part has its place."""
    image = np.zeros((600, 800, 3), "uint8")
    mask = np.ones((600, 800), bool)
    mask[200:400, 300:500] = False
    painting = read(mask, image, (32, 32), crop=28)
    assert painting.box == (272, 172, 528, 428) and painting.seen.shape == (32, 32, 3)
    generated = np.where(painting.seen_painted[..., None], np.uint8(200), painting.seen)
    generated[:, :16] = 0  # the left half
    result = painting.paste(generated)
    assert not result[mask].any()
    assert not result[300, 350].any() and (result[300, 450] == 200).all()


# What is refused


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((32, 32), bool), "32 x 32 pixels; it needs the aspect of its image, .* 48 x 32"),
        (np.ones((32, 48), bool), "keeps everything"),
        (np.full((32, 48), 2.0), "from 0 to 1, not from 2 to 2"),
        (np.full((32, 48), np.nan), "from 0 to 1, not from nan to nan"),
        (np.full((32, 48), -1), "from 0 to 255, not from -1 to -1"),
        (np.full((32, 48), 256), "from 0 to 255, not from 256 to 256"),
        (np.full((32, 48), "a"), "must be a path, .* not <U1"),
        (np.zeros((2, 2, 32, 48)), r"must be a path"),
        (np.zeros((0, 48)), r"\(0, 48\)"),
        (None, "must be a path"),
        ([], "at least one"),
        ([MASK] * 3, "1 images need one mask or one each, not 3"),
        ("/no/such/mask.png", "/no/such/mask.png can't be opened"),
    ],
)
def test_masks_that_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        read(mask)


@pytest.mark.filterwarnings("ignore:An image of 48 x 32 pixels")
def test_a_mask_of_what_is_not_generated():
    mask = np.ones((32, 48), bool)
    mask[:, :4] = False
    with pytest.raises(ValueError, match="lies outside the part that is generated"):
        read(mask, size=(32, 32))


def test_crop_needs_images_of_one_size():
    with pytest.raises(ValueError, match="same size"):
        list_paintings([IMAGE, IMAGE[:, :32]], MASK, 32, 48, crop=0)
    with pytest.raises(ValueError, match="crop must be an int from 0, not -1"):
        read(MASK, crop=-1)
