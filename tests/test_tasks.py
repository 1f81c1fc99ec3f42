"""Image to image and inpainting: what the pipeline makes of an image and a mask."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers import FEW
from keras import backend, random
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.checks import find_first_step
from stable_diffusion.config import SamplerConfig
from stable_diffusion.noise_scheduler import diffuse

JIT = backend.backend() == "jax"
OPTIONS = {"num_steps": 5, "unconditional_guidance_scale": 3.0, "seed": 0, "verbose": 0}
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")
MASK = np.ones((64, 64), bool)
MASK[16:48, 8:40] = False


@pytest.fixture(scope="module")
def model(few_pipeline):
    return few_pipeline


@pytest.fixture
def steps(monkeypatch, model):
    """A list of what every step yields."""
    seen, generate = [], model.generate_latents

    def noted(*args, **options):
        for step in generate(*args, **options):
            seen.append(step)
            yield step

    monkeypatch.setattr(model, "generate_latents", noted)
    return seen


def test_an_image_is_its_mean_in_the_latent_space(model):
    """The first half of the moments, scaled: nothing is drawn."""
    from stable_diffusion.image_encoder import encode_moments

    latent = model.encode_images(PIXELS[None])
    moments = encode_moments(model.image_encoder, PIXELS[None] / np.float32(127.5) - 1)
    expected = np.asarray(moments)[..., :4] * FEW.vae.scaling_factor
    np.testing.assert_allclose(latent, expected, rtol=1e-5, atol=1e-6)
    assert np.asarray(latent).shape == (1, 8, 8, 4)


def test_each_image_is_encoded_by_itself(model, monkeypatch):
    """Rounding may differ in a batch, and an image's result would depend on the others'."""
    shapes, encode = [], model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda x: shapes.append(x.shape) or encode(x))
    model.image_to_image(["a", "b"], [PIXELS, PIXELS[::-1]], **OPTIONS)
    assert shapes == [(1, 64, 64, 3)] * 2


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m"])
def test_image_to_image_takes_the_last_steps(model, steps, sampler):
    images = model.image_to_image("a", PIXELS, strength=0.6, sampler=sampler, **OPTIONS)
    assert images.shape == (1, 64, 64, 3) and images.dtype == np.uint8
    assert [step for step, *_ in steps] == [2, 3, 4]
    again = model.image_to_image("a", PIXELS, strength=0.6, sampler=sampler, **OPTIONS)
    np.testing.assert_array_equal(images, again)


def test_it_starts_from_the_noised_image(model):
    """The same as `latent` and `first_step` of `generate_latents`."""
    noise = np.random.default_rng(1).standard_normal((8, 8, 4)).astype("float32")
    options = {**OPTIONS, "seed": None, "diffusion_noise": noise}
    images = model.image_to_image("a", PIXELS, strength=0.6, **options)
    start = diffuse(model.encode_images(PIXELS[None]), noise, FEW.schedule.levels(5)[2].alpha)
    expected = model.text_to_image(
        "a", **{**OPTIONS, "seed": None}, latent=np.asarray(start), first_step=2
    )
    np.testing.assert_allclose(images.astype(int), expected, atol=1)


def test_the_weaker_the_closer(model):
    """Not on an exact path, but the start is the image with less noise."""
    clean = np.asarray(model.encode_images(PIXELS[None]))
    found = []
    for strength in (0.2, 0.6, 1.0):
        taken = []
        model.image_to_image(
            "a",
            PIXELS,
            strength=strength,
            callback=lambda step, timestep, *_, taken=taken: taken.append(timestep),
            **OPTIONS,
        )
        found.append(taken)
    assert [len(taken) for taken in found] == [1, 3, 5]
    assert found[0][0] < found[1][0] < found[2][0] == 999
    assert clean.shape == (1, 8, 8, 4)


def test_several_prompts_images_and_seeds(model):
    """Each image is the same in any batch."""
    pixels, options = [PIXELS, PIXELS[::-1]], {**OPTIONS, "strength": 0.6}
    images = model.image_to_image(["a", "b"], pixels, **{**options, "seed": [3, 4]})
    for n, prompt in enumerate("ab"):
        (alone,) = model.image_to_image(prompt, pixels[n], **{**options, "seed": [3 + n]})
        np.testing.assert_allclose(images[n].astype(int), alone, atol=1)
    assert len(model.image_to_image("a", PIXELS, batch_size=2, **options)) == 2


def test_it_says_how_many_steps_it_takes(model, capsys):
    model.image_to_image("a", PIXELS, strength=0.6, **{**OPTIONS, "verbose": 1})
    assert "3 of 5 steps" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_what_is_kept_is_exact(model, steps, sampler, strength):
    options = {**OPTIONS, "strength": strength, "sampler": sampler}
    (image,) = model.inpaint("a", PIXELS, MASK, **options)
    np.testing.assert_array_equal(image[MASK], PIXELS[MASK])
    assert (image[~MASK] != PIXELS[~MASK]).any(-1).mean() > 0.9
    clean, cells = np.asarray(model.encode_images(PIXELS[None])), MASK[::8, ::8]
    np.testing.assert_array_equal(steps[-1][2][0][cells], clean[0][cells])
    assert len(steps) == (5 if strength == 1 else 3)


def test_repainting_and_batches(model):
    options = {**OPTIONS, "num_resamples": 2}
    images = model.inpaint("a", PIXELS, MASK, batch_size=2, **{**options, "seed": [1, 2]})
    assert len(images) == 2 and (images[0] != images[1]).any()
    (alone,) = model.inpaint("a", PIXELS, MASK, **{**options, "seed": [2]})
    np.testing.assert_allclose(images[1].astype(int), alone, atol=1)
    once = model.inpaint("a", PIXELS, MASK, **{**options, "num_resamples": 1})
    assert (once != model.inpaint("a", PIXELS, MASK, **options)).any()


def test_several_images_each_with_its_mask(model):
    options = {**OPTIONS, "seed": [1, 2]}
    pixels, masks = [PIXELS, PIXELS[::-1]], [MASK, MASK[:, ::-1]]
    images = model.inpaint("a", pixels, masks, batch_size=2, **options)
    for image, expected, mask in zip(images, pixels, masks, strict=True):
        np.testing.assert_array_equal(image[mask], expected[mask])


def test_crop_keeps_the_size(model):
    photo = np.random.default_rng(2).integers(0, 256, (300, 200, 3), dtype="uint8")
    mask = np.full((300, 200), 255, "uint8")
    mask[100:130, 50:90] = 0
    (image,) = model.inpaint("a", photo, Image.fromarray(mask), crop=12, **OPTIONS)
    assert image.shape == photo.shape
    np.testing.assert_array_equal(image[mask > 0], photo[mask > 0])
    assert (image[mask == 0] != photo[mask == 0]).any(-1).mean() > 0.9


# Models for inpainting


@pytest.fixture(scope="module")
def inpainter():
    config = replace(FEW, unet=replace(FEW.unet, in_channels=9))
    return StableDiffusion(jit_compile=JIT, weights=None, config=config)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_model_for_inpainting_sees_mask_and_masked_image(inpainter, monkeypatch, strength):
    """The nine channels: latent, mask, and the latent of the image with the painted part grey."""
    seen, predict = [], inpainter._predict

    def noted(unet, latent, *args):
        seen.append(latent)
        return predict(unet, latent, *args)

    monkeypatch.setattr(inpainter, "_predict", noted)
    (image,) = inpainter.inpaint("a", PIXELS, MASK, strength=strength, **OPTIONS)
    np.testing.assert_array_equal(image[MASK], PIXELS[MASK])
    grey = np.where(MASK[..., None], PIXELS, np.float32(127.5))
    hidden = np.asarray(inpainter.encode_images(grey[None]))
    assert len(seen) == (5 if strength == 1 else 3)
    for latent in seen:
        np.testing.assert_array_equal(latent[0, ..., 4], ~MASK[::8, ::8])
        np.testing.assert_array_equal(latent[0, ..., 5:], hidden[0])
    clean, alpha = np.asarray(inpainter.encode_images(PIXELS[None])), 0
    if strength < 1:
        alpha = FEW.schedule.levels(5)[2].alpha
    noise = (seen[0][:1, ..., :4] - alpha**0.5 * clean) / (1 - alpha) ** 0.5
    np.testing.assert_allclose(noise, random.normal((1, 8, 8, 4), seed=0), atol=1e-4)


def test_a_model_for_inpainting_does_not_repaint(inpainter):
    with pytest.raises(ValueError, match="num_resamples must be 1"):
        inpainter.inpaint("a", PIXELS, MASK, num_resamples=2, **OPTIONS)


def test_encoded_text_in_place_of_prompts(model):
    """Also in `text_to_image`: the command frees the text encoder before it generates."""
    texts = model.encode_text(["a", "b"])
    options = {**OPTIONS, "batch_size": 2, "seed": [0, 1, 2, 3]}
    expected = model.text_to_image(["a", "b"], **options)
    np.testing.assert_array_equal(model.text_to_image(texts, **options), expected)
    text, expected = model.encode_text("a"), model.image_to_image("a", PIXELS, **OPTIONS)
    np.testing.assert_array_equal(model.image_to_image(text, PIXELS, **OPTIONS), expected)
    np.testing.assert_array_equal(model.image_to_image(text[0], PIXELS, **OPTIONS), expected)


@pytest.mark.parametrize(
    ("channels", "task"),
    [
        (9, "inpainting, and needs an image"),
        (8, "instruct-pix2pix"),
        (5, "depth to image"),
        (7, "an"),
    ],
)
def test_models_for_other_tasks_are_refused_by_name(channels, task):
    config = replace(FEW, unet=replace(FEW.unet, in_channels=channels))
    model = StableDiffusion(jit_compile=False, weights=None, config=config)
    message = f"has {channels} channels of input, not 4: it is made for {task}"
    with pytest.raises(ValueError, match=message):
        model.text_to_image("a", **OPTIONS)
    with pytest.raises(ValueError, match=message):
        model.image_to_image("a", PIXELS, **OPTIONS)
    if channels != 9:
        with pytest.raises(ValueError, match=f"not 9: it is made for {task}"):
            model.inpaint("a", PIXELS, MASK, **OPTIONS)
    assert model._diffusion_model is None and model._image_encoder is None


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "strength must be at least 0.2 with 5 steps, not 0"),
        ({"strength": 0.19}, "strength must be at least 0.2 with 5 steps, not 0.19"),
        ({"strength": 0.3, "num_steps": 3}, "at least 0.333334 with 3 steps, not 0.3"),
        ({"strength": np.nan}, "strength must be a number from 0 to 1, not nan"),
        ({"strength": 1.1}, "strength must be a number from 0 to 1, not 1.1"),
        ({"image": np.zeros((1, 1, 3), "uint8")}, "1 x 1 pixels"),
        ({"image": [PIXELS] * 3}, "image must have 1 or batch_size=1 entries, not 3"),
        ({"num_steps": 1001, "strength": 1.0}, "num_steps must be an int from 1 to 1000"),
        ({"sampler": "dimm"}, "sampler must be one of"),
        ({"prompt": "a " * 90}, "at most 77 tokens"),
        ({"latent": np.zeros((8, 8, 4))}, "Pass an image or latent, not both"),
    ],
)
def test_bad_input_is_refused_before_the_work(options, message):
    model = StableDiffusion(jit_compile=False, weights=None, config=FEW)
    arguments = {"prompt": "a", "image": PIXELS, **OPTIONS, **options}
    with pytest.raises(ValueError, match=message):
        model.image_to_image(**arguments)
    with pytest.raises(ValueError, match=message):
        model.inpaint(mask=MASK, **arguments)
    assert model._diffusion_model is None and model._image_encoder is None


def test_the_least_strength_that_is_named_is_enough():
    for num_steps in range(1, 200):
        with pytest.raises(ValueError) as error:
            find_first_step(num_steps, 0)
        least = float(str(error.value).split()[5])
        assert find_first_step(num_steps, least) == num_steps - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": MASK[:32]}, "needs the aspect of its image"),
        ({"num_resamples": 0}, "num_resamples must be an int from 1"),
        ({"crop": -1}, "crop must be an int from 0"),
    ],
)
def test_bad_masks_are_refused_before_the_work(options, message):
    model = StableDiffusion(jit_compile=False, weights=None, config=FEW)
    with pytest.raises(ValueError, match=message):
        model.inpaint("a", PIXELS, **{"mask": MASK, **OPTIONS, **options})
    assert model._diffusion_model is None and model._image_encoder is None


@pytest.mark.parametrize("arguments", [{"image": PIXELS}, {"image": PIXELS, "mask": MASK}])
def test_tasks_choose_samplers_as_text_to_image_does(model, monkeypatch, arguments):
    """The one that the checkpoint names, options of its own, and what PNDM has to know."""
    task = model.inpaint if "mask" in arguments else model.image_to_image
    generate = partial(task, "a", **arguments, **OPTIONS)
    named = SamplerConfig("HeunDiscreteScheduler", spacing="karras")
    monkeypatch.setattr(model, "config", replace(FEW, sampler=named))
    expected = generate(sampler="heun", spacing="karras")
    np.testing.assert_array_equal(generate(sampler="auto"), expected)
    assert (generate(eta=1) != generate()).any()
    assert generate(sampler="pndm").shape == expected.shape
    with pytest.raises(ValueError, match="sampler ddim has no option 'etta': it accepts eta"):
        generate(etta=1)
