"""Helpers that several test files use; they live in `scripts/compare_keras_cv.py`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import compare_keras_cv  # noqa: E402


@pytest.fixture(scope="session")
def randomize():
    """`randomize(model_or_layer, rng)`: random biases, gammas and betas too, activations near 1."""
    return compare_keras_cv.randomize


@pytest.fixture(scope="session")
def relative_error():
    """`relative_error(a, b)`: max|a - b| / max|b|, where b is the reference."""
    return compare_keras_cv.relative_error
