"""Noise to start from, and noise that stochastic samplers add: from one seed, or one an image."""

import numpy as np
from keras import ops, random


def make_noise_source(shape, batch_size, seed=None):
    """Returns a function that draws normal noise: the first call is what sampling starts from.

    Args:
        shape: of the noise of one image.
        batch_size: B, number of images.
        seed: int, for KerasCV's noise of a whole batch; or a list with one for each image, so that
            an image is the same in any batch; None for noise that differs each time.

    Returns:
        Function without arguments that returns a float32 array `(B, *shape)`. Each image goes on
        with its own generator.

    Raises:
        ValueError: another number of seeds.
    """
    if seed is None or isinstance(seed, int | np.integer):
        seeds, count = [seed], batch_size
    else:
        seeds, count = [int(one) for one in seed], 1
        if len(seeds) != batch_size:
            raise ValueError(f"{batch_size} images need {batch_size} seeds, not {len(seeds)}.")
    # The first draw of a generator equals `random.normal(..., seed=seed)`, as KerasCV draws.
    generators = [random.SeedGenerator(seed) for seed in seeds]

    def next_noise():
        noise = [random.normal((count, *shape), seed=generator) for generator in generators]
        return np.concatenate([ops.convert_to_numpy(x) for x in noise])

    return next_noise
