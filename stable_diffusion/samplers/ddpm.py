"""The ancestral sampler of the diffusion process, behind `NoiseScheduler.step`."""

import keras
import numpy as np
from keras import ops

from stable_diffusion.noise_scheduler import split_prediction

VARIANCE_TYPES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)


def ddpm_step(scheduler, model_output, timestep, sample, predict_epsilon=True):
    """Takes one stochastic step, from `timestep` to the one before.

    Args:
        scheduler: a `NoiseScheduler`.
        model_output: tensor `(B, h, w, C)`; with 2 C channels where the variance is learned.
        timestep: int.
        sample: tensor `(B, h, w, C)`, the noisy sample.
        predict_epsilon: whether the model predicts as `scheduler.prediction_type` says, else it
            predicts x0.

    Returns:
        Tensor `(B, h, w, C)`.

    Raises:
        ValueError: an unknown `scheduler.variance_type`, or a timestep outside the schedule.

    Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equations 6 and 7; learned
    variances as by Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 15.
    """
    kind = scheduler.variance_type
    if kind not in VARIANCE_TYPES:
        raise ValueError(f"variance_type must be one of {', '.join(VARIANCE_TYPES)}, not {kind!r}.")
    if not 0 <= timestep < len(scheduler):
        raise ValueError(f"timestep must be from 0 to {len(scheduler) - 1}, not {timestep}.")
    beta, alpha = float(scheduler.betas[timestep]), float(scheduler.alphas[timestep])
    level = float(scheduler.alphas_cumprod[timestep])
    level_prev = float(scheduler.alphas_cumprod[timestep - 1]) if timestep > 0 else 1.0

    if kind.startswith("learned"):
        model_output, predicted = ops.split(model_output, 2, axis=-1)
    prediction_type = scheduler.prediction_type if predict_epsilon else "sample"
    x0, _ = split_prediction(model_output, sample, level, prediction_type)
    if scheduler.clip_sample:
        x0 = ops.clip(x0, -1.0, 1.0)
    x0_weight = level_prev**0.5 * beta / (1 - level)
    sample_weight = alpha**0.5 * (1 - level_prev) / (1 - level)
    mean = x0_weight * x0 + sample_weight * sample
    if timestep == 0:
        return mean

    small = max((1 - level_prev) / (1 - level) * beta, 1e-20)  # the posterior's variance
    if kind == "learned":
        deviation = ops.sqrt(predicted)
    elif kind == "learned_range":
        share = (predicted + 1) / 2
        log_variance = share * float(np.log(beta)) + (1 - share) * float(np.log(small))
        deviation = ops.exp(0.5 * log_variance)
    else:
        deviation = (small if kind.startswith("fixed_small") else beta) ** 0.5
    if not hasattr(scheduler, "seed_generator"):
        scheduler.seed_generator = keras.random.SeedGenerator(seed=42)  # KerasCV's seed
    noise = keras.random.normal(ops.shape(sample), seed=scheduler.seed_generator)
    return mean + deviation * noise
