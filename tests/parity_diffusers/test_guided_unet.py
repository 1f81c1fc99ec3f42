"""A UNet that sees the guidance scale: what is stored of diffusers is what it computes.

Tolerance: 1e-6, relative to the largest value; PyTorch may sum in another order elsewhere.
"""

import numpy as np
import pytest
from helpers import DATA

REASON = "needs pip install torch diffusers transformers accelerate"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)
import make_guided_golden as theirs  # noqa: E402  needs the above

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # of these libraries, about each other
]


def test_what_is_stored():
    with np.load(DATA / "guided_golden.npz") as file:
        stored = dict(file)
    made = theirs.make()
    assert made.keys() == stored.keys()
    for name, expected in made.items():
        largest = np.abs(expected).max()
        np.testing.assert_allclose(stored[name], expected, atol=1e-6 * largest, rtol=0)
