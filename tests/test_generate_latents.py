"""The public loop: what it yields, how a caller steers it, and where it may begin."""

from dataclasses import replace

import numpy as np
import pytest
from keras import backend, random

from stable_diffusion import StableDiffusion
from stable_diffusion.config import SD1, TINY, SamplerConfig
from stable_diffusion.noise import make_noise_source
from stable_diffusion.samplers import SAMPLERS, bind_options
from stable_diffusion.samplers.sampler import Sampler

JIT = backend.backend() == "jax"
STEPS = 4
OPTIONS = {"num_steps": STEPS, "unconditional_guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return tiny_pipeline


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


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp-2m", "unipc"])
def test_the_middle_goes_on_from_a_latent(model, context, sampler):
    whole = generate(model, context, sampler=sampler)
    options = {"seed": None, "latent": whole[1][2], "first_step": 2, "sampler": sampler}
    rest = generate(model, context, **options)
    assert [step[:2] for step in rest] == [step[:2] for step in whole[2:]]
    if sampler in ("ddim", "heun"):  # solvers begin anew, without their memory
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

    options = {"sampler": Sampler(sample=noisy), "num_steps": 3}
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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_in_a_batch(model, context, sampler):
    """An image is the same in a batch, and with another seed it is another one."""
    options = {"sampler": sampler, "num_steps": 3} | ({"eta": 1} if sampler == "ddim" else {})
    both = generate(model, context, batch_size=2, seed=[5, 6], **options)
    assert [step for step, *_ in both] == [0, 1, 2]
    alone = generate(model, context, seed=[6], **options)
    assert [timestep for _, timestep, *_ in alone] == [timestep for _, timestep, *_ in both]
    largest = np.abs(alone[-1][2]).max()
    np.testing.assert_allclose(alone[-1][2][0], both[-1][2][1], atol=1e-4 * largest)
    assert np.abs(both[-1][2][0] - both[-1][2][1]).max() > 0.1 * largest
    assert both[-1][2].dtype == np.float32


def test_eta_is_passed_to_ddim(model, context):
    """Its new noise is the next of the image's own generator."""
    draws, sampler = make_noise_source((8, 8, 4), 1, 0), bind_options(SAMPLERS["ddim"], {"eta": 1})
    draws()
    (_, _, latent, x0), *_ = generate(model, context, eta=1)
    before, (here, there, *_) = (
        np.asarray(random.normal((1, 8, 8, 4), seed=0)),
        TINY.schedule.levels(STEPS),
    )
    noise = (before - here.alpha**0.5 * x0) / (1 - here.alpha) ** 0.5
    ((_, expected, _),) = sampler.sample(lambda *_: (x0, noise), before, [here, there], draws)
    np.testing.assert_allclose(latent, expected, atol=2e-5 * np.abs(x0).max())
    assert np.abs(latent - generate(model, context)[0][2]).max() > 0.1


def test_a_sampler_may_start_from_less_noise(model, context):
    """As it says, also from noise that is given; but not in the middle."""
    seen = []

    def look(denoise, latent, levels, next_noise):
        for timestep, _ in levels[:-1]:
            seen.append(latent)
            yield timestep, latent, latent

    noise = np.random.default_rng(0).standard_normal((8, 8, 4)).astype("float32")
    euler = replace(SAMPLERS["euler"], sample=look)
    alpha = TINY.schedule.levels(STEPS, None, euler)[0].alpha
    for options, factor in [
        ({"diffusion_noise": noise}, (1 - alpha) ** 0.5),
        ({"diffusion_noise": noise, "spacing": "leading"}, 1),
        ({"latent": noise, "first_step": 1}, 1),
    ]:
        seen.clear()
        generate(model, context, sampler=euler, seed=None, **options)
        np.testing.assert_allclose(seen[0][0], factor * noise, rtol=1e-6)


def test_auto_takes_the_sampler_that_the_checkpoint_names(model, context, monkeypatch):
    named = SamplerConfig("HeunDiscreteScheduler", spacing="karras")
    monkeypatch.setattr(model, "config", replace(TINY, sampler=named))
    found = generate(model, context, sampler="auto")
    expected = generate(model, context, sampler="heun", spacing="karras")
    np.testing.assert_array_equal(found[-1][2], expected[-1][2])
    timesteps = [t for _, t, *_ in generate(model, context, sampler="auto", spacing="trailing")]
    assert timesteps == [999, 749, 499, 249]
    assert [t for _, t, *_ in generate(model, context)] == [999, 666, 333, 0], "DDIM is the default"


def test_options_are_checked_before_any_work(model):
    def encode():
        raise AssertionError("this is work")

    for options in ({"etta": 1}, {"eta": -1}, {"sampler": "eular"}):
        with pytest.raises(ValueError):
            generate(model, encode, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_step": 2}, "first_step 2 needs the latent where it begins"),
        ({"first_step": -1}, "first_step must be an int from 0 to 3, not -1"),
        ({"first_step": STEPS, "latent": np.zeros((8, 8, 4))}, "first_step must be .* 3, not 4"),
        ({"first_step": "1", "latent": np.zeros((8, 8, 4))}, "first_step must be .* not '1'"),
        ({"latent": np.zeros((0, 8, 8, 4))}, "must have 1 or batch_size=1 entries, not 0"),
        ({"latent": np.zeros((3, 8, 8, 4))}, "must have 1 or batch_size=1 entries, not 3"),
        ({"num_steps": "5"}, "num_steps must be an int from 1 to 1000, not '5'"),
        ({"spacing": "karas"}, "spacing must be one of linspace, .*, karras, not 'karas'"),
        ({"spacing": "karras", "sampler": "pndm"}, "with this sampler, not 'karras'"),
        ({"sampler": "eular"}, "sampler must be one of .* Did you mean 'euler'?"),
        ({"sampler": "lcm", "num_steps": 51}, "num_steps must be an int from 1 to 50, not 51"),
        ({"etta": 0.5}, "The sampler ddim has no option 'etta': it accepts eta"),
        ({"eta": 0.5, "sampler": "heun"}, "sampler heun has no option 'eta': it accepts none"),
        ({"eta": 2}, "eta must be a number from 0 to 1, not 2"),
        ({"seed": [1, 2]}, "1 images need 1 seeds, not 2"),
    ],
)
def test_wrong_arguments(model, context, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, context, **options)
