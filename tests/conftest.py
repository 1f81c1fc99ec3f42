"""Fixtures of several test modules. What is no fixture is in helpers.py."""

import keras
import pytest

from stable_diffusion import StableDiffusion
from stable_diffusion.config import Config, TextConfig, UNetConfig, VAEConfig


@pytest.fixture(scope="session")
def few():
    """The `Config` of a model of few parameters, for training."""
    return Config(
        TextConfig(16, 1, 2, 32),
        UNetConfig((16, 16), (2, 2), (True, False), 16, res_blocks=1, groups=8),
        VAEConfig((8, 8, 8, 8), res_blocks=1, groups=4),
        size=64,
    )


@pytest.fixture(scope="session")
def weights(few, tmp_path_factory):
    """A checkpoint of it, with random parameters."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "few"
    StableDiffusion(jit_compile=False, weights=None, config=few).save(folder, dtype="float32")
    return folder
