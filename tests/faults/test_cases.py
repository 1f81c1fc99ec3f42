"""Files that people have and that were refused or read wrongly: what is right for each.

The numbers are kinds of faults: 1 PyTorch's files, 2 embeddings, 3 folders with .bin files, 4 no
VAE, 5 v-prediction, 6 fewer layers, 7 kinds of LoRA, 8 other models, 9 wrong files.
"""

import json
import shutil
import sys
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers import check_equal, randomize
from keras import ops
from safetensors.numpy import load_file, save_file

from stable_diffusion import StableDiffusion, StableDiffusionV2
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.config import Config, TextConfig, UNetConfig, VAEConfig, undo_departures

SD1 = undo_departures(
    Config(
        TextConfig(64, 2, 1, 128),
        UNetConfig((32, 64), (8, 8), (True, False), 64, res_blocks=1, cell_size=2),
        VAEConfig((32, 64), res_blocks=1),
        size=64,
    )
)
SD2 = undo_departures(
    replace(
        SD1,
        text=TextConfig(64, 3, 1, 128, "gelu_tanh"),
        unet=replace(SD1.unet, widths=(64, 128), heads=(1, 2), linear_projection=True),
    )
)
KERNEL = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = "down_0_attn_0/attn1/to_q/kernel"
SIZE_OF_768 = 96 * 2  # latent cells of 768 pixels, with a VAE whose cells are 2 pixels wide
OPTIONS = {"jit_compile": False, "img_height": 64, "img_width": 64}


def make_pipeline(kind, config):
    pipeline = kind(weights=None, config=config, jit_compile=False)
    for component in ("text_encoder", "diffusion_model", "decoder", "image_encoder"):
        randomize(getattr(pipeline, component), np.random.default_rng(0))
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cases")


@pytest.fixture(scope="module")
def sd1(folder):
    """Stable Diffusion 1, also as a folder and as the tensors of a file without our metadata."""
    pipeline = make_pipeline(StableDiffusion, SD1)
    pipeline.save(folder / "folder", "diffusers", "float32")
    pipeline.save(folder / "sd1.meta.safetensors", "original", "float32")
    pipeline.tensors = load_file(folder / "sd1.meta.safetensors")
    return pipeline


@pytest.fixture(scope="module")
def sd2(folder):
    pipeline = make_pipeline(StableDiffusionV2, SD2)
    pipeline.save(folder / "sd2.meta.safetensors", "original", "float32")
    pipeline.tensors = load_file(folder / "sd2.meta.safetensors")
    return pipeline


def write(path, tensors):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def load(path, kind=StableDiffusion, **options):
    return kind(weights=path, **OPTIONS, **options)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def count_steps(model, **options):
    """Generates an image; returns how many steps there were before an error, and the error."""
    steps = []
    with pytest.raises(ValueError) as error:
        model.text_to_image(
            "x", num_steps=2, verbose=0, callback=lambda *step: steps.append(step), **options
        )
    assert "\n" not in str(error.value)
    return len(steps), str(error.value)


# 1 to 3: PyTorch's files


@pytest.mark.torch
@pytest.mark.parametrize("name", ["lightning", "numpy", "legacy"])
def test_1_pytorch_files(name, sd1, tmp_path, monkeypatch):
    import torch

    tensors = {key: torch.from_numpy(value) for key, value in sd1.tensors.items()}
    data, options = {"state_dict": tensors, "global_step": 1}, {}
    if name == "lightning":
        for module in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
        data["callbacks"] = {module.ModelCheckpoint: {"best_model_score": None}}
    elif name == "numpy":
        data["global_step"] = np.int64(1)
    else:
        options = {"_use_new_zipfile_serialization": False}
    torch.save(data, tmp_path / f"{name}.ckpt", **options)
    monkeypatch.undo()
    check_equal(load(tmp_path / f"{name}.ckpt").text_encoder, sd1.text_encoder)


@pytest.fixture
def other(folder, sd1):
    """A new pipeline of the same parameters, for what changes a pipeline."""
    return load(folder / "folder")


@pytest.mark.torch
def test_2_embedding_of_the_web_interface(other, tmp_path):
    import torch

    vectors = torch.randn(3, 64)
    data = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "bad"}
    torch.save(data | {"step": 1}, tmp_path / "bad-hands.pt")
    with pytest.warns(UserWarning, match="bad-hands.*bad|bad.*bad-hands"):
        other.load_embedding(tmp_path / "bad-hands.pt")
    ids = other.tokenizer.encode("bad-hands")[1:-1]
    table = ops.convert_to_numpy(other.text_encoder.weights[0])
    np.testing.assert_array_equal(table[ids], vectors.numpy())


