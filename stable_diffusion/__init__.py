"""Stable Diffusion in a few hundred lines of Keras 3, equal to KerasCV layer by layer.

Read `stable_diffusion.py` (the pipeline) first, then `clip_tokenizer.py`, `text_encoder.py`,
`diffusion_model.py`, `noise_scheduler.py` and `decoder.py`: the order in which an image is made.

Shapes are written with these letters: B batch, H W pixels, h w latent cells, C channels, T S
tokens, D width, N heads.

Public names
------------
From KerasCV, with its signatures: `StableDiffusion`, `StableDiffusionV2`, `TextEncoder`,
`TextEncoderV2`, `DiffusionModel`, `DiffusionModelV2`, `Decoder`, `ImageEncoder`,
`NoiseScheduler`, `SimpleTokenizer`. Beside them these names may be used; everything else may move:

    name                                                          what for
    ------------------------------------------------------------  --------------------------------
    StableDiffusion.generate_latents .decode_latents              the loop, step by step
    StableDiffusion.generate_image(callback=)                     watching the loop
    StableDiffusion.tokenize                                      ids of a prompt, padded
    StableDiffusion.save .load_lora .unload_lora .load_embedding  files of parameters
    StableDiffusion.config .checkpoint                            what was loaded
    config.Config .TextConfig .UNetConfig .VAEConfig              architectures
    config.TinyVAEConfig                                          that of a tiny VAE
    tiny_vae.TinyDecoder .TinyEncoder .load_decoder               TAESD, a tiny VAE
    config.SD1 .SD2 .SD1_INPAINTING .TINY .TINY_V2                named ones
    config.undo_departures                                        KerasCV's dialect to the original
    checkpoints.open_checkpoint .save_checkpoint .FORMATS         formats of checkpoints
    checkpoints.release                                           freeing a component's memory
    adapters.lora.load_lora .unload_lora                          LoRA
    adapters.embedding.load_embedding                             textual inversion
    samplers.SAMPLERS .Sampler .find_sampler                      the table of samplers
    noise_scheduler.ddim .NoiseLevel                              the contract of samplers
    noise_scheduler.diffuse .split_prediction .join_prediction    the diffusion process
    noise_scheduler.timestep_embedding                            what the UNet is told of time
    training.Cache .NoisyLatents .Stream .Example .read_folder    data of fine-tuning
    training.Full .LoRA .TextualInversion .remat_scope            methods of fine-tuning
    training.METHODS                                              the table of methods
    training.load_state .save_state                               resuming
    explain.attention_probe .Place                                attention, to see and change
    explain.heat_maps .HeatMaps                                   where an image looks at a word
    explain.trace .Trace                                          everything of one image
    parity.keras_cv                                               comparing with KerasCV
"""

from importlib import import_module

from stable_diffusion.version import __version__

_MODULES = {  # names that are imported when they are first used, so that `--help` is quick
    "SimpleTokenizer": "clip_tokenizer",
    "Decoder": "decoder",
    "DiffusionModel": "diffusion_model",
    "DiffusionModelV2": "diffusion_model",
    "ImageEncoder": "image_encoder",
    "NoiseScheduler": "noise_scheduler",
    "StableDiffusion": "stable_diffusion",
    "StableDiffusionV2": "stable_diffusion",
    "TextEncoder": "text_encoder",
    "TextEncoderV2": "text_encoder",
    **dict.fromkeys(
        (
            "adapters",
            "checkpoints",
            "config",
            "explain",
            "parity",
            "samplers",
            "tiny_vae",
            "training",
        )
    ),
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name] or name}")
    return getattr(module, name) if _MODULES[name] else module


def __dir__():
    return sorted({*globals(), *__all__})
