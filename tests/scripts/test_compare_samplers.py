"""scripts/measure/compare_samplers.py, on a few images of the embedded checkpoint."""

import json

import compare_samplers as script
import numpy as np
import pytest

from stable_diffusion.config import SD1
from stable_diffusion.files import WEIGHTS_DIR


def test_passes_are_counted():
    """Guidance needs a second pass at each timestep of its interval."""
    options = {"sampler": "ddim", "num_steps": 4}
    assert script.count_passes(SD1.schedule, **options) == 8
    assert script.count_passes(SD1.schedule, **options, guidance_interval=(400, 1000)) == 6
    assert script.count_passes(SD1.schedule, **options, guidance_interval=(0, 999)) == 8
    assert script.count_passes(SD1.schedule, **options, deep_cache=2) is None


@pytest.mark.parametrize(
    "arguments", [["--guidance", "1"], ["--steps", "many"], ["--weights", "nowhere"]]
)
def test_bad_arguments(arguments, capsys):
    """Each ends with status 2, and says what is wrong without a traceback."""
    try:
        status = script.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.large
def test_the_comparison(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "REFERENCE", {"sampler": "ddim", "num_steps": 3})
    monkeypatch.setattr(script, "INTERVALS", [(0, 600)])
    monkeypatch.setattr(script, "CACHES", [2])
    names = (WEIGHTS_DIR / "emoji" / "subjects.txt").read_text("utf-8").splitlines()
    pictures = np.random.default_rng(0).integers(0, 256, (len(names), 128, 128, 4), "uint8")
    np.savez(tmp_path / "emoji.npz", names=names, pictures=pictures)
    arguments = ["--data", tmp_path / "emoji.npz", "--images", 2, "--steps", 3, "--json"]
    assert script.main([str(argument) for argument in arguments]) == 0
    reference, *rows = json.loads(capsys.readouterr().out)
    assert reference["error"] == 0 and reference["passes"] == 6
    errors = {row["name"]: row["error"] for row in rows if row["steps"] == 3}
    assert errors["ddim"] == 0 < errors["unipc"] != errors["dpmpp-2m"] > 0
    assert errors["dpmpp-2m, quadratic"] != errors["dpmpp-2m"]
    assert all(0 <= row["colour"] <= 100 and row["passes"] > 0 for row in rows)
