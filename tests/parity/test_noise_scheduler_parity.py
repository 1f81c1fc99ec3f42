"""Compares `stable_diffusion.noise_scheduler` with KerasCV's scheduler and pipeline.

The reference is keras_cv 0.9.0, on TensorFlow. In float64 it agrees within 1e-10. In float32, its
default, its schedules have lost up to four digits of 1 - alpha at the first timesteps, where these
here are float64 always; so tolerances in float32 tell the reference's accuracy.
"""

import keras
import numpy as np
import pytest
from keras import ops
from keras_cv.models.stable_diffusion import NoiseScheduler as KerasCVScheduler
from keras_cv.src.models.stable_diffusion.constants import _ALPHAS_CUMPROD
from keras_cv.src.models.stable_diffusion.stable_diffusion import StableDiffusionBase

from stable_diffusion import NoiseScheduler, StableDiffusion
from stable_diffusion.config import SD1
from stable_diffusion.parity.keras_cv import relative_error

SCHEDULES = [
    {},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"train_timesteps": 50, "beta_end": 0.1},
]
SHAPE = (3, 4, 5, 2)


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def normal(seed):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(keras.config.floatx())


def pair(**arguments):
    return NoiseScheduler(**arguments), KerasCVScheduler(**arguments)


def test_alphas_are_those_of_kerascv_pipeline():
    """The table has float32's digits: 2**-23 is the distance of 1 to the next number."""
    np.testing.assert_allclose(SD1.schedule.alphas_cumprod, _ALPHAS_CUMPROD, rtol=2**-23)


@pytest.mark.parametrize("arguments", SCHEDULES)
def test_schedules(arguments, float64):
    ours, theirs = pair(**arguments)
    assert len(ours) == len(theirs) == ours.train_timesteps == theirs.train_timesteps
    for table in ("betas", "alphas", "alphas_cumprod"):
        assert relative_error(getattr(ours, table), getattr(theirs, table)) <= 1e-10


@pytest.mark.parametrize("arguments", SCHEDULES)
@pytest.mark.parametrize(
    "table, tolerance", [("betas", 1e-6), ("alphas", 1e-6), ("alphas_cumprod", 5e-6)]
)
def test_schedules_in_float32(arguments, table, tolerance):
    ours, theirs = (getattr(scheduler, table) for scheduler in pair(**arguments))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)


@pytest.mark.parametrize("arguments", SCHEDULES)
def test_add_noise(arguments):
    ours, theirs = (
        scheduler.add_noise(ops.array(normal(0)), ops.array(normal(1)), ops.array([0, 7, 49]))
        for scheduler in pair(**arguments)
    )
    np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("arguments", SCHEDULES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("predict_epsilon", [True, False])
def test_steps_with_their_noise(arguments, variance_type, predict_epsilon, float64):
    ours, theirs = pair(**arguments, variance_type=variance_type, clip_sample=False)
    last = len(ours) - 1
    for timestep in (last, last // 2, 10, 2, 1, 0):
        output, sample = ops.array(normal(timestep)), ops.array(normal(1000 + timestep))
        stepped, expected = (
            scheduler.step(output, timestep, sample, predict_epsilon=predict_epsilon)
            for scheduler in (ours, theirs)
        )
        assert relative_error(stepped, expected) <= 1e-10


@pytest.mark.parametrize("timestep", [0, 1, 25, 49])
def test_clipping_keeps_predictions_inside_the_range(timestep, float64):
    """KerasCV's own clipping fails on Keras 3, so that its steps without clipping are compared."""
    arguments = {"train_timesteps": 50, "beta_end": 0.1}
    ours, theirs = NoiseScheduler(**arguments), KerasCVScheduler(**arguments, clip_sample=False)
    x0, noise = ops.array(np.clip(normal(0), -0.9, 0.9)), ops.array(normal(1))
    sample = ours.add_noise(x0, noise, ops.full((3,), timestep, "int32"))
    output, expected = (scheduler.step(noise, timestep, sample) for scheduler in (ours, theirs))
    assert relative_error(output, expected) <= 1e-10
    with pytest.raises(AttributeError, match="clip_by_value"):
        KerasCVScheduler(**arguments).step(noise, timestep, sample)


def test_clipping_clips():
    ours = NoiseScheduler()
    far = ops.array(np.sign(normal(0)) * 3)
    x0 = ops.array(np.sign(normal(0)))
    clipped, expected = (
        ours.step(output, 0, ops.array(normal(1)), predict_epsilon=False) for output in (far, x0)
    )
    np.testing.assert_allclose(clipped, expected, atol=1e-6)


@pytest.mark.parametrize("dim", [320, 32])
def test_timestep_embedding(dim):
    """An angle of up to 1000 has a rounding of 6e-5 in float32, from which theirs suffers."""
    ours = StableDiffusion(weights=None)
    for timestep in range(1000):
        embedding = ours._get_timestep_embedding(timestep, 2, dim)
        expected = StableDiffusionBase._get_timestep_embedding(None, timestep, 2, dim)
        np.testing.assert_allclose(embedding, expected, atol=1e-4)
