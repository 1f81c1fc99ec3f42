"""What several test files use; the first two live in `stable_diffusion.parity.keras_cv`."""

import keras
import pytest

from stable_diffusion import StableDiffusion
from stable_diffusion.config import Config, TextConfig, UNetConfig, VAEConfig
from stable_diffusion.parity import keras_cv as compare_keras_cv


@pytest.fixture(scope="session")
def randomize():
    """`randomize(model_or_layer, rng)`: random biases, gammas and betas too, activations near 1."""
    return compare_keras_cv.randomize


@pytest.fixture(scope="session")
def relative_error():
    """`relative_error(a, b)`: max|a - b| / max|b|, where b is the reference."""
    return compare_keras_cv.relative_error


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
