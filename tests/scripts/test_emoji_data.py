"""Tests of emoji_data.py on small synthetic pictures; no font is read or downloaded."""

import subprocess
import sys

import emoji_data
import numpy as np
import pytest

NAMES = ["red apple", "grapes", "octopus", "unicorn", "ice cream", "hourglass"]
BLUE = (0, 0, 255)


@pytest.fixture
def pictures():
    """uint8 (N, 128, 128, 4): an opaque square of its own colour, transparent around."""
    result = np.zeros((len(NAMES), 128, 128, 4), "uint8")
    for index, picture in enumerate(result):
        picture[8:120, 8:120] = (200, 30 + 20 * index, 10, 255)
    return result


def box(picture):
    """Left, top, right and bottom of what is not blue background."""
    rows, columns = np.nonzero(np.abs(picture.astype(int) - BLUE).sum(-1) > 60)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize(
    ("official", "natural"),
    [
        (":red_apple:", "red apple"),
        (":T-Rex:", "t-rex"),
        (":woman’s_hat:", "woman's hat"),
        (":piñata:", "pinata"),
        (":hourglass_done:", "hourglass"),
    ],
)
def test_natural_name(official, natural):
    assert emoji_data.natural_name(official) == natural


@pytest.mark.parametrize(
    ("char", "name", "expected"),
    [
        ("🍎", "red apple", True),
        ("✈", "airplane", True),
        ("🎅", "santa claus", True),
        ("👨", "man", False),  # a person
        ("🅰", "a button (blood type)", False),  # outside the ranges
        ("🕐", "one o'clock", False),
        ("🏁", "chequered flag", False),  # an excluded word
        ("🌀", "cyclone", False),  # an excluded name
        ("😄", "grinning face with smiling eyes", False),  # too many words
    ],
)
def test_is_subject(char, name, expected):
    known = {"👨\U0001f3fb", "🎅\U0001f3fb"}
    assert emoji_data.is_subject(char, name, known) is expected


@pytest.mark.parametrize(
    ("name", "colour", "size", "side", "expected"),
    [
        ("red apple", "blue", None, None, "a red apple on a blue background"),
        ("octopus", "orange", None, None, "an octopus on an orange background"),
        ("octopus", "red", "small", None, "a small octopus on a red background"),
        ("unicorn", "red", None, None, "a unicorn on a red background"),
        ("hourglass", "red", None, None, "an hourglass on a red background"),
        ("one-piece swimsuit", "red", None, None, "a one-piece swimsuit on a red background"),
        ("grapes", "pink", None, None, "grapes on a pink background"),
        ("ice cream", "pink", "large", None, "large ice cream on a pink background"),
        ("glass of milk", "pink", None, None, "a glass of milk on a pink background"),
        ("nest with eggs", "pink", None, None, "a nest with eggs on a pink background"),
        ("santa claus", "pink", None, None, "santa claus on a pink background"),
        ("red apple", "blue", None, "left", "a red apple on the left of a blue background"),
        ("red apple", "blue", None, "top", "a red apple at the top of a blue background"),
    ],
)
def test_caption_common_template(name, colour, size, side, expected):
    assert emoji_data.caption(name, colour, size=size, side=side) == expected


def test_caption_templates():
    rng = np.random.default_rng(0)
    draws = [emoji_data.caption("red apple", "blue", rng) for _ in range(300)]
    assert set(draws) == {
        "a red apple on a blue background",
        "red apple on blue",
        "a picture of a red apple, blue background",
        "an emoji of a red apple on a blue background",
    }
    assert max(set(draws), key=draws.count) == "a red apple on a blue background"
    draws = {emoji_data.caption("grapes", "blue", rng, "small", "right") for _ in range(300)}
    assert draws == {
        "small grapes on the right of a blue background",
        "small grapes on the right, on blue",
        "a picture of small grapes on the right, blue background",
        "an emoji of small grapes on the right of a blue background",
    }


def test_caption_rejects_unknown_words():
    with pytest.raises(ValueError, match="'tiny'"):
        emoji_data.caption("red apple", "blue", size="tiny")
    with pytest.raises(ValueError, match="'middle'"):
        emoji_data.caption("red apple", "blue", side="middle")


def test_captions_are_what_caption_draws_from():
    rng = np.random.default_rng(0)
    for size, side in [(None, None), ("small", None), (None, "left"), ("small", "bottom")]:
        draws = {emoji_data.caption("red apple", "blue", rng, size, side) for _ in range(200)}
        assert draws == set(emoji_data.captions("red apple", "blue", size, side))


def test_jitter_keeps_to_its_bounds():
    rng = np.random.default_rng(0)
    draws = [emoji_data.jitter(rng) for _ in range(300)]
    scales = np.array([scale for scale, _ in draws])
    shifts = np.array([shift for _, shift in draws])
    assert 0.92 <= scales.min() < 0.93 and 0.99 < scales.max() <= 1
    assert 3.5 < np.abs(shifts).max() <= 4


def test_thumbnails_are_averages():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 128, 128, 3), dtype="uint8")
    thumbnails = emoji_data.thumbnails(pictures)
    assert thumbnails.shape == (2, 32, 32, 3) and thumbnails.dtype == np.float32
    expected = pictures[1, 8:12, 120:124].reshape(-1, 3).mean(0)
    np.testing.assert_allclose(thumbnails[1, 2, 30], expected, rtol=1e-6)


def test_distances_are_mean_squared_errors():
    rng = np.random.default_rng(0)
    one, other = (rng.uniform(0, 255, (n, 32, 32, 3)).astype("float32") for n in (3, 4))
    expected = np.mean((one[:, None] - other) ** 2, axis=(2, 3, 4))
    np.testing.assert_allclose(emoji_data.distances(one, other), expected, rtol=1e-4)
    assert (emoji_data.distances(one, one) >= 0).all()


def test_distinct_drops_what_looks_alike(pictures):
    """Of two alike the longer name goes, but none that is familiar."""
    names = ["red apple", "grape", "octo", "jar", "ice cream", "hourglass"]
    pictures[:, 8:120, 8:120] = 0
    for picture, level in zip(pictures, [0, 2, 60, 63, 120, 255], strict=True):
        picture[8:120, 8:120] = (level, level, level, 255)
    kept, chosen = emoji_data.distinct(names, pictures, 4)
    assert kept == ["red apple", "jar", "ice cream", "hourglass"]
    np.testing.assert_array_equal(chosen, pictures[[0, 3, 4, 5]])
    assert emoji_data.distinct(names, pictures, 99)[0] == names
    alike = np.repeat(pictures[:1], 3, axis=0)
    assert emoji_data.distinct(["pizza", "jar", "red apple"], alike, 1)[0] == ["pizza", "red apple"]


def test_held_out_is_a_tenth():
    pairs = [(f"subject {i}", colour) for i in range(500) for colour in emoji_data.COLOURS]
    share = np.mean([emoji_data.held_out(*pair) for pair in pairs])
    assert 0.09 < share < 0.11
    # The split is fixed: a trained checkpoint's held-out pairs are these.
    assert emoji_data.held_out("octopus", "red") and not emoji_data.held_out("red apple", "blue")


def test_compose_full_size(pictures):
    result = emoji_data.compose(pictures[0], BLUE)
    assert result.shape == (128, 128, 3) and result.dtype == np.uint8
    assert tuple(result[0, 0]) == BLUE
    assert tuple(result[64, 64]) == (200, 30, 10)
    assert box(result) == (8, 8, 120, 120)
    np.testing.assert_array_equal(emoji_data.compose(pictures[0], BLUE, 1.0, (50, 50)), result)


def test_compose_blends_half_transparent():
    picture = np.full((128, 128, 4), (200, 100, 0, 128), "uint8")
    result = emoji_data.compose(picture, (0, 0, 200))
    np.testing.assert_allclose(result[5, 5], (100, 50, 100), atol=1)


def test_compose_scale_hides_the_colour_of_transparent_pixels():
    picture = np.full((128, 128, 4), (255, 255, 255, 0), "uint8")  # invisible white
    picture[32:96, 32:96] = (0, 0, 0, 255)
    assert emoji_data.compose(picture, (0, 0, 0), 0.55).max() == 0


