"""Compares what an answer returns with what it should, and names mistakes that people make."""

import numpy as np
from lesson import Wrong


def compare(found, expected, mistakes=(), tolerance=1e-5):
    """Raises `Wrong` unless two arrays are equal.

    Args:
        found: what the answer returned.
        expected: array or number.
        mistakes: list of pairs: what a mistake returns, and what to say of it.
        tolerance: largest difference, relative to the largest value that is expected.
    """
    if found is None:
        raise Wrong("it returns None; is there a return?")
    expected = np.asarray(expected, "float64")
    try:
        found = np.asarray(found, "float64")
    except (TypeError, ValueError) as error:
        raise Wrong(f"it returns {type(found).__name__}, not an array of numbers.") from error
    bound = tolerance * max(np.abs(expected).max(), 1e-9)
    for wrong, why in mistakes:
        wrong = np.asarray(wrong, "float64")
        if wrong.shape == found.shape and np.allclose(found, wrong, 0, bound, equal_nan=True):
            raise Wrong(why)
    if found.shape != expected.shape:
        raise Wrong(f"its shape is {found.shape}, not {expected.shape}.")
    if not np.isfinite(found).all():
        raise Wrong("some of its values are not finite: nan or inf.")
    apart = np.abs(found - expected)
    if apart.max() > bound:
        place = np.unravel_index(apart.argmax(), apart.shape)
        where = f" at {list(map(int, place))}" if place else ""
        raise Wrong(f"it is {found[place]:.6g}{where}, not {expected[place]:.6g}.")
