"""What a file is: told by its content, without PyTorch, quickly, and in one line."""

import io
import os
import pickle
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from stable_diffusion.checkpoints.contents import (
    HDF5,
    LEGACY_TORCH,
    QUOTED,
    SAFETENSORS,
    TORCH,
    check_file,
    describe_content,
    explain_missing,
    quote,
)
from stable_diffusion.checkpoints.diffusers_config import read_json
from stable_diffusion.checkpoints.formats import open_checkpoint
from stable_diffusion.checkpoints.tensors import guess_family, open_tensors
from stable_diffusion.command.generate import find_unseen_words
from stable_diffusion.config import TINY, VAEConfig
from stable_diffusion.stable_diffusion import StableDiffusion


def make_zip(name):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(name, b"x")
    return content.getvalue()


CONTENTS = {
    "empty": b"",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    'a JSON text: {"error":"not found"}': b'{"error":"not found"}',
    "a text: Repository not found": b"Repository\nnot found\n",
    "a zip file that is truncated": make_zip("archive/data.pkl")[:-5],
    "a zip file, but not one of PyTorch": make_zip("readme.txt"),
    "a pickle, but not one of PyTorch": pickle.dumps({"a": 1}, protocol=4),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a GGUF file, which isn't supported": b"GGUF" + bytes(100),
    "of no known format: it begins with b'\\x00": bytes(1000),
    TORCH: make_zip("archive/data.pkl"),
}


@pytest.mark.parametrize("expected", CONTENTS)
def test_contents(expected, tmp_path):
    path = tmp_path / "x.safetensors"  # the suffix does not matter
    path.write_bytes(CONTENTS[expected])
    assert describe_content(path).startswith(expected)
    if expected != TORCH:
        with pytest.raises(ValueError, match="x.safetensors is no intact safetensors") as error:
            open_checkpoint(path)
        assert expected in str(error.value)


def test_kinds_that_are_read(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "a.ckpt")
    (tmp_path / "b.safetensors").write_bytes(LEGACY_TORCH + bytes(100))
    with h5py.File(tmp_path / "c.bin", "w"):
        pass
    kinds = [describe_content(tmp_path / name) for name in ("a.ckpt", "b.safetensors", "c.bin")]
    assert kinds == [SAFETENSORS, TORCH, HDF5]
    assert open_tensors(tmp_path / "a.ckpt").shapes == {"a": (2,)}


