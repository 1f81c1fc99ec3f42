"""The noise schedule: how noise is added in training, and removed step by step with DDIM."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import keras
import numpy as np
from keras import ops

from stable_diffusion.checks import check_fields
from stable_diffusion.spacing import DEFAULT_GRID, log_sigma

BOUNDS = {  # of the fields of `NoiseScheduler`: the least and the largest number
    "train_timesteps": (1, 100_000),
    "beta_start": (1e-9, 0.999),
    "beta_end": (1e-9, 0.999),
    "steps_offset": (0, 100_000),
    "final_alpha": (1e-9, 1.0),
}


class NoiseLevel(NamedTuple):
    """How noisy a latent is.

    Attributes:
        timestep: place in the schedule, which the diffusion model is told; None where sampling
            ends, because no model runs there.
        alpha: alphas_cumprod there: the share of the signal in the latent's variance. It is ᾱ in
            the equations beside the lines of this package, a bar over DDPM's α = 1 - β. ᾱ' is
            that of the next level, with less noise, and x' the latent there; ε is noise of
            variance 1 that is in the latent, z is new noise, σ is a deviation. DDIM's paper writes
            α for ᾱ; those of v and of DPM-Solver write α for √ᾱ. Equations have their papers'
            numbers.
    """

    timestep: int | float | None
    alpha: float


def timestep_embedding(timesteps, dim=320, max_period=10000):
    """Encodes timesteps as cosines and sines of geometrically spaced frequencies.

    Args:
        timesteps: array of ints or floats `(B,)`.
        dim: number of features, even.
        max_period: longest period over 2π, in timesteps.

    Returns:
        float32 array `(B, dim)`: the cosines, then the sines.

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5, in the order of
    CompVis' `timestep_embedding`.
    """
    # cos(t ω_i) and sin(t ω_i), where ω_i = 10000^(-i / (dim / 2)) (section 3.5)
    frequencies = max_period ** (-np.arange(dim // 2) / (dim // 2))
    angles = np.asarray(timesteps)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype("float32")


def diffuse(x0, noise, alpha):
    """Adds noise to a clean sample: √alpha x0 + √(1 - alpha) noise.

    A pure function of floats, arrays or tensors; alpha is alphas_cumprod at the new noise level.

    Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 4.
    """
    # x_t = √ᾱ x0 + √(1-ᾱ) ε (equation 4)
    return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


def join_prediction(x0, noise, alpha, prediction_type="epsilon"):
    """Returns what the model should predict of `diffuse(x0, noise, alpha)`: its training target.

    See `split_prediction`, the inverse, for the prediction types.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        # v = √ᾱ ε - √(1-ᾱ) x0 (Salimans and Ho, appendix D)
        return alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0
    return x0


