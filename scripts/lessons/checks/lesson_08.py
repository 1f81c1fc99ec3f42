"""Checks of lesson 8: attention and words."""

import numpy as np
from lesson import Wrong
from checks.comparing import compare


def _softmax(scores, axis=-1):
    shares = np.exp(scores - scores.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)


def check_attend_by_hand(answer):
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal((3, count, 16)) for count in (6, 5, 5))
    k *= 2
    scores = q @ k.transpose(0, 2, 1)
    right = _softmax(scores / 4) @ v
    mistakes = [
        (_softmax(scores) @ v, "its scores are not divided by √d."),
        (_softmax(scores / 16) @ v, "its scores are divided by d; divide by its root."),
        (_softmax(scores * 4) @ v, "its scores are multiplied by √d; divide by it."),
        (_softmax(scores / 5**0.5) @ v, "d is the last axis, not the number of tokens."),
        (_softmax(scores / 3**0.5) @ v, "d is the last axis, not the number of heads."),
        (
            _softmax(scores / 4, axis=1) @ v,
            "its softmax goes over the queries: the shares of each query must add up to 1.",
        ),
        (_softmax(scores / 4, axis=0) @ v, "its softmax goes over the heads, not over the tokens."),
        (np.exp(scores / 4) @ v, "its shares don't add up to 1: divide by their sum."),
        (_softmax(scores / 4), "it returns the shares: multiply them by v."),
        (scores / 4 @ v, "it has no softmax."),
    ]
    compare(answer(q, k, v), right, mistakes)
    with np.errstate(all="ignore"):
        large = answer(1000 * q, k, v)
    if not np.isfinite(large).all():
        raise Wrong("for large scores it is nan: subtract the largest score of each query first.")
    compare(large, _softmax(250 * scores) @ v)


def check_map_word(answer):
    shares = _softmax(3 * np.random.default_rng(9).standard_normal((2, 12, 7)))  # (N, cells, S)
    tokens, size = [2, 3], (3, 4)

    def find(heat, size=size):
        heat = np.reshape(heat, size)
        return heat / heat.max()

    both = shares[..., tokens].sum(-1)  # (N, cells)
    right = find(both.mean(0))
    mistakes = [
        (find(shares[..., 2].mean(0)), "it uses the first token only: add up all of the word's."),
        (find(shares[..., 3].mean(0)), "it uses the last token only: add up all of the word's."),
        (find(shares[..., 2:].sum(-1).mean(0)), "it adds up other tokens, too."),
        (find(both[0]), "it uses the first head only: take the mean over heads."),
        (find(both.max(0)), "it takes the maximum of the heads, not their mean."),
        (find(both.mean(0), (4, 3)), "size is (h, w), rows first."),
        (find(both.mean(0), (4, 3)).T, "the cells are in order row by row: reshape to (h, w)."),
        (both.mean(0).reshape(size), "its maximum is not 1: divide by it."),
        (both.sum(0).reshape(size), "its maximum is not 1: divide by it."),
        (
            both.mean(0).reshape(size) / both.mean(0).sum(),
            "it is divided by its sum; divide by its maximum.",
        ),
        (right.ravel(), "its shape is that of a list of cells: reshape to (h, w)."),
    ]
    compare(answer(shares.copy(), tokens, size), right, mistakes)


def check_weigh_word(answer):
    shares = _softmax(np.random.default_rng(10).standard_normal((2, 3, 12, 7)))
    tokens = [2, 3]
    for factor in (4.0, 0.0):
        weighed = shares.copy()
        weighed[..., tokens] *= factor
        right = weighed / weighed.sum(-1, keepdims=True)
        others = shares.copy()
        keep = [n for n in range(7) if n not in tokens]
        others[..., keep] *= factor
        given, columns = shares.copy(), np.maximum(weighed.sum(-2, keepdims=True), 1e-30)
        mistakes = [
            (weighed, "the shares don't add up to 1 any more: divide them by their sum."),
            (others / others.sum(-1, keepdims=True), "it weighs all tokens but the word's."),
            (
                weighed / weighed.sum(),
                "it is divided by the sum of everything; each cell has its own.",
            ),
            (_softmax(weighed), "it takes softmax again: they are shares already, only divide."),
            (
                weighed / columns,
                "it divides by sums over cells: the shares of one cell must add up to 1.",
            ),
            (shares, "nothing has changed."),
        ]
        compare(answer(given, tokens, factor), right, mistakes)
        if not np.array_equal(given, shares):
            raise Wrong("it changes its argument in place; work on a copy.")


def _attend(scale=lambda q, k: q.shape[-1] ** -0.5, axis=-1):
    def answer(q, k, v):
        return _softmax(q @ np.swapaxes(k, -1, -2) * scale(q, k), axis) @ v

    return answer


def _attend_unsafely(q, k, v):
    shares = np.exp(q @ np.swapaxes(k, -1, -2) / 4)
    return shares / shares.sum(-1, keepdims=True) @ v


def _weigh(divide=None, copy=True):
    def answer(shares, tokens, factor):
        weighed = shares.copy() if copy else shares
        weighed[..., tokens] *= factor
        return weighed / (weighed.sum(divide, keepdims=True) if divide else 1)

    return answer


def _map(head=None, first=False, swap=False, divide=np.max):
    def answer(shares, tokens, size):
        heat = shares[..., tokens[:1] if first else tokens].sum(-1)
        heat = heat.mean(0) if head is None else heat[head]
        heat = heat.reshape(size[::-1] if swap else size)
        return heat / divide(heat)

    return answer


WRONG = {
    "attend_by_hand": [
        (_attend(lambda q, k: 1), "not divided by √d"),
        (_attend(lambda q, k: 1 / q.shape[-1]), "divide by its root"),
        (_attend(lambda q, k: k.shape[1] ** -0.5), "not the number of tokens"),
        (_attend(axis=1), "goes over the queries"),
        (lambda q, k, v: _softmax(q @ np.swapaxes(k, -1, -2) / 4), "multiply them by v"),
        (_attend_unsafely, "subtract the largest score"),
        (lambda q, k, v: q @ k @ v, "it ended with ValueError"),
    ],
    "map_word": [
        (_map(first=True), "the first token only"),
        (_map(head=0), "the first head only"),
        (_map(swap=True), "size is (h, w)"),
        (_map(divide=np.sum), "divided by its sum"),
        (_map(divide=lambda heat: 1), "its maximum is not 1"),
    ],
    "weigh_word": [
        (_weigh(), "don't add up to 1"),
        (_weigh(-2), "sums over cells"),
        (_weigh((0, 1, 2, 3)), "sum of everything"),
        (_weigh(-1, copy=False), "in place"),
        (lambda shares, tokens, factor: shares, "nothing has changed"),
    ],
}