@pytest.mark.torch
def test_2_learned_embeds(other, tmp_path):
    import torch

    vector = torch.randn(64)
    torch.save({"<cat-toy>": vector}, tmp_path / "learned_embeds.bin")
    other.load_embedding(tmp_path / "learned_embeds.bin")
    ids = other.tokenizer.encode("<cat-toy>")[1:-1]
    table = ops.convert_to_numpy(other.text_encoder.weights[0])
    np.testing.assert_array_equal(table[ids], vector.numpy()[None])


@pytest.mark.torch
def test_3_a_folder_with_bin_files_only(sd1, folder, tmp_path):
    import torch

    shutil.copytree(folder / "folder", tmp_path / "bin")
    for path in [*(tmp_path / "bin").rglob("*.safetensors")]:
        stem = "pytorch_model" if path.stem == "model" else path.stem
        tensors = {name: torch.from_numpy(t) for name, t in load_file(path).items()}
        torch.save(tensors, path.with_name(f"{stem}.bin"))
        path.unlink()
    model = load(tmp_path / "bin")
    for component in ("text_encoder", "diffusion_model", "decoder"):
        check_equal(getattr(model, component), getattr(sd1, component))


# 4: no VAE


@pytest.fixture(scope="module")
def without_vae(sd1, folder):
    tensors = {n: t for n, t in sd1.tensors.items() if not n.startswith("first_stage")}
    return write(folder / "novae.safetensors", tensors)


def test_4_no_vae_is_found_before_the_first_step(without_vae):
    steps, error = count_steps(load(without_vae))
    assert steps == 0 and "vae=" in error


def test_4_the_vae_of_another_file(without_vae, sd1, folder):
    vae = folder / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    for path in (vae, folder / "folder", folder / "sd1.meta.safetensors"):
        check_equal(load(without_vae, vae=path).decoder, sd1.decoder)


def test_4_a_vae_is_no_model(sd1, folder):
    with pytest.raises(ValueError, match="VAE") as error:
        _ = load(folder / "folder/vae/diffusion_pytorch_model.safetensors").diffusion_model
    assert "\n" not in str(error.value)


# 5: what the model predicts


@pytest.fixture(scope="module")
def v2_768(sd2, folder):
    """As 2.1-768, whose last transformer's norm1 bias has a standard deviation of 0.2."""
    names = [
        name
        for name in sd2.tensors
        if ".output_blocks." in name and name.endswith("transformer_blocks.0.norm1.bias")
    ]
    last = max(names, key=lambda name: int(name.split(".output_blocks.")[1].split(".")[0]))
    bias = np.random.default_rng(0).normal(0, 0.2, sd2.tensors[last].shape).astype("float32")
    return sd2.tensors | {last: bias}


def test_5_told_by_the_last_transformer(v2_768, folder, capfd):
    path = write(folder / "v2-1_768.safetensors", v2_768)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load(path, StableDiffusionV2).config
    assert config.schedule.prediction_type == "v_prediction" and config.size == SIZE_OF_768
    said = [str(warning.message) for warning in caught] + capfd.readouterr().err.splitlines()
    assert any("v_prediction" in line for line in said)


def test_5_size_by_argument(v2_768, folder):
    path = write(folder / "argument.safetensors", v2_768)
    assert open_checkpoint(path, prediction_type="v_prediction").config.size == SIZE_OF_768


def test_5_size_by_marker(v2_768, folder):
    path = write(folder / "marker.safetensors", v2_768 | {"v_pred": np.zeros(0, "float32")})
    config = open_checkpoint(path).config
    assert (config.size, config.schedule.prediction_type) == (SIZE_OF_768, "v_prediction")


def test_5_zero_terminal_snr(sd1, folder):
    marks = {name: np.zeros(0, "float32") for name in ("v_pred", "ztsnr")}
    config = open_checkpoint(write(folder / "zt.safetensors", sd1.tensors | marks)).config
    assert config.schedule.alphas_cumprod[-1] == 0


def test_5_rescale_betas_zero_snr(sd1, folder, tmp_path):
    shutil.copytree(folder / "folder", tmp_path / "zsnr")
    path = tmp_path / "zsnr" / "scheduler" / "scheduler_config.json"
    change_json(path, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    steps, error = count_steps(load(tmp_path / "zsnr"))
    assert steps == 0 and "epsilon" in error
    change_json(path, prediction_type="v_prediction")
    schedule = load(tmp_path / "zsnr").config.schedule
    assert schedule.alphas_cumprod[-1] == 0 and np.isfinite(schedule.alphas_cumprod).all()


# 6 to 8: other models


def test_6_a_config_with_fewer_layers(sd1, folder, tmp_path):
    shutil.copytree(folder / "folder", tmp_path / "skip")
    change_json(tmp_path / "skip" / "text_encoder" / "config.json", num_hidden_layers=1)
    model = load(tmp_path / "skip")
    assert model.config.text.depth == 1
    all_layers = {variable.path: variable for variable in sd1.text_encoder.weights}
    assert len(model.text_encoder.weights) < len(all_layers)
    for variable in model.text_encoder.weights:
        np.testing.assert_array_equal(variable, all_layers[variable.path])


def test_7_a_lora_with_an_embedding(other, folder):
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=shape).astype("float32") for shape in ((4, 32), (32, 4)))
    vector = rng.normal(size=(1, 64)).astype("float32")
    tensors = {f"{KERNEL}.lora_down.weight": down, f"{KERNEL}.lora_up.weight": up}
    tensors["bundle_emb.glimmer.string_to_param.*"] = vector
    before = read_kernel(other)
    other.load_lora(write(folder / "bundle.safetensors", tensors))
    np.testing.assert_allclose(read_kernel(other), before + (up @ down).T, atol=1e-5)
    ids = other.tokenizer.encode("glimmer")[1:-1]
    table = ops.convert_to_numpy(other.text_encoder.weights[0])
    np.testing.assert_array_equal(table[ids], vector)


