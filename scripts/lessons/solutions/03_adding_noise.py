"""Solutions of lesson 3."""

import numpy as np


def add_noise(x0, noise, alpha):
    return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


def find_timestep(betas):
    alphas_cumprod = np.cumprod(1 - betas)
    return int(np.argmax(alphas_cumprod < 0.5))  # the first place where it is True


def find_noise(noisy, x0, alpha):
    return (noisy - alpha**0.5 * x0) / (1 - alpha) ** 0.5
