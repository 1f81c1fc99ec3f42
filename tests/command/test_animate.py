"""--animate: how an image came to be, as an animation."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import FEW
from PIL import Image, ImageSequence

from stable_diffusion import StableDiffusion, previews
from stable_diffusion.command import animation, generate
from stable_diffusion.command.terminal import Terminated
from stable_diffusion.config import TinyVAEConfig
from stable_diffusion.images import quantize_pixels
from stable_diffusion.tiny_vae import load_decoder

FAST = ["--steps", "2", "--seed", "7"]


@pytest.fixture
def run(command, tmp_path, monkeypatch, weights, reused):
    """Returns a function that runs the command in an empty folder: status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")

    def run(*argv):
        options = [] if "--redo" in argv else ["--weights", str(weights), *FAST]
        return command(*argv, *options)

    return run


def read_frames(path):
    """Returns the frames as int arrays, and the duration of each in milliseconds."""
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        frames, durations = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(np.array(frame.convert("RGB")).astype(int))
            durations.append(frame.info["duration"])
    return frames, durations


def blur(image):
    """Returns the mean colours of blocks of 8x8 pixels, where a palette shows little."""
    return image.reshape(8, 8, 8, 8, 3).mean((1, 3))


def pixels(path):
    with Image.open(path) as image:
        return np.array(image).astype(int)


def test_an_animation_of_each_image(run):
    """A frame for each step, and the image, which is the same without --animate."""
    paths = [name for n in (1, 2) for name in (f"a-{n}.png", f"a-{n}.gif")]
    Path("a-1.gif").write_text("old")
    assert run("a cat", "a dog", "--out", "a.png", "--animate", "a.gif") == (0, paths, [])
    assert sorted(os.listdir()) == sorted(paths), "no other file is left"
    for n in (1, 2):
        frames, durations = read_frames(f"a-{n}.gif")
        assert durations == [animation.DURATION] * 2 + [animation.LAST_DURATION]
        assert {frame.shape for frame in frames} == {(64, 64, 3)}
        assert np.abs(blur(frames[-1]) - blur(pixels(f"a-{n}.png"))).max() < 10
    assert (read_frames("a-1.gif")[0][0] != read_frames("a-2.gif")[0][0]).any()
    assert run("--redo", "a-2.png", "--out", "a-3.png") == (0, ["a-3.png"], [])
    assert Path("a-3.png").read_bytes() == Path("a-2.png").read_bytes()


