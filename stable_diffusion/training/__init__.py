"""Fine-tuning: what a training step needs around the three models, in plain Keras.

    pictures.py      a folder of pictures with captions; cropping, EXIF, transparency
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

`scripts/finetune.py` is this with everything around it.
"""

from importlib import import_module

_PUBLIC = {
    "cache": ["Cache"],
    "data": ["NoisyLatents", "Stream"],
    "methods": ["Full", "LoRA", "TextualInversion", "remat_scope"],
    "pictures": ["Example", "read_folder"],
    "state": ["load_state", "save_state"],
}


def __getattr__(name):  # Keras is imported when it is first needed, as in the package itself
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
