"""Watching a pipeline's UNet: at which step it runs, for which half of the guidance."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Pass:
    """One run of the UNet, or what is known before the first one.

    With guidance a batch of B images has 2 B entries, those of the negative prompt first; or the
    UNet runs twice, where the two contexts have different lengths.

    Attributes:
        step: number of the sampler's step, from 0; None before the first.
        timestep: place in the noise schedule, which the UNet is told; None before the first.
        prompt, negative: which entries of the batch see the prompt and which the negative prompt:
            slices, one of which may be empty.
        latent: float array `(B, h, w, any)`: the UNet's input without the negative prompt's half.
        output: float32 array, what the UNet predicted for all entries; None until it has run.
    """

    step: int | None = None
    timestep: int | float | None = None
    prompt: slice = field(default_factory=lambda: slice(0))
    negative: slice = field(default_factory=lambda: slice(0))
    latent: np.ndarray | None = field(default=None, repr=False, compare=False)
    output: np.ndarray | None = field(default=None, repr=False, compare=False)


@contextmanager
def watch_passes(model, see=None):
    """Watches the UNet of a pipeline, in whatever task.

    Args:
        model: the `StableDiffusion`.
        see: function of a `Pass`, called after each run of the UNet.

    Yields:
        Function without arguments that returns the `Pass` that is running, or was the last.
    """
    watcher, before = _Watcher(model._predict, see), model.__dict__.get("_predict")
    model._predict = watcher.predict
    try:
        yield lambda: watcher.current
    finally:
        del model._predict
        if before:  # that of another one around this
            model._predict = before


class _Watcher:
    """Stands before `StableDiffusion._predict`, and before the UNet that it runs."""

    def __init__(self, predict, see):
        self.predict_unwatched, self.see = predict, see
        self.current, self.second = Pass(), None

    def predict(self, unet, latent, timestep, context, negative, *guidance):
        count = len(latent)
        prompt, without = slice(count), slice(0)
        if negative is None and context is self.second:
            prompt, without = without, prompt
        elif negative is not None and negative.shape[1] == context.shape[1]:
            prompt, without = slice(count, 2 * count), slice(count)
        elif negative is not None:
            self.second = negative
        self.current = Pass(unet.step, timestep, prompt, without, latent)
        if not self.is_before(unet):  # it is in the second of two passes
            unet = _WatchedUNet(unet, self)
        return self.predict_unwatched(unet, latent, timestep, context, negative, *guidance)

    def is_before(self, unet):
        watched = isinstance(unet, _WatchedUNet)
        return watched and (unet.watcher is self or self.is_before(unet.unet))


class _WatchedUNet:
    def __init__(self, unet, watcher):
        self.unet, self.watcher, self.step = unet, watcher, unet.step

    def predict_on_batch(self, inputs):
        output = self.unet.predict_on_batch(inputs)
        self.watcher.current = replace(self.watcher.current, output=np.asarray(output, "float32"))
        if self.watcher.see:
            self.watcher.see(self.watcher.current)
        return output
