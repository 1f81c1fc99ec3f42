"""The noise schedule: how noise is added in training, and taken away step by step."""

from dataclasses import dataclass
from functools import cached_property

import keras
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


CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "variance_type": tuple(
        "fixed_small fixed_small_log fixed_large fixed_large_log learned learned_range".split()
    ),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "spacing": ("linspace", "leading", "trailing"),
}


@dataclass(frozen=True)
class NoiseScheduler:
    """The betas of a diffusion process, forward (`add_noise`) and backward (`step`, `ddim_levels`).

    The first six arguments are KerasCV's, with its defaults. Its `step` crashes on Keras 3 when it
    clips, takes "_log" variances for variances and looks for a learned variance among the rows;
    this one follows the papers. Schedules are float64 numpy arrays here, cast when they are used.

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
        final_alpha: noise level after the last DDIM step; None is alphas_cumprod[0].

    Raises:
        ValueError: an unknown schedule, variance, prediction or spacing.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    spacing: str = "linspace"
    steps_offset: int = 0
    final_alpha: float | None = 1.0

    def __post_init__(self):
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")

    @cached_property
    def betas(self):
        """Variance that each timestep adds, float64 `(train_timesteps,)`."""
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1
        ends = self.beta_start**power, self.beta_end**power
        return np.linspace(*ends, self.train_timesteps) ** (1 / power)

    @cached_property
    def alphas(self):
        """What of the signal's variance each timestep keeps, float64 `(train_timesteps,)`."""
        return 1.0 - self.betas

    @cached_property
    def alphas_cumprod(self):
        """What is left of the signal's variance at each timestep, float64 `(train_timesteps,)`."""
        return np.cumprod(self.alphas)

    @cached_property
    def seed_generator(self):
        """Source of the noise that `step` adds, with KerasCV's seed."""
        return keras.random.SeedGenerator(seed=42)

    def __len__(self):
        return self.train_timesteps

    def ddim_levels(self, num_steps):
        """Returns the DDIM steps in the order they are taken.

        Args:
            num_steps: how many, from 1 to `train_timesteps`.

        Returns:
            List of `(timestep, alpha, alpha_prev)`: an int and two floats.

        Raises:
            ValueError: `num_steps` is something else.
        """
        n, total = num_steps, self.train_timesteps
        if not isinstance(n, int | np.integer) or not 1 <= n <= total:
            raise ValueError(f"num_steps must be an int from 1 to {total}, not {n!r}.")
        timesteps = {
            # Differs from KerasCV: a single step is the last timestep, because the first would
            # leave the noise as it is.
            "linspace": np.linspace(0, total - 1, n).round() if n > 1 else np.array([total - 1]),
            "leading": np.arange(n) * (total // n) + self.steps_offset,
            "trailing": np.arange(total, 0, -total / n).round()[::-1] - 1,
        }[self.spacing].astype(int)
        alphas = self.alphas_cumprod[timesteps]
        final = self.alphas_cumprod[0] if self.final_alpha is None else self.final_alpha
        levels = timesteps.tolist(), alphas.tolist(), [float(final), *alphas.tolist()[:-1]]
        return list(zip(*levels, strict=True))[::-1]

    def add_noise(self, original_samples, noise, timesteps):
        """Diffuses samples to their timesteps: √alpha x0 + √(1 - alpha) noise.

        Args:
            original_samples, noise: tensors `(B, h, w, C)`.
            timesteps: ints `(B,)`.

        Returns:
            Tensor `(B, h, w, C)`.

        Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 4.
        """
        signal, sigma = (
            ops.cast(ops.take(table.astype("float32"), timesteps)[:, None, None, None], x.dtype)
            for table, x in (
                (self.alphas_cumprod**0.5, original_samples),
                ((1 - self.alphas_cumprod) ** 0.5, noise),
            )
        )
        return signal * original_samples + sigma * noise

    def step(self, model_output, timestep, sample, predict_epsilon=True):
        """Takes one ancestral (DDPM) step, from `timestep` to the one before.

        Args:
            model_output: tensor `(B, h, w, C)`; 2 C channels where the variance is learned.
            timestep: int.
            sample: tensor `(B, h, w, C)`, the noisy sample.
            predict_epsilon: whether the model predicts as `prediction_type` says, else it
                predicts x0.

        Returns:
            Tensor `(B, h, w, C)`.

        Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equations 6 and 7; learned
        variances as by Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 15.
        """
        beta, alpha = self.betas[timestep], self.alphas[timestep]
        level = self.alphas_cumprod[timestep]
        level_prev = self.alphas_cumprod[timestep - 1] if timestep > 0 else 1.0
        if self.variance_type.startswith("learned"):
            model_output, predicted = ops.split(model_output, 2, axis=-1)
        kind = self.prediction_type if predict_epsilon else "sample"
        x0, _ = split_prediction(model_output, sample, float(level), kind)
        if self.clip_sample:
            x0 = ops.clip(x0, -1.0, 1.0)
        mean = float(level_prev**0.5 * beta / (1 - level)) * x0
        mean = mean + float(alpha**0.5 * (1 - level_prev) / (1 - level)) * sample
        if timestep == 0:
            return mean
        small = max(float((1 - level_prev) / (1 - level) * beta), 1e-20)
        if self.variance_type == "learned":
            deviation = ops.sqrt(predicted)
        elif self.variance_type == "learned_range":
            share = (predicted + 1) / 2
            deviation = ops.exp(0.5 * (share * np.log(beta) + (1 - share) * np.log(small)))
        else:
            deviation = (small if "small" in self.variance_type else float(beta)) ** 0.5
        return mean + deviation * keras.random.normal(ops.shape(sample), seed=self.seed_generator)
