"""A small UNet that sees the guidance scale, in diffusers' words, and its random numbers.

Shared by the script that lets diffusers compute and the tests that compute the same.
"""

import zlib

import numpy as np

WIDTH, STEPS, SCALE = 12, 4, 1.5
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "time_cond_proj_dim": WIDTH,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def draw(name, *shape, deviation=1.0):
    """Returns the random numbers of a name, so that none has to be stored."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (deviation * rng.standard_normal(shape)).astype("float32")
