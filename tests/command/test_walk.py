"""Frames on the way from prompt to prompt."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from stable_diffusion.command import walk

FAST = ["--steps", "2", "--seed", "7"]


@pytest.fixture
def run(command, tmp_path, monkeypatch, weights, reused):
    """Returns a function that runs the command in an empty folder: status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    return lambda *argv: command(*argv, "--weights", str(weights), *FAST)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image).astype(int)


def test_the_ends_are_the_images_of_the_prompts(run):
    """The first frame is that of the first prompt and --seed, the last that of the next seed."""
    run("a cat", "a dog", "--out", "alone.png")
    names = [f"walk/{n:04}.png" for n in range(1, 6)]
    walked = ["--walk", "a cat", "a dog", "--frames", "5", "--batch", "2", "--out", "walk"]
    assert run(*walked) == (0, names, [])
    frames = [pixels(name) for name in names]
    assert np.abs(frames[0] - pixels("alone-1.png")).max() <= 1
    assert np.abs(frames[-1] - pixels("alone-2.png")).max() <= 1
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
    assert 0 < min(steps) and max(steps) < np.abs(frames[0] - frames[-1]).mean()
    assert run(*walked[:-1], "alone")[0] == 0
    for name, frame in zip(names, frames, strict=True):
        np.testing.assert_array_equal(pixels(Path("alone", Path(name).name)), frame)


def test_a_walk_over_three_prompts(run):
    """In the middle is the image of the second, also with a sampler that draws noise."""
    given = ["--sampler", "euler-a", "--noise-source", "torch", "--syntax", "webui"]
    prompts = ["a cat", f"{'a (dog:1.2), ' * 30}", "a bird"]
    run("--walk", *prompts, "--frames", "5", "--out", "a", *given)
    assert run("--walk", *prompts, "--frames", "3", "--out", "b", *given)[0] == 0
    for frame, stop in (("1", "1"), ("3", "2"), ("5", "3")):
        assert np.abs(pixels(f"a/000{frame}.png") - pixels(f"b/000{stop}.png")).max() <= 1


@pytest.mark.parametrize("name", ["x/walk.gif", "walk.WEBP"])
def test_animations(run, name):
    assert run("--walk", "a", "b", "--frames", "3", "--out", name) == (0, [name], [])
    with Image.open(name) as image:
        assert image.n_frames == 3 and image.size == (64, 64) and image.info["loop"] == 0
        frames = [np.array(one.convert("RGB")) for one in ImageSequence.Iterator(image)]
    assert (frames[0] != frames[1]).any() and (frames[1] != frames[2]).any()


def test_mixing_on_a_sphere():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 8, 8, 4))
    np.testing.assert_allclose(walk.mix_on_sphere(a, b, 0), a, atol=1e-12)
    np.testing.assert_allclose(walk.mix_on_sphere(a, b, 1), b, atol=1e-12)
    half = walk.mix_on_sphere(a, b, 0.5)
    assert abs(np.linalg.norm(half) / np.linalg.norm(a) - 1) < 0.1
    assert np.linalg.norm((a + b) / 2) / np.linalg.norm(a) < 0.8, "a line is too short"
    x, y = np.array([1.0, 0]), np.array([0, 1.0])
    np.testing.assert_allclose(walk.mix_on_sphere(x, y, 1 / 3), [3**0.5 / 2, 0.5])
    np.testing.assert_allclose(walk.mix_on_sphere(x, x, 0.3), x)
    assert np.isfinite(walk.mix_on_sphere(x, -x, 0.5)).all()


def test_places_of_frames():
    assert walk.plan_frames(2, 3) == [(0, 0), (0, 0.5), (0, 1)]
    assert walk.plan_frames(3, 5) == [(0, 0), (0, 0.5), (1, 0), (1, 0.5), (1, 1)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--walk", "a", "b"], "--out: a walk goes to a .gif, a .webp or a folder"),
        (["--walk", "a", "b", "--out", "x.png"], "--out: a walk goes to a .gif"),
        (["--walk", "a", "--out", "x.gif"], "--walk: it needs two prompts or more"),
        (["--walk", "a", "b", "c", "--frames", "2", "--out", "x.gif"], "3 prompts need as many"),
        (["--prompts", "p", "--walk", "a", "b", "--out", "x.gif"], "--walk: no other prompts"),
        (["--image", "p", "--walk", "a", "b", "--out", "x.gif"], "--walk: no other prompts"),
        (["a", "--frames", "3"], "--frames: it needs --walk"),
        (["--walk", "cat " * 80, "b", "--out", "x/y.gif"], "at most 77 tokens"),
        (["--walk", "a", "b", "--out", "file/x.gif"], "no folder file"),
        (["--walk", "a", "<lora:x>", "--syntax", "webui", "--out", "x"], "not part of a text"),
    ],
)
def test_wrong_walks(run, argv, message):
    Path("file").touch()
    status, out, err = run(*argv)
    assert (status, out, len(err)) == (2, [], 1) and message in err[0]
    assert os.listdir() == ["file"]
