"""DDIM, the pipeline's sampler unless told otherwise."""

from stable_diffusion.noise_scheduler import ddim_step


def ddim(predict, latent, schedule, num_steps):
    """Samples with DDIM.

    Args:
        predict: function of `(latent, timestep)`, what the model predicts, of the latent's shape.
        latent: noise to start from, float array `(B, h, w, C)`.
        schedule: the `NoiseScheduler`.
        num_steps: number of steps, see `NoiseScheduler.ddim_levels`.

    Yields:
        `(timestep, latent)` after each step: the timestep it started at and where it ended.
    """
    for timestep, alpha, alpha_prev in schedule.ddim_levels(num_steps):
        output = predict(latent, timestep)
        latent = ddim_step(output, latent, alpha, alpha_prev, schedule.prediction_type)
        yield timestep, latent
