"""The public loop: what it yields, how a caller steers it, and where it may begin."""

from dataclasses import replace

import numpy as np
import pytest
from keras import backend, random

from stable_diffusion import StableDiffusion
from stable_diffusion.config import SD1, TINY
from stable_diffusion.noise import make_noise_source
from stable_diffusion.noise_scheduler import Sampler

JIT = backend.backend() == "jax"
STEPS = 4
OPTIONS = {"num_steps": STEPS, "unconditional_guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(jit_compile=JIT, weights=None, config=TINY)


@pytest.fixture(scope="module")
def context(model):
    return model.encode_text("a red apple")


def generate(model, context, **options):
    return list(model.generate_latents(context, **OPTIONS | {"seed": 0} | options))


def test_generate_image_is_these_steps_decoded(model, context):
    steps, seen = generate(model, context), []
    options = OPTIONS | {"seed": 0, "verbose": 0}
    images = model.generate_image(context, callback=lambda *step: seen.append(step), **options)
    np.testing.assert_array_equal(images, model.decode_latents(steps[-1][2]))
    assert len(seen) == len(steps) == STEPS
    for (step, timestep, *arrays), (other_step, other_timestep, *others) in zip(
        steps, seen, strict=True
    ):
        assert (step, timestep) == (other_step, other_timestep)
        for array, other in zip(arrays, others, strict=True):
            np.testing.assert_array_equal(array, other)


def test_the_latent_is_x0_and_noise(model, context):
    """With DDIM the latent after a step is x0 and the predicted noise at the next level."""
    levels = TINY.schedule.levels(STEPS)
    before = np.asarray(random.normal((1, 8, 8, 4), seed=0))
    for (_, _, latent, x0), (_, alpha), (_, alpha_next) in zip(
        generate(model, context), levels, levels[1:], strict=False
    ):
        noise = (before - alpha**0.5 * x0) / (1 - alpha) ** 0.5
        expected = alpha_next**0.5 * x0 + (1 - alpha_next) ** 0.5 * noise
        np.testing.assert_allclose(latent, expected, atol=2e-5 * np.abs(x0).max())
        before = latent


def test_a_caller_may_stop(model, context):
    latents = model.generate_latents(context, **OPTIONS, seed=0)
    first = next(latents)
    latents.close()
    np.testing.assert_array_equal(first[2], generate(model, context)[0][2])


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "unipc"])
def test_the_middle_goes_on_from_a_latent(model, context, sampler):
    whole = generate(model, context, sampler=sampler)
    options = {"seed": None, "latent": whole[1][2], "first_step": 2, "sampler": sampler}
    rest = generate(model, context, **options)
    assert [step[:2] for step in rest] == [step[:2] for step in whole[2:]]
    if sampler == "ddim":  # solvers begin anew, without their memory
        np.testing.assert_array_equal(rest[-1][2], whole[-1][2])


def test_a_sent_latent_replaces_the_latent(model, context):
    whole = generate(model, context)
    latents = model.generate_latents(context, **OPTIONS, seed=1)
    next(latents)
    sent = latents.send(whole[0][2])
    np.testing.assert_array_equal(sent[2], whole[1][2])
    rest = list(latents)
    np.testing.assert_array_equal(rest[-1][2], whole[-1][2])
    assert [step for step, *_ in rest] == [2, 3]


def test_guidance_is_the_checkpoints_own(model, context):
    strong = StableDiffusion(
        jit_compile=JIT, weights=None, config=replace(TINY, guidance_scale=3.0)
    )
    strong._diffusion_model, strong._text_encoder = model.diffusion_model, model.text_encoder
    options = {"unconditional_guidance_scale": None}
    np.testing.assert_array_equal(
        generate(strong, context, **options)[-1][2], generate(model, context)[-1][2]
    )
    default = generate(model, context, **options)[-1][2]
    right = generate(model, context, unconditional_guidance_scale=7.5)[-1][2]
    np.testing.assert_array_equal(default, right)
    assert np.abs(default - generate(model, context)[-1][2]).max() > 1e-3
    assert SD1.guidance_scale == 7.5


def test_spacing(model, context):
    steps = generate(model, context, spacing="trailing")
    assert [timestep for _, timestep, *_ in steps] == [999, 749, 499, 249]


def test_stochastic_samplers_give_an_image_the_same_noise_in_any_batch(model, context):
    """Each image goes on with the generator of its own first noise."""

    def noisy(denoise, latent, levels, next_noise):
        for timestep, _ in levels[:-1]:
            latent = latent + next_noise()
            yield timestep, latent, latent

    options = {"sampler": Sampler(noisy), "num_steps": 3}
    both = generate(model, context, batch_size=2, seed=[5, 6], **options)[-1][2]
    for n, seed in enumerate((5, 6)):
        alone = generate(model, context, seed=[seed], **options)[-1][2]
        np.testing.assert_array_equal(alone[0], both[n])
    draws = make_noise_source((8, 8, 4), 1, 5)
    expected = sum(draws() for _ in range(4))
    alone = generate(model, context, seed=5, **options)[-1][2]
    np.testing.assert_allclose(alone, expected, atol=1e-6)


def test_noise_differs_from_draw_to_draw_and_without_a_seed():
    draws = make_noise_source((4, 4, 4), 2, 0)
    first, second = draws(), draws()
    assert first.shape == second.shape == (2, 4, 4, 4) and first.dtype == np.float32
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.3
    np.testing.assert_array_equal(make_noise_source((4, 4, 4), 2, 0)(), first)
    assert not np.array_equal(make_noise_source((4, 4, 4), 2)(), make_noise_source((4, 4, 4), 2)())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_step": 2}, "first_step 2 needs num_steps above it and a latent"),
        ({"first_step": -1}, "first_step -1 needs"),
        ({"first_step": STEPS, "latent": np.zeros((8, 8, 4))}, "first_step 4 needs"),
        ({"latent": np.zeros((3, 8, 8, 4))}, "must have 1 or batch_size=1 entries, not 3"),
        ({"num_steps": "5"}, "num_steps must be an int from 1 to 1000, not '5'"),
        ({"spacing": "karras"}, "spacing must be one of linspace, .*, not 'karras'"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"seed": [1, 2]}, "1 images need 1 seeds, not 2"),
    ],
)
def test_wrong_arguments(model, context, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, context, **options)
