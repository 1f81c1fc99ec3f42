"""Image to image and inpainting by diffusers and here: the same parameters, image and noise.

    PYTHONPATH=. python tests/diffusers_tasks.py    # prints the table of tests/README.md

Needs PyTorch and diffusers. Where diffusers samples the VAE's posterior it gets the mean here, as
this package takes it.
"""

import tempfile
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_img2img as of_image_to_image,
)
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as of_inpaint
from diffusers_pipelines import make
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.masks import SEAM

SIZE, STEPS, GUIDANCE = 128, 10, 3.0
PROMPT, NEGATIVE = "a red apple on a blue background", "dull"
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
}
STRENGTHS = (0.3, 0.6, 0.8, 1.0)
FAMILIES = {"image to image": ("1", "2 v-prediction"), "inpainting": ("1", "1 inpainting")}
IMAGE = (
    np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype="uint8").repeat(8, 0).repeat(8, 1)
)
NOISE = np.random.default_rng(1).standard_normal((1, 16, 16, 4)).astype("float32")
MASK = np.ones((SIZE, SIZE), bool)  # multiples of a latent cell, as diffusers needs them
MASK[32:104, 24:88] = False


class Pair:
    """A pipeline of diffusers, and one of this package with the same parameters."""

    def __init__(self, theirs, ours):
        self.theirs, self.ours = theirs, ours

    def run_theirs(self, module, pipeline, sampler, strength, **options):
        """Runs a pipeline of diffusers with `NOISE`: uint8 `(H, W, 3)`."""
        parts = {
            name: getattr(self.theirs, name)
            for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        }
        config = self.theirs.scheduler.config  # whose defaults other classes would not take over
        parts["scheduler"] = SCHEDULERS[sampler].from_config(
            config, timestep_spacing=config.timestep_spacing
        )
        made = pipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        made.set_progress_bar_config(disable=True)
        noise = torch.from_numpy(np.moveaxis(NOISE, -1, 1).copy())
        with (
            patch.object(module, "randn_tensor", lambda *_, **__: noise),
            patch.object(module, "retrieve_latents", lambda out, **_: get_latents(out)),
        ):
            (image,) = made(
                PROMPT,
                image=Image.fromarray(IMAGE),
                negative_prompt=NEGATIVE,
                strength=strength,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                output_type="np",
                **options,
            ).images
        return (image * 255).astype("uint8")  # cut off, as here

    def image_to_image(self, sampler, strength):
        """Returns diffusers' image and ours."""
        theirs = self.run_theirs(
            of_image_to_image, diffusers.StableDiffusionImg2ImgPipeline, sampler, strength
        )
        (ours,) = self.ours.image_to_image(
            PROMPT, IMAGE, strength=strength, **self._options(sampler)
        )
        return theirs, ours

    def inpaint(self, sampler, strength):
        """Returns diffusers' image and ours."""
        painted = Image.fromarray((~MASK * 255).astype("uint8"))
        theirs = self.run_theirs(
            of_inpaint,
            diffusers.StableDiffusionInpaintPipeline,
            sampler,
            strength,
            mask_image=painted,
            height=SIZE,
            width=SIZE,
        )
        (ours,) = self.ours.inpaint(
            PROMPT, IMAGE, MASK, strength=strength, **self._options(sampler)
        )
        return theirs, ours

    def _options(self, sampler):
        return {
            "negative_prompt": NEGATIVE,
            "num_steps": STEPS,
            "unconditional_guidance_scale": GUIDANCE,
            "diffusion_noise": NOISE,
            "sampler": sampler,
            "verbose": 0,
        }


def get_latents(encoded):
    """Returns the mean of what a VAE encoded, or a tiny VAE's latents."""
    return encoded.latents if "latents" in encoded else encoded.latent_dist.mode()


def find_inside():
    """Returns where nothing of the image is blended into what is painted."""
    inside = np.zeros_like(MASK)
    inside[32 + SEAM : 104 - SEAM, 24 + SEAM : 88 - SEAM] = True
    return inside


def measure(pair, task, sampler, strength):
    """Returns the largest difference in levels of 255, and that of the pixels that are kept."""
    if task == "image to image":
        theirs, ours = pair.image_to_image(sampler, strength)
        return int(np.abs(theirs.astype(int) - ours).max()), None
    theirs, ours = pair.inpaint(sampler, strength)
    inside = find_inside()
    difference = np.abs(theirs.astype(int) - ours)[inside].max()
    return int(difference), int(np.abs(ours.astype(int) - IMAGE)[MASK].max())


def make_pair(family, folder, vae=None):
    """Returns a `Pair` of small models with random parameters; writes them to an empty folder.

    Args:
        family: key of `diffusers_pipelines.FAMILIES`.
        folder: path of the folder.
        vae: a VAE of diffusers, in place of that of the family.
    """
    theirs = make(family)
    theirs.register_modules(vae=vae or theirs.vae)
    theirs.save_pretrained(folder)
    return Pair(theirs, StableDiffusion(SIZE, SIZE, jit_compile=False, weights=folder))


def main():
    """Prints the table."""
    strengths = " | ".join(map(str, STRENGTHS))
    print(f"| task | model | sampler | {strengths} | kept pixels |")
    print("|" + "---|" * (4 + len(STRENGTHS)))
    for task, families in FAMILIES.items():
        for family in families:
            with tempfile.TemporaryDirectory() as folder:
                pair = make_pair(family, folder)
                for sampler in SCHEDULERS:
                    rows = [measure(pair, task, sampler, strength) for strength in STRENGTHS]
                    found = " | ".join(str(difference) for difference, _ in rows)
                    kept = "" if rows[0][1] is None else max(kept for _, kept in rows)
                    print(f"| {task} | {family} | {sampler} | {found} | {kept} |", flush=True)


if __name__ == "__main__":
    main()
