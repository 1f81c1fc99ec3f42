"""Checks of lesson 3."""

import numpy as np
from lesson import Wrong

from stable_diffusion import NoiseScheduler
from stable_diffusion.noise_scheduler import diffuse

RNG = np.random.default_rng(0)
X0, NOISE = RNG.normal(size=(2, 40, 40, 4))


def check_add_noise(answer):
    for alpha in (0.3, 1.0, 0.0):
        found, right = np.asarray(answer(X0, NOISE, alpha)), diffuse(X0, NOISE, alpha)
        if found.shape != right.shape:
            raise Wrong(f"it gave {found.shape}, not {right.shape}.")
        if np.allclose(found, right):
            continue
        if np.allclose(found, alpha * X0 + (1 - alpha) * NOISE):
            raise Wrong(
                f"the variance is {found.var():.2f}, not 1: did you forget the square roots?"
            )
        if np.allclose(found, diffuse(NOISE, X0, alpha)):
            raise Wrong("image and noise are swapped: ᾱ is the image's share.")
        if np.allclose(found, alpha**0.5 * X0 + (1 - alpha**0.5) * NOISE):
            raise Wrong("the noise's factor is √(1 - ᾱ), not 1 - √ᾱ.")
        raise Wrong(
            f"for ᾱ = {alpha} its variance is {found.var():.2f}, and {right.var():.2f} is right."
        )


def check_find_timestep(answer):
    for end in (0.02, 0.012):
        betas = NoiseScheduler(beta_end=end).betas
        alphas = np.cumprod(1 - betas)
        found, right = answer(betas), int(np.argmax(alphas < 0.5))
        if found == right:
            continue
        if found == int(np.argmax(betas > 0.01)) or found == int(np.argmax(1 - betas < 0.5)):
            raise Wrong("one β is the noise of a single step: multiply all of 1 - β up to t.")
        if found == int(np.argmax(alphas**0.5 < 0.5)):
            raise Wrong("compare shares of the variance, ᾱ and 1 - ᾱ, not their roots.")
        if found in (right - 1, right + 1):
            raise Wrong(f"it gave {found}: one off. Timesteps count from 0; 'more', not 'equal'.")
        raise Wrong(f"it gave {found!r}: there ᾱ should just have fallen below 0.5.")


def check_find_noise(answer):
    for alpha in (0.9, 0.2):
        noisy = diffuse(X0, NOISE, alpha)
        found = np.asarray(answer(noisy, X0, alpha))
        if np.allclose(found, NOISE):
            continue
        if np.allclose(found, noisy - alpha**0.5 * X0):
            raise Wrong("divide by the noise's factor √(1 - ᾱ) too.")
        if np.allclose(found, (noisy - alpha**0.5 * X0) / (1 - alpha)):
            raise Wrong("divide by the square root, √(1 - ᾱ).")
        if np.allclose(found, noisy - X0):
            raise Wrong("the image is in there √ᾱ times, not once.")
        raise Wrong(f"it is {np.abs(found - NOISE).mean():.2f} off on average, for ᾱ = {alpha}.")


WRONG = {
    "add_noise": [
        (lambda x0, noise, alpha: alpha * x0 + (1 - alpha) * noise, "square roots"),
        (lambda x0, noise, alpha: diffuse(noise, x0, alpha), "swapped"),
        (lambda x0, noise, alpha: x0 + noise, "its variance is"),
    ],
    "find_timestep": [
        (lambda betas: int(np.argmax(betas > 0.01)), "a single step"),
        (lambda betas: int(np.argmax(np.cumprod(1 - betas) < 0.5)) + 1, "one off"),
        (lambda betas: int(np.argmax(np.cumprod(1 - betas) < 0.25)), "not their roots"),
    ],
    "find_noise": [
        (lambda noisy, x0, alpha: noisy - alpha**0.5 * x0, "divide"),
        (lambda noisy, x0, alpha: noisy - x0, "not once"),
        (lambda noisy, x0, alpha: noisy, "off on average"),
    ],
}
