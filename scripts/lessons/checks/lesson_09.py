"""Checks of lesson 9: samplers. A formula stands for the model, so they need no checkpoint."""

import inspect
from functools import partial

import numpy as np
from lesson import Wrong
from checks.comparing import compare

from stable_diffusion.noise_scheduler import NoiseLevel, ddim
from stable_diffusion.samplers.classical import heun
from stable_diffusion.samplers.multistep import dpmpp_2m

ALPHAS = 0.01, 0.06, 0.2, 0.45, 0.75, 0.93, 1.0
LEVELS = [NoiseLevel(900 - 150 * n, alpha) for n, alpha in enumerate(ALPHAS[:-1])]
LEVELS += [NoiseLevel(None, ALPHAS[-1])]


def _run(sampler, send_at=None, levels=LEVELS):
    """Returns what a sampler yields, a list, and at which alphas it asked the model."""
    asked = []

    def denoise(latent, alpha, timestep=None):
        if not alpha < 1:
            raise Wrong("it asks the model at σ = 0, where no noise is left.")
        asked.append(alpha)
        x0 = np.tanh(1.5 * latent / (1.3 - alpha)) + 0.2
        return x0, (latent - alpha**0.5 * x0) / (1 - alpha) ** 0.5

    start = np.random.default_rng(9).standard_normal((2, 3, 3, 4))
    steps, sent, found = sampler(denoise, start.copy(), levels, None), None, []
    if not inspect.isgenerator(steps):
        raise Wrong("it is no generator: it must yield after each step.")
    for number in range(len(levels) - 1):
        try:
            found.append(steps.send(sent))
        except StopIteration as end:
            raise Wrong(f"it ends after {number} of {len(levels) - 1} steps.") from end
        if not isinstance(found[-1], tuple) or len(found[-1]) != 3:
            raise Wrong("it must yield three things: the timestep, the latent and x0.")
        sent = start if number == send_at else None
    if next(steps, None) is not None:
        raise Wrong(f"it takes more than {len(levels) - 1} steps.")
    return found, asked


def _compare_samplers(answer, right, mistakes):
    """Compares each step of two samplers.

    Args:
        answer, right: the samplers.
        mistakes: list of pairs: a sampler with a mistake, and what to say of it.
    """
    found, asked = _run(answer)
    expected, asked_right = _run(right)
    if len(asked) != len(asked_right):
        raise Wrong(
            f"in {len(LEVELS) - 1} steps it asks the model {len(asked)} times, not "
            f"{len(asked_right)} times."
        )
    for wrong, why in mistakes:
        latents = np.stack([latent for _, latent, _ in _run(wrong)[0]])
        if np.allclose(np.stack([latent for _, latent, _ in found]), latents, 1e-6, 1e-6):
            raise Wrong(why)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        try:
            compare(one[1], other[1])
        except Wrong as error:
            raise Wrong(f"the latent after step {number} is not the package's: {error}") from error
        if one[0] != other[0]:
            raise Wrong(f"step {number} yields the timestep {one[0]}, not {other[0]}, its start.")
        try:
            compare(one[2], other[2])
        except Wrong as error:
            raise Wrong(f"x0 after step {number} is not that of the step's start.") from error
    found, expected = _run(answer, send_at=2)[0], _run(right, send_at=2)[0]
    if not np.allclose(found[-1][1], expected[-1][1], 1e-5, 1e-5):
        raise Wrong("it doesn't go on from a latent that the caller sends.")


