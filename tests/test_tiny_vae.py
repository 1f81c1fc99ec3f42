"""TAESD, the tiny VAE: numbers, files, what is refused, saving, training.

The reference is a forward pass in numpy, float64, that walks a file's numbered layers as
`torch.nn.Sequential` does; models compute in float32. `parity_diffusers` compares with diffusers.
"""

import json
import re
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from helpers import FEW, check_equal, relative_error
from safetensors.numpy import load_file, save_file

from stable_diffusion import Decoder, StableDiffusion
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.checkpoints.taesd import TinyFiles, choose_partner
from stable_diffusion.command import generate
from stable_diffusion.config import SD1, TinyVAEConfig, undo_departures
from stable_diffusion.image_encoder import encode_moments
from stable_diffusion.images import quantize_pixels
from stable_diffusion.tiny_vae import LOG_VARIANCE, TinyDecoder, TinyEncoder, load_decoder

TOLERANCE = 5e-6  # of the largest value
TINY = TinyVAEConfig(6, (1, 2, 1, 2), (2, 1, 3, 1))
# What each number of a file is: a block with its name, a convolution, its stride, or another layer.
ENCODER = ["conv", "block", 2, "block", "block", 2, "block", 2, "block", "block", "conv"]
DECODER = ["limit", "conv", "relu", "block", "block", "double", "plain", "block", "double", "plain"]
DECODER += ["block", "block", "block", "double", "plain", "block", "conv"]
ROOTS = {"original": "", "comfy": "taesd_{}.", "diffusers": "{}.layers."}


def make_half(kinds, channels, width=6, seed=0):
    """Returns the random tensors of a half, with the names of its original file."""
    rng, tensors = np.random.default_rng(seed), {}
    last = len(kinds) - 1

    def add(name, inputs, outputs, bias=True):
        scale = (0.5 / (9 * inputs)) ** 0.5
        kernel = rng.normal(size=(outputs, inputs, 3, 3)) * scale
        tensors[f"{name}.weight"] = kernel.astype("float32")
        if bias:
            tensors[f"{name}.bias"] = rng.normal(size=outputs).astype("float32") * 0.3

    for n, kind in enumerate(kinds):
        if kind == "block":
            for part in (0, 2, 4):
                add(f"{n}.conv.{part}", width, width)
        elif kind == "conv":
            add(str(n), width if n == last else channels[0], channels[1] if n == last else width)
        elif kind in ("plain", 2):
            add(str(n), width, width, bias=False)
    return tensors


HALVES = {
    "encoder": make_half(ENCODER, (3, 4), seed=1),
    "decoder": make_half(DECODER, (4, 3), seed=2),
}


def convolve(x, tensors, name, stride=1):
    """Convolves one image `(H, W, C)` with zeros of one pixel around it."""
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    kernel, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias", 0)
    height, width = x.shape[0] - 2, x.shape[1] - 2
    shifted = (
        x[i : i + height, j : j + width] @ kernel[:, :, i, j].astype("float64").T
        for i in range(3)
        for j in range(3)
    )
    return (sum(shifted) + bias)[::stride, ::stride]