@pytest.mark.parametrize("offset", [(-29, 0), (29, 0), (0, -29), (0, 29), (-500, 500)])
def test_compose_clips(pictures, offset):
    picture = pictures[0].copy()
    picture[:] = (200, 30, 10, 255)
    left, top, right, bottom = box(emoji_data.compose(picture, BLUE, 0.55, offset))
    assert (right - left, bottom - top) == (70, 70)
    centre = [min(max(29 + shift, 0), 58) for shift in offset]
    assert [left, top] == centre


@pytest.mark.parametrize("scale", [0, -1, 1.5])
def test_compose_rejects_scale(pictures, scale):
    with pytest.raises(ValueError, match=str(scale)):
        emoji_data.compose(pictures[0], BLUE, scale)


def test_fit_centres_and_fills():
    from PIL import Image

    picture = np.zeros((128, 136, 4), "uint8")
    picture[10:30, 20:60] = (9, 9, 9, 255)  # 40 by 20, off the centre
    result = emoji_data.fit(Image.fromarray(picture))
    assert result.size == (128, 128)
    assert result.getchannel("A").getbbox() == (8, 36, 120, 92)


def test_sample_is_deterministic(pictures):
    first, second = (np.random.default_rng(7) for _ in range(2))
    for _ in range(20):
        picture, words = emoji_data.sample(first, NAMES, pictures)
        again, same_words = emoji_data.sample(second, NAMES, pictures)
        np.testing.assert_array_equal(picture, again)
        assert words == same_words


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_sample_keeps_to_its_split(pictures, split):
    rng = np.random.default_rng(1)
    backgrounds = {rgb: colour for colour, rgb in emoji_data.COLOURS.items()}
    plain = 0
    for _ in range(400):
        picture, words = emoji_data.sample(rng, NAMES, pictures, split)
        name = next(name for name in NAMES if name in words)
        corners = [tuple(picture[y, x].tolist()) for y in (0, -1) for x in (0, -1)]
        colour = backgrounds[max(set(corners), key=corners.count)]
        assert colour in words
        assert emoji_data.held_out(name, colour) == (split == "held_out")
        plain += words == emoji_data.caption(name, colour)
    assert 0.6 < plain / 400 < 0.8


def test_sample_rejects_split(pictures):
    with pytest.raises(ValueError, match="'test'"):
        emoji_data.sample(np.random.default_rng(0), NAMES, pictures, "test")
    # No background of the red apple is held out, so there is nothing to draw.
    with pytest.raises(ValueError, match="held_out"):
        emoji_data.sample(np.random.default_rng(0), ["red apple"], pictures, "held_out")


def test_save_and_load(tmp_path, pictures):
    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for file in files:
        emoji_data.save(file, NAMES, pictures)
    names, loaded = emoji_data.load(files[0])
    assert names == NAMES
    np.testing.assert_array_equal(loaded, pictures)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files  # no temporary file is left


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken"])
def test_load_rejects_other_files(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="data.npz: not a data set"):
        emoji_data.load(path)


def test_load_rejects_other_arrays(tmp_path):
    np.savez(tmp_path / "data.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="data.npz: not a data set"):
        emoji_data.load(tmp_path / "data.npz")
    with open(tmp_path / "data.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="data.npz: not a data set"):
        emoji_data.load(tmp_path / "data.npz")


def test_missing_font(tmp_path):
    font = tmp_path / "none.ttf"
    command = [sys.executable, emoji_data.__file__, "--out", tmp_path / "data.npz", "--font", font]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and str(font) in done.stderr
    assert not (tmp_path / "data.npz").exists()


def test_file_that_is_no_font(tmp_path, capsys):
    pytest.importorskip("fontTools")
    pytest.importorskip("emoji")
    font = tmp_path / "text.ttf"
    font.write_text("not a font at all")
    assert emoji_data.main(["--out", str(tmp_path / "data.npz"), "--font", str(font)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(font) in message
