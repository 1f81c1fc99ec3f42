"""Fine-tuning in plain Keras: data, methods, and what a run needs around `compile` and `fit`.

README.md beside this file is the guide.

    folder.py        lists a folder of images with captions
    captions.py      reads metadata files and text files; finds captions that are too long
    cache.py         computes their latents and contexts once, and keeps them on disk
    data.py          makes batches: noisy latents, and the targets of the diffusion model
    methods.py       decides which parameters learn, and saves them; `METHODS` is the table
    optimizers.py    makes any Keras optimizer with a schedule; counts the memory of a run
    state.py         saves and loads the state of a run, so that a stopped run can go on
    callbacks.py     saves the state, generates previews, logs losses and draws their curve
    distribution.py  several devices and processes, with keras.distribution

All random numbers of training are made in `data.py`: a batch depends only on the seed and on the
number of the step. So a run can be stopped at any step or divided among devices, and computes the
same. The model is a functional Keras model for `compile` and `fit`:

    pipeline = StableDiffusion(weights="emoji", jit_compile=False)
    cache = Cache("cache", pipeline)
    examples, broken = cache.encode_examples(read_folder("images"))
    method = LoRA(pipeline, rank=4)
    data = NoisyLatents(cache, [Stream(examples)], pipeline.config.schedule, batch_size=4)
    model = method.compile(keras.optimizers.AdamW(1e-3))
    model.fit(data, epochs=10)
    method.save("lora.safetensors")

The command `stable-diffusion-finetune` adds arguments, previews, resuming and TensorBoard.
"""

from stable_diffusion.training.cache import Cache
from stable_diffusion.training.data import NoisyLatents, Stream
from stable_diffusion.training.folder import Example, read_folder
from stable_diffusion.training.methods import (
    METHODS,
    Full,
    LoRA,
    TextualInversion,
    remat_scope,
)
from stable_diffusion.training.state import load_state, save_state

__all__ = [
    "METHODS",
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
