"""What several test modules use. Fixtures are in conftest.py."""

import gzip
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
from keras import ops

from stable_diffusion import Decoder, DiffusionModel, ImageEncoder, StableDiffusion, TextEncoder
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.config import (
    TINY,
    TINY_V2,
    Config,
    TextConfig,
    UNetConfig,
    VAEConfig,
    undo_departures,
)
from stable_diffusion.files import WEIGHTS_DIR
from stable_diffusion.noise_scheduler import NoiseScheduler
from stable_diffusion.parity.keras_cv import randomize as randomize
from stable_diffusion.parity.keras_cv import relative_error as relative_error

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "diffusers_golden"  # two tiny checkpoints that diffusers wrote, "v1" and "v2"


def run_python(code, *arguments, backend):
    """Runs a program on a backend, in a process of its own, which must end well."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


# Models of random parameters, for tests that copy them


MAKE = {
    "text_encoder": lambda c: TextEncoder(77, config=c.text, download_weights=False),
    "diffusion_model": lambda c: DiffusionModel(
        c.size, c.size, 77, config=c.unet, download_weights=False
    ),
    "decoder": lambda c: Decoder(c.size, c.size, config=c.vae, download_weights=False),
    "image_encoder": lambda c: ImageEncoder(config=c.vae, download_weights=False),
}
FEW = Config(
    TextConfig(16, 1, 2, 32),
    UNetConfig((16, 16), (2, 2), (True, False), 16, res_blocks=1, groups=8),
    VAEConfig((8, 8, 8, 8), res_blocks=1, groups=4),
    size=64,
)
SMALL = replace(TINY, text=replace(TINY.text, vocab_size=600))
THREE_STAGES = replace(
    undo_departures(SMALL),
    unet=replace(
        undo_departures(SMALL).unet,
        widths=(16, 32, 32),
        heads=(1, 2, 4),
        attention=(False, True, True),
        res_blocks=2,
        in_channels=9,
        cell_size=4,
        groups=8,
    ),
    vae=replace(
        undo_departures(SMALL).vae, widths=(8, 16, 16), res_blocks=2, groups=4, scaling_factor=1.0
    ),
    schedule=replace(
        undo_departures(SMALL).schedule,
        beta_schedule="linear",
        prediction_type="v_prediction",
        spacing="trailing",
        train_timesteps=500,
    ),
)
CONFIGS = {
    "v2": undo_departures(replace(TINY_V2, text=replace(TINY_V2.text, vocab_size=600))),
    "three_stages": THREE_STAGES,
}


def random_models(config, parts=tuple(MAKE)):
    """Returns components of a config, by name, with random parameters."""
    rng = np.random.default_rng(0)
    with uninitialized():
        models = {part: MAKE[part](config) for part in parts}
    for model in models.values():
        for variable in model.weights:
            variable.assign(rng.normal(size=variable.shape).astype("float32"))
    return models


# Schedules as tests/data/make_sampler_golden.py has them

BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
SPACINGS = {"linspace": 0, "leading": 1, "trailing": 0}  # and their offset of timesteps


def make_schedule(betas="scaled_linear", spacing="linspace", prediction="epsilon", **options):
    start, end = BETAS[betas]
    return NoiseScheduler(
        beta_start=start,
        beta_end=end,
        beta_schedule=betas,
        prediction_type=prediction,
        spacing=spacing,
        steps_offset=SPACINGS[spacing],
        **options,
    )


def check_equal(actual, expected, cast=None):
    """Checks that two models have the same parameters, those of `expected` rounded to `cast`."""
    for a, b in zip(actual.weights, expected.weights, strict=True):
        b = ops.cast(ops.cast(b, cast), b.dtype) if cast else b
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b), a.path)


def write_merges(path, pairs):
    """Writes the first pairs of CLIP's vocabulary as a merges.txt: `514 + pairs` tokens."""
    with gzip.open(WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        learned = [line.strip() for line in islice(file, 1, pairs + 1)]
    path.write_text("\n".join(["#version: 0.2", *learned]) + "\n", encoding="utf-8")
    return path


# The checkpoints that diffusers wrote


class GoldenTokenizer:
    """Knows the two prompts of tests/data/make_diffusers_golden.py, in its 1,000 tokens."""

    start_of_text, end_of_text = 998, 999

    def encode(self, text):
        return {"": [998, 42, 999], "prompt": [998, 5, 17, 300, 999]}[text]


def golden_pipeline(family):
    """Returns a pipeline with diffusers' parameters of a family, "v1" or "v2"."""
    pipeline = StableDiffusion(weights=GOLDEN / family, jit_compile=False)
    pipeline._tokenizer = GoldenTokenizer()
    return pipeline


# KerasCV's .h5 files


def layers_of(model):
    """Returns the layers as the layout lists them, with random values in place of shapes."""
    rng = np.random.default_rng(0)
    return [
        [
            layer.name,
            [
                [f"{w.path}:0", rng.standard_normal(w.shape).astype("float32")]
                for w in layer.weights
            ],
        ]
        for layer in model.layers
    ]


def write_names(group, attribute, names, chunk):
    """Writes a list of names as an attribute, or as several of `chunk` names each."""
    if chunk is None:
        group.attrs[attribute] = np.array([name.encode() for name in names], "S")
    for i in range(0, len(names), chunk or len(names) + 1):
        if chunk:
            group.attrs[f"{attribute}{i // chunk}"] = [
                name.encode() for name in names[i : i + chunk]
            ]


def write_legacy(path, layers, chunk=None, root=None, **filters):
    """Writes Keras 2's layout; `chunk` cuts the lists of names as Keras 2 does over 64 kB."""
    with h5py.File(path, "w") as file:
        top = file.create_group(root) if root else file
        top.attrs["backend"], top.attrs["keras_version"] = b"tensorflow", b"2.15.0"
        write_names(top, "layer_names", [name for name, _ in layers], chunk)
        for layer, tensors in layers:
            group = top.create_group(layer)
            write_names(group, "weight_names", [name for name, _ in tensors], chunk)
            for name, value in tensors:
                group.create_dataset(name, data=value, **filters)
    return path
