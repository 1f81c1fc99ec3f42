"""Generators of noise: PyTorch's on a CPU within 1e-6 of stored values, and Philox."""

import math
import time

import keras
import numpy as np
import pytest

from stable_diffusion import StableDiffusion
from stable_diffusion.config import TINY
from stable_diffusion.noise import NOISE_SOURCES, TorchNoise, compute_philox, make_noise_source
from stable_diffusion.samplers.sampler import Sampler

TOLERANCE = 1e-6
OWN = ["torch", "philox"]  # the sources that are computed here


@pytest.fixture(scope="module")
def golden():
    from helpers import DATA

    with np.load(DATA / "noise_golden.npz") as file:
        return dict(file)


def draw_first(noise, shape):
    """Returns values of `(C, h, w)` in their order, as the golden file has them."""
    values = np.moveaxis(noise, -1, -3).ravel()
    assert noise.dtype == np.float32 and values.size == math.prod(shape)
    return values


def keep_some(values, every):
    return values if len(values) <= 64 else values[::every]


def last(channels, h, w):
    return h, w, channels


@pytest.mark.quick
def test_the_first_draw_is_pytorchs(golden):
    """Of shapes of less than 16 values, of multiples of 16, and of others."""
    sizes = {math.prod(shape) for shape in golden["shapes"]}
    assert min(sizes) < 16 and {size % 16 == 0 for size in sizes if size >= 16} == {True, False}
    assert len(golden["seeds"]) == 20
    for seed, expected in zip(golden["seeds"], golden["first"], strict=True):
        found = []
        for shape in golden["shapes"]:
            noise = make_noise_source(last(*shape), 1, seed, "torch")()
            assert noise.shape == (1, *last(*shape))
            found.append(keep_some(draw_first(noise, shape), golden["every"]))
        np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=TOLERANCE)


def test_a_generator_goes_on_as_pytorchs(golden):
    """Also where draws of less than 16 values, which come in pairs, follow others."""
    for seed, expected in zip(golden["seeds"], golden["successive"], strict=True):
        generator, found = TorchNoise(int(seed)), []
        for shape in golden["draws"]:
            noise = generator.draw((1, *last(*shape)))
            found.append(keep_some(draw_first(noise, shape), golden["every"]))
        np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.torch
def test_many_seeds_and_sizes_with_pytorch():
    torch = pytest.importorskip("torch")
    for seed in range(200):
        for shape in ((1, 1, 1 + seed % 70, 1), (1, 4, 64, 64)):
            expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
            found = TorchNoise(seed).draw((1, *last(*shape[1:])))
            expected = np.moveaxis(expected, 1, -1)
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_has_its_authors_numbers(counter, key, expected):
    """The known answers of Random123 (tests/kat_vectors, philox4x32 10)."""
    words = compute_philox(np.array(counter, "uint64")[:, None], key)
    np.testing.assert_array_equal(words[:, 0], expected)


@pytest.mark.quick
def test_philox_draws_what_the_web_interface_published():
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    noise = make_noise_source((3, 4, 1), 1, 0, "philox")()
    np.testing.assert_allclose(noise[0, ..., 0], expected, rtol=0, atol=TOLERANCE)
    channels_first = make_noise_source((2, 2, 3), 1, 0, "philox")()
    np.testing.assert_array_equal(draw_first(channels_first, (3, 2, 2)), noise.ravel())


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_each_draw_of_philox_has_a_number(seed):
    """Value i of draw n is the first normal of the counter (n, 0, i, 0), by the plain formula."""
    source, turn = make_noise_source((2, 3, 4), 1, seed, "philox"), np.float32(2 * np.pi * 2**-32)
    for number in range(3):
        expected = []
        for index in range(24):
            x, y, *_ = philox([number, 0, index, 0], [seed, 0])
            radius = math.sqrt(-2 * math.log(x / 2**32 + 2**-33))
            expected.append(radius * math.sin(y * float(turn) + float(turn) / 2))
        found = draw_first(source(), (4, 2, 3))
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def philox(counter, key):
    """Philox 4x32-10 as figure 2 of Salmon et al. draws it, a word at a time."""
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize("kind", OWN)
def test_an_int_seed_is_one_more_for_each_image(kind):
    shape = (4, 5, 3)
    batch = make_noise_source(shape, 3, 7, kind)
    listed = make_noise_source(shape, 3, [7, 8, 9], kind)
    alone = [make_noise_source(shape, 1, seed, kind) for seed in (7, 8, 9)]
    for _ in range(3):
        noise = batch()
        np.testing.assert_array_equal(noise, listed())
        np.testing.assert_array_equal(noise, np.concatenate([source() for source in alone]))
    greatest = make_noise_source(shape, 2, 2**32 - 1, kind)()
    np.testing.assert_array_equal(greatest[1], make_noise_source(shape, 1, 0, kind)()[0])


