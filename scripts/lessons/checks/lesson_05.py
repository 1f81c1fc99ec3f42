"""Checks of lesson 5."""

import numpy as np
from lesson import Wrong

from stable_diffusion.noise_scheduler import ddim, diffuse

RNG = np.random.default_rng(0)
X0, NOISE = RNG.normal(size=(2, 1, 8, 8, 4))
LEVELS = [(900, 0.02), (500, 0.3), (100, 0.9), (None, 0.999)]


def check_take_step(answer):
    for alpha in (0.4, 0.95, 1.0):
        found = np.asarray(answer(X0, NOISE, alpha))
        if np.allclose(found, diffuse(X0, NOISE, alpha)):
            continue
        if np.allclose(found, diffuse(NOISE, X0, alpha)):
            raise Wrong("x0 and noise are swapped: ᾱ_next is the share of x0.")
        if np.allclose(found, alpha * X0 + (1 - alpha) * NOISE):
            raise Wrong("did you forget the square roots?")
        if np.allclose(found, X0 + (1 - alpha) ** 0.5 * NOISE):
            raise Wrong("x0 needs its factor too, √ᾱ_next.")
        if np.allclose(found, X0):
            raise Wrong("this is x0 itself: that goes to the end in one step, without noise.")
        raise Wrong(
            f"for ᾱ_next = {alpha} it is {np.abs(found - diffuse(X0, NOISE, alpha)).max():.2f} off."
        )


def _make_model(asked):
    """Returns a model whose answers depend on all that it is told, and keeps what it was asked."""

    def predict(latent, t, alpha):
        asked.append((t, alpha))
        x0 = np.tanh(latent) * alpha + X0
        return x0, (latent - alpha**0.5 * x0) / (1 - alpha) ** 0.5

    return predict


def check_sample(answer):
    right_asked, asked = [], []
    predict = _make_model(right_asked)
    steps = ddim(lambda z, alpha, t: predict(z, t, alpha), NOISE, LEVELS, None)
    *_, (_, right, _) = steps
    found = answer(_make_model(asked), NOISE, list(LEVELS))
    if any(t is None for t, _ in asked):
        raise Wrong("the model was asked at the last level: the walk ends there, without a model.")
    if len(asked) != len(right_asked):
        raise Wrong(f"{len(LEVELS)} levels are {len(LEVELS) - 1} steps: you took {len(asked)}.")
    if asked != right_asked:
        raise Wrong(f"the model was asked at {asked[0]} first, and should be at {right_asked[0]}.")
    found = np.asarray(found)
    if np.allclose(found, _x0_at_the_end(right_asked)):
        raise Wrong("this is the last x0: mix it with the noise up to the last level's ᾱ.")
    if not np.allclose(found, right):
        raise Wrong(
            f"the result is up to {np.abs(found - right).max():.2f} off: each step must use the "
            f"ᾱ of the level where it goes, and go on from its own result."
        )


def _x0_at_the_end(asked):
    model, latent = _make_model([]), NOISE
    for (t, alpha), (_, alpha_next) in zip(LEVELS, LEVELS[1:], strict=False):
        x0, noise = model(latent, t, alpha)
        latent = diffuse(x0, noise, alpha_next)
    return x0


def check_find_sigma(answer):
    for alpha, after, eta in ((0.3, 0.5, 1.0), (0.01, 0.9, 0.4), (0.3, 0.5, 0.0)):
        found = answer(alpha, after, eta)
        right = eta * ((1 - after) / (1 - alpha)) ** 0.5 * (1 - alpha / after) ** 0.5
        if np.isclose(found, right):
            continue
        if np.isclose(found, right**2):
            raise Wrong("this is σ², the variance: take the roots.")
        if np.isclose(found, ((1 - after) / (1 - alpha)) ** 0.5 * (1 - alpha / after) ** 0.5):
            raise Wrong("η is missing.")
        if np.isclose(found, eta * ((1 - alpha) / (1 - after)) ** 0.5 * (1 - alpha / after) ** 0.5):
            raise Wrong("the first fraction is upside down.")
        raise Wrong(
            f"for ᾱ = {alpha}, ᾱ_next = {after}, η = {eta} it gave {found}, not {right:.4f}."
        )


def _walk(predict, latent, levels, ask_at_end=False, last_x0=False, stay=False):
    ends = [*levels[1:], levels[-1]] if ask_at_end else levels[1:]
    for (t, alpha), (_, alpha_next) in zip(levels, ends, strict=False):
        x0, noise = predict(latent, t, alpha)
        latent = diffuse(x0, noise, alpha if stay else alpha_next)
    return x0 if last_x0 else latent


WRONG = {
    "take_step": [
        (lambda x0, noise, alpha: diffuse(noise, x0, alpha), "swapped"),
        (lambda x0, noise, alpha: alpha * x0 + (1 - alpha) * noise, "square roots"),
        (lambda x0, noise, alpha: x0, "in one step"),
    ],
    "sample": [
        (lambda *given: _walk(*given, ask_at_end=True), "asked at the last level"),
        (lambda *given: _walk(*given, last_x0=True), "the last x0"),
        (lambda *given: _walk(*given, stay=True), "the level where it goes"),
        (lambda predict, latent, levels: _walk(predict, latent, levels[:2]), "you took 1"),
    ],
    "find_sigma": [
        (lambda a, b, eta: eta**2 * (1 - b) / (1 - a) * (1 - a / b), "the variance"),
        (lambda a, b, eta: ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5, "η is missing"),
        (lambda a, b, eta: eta, "it gave"),
    ],
}
