"""Noise to start from, and noise that stochastic samplers add: from one seed, or one an image.

Three generators give it. `NOISE_SOURCES` names them: Keras', whose numbers are KerasCV's, and those
of PyTorch on a CPU and on a GPU, whose images other programs make from the same seed.
"""

import math

import numpy as np
from keras import ops, random

from stable_diffusion.checks import check_int

MOST_SEED = 2**32 - 1  # Keras takes a seed as an unsigned 32-bit integer


def make_noise_source(shape, batch_size, seed=None, noise_source="keras"):
    """Returns a function that draws normal noise: the first call is what sampling starts from.

    Args:
        shape: of the noise of one image, `(h, w, C)`.
        batch_size: B, number of images.
        seed: int of any type, or a list with one for each image, so that an image is the same in
            any batch; None for noise that differs each time. An int means KerasCV's noise of a
            whole batch with Keras, and seed + i for image i with the other generators.
        noise_source: "keras", whose numbers differ between backends; "torch", PyTorch's generator
            on a CPU, as diffusers draws; "philox", that on a GPU, as the web interface draws.

    Returns:
        Function without arguments that returns a float32 array `(B, *shape)`. Each image goes on
        with its own generator.

    Raises:
        ValueError: another generator, no int from 0 to 2³² - 1, or another number of them.
    """
    if noise_source not in tuple(NOISE_SOURCES):
        known = ", ".join(NOISE_SOURCES)
        raise ValueError(f"noise_source must be one of {known}, not {noise_source!r:.200}.")
    if seed is None:
        seeds = [None]
    elif np.ndim(seed) == 0:
        seeds = [check_int("seed", seed, 0, MOST_SEED)]
    else:
        seeds = [check_int("seed", one, 0, MOST_SEED) for one in seed]
        if len(seeds) != batch_size:
            raise ValueError(f"{batch_size} images need {batch_size} seeds, not {len(seeds)}.")
    if noise_source != "keras" and np.ndim(seed) == 0:
        first = np.random.randint(MOST_SEED, dtype="int64") if seed is None else seeds[0]
        seeds = [(int(first) + i) % (MOST_SEED + 1) for i in range(batch_size)]
    shape = (batch_size // len(seeds), *shape)  # of what one generator draws
    generators = [NOISE_SOURCES[noise_source](seed) for seed in seeds]
    return lambda: np.concatenate([generator.draw(shape) for generator in generators])


class KerasNoise:
    """Keras' generator: the first draw equals `random.normal(..., seed=seed)`, as in KerasCV."""

    def __init__(self, seed):
        self.generator = random.SeedGenerator(seed)

    def draw(self, shape):
        """Returns the next noise: a float32 array `(B, h, w, C)`."""
        return ops.convert_to_numpy(random.normal(shape, seed=self.generator))


class TorchNoise:
    """PyTorch's generator on a CPU: `torch.randn(B, C, h, w, generator=...)`, channels put last.

    Its random bits are those of the Mersenne Twister MT19937, which NumPy has too. They become
    normal in pairs (Box and Muller 1958, https://doi.org/10.1214/aoms/1177706645): of 16 values or
    more in float32, the first 8 of 16 with the last 8; of fewer, one with the next in float64.

    Reference: https://github.com/pytorch/pytorch, aten/src/ATen/native/cpu/DistributionTemplates.h,
    `normal_fill`, and aten/src/ATen/core/DistributionsHelper.h, `normal_distribution`.
    """

    def __init__(self, seed):
        self.twister = np.random.RandomState(seed)
        self.kept = []  # the second of a pair, for the next draw of less than 16 values

    def draw(self, shape):
        """Returns the next noise: a float32 array `(B, h, w, C)`."""
        size = math.prod(shape)
        values = self._draw_few(size) if size < 16 else self._draw_many(size)
        return put_channels_last(values, shape)

    def _draw_few(self, size):
        missing = -(-(size - len(self.kept)) // 2)  # pairs
        high, low = self._draw_bits(4 * missing).astype("uint64").reshape(-1, 2).T
        numbers = ((high << np.uint64(32) | low) % np.uint64(2**53) * 2.0**-53).reshape(-1, 2)
        radius, angle = np.sqrt(-2 * np.log1p(-numbers[:, 1])), 2 * np.pi * numbers[:, 0]
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
        values = [*self.kept, *pairs.ravel()]
        self.kept = values[size:]
        return np.array(values[:size])

    def _draw_many(self, size):
        values = self._draw_uniform(size)
        whole = size - size % 16
        values[:whole] = pair_sixteens(values[:whole])
        if whole < size:  # the last 16 are drawn anew, and replace values that are there already
            values[-16:] = pair_sixteens(self._draw_uniform(16))
        return values

    def _draw_uniform(self, size):
        return (self._draw_bits(size) % np.uint32(2**24)).astype("float32") * np.float32(2**-24)

    def _draw_bits(self, size):
        return self.twister.randint(0, 2**32, size, "uint32")


def pair_sixteens(numbers):
    """Returns uniform float32 numbers in [0, 1) as normal ones, 16 at a time."""
    first, second = np.split(numbers.reshape(-1, 16), 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * np.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


class PhiloxNoise:
    """PyTorch's generator on a GPU, as the web interface computes it: Philox 4x32-10.

    Value i of draw n is made of the counter (n, 0, i, 0) only, with the seed as the key. So a draw
    of a batch is not that of its images one after the other: each image needs its own generator.

    Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
    https://doi.org/10.1145/2063384.2063405; AUTOMATIC1111's web interface, modules/rng_philox.py,
    for the counter and for what of its four words is used.
    """

    def __init__(self, seed):
        self.seed, self.draws = seed, 0

    def draw(self, shape):
        """Returns the next noise: a float32 array `(B, h, w, C)`."""
        size = math.prod(shape)
        counter = np.zeros((4, size), "uint64")
        counter[0], counter[2] = self.draws, np.arange(size)
        self.draws += 1
        first, second = compute_philox(counter, [self.seed, 0])[:2]
        turn = float(np.float32(2 * np.pi * 2**-32))  # a float32 on the GPU
        radius = np.sqrt(-2 * np.log((first + 0.5) * 2.0**-32))  # 0.5: the logarithm of 0 is none
        return put_channels_last(radius * np.sin((second + 0.5) * turn), shape)


def compute_philox(counter, key):
    """Returns random 32-bit words by Philox 4x32-10, see `PhiloxNoise`.

    Args:
        counter: four words, uint64 `(4, any)`.
        key: two words of the key.

    Returns:
        uint64 array of the counter's shape.
    """
    low = np.uint64(2**32 - 1)
    multipliers = np.array([[0xD2511F53], [0xCD9E8D57]], "uint64")
    steps = np.array([[0x9E3779B9], [0xBB67AE85]], "uint64")  # golden ratio, square root of 3
    key = np.reshape(np.array(key, "uint64"), (2, 1))
    even, odd = counter[::2], counter[1::2]
    for _ in range(10):
        products = even * multipliers
        even, odd = (products >> np.uint64(32))[::-1] ^ odd ^ key, (products & low)[::-1]
        key = (key + steps) & low
    return np.stack([even[0], odd[0], even[1], odd[1]])


def put_channels_last(values, shape):
    """Returns values that were drawn channel by channel as a float32 array `(B, h, w, C)`."""
    batch, *cells, channels = shape
    values = np.reshape(values, (batch, channels, *cells)).astype("float32")
    return np.moveaxis(values, 1, -1)


NOISE_SOURCES = {"keras": KerasNoise, "torch": TorchNoise, "philox": PhiloxNoise}
