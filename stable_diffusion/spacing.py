"""Where between noise and image the steps lie: ways to space timesteps, and samplers' demands."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stable_diffusion.checks import check_int

LEAST_ALPHA = 2.0**-24  # for 0 where its logarithm is needed, as in diffusers


def log_sigma(alpha):
    """Returns log σ, where σ = √((1 - alpha) / alpha) is the noise beside a signal of weight 1."""
    alpha = np.maximum(alpha, LEAST_ALPHA)
    return 0.5 * np.log((1 - alpha) / alpha)


def space_karras(sigmas, n):
    """Returns timesteps whose σ are spaced evenly after its 7th root, see `SPACINGS`.

    Reference: Karras et al. 2022, https://arxiv.org/abs/2206.00364, equation 5 with ρ = 7, from the
    schedule's last σ to its first.
    """
    roots = sigmas[[-1, 0]] ** (1 / 7)
    spaced = (roots[0] + np.linspace(0, 1, n) * (roots[1] - roots[0])) ** 7
    return np.interp(np.log(spaced), np.log(sigmas), np.arange(len(sigmas)))[::-1]


SPACINGS = {  # functions of (σ of each timestep, n): n timesteps as floats, the least noisy first
    # Differs from KerasCV: a single step is the last timestep, because the first would leave the
    # noise as it is.
    "linspace": lambda sigmas, n: np.linspace(0 if n > 1 else len(sigmas) - 1, len(sigmas) - 1, n),
    "leading": lambda sigmas, n: np.arange(n) * float(len(sigmas) // n),
    "trailing": lambda sigmas, n: np.arange(len(sigmas), 0, -len(sigmas) / n)[:n][::-1].round(),
    # Song et al. 2021, https://arxiv.org/abs/2010.02502, appendix D.2, from the first timestep to
    # the last: proportional to the squares of 0, 1, 2 and so on.
    "quadratic": lambda sigmas, n: (len(sigmas) - 1) * np.linspace(1, 0, n)[::-1] ** 2,
    "karras": space_karras,
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which noise levels a sampler passes: what it demands of `NoiseScheduler.levels`.

    The defaults are DDIM's.

    Args:
        extra_point: whether one timestep more is spaced, of which the least noisy is left out:
            solvers that end without noise take their last step from where there is some left.
        rounded: whether timesteps are ints; otherwise they are floats between the schedule's.
        rounded_karras: whether timesteps are ints with the spacing "karras", too.
        final_alpha: alphas_cumprod where sampling ends; None is `NoiseScheduler.final_alpha`.
        least_alpha: what alphas_cumprod of 0 is replaced by, for solvers that need its logarithm.
        space: function like those in `SPACINGS`, which stands for all of them.
        refused: keys of `SPACINGS` that it can't be used with.
    """

    extra_point: bool = False
    rounded: bool = True
    rounded_karras: bool = False
    final_alpha: float | None = None
    least_alpha: float = 0.0
    space: Callable | None = None
    refused: tuple[str, ...] = ()

    def find_timesteps(self, alphas_cumprod, num_steps, spacing, offset=0):
        """Spaces the timesteps of sampling.

        Args:
            alphas_cumprod: float array, of each timestep of the schedule.
            num_steps: how many timesteps, from 1.
            spacing: a key of `SPACINGS`.
            offset: added to "leading" timesteps.

        Returns:
            Int or float array `(num_steps,)`, the noisiest first.

        Raises:
            ValueError: a spacing that is unknown or refused, or another number of steps.
        """
        if spacing not in (known := [name for name in SPACINGS if name not in self.refused]):
            where = " with this sampler" if self.refused else ""
            raise ValueError(f"spacing must be one of {', '.join(known)}{where}, not {spacing!r}.")
        extra = int(self.extra_point and spacing in ("linspace", "leading"))
        offset = {"leading": offset, "trailing": -1}.get(spacing, 0)
        offset = 0 if self.space else offset
        n = check_int("num_steps", num_steps, 1, len(alphas_cumprod) - extra - max(offset, 0))
        space, sigmas = self.space or SPACINGS[spacing], np.exp(log_sigma(alphas_cumprod))
        timesteps = space(sigmas, n + extra)[::-1][:n]
        if self.rounded and spacing != "karras":
            # `maximum` keeps quadratic ones apart, which are dense near zero
            timesteps = np.maximum(timesteps.round(), np.arange(n)[::-1]).astype(int)
        return timesteps + offset

    def find_alphas(self, alphas_cumprod, timesteps, spacing):
        """Returns alphas_cumprod at timesteps of `find_timesteps`, also between the schedule's."""
        known, places = log_sigma(alphas_cumprod), np.arange(len(alphas_cumprod))
        if timesteps.dtype == int:
            alphas = alphas_cumprod[timesteps]
        elif spacing == "karras":  # finds timesteps of σ as `NoiseScheduler.find_timestep` does
            alphas = 1 / (1 + np.exp(2 * np.interp(timesteps, places, known)))
        else:  # between timesteps σ is linear, as in diffusers
            alphas = 1 / (1 + np.interp(timesteps, places, np.exp(known)) ** 2)
        return np.maximum(alphas, self.least_alpha)


DEFAULT_GRID = Grid()
