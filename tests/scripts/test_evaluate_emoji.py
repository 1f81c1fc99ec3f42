"""Tests of evaluate_emoji.py: its metrics on synthetic pictures, and the whole of it.

The references are a few shapes, not emoji; nothing is trained or downloaded.
"""

import json

import emoji_data as emoji
import evaluate_emoji as evaluate
import numpy as np
import pytest

import stable_diffusion

NAMES = ["octopus", "balloon", "rocket", "tulip", "pizza", "frog", "whale", "crown"]


@pytest.fixture
def pictures():
    """uint8 (8, 128, 128, 4): a square on each, of its own place and colour."""
    rng = np.random.default_rng(0)
    result = np.zeros((len(NAMES), 128, 128, 4), "uint8")
    for picture in result:
        y, x = rng.integers(8, 72, 2)
        picture[y : y + 48, x : x + 48] = [*rng.integers(0, 256, 3), 255]
    return result


@pytest.fixture
def pairs():
    """All of them, trained on or not: tuples (index, colour)."""
    return [(index, colour) for index in range(len(NAMES)) for colour in emoji.COLOURS]


def draw(pictures, pairs, scale=1.0, offset=(0, 0)):
    return np.stack(
        [emoji.compose(pictures[n], emoji.COLOURS[colour], scale, offset) for n, colour in pairs]
    )


@pytest.fixture
def references(pictures):
    return evaluate.draw_references(pictures, list(emoji.COLOURS))


# Metrics


def test_references_score_all(pictures, pairs, references):
    drawn = draw(pictures, pairs)
    assert evaluate.score(drawn, pairs, references) == {"top1": 100, "top5": 100, "colour": 100}
    np.testing.assert_array_equal(evaluate.subject_ranks(drawn, pairs, references), 0)


def test_a_slight_move_still_scores(pictures, pairs, references):
    drawn = draw(pictures, pairs, 0.95, (2, -1))
    assert evaluate.score(drawn, pairs, references)["top1"] == 100


def test_other_subjects_do_not_score(pictures, pairs, references):
    """A picture of the next subject on the right background has the right colour only."""
    drawn = draw(pictures, [((index + 1) % len(NAMES), colour) for index, colour in pairs])
    result = evaluate.score(drawn, pairs, references)
    assert result["top1"] == 0 and result["colour"] == 100
    assert (evaluate.subject_ranks(drawn, pairs, references) > 0).all()


def test_other_backgrounds_do_not_score(pictures, pairs, references):
    colours = list(emoji.COLOURS)
    moved = [(index, colours[colours.index(colour) - 1]) for index, colour in pairs]
    assert evaluate.score(draw(pictures, moved), pairs, references)["colour"] == 0


def test_half_of_them_right(pictures, pairs, references):
    drawn = draw(pictures, pairs)
    drawn[::2] = draw(pictures, [((n + 1) % len(NAMES), colour) for n, colour in pairs[::2]])
    assert evaluate.score(drawn, pairs, references)["top1"] == 50


def test_rank_counts_the_nearer_ones():
    """Grey references of levels 0, 10, ... 70: 34 is nearest to 30, then 40, 20, 50."""
    levels = np.arange(0, 80, 10, dtype="float32")
    references = {"black": np.broadcast_to(levels[:, None, None, None], (8, 32, 32, 3))}
    drawn = np.full((4, 128, 128, 3), 34, "uint8")
    pairs = [(n, "black") for n in (3, 4, 2, 5)]
    assert evaluate.subject_ranks(drawn, pairs, references).tolist() == [0, 1, 2, 3]


def test_subjects_that_look_alike_are_not_right():
    references = {"black": np.zeros((3, 32, 32, 3), "float32")}
    drawn = np.zeros((1, 128, 128, 3), "uint8")
    assert evaluate.subject_ranks(drawn, [(1, "black")], references) == [2]


def test_border_colours():
    rng = np.random.default_rng(0)
    drawn = np.stack([np.full((128, 128, 3), rgb, "uint8") for rgb in emoji.COLOURS.values()])
    drawn[:, 3:-3, 3:-3] = rng.integers(0, 256, (122, 122, 3))  # what is inside doesn't count
    drawn[:, :3, :60] = 77  # nor does less than a half of the border
    assert evaluate.border_colours(drawn) == list(emoji.COLOURS)


def test_psnr_and_difference():
    one = np.zeros((2, 128, 128, 3), "uint8")
    other = one.copy()
    other[0], other[1, :64] = 255, 51
    np.testing.assert_allclose(evaluate.psnr(one, other), [0, 10 * np.log10(25 * 2)])
    assert evaluate.psnr(one, one).min() > 100
    assert evaluate.difference(one, other) == (255 + 51 / 2) / 2


# Pairs and subjects


def test_pairs_are_held_out_ones():
    pairs = evaluate.choose_pairs(NAMES, 1000)
    held_out = {(n, c) for n, s in enumerate(NAMES) for c in emoji.COLOURS if emoji.held_out(s, c)}
    assert set(pairs) == held_out and len(pairs) == len(held_out)
    assert evaluate.choose_pairs(NAMES, 3) == pairs[:3]


