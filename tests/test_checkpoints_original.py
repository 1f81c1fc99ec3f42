"""Files in the original layout: what is written is read back, and files of others are understood.

Parameters are copied, so they are compared for equality. That the names are the original ones shows
tests/parity_diffusers/test_formats.py, where diffusers reads such files.
"""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers import CONFIGS, MAKE, check_equal, random_models
from keras import ops
from safetensors.numpy import load_file, save_file

from stable_diffusion import SimpleTokenizer, StableDiffusion
from stable_diffusion.checkpoints import FORMATS, Reader, open_checkpoint, save_checkpoint
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.checkpoints.diffusers import save_diffusers
from stable_diffusion.checkpoints.original import CONFIG_KEY, SingleFile, find_slots, save_original
from stable_diffusion.checkpoints.tensors import SafetensorsFiles
from stable_diffusion.config import (
    SD1_INPAINTING,
    SD2,
    Config,
    TextConfig,
    UNetConfig,
    VAEConfig,
    undo_departures,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not say what it predicts")

# Narrow, but with the heads that versions 1 and 2 have, so that shapes alone tell the config.
PLAIN_1 = undo_departures(
    Config(
        TextConfig(64, 2, 1, 128, vocab_size=600),
        UNetConfig((64, 128), (8, 8), (True, False), 64, res_blocks=1),
        VAEConfig((32, 32, 64, 64), res_blocks=1),
    )
)
PLAIN_2 = replace(
    PLAIN_1,
    text=replace(PLAIN_1.text, activation="gelu", pad_token=0),
    unet=replace(PLAIN_1.unet, heads=(1, 2), linear_projection=True),
)
PLAIN = {"1": PLAIN_1, "2": PLAIN_2}


@pytest.fixture(scope="module", params=PLAIN)
def plain(request, tmp_path_factory):
    """A file as others share it, without our metadata; with its config and models."""
    config = PLAIN[request.param]
    models = random_models(config)
    for weight in models["diffusion_model"].weights:
        if weight.path.endswith("up_1_attn_1/norm1/beta"):  # tells what version 2 predicts
            weight.assign(0.05 * weight.value)
    path = tmp_path_factory.mktemp("plain") / f"{request.param}.safetensors"
    save_original(path, config, models, dtype="float32")
    save_file(load_file(path), path)
    return path, config, models


@pytest.fixture
def tensors(plain):
    return load_file(plain[0])


def check_parts(reader, config, models, parts=MAKE):
    for part in parts:
        check_equal(build(reader, part), models[part])


def build(reader, part):
    """Lets a reader build a component, and load its parameters."""
    return reader.build(part, lambda config, **_: make_empty(part, whole(part, config)))


@cache
def make_once(part, config):
    return MAKE[part](config)


def make_empty(part, config):
    """Returns a model whose parameters are NaN, always the same one, as building takes long."""
    model = make_once(part, config)
    for weight in model.weights:
        weight.assign(np.full(weight.shape, np.nan, "float32"))
    return model


def whole(part, config):
    """Returns a Config of which `config` is the part's."""
    name = {"text_encoder": "text", "diffusion_model": "unet"}.get(part, "vae")
    return replace(PLAIN_1, **{name: config})


class Pipeline:
    """What `save` asks of a pipeline."""

    def __init__(self, config, models, tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.__dict__ |= models

    def check_components(self, *components):
        assert set(components) <= vars(self).keys()


# Configs that shapes don't show


@pytest.mark.parametrize("name", CONFIGS)
def test_metadata_keeps_the_config(name, tmp_path):
    config = replace(CONFIGS[name], text=replace(CONFIGS[name].text, vocab_size=49410))
    models = random_models(config)
    tokenizer = SimpleTokenizer()
    tokenizer.add_tokens(["<one>", "Two"])
    path = tmp_path / "model.safetensors"
    save_original(path, config, models, tokenizer, "float32")
    reader = SingleFile(path)
    schedule = replace(config.schedule, clip_sample=False)
    assert reader.config == replace(config, schedule=schedule)
    assert reader.tokenizer().encoder == tokenizer.encoder
    for part, model in models.items():
        empty = MAKE[part](config)
        reader.load(part, empty)
        check_equal(empty, model)


@pytest.mark.parametrize("value", ["{", "[]", '{"unet/config.json": 3}', "[" * 100_000])
def test_damaged_metadata(value, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"first_stage_model.decoder.conv_in.weight": np.zeros((8, 4, 3, 3), "float32")}
    save_file(tensors, path, {CONFIG_KEY: value})
    with pytest.raises(ValueError, match=f"x.safetensors: {CONFIG_KEY} in its metadata is no JSON"):
        SingleFile(path)


def test_a_component_without_its_config(tmp_path):
    """Nothing is built from the config of Stable Diffusion 1, which is 100 times as large."""
    path, config = tmp_path / "x.safetensors", CONFIGS["v2"]
    save_original(path, config, random_models(config), dtype="float32")
    source = SafetensorsFiles(path)
    files = json.loads(source.metadata[CONFIG_KEY])
    del files["unet/config.json"]
    save_file(load_file(path), path, {CONFIG_KEY: json.dumps(files)})
    model = StableDiffusion(jit_compile=False, weights=path)
    with pytest.raises(ValueError, match="in its metadata has no unet/config.json"):
        model.diffusion_model  # noqa: B018
    assert model.decoder.count_params()


# Files of others


def test_shapes_show_the_config(plain):
    path, config, models = plain
    reader = open_checkpoint(path)
    assert reader.config == config
    check_parts(reader, config, models)


@pytest.mark.parametrize("config", [SD1_INPAINTING, SD2], ids=["1 inpainting", "2"])
def test_shapes_of_the_published_ones(config, tmp_path):
    with uninitialized():
        models = {part: make(config) for part, make in MAKE.items()}
    shapes = {
        slot.name: (slot.shape[0] * slot.rows, *slot.shape[1:])
        for part, model in models.items()
        for slot in find_slots(part, model, config)
    }
    layer = "transformer.resblocks.22."
    last = {k.replace(layer, layer.replace("2.", "3.")): v for k, v in shapes.items() if layer in k}
    assert len(last) == (12 if config == SD2 else 0)
    reader = SingleFile.__new__(SingleFile)
    reader.path = tmp_path / "x.safetensors"
    zeros = np.zeros(1)  # biases that vary little: it predicts noise
    reader.source = SimpleNamespace(
        shapes=shapes | last, metadata={}, read_tensor=lambda name: zeros, path=reader.path
    )
    reader.roots = SingleFile.find_roots(shapes)
    with pytest.warns(match="taken for") if config == SD2 else nullcontext():
        assert reader._detect_config() == undo_departures(config)
        reader.source.shapes = shapes  # as if somebody had taken the layer off that isn't used
        assert reader._detect_config() == undo_departures(config)


def test_names_as_published(plain, tensors):
    """Some names that https://github.com/CompVis/stable-diffusion and OpenCLIP have, by hand."""
    path, config, models = plain
    unet = "model.diffusion_model."
    names = {
        f"{unet}time_embed.2.weight": (256, 256),
        f"{unet}input_blocks.1.0.in_layers.0.weight": (64,),
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (64, 64),
        f"{unet}input_blocks.2.0.op.weight": (64, 64, 3, 3),
        f"{unet}input_blocks.3.0.skip_connection.weight": (128, 64, 1, 1),
        f"{unet}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (1024, 128),
        f"{unet}output_blocks.1.1.conv.weight": (128, 128, 3, 3),  # no attention on that level
        f"{unet}output_blocks.3.1.proj_out.weight": (64, 64, 1, 1),
        f"{unet}out.2.weight": (4, 64, 3, 3),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        "first_stage_model.decoder.up.3.block.0.conv1.weight": (64, 64, 3, 3),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        "first_stage_model.decoder.mid.attn_1.q.weight": (64, 64, 1, 1),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
    }
    if config == PLAIN_2:
        text = "cond_stage_model.model."
        names[f"{unet}output_blocks.3.1.proj_out.weight"] = (64, 64)
        names |= {
            f"{text}positional_embedding": (77, 64),
            f"{text}transformer.resblocks.1.attn.in_proj_weight": (192, 64),
            f"{text}transformer.resblocks.1.mlp.c_fc.bias": (128,),
            f"{text}ln_final.weight": (64,),
        }
    else:
        text = "cond_stage_model.transformer.text_model."
        names |= {
            f"{text}embeddings.position_embedding.weight": (77, 64),
            f"{text}encoder.layers.1.self_attn.q_proj.weight": (64, 64),
            f"{text}final_layer_norm.weight": (64,),
        }
    assert {name: tensors[name].shape for name in names} == names
    if config == PLAIN_2:
        layer = models["text_encoder"].layers[3].self_attn
        fused = [ops.convert_to_numpy(d.kernel).T for d in (layer.to_q, layer.to_k, layer.to_v)]
        stored = tensors["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
        np.testing.assert_array_equal(stored, np.concatenate(fused))


def test_what_others_have_beside_the_parts(plain, tensors, tmp_path):
    path, config, models = plain
    extra = ["betas", "model_ema.decay", "first_stage_model.loss.logvar", "control_model.x"]
    if config == PLAIN_2:
        text = "cond_stage_model.model."
        extra += [f"{text}text_projection", f"{text}logit_scale"]
    else:
        extra += ["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    tensors |= dict.fromkeys(extra, np.zeros(3, "int64"))
    save_file(tensors, tmp_path / "more.safetensors")
    reader = SingleFile(tmp_path / "more.safetensors")
    assert reader.config == config
    check_parts(reader, config, models)


@pytest.mark.parametrize("root", ["", "vae."])
def test_a_vae_alone(root, plain, tensors, tmp_path):
    path, config, models = plain
    start = "first_stage_model."
    vae = {root + k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    save_file(vae, tmp_path / "vae.safetensors")
    reader = SingleFile(tmp_path / "vae.safetensors")
    assert reader.config.vae == config.vae
    check_parts(reader, config, models, ["decoder", "image_encoder"])
    with pytest.raises(
        ValueError, match="vae.safetensors has no diffusion_model: none of its tensors is a mod"
    ):
        reader.build("diffusion_model", None)


def test_a_decoder_alone(plain, tensors, tmp_path):
    path, config, models = plain
    kept = {k: v for k, v in tensors.items() if ".decoder." in k or ".post_quant_conv." in k}
    save_file(kept, tmp_path / "x.safetensors")
    reader = SingleFile(tmp_path / "x.safetensors")
    assert reader.config.vae == config.vae
    check_parts(reader, config, models, ["decoder"])


def test_moving_average(plain, tensors, tmp_path):
    path, config, models = plain
    root = "model.diffusion_model."
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(root).replace(".", ""): value + 1
        for name, value in tensors.items()
        if name.startswith(root)
    }
    save_file(tensors | averages, tmp_path / "x.safetensors")
    check_parts(SingleFile(tmp_path / "x.safetensors"), config, models)
    reader = open_checkpoint(tmp_path / "x.safetensors", ema=True)
    model = build(reader, "diffusion_model")
    for actual, value in zip(model.weights, models["diffusion_model"].weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(actual), ops.convert_to_numpy(value) + 1)
    check_parts(reader, config, models, ["text_encoder", "decoder"])
    with pytest.raises(ValueError, match="has no moving average"):
        open_checkpoint(path, ema=True)


def test_what_it_predicts(plain, tensors, tmp_path):
    path, config, _ = plain
    file = tmp_path / "x.safetensors"

    def predicted(metadata=None, more=(), **arguments):
        save_file(tensors | dict.fromkeys(more, np.zeros(0, "float32")), file, metadata)
        return open_checkpoint(file, **arguments).config

    assert predicted().schedule.prediction_type == "epsilon"
    as_v = replace(config.schedule, prediction_type="v_prediction")
    size = 768 if config == PLAIN_2 else 512
    for found in (
        predicted({"modelspec.predict_key": "v"}),
        predicted({"modelspec.prediction_type": "v_prediction"}),
        predicted(more=["v_pred"]),
    ):
        assert found == replace(config, schedule=as_v, size=size)
    assert predicted(prediction_type="v_prediction") == replace(config, schedule=as_v, size=size)
    file.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert predicted().schedule == as_v
    assert predicted(prediction_type="epsilon").schedule.prediction_type == "epsilon"
    with pytest.raises(ValueError, match="prediction_type must be one of .*, not 'x'"):
        predicted(prediction_type="x")


def test_what_version_2_predicts_is_guessed(plain, tensors, tmp_path):
    """As other programs do: by the deviation of a bias in the last block with attention."""
    path, config, _ = plain
    name = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"
    size = tensors[name].size
    for deviation, expected in ((0.089, "epsilon"), (0.091, "v_prediction")):
        bias = np.where(np.arange(size) % 2, deviation, -deviation).astype("float32")
        save_file(tensors | {name: bias}, tmp_path / "x.safetensors")
        if config == PLAIN_1:  # always epsilon, without a warning
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert open_checkpoint(tmp_path / "x.safetensors").config == config
            continue
        with pytest.warns(UserWarning, match=f"x.safetensors does not say .* taken for {expected}"):
            found = open_checkpoint(tmp_path / "x.safetensors").config
        assert found.schedule.prediction_type == expected
        assert found.size == (768 if expected == "v_prediction" else 512)


def test_mark_of_zero_snr(plain, tensors, tmp_path):
    marks = dict.fromkeys(("v_pred", "ztsnr"), np.zeros(0, "float32"))
    save_file(tensors | marks, tmp_path / "x.safetensors")
    schedule = open_checkpoint(tmp_path / "x.safetensors").config.schedule
    assert schedule.zero_snr and schedule.alphas_cumprod[-1] == 0


def test_text_encoder_of_sd_turbo(plain, tensors, tmp_path):
    path, config, models = plain
    old, new = "cond_stage_model.model.", "conditioner.embedders.0.model."
    save_file({k.replace(old, new): v for k, v in tensors.items()}, tmp_path / "x.safetensors")
    reader = SingleFile(tmp_path / "x.safetensors")
    assert reader.config == config
    check_parts(reader, config, models, ["text_encoder"])


def test_parts_that_do_not_fit_each_other(plain, tensors, tmp_path):
    """Of version 1 or 2, and a UNet of wider contexts."""
    wide = {name: np.repeat(x, 2, -1) for name, x in tensors.items() if ".attn2.to_k.w" in name}
    save_file(tensors | wide, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match="attends to vectors of 128 numbers, but .* of 64"
    ) as error:
        open_checkpoint(tmp_path / "x.safetensors")
    assert str(tmp_path / "x.safetensors") in str(error.value)
    unet = {name: x for name, x in (tensors | wide).items() if name.startswith("model.")}
    save_file(unet, tmp_path / "x.safetensors")  # without a text encoder
    assert open_checkpoint(tmp_path / "x.safetensors").config.unet.context_width == 128


def test_unet_without_middle(tmp_path):
    config = replace(PLAIN_1, unet=replace(PLAIN_1.unet, middle=False))
    unet = random_models(config, ["diffusion_model"])
    save_original(tmp_path / "x.safetensors", config, unet)
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "x.safetensors")
    reader = SingleFile(tmp_path / "x.safetensors")
    assert reader.config.unet == config.unet
    check_parts(reader, config, unet, unet)


# Another VAE


def rename(tensors, old, new, start=""):
    return {k.replace(old, new): v for k, v in tensors.items() if k.startswith(start)}


def test_names_of_diffusers_in_the_vaes_attention(plain, tensors, tmp_path):
    path, config, models = plain
    for old, new in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        tensors = rename(tensors, f".attn_1.{old}.", f".attn_1.{new}.")
    save_file(tensors, tmp_path / "x.safetensors")
    check_parts(SingleFile(tmp_path / "x.safetensors"), config, models, ["decoder"])


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """Another VAE, of two stages, in all forms: dict to the path; its config and models."""
    config = replace(PLAIN_1, vae=replace(PLAIN_1.vae, widths=(32, 64), scaling_factor=0.5))
    halves = ("decoder", "image_encoder")
    models = {half: MAKE[half](config) for half in halves}
    for model in models.values():
        model.set_weights([np.random.default_rng(0).normal(size=v.shape) for v in model.weights])
    folder = tmp_path_factory.mktemp("vaes")
    save_diffusers(folder / "folder", config, models)
    only = folder / "folder/vae/diffusion_pytorch_model.safetensors"
    save_original(folder / "whole.safetensors", config, models)
    tensors = load_file(folder / "whole.safetensors")
    save_file(tensors, folder / "plain.safetensors")
    save_file(rename(tensors, "first_stage_model.", ""), folder / "bare.safetensors")
    decoder = {k: v for k, v in load_file(only).items() if "encoder." not in k and "quant_c" in k}
    decoder |= {k: v for k, v in load_file(only).items() if k.startswith("decoder.")}
    save_file(decoder, folder / "decoder.safetensors")
    paths = {name: folder / f"{name}.safetensors" for name in ("whole", "plain", "bare", "decoder")}
    paths |= {"diffusers": only, "folder": folder / "folder", "vae folder": only.parent}
    return paths, config, models


@pytest.mark.parametrize(
    "form", ["whole", "plain", "bare", "decoder", "diffusers", "folder", "vae folder"]
)
def test_another_vae(form, plain, vaes):
    path, config, _ = plain
    paths, other, models = vaes
    said = form in ("whole", "folder", "vae folder")  # whether a config says the scaling factor
    reader = open_checkpoint(path, vae=paths[form])
    factor = 0.5 if said else config.vae.scaling_factor
    assert reader.config.vae == replace(other.vae, scaling_factor=factor)
    assert reader.config.unet == replace(config.unet, cell_size=2) and reader.config.size == 128
    for half, model in models.items():
        if form == "decoder" and half == "image_encoder":
            with pytest.raises(ValueError, match="has no image_encoder.*Pass the path of a VAE"):
                reader.check(half)
            continue
        check_equal(build(reader, half), model)
    assert build(reader, "text_encoder")


def test_a_vae_of_other_latents(plain, tmp_path):
    vae = replace(PLAIN_1.vae, latent_channels=8)
    with pytest.raises(ValueError, match="vae must have latents of 4 channels.* not of 8"):
        open_checkpoint(plain[0], vae=Reader(replace(PLAIN_1, vae=vae)))


def test_a_missing_vae_is_found_before_the_first_step(plain, tensors, vaes, tmp_path):
    kept = {k: v for k, v in tensors.items() if not k.startswith("first_stage")}
    save_file(kept, tmp_path / "x.safetensors")
    pipeline = StableDiffusion(128, 128, False, tmp_path / "x.safetensors")
    pipeline.encode_text = pipeline.generate_latents = None  # neither is called
    with pytest.raises(ValueError, match="x.safetensors has no decoder.*Pass the path of a VAE as"):
        pipeline.text_to_image("a", num_steps=2, verbose=0)
    StableDiffusion(weights=tmp_path / "x.safetensors", vae=vaes[0]["bare"]).checkpoint.check(
        "decoder"
    )


# What doesn't fit


@pytest.mark.parametrize("kind", ["missing", "unused", "misshapen", "not float"])
def test_one_tensor_that_does_not_fit(kind, plain, tensors, tmp_path):
    path, config, models = plain
    name = "model.diffusion_model.out.2.bias"
    if kind == "missing":
        del tensors[name]
    elif kind == "unused":
        tensors["model.diffusion_model.extra"] = np.zeros(2, "float32")
    elif kind == "misshapen":
        tensors[name] = np.zeros(5, "float32")
    else:
        tensors[name] = np.zeros(4, "int32")
    save_file(tensors, tmp_path / "x.safetensors")
    reader = SingleFile(tmp_path / "x.safetensors")
    model = MAKE["diffusion_model"](config)
    before = [ops.convert_to_numpy(weight).copy() for weight in model.weights]
    with pytest.raises(
        ValueError, match=rf"unchanged: 1 {kind} \([^;]*\)\. The file looks like St"
    ):
        reader.load("diffusion_model", model)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)


def test_the_first_ten_of_many(plain, tensors, tmp_path):
    path, config, models = plain
    names = [f"model.diffusion_model.x{n:02}" for n in range(11)]
    save_file(tensors | dict.fromkeys(names, np.zeros(1, "float32")), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"11 unused \(.*x09, \.\.\.\)"):
        SingleFile(tmp_path / "x.safetensors").load(
            "diffusion_model", MAKE["diffusion_model"](config)
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anything", "has no component of a Stable Diffusion in the original layout"),
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL, which isn't support"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3, which isn't supported"),
        ("lora_unet_mid.lora_down.weight", "The file looks like a LoRA, which load_lora loads"),
        ("lora_te2_x.lora_down.weight", "looks like a LoRA for Stable Diffusion XL, which isn't"),
        ("lora_unet_x_transformer_blocks_1_attn1_to_q.lora_up.weight", "a LoRA for Stable Diff"),
        ("down_blocks.0.resnets.0.time_emb_proj.bias", "looks like a UNet in diffusers' layout"),
    ],
)
def test_other_families(name, message, tmp_path):
    save_file({name: np.zeros(2, "float32")}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        StableDiffusion(weights=tmp_path / "x.safetensors")


def test_levels_that_differ(plain, tensors, tmp_path):
    root = "model.diffusion_model.input_blocks."
    kept = {k: v for k, v in tensors.items() if not k.startswith((f"{root}3.", f"{root}4."))}
    save_file(kept, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is no Stable Diffusion 1 or 2: it has no"):
        SingleFile(tmp_path / "x.safetensors")


# Writing


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    models = random_models(PLAIN_2, ["text_encoder"])
    save_original(tmp_path / "x.safetensors", PLAIN_2, models, dtype=dtype)
    reader = SingleFile(tmp_path / "x.safetensors")
    empty = MAKE["text_encoder"](PLAIN_2)
    reader.load("text_encoder", empty)
    check_equal(empty, models["text_encoder"], cast=dtype)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        half = MAKE["text_encoder"](PLAIN_2)
        reader.load("text_encoder", half)
        assert {keras.backend.standardize_dtype(w.dtype) for w in half.weights} == {dtype}
        for weight, other in zip(half.weights, empty.weights, strict=True):
            np.testing.assert_array_equal(
                ops.convert_to_numpy(ops.cast(weight, "float32")), ops.convert_to_numpy(other)
            )
    finally:
        keras.config.set_dtype_policy(before)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    models = random_models(PLAIN_1, ["decoder"])
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    models["decoder"].weights[0].assign(ops.full(models["decoder"].weights[0].shape, 1e6))
    with pytest.raises(ValueError, match="not finite in float16; float32 and bfloat16 can"):
        save_original(path, PLAIN_1, models, dtype="float16")
    with pytest.raises(ValueError, match="must end in .safetensors, not '.*x.ckpt'"):
        save_original(tmp_path / "x.ckpt", PLAIN_1, models)
    with pytest.raises(ValueError, match="components are .*, not unet"):
        save_original(path, PLAIN_1, {"unet": models["decoder"]})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def open_file(path):
    tensors = {name: (x.dtype, x.shape, x.tobytes()) for name, x in load_file(path).items()}
    return tensors, SafetensorsFiles(path).metadata


@pytest.mark.large
@pytest.mark.parametrize("version", PLAIN)
def test_every_format_to_every_other(version, tmp_path):
    """Loads each format and writes each: what is in the files is the same, bit for bit."""
    config = PLAIN[version]
    tokenizer = SimpleTokenizer()
    config = replace(config, text=replace(config.text, vocab_size=len(tokenizer.vocab)))
    first = Pipeline(config, random_models(config), tokenizer)

    def write(pipeline, name):
        for format in (known for known in FORMATS if known != "openvino"):  # which is for drawing
            path = tmp_path / name / (f"{format}.safetensors" if format == "original" else format)
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(pipeline, path, format)
            yield path

    paths = list(write(first, "first"))
    for path in paths:
        pipeline = StableDiffusion(jit_compile=False, weights=path)
        assert pipeline.config == config, path
        assert pipeline.tokenizer.encoder == tokenizer.encoder
        for part in MAKE:
            check_equal(getattr(pipeline, part), getattr(first, part))
        for old, new in zip(paths, write(pipeline, path.stem), strict=True):
            files = [p for p in (old.rglob("*") if old.is_dir() else [old]) if p.is_file()]
            for file in files:
                other = new / file.relative_to(old) if old.is_dir() else new
                if file.suffix == ".safetensors":  # whose metadata are in any order
                    assert open_file(file) == open_file(other), other
                elif file.suffix != ".h5":  # which has times in it
                    assert file.read_bytes() == other.read_bytes(), other


def test_arguments_of_save(tmp_path):
    pipeline = StableDiffusion(weights=None, config=PLAIN_1)
    with pytest.raises(ValueError, match="format must be one of diffusers, .*, not 'pickle'"):
        pipeline.save(tmp_path / "x", "pickle")
    with pytest.raises(ValueError, match="dtype must be one of float32, .*, not 'int8'"):
        pipeline.save(tmp_path / "x", dtype="int8")
    with pytest.raises(ValueError, match="keras format has the dtype of the models, float32"):
        pipeline.save(tmp_path / "x", "keras", "float16")
    assert not list(tmp_path.iterdir())


# PyTorch's files


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_ckpt(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        file.writestr("archive/version", "3\n")


def test_a_pickle_is_never_run(tmp_path):
    trace = tmp_path / "trace"
    write_ckpt(tmp_path / "x.ckpt", {"state_dict": Malicious(trace)})
    with pytest.raises(ValueError, match="refused, and nothing in it was run.* posix.mkdir$"):
        StableDiffusion(weights=tmp_path / "x.ckpt")
    pickle.loads(pickle.dumps({"state_dict": Malicious(trace)}))  # it would have left a trace
    assert trace.exists()


def test_torch_file_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    write_ckpt(tmp_path / "x.ckpt", {})
    with pytest.raises(ValueError, match="x.ckpt is a PyTorch file: .*: pip install torch$"):
        StableDiffusion(weights=tmp_path / "x.ckpt")


@pytest.mark.torch
def test_torch_file(plain, tensors, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch reads these files, and isn't installed")
    path, config, models = plain
    tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "x.ckpt")
    # A folder with this file only, under any name, is this file.
    torch.save(tensors, tmp_path / "X.PT", _use_new_zipfile_serialization=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "X.PT").rename(tmp_path / "folder" / "X.PT")
    for path in (tmp_path / "x.ckpt", tmp_path / "folder"):
        reader = open_checkpoint(path)
        assert reader.config == config
        check_parts(reader, config, models)


def test_a_safetensors_file_of_any_name(plain, tmp_path):
    path, config, models = plain
    (tmp_path / "folder").mkdir()
    for name in ("x.ckpt", "x.SFT", "x", "folder/x.SafeTensors"):
        shutil.copy(path, tmp_path / name)
        assert open_checkpoint(tmp_path / name).config == config
    assert open_checkpoint(tmp_path / "folder").config == config


def test_metadata_is_in_words_of_diffusers(plain, tmp_path):
    path, config, models = plain
    save_original(tmp_path / "x.safetensors", config, {"decoder": models["decoder"]})
    files = json.loads(SingleFile(tmp_path / "x.safetensors").source.metadata[CONFIG_KEY])
    assert files["vae/config.json"]["block_out_channels"] == list(config.vae.widths)
    assert "tokenizer/merges.txt" not in files  # CLIP's
