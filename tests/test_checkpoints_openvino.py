"""Folders of models for OpenVINO: written on its backend, read and run on any.

Skipped where OpenVINO, or SciPy, which Keras' backend of that name takes, is not installed.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

from stable_diffusion import StableDiffusion
from stable_diffusion.checkpoints import release

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red apple on a blue background", "a cat face on a green background"]
SAVE = """
import sys
from stable_diffusion import StableDiffusion
model = StableDiffusion(weights=sys.argv[1], jit_compile=False)
kernel = model.decoder.weights[0]
kernel.assign(kernel * 1)  # a result of an operation, as an adapter's: part of what is traced
for dtype in ("bfloat16", "float16"):
    model.save(f"{sys.argv[2]}/{dtype}", format="openvino", dtype=dtype)
kernel.assign(kernel + 65520)
try:
    model.save(f"{sys.argv[2]}/float16", format="openvino", dtype="float16")
    sys.exit("written")
except ValueError as error:
    assert "not finite in float16; float32 and bfloat16 can hold them" in str(error), error
"""
needs_openvino = pytest.mark.skipif(
    not (find_spec("openvino") and find_spec("scipy")), reason="openvino or scipy isn't installed"
)


def save(weights, folder):
    result = subprocess.run(
        [sys.executable, "-c", SAVE, str(weights), str(folder)],
        env={**os.environ, "KERAS_BACKEND": "openvino", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save("emoji", folder)
    return folder


@pytest.fixture(scope="module")
def folder(folders):
    return folders / "float16"


@pytest.fixture(scope="module")
def model(folder):
    return StableDiffusion(weights=folder, jit_compile=False)


def draw(model, prompts):
    shape = (2, 16, 16, model.config.vae.latent_channels)
    noise = np.random.default_rng(0).standard_normal(shape)[: len(prompts)]
    return model.text_to_image(prompts, num_steps=10, diffusion_noise=noise, verbose=0)


@pytest.fixture(scope="module")
def expected():
    """Pictures of the checkpoint that was exported."""
    return draw(StableDiffusion(weights="emoji", jit_compile=False), PROMPTS)


@needs_openvino
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_draws_the_same_pictures(folders, dtype, expected):
    """In bfloat16 where the processor can; 47 dB are seen there."""
    model = StableDiffusion(weights=folders / dtype, jit_compile=False)
    for count in (2, 1):  # another batch size is compiled anew
        error = (draw(model, PROMPTS[:count]).astype("float64") - expected[:count]) ** 2
        assert (10 * np.log10(255**2 / error.mean((1, 2, 3))) >= 40).all()
    assert model.config.size == 128 and model.tokenizer.encode(PROMPTS[0])


@needs_openvino
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_takes_two_bytes_a_parameter_and_nothing_else_is_there(folders, dtype):
    folder = folders / dtype
    names = sorted(path.name for path in folder.iterdir())
    parts = ("text_encoder", "diffusion_model", "decoder")
    assert names == sorted(["config", *(f"{p}.{end}" for p in parts for end in ("xml", "bin"))])
    unet = StableDiffusion(weights="emoji", jit_compile=False).diffusion_model
    count = sum(int(np.prod(weight.shape)) for weight in unet.weights)
    size = (folder / "diffusion_model.bin").stat().st_size  # equal constants are there once
    assert 1.98 * count < size < 2.02 * count


@needs_openvino
@pytest.mark.parametrize("part", ["diffusion_model", "decoder"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nothing_is_left_to_compute_of_parameters_alone(folders, dtype, part):
    """Nor are there 1x1 convolutions, which are matrix products there."""
    import openvino

    graph = openvino.Core().read_model(folders / dtype / f"{part}.xml")
    sizes = set()
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        sources = [value.get_node().get_type_name() for value in node.input_values()]
        # Convert makes float32 of float16, of which compiling makes nothing.
        assert kind == "Convert" or not sources or set(sources) != {"Constant"}, node
        if kind == "Convolution":
            assert sources[1] == ("Constant" if dtype == "bfloat16" else "Convert")
            sizes.add(tuple(node.input(1).get_shape())[2:])
    assert sizes == {(3, 3)}


@needs_openvino
def test_prompts_of_web_interfaces_have_one_chunk(model):
    """More tokens than the exported UNet accepts are refused before anything runs."""
    options = {"prompt_syntax": "webui", "num_steps": 1, "verbose": 0}
    assert model.text_to_image("a (red:1.3) apple", **options).shape == (1, 128, 128, 3)
    for given in ({"prompt": "a cat BREAK a dog"}, {"prompt": "a", "negative_prompt": "cat " * 76}):
        with pytest.raises(ValueError, match="accepts contexts of 77 tokens, not 154, in chunks"):
            model.text_to_image(**given, **options)


@needs_openvino
def test_what_it_cannot_is_said(model, folder, tmp_path):
    with pytest.raises(ValueError, match="has no image_encoder.xml and .bin. Folders for OpenVINO"):
        _ = model.image_encoder
    with pytest.raises(ValueError, match="deep_cache needs a DiffusionModel"):
        model.text_to_image("a", deep_cache=2, verbose=0)
    with pytest.raises(ValueError, match="parameters can't be read or changed"):
        _ = model.diffusion_model.weights
    with pytest.raises(ValueError, match=r"accepts inputs of shapes \[\?,16,16,8\].*, not"):
        StableDiffusion(64, 64, jit_compile=False, weights=folder).text_to_image("a", verbose=0)
    release(model, "text_encoder")
    assert model._text_encoder is None and len(model.encode_text("a")) == 1


@needs_openvino
def test_damaged_folders(folder, tmp_path):
    copy = tmp_path / "copy"
    (copy / "config").mkdir(parents=True)
    for path in folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (copy / "text_encoder.xml").write_text("<net>")
    model = StableDiffusion(weights=copy, jit_compile=False)
    with pytest.raises(ValueError, match="text_encoder.xml can't be read by OpenVINO"):
        _ = model.text_encoder
    (copy / "decoder.xml").unlink()
    with pytest.raises(ValueError, match="has no decoder.xml"):
        _ = model.decoder


@pytest.mark.skipif(keras.backend.backend() == "openvino", reason="it is written there")
def test_other_backends_do_not_write_it(tmp_path):
    model = StableDiffusion(weights="emoji", jit_compile=False)
    with pytest.raises(ValueError, match="written with KERAS_BACKEND=openvino"):
        model.save(tmp_path / "out", format="openvino")
    assert not list(tmp_path.iterdir())
