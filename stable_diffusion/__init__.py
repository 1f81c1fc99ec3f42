"""Stable Diffusion in about 500 lines of Keras 3, equal to KerasCV's layer by layer.

Read `stable_diffusion.py` (the pipeline) first, then `clip_tokenizer.py`, `text_encoder.py`,
`diffusion_model.py`, `noise_scheduler.py` and `decoder.py`, in the order in which a picture is
made. Shapes are written with these letters: B batch, H W pixels, h w latent cells, T S tokens,
D width.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    **dict.fromkeys(["checkpoints", "samplers", "tiling", "training"], []),  # subpackages
    "clip_tokenizer": ["SimpleTokenizer"],
    "decoder": ["Decoder"],
    "diffusion_model": ["DiffusionModel", "DiffusionModelV2"],
    "image_encoder": ["ImageEncoder"],
    "noise_scheduler": ["NoiseScheduler"],
    "stable_diffusion": ["StableDiffusion", "StableDiffusionV2"],
    "text_encoder": ["TextEncoder", "TextEncoderV2"],
}


def __getattr__(name):  # Keras is imported when it is first needed, so that `--help` is quick
    for module, names in _PUBLIC.items():
        if name == module or name in names:
            found = import_module(f"{__name__}.{module}")
            return getattr(found, name, found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
