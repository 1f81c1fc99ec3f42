"""Schedules without any signal at the last timestep, and each step on them, as diffusers has them.

The reference is diffusers' schedulers, which compute their coefficients in float32. They follow a
formula, not a model. Errors are relative to the largest value of the reference.
"""

import itertools

import numpy as np
import pytest
from helpers import make_schedule

from stable_diffusion.noise_scheduler import split_prediction
from stable_diffusion.samplers import SAMPLERS, find_sampler

REASON = "needs pip install torch diffusers transformers accelerate"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)
import make_sampler_golden as theirs  # noqa: E402  needs the above

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # of these libraries, about each other
]

TOLERANCE = 2e-5  # of each step
# diffusers' Euler adds x0 to 4,096 times the noise in float32, and loses 12 bits.
EULER_TOLERANCE = 5e-4
SCHEDULE_TOLERANCE = 1e-6
STEPS = (1, 2, 4, 20)  # divisors of 1000: with others, diffusers' DDIM does not end where it began
PREDICTIONS = ("v_prediction", "sample")
SCHEDULES = {"scaled_linear": "zero_snr", "linear": "zero_snr_linear"}  # ours, and the script's
NAMES = [name for name in SAMPLERS if name not in theirs.NO_SNR]


def make_ours(betas, spacing, prediction="v_prediction"):
    return make_schedule(betas, spacing, prediction, zero_snr=True)


@pytest.mark.parametrize("betas", theirs.BETAS)
def test_schedule(betas):
    """diffusers' solvers replace the last alpha, whose logarithm they need."""
    ours = make_ours(betas, "trailing")
    assert ours.alphas_cumprod[-1] == 0
    for name in NAMES:
        scheduler = theirs.make_scheduler(name, SCHEDULES[betas], "trailing", "v_prediction")
        expected = scheduler.alphas_cumprod.double().numpy()
        found = np.maximum(ours.alphas_cumprod, SAMPLERS[name].least_alpha)
        np.testing.assert_allclose(found, expected, atol=SCHEDULE_TOLERANCE, rtol=0)
        assert found[-1] == expected[-1]


@pytest.mark.parametrize(
    ("name", "betas", "spacing", "prediction"),
    [
        names
        for names in itertools.product(NAMES, theirs.BETAS, theirs.SPACINGS, PREDICTIONS)
        # see STEPS; and diffusers' euler-a has no "sample"
        if names[::2] != ("ddim", "linspace") and names[::3] != ("euler-a", "sample")
    ],
)
def test_each_step(name, betas, spacing, prediction):
    schedule, (noise, noises) = make_ours(betas, spacing, prediction), theirs.draw()
    sampler = find_sampler(name, spacing)

    def denoise(latent, alpha, timestep):
        output = theirs.predict(torch.from_numpy(latent), timestep).numpy()
        return split_prediction(output, latent, alpha, prediction)

    for num_steps in STEPS:
        if num_steps == 1 and spacing == "linspace" and name in theirs.IDLE:
            continue  # they begin at timestep 0 there
        case = name, SCHEDULES[betas], spacing, prediction
        timesteps, expected = theirs.follow(*case, noise, noises, num_steps)
        levels, given = schedule.levels(num_steps, None, sampler), iter(noises.numpy())
        assert spacing == "leading" and name != "lcm" or levels[0].timestep == 999
        latent = sampler.start(noise.numpy(), levels[0].alpha)
        steps = list(sampler.sample(denoise, latent, levels, lambda given=given: next(given)))
        np.testing.assert_allclose([t for t, *_ in steps], timesteps, rtol=1e-6)
        for (timestep, found, _), right in zip(steps, expected, strict=True):
            error = np.abs(found - right).max() / np.abs(right).max()
            tolerance = EULER_TOLERANCE if name.startswith("euler") else TOLERANCE
            assert error < tolerance, f"{num_steps} steps, timestep {timestep}: {error:.1e}"


@pytest.mark.parametrize("name", SAMPLERS)
def test_epsilon_is_refused(name):
    """Where nothing is left of the signal, noise does not tell x0; diffusers returns no number."""
    schedule = make_ours("scaled_linear", "trailing", "epsilon")
    with pytest.raises(ValueError, match="predicts epsilon can't begin where alpha is 0"):
        schedule.levels(4, None, SAMPLERS[name])
    scheduler = theirs.make_scheduler("ddim", "zero_snr", "trailing", "epsilon")
    scheduler.set_timesteps(4)
    output = scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))
    assert not output.prev_sample.isfinite().any()
