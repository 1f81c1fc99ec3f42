"""Sampling from an image: noise is added to it, or parts of it are kept.

Each function makes a `Sampler` of another one, which goes on as before. They get the noise that
sampling would start from, and make their first latent themselves.
"""

from dataclasses import replace

import numpy as np

from stable_diffusion.checks import check_int
from stable_diffusion.noise_scheduler import diffuse
from stable_diffusion.samplers.sampler import Sampler


def start_from(sampler: Sampler, image) -> Sampler:
    """Returns a sampler that starts from an image with noise, not from noise alone.

    Args:
        sampler: the `Sampler`.
        image: function that returns clean latents, float32 `(B, h, w, C)`. It is called when
            sampling begins.

    Reference: Meng et al. 2022, https://arxiv.org/abs/2108.01073 (SDEdit), section 3.
    """

    def sample(denoise, noise, levels, next_noise, **options):
        # x_t = √ᾱ image + √(1-ᾱ) ε: where the way back to an image begins (section 3)
        latent = diffuse(image(), noise, levels[0].alpha)
        yield from sampler.sample(denoise, latent, levels, next_noise, **options)

    return replace(sampler, sample=sample, start=None)


def keep(sampler: Sampler, image, painted, num_resamples=1, from_noise=True) -> Sampler:
    """Returns a sampler that keeps parts of an image (inpainting).

    After each step the kept part is put back, with its own noise at that step's level; after the
    last one without any. Differs from KerasCV, which draws other noise in each step.

    Args:
        sampler: the `Sampler`.
        image: function that returns clean latents, float32 `(B, h, w, C)`, see `start_from`.
        painted: bool `(B, h, w, 1)`, True where the image is not kept.
        num_resamples: how often each step but the last is taken. Before each repetition the latent
            gets as much noise as the step removed, so that both parts come to fit. With more than 1
            the sampler begins anew in each step.
        from_noise: whether sampling starts from noise alone, otherwise from the image with noise.

    Raises:
        ValueError: `num_resamples` is no positive int.

    Reference: Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865 (RePaint), algorithm 1.
    """
    num_resamples, start = check_int("num_resamples", num_resamples), sampler.start

    def sample(denoise, noise, levels, next_noise, **options):
        def run(latent, levels):
            return sampler.sample(denoise, latent, levels, next_noise, **options)

        def put_back(latent, level):
            # painted x' + (1-painted) x_known, where x_known = √ᾱ x0 + √(1-ᾱ) ε (equation 8)
            known = clean if level.timestep is None else diffuse(clean, noise, level.alpha)
            return np.where(painted, latent, known)

        clean, alpha = image(), levels[0].alpha
        latent = start(noise, alpha) if from_noise else diffuse(clean, noise, alpha)
        steps, sent = run(latent, levels), None
        for here, there in zip(levels, levels[1:], strict=False):
            if num_resamples > 1:
                steps, sent = run(latent, [here, there]), None
            timestep, latent, x0 = steps.send(sent)
            latent = put_back(latent, there)
            for _ in range(num_resamples - 1 if there.timestep is not None else 0):
                # x = √(1-β) x' + √β z, where 1-β is ᾱ/ᾱ' (algorithm 1)
                again = diffuse(latent, next_noise(), here.alpha / there.alpha)
                timestep, latent, x0 = next(run(again, [here, there]))
                latent = put_back(latent, there)
            sent = yield timestep, latent, x0
            sent = latent = latent if sent is None else sent

    return replace(sampler, sample=sample, start=None)
