"""Checks of lesson 11: LoRA."""

import numpy as np
from lesson import Wrong
from checks.comparing import compare


def check_merge_lora(answer):
    rng = np.random.default_rng(11)
    kernel, a, b = (rng.standard_normal(shape) for shape in ((6, 5), (6, 2), (2, 5)))
    alpha = 3.0
    mistakes = [
        (kernel + a @ b, "alpha / rank is missing."),
        (kernel + alpha * a @ b, "alpha must be divided by the rank."),
        (kernel + alpha / 6 * a @ b, "the rank is the number of A's columns, not of its rows."),
        (kernel + 2 / alpha * a @ b, "it has rank / alpha, not alpha / rank."),
        (alpha / 2 * a @ b, "W is missing: it is what the LoRA adds."),
        (kernel - alpha / 2 * a @ b, "it subtracts the LoRA: that is how to remove it."),
        (kernel * (1 + alpha / 2 * a @ b), "it multiplies W; a LoRA is added."),
    ]
    given = kernel.copy()
    compare(answer(given, a, b, alpha), kernel + alpha / 2 * a @ b, mistakes)
    if not np.array_equal(given, kernel):
        raise Wrong("it changes W in place; return a new array.")


def check_count_numbers(answer):
    shapes = [(96, 96), (128, 96), (64, 320)]
    right = 4 * sum(map(sum, shapes))
    mistakes = [
        (sum(a * b for a, b in shapes), "it counts the numbers of the kernels themselves."),
        (right // 4, "it counts for rank 1: multiply by the rank."),
        (4 * sum(a * b for a, b in shapes), "A is (D, rank): its size does not have E in it."),
        (4 * sum(a for a, _ in shapes), "it counts A only; B is (rank, E)."),
        (4 * sum(b for _, b in shapes), "it counts B only; A is (D, rank)."),
        (4 * sum(shapes[0]), "it counts the first kernel only."),
        (right * 4, "the rank counts once in A and once in B, not squared."),
    ]
    compare(answer(shapes, 4), right, mistakes, tolerance=1e-9)


def check_extract_lora(answer):
    rng = np.random.default_rng(12)
    before = rng.standard_normal((8, 6))
    change = rng.standard_normal((8, 6)) * np.geomspace(1, 0.05, 6)
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    found = answer(before, before + change, 2)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Wrong("it must return two arrays: A and B.")
    a, b = map(np.asarray, found)
    if (a.shape, b.shape) != ((8, 2), (2, 6)):
        raise Wrong(f"A and B have the shapes {a.shape} and {b.shape}, not (8, 2) and (2, 6).")
    root = u[:, :2] * s[:2] ** 0.5 @ vt[:2]
    whole = np.linalg.svd(before + change)
    mistakes = [
        (u[:, :2] @ vt[:2], "the singular values are missing."),
        (
            u[:, :2] * s[:2] ** 2 @ vt[:2],
            "the singular values are in both A and B: once is enough.",
        ),
        (
            root,
            "only the roots of the singular values are in A B: put a root in both, or all in one.",
        ),
        (u[:, -2:] * s[-2:] @ vt[-2:], "it keeps the smallest singular values; keep the largest."),
        (-(u[:, :2] * s[:2]) @ vt[:2], "its sign is wrong: it is before - after."),
        (
            whole[0][:, :2] * whole[1][:2] @ whole[2][:2],
            "it splits `after`; the LoRA is what was added to `before`.",
        ),
    ]
    compare(a @ b, u[:, :2] * s[:2] @ vt[:2], mistakes)


def _extract(weigh=lambda s: s, choose=slice(2), sign=1, change=lambda a, b: b - a):
    def answer(before, after, rank):
        u, s, vt = np.linalg.svd(change(before, after), full_matrices=False)
        return sign * u[:, choose] * weigh(s[choose]), vt[choose]

    return answer


def _merge_in_place(kernel, a, b, alpha):
    kernel += alpha / a.shape[1] * a @ b
    return kernel


WRONG = {
    "merge_lora": [
        (lambda w, a, b, alpha: w + a @ b, "alpha / rank is missing"),
        (lambda w, a, b, alpha: w + alpha * a @ b, "divided by the rank"),
        (lambda w, a, b, alpha: w + alpha / len(a) * a @ b, "A's columns"),
        (lambda w, a, b, alpha: alpha / 2 * a @ b, "W is missing"),
        (lambda w, a, b, alpha: w + alpha / 2 * b @ a, "it ended with ValueError"),
        (_merge_in_place, "in place"),
    ],
    "count_numbers": [
        (lambda shapes, rank: sum(a * b for a, b in shapes), "the kernels themselves"),
        (lambda shapes, rank: sum(a + b for a, b in shapes), "multiply by the rank"),
        (lambda shapes, rank: rank * sum(a for a, _ in shapes), "A only"),
        (lambda shapes, rank: rank**2 * sum(a + b for a, b in shapes), "not squared"),
        (lambda shapes, rank: [rank * (a + b) for a, b in shapes], "its shape is (3,), not ()"),
    ],
    "extract_lora": [
        (_extract(lambda s: 1), "singular values are missing"),
        (_extract(lambda s: s**0.5), "roots of the singular values"),
        (_extract(choose=slice(-2, None)), "keep the largest"),
        (_extract(choose=slice(3)), "(8, 3) and (3, 6), not (8, 2) and (2, 6)"),
        (_extract(sign=-1), "before - after"),
        (_extract(change=lambda before, after: after), "it splits `after`"),
        (lambda before, after, rank: after - before, "must return two arrays"),
    ],
}
