"""The noise schedule: how noise is added in training, and taken away step by step."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import numpy as np
from keras import ops


def timestep_embedding(timesteps, dim=320, max_period=10000):
    """Encodes timesteps as cosines and sines of geometrically spaced frequencies.

    Args:
        timesteps: array of ints `(B,)`.
        dim: number of features, even.
        max_period: longest period over 2π, in timesteps.

    Returns:
        float32 array `(B, dim)`: the cosines, then the sines.

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5, in the order of
    CompVis' `timestep_embedding`.
    """
    frequencies = max_period ** (-np.arange(dim // 2) / (dim // 2))
    angles = np.asarray(timesteps)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype("float32")


def split_prediction(output, sample, alpha, prediction_type="epsilon"):
    """Splits a noisy sample √alpha x0 + √(1 - alpha) noise, given what the model says of it.

    Args:
        output: what the model predicts, of the sample's shape.
        sample: the noisy sample.
        alpha: alphas_cumprod at the sample's timestep, a float.
        prediction_type: "epsilon" (the noise), "v_prediction" (Salimans and Ho 2022,
            https://arxiv.org/abs/2202.00512, appendix D) or "sample" (x0).

    Returns:
        The tuple `(x0, noise)`.
    """
    signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "epsilon":
        return (sample - sigma * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * sample - sigma * output, signal * output + sigma * sample
    return output, (sample - signal * output) / sigma


def ddim_step(output, sample, alpha, alpha_prev, prediction_type="epsilon"):
    """Takes one deterministic DDIM step, from noise level `alpha` to `alpha_prev`.

    A pure function of arrays or tensors; see `split_prediction` for the arguments.

    Reference: Song et al. 2021, https://arxiv.org/abs/2010.02502, equation 12 with σ = 0.
    """
    x0, noise = split_prediction(output, sample, alpha, prediction_type)
    return alpha_prev**0.5 * x0 + (1 - alpha_prev) ** 0.5 * noise


@dataclass(unsafe_hash=True)
class NoiseScheduler:
    """A diffusion process: its betas, forward (`add_noise`) and backward (`step`, `ddim_levels`).

    The first six arguments are KerasCV's, with its defaults. Schedules are float64 numpy arrays,
    cast when they are used.

    Args:
        train_timesteps: number of timesteps.
        beta_start, beta_end: the first and the last beta.
        beta_schedule: "linear", or "scaled_linear" (linear in √beta, Stable Diffusion's).
        variance_type: of the noise that `step` adds: "fixed_small", "fixed_large" (both also with
            "_log", which is the same), "learned" or "learned_range".
        clip_sample: whether `step` clips the predicted x0 to [-1, 1].
        prediction_type: see `split_prediction`.
        spacing: how `ddim_levels` spaces timesteps: "linspace" (both ends), "leading" or "trailing"
            (Lin et al. 2024, https://arxiv.org/abs/2305.08891, table 2).
        steps_offset: added to "leading" timesteps.
        final_alpha: alphas_cumprod after the last DDIM step; None is alphas_cumprod[0].

    Attributes:
        betas, alphas, alphas_cumprod: float64 arrays `(train_timesteps,)`.

    Raises:
        ValueError: an unknown schedule, prediction or spacing.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = 0
    final_alpha: float | None = 1.0

    def __post_init__(self):
        for field in fields(self):
            known, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in known:
                raise ValueError(f"{field.name} must be one of {known}, not {value!r}.")
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1
        ends = self.beta_start**power, self.beta_end**power
        self.betas = np.linspace(*ends, self.train_timesteps) ** (1 / power)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(self.alphas)

    def __len__(self):
        return self.train_timesteps

    def ddim_levels(self, num_steps):
        """Returns the DDIM steps in the order they are taken.

        Args:
            num_steps: how many, from 1 to `train_timesteps`; less by the offset of "leading".

        Returns:
            List of `(timestep, alpha, alpha_prev)`: an int and two floats.

        Raises:
            ValueError: `num_steps` is something else.
        """
        n, total = num_steps, self.train_timesteps
        most = total - self.steps_offset * (self.spacing == "leading")
        if not isinstance(n, int | np.integer) or not 1 <= n <= most:
            raise ValueError(f"num_steps must be an int from 1 to {most}, not {n!r}.")
        timesteps = {
            # Differs from KerasCV: a single step is the last timestep, because the first would
            # leave the noise as it is.
            "linspace": np.linspace(0, total - 1, n).round() if n > 1 else np.array([total - 1]),
            "leading": np.arange(n) * (total // n) + self.steps_offset,
            "trailing": np.arange(total, 0, -total / n)[:n].round()[::-1] - 1,
        }[self.spacing].astype(int)
        alphas = self.alphas_cumprod[timesteps].tolist()
        final = float(self.alphas_cumprod[0] if self.final_alpha is None else self.final_alpha)
        return list(zip(timesteps.tolist(), alphas, [final, *alphas[:-1]], strict=True))[::-1]

    def add_noise(self, original_samples, noise, timesteps):
        """Diffuses samples to their timesteps: √alpha x0 + √(1 - alpha) noise.

        Args:
            original_samples, noise: tensors `(B, h, w, C)`.
            timesteps: ints `(B,)`.

        Returns:
            Tensor `(B, h, w, C)`.

        Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 4.
        """
        alphas = self.alphas_cumprod[:, None, None, None]
        signal = ops.take((alphas**0.5).astype("float32"), timesteps, axis=0)
        sigma = ops.take(((1 - alphas) ** 0.5).astype("float32"), timesteps, axis=0)
        noise = ops.cast(sigma, noise.dtype) * noise
        return ops.cast(signal, original_samples.dtype) * original_samples + noise

    def step(self, model_output, timestep, sample, predict_epsilon=True):
        """Takes one stochastic (DDPM) step back; see `samplers.ddpm.ddpm_step`.

        Differs from KerasCV, which fails on Keras 3 when `clip_sample` is on, takes log variances
        for variances and looks for a learned variance among the rows, because those are errors.
        """
        from stable_diffusion.samplers.ddpm import ddpm_step

        return ddpm_step(self, model_output, timestep, sample, predict_epsilon)
