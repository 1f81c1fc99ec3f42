"""Makes tests/data/guided_golden.npz: what diffusers' UNet that sees the guidance scale predicts.

    pip install torch diffusers transformers
    python tests/data/make_guided_golden.py

All parameters and inputs are random numbers that follow from their names, so that only results are
stored: those of the UNet, and of four steps of `LCMScheduler`.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from guided_inputs import BETAS, SCALE, STEPS, UNET, WIDTH, draw

FILE = Path(__file__).parent / "guided_golden.npz"
SCALES = (1.0, 1.5, 7.5)


def first(array):
    """Returns a tensor with the channels first."""
    return torch.from_numpy(array).movedim(-1, 1).contiguous()


def embed(scale, width=WIDTH):
    """Returns diffusers' embedding of a guidance scale."""
    scale = torch.tensor([scale - 1])
    return StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, width)


@torch.no_grad()
def make():
    """Returns the results, with the channels last."""
    unet = UNet2DConditionModel(**UNET).eval()
    unet.load_state_dict(
        {
            name: torch.from_numpy(draw(name, *tensor.shape, deviation=0.4))
            for name, tensor in unet.state_dict().items()
        }
    )
    context = torch.from_numpy(draw("context", 1, 77, 16))
    latent = first(draw("latent", 1, 8, 8, 4))
    found = {f"embedding {scale}": embed(scale) for scale in SCALES}
    found["odd"] = embed(SCALE, WIDTH + 1)
    found["output"] = unet(latent, 981, context, timestep_cond=embed(SCALE)).sample.movedim(1, -1)
    scheduler, latents = LCMScheduler(**BETAS), []
    scheduler.set_timesteps(STEPS)
    for step, timestep in enumerate(scheduler.timesteps):
        output = unet(latent, timestep, context, timestep_cond=embed(SCALE)).sample
        noise = first(draw(f"noise {step}", 1, 8, 8, 4))
        with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", return_value=noise):
            latent = scheduler.step(output, timestep, latent).prev_sample
        latents.append(latent.movedim(1, -1))
    found["latents"] = torch.stack(latents)
    return {name: tensor.numpy() for name, tensor in found.items()}


if __name__ == "__main__":
    np.savez_compressed(FILE, **make())
    print(f"{FILE}: {FILE.stat().st_size} bytes")
