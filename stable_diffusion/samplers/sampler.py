"""What the pipeline knows of a sampler."""

from collections.abc import Callable
from dataclasses import dataclass

from stable_diffusion.noise_scheduler import ddim
from stable_diffusion.spacing import Grid


@dataclass(frozen=True, kw_only=True)
class Sampler(Grid):
    """A row of the table of samplers: a generator function, and which noise levels it passes.

    Args:
        sample: generator function with the arguments and results of `noise_scheduler.ddim`.
        start: function of noise and alpha that returns the latent at the first level; None leaves
            that to `sample`, which gets the noise.
        options: the options of its own, all numbers: name, least and largest value of each; None
            for those that `sample` has, of any kind.
        combines: whether it combines what the model predicts, and so is told the prediction type.
        scheduler: the class of diffusers that means it; with its algorithm_type, if several do.
        **levels: see `Grid`.
    """

    sample: Callable
    start: Callable | None = lambda noise, alpha: noise
    options: tuple[tuple[str, float, float], ...] | None = None
    combines: bool = False
    scheduler: str | None = None


DDIM = Sampler(sample=ddim, options=(("eta", 0.0, 1.0),), scheduler="DDIMScheduler")
