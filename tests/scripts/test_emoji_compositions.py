"""Tests of scripts/emoji/compositions.py on small synthetic pictures."""

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "emoji"))

import compositions
from compositions import COLOURS, FILL, KINDS, PLACES, RELATIONS, SIZE, STYLES, Scene
from pictures import read_subjects

NAMES = ["red apple", "grapes", "octopus", "unicorn", "cat", "dog"]
BLUE = COLOURS["blue"]


@pytest.fixture(scope="module")
def sprites():
    """Opaque squares, each of its own colour and style; the first is wider than high."""
    sets = {}
    for number, (style, side) in enumerate({"3d": 64, "flat": 48}.items()):
        sets[style] = np.zeros((len(NAMES), side, side, 4), "uint8")
        for index, picture in enumerate(sets[style]):
            picture[8 : side // 2 if index == 0 else -8, 8:-8] = (250, 40 * index, 99 * number, 255)
    return compositions.Sprites(sets, NAMES)


def box(picture, colour=BLUE):
    """Left, top, right and bottom of what isn't background."""
    rows, columns = np.nonzero((picture != colour).any(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


# Scenes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": "mauve"}, "colour"),
        ({"style": "oil"}, "style"),
        ({"size": "huge"}, "size"),
        ({"place": "middle"}, "place"),
        ({"subjects": ()}, "one or two"),
        ({"subjects": ("cat", "dog"), "size": "small"}, "neither"),
        ({"relation": "above"}, "no relation"),
        ({"size": "large", "place": "top"}, "no room"),
    ],
)
def test_a_scene_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        Scene(**{"subjects": ("cat",), "colour": "blue", **fields})


def test_places_are_on_the_coarsest_grid():
    """The UNet halves the 16 cells of 8 pixels twice."""
    assert all(some % 32 == 0 for offset in PLACES.values() for some in offset)
    assert all(some % compositions.CELL == 0 for some in compositions.SHIFTS)
    assert all(some <= SIZE for some in FILL.values())


@pytest.mark.parametrize("name", ["octopus", "red apple"])
def test_colours_are_held_out_by_their_hash(name):
    for colour in COLOURS:
        expected = zlib.crc32(f"{name}|{colour}".encode()) % 10 == 0
        assert compositions.is_colour_held_out(name, colour) is expected


def test_pairs_are_held_out_by_their_hash_in_any_order():
    held_out = [
        (first, second)
        for first in NAMES
        for second in NAMES
        if first != second and compositions.is_pair_held_out(first, second)
    ]
    assert set(held_out) == {pair[::-1] for pair in held_out}
    for first, second in held_out:
        assert zlib.crc32("|".join(sorted((first, second))).encode()) % 10 == 0


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_random_scenes_keep_to_the_rule(kind, held_out):
    names, rng = list(read_subjects()), np.random.default_rng(0)
    for _ in range(50):
        scene = compositions.draw_scene(rng, names, held_out, kind)
        colours = [compositions.is_colour_held_out(name, scene.colour) for name in scene.subjects]
        pair = len(scene.subjects) == 2 and compositions.is_pair_held_out(*scene.subjects)
        assert (any(colours) or pair) is held_out
        assert (len(scene.subjects) == 2) is (kind == "pair")
        assert bool(scene.place) is (kind == "place")


# Pictures


@pytest.mark.parametrize("size", list(FILL))
def test_a_subject_fills_what_its_size_says(sprites, size):
    picture = sprites.draw(Scene(("octopus",), "blue", size=size))
    room = (SIZE - FILL[size]) // 2
    assert box(picture) == (room, room, SIZE - room, SIZE - room)


def test_a_wide_subject_keeps_its_shape(sprites):
    left, top, right, bottom = box(sprites.draw(Scene(("red apple",), "blue")))
    assert right - left == FILL[None] and bottom - top == FILL[None] // 2


@pytest.mark.parametrize("place", list(PLACES))
def test_places(sprites, place):
    left, top, right, bottom = box(sprites.draw(Scene(("octopus",), "blue", place=place)))
    across, down = PLACES[place]
    assert (left + right) / 2 == SIZE / 2 + across and (top + bottom) / 2 == SIZE / 2 + down


@pytest.mark.parametrize(
    ("relation", "axis", "is_first_less"),
    [
        (None, 1, True),
        ("left of", 1, True),
        ("right of", 1, False),
        ("above", 0, True),
        ("below", 0, False),
    ],
)
def test_relations(sprites, relation, axis, is_first_less):
    picture = sprites.draw(Scene(("cat", "dog"), "blue", relation=relation))
    middles = [
        np.argwhere((picture == (250, green, 0)).all(-1)).mean(0)[axis] for green in (160, 200)
    ]
    assert bool(middles[0] < middles[1]) is is_first_less


def test_mirrored_and_shifted(sprites):
    scene = Scene(("octopus",), "blue")
    plain, moved = sprites.draw(scene), sprites.draw(scene, shift=(8, -8))
    np.testing.assert_array_equal(moved[:-8, 8:], plain[8:, :-8])
    mirrored = sprites.draw(scene, mirrored=(True,))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_what_lies_outside_is_cut_off(sprites):
    spots = [("octopus", FILL["small"], (-60, 60))]
    left, _, _, bottom = box(sprites.draw_spots(spots, "blue", "3d"))
    assert left == 0 and bottom == SIZE


def test_edges_are_blended(sprites):
    """A pixel of half alpha is halfway between subject and background."""
    sprites.sprites["3d", 56][2, 28, 28] = (255, 255, 255, 51)
    picture = sprites.draw(Scene(("octopus",), "black", size="small"))
    assert picture[64, 64].tolist() == [51, 51, 51]


# Captions

EXAMPLES = {
    "a red apple on a blue background": Scene(("red apple",), "blue"),
    "an octopus on an orange background": Scene(("octopus",), "orange"),
    "grapes on a red background": Scene(("grapes",), "red"),
    "a flat red apple on a blue background": Scene(("red apple",), "blue", "flat"),
    "a small cat on a white background": Scene(("cat",), "white", size="small"),
    "a large flat cat on a white background": Scene(("cat",), "white", "flat", "large"),
    "a cat on the left of a red background": Scene(("cat",), "red", place="left"),
    "a cat at the top of a red background": Scene(("cat",), "red", place="top"),
    "a cat and a dog on a red background": Scene(("cat", "dog"), "red"),
    "a cat to the left of a dog on a red background": Scene(
        ("cat", "dog"), "red", relation="left of"
    ),
    "a cat to the right of a dog on a red background": Scene(
        ("cat", "dog"), "red", relation="right of"
    ),
    "a cat above a dog on a red background": Scene(("cat", "dog"), "red", relation="above"),
    "a cat below grapes on a red background": Scene(("cat", "grapes"), "red", relation="below"),
}


@pytest.mark.parametrize("caption", list(EXAMPLES))
def test_the_common_caption(caption):
    assert compositions.make_caption(EXAMPLES[caption]) == caption


@pytest.mark.parametrize("scene", list(EXAMPLES.values()), ids=list(EXAMPLES))
def test_captions_say_all_in_at_least_twelve_wordings(scene):
    captions = compositions.list_captions(scene)
    assert len(captions) == len(set(captions)) >= 12
    for caption in captions:
        assert all(name in caption for name in scene.subjects)
        assert scene.colour in caption.split() or f"{scene.colour}," in caption
        assert ("flat" in caption) is (scene.style == "flat")
        assert not scene.size or scene.size in caption
        assert not (scene.place and scene.size) or scene.place in caption


def test_a_relation_is_told_from_both_sides():
    captions = compositions.list_captions(Scene(("cat", "dog"), "red", relation="below"))
    for expected in ("a cat below a dog", "a dog above a cat", "a cat under a dog"):
        assert any(caption.startswith(expected) for caption in captions)
    assert not any(caption.startswith("a dog below") for caption in captions)


def test_the_usual_background_may_go_unnamed():
    assert "a cat" in compositions.list_unnamed(Scene(("cat",), "white"))
    assert "a flat cat" in compositions.list_unnamed(Scene(("cat",), "white", "flat"))
    assert not compositions.list_unnamed(Scene(("cat",), "blue"))


def test_drawn_captions_are_of_the_scene():
    rng = np.random.default_rng(0)
    scene = Scene(("red apple", "dog"), "white", relation="above")
    drawn = {compositions.draw_caption(rng, scene) for _ in range(300)}
    assert any("red apple" in caption for caption in drawn)
    assert any(caption.startswith("an apple above a dog") for caption in drawn)
    assert any("3D" in caption for caption in drawn)
    assert any("background" not in caption for caption in drawn)
    assert len(drawn) > 40


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hourglass", "an hourglass"),
        ("unicorn", "a unicorn"),
        ("ufo", "a ufo"),
        ("grapes", "grapes"),
        ("ear of corn", "an ear of corn"),
        ("santa claus", "santa claus"),
        ("sushi", "sushi"),
    ],
)
def test_articles(name, expected):
    assert compositions.make_caption(Scene((name,), "red")) == f"{expected} on a red background"


def test_other_words_are_of_subjects_and_no_subjects():
    names = set(read_subjects())
    assert set(compositions.ALIASES) <= names
    assert not names & set(compositions.ALIASES.values())


def test_styles_are_told_apart(sprites):
    one, other = (sprites.draw(Scene(("cat",), "blue", style)) for style in STYLES)
    assert (one != other).any()
    assert set(RELATIONS) >= {None, "left of", "above"}


def test_sheet(tmp_path, monkeypatch, sprites):
    monkeypatch.setattr(compositions, "load_pictures", lambda path: None)
    monkeypatch.setattr(compositions, "Sprites", lambda pictures: sprites)
    path = tmp_path / "sheet.png"
    assert compositions.main(["pictures.npz", "--sheet", str(path)]) == 0
    assert path.stat().st_size > 1000


def test_bad_input_is_one_line(tmp_path, capsys):
    arguments = [str(tmp_path / "missing.npz"), "--sheet", str(tmp_path / "sheet.png")]
    assert compositions.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
