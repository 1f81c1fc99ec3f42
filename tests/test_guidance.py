"""Guidance: its spread, against the paper's formulas, and models that see its scale.

The reference of the latter is tests/data/guided_golden.npz, which tests/data/make_guided_golden.py
makes with diffusers. Tolerance: 1e-5 for float32 arrays, relative to the largest value.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from guided_inputs import BETAS, SCALE, STEPS, UNET, WIDTH, draw
from helpers import DATA, FEW, check_equal
from keras import backend, ops
from safetensors.numpy import save_file

import stable_diffusion.stable_diffusion
from stable_diffusion import DiffusionModel, StableDiffusion
from stable_diffusion.adapters.lora import name_kernels
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.checkpoints.diffusers import LAYOUTS
from stable_diffusion.config import TINY, UNetConfig
from stable_diffusion.guidance import embed_guidance, rescale_guidance
from stable_diffusion.noise_scheduler import timestep_embedding
from stable_diffusion.training.methods import check_trainable

JIT = backend.backend() == "jax"
SHAPE = (2, 4, 6, 3)


@pytest.mark.quick
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_rescaling_is_the_papers(share):
    """Lin et al. 2024, https://arxiv.org/abs/2305.08891, equations 14 to 16, image by image."""
    rng = np.random.default_rng(0)
    without, output = rng.standard_normal((2, *SHAPE)) * np.array([1, 5]).reshape(2, 1, 1, 1)
    guided = without + 7.5 * (output - without)
    expected = []
    for x_cfg, x_pos in zip(guided, output, strict=True):
        sigma_pos = np.sqrt(np.mean((x_pos - x_pos.mean()) ** 2))
        sigma_cfg = np.sqrt(np.mean((x_cfg - x_cfg.mean()) ** 2))
        x_rescaled = x_cfg * sigma_pos / sigma_cfg
        expected.append(share * x_rescaled + (1 - share) * x_cfg)
    found = rescale_guidance(guided.astype("float32"), output.astype("float32"), share)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return tiny_pipeline


def generate(model, **options):
    context = np.random.default_rng(0).standard_normal((77, 32)).astype("float32")
    common = {"num_steps": 2, "seed": 0, "unconditional_guidance_scale": 7.5}
    return list(model.generate_latents(context, **common | options))


def predict(latent, x0):
    """Returns the noise that belongs to a prediction of x0 in the first step."""
    alpha = TINY.schedule.levels(2)[0].alpha
    return (latent - alpha**0.5 * x0) / (1 - alpha) ** 0.5


def test_the_pipeline_rescales_what_guidance_predicts(model):
    latent = np.random.default_rng(1).standard_normal((1, 8, 8, 4)).astype("float32")
    start = {"latent": latent, "seed": None, "sampler": "ddim"}
    plain, rescaled, alone = (
        predict(latent, generate(model, **start, **options)[0][3]).astype("float64")
        for options in (
            {},
            {"guidance_rescale": 0.7},
            {"unconditional_guidance_scale": 1},
        )
    )
    expected = rescale_guidance(plain, alone, 0.7)
    np.testing.assert_allclose(rescaled, expected, atol=1e-4 * np.abs(plain).max())
    assert np.abs(rescaled - plain).max() > 0.01 * np.abs(plain).max()


def test_without_guidance_nothing_is_rescaled(model):
    options = {"unconditional_guidance_scale": 1}
    plain, rescaled = (generate(model, **options, **more) for more in ({}, {"guidance_rescale": 1}))
    np.testing.assert_array_equal(plain[-1][2], rescaled[-1][2])


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan"), "1", None])
def test_wrong_shares(model, wrong):
    with pytest.raises(ValueError, match="guidance_rescale must be a number from 0 to 1, not"):
        generate(model, guidance_rescale=wrong)


# Models that see the guidance scale

GUIDED = replace(FEW, unet=replace(FEW.unet, guidance_width=WIDTH))


def check(found, expected, tolerance=1e-5):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert found.shape == expected.shape and error < tolerance, f"{error:.1e}"


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "guided_golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A checkpoint of diffusers with only a UNet, which sees the guidance scale."""
    folder = tmp_path_factory.mktemp("guided")
    for name, data in {"unet/config.json": UNET, "scheduler/scheduler_config.json": BETAS}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(data))
    config = UNetConfig((8, 16), (2, 2), (True, False), 16, 1, groups=4, guidance_width=WIDTH)
    model = DiffusionModel(64, 64, 77, download_weights=False, config=config)
    tensors = {
        slot.name: draw(slot.name, *slot.shape, deviation=0.4)
        for slot in LAYOUTS["diffusion_model"].find_slots(model)
    }
    assert tensors["time_embedding.cond_proj.weight"].shape == (8, WIDTH)
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return StableDiffusion(weights=folder, jit_compile=JIT)