def test_an_int_seed_of_keras_is_kerascvs():
    for seed in (0, 5):
        draws = make_noise_source((4, 5, 3), 2, seed)
        expected = keras.random.normal((2, 4, 5, 3), seed=seed)
        np.testing.assert_array_equal(draws(), keras.ops.convert_to_numpy(expected))


@pytest.mark.parametrize("kind", OWN)
def test_without_a_seed_noise_differs_unless_keras_was_told_one(kind):
    draw = make_noise_source((4, 4, 4), 2, None, kind)
    first = draw()
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first, draw())
    assert not np.array_equal(first, make_noise_source((4, 4, 4), 2, None, kind)())
    noise = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        noise.append(make_noise_source((4, 4, 4), 2, None, kind)())
    np.testing.assert_array_equal(*noise)


@pytest.mark.parametrize("kind", OWN)
def test_noise_is_normal(kind):
    noise = make_noise_source((64, 64, 4), 1, 1, kind)()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert 3.5 < np.abs(noise).max() < 5.5
    began = time.perf_counter()
    for seed in range(5):
        make_noise_source((64, 64, 4), 1, seed, kind)()
    assert time.perf_counter() - began < 2, "milliseconds each are seen"


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return tiny_pipeline


@pytest.mark.parametrize("kind", NOISE_SOURCES)
def test_the_pipeline_starts_and_goes_on_with_it(model, kind):
    """Stochastic samplers draw from the same generators."""

    def noisy(denoise, latent, levels, next_noise):
        for timestep, _ in levels[:-1]:
            latent = latent + next_noise()
            yield timestep, latent, latent

    context, options = (
        np.zeros((77, TINY.text.width)),
        {"num_steps": 3, "sampler": Sampler(sample=noisy)},
    )
    for seed in (5, [5, 9]):
        *_, (_, _, latent, _) = model.generate_latents(
            context, batch_size=2, seed=seed, noise_source=kind, **options
        )
        draws = make_noise_source((8, 8, 4), 2, seed, kind)
        np.testing.assert_allclose(latent, sum(draws() for _ in range(4)), atol=1e-6)


@pytest.mark.parametrize("kind", OWN)
def test_images_of_a_batch_are_those_of_their_seeds(model, kind):
    options = {"num_steps": 2, "verbose": 0, "noise_source": kind}
    images = model.text_to_image("a red apple", batch_size=2, seed=3, **options)
    for image, seed in zip(images, (3, 4), strict=True):
        alone = model.text_to_image("a red apple", seed=seed, **options)
        assert np.abs(image.astype(int) - alone[0]).max() <= 1
    other = model.text_to_image("a red apple", seed=3, num_steps=2, verbose=0)
    assert np.abs(images[0].astype(int) - other[0]).max() > 2


@pytest.mark.parametrize("kind", ["cuda", "Torch", None, 3, ["torch"]])
def test_an_unknown_source_is_refused_before_anything_is_built(kind):
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    with pytest.raises(ValueError, match="noise_source must be one of keras, torch, philox, not "):
        model.text_to_image("a", num_steps=2, noise_source=kind)
    assert not model._text_encoder and not model._diffusion_model


def test_seeds_are_checked_alike():
    for kind in NOISE_SOURCES:
        for seed in (-1, 2**32, "1", 1.5, [1, -1]):
            with pytest.raises(ValueError, match="seed must be an int from 0 to 4294967295"):
                make_noise_source((2, 2, 4), 2, seed, kind)
        with pytest.raises(ValueError, match="2 images need 2 seeds, not 3"):
            make_noise_source((2, 2, 4), 2, [1, 2, 3], kind)