def test_at_most_200_characters_are_quoted(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"{" + 10**6 * b"x", 10**6 * b"word ", b"\0" * 10**6):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            open_tensors(path)
        assert len(str(error.value)) < len(str(path)) + QUOTED + 100
    assert len(quote(10**6 * "x")) == len(quote([1] * 10**6)) == QUOTED
    save_file({10**5 * "x": np.zeros(2, "float32")}, path)
    with pytest.raises(ValueError, match="has no component") as error:
        open_checkpoint(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("open_it", [check_file, describe_content, open_tensors, open_checkpoint])
def test_pipes_and_devices_do_not_hang(open_it, tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors must be a file; it is a pipe"):
        open_it(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="/dev/zero must be a file; it is a device"):
        open_it("/dev/zero")


def test_folders_and_links(tmp_path):
    with pytest.raises(ValueError, match="must be a file; it is a folder"):
        open_tensors(tmp_path)
    (tmp_path / "x.pt").symlink_to("nowhere.pt")
    with pytest.raises(ValueError, match="x.pt is a link to nowhere.pt, which doesn't exist"):
        open_tensors(tmp_path / "x.pt")
    for path in (f"{tmp_path}/\0", f"{tmp_path}/{'x' * 300}"):
        with pytest.raises(ValueError, match="There is no "):
            open_tensors(path)


def test_nearest_name(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "dreamshaper_8.safetensors").touch()
    wrong = tmp_path / "models" / "dreamshaper8.safetensors"
    assert explain_missing(wrong).endswith(
        f"Did you mean {tmp_path}/models/dreamshaper_8.safetensors?"
    )
    wrong = tmp_path / "model" / "dreamshaper_8.safetensors"
    assert explain_missing(wrong).endswith(f"Did you mean {tmp_path}/models?")
    assert explain_missing(tmp_path / "zzz") == f"There is no {tmp_path}/zzz."


@pytest.mark.parametrize("value", [5, b"x", ["x"], 1.5])
def test_weights_of_another_type(value):
    for name in ("weights", "vae"):
        with pytest.raises(ValueError, match=f"{name} must be None, a str, a path or a Reader"):
            open_checkpoint(**{"weights": None, name: value})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("emojis", "Did you mean 'emoji'"),
        ("owner/name", r"A repository of the hub is hf://owner/name\."),
        ("https://huggingface.co/owner/name", r"of the hub is hf://owner/name\."),
        ("https://example.com/model.safetensors", "is an address; download the file first"),
        ("", "There is no "),
        ("\0", "There is no "),
        (5000 * "x", "There is no "),
    ],
)
def test_weights_that_are_nowhere(weights, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(weights)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is a folder without a checkpoint. It has nothing"):
        open_checkpoint(tmp_path)
    for name in ("a.CKPT", "b.sft"):
        save_file({"lora_up": np.zeros(2, "float32")}, tmp_path / name)
    with pytest.raises(ValueError, match="It has a.CKPT, b.sft. Pass the path of a file .*/a.CKPT"):
        open_checkpoint(tmp_path)
    (tmp_path / "b.sft").unlink()
    with pytest.raises(ValueError, match="a.CKPT has no component .* looks like a LoRA"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "family"),
    [
        ("controlnet_cond_embedding.conv_in.weight", (1, 1), "a ControlNet"),
        ("control_model.input_hint_block.0.weight", (1, 1), "a ControlNet"),
        ("conditioner.embedders.1.model.ln_final.weight", (1,), "Stable Diffusion XL"),
        ("noise_augmentor.data_mean", (1,), "Stable unCLIP"),
        ("decoder.layers.3.conv.0.weight", (1, 1, 3, 3), "a tiny VAE"),
        ("adapter.body.0.resnets.0.block1.weight", (1, 1, 3, 3), "a T2I adapter"),
        ("unet.x.lora_linear_layer.up.weight", (1, 1), "a LoRA, which load_lora"),
        ("string_to_param.*", (1, 768), "an embedding, which load_embedding"),
        ("<cat>", (768,), "an embedding, which load_embedding"),
        (
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            (1, 1, 3, 3),
            "a VAE in diffusers' layout",
        ),
    ],
)
def test_families(name, shape, family, tmp_path):
    assert f"looks like {family}" in guess_family({name: shape})
    save_file({name: np.zeros(shape, "float32")}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors .*looks like {family}"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_a_vae_in_diffusers_layout(tmp_path):
    """It has a decoder; what else an image needs is missing."""
    config = replace(TINY, vae=VAEConfig((32, 32, 32, 64), res_blocks=1))
    pipeline = StableDiffusion(weights=None, jit_compile=False, config=config)
    pipeline.save(tmp_path / "folder")
    vae = tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="no text_encoder: .* looks like a VAE in diffusers'"):
        StableDiffusion(weights=str(vae), jit_compile=False).text_to_image("a cat")


def test_widths_that_no_config_allows_name_the_file(tmp_path):
    names = ("decoder.conv_in", "decoder.up.0.block.0.conv2", "decoder.up.0.block.1.conv2")
    tensors = {f"first_stage_model.{n}.weight": np.zeros((4, 4, 3, 3), "float32") for n in names}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors has no .*groups must divide each width"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_pipes_beside_a_checkpoint(tmp_path):
    """They count as missing."""
    (tmp_path / "unet").mkdir()
    for name in ("model_index.json", "unet/config.json", "words.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder without a checkpoint"):
        open_checkpoint(tmp_path)
    assert find_unseen_words(SimpleNamespace(folder=tmp_path), ["a cat"]) == []
    with pytest.raises(ValueError, match="model_index.json must be a file; it is a pipe"):
        read_json(tmp_path / "model_index.json")


def test_config_files_that_are_something_else(tmp_path):
    (tmp_path / "unet").mkdir()
    path = tmp_path / "unet" / "config.json"
    path.write_bytes(CONTENTS["a Git LFS pointer"])
    with pytest.raises(ValueError, match="config.json is no JSON file: it is a Git LFS pointer"):
        open_checkpoint(tmp_path)
    path.write_text("{" + 10**6 * "x")
    with pytest.raises(ValueError, match="config.json is no JSON file: it is a JSON ") as error:
        open_checkpoint(tmp_path)
    assert len(str(error.value)) < 600