def split_prediction(output, sample, alpha, prediction_type="epsilon"):
    """Splits a noisy sample √alpha x0 + √(1 - alpha) noise by what the model predicts of it.

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
        # x0 = (x_t - √(1-ᾱ) ε) / √ᾱ (Ho et al., equation 15)
        return (sample - sigma * output) / signal, output
    if prediction_type == "v_prediction":
        # x0 = √ᾱ x_t - √(1-ᾱ) v and ε = √ᾱ v + √(1-ᾱ) x_t (appendix D)
        return signal * sample - sigma * output, signal * output + sigma * sample
    return output, (sample - signal * output) / sigma


def ddim(denoise, latent, levels, next_noise, eta=0.0):
    """Samples with DDIM: each step goes to the next noise level along the predicted noise.

    Args:
        denoise: function of `(latent, alpha, timestep=None)` that returns `(x0, noise)`: the clean
            latent and the noise that the model predicts.
        latent: float array `(B, h, w, C)` at the first level.
        levels: list of `NoiseLevel`, the noisiest first. Sampling ends at the last one.
        next_noise: function that returns more noise of the latent's shape. DDIM needs none unless
            eta is positive.
        eta: how much of the noise is new, from 0 for none to 1 for as much as DDPM has.

    Yields:
        `(timestep, latent, x0)` after each step: the timestep where the step began, the latent
        where it ended, and the predicted clean latent. `send(latent)` replaces the latent.

    Reference: Song et al. 2021, https://arxiv.org/abs/2010.02502, equation 12, with σ of equation
    16.
    """
    for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = denoise(latent, alpha, timestep)
        # σ² = η² (1-ᾱ') / (1-ᾱ) (1 - ᾱ/ᾱ') (equation 16, squared)
        if variance := eta**2 * (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next):
            # x' = √ᾱ' x0 + √(1-ᾱ'-σ²) ε + σ z (equation 12)
            kept = max(1 - alpha_next - variance, 0.0)  # of the predicted noise's variance
            noise = kept**0.5 * noise + variance**0.5 * next_noise()
            latent = alpha_next**0.5 * x0 + noise
        else:
            # x' = √ᾱ' x0 + √(1-ᾱ') ε (equation 12 with σ = 0)
            latent = diffuse(x0, noise, alpha_next)
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent


@dataclass(unsafe_hash=True)
class NoiseScheduler:
    """A diffusion process: betas, adding noise (`add_noise`), removing it (`levels`, `step`).

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
        spacing: how `levels` spaces timesteps: "linspace" (both ends), "leading" or "trailing" (Lin
            et al. 2024, https://arxiv.org/abs/2305.08891, table 2).
        steps_offset: added to "leading" timesteps.
        final_alpha: alphas_cumprod where sampling ends; None is alphas_cumprod[0].
        zero_snr: whether betas are scaled so that nothing is left of the signal at the last
            timestep (Lin et al. 2024, algorithm 1). A model of "epsilon" can't begin there.

    Attributes:
        betas, alphas, alphas_cumprod: float64 arrays `(train_timesteps,)`.

    Raises:
        ValueError: an unknown schedule, variance, prediction or spacing.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    variance_type: Literal[
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ] = "fixed_small"
    clip_sample: bool = True
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = 0
    final_alpha: float | None = 1.0
    zero_snr: bool = False

    def __post_init__(self):
        check_fields(self, BOUNDS)
        if self.beta_start > self.beta_end or self.steps_offset >= self.train_timesteps:
            raise ValueError("beta_end must be at least beta_start, steps_offset a timestep.")
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1
        ends = self.beta_start**power, self.beta_end**power
        self.betas = np.linspace(*ends, self.train_timesteps) ** (1 / power)
        # α = 1 - β, and ᾱ is the product of all α so far (Ho et al., before equation 4)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(self.alphas)
        if self.zero_snr:
            signal = self.alphas_cumprod**0.5
            # √ᾱ becomes (√ᾱ - √ᾱ_T) √ᾱ_1 / (√ᾱ_1 - √ᾱ_T) (Lin et al., algorithm 1)
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
            self.alphas_cumprod = signal**2
            self.alphas = self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])
            self.betas = 1.0 - self.alphas

    def __len__(self):
        return self.train_timesteps

    def levels(self, num_steps, spacing=None, grid=DEFAULT_GRID):
        """Returns the noise levels that a sampler passes.

        Args:
            num_steps: how many steps, from 1 to `train_timesteps`; less by `steps_offset` with
                "leading", and by one for samplers with an extra point.
            spacing: a key of `spacing.SPACINGS`; None is the schedule's own.
            grid: a `spacing.Grid`, such as a `samplers.Sampler`, which says what its levels are.

        Returns:
            List of num_steps + 1 `NoiseLevel`, the noisiest first; the last has no timestep.

        Raises:
            ValueError: another number of steps, a spacing that is unknown or that the sampler
                refuses, or "epsilon" where alpha is 0.
        """
        known, spacing = self.alphas_cumprod, spacing or self.spacing
        timesteps = grid.find_timesteps(known, num_steps, spacing, self.steps_offset)
        self._check_alphas(self.prediction_type, timesteps)
        alphas = grid.find_alphas(known, timesteps, spacing)
        if grid.rounded_karras:
            timesteps = timesteps.round().astype(int)
        final = self.final_alpha if grid.final_alpha is None else grid.final_alpha
        final = float(known[0] if final is None else final)
        levels = zip(timesteps.tolist(), alphas.tolist(), strict=True)
        return [*(NoiseLevel(*level) for level in levels), NoiseLevel(None, final)]

    def find_timestep(self, alpha):
        """Returns the timestep, a float, at which alphas_cumprod is `alpha`, see `levels`."""
        known = log_sigma(self.alphas_cumprod)
        return float(np.interp(log_sigma(alpha), known, np.arange(len(known))))

    def _check_alphas(self, prediction_type, timesteps):
        alphas = self.alphas_cumprod[np.round(timesteps, 6).astype(int)]
        if prediction_type == "epsilon" and not alphas.all():
            raise ValueError("A model that predicts epsilon can't begin where alpha is 0: no x0.")

    def add_noise(self, original_samples, noise, timesteps):
        """Adds noise to samples as `diffuse` does, to each the noise of its own timestep.

        Args:
            original_samples, noise: tensors `(B, h, w, C)`.
            timesteps: ints `(B,)`.

        Returns:
            Tensor `(B, h, w, C)`.
        """
        alphas = self.alphas_cumprod[:, None, None, None]
        # x_t = √ᾱ x0 + √(1-ᾱ) ε (Ho et al., equation 4)
        signal = ops.take((alphas**0.5).astype("float32"), timesteps, axis=0)
        sigma = ops.take(((1 - alphas) ** 0.5).astype("float32"), timesteps, axis=0)
        noise = ops.cast(sigma, noise.dtype) * noise
        return ops.cast(signal, original_samples.dtype) * original_samples + noise

    def step(self, model_output, timestep, sample, predict_epsilon=True):
        """Takes one stochastic (DDPM) step, from `timestep` to the one before.

        Differs from KerasCV, which fails on Keras 3 when `clip_sample` is on, takes log variances
        for variances and looks for a learned variance among the rows, because those are errors.

        Args:
            model_output: tensor `(B, h, w, C)`; with 2 C channels where the variance is learned.
            timestep: int.
            sample: tensor `(B, h, w, C)`, the noisy sample.
            predict_epsilon: whether the model predicts what `prediction_type` says; otherwise it
                predicts x0.

        Returns:
            Tensor `(B, h, w, C)`.

        Raises:
            ValueError: a timestep outside the schedule, or "epsilon" where alpha is 0.

        Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equations 6 and 7; learned
        variances as by Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 15.
        """
        kind = self.variance_type
        if not 0 <= timestep < len(self):
            raise ValueError(f"timestep must be from 0 to {len(self) - 1}, not {timestep}.")
        beta, alpha = float(self.betas[timestep]), float(self.alphas[timestep])
        level = float(self.alphas_cumprod[timestep])
        level_next = float(self.alphas_cumprod[timestep - 1]) if timestep > 0 else 1.0

        if kind.startswith("learned"):
            model_output, predicted = ops.split(model_output, 2, axis=-1)
        prediction_type = self.prediction_type if predict_epsilon else "sample"
        self._check_alphas(prediction_type, timestep)
        x0, _ = split_prediction(model_output, sample, level, prediction_type)
        if self.clip_sample:
            x0 = ops.clip(x0, -1.0, 1.0)
        # Here `alpha` is α and `level` is ᾱ: the mean of x' is
        # √ᾱ' β / (1-ᾱ) x0 + √α (1-ᾱ') / (1-ᾱ) x_t (equation 7)
        x0_weight = level_next**0.5 * beta / (1 - level)
        sample_weight = alpha**0.5 * (1 - level_next) / (1 - level)
        mean = x0_weight * x0 + sample_weight * sample
        if timestep == 0:
            return mean

        # (1-ᾱ') / (1-ᾱ) β, the posterior's variance (equation 7)
        small = max((1 - level_next) / (1 - level) * beta, 1e-20)
        if kind == "learned":
            deviation = ops.sqrt(predicted)
        elif kind == "learned_range":
            share = (predicted + 1) / 2
            # exp(s log β + (1-s) log of the small variance) (Nichol and Dhariwal, equation 15)
            log_variance = share * float(np.log(beta)) + (1 - share) * float(np.log(small))
            deviation = ops.exp(0.5 * log_variance)
        else:
            deviation = (small if kind.startswith("fixed_small") else beta) ** 0.5
        if not hasattr(self, "seed_generator"):
            self.seed_generator = keras.random.SeedGenerator(seed=42)  # KerasCV's seed
        noise = keras.random.normal(ops.shape(sample), seed=self.seed_generator)
        # x' = mean + σ z (equation 6)
        return mean + deviation * noise
