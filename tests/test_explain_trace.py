"""Traces: everything that happened while one image was generated."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
from PIL import Image

import stable_diffusion
from stable_diffusion import SimpleTokenizer, StableDiffusion
from stable_diffusion.config import TINY
from stable_diffusion.explain import trace
from stable_diffusion.explain.boxes import find_source, list_boxes
from stable_diffusion.explain.trace import MOST_CELLS, find_stages, list_tokens
from stable_diffusion.explain.words import find_words
from stable_diffusion.noise import make_noise_source
from stable_diffusion.noise_scheduler import ddim, diffuse

ROOT = Path(stable_diffusion.__file__).parents[1]
PROMPT, NEGATIVE = "a red, RED apple", "a dog"
SCALE, STEPS = 4.0, 3
RELATIVE = 1e-5  # of arrays that float32 computes in another order


def close(found, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=RELATIVE * scale)


def levels_apart(image, other):
    return np.abs(image.astype(int) - other).max()


@pytest.fixture(scope="module")
def model(few_pipeline):
    return few_pipeline


@pytest.fixture(scope="module")
def made(model):
    """A trace, and what its progress said."""
    said = []
    made = trace(
        model,
        PROMPT,
        NEGATIVE,
        seed=3,
        num_steps=STEPS,
        unconditional_guidance_scale=SCALE,
        guidance_scales=(1, SCALE, 9),
        progress=lambda *both: said.append(both),
    )
    return replace(made), said


def test_the_image_is_that_of_the_task(model, made):
    made, said = made
    options = {"seed": 3, "num_steps": STEPS, "verbose": 0}
    for scale, image in made.guidance.items():
        expected = model.text_to_image(
            PROMPT, NEGATIVE, unconditional_guidance_scale=scale, **options
        )[0]
        assert levels_apart(image, expected) <= 1
    assert list(made.guidance) == [1, SCALE, 9]
    assert made.image is made.guidance[SCALE]
    assert said == [(n, 9) for n in range(1, 10)]


def test_what_it_says_of_the_arguments(model, made):
    made, _ = made
    said = made.prompt, made.negative_prompt, made.seed, made.num_steps, made.scale, made.sampler
    assert said == (PROMPT, NEGATIVE, 3, STEPS, SCALE, "ddim")
    assert made.image_size == (64, 64) and made.prediction_type == "epsilon"
    assert made.checkpoint.endswith("million parameters") and made.seconds > 0
    close(made.context, model.encode_text(PROMPT)[0])
    close(made.negative_context, model.encode_text(NEGATIVE)[0])
    assert made.given is made.given_latent is None
    noise = make_noise_source(model.latent_shape, 1, 3)()[0]
    np.testing.assert_array_equal(made.noise, noise)
    np.testing.assert_array_equal(made.start, noise)


def test_steps_go_on_from_each_other(model, made):
    steps, levels = made[0].steps, model.config.schedule.levels(STEPS)
    assert [step.step for step in steps] == [0, 1, 2]
    assert [(step.timestep, step.alpha) for step in steps] == levels[:-1]
    assert [step.alpha_next for step in steps] == [level.alpha for level in levels[1:]]
    for step, following in zip(steps, steps[1:], strict=False):
        np.testing.assert_array_equal(step.latent, following.before)
    for step in steps:
        close(step.noise, step.without_prompt + SCALE * (step.with_prompt - step.without_prompt))
        close(diffuse(step.x0, step.noise, step.alpha), step.before)
        close(diffuse(step.x0, step.noise, step.alpha_next), step.latent)  # DDIM's step
        np.testing.assert_array_equal(step.x0_image, model.decode_latents(step.x0[None])[0])
    assert levels_apart(model.decode_latents(steps[-1].latent[None])[0], made[0].image) <= 1


def test_maps_of_words(made):
    made, _ = made
    assert list(made.maps) == ["a", "red", "RED", "apple"]
    for word, heat in made.maps.items():
        assert heat.shape == (64, 64) and heat.max() == 1
        some = np.array([step.maps[word] for step in made.steps])
        assert some.shape == (STEPS, 8, 8) and some.max() == 1 and some.min() >= 0


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_are_turned_into_noise(model, prediction_type):
    config = replace(
        model.config, schedule=replace(model.config.schedule, prediction_type=prediction_type)
    )
    other = StableDiffusion(jit_compile=model.jit_compile, weights=None, config=config)
    for component in ("text_encoder", "diffusion_model", "decoder"):
        setattr(other, f"_{component}", getattr(model, component))
    made = trace(other, PROMPT, num_steps=2, guidance_scales=())
    assert made.guidance == {} and made.prediction_type == prediction_type
    for step in made.steps:
        scale = made.scale
        close(step.noise, step.without_prompt + scale * (step.with_prompt - step.without_prompt))
        close(diffuse(step.x0, step.noise, step.alpha), step.before)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "heun"},
        {"sampler": "dpmpp-2m-sde", "noise_source": "torch"},
        {"guidance_interval": (0, 600)},
        {"guidance_rescale": 0.7},
        {"unconditional_guidance_scale": 1},
        {"num_steps": 1},
    ],
)
def test_other_options(model, options):
    options = {"seed": 3, "num_steps": 3} | options
    made = trace(model, PROMPT, guidance_scales=(), **options)
    assert levels_apart(made.image, model.text_to_image(PROMPT, verbose=0, **options)[0]) <= 1
    guided = [step.without_prompt is not None for step in made.steps]
    unguided = options.get("unconditional_guidance_scale") == 1
    expected = [
        step.timestep <= options.get("guidance_interval", (0, 999))[1] for step in made.steps
    ]
    assert guided == [False] * 3 if unguided else guided == expected
    for step in made.steps:
        assert step.maps["apple"].shape == (8, 8)
        close(diffuse(step.x0, step.noise, step.alpha), step.before)


def test_a_long_prompt(model):
    prompt = "red apple " * 38 + "(cat:1.3)"
    made = trace(model, prompt, num_steps=1, prompt_syntax="webui", guidance_scales=())
    assert len(made.tokens) == len(made.context) == 154
    assert [token.kind for token in made.tokens].count("start") == 2
    texts = [token.text for token in made.tokens if token.kind == "text"]
    assert texts == ["red", "apple"] * 38 + ["cat"]
    assert list(made.maps) == ["red", "apple", "cat"]
    options = {"num_steps": 1, "seed": 0, "prompt_syntax": "webui", "verbose": 0}
    assert levels_apart(made.image, model.text_to_image(prompt, **options)[0]) <= 1


def test_image_to_image(model):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")
    options = {"seed": 5, "num_steps": 4, "strength": 0.5}
    made = trace(model, PROMPT, image=image, guidance_scales=[], **options)
    expected = model.image_to_image(PROMPT, image, verbose=0, **options)[0]
    assert levels_apart(made.image, expected) <= 1
    assert [step.step for step in made.steps] == [2, 3]
    np.testing.assert_array_equal(made.given, image)
    close(made.given_latent, model.encode_images(made.given[None])[0])
    close(made.start, diffuse(made.given_latent, made.noise, made.steps[0].alpha))
    opened = trace(model, PROMPT, image=Image.fromarray(image), guidance_scales=[], **options)
    np.testing.assert_array_equal(opened.given, made.given)


def test_tokens():
    model = StableDiffusion(weights=None, config=TINY)
    model._tokenizer = SimpleTokenizer()
    prompt = "A  well-known, hippogriff"
    tokens = list_tokens(model, prompt, find_words(model, prompt))
    assert [token.id for token in tokens] == model.tokenize(prompt)
    assert [token.kind for token in tokens[:2]] == ["start", "text"]
    assert "".join(token.text + " " * token.ends_word for token in tokens) == (
        "a well-known ,hippogriff "
    )
    assert tokens[2].word == "well-known" and tokens[5].word is None
    kinds = [token.kind for token in tokens]
    assert kinds.count("end") == 1 and kinds.count("padding") == 77 - kinds.index("end") - 1


# The decoder's stages, and boxes


def test_stages_end_in_the_image(model, made):
    stages = made[0].stages
    assert list(stages) == [
        *("conv_in", "mid_res_1"),
        *(f"up_{n}_res_1" for n in range(4)),
        "conv_out",
    ]
    assert [stages[name].shape for name in ("mid_res_1", "up_1_res_1", "up_3_res_1")] == [
        (8, 8, 8),
        (16, 16, 8),
        (64, 64, 8),
    ]
    decoded = model.decoder.predict_on_batch(made[0].steps[-1].latent[None])[0]
    close(stages["conv_out"], np.asarray(decoded))
    assert find_stages(object(), None) == {}


def test_large_feature_maps_are_averaged():
    size = 3 * MOST_CELLS
    array = np.random.default_rng(0).random((size, 6, 2)).astype("float32")
    twice = keras.Sequential([keras.Input((size, 6, 2)), keras.layers.Rescaling(2.0, name="x")])
    expected = 2 * array.reshape(MOST_CELLS, 3, 2, 3, 2).mean(axis=(1, 3))
    close(find_stages(twice, array)["x"], expected)


def test_boxes_say_where_each_part_is_written(model, made):
    boxes = made[0].boxes
    names = [box.name for box in boxes]
    layers = [layer.name for layer in model.diffusion_model.layers if layer.weights]
    assert {*layers} <= {*names} and names[0] == "encode" and names[-1] == "quantize_pixels"
    assert names.index("layer_0") < names.index("mid_attn_0") < names.index("ddim")
    shapes = {box.name: (box.takes, box.gives) for box in boxes if box.part == "diffusion_model"}
    assert shapes["diffusion_model"] == ("(8, 8, 4) + (16) + (77, 16)", "(8, 8, 4)")
    assert shapes["up_1_concat_0"] == ("(8, 8, 16) + (8, 8, 16)", "(8, 8, 32)")
    for box in boxes:
        path, line = box.source.split(":")
        text = (ROOT / path).read_text("utf-8").splitlines()[int(line) - 1]
        assert text.strip().startswith(("def ", "class ")), (box, text)
        assert box.text.endswith(".") and box.gives
    sources = {box.name: box.source for box in boxes}
    assert sources["mid_attn_0"].startswith("stable_diffusion/diffusion_model.py:")


def test_sources():
    line = inspect.getsourcelines(ddim)[1]
    assert find_source(ddim) == f"stable_diffusion/noise_scheduler.py:{line}"
    with pytest.raises(ValueError, match="has no source in this package"):
        find_source(np.zeros)


def test_boxes_of_a_sampler_of_the_users(model):
    def mine(denoise, latent, levels, next_noise):
        yield from ddim(denoise, latent, levels, next_noise)

    made = trace(model, PROMPT, num_steps=1, sampler=mine, guidance_scales=())
    assert made.sampler == "mine"
    (box,) = (box for box in made.boxes if box.name == "mine")
    assert box.source.startswith("stable_diffusion/stable_diffusion.py:")
    assert len(list_boxes(model, ddim, (77, 16))) == len(made.boxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ["a", "b"]}, "one prompt and one negative prompt, each a str, not"),
        ({"negative_prompt": 5}, "each a str, not 'a' and 5"),
        ({"batch_size": 2}, "it has no batch_size"),
        ({"latent": 1, "mask": 1}, "it has no latent, mask"),
        ({"seed": None}, "seed must be an int from 0, not None"),
        ({"num_steps": 0}, "num_steps must be an int from 1"),
        ({"guidance_scales": ["x"]}, "guidance_scales must be a number"),
        ({"sampler": "dimm"}, "Did you mean 'ddim'"),
        ({"strength": 0.01, "image": np.zeros((8, 8, 3), "uint8")}, "strength"),
        ({"image": [np.zeros((64, 64, 3), "uint8")] * 2}, "image must have 1"),
        ({"etaa": 1}, "no option 'etaa'"),
    ],
)
def test_what_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        trace(model, **{"prompt": "a", "num_steps": 2} | options)


def test_a_notebook_shows_it(made):
    """One element, with pictures inside and nothing of the prompt as markup."""
    made = replace(made[0], prompt="a <script>red</script> apple")
    shown = made._repr_html_()
    closed = re.sub(r"(<img [^>]*|<br)>", r"\1/>", shown.replace("&nbsp;", " "))
    parsed = ElementTree.fromstring(closed)  # as XML
    pictures = [image.get("src") for image in parsed.iter("img")]
    assert len(pictures) == 1 + STEPS + len(made.maps)
    assert all(picture.startswith("data:image/") for picture in pictures)
    assert all(image.get("alt") for image in parsed.iter("img"))
    text = "".join(parsed.itertext())
    assert "a <script>red</script> apple" in text and "step 3" in text and "apple 3055" in text
    assert parsed.find(".//script") is None and len(shown) < 200_000
