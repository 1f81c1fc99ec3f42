"""Solutions of lesson 4."""

import numpy as np


def embed_timestep(t, dim):
    frequencies = 10000 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(t * frequencies), np.sin(t * frequencies)])


def find_x0(noisy, answer, alpha):
    return (noisy - (1 - alpha) ** 0.5 * answer) / alpha**0.5


def find_loss(answer, noise):
    return np.mean((answer - noise) ** 2)
