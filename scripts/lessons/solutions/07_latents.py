"""Solutions of lesson 7."""

import numpy as np


def fit_colours(latents, colours):
    inputs = np.hstack([latents, np.ones_like(latents[:, :1])])
    return np.linalg.lstsq(inputs, colours, rcond=None)[0]


def find_scaling_factor(latents):
    return 1 / np.std(latents)


def blend_latents(a, b, mask):
    height, width, _ = a.shape
    share = mask.reshape(height, 8, width, 8).mean((1, 3))[..., None]  # (h, w, 1)
    return (1 - share) * a + share * b
