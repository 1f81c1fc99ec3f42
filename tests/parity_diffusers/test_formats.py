"""Checkpoints made by diffusers and transformers load here, and those written here load there.

The reference is PyTorch on a CPU, in float32: each model within 1e-4 of the largest value, a
picture of 4 DDIM steps within 2 of 255 levels. Parameters are random, biases and norms too.
"""

import gc
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import relative_error

from stable_diffusion import SimpleTokenizer, StableDiffusion
from stable_diffusion.checkpoints.diffusers_config import make_config_files, write_config_files
from stable_diffusion.config import SD1, SD2, undo_departures
from stable_diffusion.noise_scheduler import ddim, split_prediction, timestep_embedding

REASON = "needs pip install torch diffusers transformers accelerate"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
from make_diffusers_golden import randomize  # noqa: E402  needs the above

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # of these libraries, about each other
]

EMOJI = Path(__file__).parents[2] / "weights" / "emoji"
TOLERANCE, LEVELS = 1e-4, 2
STEPS, GUIDANCE = 4, 7.5
PROMPT, NEGATIVE = "a red apple on a blue background", "dull"

V1 = {
    "text": {"hidden_act": "quick_gelu", "num_attention_heads": 4},
    "unet": {"attention_head_dim": 8},
    "pad": "<|endoftext|>",
}
V2 = {
    "text": {"hidden_act": "gelu", "num_attention_heads": 2},
    "unet": {"attention_head_dim": [1, 2], "use_linear_projection": True},
    "pad": "!",
}
DOWN, UP = ["DownBlock2D", "UpBlock2D"], ["CrossAttnDownBlock2D", "CrossAttnUpBlock2D"]
FAMILIES = {
    "1": V1,
    "1 inpainting": V1 | {"unet": V1["unet"] | {"in_channels": 9}},
    "2 base": V2,
    "2 v-prediction": V2 | {"scheduler": {"prediction_type": "v_prediction"}},
    "turbo": V2
    | {
        "scheduler": {"timestep_spacing": "trailing", "steps_offset": 1},
        "scheduler_class": "EulerDiscreteScheduler",
    },
    "three levels": V1
    | {
        "unet": {
            "block_out_channels": (32, 64, 96),
            "down_block_types": (DOWN[0], UP[0], UP[0]),
            "up_block_types": (UP[1], UP[1], DOWN[1]),
            "layers_per_block": 2,
            "attention_head_dim": [2, 4, 6],
        },
        "scheduler": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    },
}


def make(family):
    """Returns a pipeline of diffusers, small, with random parameters."""
    generator = torch.Generator().manual_seed(0)
    options = FAMILIES[family]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        EMOJI / "tokenizer", pad_token=options["pad"]
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    unet = {
        "sample_size": 8,
        "block_out_channels": (64, 128),
        "down_block_types": (UP[0], DOWN[0]),
        "up_block_types": (DOWN[1], UP[1]),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
    }
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    kind = options.get("scheduler_class", "DDIMScheduler")
    if kind == "DDIMScheduler":
        scheduler |= {"clip_sample": False, "set_alpha_to_one": False}
    text_config = transformers.CLIPTextConfig(**text | options["text"])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=64,
    )
    return pipeline_of(
        text_encoder=randomize(transformers.CLIPTextModel(text_config), generator),
        unet=randomize(diffusers.UNet2DConditionModel(**unet | options["unet"]), generator),
        vae=randomize(vae, generator),
        tokenizer=tokenizer,
        scheduler=getattr(diffusers, kind)(**scheduler | options.get("scheduler", {})),
    )


def pipeline_of(**parts):
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """A pipeline of diffusers, and the folder that it wrote."""
    pipeline = make(request.param)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_")) / "model"
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline, folder


def last(tensor):
    """Moves the channels to the end, and to numpy."""
    return tensor.detach().movedim(1, -1).numpy()


def first(array):
    """The inverse of `last`."""
    return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())


def encode(pipeline, prompt):
    """Returns the context by transformers, (1, 77, D)."""
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
    return pipeline.text_encoder(ids.input_ids).last_hidden_state


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@torch.no_grad()
def compare_models(theirs, ours, size=64):
    """Compares the output of each part on the same random input."""
    context = encode(theirs, PROMPT)
    assert relative_error(ours.encode_text(PROMPT), context.numpy()) <= TOLERANCE
    h = w = size // 8
    latent, timesteps = noise(2, h, w, theirs.unet.config.in_channels), np.array([1, 981])
    both = context.repeat(2, 1, 1)
    expected = last(theirs.unet(first(latent), torch.from_numpy(timesteps), both).sample)
    embedding = timestep_embedding(timesteps, ours.config.unet.widths[0])
    found = ours.diffusion_model([latent, embedding, both.numpy()])
    assert relative_error(found, expected) <= TOLERANCE
    latent = noise(1, h, w, 4, seed=1)
    scaled = first(latent) / theirs.vae.config.scaling_factor
    assert relative_error(ours.decoder(latent), last(theirs.vae.decode(scaled).sample)) <= TOLERANCE
    picture = np.tanh(noise(1, size, size, 3, seed=2))
    encoder = ours.image_encoder
    moments = keras.Model(encoder.inputs[0], encoder.layers[-2].output)(picture)
    expected = last(theirs.vae.encode(first(picture)).latent_dist.parameters)
    assert relative_error(moments, expected) <= TOLERANCE


