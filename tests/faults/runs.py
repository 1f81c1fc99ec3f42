"""What children train: runs of `stable-diffusion-finetune` with a tiny model."""

import contextlib
import io
import warnings
from pathlib import Path

import keras
import tensorflow as tf
from children import count_touches
from helpers import FEW
from PIL import Image

import stable_diffusion.training  # noqa: F401  so that the server has it
from stable_diffusion import StableDiffusion
from stable_diffusion.command import finetune

IMAGES, WEIGHTS = "images", "weights"  # in the folder of the tests
COLOURS = ("red", "green", "blue")
OPTIONS = "--method lora --steps 4 --save-every 1 --batch 2 --rate 1e-2".split()
PREVIEW = ["--preview", "a cat", "--preview-steps", "1"]


def write_data(folder):
    """Writes what runs read: images with captions, and a checkpoint."""
    folder = Path(folder)
    (folder / IMAGES).mkdir()
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(folder / IMAGES / f"{colour}.png")
        (folder / IMAGES / f"{colour}.txt").write_text(f"a {colour} square")
    keras.utils.set_random_seed(0)
    pipeline = StableDiffusion(jit_compile=False, weights=None, config=FEW)
    pipeline.save(folder / WEIGHTS, dtype="float32")


def run(folder, out, work, kill_at=None):
    """Runs the command.

    Args:
        folder: path of the folder with the data.
        out: path of the result. Its folder is watched.
        work: path of the folder of the run.
        kill_at: number of the touch before which the process is killed, or None.

    Returns:
        The exit status, what was printed to standard output and error, and the number of touches.
    """
    tf.config.run_functions_eagerly(True)  # to build graphs would take longer
    warnings.filterwarnings("ignore", "Even though the `tf.config.experimental_run_functions")
    folder = Path(folder)
    given = [folder / IMAGES, "--weights", folder / WEIGHTS, "--out", out, "--work", work]
    said, error = io.StringIO(), io.StringIO()
    with (
        count_touches(Path(out).parent, kill_at) as touches,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(error),
    ):
        status = finetune.main([*map(str, given), *OPTIONS, *PREVIEW])
    return status, said.getvalue(), error.getvalue(), len(touches)
