"""The example of prompt to prompt: what it copies, and what it leaves alone."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from prompt_to_prompt import align_tokens, edit_image, main
from prompt_to_prompt import read_weight as read

OPTIONS = {"num_steps": 3, "verbose": 0, "unconditional_guidance_scale": 4.0}
SOURCE, TARGET = "a red apple", "a red banana"


def levels_apart(image, other):
    return np.abs(image.astype(int) - other).max()


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ([1, 2, 3, 9, 9], [1, 2, 3, 9, 9], ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])),
        ([1, 2, 3, 9, 9], [1, 5, 3, 9, 9], ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])),  # replaced
        ([1, 2, 9, 9], [1, 5, 2, 9], ([0, 2, 3], [0, 1, 2])),  # 5 was added
        ([1, 2, 3, 9], [1, 5, 6, 7, 8, 9], ([0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 2, 3])),  # longer
        ([1, 2, 3, 9], [1, 5, 9], ([0, 1, 2], [0, 1, 3])),  # shorter
    ],
)
def test_tokens_are_aligned(source, target, expected):
    assert align_tokens(source, target) == expected


def test_the_same_prompt_stays_the_same(few_pipeline):
    alone = few_pipeline.text_to_image(SOURCE, seed=3, **OPTIONS)
    for options in ({}, {"words": 1.0, "cells": 1.0}, {"weights": {"red": 1.0}}):
        pair = edit_image(few_pipeline, SOURCE, SOURCE, 3, **options, **OPTIONS)
        assert pair.shape == (2, 64, 64, 3)
        assert levels_apart(pair[0], alone[0]) <= 1 and levels_apart(pair[1], alone[0]) <= 1


def test_the_first_image_is_never_changed(few_pipeline):
    alone = few_pipeline.text_to_image([SOURCE, TARGET], seed=[3, 3], **OPTIONS)
    assert levels_apart(*alone) > 8
    options = {"words": 1.0, "cells": 1.0, "weights": {"banana": -2.0}}
    edited = edit_image(few_pipeline, SOURCE, TARGET, 3, **options, **OPTIONS)
    assert levels_apart(edited[0], alone[0]) <= 1
    assert levels_apart(edited[1], alone[1]) > 8
    for shares in ({"words": 1.0, "cells": 0.0}, {"words": 0.0, "cells": 1.0}):
        one = edit_image(few_pipeline, SOURCE, TARGET, 3, **shares, **OPTIONS)
        assert levels_apart(one[1], alone[1]) > 1  # each of them does something
    nothing = edit_image(few_pipeline, SOURCE, TARGET, 3, words=0.0, cells=0.0, **OPTIONS)
    assert levels_apart(nothing, alone) <= 1


def test_weights(few_pipeline):
    plain = edit_image(few_pipeline, SOURCE, TARGET, 3, **OPTIONS)
    weighted = edit_image(few_pipeline, SOURCE, TARGET, 3, weights={"banana": 5.0}, **OPTIONS)
    assert levels_apart(plain[0], weighted[0]) <= 1 < levels_apart(plain[1], weighted[1])
    with pytest.raises(ValueError, match="has no cat, only a, red, banana"):
        edit_image(few_pipeline, SOURCE, TARGET, 3, weights={"cat": 5.0}, **OPTIONS)
    assert read("a=b=2.5") == ("a=b", 2.5)


@pytest.mark.parametrize("given", [["--weight", "red"], ["--weight", "=2"], ["--words", "2"]])
def test_wrong_arguments(given, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", SOURCE, TARGET, str(tmp_path / "x.png"), *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "error: argument" in capsys.readouterr().err


def test_an_unknown_word_is_told_in_one_line(capsys, tmp_path, monkeypatch):
    given = [SOURCE, TARGET, str(tmp_path / "x.png"), "--weight", "cat=2"]
    monkeypatch.setattr(sys, "argv", ["x", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and not [*tmp_path.iterdir()]
    assert "error: The prompt has no cat, only a, red, banana." in capsys.readouterr().err


@pytest.mark.large
def test_the_command(tmp_path):
    script = ROOT / "scripts" / "examples" / "prompt_to_prompt.py"
    given = [SOURCE, TARGET, tmp_path / "x.png", "--steps", "2", "--weight", "banana=2"]
    subprocess.run([sys.executable, script, *given], check=True)
    from PIL import Image

    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (3 * 128, 128)
