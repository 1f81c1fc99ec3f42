"""Fine-tuning: what a training step needs around the three models, in plain Keras.

    folder.py        a folder of images with captions
    cache.py         their latents and contexts, computed once and kept on disk
    data.py          noisy latents and what the diffusion model is to predict, batch by batch
    methods.py       what is trained, and how it is saved: all, cross-attention, LoRA, a new word
    optimizers.py    any Keras optimizer with a schedule, and how much memory a run takes
    state.py         what a stopped run goes on from
    callbacks.py     saving, previews, the log of losses and its curve
    distribution.py  several devices and processes, by keras.distribution

All randomness of training is in `data.py`, where a seed and the number of the step determine a
batch. So a run can be stopped at any step, and divided among devices, and stays the same run. The
model is a functional Keras model without state of its own, for `compile` and `fit`:

    pipeline = StableDiffusion(weights="emoji", jit_compile=False)
    examples = read_folder("pictures")
    cache = Cache("cache", pipeline)
    examples, broken = cache.encode(examples)
    method = LoRA(pipeline, rank=4)
    data = NoisyLatents(cache, [Stream(examples)], pipeline.config.schedule, batch_size=4)
    model = method.compile(keras.optimizers.AdamW(1e-3))
    model.fit(data, epochs=10)
    method.save("lora.safetensors")

The command `stable-diffusion-finetune` is this with everything around it.
"""

from stable_diffusion.training.cache import Cache
from stable_diffusion.training.data import NoisyLatents, Stream
from stable_diffusion.training.folder import Example, read_folder
from stable_diffusion.training.methods import Full, LoRA, TextualInversion, remat_scope
from stable_diffusion.training.state import load_state, save_state

__all__ = [
    "Cache",
    "Example",
    "Full",
    "LoRA",
    "NoisyLatents",
    "Stream",
    "TextualInversion",
    "load_state",
    "read_folder",
    "remat_scope",
    "save_state",
]
