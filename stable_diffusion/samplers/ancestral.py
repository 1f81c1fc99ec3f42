"""Ancestral samplers, which add new noise in each step: DDPM's and Euler's.

Both are DDIM with eta 1, on other noise levels: the table of samplers says on which. In DDPM's
words, a step goes from alpha to alpha' with β = 1 - alpha / alpha', and draws from the posterior

    latent' = √alpha' β / (1 - alpha) x0 + √(1 - β) (1 - alpha') / (1 - alpha) latent + √variance z
    variance = β (1 - alpha') / (1 - alpha)

In Euler's words, for samples x = x0 + σ noise with σ² = (1 - alpha) / alpha, a step goes along the
noise down to less noise than σ', and new noise lifts it up to σ':

    x' = x0 + σ_down noise + σ_up z,   σ_up² = σ'² (σ² - σ'²) / σ²,   σ_down² = σ'² - σ_up²

Put `latent = √alpha x0 + √(1 - alpha) noise` into the first line and `latent' = √alpha' x'` into
the second: both give equation 12 of DDIM's paper with η = 1, as its section 4.1 says of DDPM.
"""

from stable_diffusion.noise_scheduler import ddim


def ddpm(denoise, latent, levels, next_noise):
    """Samples with DDPM, from one noise level to any other one. The variance is the small one.

    Arguments and results are those of `noise_scheduler.ddim`.

    Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equations 6 and 7.
    """
    return ddim(denoise, latent, levels, next_noise, eta=1.0)


def euler_a(denoise, latent, levels, next_noise):
    """Samples with Euler's method and new noise, the web interfaces' "Euler a".

    Arguments and results are those of `noise_scheduler.ddim`.

    Reference: Crowson 2022, `sample_euler_ancestral` of https://github.com/crowsonkb/k-diffusion;
    Karras et al. 2022, https://arxiv.org/abs/2206.00364, for its words.
    """
    return ddim(denoise, latent, levels, next_noise, eta=1.0)
