"""Compares the models in the original dialect with diffusers' and transformers'.

The reference are two tiny random Stable Diffusions as diffusers writes them, and what diffusers
computes with them (tests/data/make_diffusers_golden.py). All is float32; errors are relative to the
largest value of the reference. Needs none of these libraries.
"""

import numpy as np
import pytest
from helpers import DATA, golden_pipeline
from keras import Model, backend, ops

from stable_diffusion.config import COMPONENTS
from stable_diffusion.image_encoder import encode_moments
from stable_diffusion.noise_scheduler import timestep_embedding

pytestmark = pytest.mark.quick

TOLERANCE = 5e-6  # of one model; up to 1.6e-6 is seen
TRAJECTORY_TOLERANCE = 1e-5  # of four steps with guidance; 2.5e-6 is seen


class Golden:
    """A pipeline with diffusers' parameters, and diffusers' outputs."""

    def __init__(self, family):
        self.family = family
        self.pipeline = golden_pipeline(family)
        with np.load(DATA / f"diffusers_golden_{family}.npz") as file:
            self.data = dict(file)

    def __getitem__(self, name):
        return self.data[name]


@pytest.fixture(scope="module", params=["v1", "v2"])
def golden(request):
    """Of the two one has graphs, which take seconds to build; the other one runs eagerly."""
    golden = Golden(request.param)
    if request.param == "v2" and backend.backend() != "jax":  # which is slow without a compiler
        for component in COMPONENTS:
            getattr(golden.pipeline, component).run_eagerly = True
    return golden


def check(actual, expected, tolerance=TOLERANCE):
    actual = ops.convert_to_numpy(actual)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"relative error {error:.1e}"


def test_config(golden):
    config = golden.pipeline.config
    assert config.size == 32
    assert config.text.activation == {"v1": "quick_gelu", "v2": "gelu"}[golden.family]
    assert config.text.pad_token == {"v1": None, "v2": 0}[golden.family]
    assert config.unet.heads == {"v1": (2, 4), "v2": (1, 2)}[golden.family]
    assert config.unet.linear_projection == (golden.family == "v2")
    assert config.unet.norm_epsilon == config.vae.norm_epsilon == 1e-6
    assert not config.unet.approximate_gelu
    assert config.schedule.prediction_type == {"v1": "epsilon", "v2": "v_prediction"}[golden.family]


def test_text_encoder(golden):
    tokens = golden["tokens"].astype("int32")
    positions = np.tile(np.arange(77, dtype="int32"), (2, 1))
    context = golden.pipeline.text_encoder({"tokens": tokens, "positions": positions})
    check(context, golden["context"])


def test_prompt_is_padded_as_there(golden):
    check(golden.pipeline.encode_text(["", "prompt"]), golden["context"])


def test_diffusion_model(golden):
    inputs = {
        "latent": golden["latent"],
        "timestep_embedding": timestep_embedding(golden["timesteps"], 8),
        "context": golden["context"],
    }
    check(golden.pipeline.diffusion_model(inputs), golden["unet"])


def test_image_encoder(golden):
    encoder, scale = golden.pipeline.image_encoder, golden.pipeline.config.vae.scaling_factor
    moments = Model(encoder.inputs[0], encoder.layers[-2].output)
    check(moments(golden["picture"]), golden["moments"])
    check(encode_moments(encoder, golden["picture"]), golden["moments"])
    check(encoder(golden["picture"]), golden["moments"][..., :4] * scale)


def test_decoder(golden):
    check(golden.pipeline.decoder(golden["latent"]), golden["decoded"])


def test_picture_and_each_step_on_the_way(golden):
    steps, trajectory = [], []
    picture = golden.pipeline.text_to_image(
        "prompt",
        num_steps=4,
        diffusion_noise=golden["noise"],
        verbose=0,
        callback=lambda _, t, latent, x0: (steps.append(t), trajectory.append(latent)),
    )
    assert steps == golden["steps"].tolist()
    check(np.concatenate(trajectory), golden["trajectory"], TRAJECTORY_TOLERANCE)
    # diffusers rounds to the nearest level, KerasCV and so this pipeline down.
    assert np.abs(picture.astype(int) - golden["drawn"]).max() <= 1
