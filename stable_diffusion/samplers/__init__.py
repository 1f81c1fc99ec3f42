"""The samplers: ways from noise to a clean latent.

A sampler is a generator function with the arguments and results of `noise_scheduler.ddim`:

    def sampler(denoise, latent, levels, next_noise):
        for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:]):
            x0, noise = denoise(latent, alpha, timestep)
            latent = ...  # at the noise level alpha_next
            sent = yield timestep, latent, x0
            latent = latent if sent is None else sent

It knows nothing of guidance, prediction types or the schedule. No array is changed in place. To add
a sampler, write such a function beside the paper's reference, and add its row to `SAMPLERS`.
"""

from stable_diffusion.noise_scheduler import DDIM, Sampler
from stable_diffusion.samplers.multistep import dpmpp_2m, unipc

SAMPLERS = {  # name: the function, and its noise levels where they are not DDIM's
    "ddim": DDIM,
    "dpmpp-2m": Sampler(dpmpp_2m, extra_point=True, final_alpha=1.0),
    "unipc": Sampler(unipc, extra_point=True, final_alpha=1.0),
}


def find_sampler(sampler) -> Sampler:
    """Returns the row of a name in `SAMPLERS`; of a generator function, one with DDIM's levels.

    Raises:
        ValueError: another name.
    """
    if isinstance(sampler, Sampler):
        return sampler
    if callable(sampler):
        return Sampler(sampler)
    if sampler not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler must be one of {known}, or a function, not {sampler!r}.")
    return SAMPLERS[sampler]
