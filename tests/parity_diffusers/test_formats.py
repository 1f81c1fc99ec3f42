"""Checkpoints made by diffusers and transformers load here, and those written here load there.

The reference is PyTorch on a CPU, in float32: each tiny model within 1e-5 of the largest value, in
full size 1e-4, a picture of 4 DDIM steps within 2 of 255 levels. Parameters are random, biases and
norms too.
"""

import gc
import json
import shutil
from dataclasses import replace

import keras
import numpy as np
import PIL.Image
import pytest
from helpers import relative_error

from stable_diffusion import SimpleTokenizer, StableDiffusion
from stable_diffusion.checkpoints.diffusers_config import make_config_files, write_config_files
from stable_diffusion.config import SD1, SD2, TINY, undo_departures
from stable_diffusion.noise_scheduler import ddim, split_prediction, timestep_embedding

REASON = "needs pip install torch diffusers transformers accelerate"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
from diffusers_pipelines import EMOJI, FAMILIES, make, pipeline_of  # noqa: E402  needs the above
from diffusers_tasks import Pair, measure  # noqa: E402
from make_diffusers_golden import randomize  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # of these libraries, about each other
]

TOLERANCE = 1e-5  # of a tiny model; up to 2.6e-6 is seen
FULL_TOLERANCE, LEVELS = 1e-4, 2
STEPS, GUIDANCE = 4, 7.5
PROMPT, NEGATIVE = "a red apple on a blue background", "dull"


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
def compare_models(theirs, ours, tolerance=TOLERANCE, size=64):
    """Compares the output of each part on the same random input."""
    context = encode(theirs, PROMPT)
    assert relative_error(ours.encode_text(PROMPT), context.numpy()) <= tolerance
    h = w = size // 8
    latent, timesteps = noise(2, h, w, theirs.unet.config.in_channels), np.array([1, 981])
    both = context.repeat(2, 1, 1)
    expected = last(theirs.unet(first(latent), torch.from_numpy(timesteps), both).sample)
    embedding = timestep_embedding(timesteps, ours.config.unet.widths[0])
    found = ours.diffusion_model([latent, embedding, both.numpy()])
    assert relative_error(found, expected) <= tolerance
    latent = noise(1, h, w, 4, seed=1)
    scaled = first(latent) / theirs.vae.config.scaling_factor
    assert relative_error(ours.decoder(latent), last(theirs.vae.decode(scaled).sample)) <= tolerance
    picture = np.tanh(noise(1, size, size, 3, seed=2))
    encoder = ours.image_encoder
    moments = keras.Model(encoder.inputs[0], encoder.layers[-2].output)(picture)
    expected = last(theirs.vae.encode(first(picture)).latent_dist.parameters)
    assert relative_error(moments, expected) <= tolerance


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


