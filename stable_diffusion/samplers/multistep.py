"""Multistep solvers of the diffusion ODE: DPM-Solver++(2M) and UniPC.

Both follow the same equation. With λ = log(√alpha / √(1 - alpha)), half the logarithm of the signal
to noise ratio, which grows by h from one noise level to the next,

    latent' = √((1 - alpha') / (1 - alpha)) latent + √alpha' (1 - e⁻ʰ) x0

would be exact if the model predicted the same x0 all the way. It doesn't; so each solver puts an
estimate of x0's mean over the step in its place, from what the model predicted at earlier steps.
One evaluation of the model a step, as DDIM, which is this equation with the x0 of the step's start.
"""

import math

import numpy as np

from stable_diffusion.noise_scheduler import split_prediction


def dpmpp_2m(predict, latent, schedule, num_steps, quadratic=False):
    """Samples with DPM-Solver++(2M): x0 is extended along the line through its last two values.

    Args:
        predict: function of `(latent, timestep)`, what the model predicts, of the latent's shape.
        latent: noise to start from, float array `(B, h, w, C)`.
        schedule: the `NoiseScheduler`.
        num_steps: number of steps, see `get_levels`.
        quadratic: whether steps are dense where noise is low, see `get_levels`.

    Yields:
        `(timestep, latent)` after each step: the timestep it started at and where it ended; the
        last latent is free of noise.

    Raises:
        ValueError: a number of steps that the schedule doesn't have.

    Reference: Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2. The first step and the
    last are of first order, as in diffusers' `DPMSolverMultistepScheduler` with its defaults.
    """
    levels = get_levels(schedule, num_steps, quadratic)
    return _solve(predict, latent, schedule, levels, correct=False)


def unipc(predict, latent, schedule, num_steps):
    """Samples with UniPC of order 2: as `dpmpp_2m`, and each step is taken once more, corrected.

    What the model predicts at the end of a step, which the next one needs anyway, tells a better
    mean of x0 over the step that led there. Arguments (but for `quadratic`), results and errors
    are `dpmpp_2m`'s.

    Reference: Zhao et al. 2023, https://arxiv.org/abs/2302.04867, algorithms 5 to 8 with p = 2 and
    B₂(h) = eʰ - 1, as diffusers' `UniPCMultistepScheduler` with its defaults.
    """
    return _solve(predict, latent, schedule, get_levels(schedule, num_steps), correct=True)


def get_levels(schedule, num_steps, quadratic=False):
    """Returns the noise levels at which the model is evaluated, the noisiest first.

    They are DDIM's of the same spacing, but for one: DDIM with "linspace" or "leading" ends on the
    first timesteps, which have hardly any noise, and these solvers reach zero from the level
    before. Those diffusers takes.

    Args:
        schedule: the `NoiseScheduler`.
        num_steps: how many: from 1 to `train_timesteps`; 1 less if the spacing is the schedule's
            and not "trailing".
        quadratic: whether timesteps are those of Song et al. 2021,
            https://arxiv.org/abs/2010.02502, appendix D.2, from the last timestep to the first, in
            place of the schedule's spacing: proportional to the squares of 0, 1, 2 and so on.

    Returns:
        List of `(timestep, alpha)`: an int and a float.

    Raises:
        ValueError: `num_steps` is something else.
    """
    n, total = num_steps, schedule.train_timesteps
    spare = int(not quadratic and schedule.spacing != "trailing")
    if not isinstance(n, int | np.integer) or not 1 <= n <= total - spare:
        raise ValueError(f"num_steps must be an int from 1 to {total - spare}, not {n!r}.")
    if quadratic:
        squares = (total - 1) * np.linspace(1, 0, n) ** 2
        timesteps = np.maximum(squares.round(), np.arange(n)[::-1]).astype(int)  # none twice
        alphas = schedule.alphas_cumprod[timesteps]
        return list(zip(timesteps.tolist(), alphas.tolist(), strict=True))
    levels = schedule.ddim_levels(n + spare)
    return [(timestep, alpha) for timestep, alpha, _ in levels[:n]]


class _Step:
    """A step from noise level `alpha` to `after`.

    Args:
        start: the latent at its start.
        x0: what the model predicted there.
        alpha, after: alphas_cumprod at both ends.
        previous: the `_Step` before, or None.
    """

    def __init__(self, start, x0, alpha, after, previous):
        def half_log_snr(alpha):
            return 0.5 * math.log(alpha / (1 - alpha))

        self.start, self.x0, self.alpha, self.after = start, x0, alpha, after
        self.h = half_log_snr(after) - half_log_snr(alpha)
        self.ratio = previous and previous.h / self.h
        # x0's change over the step, if it goes on as over the previous one.
        self.change = (x0 - previous.x0) / self.ratio if previous else 0.0

    def _end(self, mean):
        """Returns the latent at the end, for x0's mean over the step."""
        kept = ((1 - self.after) / (1 - self.alpha)) ** 0.5
        return kept * self.start - self.after**0.5 * math.expm1(-self.h) * mean

    def predicted(self):
        return self._end(self.x0 + self.change / 2)

    def corrected(self, x0_at_end):
        if not self.ratio:
            return self._end((self.x0 + x0_at_end) / 2)
        phi_1 = math.expm1(-self.h) / -self.h
        phi_2 = (phi_1 - 1) / -self.h
        phi_3 = (phi_2 - 1 / 2) / -self.h
        # The two weights solve UniPC's equation 5, R ρ B(h) = φ, whose determinant is 1 + ratio.
        expected = (phi_2 - 2 * phi_3) / phi_1 / (1 + self.ratio)
        found = phi_2 / phi_1 - expected
        return self._end(self.x0 + expected * self.change + found * (x0_at_end - self.x0))


def _solve(predict, latent, schedule, levels, correct):
    step = None
    for n, (timestep, alpha) in enumerate(levels):
        output = predict(latent, timestep)
        x0, _ = split_prediction(output, latent, alpha, schedule.prediction_type)
        if n + 1 == len(levels):
            yield timestep, x0  # without noise λ is infinite: nothing is left but x0
            return
        start = step.corrected(x0) if correct and step else latent
        step = _Step(start, x0, alpha, levels[n + 1][1], step)
        latent = step.predicted()
        yield timestep, latent