def test_read_subjects(tmp_path, pictures):
    with pytest.raises(ValueError, match=r"there is no .*subjects\.txt"):
        evaluate.emoji.read_subjects(tmp_path, NAMES, pictures)
    (tmp_path / "subjects.txt").write_text("rocket\noctopus\n")
    names, chosen = evaluate.emoji.read_subjects(tmp_path, NAMES, pictures)
    assert names == ["rocket", "octopus"]
    np.testing.assert_array_equal(chosen, pictures[[2, 0]])
    (tmp_path / "subjects.txt").write_text("rocket\nteapot\n")
    with pytest.raises(ValueError, match="hasn't these subjects: teapot"):
        evaluate.emoji.read_subjects(tmp_path, NAMES, pictures)


# The whole of it


class Perfect:
    """Draws references: exactly from even seeds, moved a little from odd ones; in one step, none.

    Its VAE loses a little.
    """

    def __init__(self, pictures):
        self.pictures, self.batches = pictures, []
        self.image_encoder = self.decoder = self

    def text_to_image(self, prompts, num_steps, unconditional_guidance_scale, seed, verbose):
        assert len(seed) == len(prompts) <= evaluate.BATCH
        self.batches.append((num_steps, unconditional_guidance_scale, tuple(seed)))
        drawn = []
        for prompt, one in zip(prompts, seed, strict=True):
            index = next(n for n, name in enumerate(NAMES) if name in prompt)
            colour = prompt.split()[-2]
            scale, offset = [(1.0, (0, 0)), (0.95, (3, 3))][one % 2]
            drawn.append(
                emoji.compose(self.pictures[index], emoji.COLOURS[colour], scale, offset)
                if num_steps > 1
                else np.full((128, 128, 3), 50, "uint8")
            )
        return np.stack(drawn)

    def predict_on_batch(self, batch):
        return batch * 0.99


def test_evaluate(pictures):
    pairs = evaluate.choose_pairs(NAMES, 7)  # odd, so that the second seeds are the other kind
    pipeline = Perfect(pictures)
    result = evaluate.evaluate(pipeline, NAMES, pictures, pairs, [1, 50], [1, 7.5])
    all_right = {"top1": 100, "top5": 100, "colour": 100}
    assert result["pairs"] == len(pairs) and result["subjects"] == len(NAMES)
    assert result["default"] == all_right
    assert result["steps"][1] == {"steps": 50} | all_right
    assert result["steps"][0]["top1"] < 50 and result["steps"][0]["colour"] < 50
    assert 30 < result["psnr"] < 60
    one, usual = result["guidance"]
    assert (one["guidance"], one["from_usual"], usual["from_usual"]) == (1, 0, 0)
    assert one["top1"] == 100 and 1 < one["two_seeds"] == usual["two_seeds"]
    # Nothing is drawn twice, and no two pictures of the same settings are from the same seed.
    assert len(pipeline.batches) == len(set(pipeline.batches)) == 5
    seeds = [seed for *settings, some in pipeline.batches if settings == [50, 1] for seed in some]
    assert sorted(seeds) == list(range(2 * len(pairs)))


def test_tables():
    row = {"top1": 81.26, "top5": 100.0, "colour": 97.0}
    guided = {"guidance": 7.5, "two_seeds": 12.34, "from_usual": 0.0, **row}
    result = {"pairs": 300, "subjects": 520, "psnr": 27.04, "default": row}
    text = evaluate.show_tables(result | {"steps": [{"steps": 5, **row}], "guidance": [guided]})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "subject, top-1 81.3 %" in lines and "VAE reconstruction, PSNR 27.0 dB" in lines
    assert "5 81.3% 100.0% 97.0%" in lines and "7.5 81.3% 100.0% 97.0% 12.3 0.0" in lines
    assert max(map(len, text.splitlines())) <= 80
    assert "guidance " not in evaluate.show_tables(result | {"steps": [], "guidance": []})[100:]


def test_command(tmp_path, pictures, monkeypatch, capsys):
    emoji.save(tmp_path / "data.npz", NAMES, pictures)
    (tmp_path / "subjects.txt").write_text("".join(f"{name}\n" for name in NAMES))
    made = []

    def pipeline(**arguments):
        made.append(arguments)
        return Perfect(pictures)

    monkeypatch.setattr(stable_diffusion, "StableDiffusion", pipeline)
    command = [str(tmp_path / "data.npz"), "--weights", str(tmp_path), "--pairs", "4"]
    assert evaluate.main([*command, "--json", "--steps", "--guidance", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pairs"] == 4 and result["steps"] == [] and len(result["guidance"]) == 1
    assert made == [{"jit_compile": False, "weights": str(tmp_path)}]
    assert evaluate.main([*command, "--steps", "5", "--guidance"]) == 0
    assert "subject, top-1" in capsys.readouterr().out


def test_command_rejects(tmp_path, pictures, capsys):
    missing, text, data = (tmp_path / name for name in ("missing.npz", "text.npz", "data.npz"))
    text.write_text("no pictures")
    emoji.save(data, NAMES, pictures)
    for path in (missing, text, data):  # the last has no checkpoint's subjects.txt
        assert evaluate.main([str(path), "--weights", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and message.startswith("evaluate_emoji: ")
    for wrong in (["--pairs", "0"], ["--steps", "-1"], ["--guidance", "nan"]):
        with pytest.raises(SystemExit) as error:
            evaluate.main([str(data), *wrong])
        assert error.value.code == 2
