"""Makes what tests/test_backends.py compares with: images of a tiny model on one backend.

    KERAS_BACKEND=jax python tests/data/make_backends_golden.py tests/data/backends_golden.npz

The parameters and the noise come from numpy, so that every backend starts from the same ones. The
test runs this program on each backend that is installed.
"""

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
rng = np.random.default_rng(0)
jit = keras.backend.backend() == "jax"  # which is slow without
model = StableDiffusion(weights=None, jit_compile=jit, config=TINY)
for part in (model.text_encoder, model.diffusion_model, model.decoder, model.image_encoder):
    part.set_weights(
        [
            0.1 * rng.standard_normal(v.shape) + (v.name == "gamma")
            if len(v.shape) == 1
            else rng.standard_normal(v.shape) / np.sqrt(np.prod(v.shape[:-1]))
            for v in part.weights
        ]
    )
images = model.text_to_image(
    ["a red apple", "a blue cat"],
    negative_prompt="dull",
    num_steps=3,
    verbose=0,
    diffusion_noise=rng.standard_normal((2, 8, 8, 4)),
)
latents = model.image_encoder.predict_on_batch(images.astype("float32") / 127.5 - 1)
np.savez_compressed(sys.argv[1], images=images, latents=np.asarray(latents))