def run_layers(kinds, tensors, x):
    """Applies the layers of a half to one image or latent `(H, W, C)`."""
    for n, kind in enumerate(kinds):
        if kind == "block":
            inputs = x
            for part in (0, 2, 4):
                x = np.maximum(x, 0) if part else x
                x = convolve(x, tensors, f"{n}.conv.{part}")
            x = np.maximum(x + inputs, 0)
        elif kind == "limit":
            x = 3 * np.tanh(x / 3)
        elif kind == "relu":
            x = np.maximum(x, 0)
        elif kind == "double":
            x = x.repeat(2, 0).repeat(2, 1)
        else:
            x = convolve(x, tensors, str(n), 2 if kind == 2 else 1)
    return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the two original files."""
    folder = tmp_path_factory.mktemp("taesd")
    for half, tensors in HALVES.items():
        save_file(tensors, folder / f"taesd_{half}.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder, few_pipeline):
    model = StableDiffusion(64, 64, False, None, FEW, vae=folder)
    model._text_encoder = few_pipeline.text_encoder
    model._diffusion_model = few_pipeline.diffusion_model
    return model


def rename(tensors, half, root):
    """Returns the tensors of a half with other names; diffusers does not count `limit`."""
    shift = half == "decoder" and "layers" in root

    def number(match):
        return root.format(half) + str(int(match[0]) - shift)

    return {re.sub(r"^\d+", number, name): tensor for name, tensor in tensors.items()}


def write_diffusers(folder, **changes):
    """Writes the VAE in diffusers' layout, with other values in its config."""
    folder.mkdir()
    tensors = {}
    for half in HALVES:
        tensors |= rename(HALVES[half], half, ROOTS["diffusers"])
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [6] * 4,
        "decoder_block_out_channels": [6] * 4,
        "num_encoder_blocks": [1, 2, 1, 2],
        "num_decoder_blocks": [2, 1, 3, 1],
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# Numbers


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_halves_compute_what_the_files_say(factor, tmp_path):
    path = write_diffusers(tmp_path / "x", scaling_factor=factor)
    model = StableDiffusion(64, 128, False, None, FEW, vae=path)
    assert model.config.vae == replace(TINY, scaling_factor=factor)
    assert model.latent_shape == (8, 16, 4)
    rng = np.random.default_rng(3)
    latent = 2 * rng.normal(size=(2, 8, 16, 4)).astype("float32")
    found = model.decoder.predict_on_batch(latent)
    expected = [2 * run_layers(DECODER, HALVES["decoder"], x / factor) - 1 for x in latent]
    assert found.shape == (2, 64, 128, 3)
    assert relative_error(found, np.array(expected)) < TOLERANCE
    images = rng.uniform(-1, 1, (2, 64, 32, 3)).astype("float32")
    found = model.image_encoder.predict_on_batch(images)
    expected = [factor * run_layers(ENCODER, HALVES["encoder"], (x + 1) / 2) for x in images]
    assert found.shape == (2, 8, 4, 4)
    assert relative_error(found, np.array(expected)) < TOLERANCE


def test_the_published_size():
    """TAESD's README says 1.2 million parameters for each half."""
    decoder, encoder = TinyDecoder(512, 512), TinyEncoder()
    assert (decoder.count_params(), encoder.count_params()) == (1_222_531, 1_222_532)
    assert decoder.output_shape == (None, 512, 512, 3)
    for make in (lambda: TinyDecoder(64, 64, None, True), lambda: TinyEncoder(True)):
        with pytest.raises(ValueError, match="download_weights must be False for a tiny VAE"):
            make()


def test_images_and_tasks(pipeline, eagerly):
    options = {"num_steps": 2, "seed": [0], "verbose": 0}
    images = pipeline.text_to_image("a", **options)
    *_, (_, _, latent, _) = pipeline.generate_latents(
        pipeline.encode_text("a"), num_steps=2, seed=[0]
    )
    expected = 2 * run_layers(DECODER, HALVES["decoder"], latent[0].astype("float64")) - 1
    assert np.mean(np.abs(expected) < 1) > 0.3  # not cut off
    assert np.abs(images[0].astype(int) - quantize_pixels(expected[None])[0]).max() <= 1
    assert pipeline.image_to_image("a", images, **options).shape == (1, 64, 64, 3)
    mask = np.zeros((64, 64))
    mask[:32] = 1
    painted = pipeline.inpaint("a", images, mask, **options)
    np.testing.assert_array_equal(painted[0, :32], images[0, :32])


def test_training_gets_latents_with_next_to_no_variance(pipeline):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype("float32")
    moments = encode_moments(pipeline.image_encoder, images)
    np.testing.assert_array_equal(moments[..., :4], pipeline.image_encoder.predict_on_batch(images))
    assert (moments[..., 4:] == LOG_VARIANCE).all()


