"""Stable Diffusion in about 500 lines of Keras 3, equal to KerasCV's layer by layer.

Read `stable_diffusion.py` (the pipeline) first, then `clip_tokenizer.py`, `text_encoder.py`,
`diffusion_model.py`, `noise_scheduler.py` and `decoder.py`, in the order in which a picture is
made. Shapes are written with these letters: B batch, H W pixels, h w latent cells, T S tokens,
D width.
"""

from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.decoder import Decoder
from stable_diffusion.diffusion_model import DiffusionModel, DiffusionModelV2
from stable_diffusion.image_encoder import ImageEncoder
from stable_diffusion.noise_scheduler import NoiseScheduler
from stable_diffusion.stable_diffusion import StableDiffusion, StableDiffusionV2
from stable_diffusion.text_encoder import TextEncoder, TextEncoderV2

__version__ = "0.1.0"