def draw_ours(pipeline, start, extra=None, **options):
    """Draws the same here; an inpainting model step by step."""
    if extra is None:
        return pipeline.text_to_image(
            PROMPT,
            NEGATIVE,
            num_steps=STEPS,
            unconditional_guidance_scale=GUIDANCE,
            diffusion_noise=start,
            verbose=0,
            **options,
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
    assert type(loaded[0].scheduler) is type(theirs.scheduler)
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


@pytest.fixture(params=["1", "2 base"])
def written(request, tmp_path):
    """A pipeline of diffusers, and the folder that it wrote, where a test may change files."""
    pipeline = make(request.param)
    pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    return pipeline, tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


def encode_skipping(pipeline, prompt, clip_skip):
    """Returns the context by diffusers' pipeline, (1, 77, D).

    It asks the text encoder for its part `text_model`, which transformers 5 joined with the whole.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(pipeline.text_encoder, "text_model"):
            whole = property(lambda encoder: encoder)
            patch.setattr(type(pipeline.text_encoder), "text_model", whole, raising=False)
        return pipeline.encode_prompt(prompt, "cpu", 1, False, clip_skip=clip_skip)[0]


@pytest.mark.parametrize("clip_skip", [1, 2])
@torch.no_grad()
def test_clip_skip(written, clip_skip):
    """As in diffusers, whose pipeline skips no layers of a negative prompt, unlike this one."""
    theirs, folder = written
    ours = StableDiffusion(jit_compile=False, weights=folder)
    contexts = {text: encode_skipping(theirs, text, clip_skip) for text in (PROMPT, NEGATIVE)}
    for text, context in contexts.items():
        found = ours.encode_text(text, clip_skip)
        assert relative_error(found, context.numpy()) <= TOLERANCE
        assert relative_error(ours.encode_text(text), context.numpy()) > 0.1
    start = noise(1, 8, 8, 4)
    drawn = theirs(
        prompt_embeds=contexts[PROMPT],
        negative_prompt_embeds=contexts[NEGATIVE],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=first(start),
        output_type="np",
    ).images[0]
    check_same(draw_ours(ours, start, clip_skip=clip_skip), (drawn * 255).round().astype("uint8"))


@torch.no_grad()
def test_fewer_layers_in_the_config_than_in_the_file(written, tmp_path):
    """As files do whose model was trained with clip skip; both leave out the last layer."""
    theirs, folder = written
    config = folder / "text_encoder" / "config.json"
    assert json.loads(config.read_text("utf-8"))["num_hidden_layers"] == 3
    expected = encode_skipping(theirs, PROMPT, 1).numpy()
    edit(config, num_hidden_layers=2)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert relative_error(encode(theirs, PROMPT).numpy(), expected) <= TOLERANCE
    ours = StableDiffusion(jit_compile=False, weights=folder)
    assert relative_error(ours.encode_text(PROMPT), expected) <= TOLERANCE
    ours.save(tmp_path / "saved")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert theirs.text_encoder.config.num_hidden_layers == 2
    assert relative_error(encode(theirs, PROMPT).numpy(), expected) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_offset_of_0(spacing, written):
    """With "leading", diffusers' pipeline reads it as 1; otherwise neither adds it."""
    _, folder = written
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, steps_offset=0, timestep_spacing=spacing)
    scheduler = diffusers.StableDiffusionPipeline.from_pretrained(folder).scheduler
    schedule = StableDiffusion(jit_compile=False, weights=folder).config.schedule
    for num_steps in (2, 4, 20, 50):
        scheduler.set_timesteps(num_steps)
        levels = schedule.levels(num_steps)
        assert [timestep for timestep, _ in levels[:-1]] == scheduler.timesteps.tolist()
        assert spacing != "leading" or levels[-2].timestep == 1


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


@pytest.mark.parametrize("channels", [4, 9])
def test_every_pipeline_of_diffusers_draws(channels, tmp_path):
    """From a folder that was written here, by name and as their `AutoPipeline`s choose it."""
    config = undo_departures(replace(TINY, unet=replace(TINY.unet, in_channels=channels)))
    StableDiffusion(weights=None, jit_compile=False, config=config).save(tmp_path / "x")
    image = PIL.Image.fromarray(np.full((64, 64, 3), 99, "uint8"))
    inpainted = {"image": image, "mask_image": image, "strength": 1.0, "height": 64, "width": 64}
    pipelines = {
        diffusers.StableDiffusionInpaintPipeline: inpainted,
        diffusers.AutoPipelineForInpainting: inpainted,
    }
    if channels == 4:
        pipelines |= {
            diffusers.StableDiffusionPipeline: {},
            diffusers.AutoPipelineForText2Image: {},
            diffusers.StableDiffusionImg2ImgPipeline: {"image": image, "strength": 1.0},
            diffusers.AutoPipelineForImage2Image: {"image": image, "strength": 1.0},
        }
    for pipeline, options in pipelines.items():
        theirs = pipeline.from_pretrained(tmp_path / "x")
        drawn = theirs(PROMPT, num_inference_steps=2, output_type="np", **options).images
        assert drawn.shape == (1, 64, 64, 3) and np.isfinite(drawn).all()


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
        "unet": diffusers.UNet2DConditionModel(
            **{"cross_attention_dim": 768, "sample_size": 64} | unet
        ),
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
    ours = StableDiffusion(128, 128, jit_compile=False, weights=tmp_path / "model")
    compare_models(theirs, ours, FULL_TOLERANCE, size=128)
    for task in ("image to image", "inpainting"):
        difference, kept = measure(Pair(theirs, ours), task, "dpmpp-2m", 0.3)
        assert difference <= LEVELS and not kept
    shutil.rmtree(tmp_path / "model")
    ours.save(tmp_path / "x.safetensors", "original", "float16")
    del ours
    gc.collect()
    ours = StableDiffusion(64, 64, jit_compile=False, weights=tmp_path / "x.safetensors")
    compare_models(theirs, ours, FULL_TOLERANCE)
