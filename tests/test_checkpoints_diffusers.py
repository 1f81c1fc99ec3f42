"""Folders in diffusers' layout: what is written is read back, and what doesn't fit is refused.

Parameters are copied, so they are compared for equality. That the layout is diffusers' own shows
tests/test_diffusers_golden.py, and the last test here, which needs diffusers.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import CONFIGS, GOLDEN, MAKE, SMALL, check_equal, random_models, write_merges
from keras import ops
from safetensors.numpy import load_file, save_file

from stable_diffusion import (
    SimpleTokenizer,
    StableDiffusion,
    TextEncoder,
)
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.checkpoints.diffusers import DiffusersFolder, choose_file, save_diffusers
from stable_diffusion.checkpoints.diffusers_config import read_config, read_config_files
from stable_diffusion.config import TINY, TINY_V2, SamplerConfig, undo_departures


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer of 80 pairs, 594 tokens."""
    return SimpleTokenizer(write_merges(tmp_path_factory.mktemp("vocabulary") / "merges.txt", 80))


@pytest.fixture(scope="session")
def tiny():
    return random_models(SMALL)


@pytest.fixture(scope="session")
def saved(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_diffusers(folder, SMALL, tiny, tokenizer, "float32")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tokenizer, tmp_path):
    config = CONFIGS[name]
    models = random_models(config)
    save_diffusers(tmp_path / "model", config, models, tokenizer, "float32")
    reader = DiffusersFolder(tmp_path / "model")
    schedule = replace(config.schedule, clip_sample=False)
    assert reader.config == replace(config, schedule=schedule)
    assert reader.tokenizer().encoder == tokenizer.encoder
    for part, model in models.items():
        empty = MAKE[part](config)
        reader.load(part, empty)
        check_equal(empty, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_round_trip_at_half_precision(tiny, tokenizer, tmp_path, dtype):
    save_diffusers(tmp_path / "model", SMALL, tiny, tokenizer, dtype)
    reader = DiffusersFolder(tmp_path / "model")
    for part in ("text_encoder", "decoder"):
        model = MAKE[part](SMALL)
        reader.load(part, model)
        check_equal(model, tiny[part], cast=dtype)
    save_diffusers(tmp_path / "again", SMALL, {"text_encoder": reader_model(reader)}, None, dtype)
    first, second = (
        (tmp_path / name / "text_encoder" / "model.safetensors").read_bytes()
        for name in ("model", "again")
    )
    assert first == second


def reader_model(reader):
    model = MAKE["text_encoder"](reader.config)
    reader.load("text_encoder", model)
    return model


def test_pipeline(saved, tiny):
    pipeline = StableDiffusion(weights=saved, jit_compile=False)
    for part, model in tiny.items():
        check_equal(getattr(pipeline, part), model)
    assert pipeline.encode_text("a cat").shape == (1, 77, 32)


def test_added_tokens(tmp_path, tokenizer):
    mine = SimpleTokenizer()
    mine.add_tokens(["<zebra>", "<ape>"])
    config = replace(SMALL, text=replace(SMALL.text, width=4, heads=1, depth=1, hidden=4))
    model = TextEncoder(77, len(mine.vocab), config=config.text, download_weights=False)
    save_diffusers(tmp_path / "model", config, {"text_encoder": model}, mine)
    reader = DiffusersFolder(tmp_path / "model")
    assert reader.config.text.vocab_size == 49410
    assert reader.tokenizer().encode("an <ape>") == mine.encode("an <ape>")
    assert reader.tokenizer().encode("an <ape>")[-2] == 49409


def test_older_names_of_the_attention_in_the_vae(folder, tiny):
    """Files from before diffusers 0.15, as matrices and as convolutions."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for ours, theirs in old.items() if ".attentions." in name else ():
            name = name.replace(f".{ours}.", f".{theirs}.")
        is_matrix = ".attentions." in name and tensor.ndim == 2 and "key" not in name
        tensors[name] = tensor[..., None, None] if is_matrix else tensor
    save_file(tensors, path)
    for part in ("decoder", "image_encoder"):
        model = MAKE[part](SMALL)
        DiffusersFolder(folder).load(part, model)
        check_equal(model, tiny[part])


def test_harmless_tensors_are_ignored(folder, tiny):
    path = folder / "text_encoder" / "model.safetensors"
    extra = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    save_file(load_file(path) | extra, path)
    model = MAKE["text_encoder"](SMALL)
    DiffusersFolder(folder).load("text_encoder", model)
    check_equal(model, tiny["text_encoder"])


def shard(path, name="model-2.safetensors"):
    """Cuts a file in two, the second called `name`."""
    tensors = load_file(path)
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, path.with_name(file), {"format": "pt"})
    path.unlink()
    where = {n: file for file, part in files.items() for n in part}
    where = {n: name if file == "model-2.safetensors" else file for n, file in where.items()}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_and_fp16_names(folder, tiny):
    text = folder / "text_encoder" / "model.safetensors"
    shard(text)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for part in ("text_encoder", "diffusion_model"):
        model = MAKE[part](SMALL)
        DiffusersFolder(folder).load(part, model)
        check_equal(model, tiny[part])


@pytest.mark.parametrize("name", ["../model-2.safetensors", "/model-2.safetensors", "model.txt"])
def test_index_that_leaves_the_folder(folder, name):
    shard(folder / "text_encoder" / "model.safetensors", name)
    with pytest.raises(ValueError, match="which is no .safetensors file beside it"):
        DiffusersFolder(folder).load("text_encoder", MAKE["text_encoder"](SMALL))


def test_index_of_a_missing_file(folder):
    shard(folder / "text_encoder" / "model.safetensors", "model-3.safetensors")
    with pytest.raises(ValueError, match="'model-3.safetensors', which is missing"):
        DiffusersFolder(folder).load("text_encoder", MAKE["text_encoder"](SMALL))


def test_tensors_that_do_not_fit_are_listed_and_none_is_loaded(folder):
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.final_layer_norm.bias"]
    tensors["text_model.embeddings.token_embedding.weight"] = np.zeros((601, 32), "float32")
    tensors |= {f"extra.{n:02}": np.zeros(1, "float32") for n in range(12)}
    save_file(tensors, path)
    model = MAKE["text_encoder"](SMALL)
    before = [ops.convert_to_numpy(v) for v in model.weights]
    with pytest.raises(ValueError) as error:
        DiffusersFolder(folder).load("text_encoder", model)
    message = str(error.value)
    assert str(path) in message
    assert "1 missing (text_model.final_layer_norm.bias)" in message
    assert "12 unused (extra.00, " in message and "extra.09, ...)" in message
    assert (
        "1 misshapen (text_model.embeddings.token_embedding.weight (601, 32), not (600, 32))"
        in (message)
    )
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


@pytest.mark.parametrize("kind", ["missing", "unused", "misshapen"])
def test_one_tensor_that_does_not_fit(folder, kind):
    path = folder / "text_encoder" / "model.safetensors"
    tensors, name = load_file(path), "text_model.final_layer_norm.bias"
    if kind == "unused":
        tensors["extra"] = tensors[name]
    elif kind == "misshapen":
        tensors[name] = tensors[name][:-1]
    else:
        del tensors[name]
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=rf"which is unchanged: 1 {kind} \([^;]*\)\. The file looks like"
    ):
        DiffusersFolder(folder).load("text_encoder", MAKE["text_encoder"](SMALL))


@pytest.mark.parametrize("size", [4, 1000, -1])
def test_truncated_file(folder, size):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is no intact safetensors file"):
        DiffusersFolder(folder).load("text_encoder", MAKE["text_encoder"](SMALL))


def test_no_file_of_parameters(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=r"no model\.safetensors in .*text_encoder, nor"):
        DiffusersFolder(folder).load("text_encoder", MAKE["text_encoder"](SMALL))


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["fp16.safetensors", "bin", "safetensors"], None, "safetensors"),
        (["fp16.safetensors", "bin", "safetensors.index.json"], None, "safetensors.index.json"),
        (["fp16.safetensors", "bin", "ema.safetensors"], None, "fp16.safetensors"),
        (["safetensors.index.fp16.json", "bin"], None, "safetensors.index.fp16.json"),
        (["fp16.bin", "bin"], None, "bin"),
        (["bin.index.json"], None, "bin.index.json"),
        (["fp16.bin", "non_ema.bin"], None, "fp16.bin"),
        (["safetensors", "fp16.safetensors", "fp16.bin"], "fp16", "fp16.safetensors"),
        (["safetensors", "non_ema.bin"], "non_ema", "non_ema.bin"),
        (["safetensors", "non_ema.bin"], "ema", "safetensors"),
        (["safetensors", "safetensors.index.ema.json"], "ema", "safetensors.index.ema.json"),
        (["ema.safetensors", "ema-00001-of-00002.safetensors"], "ema", "ema.safetensors"),
    ],
)
def test_which_file(names, variant, expected):
    stem = "diffusion_pytorch_model."
    names = [stem + name for name in names] + ["config.json", "model.safetensors"]
    assert choose_file(Path("unet"), names, variant) == stem + expected


def test_only_variants():
    names = ["diffusion_pytorch_model.ema.safetensors", "diffusion_pytorch_model.non_ema.bin"]
    with pytest.raises(ValueError, match="unet has only .*: pass variant='ema' or 'non_ema'"):
        choose_file(Path("unet"), names)
    with pytest.raises(ValueError, match="no model.safetensors in text_encoder"):
        choose_file(Path("text_encoder"), names)


def test_variant_of_one_component(folder, tiny):
    """Components that have no such file are loaded as usual."""
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.ema.safetensors"))
    unet.write_text("the plain one is not opened")
    reader = open_checkpoint(folder, variant="ema")
    for part in ("text_encoder", "diffusion_model"):
        model = MAKE[part](SMALL)
        reader.load(part, model)
        check_equal(model, tiny[part])
    with pytest.raises(ValueError, match=r"folder has \(ema\), not 'fp16'"):
        StableDiffusion(weights=folder, variant="fp16")
    with pytest.raises(ValueError, match="variant must be None, except for a folder in diffusers'"):
        open_checkpoint("sd1.4", variant="fp16")


@pytest.mark.torch
def test_only_bin(folder, tiny):
    torch = pytest.importorskip("torch", reason="PyTorch reads these files, and isn't installed")
    shard(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for path in [*folder.rglob("*.safetensors")]:
        tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
        name = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(tensors, path.with_name(f"{name}.bin"))
        path.unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    where = {name: file.replace("safetensors", "bin") for name, file in where.items()}
    index.with_name("diffusion_pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": where})
    )
    index.unlink()
    for part in MAKE:
        model = MAKE[part](SMALL)
        DiffusersFolder(folder).load(part, model)
        check_equal(model, tiny[part])


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableUnCLIPImg2ImgPipeline"])
def test_folders_of_other_families(name, folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"the folder has Stable .* \\({name}\\), not supported"):
        DiffusersFolder(folder)


def test_missing_part(folder):
    shutil.rmtree(folder / "unet")
    pipeline = StableDiffusion(64, 64, weights=folder, jit_compile=False)
    assert pipeline.text_encoder is not None
    with pytest.raises(ValueError, match=r"diffusion_model can't be loaded: there is no .*unet"):
        _ = pipeline.diffusion_model


def test_missing_scheduler_is_stable_diffusions(folder):
    shutil.rmtree(folder / "scheduler")
    assert DiffusersFolder(folder).config.schedule == undo_departures(SMALL).schedule


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"_class_name": "PNDMScheduler"}, {"final_alpha": None}),
        ({"_class_name": "DDIMScheduler"}, {"final_alpha": 1.0}),
        ({"_class_name": "EulerDiscreteScheduler", "steps_offset": 1}, {"final_alpha": 1.0}),
        ({"set_alpha_to_one": False, "timestep_spacing": "trailing"}, {"spacing": "trailing"}),
        ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
    ],
)
def test_schedulers(folder, changes, expected):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"beta_start": 0.001, "beta_end": 0.01} | changes))
    schedule = DiffusersFolder(folder).config.schedule
    assert (schedule.beta_start, schedule.beta_end, schedule.steps_offset) == (0.001, 0.01, 1)
    assert {name: getattr(schedule, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "DDIMScheduler"}, SamplerConfig()),
        ({}, SamplerConfig()),
        ({"_class_name": "PNDMScheduler"}, SamplerConfig("PNDMScheduler")),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
            SamplerConfig("EulerDiscreteScheduler"),
        ),
        (
            {"_class_name": "EulerAncestralDiscreteScheduler"},
            SamplerConfig("EulerAncestralDiscreteScheduler", spacing="linspace"),
        ),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "use_karras_sigmas": True,
                "timestep_spacing": "trailing",
            },
            SamplerConfig("DPMSolverMultistepScheduler", "sde-dpmsolver++", "karras"),
        ),
        ({"_class_name": "Best", "use_karras_sigmas": None}, SamplerConfig("Best")),
    ],
)
def test_the_sampler_that_it_names_is_kept(folder, tmp_path, changes, expected):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"beta_start": 0.001, "beta_end": 0.01} | changes))
    config = DiffusersFolder(folder).config
    assert config.sampler == expected
    save_diffusers(tmp_path / "again", config, {})
    files = read_config_files(tmp_path / "again")
    found = read_config("here", files)
    assert (found.sampler, found.schedule) == (expected, config.schedule)
    assert files["model_index.json"]["scheduler"] == ["diffusers", expected.scheduler]


def test_activations_and_heads(folder):
    edit(folder / "text_encoder" / "config.json", hidden_act="gelu_new")
    edit(folder / "unet" / "config.json", attention_head_dim=8)
    edit(folder / "tokenizer" / "special_tokens_map.json", pad_token={"content": "!"})
    edit(folder / "tokenizer" / "tokenizer_config.json", pad_token={"content": "!"})
    config = DiffusersFolder(folder).config
    assert config.text.activation == "gelu_tanh"
    assert config.unet.heads == (8, 8)
    assert config.text.pad_token == 0


@pytest.mark.parametrize(
    "file, key, value, supported",
    [
        ("unet/config.json", "act_fn", "gelu", "'silu'"),
        ("unet/config.json", "num_attention_heads", 8, "None"),
        ("unet/config.json", "class_embed_type", "timestep", "None"),
        ("unet/config.json", "transformer_layers_per_block", [1, 2], "1"),
        ("unet/config.json", "attention_head_dim", [2, 4, 8], "an int or a list of 2"),
        ("unet/config.json", "attention_head_dim", 5, "an int or a list of 2"),
        ("unet/config.json", "block_out_channels", [], "a list of positive ints"),
        ("unet/config.json", "block_out_channels", None, "a list of positive ints"),
        ("unet/config.json", "cross_attention_dim", [32, 64], "a positive int"),
        ("unet/config.json", "layers_per_block", True, "a positive int"),
        ("unet/config.json", "use_linear_projection", "yes", "of type bool"),
        ("unet/config.json", "sample_size", [8, 8], "a positive int"),
        ("unet/config.json", "down_block_types", ["DownBlock2D", "AttnDownBlock2D"], "2 of 'Cr"),
        ("unet/config.json", "up_block_types", ["UpBlock2D", "UpBlock2D"], "to match down_block"),
        ("vae/config.json", "shift_factor", 0.1, "None"),
        ("vae/config.json", "scaling_factor", "0.18", "a number"),
        ("vae/config.json", "up_block_types", ["UpDecoderBlock2D"], "'UpDecoderBlock2D', 'UpDeco"),
        ("text_encoder/config.json", "hidden_act", "relu", "one of 'quick_gelu', 'gelu'"),
        ("text_encoder/config.json", "max_position_embeddings", 248, "77"),
        ("text_encoder/config.json", "num_attention_heads", 5, "a divisor of hidden_size"),
        (
            "scheduler/scheduler_config.json",
            "beta_schedule",
            "squaredcos_cap_v2",
            "'scaled_linear'",
        ),
        ("scheduler/scheduler_config.json", "prediction_type", "flow", "'v_prediction'"),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", 1, "of type bool"),
        ("scheduler/scheduler_config.json", "set_alpha_to_one", 1, "true or false"),
        ("scheduler/scheduler_config.json", "_class_name", ["DDIMScheduler"], "of type str"),
        ("scheduler/scheduler_config.json", "_class_name", "DDIM\udcff", "a name"),
        ("scheduler/scheduler_config.json", "algorithm_type", 2, "of type str"),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", 1, "true or false"),
        ("tokenizer/tokenizer_config.json", "pad_token", "#", "one of '<|endoftext|>', '!'"),
    ],
)
def test_unsupported_configs(folder, file, key, value, supported):
    edit(folder / file, **{key: value})
    with pytest.raises(ValueError) as error:
        DiffusersFolder(folder)
    message = str(error.value)
    assert str(folder / file) in message
    assert f"{key} must be " in message and supported in message and repr(value) in message


def test_the_text_encoders_width_is_the_unets(folder):
    unet, text = folder / "unet" / "config.json", folder / "text_encoder" / "config.json"
    edit(unet, cross_attention_dim=48)
    with pytest.raises(ValueError) as error:
        StableDiffusion(weights=folder)
    expected = f"{unet}: cross_attention_dim must be 32, which is hidden_size in {text}, not 48."
    assert str(error.value) == expected
    text.unlink()  # a UNet alone
    assert DiffusersFolder(folder).config.unet.context_width == 48


NAN, INF, HUGE = float("nan"), float("inf"), 10**9
UNET, VAE = "unet/config.json", "vae/config.json"
TEXT, SCHEDULER = "text_encoder/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    "file, key, value",
    [
        (TEXT, "hidden_size", 0),
        (TEXT, "hidden_size", -16),
        (TEXT, "hidden_size", "16"),
        (TEXT, "num_hidden_layers", HUGE),
        (TEXT, "num_hidden_layers", 2.0),
        (TEXT, "num_attention_heads", 3),
        (TEXT, "num_attention_heads", 0),
        (TEXT, "intermediate_size", True),
        (TEXT, "vocab_size", HUGE),
        (TEXT, "hidden_act", None),
        (TEXT, "hidden_act", ["gelu"]),
        (TEXT, "layer_norm_eps", NAN),
        (UNET, "block_out_channels", [8] * 1000),
        (UNET, "block_out_channels", [8, HUGE]),
        (UNET, "block_out_channels", [8, NAN]),
        (UNET, "block_out_channels", [8, -8]),
        (UNET, "block_out_channels", "88"),
        (UNET, "attention_head_dim", [2, 0]),
        (UNET, "attention_head_dim", 3),
        (UNET, "attention_head_dim", 0),
        (UNET, "attention_head_dim", True),
        (UNET, "attention_head_dim", INF),
        (UNET, "norm_num_groups", 3),
        (UNET, "norm_num_groups", 0),
        (UNET, "norm_epsilon", NAN),
        (UNET, "norm_epsilon", -1e-6),
        (UNET, "in_channels", HUGE),
        (UNET, "in_channels", 4.0),
        (UNET, "out_channels", 0),
        (UNET, "cross_attention_dim", -16),
        (UNET, "layers_per_block", 10_000),
        (UNET, "sample_size", HUGE),
        (UNET, "sample_size", 0),
        (UNET, "sample_size", False),
        (UNET, "sample_size", NAN),
        (UNET, "down_block_types", [["DownBlock2D"], 1]),
        (UNET, "mid_block_type", []),
        (VAE, "block_out_channels", [8] * 64),
        (VAE, "block_out_channels", []),
        (VAE, "norm_num_groups", 3),
        (VAE, "latent_channels", 0),
        (VAE, "latent_channels", "4"),
        (VAE, "layers_per_block", -1),
        (VAE, "scaling_factor", 0),
        (VAE, "scaling_factor", 0.0),
        (VAE, "scaling_factor", -0.18),
        (VAE, "scaling_factor", NAN),
        (VAE, "scaling_factor", INF),
        (VAE, "scaling_factor", True),
        (SCHEDULER, "num_train_timesteps", HUGE),
        (SCHEDULER, "num_train_timesteps", 0),
        (SCHEDULER, "num_train_timesteps", 1e3),
        (SCHEDULER, "beta_start", NAN),
        (SCHEDULER, "beta_start", -0.001),
        (SCHEDULER, "beta_start", 0),
        (SCHEDULER, "beta_end", 0.0001),  # below beta_start
        (SCHEDULER, "beta_end", INF),
        (SCHEDULER, "beta_end", 1.0),
        (SCHEDULER, "beta_end", "0.012"),
        (SCHEDULER, "steps_offset", -1),
        (SCHEDULER, "steps_offset", 1000),
        (SCHEDULER, "prediction_type", None),
        (SCHEDULER, "timestep_spacing", ["leading"]),
        (SCHEDULER, "trained_betas", [0.1, NAN]),
        ("model_index.json", "_guidance_scale", NAN),
        ("model_index.json", "_guidance_scale", -1),
        ("model_index.json", "_guidance_scale", "7.5"),
    ],
)
def test_values_that_no_model_can_have(file, key, value):
    files = read_config_files(GOLDEN / "v1")
    files[file] = files.get(file, {}) | {key: value}
    with pytest.raises(ValueError) as error:
        read_config("here", files)
    message = str(error.value)
    assert message.startswith(f"here/{file}: ") and key in message and len(message) < 500


@pytest.mark.parametrize(
    "key, single",
    [
        ("cross_attention_dim", 16),
        ("layers_per_block", 1),
        ("only_cross_attention", False),
        ("transformer_layers_per_block", 1),
        ("attention_head_dim", 2),
    ],
)
def test_lists_of_one_value_for_all_stages(key, single):
    files = read_config_files(GOLDEN / "v1")

    def read(value):
        return read_config("here", files | {UNET: files[UNET] | {key: value}})

    assert read([single, single]) == read(single)
    wrong = [[single] * 3, []]
    wrong += [] if key == "attention_head_dim" else [[single, 2]]
    for value in wrong:
        with pytest.raises(ValueError, match=f"unet/config.json: {key} must be "):
            read(value)


@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_leading_timesteps_have_an_offset(spacing, offset):
    files = read_config_files(GOLDEN / "v1")
    files[SCHEDULER] |= {"steps_offset": 0, "timestep_spacing": spacing}
    schedule = read_config("here", files).schedule
    assert (schedule.spacing, schedule.steps_offset) == (spacing, offset)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_files_that_are_no_json_object(folder, text):
    (folder / "unet" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"unet/config\.json"):
        DiffusersFolder(folder)


def test_folder_without_configs(tmp_path):
    with pytest.raises(ValueError, match="has none of"):
        DiffusersFolder(tmp_path)


def test_vocabulary_that_does_not_follow_from_the_merges(folder):
    edit(folder / "tokenizer" / "vocab.json", **{"!": 1, '"': 0})
    with pytest.raises(ValueError, match="vocab.json contradicts"):
        DiffusersFolder(folder).tokenizer()


def test_added_token_out_of_order(folder):
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<new>": 599}')
    with pytest.raises(ValueError, match="gives '<new>' the id 599"):
        DiffusersFolder(folder).tokenizer()


@pytest.mark.parametrize("joined", [True, False])
def test_tokenizer_in_one_file(folder, tokenizer, joined):
    """As transformers 5 writes it; before, pairs were joined by a space."""
    parts = folder / "tokenizer"
    pairs = (parts / "merges.txt").read_text().splitlines()[1:]
    vocab = json.loads((parts / "vocab.json").read_text())
    added = {"<|endoftext|>": vocab["<|endoftext|>"], "<new>": len(vocab)}
    model = {"vocab": vocab, "merges": pairs if joined else [pair.split() for pair in pairs]}
    data = {"model": model, "added_tokens": [{"content": t, "id": n} for t, n in added.items()]}
    for name in ("merges.txt", "vocab.json", "special_tokens_map.json"):
        (parts / name).unlink()
    (parts / "tokenizer.json").write_text(json.dumps(data))
    edit(folder / "text_encoder" / "config.json", vocab_size=len(vocab) + 1)
    found = DiffusersFolder(folder).tokenizer()
    assert found.vocab == [*tokenizer.vocab, "<new>"]
    end = tokenizer.end_of_text
    assert found.encode("a cat <new>") == [*tokenizer.encode("a cat")[:-1], len(vocab), end]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"model": 1},
        {"model": {"vocab": {}, "merges": [["a"]]}, "added_tokens": []},
        {"model": {"vocab": {}, "merges": [["a", "\ud800"]]}, "added_tokens": []},
    ],
)
def test_damaged_tokenizer_in_one_file(folder, data):
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer of CLIP's kind"):
        DiffusersFolder(folder)


def test_ids_that_are_no_numbers(folder):
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<new>": [1]}')
    with pytest.raises(ValueError, match="added_tokens.json must have an int for each token"):
        DiffusersFolder(folder).tokenizer()


def test_more_tokens_than_embeddings(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="tokens, but its text encoder has only 600 embed"):
        DiffusersFolder(folder).tokenizer()


def test_replacing_a_checkpoint_keeps_the_files_beside_it(folder, tiny, tokenizer):
    (folder / "README.md").write_text("mine")
    (folder / "safety_checker").mkdir()
    save_diffusers(folder, SMALL, {"text_encoder": tiny["text_encoder"]}, tokenizer)
    assert (folder / "README.md").read_text() == "mine"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"README.md", "safety_checker", "model_index.json", "unet", "vae"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_leaves_everything_as_it_was(folder, tokenizer):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model = MAKE["text_encoder"](SMALL)
    model.weights[-1].assign(model.weights[-1] + 1e6)
    with pytest.raises(ValueError, match="final_layer_norm/beta has values that are not finite in"):
        save_diffusers(folder, SMALL, {"text_encoder": model}, tokenizer, "float16")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_arguments_of_save(tiny, tokenizer, tmp_path):
    text = {"text_encoder": tiny["text_encoder"]}
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, not 'i"):
        save_diffusers(tmp_path / "new", SMALL, text, tokenizer, "int8")
    with pytest.raises(ValueError, match="components are text_encoder, .* not unet"):
        save_diffusers(tmp_path / "new", SMALL, {"unet": tiny["diffusion_model"]}, tokenizer)
    with pytest.raises(ValueError, match="pass decoder and image_encoder, or neither"):
        save_diffusers(tmp_path / "new", SMALL, {"decoder": tiny["decoder"]}, tokenizer)
    for field, config in {
        "pad_token": replace(SMALL, text=replace(SMALL.text, pad_token=7)),
        "final_alpha": replace(SMALL, schedule=replace(SMALL.schedule, final_alpha=0.5)),
    }.items():
        with pytest.raises(ValueError, match=f"{field} must be one of|{field} must be None or 1.0"):
            save_diffusers(tmp_path / "new", config, text, tokenizer)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no checkpoint in diffusers. layout: it has letter.txt"):
        save_diffusers(tmp_path, SMALL, text, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # of these libraries, about each other
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_diffusers_draws_the_same_picture(name, tmp_path):
    reason = "needs PyTorch, diffusers and transformers: pip install torch diffusers transformers"
    torch = pytest.importorskip("torch", reason=reason)
    diffusers = pytest.importorskip("diffusers", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    config = undo_departures({"v1": TINY, "v2": TINY_V2}[name])
    models = {part: make(config) for part, make in MAKE.items()}
    rng = np.random.default_rng(0)
    for model in models.values():
        for variable in model.weights:
            noise, fan_in = rng.normal(size=variable.shape), np.prod(variable.shape[:-1])
            if variable.path.endswith("/kernel"):
                variable.assign(noise * fan_in**-0.5)
            else:
                variable.assign(0.2 * noise + (variable.path.endswith("/gamma")))
    save_diffusers(tmp_path / "model", config, models, dtype="float32")
    pipeline = StableDiffusion(weights=tmp_path / "model", jit_compile=False)
    noise = rng.normal(size=(1, 8, 8, 4)).astype("float32")
    prompt = "a photo of a cat, 1980"
    picture = pipeline.text_to_image(prompt, num_steps=4, diffusion_noise=noise, verbose=0)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", safety_checker=None
    )
    drawn = theirs(
        prompt,
        num_inference_steps=4,
        guidance_scale=7.5,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    drawn = (drawn * 255).round().astype("uint8")
    assert drawn.std() > 30
    assert np.abs(picture.astype(int) - drawn).max() <= 2


def test_what_is_written_names_diffusers_version_and_is_always_the_same(tmp_path):
    """Some pipelines of diffusers refuse an index without a version."""
    model = StableDiffusion(weights=None, config=TINY, jit_compile=False)
    for name in ("a", "b"):
        model.save(tmp_path / name)
        model.save(tmp_path / f"{name}.safetensors", "original")
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert tuple(map(int, index["_diffusers_version"].split("."))) >= (0, 27, 0)
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in [*files, tmp_path / "a.safetensors"]:
        other = tmp_path / path.relative_to(tmp_path).as_posix().replace("a", "b", 1)
        assert path.read_bytes() == other.read_bytes(), path