@pytest.mark.quick
@pytest.mark.parametrize("scale", [1.0, 1.5, 7.5])
def test_the_embedding_of_a_scale(golden, scale):
    """diffusers computes angles of up to 1,000 times the scale in float32."""
    found = embed_guidance(scale, WIDTH, 3)
    assert found.shape == (3, WIDTH) and found.dtype == np.float32
    for k in range(6):
        angle = 1000 * (scale - 1) * math.exp(-math.log(10000) * k / 5)
        np.testing.assert_allclose(found[:, k], math.sin(angle), atol=1e-6)
        np.testing.assert_allclose(found[:, 6 + k], math.cos(angle), atol=1e-6)
    np.testing.assert_allclose(found[:1], golden[f"embedding {scale}"], atol=1e-3)


@pytest.mark.quick
def test_an_embedding_of_odd_width(golden):
    found = embed_guidance(SCALE, WIDTH + 1, 1)
    assert found[0, -1] == 0
    np.testing.assert_allclose(found, golden["odd"], atol=1e-4)


def test_the_unet_is_diffusers(golden, guided):
    latent, context = draw("latent", 1, 8, 8, 4), draw("context", 1, 77, 16)
    time, guidance = timestep_embedding([981], 8), embed_guidance(SCALE, WIDTH, 1)
    output = guided.diffusion_model([latent, time, context, guidance])
    check(ops.convert_to_numpy(output), golden["output"])


def test_four_steps_are_diffusers(golden, guided, monkeypatch):
    """Each is a single pass, without a negative prompt."""
    batches, predict = [], guided.diffusion_model.predict_on_batch

    def noted(inputs):
        batches.append(len(inputs[0]))
        return predict(inputs)

    noises = iter([draw(f"noise {step}", 1, 8, 8, 4) for step in range(STEPS)])
    monkeypatch.setattr(
        stable_diffusion.stable_diffusion, "make_noise_source", lambda *_: lambda: next(noises)
    )
    monkeypatch.setattr(guided.diffusion_model, "predict_on_batch", noted)
    steps = guided.generate_latents(
        draw("context", 1, 77, 16),
        negative_prompt="nothing",
        num_steps=STEPS,
        unconditional_guidance_scale=SCALE,
        diffusion_noise=draw("latent", 1, 8, 8, 4),
        sampler="lcm",
    )
    check(np.stack([latent for _, _, latent, _ in steps]), golden["latents"], 2e-5)
    assert batches == [1] * STEPS


def test_the_scale_and_its_interval(guided):
    """Outside the interval, and at 1, the model sees no guidance."""

    def run(scale, **options):
        steps = guided.generate_latents(
            draw("context", 1, 77, 16),
            num_steps=2,
            unconditional_guidance_scale=scale,
            seed=0,
            spacing="trailing",
            **options,
        )
        return next(steps)[2]

    assert np.abs(run(5) - run(1)).max() > 1e-3
    np.testing.assert_array_equal(run(5, guidance_interval=(0, 0)), run(1))
    np.testing.assert_array_equal(run(5, guidance_rescale=1), run(5))


def test_formats_keep_it_or_refuse(tmp_path):
    model = StableDiffusion(weights=None, jit_compile=False, config=GUIDED)
    for format in ("original", "kerascv"):
        with pytest.raises(ValueError, match=f"'openvino', not '{format}'"):
            model.save(tmp_path / "x.safetensors", format)
        assert not any(tmp_path.iterdir())
    for format in ("diffusers", "keras"):
        model.save(tmp_path / format, format)
        again = StableDiffusion(weights=tmp_path / format, jit_compile=False)
        assert again.config.unet == GUIDED.unet
        check_equal(again.diffusion_model, model.diffusion_model)
    assert name_kernels(model.diffusion_model)  # LoRAs find their kernels
    tensors = open_checkpoint(tmp_path / "diffusers").config
    assert tensors.unet.guidance_width == WIDTH


def test_it_is_not_trained():
    with pytest.raises(ValueError, match="sees the guidance scale, for few steps, can't be"):
        check_trainable(GUIDED)
