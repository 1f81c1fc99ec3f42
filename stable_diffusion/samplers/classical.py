"""Classical solvers of ordinary differential equations: Heun's method, and PNDM's multistep one."""

from stable_diffusion.noise_scheduler import diffuse, join_prediction, split_prediction


def heun(denoise, latent, levels, next_noise):
    """Samples with Heun's method: the model also runs at the end of each step but the last.

    For a sample x = x0 + σ noise, where σ² = (1 - alpha) / alpha, the noise is dx/dσ. A step goes
    along it to σ', as DDIM does, and then again along its mean of both ends. Each step but the last
    takes twice as long. Arguments and results are those of `noise_scheduler.ddim`.

    Reference: Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1.
    """
    for (timestep, alpha), (timestep_next, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = denoise(latent, alpha, timestep)
        # x / √ᾱ + (σ' - σ) ε, times √ᾱ': Euler's step (algorithm 1)
        latent = diffuse(x0, noise, alpha_next)
        if alpha_next < 1:
            _, noise_next = denoise(latent, alpha_next, timestep_next)
            # + √ᾱ' (σ' - σ) (ε' - ε) / 2, where √ᾱ' σ' is √(1-ᾱ') (algorithm 1)
            weight = ((1 - alpha_next) ** 0.5 - (alpha_next * (1 - alpha) / alpha) ** 0.5) / 2
            latent = latent + weight * (noise_next - noise)
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent


WEIGHTS = (  # of the model's outputs by the number of steps, the last output first
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(denoise, latent, levels, next_noise, prediction_type="epsilon"):
    """Samples with pseudo linear multistep (PLMS): along the mean of the model's last outputs.

    A step is DDIM's with a mean of up to four outputs, each from the start of a step. In the first
    step the model runs at both ends, unless it is the only one. Arguments and results are those of
    `noise_scheduler.ddim`.

    Args:
        denoise, latent, levels, next_noise: see `noise_scheduler.ddim`.
        prediction_type: of the model. What it predicts is averaged: of "v_prediction" it is v =
            √alpha noise - √(1 - alpha) x0.

    Reference: Liu et al. 2022, https://arxiv.org/abs/2202.09778, equations 9, 11 and 12, and
    equation 22 in place of its Runge-Kutta steps, as Stable Diffusion has it and diffusers'
    `PNDMScheduler` with skip_prk_steps.
    """

    def step_along(output):
        return diffuse(*split_prediction(output, latent, alpha, prediction_type), alpha_next)

    outputs = []
    for (timestep, alpha), (timestep_next, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = denoise(latent, alpha, timestep)
        outputs = [join_prediction(x0, noise, alpha, prediction_type), *outputs[:3]]
        # such as (55 e_1 - 59 e_2 + 37 e_3 - 9 e_4) / 24, where e_1 is the last output
        mean = sum(w * output for w, output in zip(WEIGHTS[len(outputs) - 1], outputs, strict=True))
        if len(outputs) == 1 and timestep_next is not None:
            end = denoise(step_along(mean), alpha_next, timestep_next)
            # (e + e') / 2, of both ends (equation 22)
            mean = (mean + join_prediction(*end, alpha_next, prediction_type)) / 2
        latent = step_along(mean)
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent
