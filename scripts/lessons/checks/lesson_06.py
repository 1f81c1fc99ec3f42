"""Checks of lesson 6: guidance."""

import numpy as np
from lesson import Wrong
from checks.comparing import compare

SHAPE = (1, 4, 4, 8)


def _make_noises():
    rng = np.random.default_rng(6)
    without = rng.standard_normal(SHAPE)
    return without, without + 0.1 * rng.standard_normal(SHAPE)


def check_guide(answer):
    without, with_prompt = _make_noises()
    step = with_prompt - without
    for scale in (3.0, 1.0, 0.0, 7.5):
        given = without.copy(), with_prompt.copy()
        found = answer(*given, scale)
        if not all(map(np.array_equal, given, (without, with_prompt))):
            raise Wrong("it changes its arguments in place.")
        mistakes = [
            (
                with_prompt + scale * step,
                "it starts from with_prompt, so its scale is the paper's w, which is 1 less: start "
                "from without.",
            ),
            (with_prompt - scale * step, "it goes from with_prompt towards without."),
            (without - scale * step, "it goes away from the prompt: turn the difference around."),
            (scale * step, "it is the difference only: add without."),
            (scale * with_prompt, "it leaves out without."),
        ]
        right = without + scale * step
        compare(found, right, [pair for pair in mistakes if not np.allclose(pair[0], right)])


def check_find_scale(answer):
    without, with_prompt = _make_noises()
    with_prompt[0, 0, :2] = without[0, 0, :2]  # where the prompt says nothing
    for scale in (3.0, 7.5):
        guided = without + scale * (with_prompt - without)
        mistakes = [
            (scale - 1, "it is the paper's w: programs have w + 1."),
            (np.nan, "it is nan: it divides by 0 where the prompt changes nothing."),
        ]
        compare(answer(without, with_prompt, guided), scale, mistakes)
        with_prompt[0, 0, 0, 0] = without[0, 0, 0, 0] + 1e-6
        guided[0, 0, 0, 0] += 1e-2  # as of numbers that were rounded
        found = answer(without, with_prompt, guided)
        if not abs(float(found) - scale) < 0.1:
            raise Wrong(
                f"with a little rounding it finds {float(found):.4g}, not {scale}: it divides by "
                "numbers near 0. Weigh them less, as least squares does."
            )


class _UNet:
    """Stands for a UNet: counts its runs, and what it returns depends on both arguments."""

    def __init__(self):
        self.runs = []

    def __call__(self, latents, contexts):
        latents, contexts = np.asarray(latents), np.asarray(contexts)
        if len(latents) != len(contexts):
            raise Wrong(f"unet got {len(latents)} latents and {len(contexts)} contexts.")
        self.runs.append(contexts)
        return latents * contexts.mean((1, 2))[:, None, None, None]


def check_guide_in_one_pass(answer):
    rng = np.random.default_rng(8)
    latent = rng.standard_normal(SHAPE)
    context, negative = rng.standard_normal((2, 1, 5, 3))
    without, with_prompt = _UNet()(latent, negative), _UNet()(latent, context)
    unet, scale = _UNet(), 3.0
    found = answer(unet, latent, context, negative, scale)
    if len(unet.runs) != 1:
        raise Wrong(f"unet ran {len(unet.runs)} times, not once.")
    if len(unet.runs[0]) != 2:
        raise Wrong(f"unet got a batch of {len(unet.runs[0])}, not of 2.")
    right = without + scale * (with_prompt - without)
    swapped = with_prompt + scale * (without - with_prompt)
    why = "it follows the negative prompt and goes away from the prompt: the halves are swapped."
    both = np.concatenate([right, right])
    compare(found, right, [(swapped, why), (both, "it returns a batch of 2, not of 1.")])
    if not np.array_equal(unet.runs[0], np.concatenate([negative, context])):
        raise Wrong("the prompt comes first in its batch; the negative prompt should.")


def _guide_twice(unet, latent, context, negative, scale):
    without = unet(latent, negative)
    return without + scale * (unet(latent, context) - without)


def _guide_swapped(unet, latent, context, negative, scale):
    output = unet(np.concatenate([latent] * 2), np.concatenate([negative, context]))
    with_prompt, without = np.split(output, 2)
    return without + scale * (with_prompt - without)


def _guide_prompt_first(unet, latent, context, negative, scale):
    output = unet(np.concatenate([latent] * 2), np.concatenate([context, negative]))
    with_prompt, without = np.split(output, 2)
    return without + scale * (with_prompt - without)


def _guide_in_place(without, with_prompt, scale):
    without += scale * (with_prompt - without)
    return without


WRONG = {
    "guide": [
        (lambda a, b, scale: b + scale * (b - a), "the paper's w"),
        (lambda a, b, scale: a + scale * (a - b), "turn the difference around"),
        (lambda a, b, scale: scale * (b - a), "add without"),
        (lambda a, b, scale: scale * b, "leaves out without"),
        (lambda a, b, scale: (a + scale * (b - a))[0], "its shape is (4, 4, 8), not (1, 4, 4, 8)"),
        (lambda a, b, scale: None, "it returns None"),
        (lambda a, b, scale: (1 - scale) * a + scale * a, "it is "),
        (_guide_in_place, "changes its arguments in place"),
    ],
    "find_scale": [
        (lambda a, b, guided: np.sum((guided - b) * (b - a)) / np.sum((b - a) ** 2), "paper's w"),
        (lambda a, b, guided: (guided - a) / (b - a + 1e-30), "its shape is (1, 4, 4, 8), not ()"),
        (
            lambda a, b, guided: np.divide(*(x[0, 0, 0, 0] for x in (guided - a, b - a + 1e-300))),
            "it is 0, not 3",
        ),
        (
            lambda a, b, guided: np.mean((guided - a)[b != a] / (b - a)[b != a]),
            "divides by numbers near 0",
        ),
    ],
    "guide_in_one_pass": [
        (_guide_twice, "unet ran 2 times, not once"),
        (_guide_swapped, "the halves are swapped"),
        (_guide_prompt_first, "the prompt comes first"),
        (
            lambda unet, latent, *contexts: unet(latent, np.concatenate(contexts[:2])),
            "1 latents and 2",
        ),
        (lambda unet, latent, context, *rest: unet(latent, context), "a batch of 1, not of 2"),
    ],
}
