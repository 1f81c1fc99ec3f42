"""Latent consistency models: UNets that were trained to predict x0 in few steps."""

import numpy as np

from stable_diffusion.checks import check_int
from stable_diffusion.noise_scheduler import diffuse

# Luo et al. 2023 and its code, https://github.com/luosiallen/latent-consistency-model
TRAINED_STEPS = 50  # timesteps that the model was trained at, evenly spaced up to the last one
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def space_lcm(sigmas, n):
    """Returns n of the timesteps that the model was trained at, see `spacing.SPACINGS`."""
    total = len(sigmas)
    trained = min(TRAINED_STEPS, total)
    places = np.arange(check_int("num_steps", n, 1, trained)) * trained // n
    return ((trained - places) * float(total // trained) - 1)[::-1]


def lcm(denoise, latent, levels, next_noise):
    """Samples with a latent consistency model: to x0 in each step, and back to less noise.

    Arguments and results are those of `noise_scheduler.ddim`.

    Reference: Luo et al. 2023, https://arxiv.org/abs/2310.04378, algorithm 1, and equation 9 with
    the weights c_skip and c_out of its code.
    """
    for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, _ = denoise(latent, alpha, timestep)
        # c_skip x + c_out x0 (equation 9), where c_skip = σ_data² / ((10 t)² + σ_data²)
        scaled = (TIMESTEP_SCALING * timestep) ** 2
        skip = SIGMA_DATA**2 / (scaled + SIGMA_DATA**2)
        latent = (1 - skip) ** 0.5 * x0 + skip * latent  # c_out² is 1 - c_skip
        if alpha_next < 1:
            # x' = √ᾱ' x0 + √(1-ᾱ') z (algorithm 1)
            latent = diffuse(latent, next_noise(), alpha_next)
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent
