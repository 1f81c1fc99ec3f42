"""The same parameters, noise and prompt give the same image on every backend, within 2 levels.

Each backend that is installed generates in a process of its own. The reference is what the JAX
backend generated once, tests/data/backends_golden.npz, so that each environment has two backends to
compare (tests/data/make_backends_golden.py makes the file). OpenVINO in the precision of its
choice, bfloat16 where the processor has it, is compared by itself.
"""

from importlib.util import find_spec

import keras
import numpy as np
import pytest
from helpers import DATA, run_python

BACKENDS = ("tensorflow", "jax", "torch", "openvino")
INSTALLED = [backend for backend in BACKENDS if find_spec(backend)]
MARKS = {"jax": [pytest.mark.large], "torch": [pytest.mark.torch]}  # TensorFlow is for every day
MARKED = [pytest.param(backend, marks=MARKS.get(backend, [])) for backend in INSTALLED]
LEVELS = 2
needs_openvino = pytest.mark.skipif("openvino" not in INSTALLED, reason="openvino isn't installed")

GENERATE = """
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

GENERATE_CHANGED = """
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


def generate(deep_cache):
    shape = (1, 16, 16, model.config.vae.latent_channels)
    noise = np.random.default_rng(0).standard_normal(shape)
    prompt = "a red apple on a blue background"
    options = {"num_steps": 3, "verbose": 0, "diffusion_noise": noise, "deep_cache": deep_cache}
    return model.text_to_image(prompt, **options)


images = {}
for cache in (1, 2):
    images[f"before_{cache}"] = generate(cache)
    load_lora(model, lora)
    images[f"with_{cache}"] = generate(cache)
    unload_lora(model)
    images[f"after_{cache}"] = generate(cache)
np.savez(target, **images)
"""


def run(backend, code, target, monkeypatch=None):
    """Runs a program on a backend; returns the arrays it writes.

    With `monkeypatch` it needs no other process for the backend of this one.
    """
    if monkeypatch and backend == keras.backend.backend():
        monkeypatch.setattr("sys.argv", ["-c", str(target)])
        exec(code, {})
    else:
        run_python(code, target, backend=backend)
    with np.load(target) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("backend", MARKED)
def test_images_are_equal(backend, tmp_path, monkeypatch):
    code = (DATA / "make_backends_golden.py").read_text("utf-8")
    found = run(backend, code, tmp_path / "found.npz", monkeypatch)
    with np.load(DATA / "backends_golden.npz") as file:
        expected = dict(file)
    assert found["images"].shape == (2, 64, 64, 3) and found["images"].dtype == np.uint8
    assert expected["images"].std() > 20, "the images have too little contrast to be compared"
    assert np.abs(found["images"].astype(int) - expected["images"]).max() <= LEVELS
    np.testing.assert_allclose(found["latents"], expected["latents"], atol=1e-2)


@needs_openvino
def test_openvinos_own_precision(tmp_path, monkeypatch):
    images = [
        run(backend, GENERATE, tmp_path / f"{backend}.npz", monkeypatch)["images"].astype("float64")
        for backend in (INSTALLED[0], "openvino")
    ]
    error = np.mean((images[0] - images[1]) ** 2, axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error) >= 40).all(), "PSNR in dB; 49 is seen"


@needs_openvino
def test_openvino_in_bfloat16_is_refused(tmp_path):
    """Keras takes the bits of what comes out for float16."""
    code = "import keras; keras.config.set_dtype_policy('mixed_bfloat16')\n" + GENERATE
    with pytest.raises(AssertionError, match="policy on OpenVINO must be float32"):
        run("openvino", code, tmp_path / "none.npz")


@pytest.mark.large
@pytest.mark.parametrize("backend", MARKED)
def test_changed_parameters_count_at_once(backend, tmp_path):
    """Also where they were compiled in for the image before."""
    images = run(backend, GENERATE_CHANGED, tmp_path / "changed.npz")
    for cache in (1, 2):
        before, changed, after = (images[f"{n}_{cache}"] for n in ("before", "with", "after"))
        np.testing.assert_array_equal(before, after)
        assert np.abs(before.astype(int) - changed).max() > 16
