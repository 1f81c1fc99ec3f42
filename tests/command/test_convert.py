"""`stable-diffusion-convert`, on a tiny checkpoint: each format holds what went in."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file, save_file

from stable_diffusion import StableDiffusion
from stable_diffusion.checkpoints import FORMATS, open_checkpoint
from stable_diffusion.checkpoints.diffusers import save_diffusers
from stable_diffusion.command import convert
from stable_diffusion.config import COMPONENTS, TINY

pytestmark = pytest.mark.usefixtures("reused")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder in diffusers' layout, a pipeline of it, and the models that were written."""
    path, rng = tmp_path_factory.mktemp("source") / "tiny", np.random.default_rng(0)
    pipeline = StableDiffusion(weights=None, jit_compile=False, config=TINY)
    models = {component: getattr(pipeline, component) for component in COMPONENTS}
    for model in models.values():
        for variable in model.weights:
            variable.assign(rng.normal(size=variable.shape).astype("float32"))
    save_diffusers(path, TINY, models, dtype="float32")
    return path, StableDiffusion(weights=path, jit_compile=False), models


def run(*argv):
    return convert.main([str(argument) for argument in argv])


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "openvino"])
def test_to_each_format(format, source, tmp_path, capsys):
    """Without a dtype nothing is rounded, and the config and the tokenizer come along."""
    start, model, models = source
    path = tmp_path / ("x.safetensors" if format == "original" else "x")
    assert run(start, path, "--format", format) == 0
    assert capsys.readouterr().out == f"{path}\n"
    found = StableDiffusion(weights=path, jit_compile=False)
    assert found.config == model.config
    assert found.tokenizer.vocab == model.tokenizer.vocab
    for component in COMPONENTS:
        pairs = zip(getattr(found, component).weights, models[component].weights, strict=True)
        for ours, theirs in pairs:
            ours, theirs = map(ops.convert_to_numpy, (ours, theirs))
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(keras.backend.backend() == "openvino", reason="it is written there")
def test_openvinos_needs_its_backend(source, tmp_path, capsys):
    assert run(source[0], tmp_path / "x", "--format", "openvino") == 2
    assert "written with KERAS_BACKEND=openvino" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_format_follows_from_the_target(source, tmp_path):
    assert run(source[0], tmp_path / "x.safetensors", "--dtype", "float16") == 0
    tensors = load_file(tmp_path / "x.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float16"}
    assert run(tmp_path / "x.safetensors", tmp_path / "x", "--dtype", "float16") == 0
    assert (tmp_path / "x" / "model_index.json").is_file()


def test_dtype_of_keras_files(source, tmp_path):
    policy = keras.config.dtype_policy()
    assert run(source[0], tmp_path / "x", "--format", "kerascv", "--dtype", "float16") == 0
    assert keras.config.dtype_policy() == policy
    found = StableDiffusion(weights=tmp_path / "x", jit_compile=False).decoder
    for ours, theirs in zip(found.weights, source[2]["decoder"].weights, strict=True):
        expected = ops.convert_to_numpy(theirs).astype("float16").astype("float32")
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), expected)


def test_prediction_type(source, tmp_path):
    assert run(source[0], tmp_path / "x", "--prediction-type", "epsilon") == 0
    assert open_checkpoint(tmp_path / "x").config.schedule.prediction_type == "epsilon"


def test_lora(source, tmp_path):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    names = [weight.path for weight in source[2]["diffusion_model"].weights]
    place = names.index("mid_attn_0/attn1/to_q/kernel")
    kernel = ops.convert_to_numpy(source[2]["diffusion_model"].weights[place])
    rng = np.random.default_rng(0)
    down = rng.standard_normal((1, len(kernel)), "float32")
    up = rng.standard_normal((len(kernel), 1), "float32")
    path = tmp_path / "a:b.safetensors"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    assert run(source[0], tmp_path / "x", "--dtype", "float32", "--lora", f"{path}:0.5") == 0
    found = StableDiffusion(weights=tmp_path / "x", jit_compile=False).diffusion_model
    changed = ops.convert_to_numpy(found.weights[place])
    np.testing.assert_allclose(changed, kernel + 0.5 * (up @ down).T, rtol=1e-6, atol=1e-6)
    assert convert.parse_lora(str(path)) == (str(path), 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "weights must be None, a preset"),
        (["emoji", "--variant", "ema"], "variant must be None or one that the folder has ("),
        (["emoji", "--ema"], "ema must be False, except for a file in the original layout"),
        (["emoji", "--lora", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    start, *options = arguments
    assert run(start, tmp_path / "x", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert error.startswith("stable-diffusion-convert: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "project",
            "project is not empty, and it is no checkpoint in diffusers' layout: it has src",
        ),
        ("absent/x", "absent/x can't be written: there is no folder"),
        ("absent/x.safetensors", "there is no folder"),
        ("folder.safetensors", "folder.safetensors is a folder, not a file"),
        ("project/src/x", "x is a file, and a checkpoint in diffusers' layout needs a folder"),
        ("x" * 256, "File name too long"),
        ("x.ckpt", "OUT must be a folder or a .safetensors file"),
        ("x.SAFETENSORS", "The path of a single file must end in .safetensors, not"),
    ],
)
def test_targets_are_checked_before_the_work(
    target, message, source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("stable_diffusion.checkpoints.reader.Reader.build", None)
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "project" / "src" / "x").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run(source[0], tmp_path / target) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_components_are_looked_for_before_the_work(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stable_diffusion.checkpoints.reader.Reader.build", None)
    shutil.copytree(source[0], tmp_path / "unet")
    shutil.rmtree(tmp_path / "unet" / "text_encoder")
    assert run(tmp_path / "unet", tmp_path / "x") == 2
    error = capsys.readouterr().err
    assert "Pass a checkpoint that has a text_encoder." in error and error.count("\n") == 1


def test_a_dot_in_a_folders_name_is_no_suffix(tmp_path):
    (tmp_path / "folder.bin").mkdir()
    for name in ("my-model-v1.5", "x", "folder.bin"):
        assert convert.choose_format(tmp_path / name) == "diffusers"
    for name in ("x.safetensors", "my-model-v1.5.SAFETENSORS"):
        assert convert.choose_format(tmp_path / name) == "original"


def test_a_full_disk_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stable_diffusion.checkpoints.tensors.save_file", full)
    assert run(source[0], tmp_path / "x") == 2
    said = f"OSError: [Errno 28] No space left on device: '{tmp_path / 'x'}'"
    said = f"stable-diffusion-convert: {said}\n"
    assert capsys.readouterr() == ("", said)
    assert list(tmp_path.iterdir()) == []