# Files


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("names", ROOTS)
def test_names_of_several_programs(names, form, pipeline, tmp_path):
    tensors = {half: rename(HALVES[half], half, ROOTS[names]) for half in HALVES}
    if names == "original":
        for half in HALVES:
            save_file(tensors[half], tmp_path / f"{half}.safetensors")
    else:
        extra = {"vae_scale": np.ones(1, "float32")} if names == "comfy" else {}
        save_file(tensors["decoder"] | tensors["encoder"] | extra, tmp_path / "encoder.safetensors")
    path = tmp_path / "encoder.safetensors" if form == "file" else tmp_path
    model = StableDiffusion(64, 64, False, None, FEW, vae=path)
    assert model.config.vae == TINY
    for component in ("decoder", "image_encoder"):
        check_equal(getattr(model, component), getattr(pipeline, component))


def test_other_names_of_files(folder, pipeline, tmp_path):
    """The content tells; a large file and one of something else beside them don't matter."""
    for half in HALVES:
        content = (folder / f"taesd_{half}.safetensors").read_bytes()
        (tmp_path / f"{half[0]}.ckpt").write_bytes(content)
    save_file({"x": np.ones(3, "float32")}, tmp_path / "a.safetensors")
    (tmp_path / "b.bin").write_bytes(b"no tensors")
    for path in (tmp_path, tmp_path / "d.ckpt", tmp_path / "e.ckpt"):
        reader = TinyFiles(path)
        assert set(reader.found) == {"decoder", "image_encoder"} and reader.config.vae == TINY
    content = (folder / "taesd_decoder.safetensors").read_bytes()
    (tmp_path / "other.sft").write_bytes(content)
    assert set(TinyFiles(tmp_path / "e.ckpt").found) == {"image_encoder"}  # which one is open
    with pytest.raises(ValueError, match="several files of a tiny decoder, such as d.ckpt and oth"):
        open_checkpoint(None, FEW, vae=tmp_path)


@pytest.mark.parametrize(
    ("name", "names", "partner"),
    [
        ("taesd_decoder.pth", ["taesd_encoder.pth", "taesd_decoder.pth"], "taesd_encoder.pth"),
        ("a/encoder.pth", ["decoder.pth", "a/decoder.sft", "a/decoder.pth"], "a/decoder.pth"),
        ("a-encoder.safetensors", ["a-decoder.pth", "a-decoder.txt"], "a-decoder.pth"),
        ("taesd.pth", ["taesd.pth", "taesd.sft"], None),
        ("decoder.pth", ["taesd_encoder.pth"], None),
    ],
)
def test_the_name_of_the_other_half(name, names, partner):
    assert choose_partner(name, names) == partner


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_only_the_decoder(form, damaged, folder, eagerly, tmp_path):
    path = tmp_path / "taesd_decoder.safetensors"
    path.write_bytes((folder / path.name).read_bytes())
    if damaged:
        content = (folder / "taesd_encoder.safetensors").read_bytes()
        (tmp_path / "taesd_encoder.safetensors").write_bytes(content[:-1])
    path = path if form == "file" else tmp_path
    model = StableDiffusion(64, 64, False, None, FEW, vae=path)
    assert model.config.vae == replace(TINY, encoder_blocks=TINY.decoder_blocks[::-1])
    image = model.decode_latents(np.zeros((1, *model.latent_shape)))
    reason = "taesd_encoder.safetensors is no intact" if damaged else "There is no file of it "
    match = f"The image_encoder of the tiny VAE can't be loaded. .*{reason}.*Pass the path of a VAE"
    with pytest.raises(ValueError, match=match):
        model.image_to_image("a", image, num_steps=2)
    with pytest.raises(ValueError, match=match):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() and model._diffusion_model is None


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        ("7", lambda x: {}, "doesn't fit the decoder.*1 missing .7.conv.4.weight"),
        ("3", lambda x: {"2.bias": x}, "doesn't fit the decoder.*1 unused .2.bias"),
        ("19", lambda x: {}, ""),
    ],
)
def test_other_tensors(number, change, message, tmp_path):
    tensors = dict(HALVES["decoder"])
    if message:
        removed = tensors.pop(f"{number}.conv.4.weight")
        if added := change(removed):
            tensors |= added | {f"{number}.conv.4.weight": removed}
    save_file(tensors, tmp_path / "x.safetensors")
    model = StableDiffusion(64, 64, False, None, FEW, vae=tmp_path / "x.safetensors")
    if not message:
        assert model.decoder.weights
        return
    with pytest.raises(ValueError, match=message):
        model.decoder  # noqa: B018


