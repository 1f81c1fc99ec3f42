"""The samplers: ways from noise to a clean latent.

A sampler is a generator function with the arguments and results of `noise_scheduler.ddim`:

    def sampler(denoise, latent, levels, next_noise, **own_options):
        for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:]):
            x0, noise = denoise(latent, alpha, timestep)
            latent = ...  # at the noise level alpha_next
            sent = yield timestep, latent, x0
            latent = latent if sent is None else sent

It knows nothing of guidance or the schedule, nor of prediction types (but for one). No array is
changed in place. To add a sampler, write such a function beside the paper's reference, and add its
row to `SAMPLERS`. `README.md` in this folder tells them apart.
"""

import inspect
import warnings
from dataclasses import replace
from difflib import get_close_matches
from functools import partial

from stable_diffusion.checks import check_number
from stable_diffusion.noise_scheduler import ddim
from stable_diffusion.samplers.ancestral import ddpm, euler_a
from stable_diffusion.samplers.classical import heun, pndm
from stable_diffusion.samplers.consistency import lcm, space_lcm
from stable_diffusion.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, unipc
from stable_diffusion.samplers.sampler import DDIM, Sampler
from stable_diffusion.spacing import LEAST_ALPHA


def scale_noise(noise, alpha):
    """Returns √(1 - alpha) times the noise: diffusers' init_noise_sigma without an offset."""
    return (1 - alpha) ** 0.5 * noise


_ROW = partial(Sampler, options=())
_TO_1 = partial(_ROW, final_alpha=1.0)
_SIGMAS = partial(_TO_1, rounded=False, least_alpha=LEAST_ALPHA, start=scale_noise)
_SOLVER = partial(_TO_1, extra_point=True, rounded_karras=True, least_alpha=LEAST_ALPHA)
_FEW, _MULTISTEP = ("quadratic", "karras"), "DPMSolverMultistepScheduler"
SAMPLERS = {  # name: the function, and its noise levels where they are not DDIM's
    "ddim": DDIM,
    "ddpm": _TO_1(sample=ddpm, scheduler="DDPMScheduler"),
    "pndm": _ROW(sample=pndm, refused=_FEW, combines=True, scheduler="PNDMScheduler"),
    # Euler without noise is DDIM with other levels.
    "euler": _SIGMAS(sample=ddim, scheduler="EulerDiscreteScheduler"),
    "euler-a": _SIGMAS(sample=euler_a, scheduler="EulerAncestralDiscreteScheduler"),
    "heun": _SIGMAS(sample=heun, scheduler="HeunDiscreteScheduler"),
    "dpmpp-2m": _SOLVER(sample=dpmpp_2m, scheduler=f"{_MULTISTEP} dpmsolver++"),
    "dpmpp-2m-sde": _SOLVER(sample=dpmpp_2m_sde, scheduler=f"{_MULTISTEP} sde-dpmsolver++"),
    "unipc": _SOLVER(sample=unipc, scheduler="UniPCMultistepScheduler"),
    "lcm": _TO_1(sample=lcm, space=space_lcm, refused=_FEW, scheduler="LCMScheduler"),
}


def find_sampler(sampler, spacing=None) -> Sampler:
    """Returns the row of a name in `SAMPLERS`, or of its generator function.

    Another generator function gets DDIM's levels.

    Args:
        sampler: the name, function or row.
        spacing: a key of `SPACINGS`. With "leading" all samplers start from the noise as it is, as
            in diffusers, and the row says so.

    Raises:
        ValueError: another name. The message has the nearest one.
    """
    if isinstance(sampler, Sampler):
        row = sampler
    elif callable(sampler):
        rows = (row for row in SAMPLERS.values() if row.sample is sampler)
        row = next(rows, Sampler(sample=sampler))
    elif sampler in SAMPLERS:
        row = SAMPLERS[sampler]
    else:
        known, near = ", ".join(SAMPLERS), get_close_matches(str(sampler), SAMPLERS, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"sampler must be one of {known}, or a function, not {sampler!r:.200}.{hint}"
        )
    leads = spacing == "leading" and row.start is scale_noise
    return replace(row, start=DDIM.start) if leads else row


def name_sampler(config) -> tuple[str, str | None]:
    """Returns the sampler that a checkpoint names, a key of `SAMPLERS`, and its spacing.

    A class that is not in the table is told in a warning, and DDIM is taken.

    Args:
        config: the `SamplerConfig`.
    """
    wanted = f"{config.scheduler} {config.algorithm or 'dpmsolver++'}"
    for name, row in SAMPLERS.items():
        if row.scheduler in (config.scheduler, wanted):
            return name, None if config.spacing in row.refused else config.spacing
    named = config.scheduler + f" with {config.algorithm}" * (config.algorithm is not None)
    warnings.warn(
        f"The checkpoint names a sampler that is not here, {named!a:.200}. DDIM is taken.",
        stacklevel=2,
    )
    return "ddim", None


def is_for_few_steps(config) -> bool:
    """Tells whether a checkpoint says that it is a latent consistency model.

    Args:
        config: the `Config`.
    """
    named = config.sampler.scheduler == SAMPLERS["lcm"].scheduler
    return named or config.unet.guidance_width is not None


def choose_sampler(sampler, spacing, config) -> tuple[Sampler, str]:
    """Returns the row of a sampler, and the spacing of its timesteps.

    Args:
        sampler: see `find_sampler`; or "auto" for the one that the checkpoint names.
        spacing: a key of `SPACINGS`; None is that of the checkpoint.
        config: the checkpoint's `Config`.

    Raises:
        ValueError: see `find_sampler`.
    """
    if isinstance(sampler, str) and sampler == "auto":
        sampler, own = name_sampler(config.sampler)
        spacing = spacing or own
    spacing = spacing or config.schedule.spacing
    return find_sampler(sampler, spacing), spacing


def bind_options(sampler, options, prediction_type="epsilon") -> Sampler:
    """Returns the row of a sampler with options of its own filled in.

    Args:
        sampler: the `Sampler`.
        options: dict from the name of an option to its value.
        prediction_type: the model's.

    Raises:
        ValueError: an option that the sampler does not have, or a number outside its bounds.
    """
    names = (name for name, row in SAMPLERS.items() if row.scheduler == sampler.scheduler)
    name = next(names, getattr(sampler.sample, "__name__", "of yours"))
    filled = {"prediction_type": prediction_type} if sampler.combines else {}
    if sampler.options is None:
        parameters = list(inspect.signature(sampler.sample).parameters.values())[4:]
        bounds = {one.name: None for one in parameters}
        bounds |= {
            key: None for one in parameters if one.kind is one.VAR_KEYWORD for key in options
        }
    else:
        bounds = {key: limits for key, *limits in sampler.options}
    for key, value in options.items():
        if key not in bounds:
            known = ", ".join(bounds) or "none"
            raise ValueError(f"The sampler {name} has no option {key!a}: it accepts {known}.")
        filled[key] = check_number(key, value, *bounds[key]) if bounds[key] else value
    return replace(sampler, sample=partial(sampler.sample, **filled)) if filled else sampler