@torch.no_grad()
def draw_theirs(pipeline, start, extra=None):
    """Draws with diffusers' own models and DDIM scheduler, (H, W, 3) uint8.

    Args:
        pipeline: of diffusers.
        start: noise, (1, h, w, 4).
        extra: what an inpainting model sees beside the latent, (1, h, w, 5), or None.
    """
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    context = torch.cat([encode(pipeline, NEGATIVE), encode(pipeline, PROMPT)])
    latent = first(start) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = latent if extra is None else torch.cat([latent, first(extra)], 1)
        unguided, guided = pipeline.unet(seen.repeat(2, 1, 1, 1), timestep, context).sample.chunk(2)
        predicted = unguided + GUIDANCE * (guided - unguided)
        latent = scheduler.step(predicted, timestep, latent).prev_sample
    return to_levels(last(pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample))


def draw_ours(pipeline, start, extra=None):
    """Draws the same here; an inpainting model step by step."""
    if extra is None:
        return pipeline.text_to_image(
            PROMPT,
            NEGATIVE,
            num_steps=STEPS,
            unconditional_guidance_scale=GUIDANCE,
            diffusion_noise=start,
            verbose=0,
        )[0]
    schedule, latent = pipeline.config.schedule, start
    context = np.concatenate([pipeline.encode_text(NEGATIVE), pipeline.encode_text(PROMPT)])

    def denoise(latent, alpha, timestep):
        seen = np.repeat(np.concatenate([latent, extra], -1), 2, axis=0)
        time = timestep_embedding([timestep] * 2, pipeline.config.unet.widths[0])
        output = np.asarray(pipeline.diffusion_model.predict_on_batch([seen, time, context]))
        unguided, guided = np.split(output, 2)
        output = unguided + GUIDANCE * (guided - unguided)
        return split_prediction(output, latent, alpha, schedule.prediction_type)

    *_, (_, latent, _) = ddim(denoise, latent, schedule.levels(STEPS), None)
    return to_levels(np.asarray(pipeline.decoder.predict_on_batch(latent)))


def to_levels(decoded):
    return (np.clip(decoded[0] / 2 + 0.5, 0, 1) * 255).round().astype("uint8")


def check_same(ours, theirs):
    assert ours.shape == theirs.shape and theirs.std() > 20
    assert np.abs(ours.astype(int) - theirs).max() <= LEVELS


def test_models_of_diffusers(made):
    theirs, folder = made
    compare_models(theirs, StableDiffusion(jit_compile=False, weights=folder))


def test_pictures_of_diffusers(made):
    theirs, folder = made
    ours = StableDiffusion(jit_compile=False, weights=folder)
    start, extra = noise(1, 8, 8, 4), None
    if theirs.unet.config.in_channels == 9:
        extra = noise(1, 8, 8, 5, seed=1)
        extra[..., 0] = extra[..., 0] > 0  # the mask
    check_same(draw_ours(ours, start, extra), draw_theirs(theirs, start, extra))


def test_diffusers_loads_what_is_written(made, tmp_path):
    """In both layouts that it reads, parameters bit for bit."""
    theirs, folder = made
    ours = StableDiffusion(jit_compile=False, weights=folder)
    ours.save(tmp_path / "folder")
    loaded = [diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")]
    if len(theirs.unet.config.block_out_channels) == 2:
        ours.save(tmp_path / "x.safetensors", "original")
        loaded += [from_single_file(tmp_path / "x.safetensors", folder)]
    for pipeline in loaded:
        for part in ("text_encoder", "unet", "vae"):
            expected, found = getattr(theirs, part).state_dict(), getattr(pipeline, part)
            found = found.state_dict()
            assert expected.keys() == found.keys()
            for name, tensor in expected.items():
                assert torch.equal(tensor, found[name]), (part, name)
        if theirs.unet.config.in_channels == 4:
            start = noise(1, 8, 8, 4)
            check_same(draw_ours(ours, start), draw_theirs(pipeline, start))


def from_single_file(path, folder):
    return diffusers.StableDiffusionPipeline.from_single_file(
        path, config=str(folder), local_files_only=True, safety_checker=None
    )


def test_embedded_checkpoint():
    """It is a folder of diffusers' layout itself; diffusers draws the same from it."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    ours = StableDiffusion(jit_compile=False, weights="emoji")
    start = noise(1, 16, 16, ours.config.vae.latent_channels)
    drawn = theirs(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=first(start),
        output_type="np",
    ).images[0]
    check_same(draw_ours(ours, start), (drawn * 255).round().astype("uint8"))


FULL = {
    "1": ({}, {"attention_head_dim": 8}),
    "2": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
    ),
}


@pytest.mark.large
@pytest.mark.parametrize("version", FULL)
def test_full_size(version, tmp_path):
    """As published, from a folder of shards and from one file in the original layout; 13 GB."""
    text, unet = FULL[version]
    generator = torch.Generator().manual_seed(0)
    config = undo_departures({"1": SD1, "2": SD2}[version])
    files = make_config_files(config, {}, SimpleTokenizer())
    write_config_files(tmp_path, {n: f for n, f in files.items() if n.startswith("tokenizer/")})
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": tokenizer.pad_token_id,
    } | text
    parts = {
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        "unet": diffusers.UNet2DConditionModel(**{"cross_attention_dim": 768} | unet),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
    }
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {name: randomize(part, generator) for name, part in parts.items()}
    theirs = pipeline_of(**parts, tokenizer=tokenizer, scheduler=scheduler)
    theirs.save_pretrained(tmp_path / "model", safe_serialization=True, max_shard_size="1GB")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 1
    ours = StableDiffusion(64, 64, jit_compile=False, weights=tmp_path / "model")
    compare_models(theirs, ours)
    shutil.rmtree(tmp_path / "model")
    ours.save(tmp_path / "x.safetensors", "original", "float16")
    del ours
    gc.collect()
    ours = StableDiffusion(64, 64, jit_compile=False, weights=tmp_path / "x.safetensors")
    compare_models(theirs, ours)
