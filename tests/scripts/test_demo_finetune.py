"""scripts/character/demo_finetune.py, which teaches a character by each method."""

import json

import demo_finetune as demo
import numpy as np
import pytest
from PIL import Image

from stable_diffusion.files import WEIGHTS_DIR


@pytest.mark.large
def test_the_demonstration(monkeypatch, tmp_path, capsys):
    """All of it, with two steps of two methods, on random pictures as data."""
    for name in ("STEPS", "CLASS_SUBJECTS", "CLASS_IMAGES", "PAIRS"):
        monkeypatch.setattr(demo, name, 2)
    methods = {name: [*options, "--steps", "2"] for name, options in demo.METHODS.items()}
    monkeypatch.setattr(demo, "METHODS", methods)
    names = (WEIGHTS_DIR / "emoji" / "subjects.txt").read_text("utf-8").splitlines()
    pictures = np.random.default_rng(0).integers(0, 256, (len(names), 128, 128, 4), "uint8")
    np.savez(tmp_path / "emoji.npz", names=names, pictures=pictures)
    command = ["--work", tmp_path / "runs", "--data", tmp_path / "emoji.npz"]
    command += ["--picture", tmp_path / "picture.png", "--methods", "LoRA", "DreamBooth"]
    assert demo.main([str(argument) for argument in command]) == 0
    assert capsys.readouterr().out.count("MiB") == 4
    trained, before, *after = json.loads((tmp_path / "runs" / "rows.json").read_text("utf-8"))
    assert trained["distance"] < before["distance"]
    assert [row["method"] for row in after] == ["LoRA", "DreamBooth"]
    assert after[0]["bytes"] < 0.02 * after[1]["bytes"]
    assert all(row["distance"] != before["distance"] and "top1" in row for row in after)
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (8 * 128, 4 * 128)