def test_a_decoder_by_itself(folder, pipeline, tmp_path):
    """It decodes latents of any size; a size that is given is that of the model."""
    for path in (folder, str(folder / "taesd_decoder.safetensors")):
        decoder = load_decoder(path)
        check_equal(decoder, pipeline.decoder)
    latent = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype("float32")
    expected = pipeline.decoder.predict_on_batch(latent)
    assert relative_error(decoder.predict_on_batch(latent), expected) < TOLERANCE
    assert decoder.predict_on_batch(latent[:, :3, :5]).shape == (1, 24, 40, 3)
    assert load_decoder(folder, 64, 48).output_shape == (None, 64, 48, 3)
    with pytest.raises(ValueError, match="'emoji' must be a tiny VAE .TAESD.; it is an ordinary"):
        load_decoder("emoji")


# What is refused


def write_latents(path, channels):
    """Writes a decoder of so many channels of latents."""
    save_file(make_half(DECODER, (channels, 3)), path)
    return path


def test_other_latents_are_refused(folder, tmp_path):
    path = write_latents(tmp_path / "taesd3_decoder.safetensors", 16)
    match = "vae must have latents of 4 channels.*not of 16. A TAESD of 16, such as taesd3 or taef1"
    with pytest.raises(ValueError, match=match):
        StableDiffusion(weights=None, config=FEW, vae=path)
    channels = StableDiffusion(weights="emoji").config.unet.out_channels
    with pytest.raises(ValueError, match=f"vae must have latents of {channels} channels.*not of 4"):
        StableDiffusion(weights="emoji", vae=folder)
    encoder = make_half(ENCODER, (3, 16))
    save_file(encoder, tmp_path / "taesd3_encoder.safetensors")
    assert TinyFiles(path).config.vae.latent_channels == 16
    write_latents(path, 8)
    with pytest.raises(ValueError, match="don't fit: .* widths are 6 and 6, .* 8 and 16 channels"):
        TinyFiles(path)