def test_an_image_with_a_mask(run):
    """As WebP, in a folder that is made; --strength 0.5 takes one of two steps."""
    Image.new("RGB", (64, 64), "red").save("photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("mask.png")
    given = ["--image", "photo.png", "--mask", "mask.png", "--strength", "0.5"]
    found = run("a", *given, "--out", "a.png", "--animate", "new/how.WEBP")
    assert found == (0, ["a.png", "new/how.WEBP"], [])
    frames, durations = read_frames("new/how.WEBP")
    assert durations == [animation.DURATION, animation.LAST_DURATION]
    assert np.abs(blur(frames[-1]) - blur(pixels("a.png"))).max() < 10


def save_tiny(folder, **vae):
    """Saves a tiny VAE of random parameters, beside the rest of a pipeline; returns its path."""
    keras.utils.set_random_seed(1)
    sizes = {"width": 4, "encoder_blocks": (1,) * 4, "decoder_blocks": (1,) * 4}
    config = replace(FEW, vae=TinyVAEConfig(**sizes | vae))
    StableDiffusion(weights=None, config=config, jit_compile=False).save(folder)
    return f"{folder}/vae"


def test_a_tiny_vae_makes_the_frames(run, monkeypatch, tmp_path):
    shown, seen = [], []
    animate, preview = animation.animate_image, previews.preview_latents
    monkeypatch.setattr(generate, "animate_image", lambda *a: shown.append(a) or animate(*a))
    monkeypatch.setattr(
        previews, "preview_latents", lambda *a: seen.append((a[1], preview(*a))) or seen[-1][1]
    )
    path = save_tiny(tmp_path / "tiny")
    found = run("a", "--out", "a.png", "--animate", "a.webp", "--preview-vae", path)
    assert found == (0, ["a.png", "a.webp"], [])
    (_, frames, image) = shown[0]
    decoder = load_decoder(path, 64, 64)
    for frame, (latent, _) in zip(frames, seen, strict=True):
        expected = quantize_pixels(decoder.predict_on_batch(latent))[0].astype(int)
        assert np.abs(frame - expected).max() <= 1
    assert image.shape == frames[0].shape and len(frames) == 2


def test_wrong_tiny_vaes(run, weights, tmp_path):
    asked = ["a", "--out", "a.png", "--animate", "a.gif", "--preview-vae"]
    path = save_tiny(tmp_path / "tiny", encoder_blocks=(1,) * 3, decoder_blocks=(1,) * 3)
    for argv, message in (
        ([*asked, path], "it has latents of 16x16x4, the weights of 8x8x4"),
        ([*asked, str(weights)], "must be a tiny VAE (TAESD); it is an ordinary one"),
        ([*asked, "no"], "no"),
        (["a", "--out", "a.png", "--preview-vae", path], "--preview-vae: it needs --animate"),
    ):
        status, out, err = run(*argv)
        assert (status, out, len(err)) == (2, [], 1) and message in err[0]
    assert os.listdir() == ["tiny"]


def test_frames(tmp_path):
    """Previews are enlarged smoothly to the image's size; the image comes last."""
    image = np.zeros((16, 32, 3), "uint8")
    image[:, 16:] = 255
    levels = [np.full((2, 4, 3), level, "uint8") for level in (0, 80, 160)]
    levels.append(np.repeat([[[0], [255]]], 3, axis=2).astype("uint8"))
    animation.animate_image(tmp_path / "a.gif", levels, image)
    frames, durations = read_frames(tmp_path / "a.gif")
    assert durations == [100] * 4 + [1500]
    for frame, level in zip(frames, (0, 80, 160), strict=False):
        assert np.abs(frame - level).max() <= 1 and frame.shape == (16, 32, 3)
    row = frames[3].mean((0, 2))
    assert (np.diff(row[9:-8]) > 5).all() and (row[:4] < 5).all() and (row[-4:] > 250).all()
    np.testing.assert_array_equal(frames[-1], image)


def test_names():
    names = animation.name_animations("x/a.b.gif", 2)
    assert names == [Path("x/a.b-1.gif"), Path("x/a.b-2.gif")]
    assert animation.name_animations("a.webp", 1) == [Path("a.webp")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--animate", "a.png"], "--animate: 'a.png' is neither a .gif nor a .webp file"),
        (["a", "--animate", ""], "--animate: '' is neither"),
        (["a", "--animate", "x.gif"], "--animate: 'x.gif' is neither"),
        (["a", "--out", "y/a.png", "--animate", "file/a.gif"], "file"),
        (["a", "--out", "y/a.png", "--animate", "pipe.gif"], "pipe.gif is no regular file"),
        (["a", "--animate", f"{'n' * 300}.gif"], "File name too long"),
        (["--prompts", "file", "--animate", "a.gif"], "not allowed with --walk, --prompts or"),
        (["--walk", "a", "b", "--out", "b.gif", "--animate", "a.gif"], "not allowed with --walk"),
        (["a", "--image", "file", "--crop", "0", "--animate", "a.gif"], "--prompts or --crop"),
    ],
)
def test_wrong_animations(run, monkeypatch, argv, message):
    monkeypatch.setattr(generate, "open_model", lambda *_: pytest.fail("work was begun"))
    Path("file").write_text("a cat\n")
    Path("x.gif").mkdir()
    os.mkfifo("pipe.gif")
    status, out, err = run(*argv)
    assert (status, out, len(err)) == (2, [], 1) and message in err[0]
    assert sorted(os.listdir()) == ["file", "pipe.gif", "x.gif"]


def test_a_stop_leaves_no_file(run, monkeypatch):
    monkeypatch.setattr(generate, "open_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    status, out, err = run("a", "--out", "a.png", "--animate", "x/a.gif")
    assert (status, out, err) == (143, [], ["stable-diffusion: interrupted"])
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Terminated()])
def test_a_full_disk_or_a_stop_leaves_the_old_file(name, error, tmp_path, monkeypatch):
    path, save = tmp_path / name, Image.Image.save

    def fail(self, written, *args, **options):
        save(self, written, *args, **options)
        raise error

    path.write_text("old")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(type(error)):
        animation.animate_image(path, [np.zeros((1, 1, 3), "uint8")], np.ones((8, 8, 3), "uint8"))
    assert [each.name for each in tmp_path.iterdir()] == [name] and path.read_text() == "old"
