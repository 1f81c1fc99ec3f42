"""Makes what tests/test_noise.py compares with: what PyTorch's generator on a CPU draws.

    pip install torch
    python tests/data/make_noise_golden.py

Shapes have less than 16 values, multiples of 16, or other numbers: PyTorch draws these in different
ways. The values go to tests/data/noise_golden.npz, of large shapes only some.
"""

from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "noise_golden.npz"
SEEDS = (*range(10), 42, 123, 1000, 77777, 2**20 + 1, 2**31 - 1, 2**31, 1234567890, 2**32 - 2)
SEEDS = (*SEEDS, 2**32 - 1)
SHAPES = (  # of an image's noise: (C, h, w)
    (1, 1, 1),
    (3, 2, 2),
    (3, 1, 5),
    (4, 2, 2),
    (2, 3, 3),
    (1, 5, 5),
    (4, 4, 4),
    (3, 7, 9),
    (4, 16, 16),
    (4, 64, 64),
)
DRAWS = ((3, 1, 1), (4, 2, 2), (1, 1, 2), (1, 5, 5), (1, 1, 1), (5, 1, 1), (4, 4, 4))
EVERY = 97  # of the values of more than 64, one in so many is kept


def draw(generator, shape):
    """Returns the values of a draw, in their order: all, or some of many."""
    values = torch.randn(shape, generator=generator).numpy().ravel()
    return values if len(values) <= 64 else values[::EVERY]


def main():
    """Writes for each seed the first draw of each shape, and successive draws of one generator."""
    first, successive = [], []
    for seed in SEEDS:
        first += [draw(torch.Generator().manual_seed(seed), shape) for shape in SHAPES]
        generator = torch.Generator().manual_seed(seed)
        successive += [draw(generator, shape) for shape in DRAWS]
    np.savez_compressed(
        FILE,
        seeds=np.array(SEEDS),
        shapes=np.array(SHAPES),
        draws=np.array(DRAWS),
        every=EVERY,
        first=np.concatenate(first).reshape(len(SEEDS), -1),
        successive=np.concatenate(successive).reshape(len(SEEDS), -1),
    )
    print(f"{len(SEEDS)} seeds in {FILE}, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
