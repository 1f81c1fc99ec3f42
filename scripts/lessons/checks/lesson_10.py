"""Checks of lesson 10: training on points."""

import numpy as np
from lesson import Wrong
from checks.comparing import compare

ALPHAS_CUMPROD = np.linspace(0.99, 0.01, 10)


def _predict(noisy, timesteps):
    """Stands for a network: what it returns depends on both arguments."""
    noisy, timesteps = np.asarray(noisy), np.asarray(timesteps)
    if noisy.shape != (*timesteps.shape, 2):
        raise Wrong(f"predict got points {noisy.shape} and timesteps {timesteps.shape}.")
    return np.tanh(noisy) * (0.3 + 0.1 * timesteps[:, None])


def _diffuse(x0, noise, alpha):
    return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


def check_compute_loss(answer):
    rng = np.random.default_rng(10)
    x0, noise = rng.standard_normal((2, 8, 2))
    timesteps = rng.integers(10, size=8)
    alpha = ALPHAS_CUMPROD[timesteps][:, None]
    noisy = _diffuse(x0, noise, alpha)
    error = _predict(noisy, timesteps) - noise

    def lose(noisy):
        return np.mean((_predict(noisy, timesteps) - noise) ** 2)

    mistakes = [
        (np.sum(error**2), "it is the sum of the squares; the loss is their mean."),
        (error**2, "it is the squares; the loss is their mean."),
        (np.mean(error**2, axis=1), "it is one number a point; the loss is the mean over all."),
        (np.mean(error), "the errors must be squared."),
        (np.mean(np.abs(error)), "the errors must be squared, not their absolute values taken."),
        (np.sqrt(np.mean(error**2)), "it is the root; the loss is the mean of the squares."),
        (np.mean((error + noise - x0) ** 2), "it compares with x0: predict returns noise."),
        (
            lose(alpha * x0 + (1 - alpha) * noise),
            "the roots of alpha and of 1 - alpha are missing.",
        ),
        (lose(_diffuse(noise, x0, alpha)), "x0 and noise are swapped when noise is added."),
        (lose(x0 + noise), "it adds all of the noise: weigh both with alpha, see lesson 3."),
        (lose(x0), "predict gets x0, without noise."),
        (lose(_diffuse(x0, noise, ALPHAS_CUMPROD[timesteps[0]])), "all points get the same alpha."),
    ]
    compare(answer(_predict, x0, noise, timesteps, ALPHAS_CUMPROD), np.mean(error**2), mistakes)


def check_split_noise(answer):
    rng = np.random.default_rng(11)
    x0, guess = rng.standard_normal((2, 8, 2))
    alpha = 0.3
    found = answer(guess, _diffuse(x0, guess, alpha), alpha)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Wrong("it must return two things: x0 and the noise.")
    noisy = _diffuse(x0, guess, alpha)
    mistakes = [
        (guess, "the noise comes first; x0 should."),
        (noisy - guess, "it subtracts all of the guess: how much of it is in noisy?"),
        (noisy - 0.7**0.5 * guess, "what is left is √alpha x0: divide it by √alpha."),
        (noisy / 0.3**0.5 - 0.7**0.5 * guess, "divide the noise by √alpha, too."),
        ((noisy - 0.7 * guess) / 0.3, "the roots of alpha and of 1 - alpha are missing."),
        ((noisy - 0.3**0.5 * guess) / 0.7**0.5, "alpha and 1 - alpha are swapped."),
    ]
    compare(found[0], x0, mistakes)
    compare(found[1], guess, [(noisy, "it returns noisy in place of the noise.")])


