"""Checks of lesson 7: latents and the VAE."""

import numpy as np
from checks.comparing import compare


def check_fit_colours(answer):
    rng = np.random.default_rng(7)
    latents = 0.3 + rng.standard_normal((200, 4))
    true = rng.standard_normal((5, 3))
    colours = latents @ true[:-1] + true[-1] + 0.1 * rng.standard_normal((200, 3))
    ones = np.ones((200, 1))

    def fit(inputs):
        return np.linalg.lstsq(inputs, colours, rcond=None)[0]

    right = fit(np.hstack([latents, ones]))
    each = np.stack([fit(latents[:, n : n + 1])[0] for n in range(4)])
    mistakes = [
        (fit(latents), "it has no row that is added: give lstsq a column of ones as well."),
        (fit(np.hstack([ones, latents])), "the row that is added comes first; it should be last."),
        (right.T, "it is transposed: rows are channels, columns are red, green and blue."),
        (each, "it fits each channel by itself: they must be fitted together."),
        (
            np.vstack([fit(latents), colours.mean(0)]),
            "its last row is the mean colour: fit it together with the others.",
        ),
    ]
    compare(answer(latents, colours), right, mistakes, tolerance=1e-4)


def check_find_scaling_factor(answer):
    latents = 0.5 + 3 * np.random.default_rng(8).standard_normal((4, 4, 4, 8))
    latents *= np.linspace(0.5, 2, 8)  # channels spread differently
    spread = latents.std()
    mistakes = [
        (spread, "it is the deviation. Times this number the latents spread even more."),
        (1 / latents.var(), "it is 1 / the variance: take the deviation."),
        (1 / latents.std((0, 1, 2)), "it is one number a channel; the paper has one for all."),
        (
            1 / latents.std((0, 1, 2)).mean(),
            "it is a mean over channels; take all entries at once.",
        ),
        (
            1 / np.abs(latents).mean(),
            "it takes the mean of the absolute values, not the deviation.",
        ),
        (
            1 / np.sqrt(np.mean(latents**2)),
            "it takes the root of the mean square; the deviation is that of what the mean leaves.",
        ),
        (1 / np.abs(latents).max(), "it takes the maximum, not the deviation."),
    ]
    compare(answer(latents), 1 / spread, mistakes)


def check_blend_latents(answer):
    rng = np.random.default_rng(9)
    a, b = rng.standard_normal((2, 4, 6, 8))
    mask = np.zeros((32, 48))
    mask[5:21, 11:48] = 1.0

    def blend(share):
        share = np.reshape(share, (4, 6, -1))
        return (1 - share) * a + share * b

    share = mask.reshape(4, 8, 6, 8).mean((1, 3))
    mistakes = [
        (blend(1 - share), "it takes b where the mask is 0: it should be there where it is 1."),
        (blend(mask[::8, ::8]), "it takes one pixel of each cell, [::8, ::8], not their mean."),
        (blend(mask[4::8, 4::8]), "it takes one pixel of each cell, not the mean of 64."),
        (blend(share.round()), "it rounds the shares: a cell at the border is of both."),
        (blend(share > 0), "it takes b where any pixel says so: a cell at the border is of both."),
        (blend(share == 1), "it takes b where all pixels say so: a cell at the border is of both."),
        (
            blend(mask.reshape(4, 8, 6, 8).sum((1, 3))),
            "it sums the 64 pixels of a cell; take their mean.",
        ),
        (
            blend(mask.reshape(4, 6, 8, 8).mean((2, 3))),
            "its reshape mixes cells: rows of pixels go through all cells. Use (h, 8, w, 8).",
        ),
        (blend(share) - (1 - share[..., None]) * a, "it leaves out a."),
    ]
    compare(answer(a, b, mask), blend(share), mistakes)


def _blend(find_share):
    def answer(a, b, mask):
        share = find_share(mask, *a.shape[:2])[..., None]
        return (1 - share) * a + share * b

    return answer


def _fit(join, transpose=False):
    def answer(latents, colours):
        inputs = join(latents, np.ones_like(latents[:, :1]))
        found = np.linalg.lstsq(inputs, colours, rcond=None)[0]
        return found.T if transpose else found

    return answer


WRONG = {
    "fit_colours": [
        (_fit(lambda latents, ones: latents), "no row that is added"),
        (_fit(lambda latents, ones: np.hstack([ones, latents])), "it should be last"),
        (_fit(lambda latents, ones: np.hstack([latents, ones]), True), "it is transposed"),
        (lambda latents, colours: np.linalg.lstsq(latents, colours, rcond=None), "returns tuple"),
        (lambda latents, colours: np.linalg.solve(latents, colours), "ended with LinAlgError"),
    ],
    "find_scaling_factor": [
        (np.std, "spread even more"),
        (lambda x: 1 / np.var(x), "1 / the variance"),
        (lambda x: 1 / np.std(x, (0, 1, 2)), "one number a channel"),
        (lambda x: np.mean(x**2) ** -0.5, "root of the mean square"),
        (lambda x: 0.18215, "it is 0.18215"),
    ],
    "blend_latents": [
        (_blend(lambda mask, h, w: mask[::8, ::8]), "one pixel of each cell"),
        (_blend(lambda mask, h, w: 1 - mask.reshape(h, 8, w, 8).mean((1, 3))), "the mask is 0"),
        (_blend(lambda mask, h, w: mask.reshape(h, w, 8, 8).mean((2, 3))), "mixes cells"),
        (_blend(lambda mask, h, w: mask.reshape(h, 8, w, 8).max((1, 3))), "any pixel says so"),
        (_blend(lambda mask, h, w: mask.reshape(h, 8, w, 8).sum((1, 3))), "sums the 64 pixels"),
        (lambda a, b, mask: a * (1 - mask) + b * mask, "it ended with ValueError"),
    ],
}
