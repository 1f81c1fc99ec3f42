"""The kinds of LoRA: which matrices a file has for a parameter W, and what they add to it.

    kind    tensors                             what they add
    LoRA    up, down                            s up down
    LoHa    w1_a, w1_b, w2_a, w2_b              s (w1_a w1_b) ∘ (w2_a w2_b), element by element
    LoKr    w1 or w1_a, w1_b; w2 or w2_a, w2_b  s w1 ⊗ w2, Kronecker's product; w1 is w1_a w1_b
    full    diff                                diff

s is alpha / r. The rank r is the number of columns of `up`, w1_a or w2_a; s is 1 if there are none.
Matrices are as PyTorch has them, (out, in). If W is a convolution, `in` also counts the places of
its window, so a kernel (out, in, h, w) is one matrix.

DoRA is one of these with one more tensor: the lengths that the rows or columns of the sum get.

References:
    Hu et al. 2021, https://arxiv.org/abs/2106.09685: LoRA.
    Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098, section 2.2: LoHa.
    Yeh et al. 2023, https://arxiv.org/abs/2309.14859, section 3: LoKr, and a survey of the others.
    Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5: DoRA.
    https://github.com/KohakuBlueleaf/LyCORIS/tree/main/lycoris/modules: the tensors and shapes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TINY = np.finfo("float32").eps  # so that a row of zeros is not divided by zero


class LoraKind(NamedTuple):
    """One kind of LoRA.

    Attributes:
        parts: sets of tensors. A file has one of these sets for a parameter.
        expect: function from the shape of W, as PyTorch has it, a dict of the tensors' shapes, and
            the rank if it is known, to the rank and a dict of the shapes that fit W. The rank is
            None for a kind that has none.
        multiply: function from a dict of the tensors, float32, to what they add if s is 1. It has
            the size of W.
    """

    parts: tuple[set[str], ...]
    expect: Callable
    multiply: Callable


def _expect_lora(shape, given, rank):
    rank = rank or _read_size(given["up"], 1)
    return rank, {"down": (rank, *shape[1:]), "up": (shape[0], rank)}


def _multiply_lora(t):
    # ΔW = B A, `up` times `down` (Hu et al., equation 3)
    return t["up"].reshape(len(t["up"]), -1) @ t["down"].reshape(len(t["down"]), -1)


def _expect_loha(shape, given, rank):
    fitting = {}
    for w in ("hada_w1", "hada_w2"):
        rank = rank or _read_size(given[f"{w}_b"], 0)
        fitting |= {f"{w}_a": (shape[0], rank), f"{w}_b": (rank, math.prod(shape[1:]))}
    return rank, fitting


def _multiply_loha(t):
    # ΔW = (A1 B1) ∘ (A2 B2) (Hyeon-Woo et al., section 2.2)
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def _expect_lokr(shape, given, rank):
    rank, w1, w2 = None, "lokr_w1", "lokr_w2"
    if w1 in given:
        rows, columns = _read_size(given[w1], 0), _read_size(given[w1], 1)
        fitting = {w1: (rows, columns)}
    else:
        rank = _read_size(given[f"{w1}_b"], 0)
        rows, columns = _read_size(given[f"{w1}_a"], 0), _read_size(given[f"{w1}_b"], 1)
        fitting = {f"{w1}_a": (rows, rank), f"{w1}_b": (rank, columns)}
    # w2 has the rest of both axes, and the window. If w1 does not divide W, no size of w2 fits.
    outputs = shape[0] // rows if rows and shape[0] % rows == 0 else 0
    inputs = shape[1] // columns if columns and shape[1] % columns == 0 else 0
    if w2 in given:
        return rank, fitting | {w2: (outputs, inputs, *shape[2:])}
    rank = _read_size(given[f"{w2}_b"], 0)
    inputs *= math.prod(shape[2:])
    return rank, fitting | {f"{w2}_a": (outputs, rank), f"{w2}_b": (rank, inputs)}


def _multiply_lokr(t):
    w1, w2 = (t[w] if w in t else t[f"{w}_a"] @ t[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
    # ΔW = W1 ⊗ W2 (Yeh et al., section 3)
    return np.kron(w1, w2.reshape(len(w2), -1))


LORA_KINDS = {
    "LoRA": LoraKind(({"up", "down"},), _expect_lora, _multiply_lora),
    "LoHa": LoraKind(
        ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},), _expect_loha, _multiply_loha
    ),
    "LoKr": LoraKind(
        tuple(
            one | two
            for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
            for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
        ),
        _expect_lokr,
        _multiply_lokr,
    ),
    "full": LoraKind(
        ({"diff"},), lambda shape, given, rank: (None, {"diff": shape}), lambda t: t["diff"]
    ),
}


def find_lora_kind(parts: set[str]) -> LoraKind | None:
    """Returns the kind that has exactly these tensors for a parameter, None if there is none."""
    return next((kind for kind in LORA_KINDS.values() if parts in kind.parts), None)


def find_length_shape(part: str, shape: tuple, given: tuple) -> tuple | None:
    """Returns DoRA's lengths' shape beside a parameter W: `(out, 1, ...)` or `(1, in, ...)`.

    Args:
        part: "dora_scale", which LyCORIS, kohya's programs and OneTrainer write, of the rows or of
            the columns; or "magnitude", peft's, always of the rows, as (out) or (1, out, 1, 1).
        shape: the shape of W as PyTorch has it.
        given: the shape of the lengths in the file.

    Returns:
        The shape; None if the lengths do not fit.
    """
    rows = (shape[0], *[1] * (len(shape) - 1))
    columns = (1, *shape[1:2], *[1] * (len(shape) - 2))
    if part == "magnitude":
        return rows if given in ((shape[0],), (1, *rows[:-1]), rows) else None
    padded = (*given, 1, 1, 1)[: max(len(shape), len(given))]
    return padded if padded in (rows, columns) else None


def scale_to_lengths(weight: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns a weight whose rows, or columns, have other lengths: DoRA's second step.

    Args:
        weight: W with what the kind adds, float32 `(out, in)` or `(out, in, h, w)`.
        lengths: float32 `(out, 1, ...)` or `(1, in, ...)`.
    """
    axes = tuple(axis for axis in range(weight.ndim) if lengths.shape[axis] == 1)
    # m (W + ΔW) / ‖W + ΔW‖, the norms of rows or columns (Liu et al., equation 5)
    return weight * (lengths / (np.sqrt(np.square(weight).sum(axes, keepdims=True)) + TINY))


def _read_size(shape, axis):
    """Returns a size of a tensor; 0, which never fits, if it has no such axis."""
    return shape[axis] if axis < len(shape) else 0
