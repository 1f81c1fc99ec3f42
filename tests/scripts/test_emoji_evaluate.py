"""Tests of scripts/emoji/evaluate.py and draw_grid.py: on references, which are right.

The subjects are synthetic: coloured blocks. In place of a pipeline a function draws the scenes.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "emoji"))

import draw_grid
import evaluate
from compositions import COLOURS, FILL, SIZE, STYLES, Sprites, is_held_out, make_caption
from pictures import read_subjects

NAMES = ["octopus", "balloon", "rocket", "tulip", "pizza", "frog", "whale", "crown"]


@pytest.fixture(scope="module")
def sprites():
    """A block of 4x4 random colours for each subject and style."""
    rng = np.random.default_rng(0)
    sets = {}
    for style, side in (("3d", 64), ("flat", 48)):
        blocks = rng.integers(0, 256, (len(NAMES), 4, 4, 4))
        blocks[..., 3] = 255
        sets[style] = blocks.repeat(side // 4, 1).repeat(side // 4, 2).astype("uint8")
    return Sprites(sets, NAMES, [*FILL.values(), evaluate.OLD_FILL])


class Painter:
    """A pipeline that draws each scene as it should be, changed by a function."""

    def __init__(self, sprites, scenes, change=lambda scene: scene, look=lambda picture: picture):
        self.sprites, self.scenes, self.change, self.look = sprites, scenes, change, look
        self.options = []

    def text_to_image(self, prompts, seed, verbose, **options):
        self.options.append(options)
        assert len(prompts) == len(seed) and len(set(seed)) == len(seed)
        by_caption = {make_caption(scene): scene for scene in self.scenes}
        pictures = [self.sprites.draw(self.change(by_caption[prompt])) for prompt in prompts]
        return np.stack([self.look(picture) for picture in pictures])


def evaluation(sprites, kind, count, monkeypatch, **changes):
    """Returns an `Evaluation` whose pipeline draws `count` scenes of a kind."""
    scenes = evaluate.choose_scenes(NAMES, kind, count)
    monkeypatch.setattr(evaluate, "choose_scenes", lambda *args, **kwargs: scenes)
    return evaluate.Evaluation(Painter(sprites, scenes, **changes), sprites, True, {})


# Measures


def test_grain_is_of_the_outer_pixels(sprites):
    rng = np.random.default_rng(0)
    picture = np.full((SIZE, SIZE, 3), 128)
    picture[8:-8, 8:-8] = rng.integers(0, 256, (112, 112, 3))
    noisy = np.clip(picture + rng.normal(0, 5, picture.shape), 0, 255)
    grain = evaluate.measure_grain(np.stack([picture, noisy]).astype("uint8"))
    assert grain[0] == 0 and 4.7 < grain[1] < 5.3


def test_edges_grow_with_the_square_of_contrast():
    picture = np.zeros((1, SIZE, SIZE, 3), "uint8")
    picture[:, 32:64, 32:64] = 60
    assert evaluate.measure_edges(3 * picture) == pytest.approx(9 * evaluate.measure_edges(picture))


def test_psnr():
    pictures = np.full((2, 8, 8, 3), 100, "uint8")
    other = pictures + np.array([1, 10], "uint8")[:, None, None, None]
    np.testing.assert_allclose(evaluate.measure_psnr(pictures, other), [48.13, 28.13], atol=0.01)


@pytest.mark.parametrize("colour", list(COLOURS))
def test_colours(sprites, colour):
    scene = evaluate.choose_scenes(NAMES, ["plain"], 1)[0]
    drawn = sprites.draw(replace(scene, colour=colour))[None]
    assert evaluate.name_colours(drawn) == [colour]


# Judging


def test_all_is_right_of_references(sprites, monkeypatch):
    result = evaluation(sprites, ["plain"], 10, monkeypatch).measure_plain(10)
    assert result["subject"] == result["style"] == result["colour"] == 100
    assert result["grain"] == 0 and result["edges"] == pytest.approx(1) and not result["wrong"]


def test_moved_and_mirrored_is_right(sprites, monkeypatch):
    def look(picture):
        return np.roll(picture[:, ::-1], (8, -8), (0, 1))

    result = evaluation(sprites, ["plain"], 10, monkeypatch, look=look).measure_plain(10)
    assert result["subject"] == 100 and result["edges"] == pytest.approx(1)


def test_another_subject_is_wrong(sprites, monkeypatch):
    def change(scene):
        return replace(scene, subjects=(NAMES[NAMES.index(scene.subjects[0]) - 1],))

    result = evaluation(sprites, ["plain"], 10, monkeypatch, change=change).measure_plain(10)
    assert result["subject"] == 0 and result["colour"] == 100 and len(result["wrong"]) == 10


def test_another_style_is_told(sprites, monkeypatch):
    def change(scene):
        return replace(scene, style=STYLES[1 - STYLES.index(scene.style)])

    result = evaluation(sprites, ["plain"], 10, monkeypatch, change=change).measure_plain(10)
    assert result["subject"] == 100 and result["style"] == 0


def test_sizes_and_places(sprites, monkeypatch):
    kinds = ["small", "large", "place"]
    result = evaluation(sprites, kinds, 12, monkeypatch).measure_placed(12)
    assert result["subject"] == 100 and result["edges"] == pytest.approx(1)


def test_a_wrong_place_is_wrong(sprites, monkeypatch):
    def change(scene):
        other = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
        return replace(scene, place=other[scene.place])

    judge = evaluation(sprites, ["place"], 12, monkeypatch, change=change)
    assert judge.measure_placed(12)["subject"] < 50


def test_pairs(sprites, monkeypatch):
    result = evaluation(sprites, ["pair"], 16, monkeypatch).measure_pairs(16)
    assert result["both"] == result["relation"] == result["colour"] == 100
    assert result["edges"] == pytest.approx(1)


def test_exchanged_pairs_are_there_but_not_where_they_should_be(sprites, monkeypatch):
    def change(scene):
        return replace(scene, subjects=scene.subjects[::-1])

    result = evaluation(sprites, ["pair"], 16, monkeypatch, change=change).measure_pairs(16)
    assert result["both"] == 100 and result["relation"] == 0


def test_one_subject_twice_is_not_both(sprites, monkeypatch):
    def change(scene):
        return replace(scene, subjects=scene.subjects[:1] * 2)

    result = evaluation(sprites, ["pair"], 16, monkeypatch, change=change).measure_pairs(16)
    assert result["both"] < 20  # by chance: there are few subjects here


class Same:
    """A model that returns what it gets."""

    def predict_on_batch(self, x):
        return x


def test_the_vae_is_measured_on_references(sprites, monkeypatch):
    judge = evaluation(sprites, ["plain", "pair"], 8, monkeypatch)
    judge.pipeline.image_encoder = judge.pipeline.decoder = Same()
    result = judge.measure_vae(8)
    for style in STYLES:
        assert result[style]["psnr"] > 90 and result[style]["edges"] == pytest.approx(1)


def test_all_parts_and_the_samples(sprites, monkeypatch, tmp_path):
    judge = evaluation(sprites, ["plain", "pair", "place"], 9, monkeypatch)
    judge.pipeline.image_encoder = judge.pipeline.decoder = Same()
    judge.options = {"num_steps": 7}
    judge.draw_samples(tmp_path / "samples.png", 9)
    with Image.open(tmp_path / "samples.png") as image:
        assert image.width == 8 * (SIZE + 8)
    assert judge.pipeline.options == [{"num_steps": 7}]
    result = evaluate.evaluate(judge, 0, 0, 0)
    assert list(result) == ["vae"] and "VAE, PSNR" in evaluate.show_tables(result)


def test_a_checkpoint_without_styles_is_asked_as_it_knows_it(sprites):
    scene = replace(evaluate.choose_scenes(NAMES, ["plain"], 1)[0], style="flat")
    old = evaluate.Evaluation(None, sprites, False, {})
    assert "flat" not in old.caption(scene) and "background" in old.caption(scene)
    assert old.styles == ("flat",) and old.fill == evaluate.OLD_FILL


def test_chosen_scenes_are_held_out_and_the_same_each_time():
    names = list(read_subjects())
    scenes = evaluate.choose_scenes(names, ["plain", "pair"], 20)
    assert scenes == evaluate.choose_scenes(names, ["plain", "pair"], 20)
    assert len(set(scenes)) == 20 and {scene.style for scene in scenes} == set(STYLES)
    assert all(is_held_out(scene) for scene in scenes)


def test_tables_have_a_line_for_each_number():
    row = {"count": 4, "subject": 75.0, "grain": 1.25, "wrong": ["a cat on blue"]}
    pairs = {"count": 2, "both": 50.0, "relation": None}
    vae = {"count": 8, "flat": {"psnr": 33.3, "least": 30.0, "edges": 0.9, "grain": 0.5}}
    text = evaluate.show_tables({"vae": vae, "plain": row, "pairs": pairs})
    for expected in ("75.0 %", "1.25 levels", "33.30 dB", "50.0 %", "4 scenes", "a cat on blue"):
        assert expected in text
    assert "where they should be" not in text
    json.dumps({"vae": vae, "plain": row})


def test_bad_input_is_one_line(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / "missing.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_says_what_it_draws(tmp_path):
    with pytest.raises(ValueError, match=r"subjects\.txt"):
        evaluate.check_subjects(tmp_path, NAMES)
    (tmp_path / "subjects.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (tmp_path / "words.txt").write_text("octopus\nflat\n")
    assert evaluate.check_subjects(tmp_path, NAMES) is True
    (tmp_path / "words.txt").write_text("octopus\nflatbread\n")
    assert evaluate.check_subjects(tmp_path, NAMES) is False
    with pytest.raises(ValueError, match="other subjects, as crown"):
        evaluate.check_subjects(tmp_path, NAMES[:-1])


# The grid


def test_the_grid_has_eight_columns_and_all_parts():
    class Pipeline:
        calls = []

        def text_to_image(self, prompts, seed, **options):
            self.calls.append((prompts, options))
            return np.zeros((len(prompts), 4, 4, 3), "uint8")

    grid = draw_grid.draw_grid(Pipeline(), seed=3, guidance=2.0)
    rows = len(draw_grid.COLOURS) + 3
    assert grid.shape == (rows * 4 + 3 * draw_grid.GAP, 8 * 4, 3)
    steps = [options["num_steps"] for prompts, options in Pipeline.calls if len(prompts) == 1]
    assert steps == list(draw_grid.STEPS)
    assert all(options["unconditional_guidance_scale"] == 2 for _, options in Pipeline.calls)
    assert "an owl on a blue background" in Pipeline.calls[0][0]


def test_the_grid_says_what_it_cannot_read(tmp_path, capsys):
    arguments = [str(tmp_path / "grid.png"), "--weights", str(tmp_path / "missing")]
    assert draw_grid.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(OSError):
        Image.open(tmp_path / "grid.png")