def _step(denoise, latent, levels, next_noise, kind="heun"):
    """Heun's method with some mistake."""
    for (timestep, alpha), (timestep_next, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = denoise(latent, alpha, timestep)
        sigma, sigma_next = _find_sigma(alpha), _find_sigma(alpha_next)
        start = latent / alpha**0.5
        x = start + (sigma_next - sigma) * noise
        if alpha_next < 1:
            seen = x if kind == "unscaled" else x * alpha_next**0.5
            _, noise_next = denoise(seen, alpha_next, timestep_next)
            if kind == "end":
                x = start + (sigma_next - sigma) * noise_next
            elif kind == "goes on":
                x = x + (sigma_next - sigma) * (noise + noise_next) / 2
            elif kind == "sum":
                x = start + (sigma_next - sigma) * (noise + noise_next)
            elif kind != "euler":
                x = start + (sigma_next - sigma) * (noise + noise_next) / 2
        latent = x if kind == "x" else x * alpha_next**0.5
        sent = yield timestep, latent, x0
        latent = latent if sent is None or kind == "deaf" else sent


def _find_sigma(alpha):
    return ((1 - alpha) / alpha) ** 0.5


def check_heun(answer):
    mistakes = [
        (partial(_step, kind="end"), "it uses the noise at the end only, not the mean of both."),
        (partial(_step, kind="euler"), "it asks for the noise at the end, and does not use it."),
        (
            partial(_step, kind="goes on"),
            "it goes on from the end of Euler's step; go from the start of the step again.",
        ),
        (partial(_step, kind="sum"), "it goes along the sum of both noises: take their mean."),
        (
            partial(_step, kind="unscaled"),
            "it gives x to the model, which knows latents: multiply by √alpha_next.",
        ),
        (partial(_step, kind="x"), "it yields x, not the latent: multiply by √alpha_next."),
    ]
    _compare_samplers(answer, heun, mistakes)


def _solve(denoise, latent, levels, next_noise, kind="2m"):
    """DPM-Solver++(2M) with some mistake."""
    before = None
    for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, _ = denoise(latent, alpha, timestep)
        if alpha_next == 1 and kind != "no end":
            latent = x0
        else:
            h = np.log(_find_sigma(alpha) / max(_find_sigma(alpha_next), 1e-9))
            if kind == "sign":
                h = -h
            mean = x0
            if before:
                ratio = before[0] / h if kind == "inverse" else h / before[0]
                ratio = 1.0 if kind == "even" else ratio
                change = x0 - before[1]
                mean = x0 + ratio * change * (0.5 if kind != "twice" else 1.0)
                mean = x0 - ratio * change / 2 if kind == "back" else mean
            latent = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * latent
            latent = latent + alpha_next**0.5 * (1 - np.exp(-h)) * mean
            before = (h, mean) if kind == "mean" else (h, x0)
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent


def check_dpmpp_2m(answer):
    mistakes = [
        (ddim, "it is of first order: the x0 of the step before is not used."),
        (partial(_solve, kind="inverse"), "it has h_before / h: it should be h / h_before."),
        (partial(_solve, kind="even"), "it leaves out h / h_before, as if steps were equal in λ."),
        (partial(_solve, kind="twice"), "it leaves out the 2 in h / (2 h_before)."),
        (partial(_solve, kind="back"), "it goes from x0 back to x0_before, not on."),
        (partial(_solve, kind="sign"), "the sign of h is wrong: λ grows as σ falls."),
        (partial(_solve, kind="mean"), "it remembers D; it should remember x0."),
    ]
    _compare_samplers(answer, dpmpp_2m, mistakes)


def check_find_order(answer):
    steps = np.array([10, 20, 40, 80])
    for order, constant in ((1.0, 3.0), (2.0, 50.0), (1.7, 0.4)):
        errors = constant * steps**-order
        slope = np.polyfit(steps, np.log(errors), 1)[0]
        mistakes = [
            (-order, "its sign is wrong: errors fall as steps grow."),
            (2**order, "it is how many times smaller the error gets: the order is its log2."),
            (2**-order, "it is how many times smaller the error gets: the order is its log2."),
            (-slope, "it takes no logarithm of the steps."),
            (slope, "it takes no logarithm of the steps."),
        ]
        compare(answer(steps, errors), order, mistakes)


def _yield_nothing_else(denoise, latent, levels, next_noise):
    for step in heun(denoise, latent, levels, next_noise):
        yield step[1]


def _ask_at_the_end(denoise, latent, levels, next_noise):
    for (timestep, alpha), (timestep_next, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = denoise(latent, alpha, timestep)
        denoise(latent, alpha_next, timestep_next)
        yield timestep, latent, x0


WRONG = {
    "heun": [
        (ddim, "asks the model 6 times, not 11 times"),
        (_ask_at_the_end, "it asks the model at σ = 0"),
        (partial(_step, kind="end"), "the noise at the end only"),
        (partial(_step, kind="goes on"), "from the start of the step again"),
        (partial(_step, kind="sum"), "take their mean"),
        (partial(_step, kind="unscaled"), "it gives x to the model"),
        (partial(_step, kind="x"), "it yields x"),
        (partial(_step, kind="deaf"), "doesn't go on from a latent that the caller sends"),
        (_yield_nothing_else, "must yield three things"),
        (lambda *arguments: list(heun(*arguments)), "it is no generator"),
        (lambda d, x, levels, n: heun(d, x, levels[:4], n), "it ends after 3 of 6 steps"),
    ],
    "dpmpp_2m": [
        (ddim, "it is of first order"),
        (heun, "asks the model 11 times, not 6 times"),
        (partial(_solve, kind="inverse"), "it should be h / h_before"),
        (partial(_solve, kind="even"), "as if steps were equal"),
        (partial(_solve, kind="twice"), "leaves out the 2"),
        (partial(_solve, kind="back"), "not on"),
        (partial(_solve, kind="sign"), "the sign of h"),
        (partial(_solve, kind="mean"), "it remembers D"),
        (partial(_solve, kind="no end"), "the latent after step 5"),
    ],
    "find_order": [
        (lambda steps, errors: np.polyfit(np.log(steps), np.log(errors), 1)[0], "sign is wrong"),
        (lambda steps, errors: -np.polyfit(steps, np.log(errors), 1)[0], "logarithm of the steps"),
        (lambda steps, errors: errors[0] / errors[1], "the order is its log2"),
        (lambda steps, errors: np.log2(errors[:-1] / errors[1:]), "its shape is (3,), not ()"),
    ],
}
