"""Solutions of lesson 9."""

import numpy as np


def find_sigma(alpha):
    return ((1 - alpha) / alpha) ** 0.5


def heun(denoise, latent, levels, next_noise):
    for (timestep, alpha), (timestep_next, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = denoise(latent, alpha, timestep)
        change = find_sigma(alpha_next) - find_sigma(alpha)
        start = latent / alpha**0.5
        x = start + change * noise
        if alpha_next < 1:
            _, noise_next = denoise(x * alpha_next**0.5, alpha_next, timestep_next)
            x = start + change * (noise + noise_next) / 2
        latent = x * alpha_next**0.5
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent


def dpmpp_2m(denoise, latent, levels, next_noise):
    before = None
    for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, _ = denoise(latent, alpha, timestep)
        if alpha_next == 1:
            latent = x0
        else:
            h = np.log(find_sigma(alpha) / find_sigma(alpha_next))
            mean = x0
            if before:
                h_before, x0_before = before
                mean = x0 + h / (2 * h_before) * (x0 - x0_before)
            latent = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * latent
            latent = latent + alpha_next**0.5 * (1 - np.exp(-h)) * mean
            before = h, x0
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent


def find_order(steps, errors):
    # log error = log constant - p log steps: a straight line with the slope -p
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    return -slope