def test_the_command_refuses_in_one_line(folder, capsys):
    assert generate.main(["a cat", "--weights", "emoji", "--vae", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "vae must have latents of" in error[-1]
    assert sum("stable-diffusion: " in line for line in error) == 1


def test_the_command(folder, few_pipeline, reused, eagerly, tmp_path):
    few_pipeline.save(tmp_path / "few")
    out, path = tmp_path / "x.png", str(folder / "taesd_encoder.safetensors")
    arguments = ["a cat", "--weights", str(tmp_path / "few"), "--vae", path, "--steps", "1"]
    assert generate.main([*arguments, "--seed", "0", "--out", str(out)]) == 0
    model = StableDiffusion(64, 64, False, tmp_path / "few", vae=folder)
    (expected,) = model.text_to_image("a cat", num_steps=1, seed=[0], verbose=0)
    with PIL.Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)
        assert image.text["vae"] == path


def test_as_weights_it_is_told_what_it_is(folder):
    with pytest.raises(ValueError, match="looks like a tiny VAE .TAESD., which vae= loads"):
        open_checkpoint(folder / "taesd_decoder.safetensors")


def test_too_many_stages(tmp_path):
    tensors = make_half(["limit", "conv", "block", *["plain"] * 10, "conv"], (4, 3))
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors is no tiny VAE .*: encoder_blocks must be"):
        open_checkpoint(None, FEW, vae=tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("act_fn", "silu", "act_fn must be 'relu', not 'silu'"),
        ("upsample_fn", "bilinear", "upsample_fn must be 'nearest'"),
        ("upsampling_scaling_factor", 3, "upsampling_scaling_factor must be 2"),
        ("num_encoder_blocks", [1, 0], "num_encoder_blocks must be a list of positive ints"),
        ("num_encoder_blocks", [1, 2, 1], "encoder_block_out_channels must be 3 times 6"),
        ("encoder_block_out_channels", "6", "encoder_block_out_channels must be a list"),
        ("encoder_block_out_channels", [6, 6, 6, 8], "encoder_block_out_channels must be 4 times"),
        ("decoder_block_out_channels", [8] * 4, "decoder_block_out_channels must be 4 times 6"),
        ("latent_channels", 0, "latent_channels must be a positive int"),
        ("scaling_factor", "1", "scaling_factor must be a number"),
        ("_class_name", "VQModel", "must be 'AutoencoderKL' or 'AutoencoderTiny', not 'VQModel'"),
    ],
)
def test_configs_that_are_refused(key, value, message, tmp_path):
    path = write_diffusers(tmp_path / "x", **{key: value})
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        open_checkpoint(None, FEW, vae=path)


def test_a_config_is_checked():
    with pytest.raises(ValueError, match="must have an entry for each stage, not 1 and 2"):
        TinyVAEConfig(4, (1,), (1, 1))
    with pytest.raises(ValueError, match="vae must be of type VAEConfig or of type TinyVAEConfig"):
        replace(FEW, vae=FEW.unet)
    config = replace(SD1, vae=TinyVAEConfig())
    assert undo_departures(config).vae == TinyVAEConfig() and TinyVAEConfig().cell_size == 8


# Saving


@pytest.mark.parametrize("format", ["diffusers", "keras"])
def test_saving_and_loading(format, pipeline, tmp_path):
    pipeline.save(tmp_path / "x", format)
    again = StableDiffusion(weights=tmp_path / "x", jit_compile=False)
    assert again.config.vae == TINY and isinstance(again.image_encoder, TinyEncoder)
    for component in ("decoder", "image_encoder"):
        check_equal(getattr(again, component), getattr(pipeline, component))


def test_the_folder_of_diffusers(pipeline, tmp_path):
    pipeline.save(tmp_path / "x")
    expected = write_diffusers(tmp_path / "expected")
    index = json.loads((tmp_path / "x/model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    written = json.loads((tmp_path / "x/vae/config.json").read_text())
    assert json.loads((expected / "config.json").read_text()).items() <= written.items()
    theirs = load_file(expected / "diffusion_pytorch_model.safetensors")
    ours = load_file(tmp_path / "x/vae/diffusion_pytorch_model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, name)
    # Its VAE by itself, and another one in place of it.
    few = StableDiffusion(64, 64, False, None, FEW, vae=tmp_path / "x")
    check_equal(few.decoder, pipeline.decoder)
    plain = StableDiffusion(64, 64, False, tmp_path / "x", vae=open_checkpoint(None, FEW))
    assert plain.config.vae == FEW.vae and isinstance(plain.decoder, Decoder)


@pytest.mark.parametrize("format", ["original", "kerascv"])
def test_formats_without_names_for_it(format, folder, tmp_path):
    model = StableDiffusion(64, 64, False, None, FEW, vae=folder)
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=f"format must be 'diffusers'.* not '{format}', which has"):
        model.save(path, format)
    assert not path.exists() and model._diffusion_model is None  # told before the work