def check_guess_best(answer):
    rng = np.random.default_rng(12)
    points, noisy, alpha = rng.standard_normal((20, 2)), rng.standard_normal((5, 2)), 0.6

    def guess(signal, variance, root=False):
        squares = ((noisy[:, None] - signal * points) ** 2).sum(-1)
        weights = np.exp(-(np.sqrt(squares) if root else squares) / variance)
        return weights / weights.sum(1, keepdims=True) @ points

    squares = ((noisy[:, None] - alpha**0.5 * points) ** 2).sum(-1)
    weights = np.exp(-squares / (2 * (1 - alpha)))
    nearest = points[squares.argmin(1)]
    mistakes = [
        (
            guess(1, 2 * (1 - alpha)),
            "the points must be weighed by √alpha before they are compared.",
        ),
        (guess(alpha, 2 * (1 - alpha)), "the points need √alpha, not alpha."),
        (guess(alpha**0.5, 1 - alpha), "the 2 in 2 (1 - alpha) is missing."),
        (guess(alpha**0.5, 2 * (1 - alpha) ** 0.5), "it is 1 - alpha there, not its root."),
        (guess(alpha**0.5, 2 * (1 - alpha), root=True), "the distance must be squared."),
        (guess(alpha**0.5, -2 * (1 - alpha)), "the sign is wrong: near points are probable."),
        (nearest, "it is the nearest point; the best guess is a mean of all, weighted."),
        (weights @ points, "the weights must add up to 1: divide by their sum."),
        (np.tile(points.mean(0), (5, 1)), "it is the plain mean of the points."),
        (
            (weights / weights.sum(0)) @ points,
            "the weights of one noisy point must add up to 1, not those of one data point.",
        ),
    ]
    compare(answer(points, noisy, alpha), guess(alpha**0.5, 2 * (1 - alpha)), mistakes)
    with np.errstate(all="ignore"):
        far = answer(points, noisy + 60, 0.99)
    if not np.isfinite(far).all():
        raise Wrong("far from all points it is nan: subtract the largest exponent before exp.")
    squares = ((noisy[:, None] + 60 - 0.99**0.5 * points) ** 2).sum(-1) / 0.02
    weights = np.exp(squares.min(1, keepdims=True) - squares)
    compare(far, weights / weights.sum(1, keepdims=True) @ points)


def _loss(add=_diffuse, lose=lambda error: np.mean(error**2), target="noise"):
    def answer(predict, x0, noise, timesteps, alphas_cumprod):
        noisy = add(x0, noise, alphas_cumprod[timesteps][:, None])
        return lose(predict(noisy, timesteps) - {"noise": noise, "x0": x0}[target])

    return answer


def _best(power=0.5, factor=2.0, axis=1):
    def answer(points, noisy, alpha):
        squares = ((noisy[:, None] - alpha**power * points) ** 2).sum(-1)
        weights = np.exp(-squares / (factor * (1 - alpha)))
        return weights / weights.sum(axis, keepdims=True) @ points

    return answer


WRONG = {
    "compute_loss": [
        (_loss(lose=lambda error: np.sum(error**2)), "the loss is their mean"),
        (_loss(lose=np.mean), "must be squared"),
        (_loss(target="x0"), "it compares with x0"),
        (_loss(lambda x0, noise, alpha: alpha * x0 + (1 - alpha) * noise), "roots of alpha"),
        (_loss(lambda x0, noise, alpha: _diffuse(noise, x0, alpha)), "are swapped"),
        (_loss(lambda x0, noise, alpha: x0 + noise), "all of the noise"),
        (
            lambda predict, x0, noise, t, alphas: np.mean(_diffuse(x0, noise, alphas[t])),
            "it ended with ValueError: operands could not be broadcast",
        ),
    ],
    "split_noise": [
        (lambda guess, noisy, alpha: (noisy - (1 - alpha) ** 0.5 * guess, guess), "divide it by"),
        (lambda guess, noisy, alpha: (noisy - guess, guess), "all of the guess"),
        (lambda guess, noisy, alpha: ((noisy - (1 - alpha) * guess) / alpha, guess), "roots of"),
        (lambda guess, noisy, alpha: (guess, noisy), "the noise comes first"),
        (lambda guess, noisy, alpha: guess, "two things"),
    ],
    "guess_best": [
        (_best(power=0), "weighed by √alpha before"),
        (_best(power=1), "not alpha"),
        (_best(factor=1), "the 2 in 2"),
        (_best(factor=-2), "near points are probable"),
        (_best(axis=0), "not those of one data point"),
        (_best(), "far from all points it is nan"),
        (lambda points, noisy, alpha: np.tile(points.mean(0), (5, 1)), "the plain mean"),
    ],
}
