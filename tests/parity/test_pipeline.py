"""Compares the whole pipeline with KerasCV's: the same prompt and noise give the same picture.

The reference is keras_cv 0.9.0, on TensorFlow in float32. Both pipelines have the same random
parameters; narrow models belong to both of them, as `test_models` compares the models. No pixel is
more than 1 of 255 apart, and fewer than one in a hundred is.
"""

from functools import partial
from types import SimpleNamespace

import keras_cv
import numpy as np
import pytest
from helpers import FEW

import stable_diffusion
from stable_diffusion.config import TINY_V2
from stable_diffusion.files import WEIGHTS_DIR
from stable_diffusion.noise import make_noise_source
from stable_diffusion.parity import keras_cv as compare_keras_cv

SIZE = 128
PROMPT = "a photograph of an astronaut riding a horse"
COMPONENTS = ["text_encoder", "diffusion_model", "decoder"]


def noise(*batch):
    return np.random.default_rng(0).standard_normal((*batch, SIZE // 8, SIZE // 8, 4))


def pipelines(name, config=None):
    """Returns both libraries' pipelines of a name, which lack their models yet."""
    ours = getattr(stable_diffusion, name)(
        SIZE, SIZE, jit_compile=False, weights=None, config=config
    )
    theirs = getattr(keras_cv.models, name)(SIZE, SIZE, jit_compile=False)
    vocabulary = str(WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz")
    theirs._tokenizer = keras_cv.models.stable_diffusion.SimpleTokenizer(vocabulary)
    return ours, theirs


@pytest.fixture(
    scope="module",
    params=[
        ("StableDiffusion", FEW),
        pytest.param(("StableDiffusionV2", TINY_V2), marks=pytest.mark.large),
    ],
)
def narrow(request):
    """Both pipelines with the same narrow models."""
    name, config = request.param
    ours, theirs = pipelines(name, config)
    rng = np.random.default_rng(0)
    for part in COMPONENTS:
        compare_keras_cv.randomize(getattr(ours, part), rng)
        setattr(theirs, f"_{part}", getattr(ours, part))
    # KerasCV knows one width of embedding only.
    embed, dim = theirs._get_timestep_embedding, config.unet.widths[0]
    theirs._get_timestep_embedding = partial(embed, dim=dim)
    return SimpleNamespace(ours=ours, theirs=theirs)


def assert_same_pictures(pictures, expected):
    assert pictures.dtype == expected.dtype == np.uint8
    assert pictures.shape == expected.shape
    assert np.abs(pictures.astype(int) - expected).max() <= 1
    assert np.mean(pictures != expected) < 0.01
    assert pictures.std() > 20, "the pictures have too little contrast to be compared"
    assert np.mean((pictures == 0) | (pictures == 255)) < 0.6, "most pixels are clipped"


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": 0},
        {"seed": 7, "negative_prompt": "blurry, drawing"},
        {"seed": 0, "negative_prompt": ""},
        {"seed": 0, "batch_size": 3},
        {"seed": 0, "batch_size": 3, "negative_prompt": "blurry"},
        {"seed": 0, "unconditional_guidance_scale": 1},
        {"seed": 0, "unconditional_guidance_scale": 3.5},
        {"seed": 0, "num_steps": 2},
        {"seed": 0, "num_steps": 20},
    ],
    ids=str,
)
def test_text_to_image(narrow, arguments):
    arguments = {"num_steps": 5} | arguments
    pictures, expected = (
        pipeline.text_to_image(PROMPT, **arguments) for pipeline in (narrow.ours, narrow.theirs)
    )
    assert_same_pictures(pictures, expected)


@pytest.mark.parametrize("batch_size, axes", [(1, ()), (1, (1,)), (3, ()), (3, (3,))])
def test_own_noise(narrow, batch_size, axes):
    arguments = {"batch_size": batch_size, "num_steps": 5, "diffusion_noise": noise(*axes)}
    pictures, expected = (
        pipeline.generate_image(pipeline.encode_text(PROMPT), **arguments)
        for pipeline in (narrow.ours, narrow.theirs)
    )
    assert_same_pictures(pictures, expected)


@pytest.mark.parametrize("seed", [0, 1, 1234567890])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_initial_noise_is_exactly_equal(narrow, seed, batch_size):
    expected = narrow.theirs._get_initial_diffusion_noise(batch_size, seed)
    drawn = make_noise_source(expected.shape[1:], batch_size, seed)()
    np.testing.assert_array_equal(drawn, expected)


def test_encoded_text_is_equal(narrow):
    for prompt in ["", PROMPT, "猫 кошка γάτα"]:
        np.testing.assert_array_equal(
            narrow.ours.encode_text(prompt), narrow.theirs.encode_text(prompt)
        )


@pytest.mark.large
def test_full_width():
    """Each pipeline with its own library's models."""
    both = pipelines("StableDiffusion")
    rng = np.random.default_rng(0)
    for part in COMPONENTS:
        models = compare_keras_cv.build_pair(part, SIZE, SIZE)
        compare_keras_cv.share_parameters(*models, rng)
        for pipeline, model in zip(both, models, strict=True):
            model.compile(jit_compile=False)
            setattr(pipeline, f"_{part}", model)
    arguments = {"num_steps": 3, "batch_size": 2, "negative_prompt": "blurry", "seed": 0}
    pictures, expected = (pipeline.text_to_image(PROMPT, **arguments) for pipeline in both)
    assert_same_pictures(pictures, expected)
