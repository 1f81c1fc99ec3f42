"""Ways from noise to a latent: samplers, guidance, and features used again.

A sampler is a generator with the arguments of those in `SAMPLERS`, `(predict, latent, schedule,
num_steps)`.
"""

from functools import partial

from stable_diffusion.samplers.ddim import ddim
from stable_diffusion.samplers.deep_cache import DeepCache
from stable_diffusion.samplers.guidance import Guided
from stable_diffusion.samplers.multistep import dpmpp_2m, unipc

__all__ = ["SAMPLERS", "DeepCache", "Guided", "find"]

SAMPLERS = {
    "ddim": ddim,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-2m-quadratic": partial(dpmpp_2m, quadratic=True),
    "unipc": unipc,
}


def find(sampler):
    """Returns the generator function of a name in `SAMPLERS`, or what is a function already.

    Raises:
        ValueError: another name.
    """
    if callable(sampler):
        return sampler
    if sampler not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler must be one of {known}, or a function, not {sampler!r}.")
    return SAMPLERS[sampler]