def test_7_loha(other, folder):
    rng = np.random.default_rng(1)
    w = {
        f"{n}_{half}": rng.normal(size=shape).astype("float32")
        for n in (1, 2)
        for half, shape in (("a", (32, 4)), ("b", (4, 32)))
    }
    before = read_kernel(other)
    tensors = {f"{KERNEL}.hada_w{name}": value for name, value in w.items()}
    other.load_lora(write(folder / "loha.safetensors", tensors))
    delta = (w["1_a"] @ w["1_b"]) * (w["2_a"] @ w["2_b"])
    np.testing.assert_allclose(read_kernel(other), before + delta.T, atol=1e-4)
    other.unload_lora()
    np.testing.assert_array_equal(read_kernel(other), before)


def read_kernel(pipeline):
    (found,) = (
        variable for variable in pipeline.diffusion_model.weights if variable.path.endswith(PATH)
    )
    return ops.convert_to_numpy(found)


def test_8_names_of_sd_turbo(sd2, folder):
    tensors = {
        name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): tensor
        for name, tensor in sd2.tensors.items()
    }
    path = write(folder / "sd_turbo.safetensors", tensors)
    model = load(open_checkpoint(path, version=2, prediction_type="epsilon"), StableDiffusionV2)
    check_equal(model.text_encoder, sd2.text_encoder)


def test_8_no_middle_block(folder, sd1, tmp_path):
    shutil.copytree(folder / "folder", tmp_path / "tiny")
    change_json(tmp_path / "tiny" / "unet" / "config.json", mid_block_type=None)
    with pytest.raises(ValueError, match="unused .*mid_block"):
        _ = load(tmp_path / "tiny").diffusion_model
    path = tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    write(path, {name: t for name, t in tensors.items() if not name.startswith("mid_block")})
    unet = load(tmp_path / "tiny").diffusion_model
    expected = {variable.path: variable for variable in sd1.diffusion_model.weights}
    for variable in unet.weights:
        np.testing.assert_array_equal(variable, expected[variable.path])
    shapes = [[n or 1 for n in tensor.shape] for tensor in unet.inputs]
    assert np.isfinite(unet.predict_on_batch([np.ones(shape, "float32") for shape in shapes])).all()


def test_8_an_inpainting_model_asked_for_an_image():
    config = replace(SD1, unet=replace(SD1.unet, in_channels=9))
    steps, error = count_steps(StableDiffusion(weights=None, config=config, jit_compile=False))
    assert steps == 0 and "inpaint" in error


# 9: wrong files


def test_9_git_lfs_pointer(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n"
    (tmp_path / "lfs.safetensors").write_text(text)
    with pytest.raises(ValueError, match="Git LFS") as error:
        load(tmp_path / "lfs.safetensors")
    assert "\n" not in str(error.value)


def test_9_no_such_file(tmp_path):
    (tmp_path / "missing-1.safetensors").touch()
    with pytest.raises(ValueError, match="missing-1.safetensors") as error:
        load(tmp_path / "missing.safetensors")
    assert "\n" not in str(error.value)


def test_9_safetensors_called_ckpt(sd1, folder, tmp_path):
    shutil.copy(folder / "sd1.meta.safetensors", tmp_path / "renamed.ckpt")
    check_equal(load(tmp_path / "renamed.ckpt").text_encoder, sd1.text_encoder)


# B4: a word in other letters


def test_b4_an_embedding_in_any_letter_case(other, folder):
    vectors = np.random.default_rng(2).normal(size=(3, 64)).astype("float32")
    other.load_embedding(write(folder / "EasyNegative.safetensors", {"emb_params": vectors}))
    ids = [other.tokenizer.encode(text)[1:-1] for text in ("EasyNegative", "easynegative")]
    assert ids[0] == ids[1] and len(ids[0]) == 3
    table = ops.convert_to_numpy(other.text_encoder.weights[0])
    np.testing.assert_array_equal(table[ids[0]], vectors)
