"""The same parameters, noise and prompt give the same picture on every backend, within 2 levels.

Each backend that is installed draws in a process of its own; the reference is the first of them.
OpenVINO in the precision of its choice, bfloat16 where the processor has it, is compared by itself.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BACKENDS = ("tensorflow", "jax", "torch", "openvino")
INSTALLED = [backend for backend in BACKENDS if find_spec(backend)]
LEVELS = 2

DRAW = """
import sys

import keras
import numpy as np

from stable_diffusion import StableDiffusion
from stable_diffusion.config import TINY

if keras.backend.backend() == "openvino":  # by default it computes in bfloat16 where the CPU can
    import openvino

    compile_model = openvino.compile_model
    openvino.compile_model = lambda model, device: compile_model(
        model, device, {"INFERENCE_PRECISION_HINT": "f32"}
    )
target, rng = sys.argv[1], np.random.default_rng(0)
jit = keras.backend.backend() == "jax"  # which is slow without
model = StableDiffusion(weights=None, jit_compile=jit, config=TINY)
for part in (model.text_encoder, model.diffusion_model, model.decoder, model.image_encoder):
    part.set_weights([
        0.1 * rng.standard_normal(v.shape) + (v.name == "gamma") if len(v.shape) == 1
        else rng.standard_normal(v.shape) / np.sqrt(np.prod(v.shape[:-1]))
        for v in part.weights
    ])
images = model.text_to_image(
    ["a red apple", "a blue cat"],
    negative_prompt="dull",
    num_steps=3,
    verbose=0,
    diffusion_noise=rng.standard_normal((2, 8, 8, 4)),
)
latents = model.image_encoder.predict_on_batch(images.astype("float32") / 127.5 - 1)
np.savez(target, images=images, latents=np.asarray(latents))
"""


DRAW_EMBEDDED = """
import sys

import numpy as np

from stable_diffusion import StableDiffusion

model = StableDiffusion(weights="emoji", jit_compile=False)
shape = (2, 16, 16, model.config.vae.latent_channels)
images = model.text_to_image(
    ["a red apple on a blue background", "a cat face on a green background"],
    num_steps=10,
    verbose=0,
    diffusion_noise=np.random.default_rng(0).standard_normal(shape),
)
np.savez(sys.argv[1], images=images)
"""

DRAW_CHANGED = """
import sys

import numpy as np
from safetensors.numpy import save_file

from stable_diffusion import StableDiffusion
from stable_diffusion.adapters.lora import load_lora, unload_lora

model, target = StableDiffusion(weights="emoji", jit_compile=False), sys.argv[1]
width = model.config.unet.widths[-1]
name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
halves = {f"{name}.lora_down.weight": (1, width), f"{name}.lora_up.weight": (width, 1)}
lora = f"{target}.safetensors"
rng = np.random.default_rng(0)
halves = {key: rng.standard_normal(shape, "float32") for key, shape in halves.items()}
save_file(halves, lora)


def draw(deep_cache):
    shape = (1, 16, 16, model.config.vae.latent_channels)
    noise = np.random.default_rng(0).standard_normal(shape)
    prompt = "a red apple on a blue background"
    options = {"num_steps": 3, "verbose": 0, "diffusion_noise": noise, "deep_cache": deep_cache}
    return model.text_to_image(prompt, **options)


pictures = {}
for cache in (1, 2):
    pictures[f"before_{cache}"] = draw(cache)
    load_lora(model, lora)
    pictures[f"with_{cache}"] = draw(cache)
    unload_lora(model)
    pictures[f"after_{cache}"] = draw(cache)
np.savez(target, **pictures)
"""


def run(backend, code, target):
    """Runs a program on a backend; returns the arrays it writes."""
    result = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    with np.load(target) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Returns a function that draws with a backend, once."""
    folder, results = tmp_path_factory.mktemp("drawn"), {}

    def draw(backend):
        if backend not in results:
            results[backend] = run(backend, DRAW, folder / f"{backend}.npz")
        return results[backend]

    return draw


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_are_equal(backend, drawn):
    if backend not in INSTALLED:
        pytest.skip(f"the backend {backend} is not installed")
    if backend == INSTALLED[0] and len(INSTALLED) == 1:
        pytest.skip(f"{backend} is the only backend that is installed: nothing to compare it with")
    found, expected = drawn(backend), drawn(INSTALLED[0])
    assert found["images"].shape == (2, 64, 64, 3) and found["images"].dtype == np.uint8
    assert found["images"].std() > 1
    assert np.abs(found["images"].astype(int) - expected["images"]).max() <= LEVELS
    np.testing.assert_allclose(found["latents"], expected["latents"], atol=1e-2)


def test_openvinos_own_precision(tmp_path):
    if "openvino" not in INSTALLED or len(INSTALLED) == 1:
        pytest.skip("openvino, or a backend to compare it with, is not installed")
    images = [
        run(backend, DRAW_EMBEDDED, tmp_path / f"{backend}.npz")["images"].astype("float64")
        for backend in (INSTALLED[0], "openvino")
    ]
    error = np.mean((images[0] - images[1]) ** 2, axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error) >= 40).all(), "PSNR in dB; 49 is seen"


def test_openvino_in_bfloat16_is_refused(tmp_path):
    """Keras takes the bits of what comes out for float16."""
    if "openvino" not in INSTALLED:
        pytest.skip("openvino is not installed")
    code = "import keras; keras.config.set_dtype_policy('mixed_bfloat16')\n" + DRAW_EMBEDDED
    with pytest.raises(AssertionError, match="policy on OpenVINO must be float32"):
        run("openvino", code, tmp_path / "none.npz")


@pytest.mark.parametrize("backend", BACKENDS)
def test_changed_parameters_count_at_once(backend, tmp_path):
    """Also where they were compiled in for the picture before."""
    if backend not in INSTALLED:
        pytest.skip(f"the backend {backend} is not installed")
    pictures = run(backend, DRAW_CHANGED, tmp_path / "changed.npz")
    for cache in (1, 2):
        before, changed, after = (pictures[f"{n}_{cache}"] for n in ("before", "with", "after"))
        np.testing.assert_array_equal(before, after)
        assert np.abs(before.astype(int) - changed).max() > 16
