"""Checks of lesson 4."""

import numpy as np
from lesson import Wrong

from stable_diffusion.noise_scheduler import diffuse, timestep_embedding

RNG = np.random.default_rng(0)
X0, NOISE = RNG.normal(size=(2, 1, 8, 8, 4))


def check_embed_timestep(answer):
    for t, dim in ((7, 8), (401, 48)):
        found, right = np.asarray(answer(t, dim)), timestep_embedding([t], dim)[0]
        if found.shape != (dim,):
            raise Wrong(f"it gave {found.shape} for dim = {dim}, not {(dim,)}.")
        half = dim // 2
        if np.allclose(found, np.roll(right, half), atol=1e-5):
            raise Wrong("the cosines come first, then the sines.")
        if np.allclose(found[0::2], right[:half], atol=1e-5):
            raise Wrong("all cosines, then all sines: yours take turns.")
        angles = t * 10000 ** (-np.arange(half) / dim)
        if np.allclose(found, np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-5):
            raise Wrong("the exponent is -i / (dim/2), not -i / dim.")
        if not np.allclose(found, right, atol=1e-5):
            raise Wrong(
                f"for t = {t} it begins {found[:3].round(3)}, and {right[:3].round(3)} is right."
            )


def check_find_x0(answer):
    for alpha in (0.9, 0.1):
        noisy = diffuse(X0, NOISE, alpha)
        found = np.asarray(answer(noisy, NOISE, alpha))
        if np.allclose(found, X0):
            continue
        if np.allclose(found, noisy - (1 - alpha) ** 0.5 * NOISE):
            raise Wrong("what is left is √ᾱ x0: divide by √ᾱ.")
        if np.allclose(found, noisy - NOISE):
            raise Wrong("the noise is in there √(1 - ᾱ) times, not once.")
        if np.allclose(found, (noisy - (1 - alpha) * NOISE) / alpha):
            raise Wrong("did you forget the square roots?")
        raise Wrong(f"it is {np.abs(found - X0).mean():.2f} off on average, for ᾱ = {alpha}.")


def check_find_loss(answer):
    found, right = answer(X0, NOISE), np.mean((X0 - NOISE) ** 2)
    if np.ndim(found):
        raise Wrong(f"a loss is one number: yours has the shape {np.shape(found)}.")
    if np.isclose(found, np.abs(X0 - NOISE).mean()):
        raise Wrong("this is the mean absolute error: square the differences.")
    if np.isclose(found, ((X0 - NOISE) ** 2).sum()):
        raise Wrong("take the mean, not the sum: else the loss grows with the image.")
    if np.isclose(found, right**0.5):
        raise Wrong("no root: the mean of the squares itself.")
    if not np.isclose(found, right):
        raise Wrong(f"it gave {found:.4f}, and {right:.4f} is right.")


def _waves(t, dim):
    angles = t * 10000 ** (-np.arange(dim // 2) / (dim // 2))
    return np.cos(angles), np.sin(angles)


WRONG = {
    "embed_timestep": [
        (lambda t, dim: np.concatenate(_waves(t, dim)[::-1]), "cosines come first"),
        (lambda t, dim: np.stack(_waves(t, dim), -1).ravel(), "take turns"),
        (lambda t, dim: _waves(t, dim)[0], "not (8,)"),
    ],
    "find_x0": [
        (lambda noisy, answer, alpha: noisy - (1 - alpha) ** 0.5 * answer, "divide by √ᾱ"),
        (lambda noisy, answer, alpha: noisy - answer, "not once"),
        (lambda noisy, answer, alpha: noisy, "off on average"),
    ],
    "find_loss": [
        (lambda answer, noise: np.abs(answer - noise).mean(), "absolute"),
        (lambda answer, noise: ((answer - noise) ** 2).sum(), "not the sum"),
        (lambda answer, noise: (answer - noise) ** 2, "one number"),
    ],
}
