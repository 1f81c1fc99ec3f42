"""Multistep solvers of the diffusion equation: DPM-Solver++(2M), with noise or without, and UniPC.

All follow the same equation. With λ = log(√alpha / √(1 - alpha)), half the logarithm of the signal
to noise ratio, which grows by h from one noise level to the next,

    latent' = √((1 - alpha') / (1 - alpha)) latent + √alpha' (1 - e⁻ʰ) x0

would be exact if the model predicted the same x0 everywhere in the step. It does not. So each
solver estimates the mean of x0 over the step from what the model predicted at earlier steps, and
puts this mean in place of x0. The model runs once a step, as with DDIM, which is this equation with
the x0 of the step's start.

With noise, the equation is that of a process which forgets as much of its old noise in a step as it
gets new noise, see `dpmpp_2m_sde`.
"""

import math


def dpmpp_2m(denoise, latent, levels, next_noise):
    """Samples with DPM-Solver++(2M): x0 is extended along the line through its last two values.

    Arguments and results are those of `noise_scheduler.ddim`. The last level must be free of noise
    (alpha 1); the last step arrives at the predicted x0.

    Reference: Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2. The first step and the
    last one are of first order, as in diffusers' `DPMSolverMultistepScheduler` with its defaults.
    """
    return _solve(denoise, latent, levels)


def dpmpp_2m_sde(denoise, latent, levels, next_noise):
    """Samples with SDE-DPM-Solver++(2M): as `dpmpp_2m`, with new noise in each step but the last.

    Reference: Lu et al. 2022, https://arxiv.org/abs/2211.01095, section 5, second order. The first
    step and the last one are of first order, as in diffusers' `DPMSolverMultistepScheduler` with
    algorithm_type "sde-dpmsolver++". The web interfaces' "SDE" samplers take their noise from a
    Brownian tree, so they draw other images from the same seed.
    """
    return _solve(denoise, latent, levels, next_noise=next_noise)


def unipc(denoise, latent, levels, next_noise):
    """Samples with UniPC of order 2: as `dpmpp_2m`, and each step is computed again, corrected.

    The model runs at the end of a step anyway, for the next step. What it predicts there gives a
    better mean of x0 over the step that ended there. Arguments and results are those of
    `noise_scheduler.ddim`; the last level is as for `dpmpp_2m`.

    Reference: Zhao et al. 2023, https://arxiv.org/abs/2302.04867, algorithms 5 to 8 with p = 2 and
    B₂(h) = eʰ - 1, as diffusers' `UniPCMultistepScheduler` with its defaults.
    """
    return _solve(denoise, latent, levels, correct=True)


class _Step:
    """A step from noise level `alpha` to `alpha_next`.

    Args:
        start: the latent at its start.
        x0: what the model predicted there.
        alpha, alpha_next: alphas_cumprod at both ends.
        previous: the `_Step` before, or None.
    """

    def __init__(self, start, x0, alpha, alpha_next, previous):
        def half_log_snr(alpha):
            return 0.5 * math.log(alpha / (1 - alpha))

        self.start, self.x0, self.alpha, self.alpha_next = start, x0, alpha, alpha_next
        self.h = half_log_snr(alpha_next) - half_log_snr(alpha)
        self.ratio = previous and previous.h / self.h
        # x0's change over the step, if it goes on as over the previous one.
        self.change = (x0 - previous.x0) / self.ratio if previous else 0.0

    def _find_end(self, mean, noise=None):
        """Returns the latent at the end, for x0's mean over the step, and new noise if any."""
        kept = ((1 - self.alpha_next) / (1 - self.alpha)) ** 0.5
        if noise is None:
            # x' = √((1-ᾱ') / (1-ᾱ)) x - √ᾱ' (e⁻ʰ - 1) mean (algorithm 2)
            return kept * self.start - self.alpha_next**0.5 * math.expm1(-self.h) * mean
        new = -math.expm1(-2 * self.h)  # the new noise's share of the noise's variance at the end
        # x' = √((1-ᾱ') / (1-ᾱ)) e⁻ʰ x + √ᾱ' (1 - e⁻²ʰ) mean + √((1-ᾱ') (1 - e⁻²ʰ)) z (section 5)
        return (
            kept * math.exp(-self.h) * self.start
            + self.alpha_next**0.5 * new * mean
            + ((1 - self.alpha_next) * new) ** 0.5 * noise
        )

    def predict_end(self, noise=None):
        """Returns the latent at the end, from x0 at the start, its last change and new noise."""
        # mean = (1 + 1/(2r)) x0 - 1/(2r) x0 of the step before, r the `ratio` (algorithm 2)
        return self._find_end(self.x0 + self.change / 2, noise)

    def correct_end(self, x0_at_end):
        """Returns the latent at the end again, now that the x0 predicted there is known."""
        if not self.ratio:
            return self._find_end((self.x0 + x0_at_end) / 2)
        phi_1 = math.expm1(-self.h) / -self.h
        phi_2 = (phi_1 - 1) / -self.h
        phi_3 = (phi_2 - 1 / 2) / -self.h
        # The two weights solve UniPC's equation 5, R ρ B(h) = φ, whose determinant is 1 + ratio.
        expected = (phi_2 - 2 * phi_3) / phi_1 / (1 + self.ratio)
        found = phi_2 / phi_1 - expected
        return self._find_end(self.x0 + expected * self.change + found * (x0_at_end - self.x0))


def _solve(denoise, latent, levels, correct=False, next_noise=None):
    step = None
    for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, _ = denoise(latent, alpha, timestep)
        if alpha_next == 1:  # without noise λ is infinite: nothing is left but x0
            latent = x0
        else:
            start = step.correct_end(x0) if correct and step else latent
            step = _Step(start, x0, alpha, alpha_next, step)
            latent = step.predict_end(next_noise() if next_noise else None)
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent
