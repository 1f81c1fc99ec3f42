"""Lesson 9: your own sampler in 15 lines, with the same numbers as the package's.

    python scripts/lessons/09_sampler.py

Lesson 5 (DDIM) comes before.
"""

import numpy as np
from lesson import begin, save_picture, save_plot, where

from stable_diffusion import StableDiffusion
from stable_diffusion.noise_scheduler import ddim
from stable_diffusion.samplers.classical import heun
from stable_diffusion.samplers.multistep import dpmpp_2m

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)
context = model.encode_text("a cat face on a green background")

# --- 1. Sampling is to follow a curve ------------------------------------------------------------
#
# A latent with noise is √ᾱ x0 + √(1 - ᾱ) ε (lesson 3). Divide it by √ᾱ:
#
#     x = x0 + σ ε, where σ = √((1 - ᾱ) / ᾱ)
#
# Now the image keeps its size, and σ tells how much noise lies on it. If σ gets a little smaller, x
# changes by ε times that little: dx / dσ = ε. The model tells us ε for any x and σ. So to sample is
# to solve a differential equation: start somewhere, and go where the model points, until σ is 0.
# Karras et al. 2022, https://arxiv.org/abs/2206.00364, equations 1 and 3.
#
# Euler's method is the simplest: in each step go straight on, as the model points at its start.

# --- 2. A sampler --------------------------------------------------------------------------------
#
# is a generator function of four arguments. The package takes any such function as `sampler=`.
#
#   denoise     a function: denoise(latent, alpha, timestep) returns (x0, ε). The UNet and guidance
#               (lesson 6) are inside, so a sampler knows nothing of them.
#   latent      where to start: the noise.
#   levels      a list of (timestep, alpha), the noisiest first. The last is where the walk ends.
#   next_noise  a function that returns new noise, for samplers that want some.
#
# After each step it yields the step's timestep, the latent, and x0. Who runs it may send another
# latent back, to go on from there.


def find_sigma(alpha):
    return ((1 - alpha) / alpha) ** 0.5


def euler(denoise, latent, levels, next_noise):
    for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = denoise(latent, alpha, timestep)
        x = latent / alpha**0.5
        x = x + (find_sigma(alpha_next) - find_sigma(alpha)) * noise  # dx = dσ ε
        latent = x * alpha_next**0.5
        sent = yield timestep, latent, x0
        latent = latent if sent is None else sent


# --- 3. The same numbers -------------------------------------------------------------------------
#
# Put x0 = x - σ ε in, and you see that a step of Euler's method is a step of DDIM (lesson 5). So
# all our latents should be the package's. `spacing="karras"` makes steps shorter near σ = 0.


def sample(sampler, num_steps):
    """Returns the latent after each step, a list of (1, 16, 16, 8)."""
    options = {"num_steps": num_steps, "sampler": sampler, "spacing": "karras", "seed": 0}
    return [latent for _, _, latent, _ in model.generate_latents(context, **options)]


sigmas = [find_sigma(alpha) for _, alpha in model.config.schedule.levels(20, "karras")]
print(f"20 steps from σ = {sigmas[0]:.0f} to {sigmas[-2]:.2f} and {sigmas[-1]:.0f}")
apart = [np.abs(a - b).max() for a, b in zip(sample(euler, 20), sample("ddim", 20), strict=True)]
print(f"largest difference to {where(ddim)} after any step: {max(apart):.0e}")
assert max(apart) < 1e-3

# --- 4. How good is it? --------------------------------------------------------------------------
#
# With more and more steps all such methods end at the same latent. We take 300 steps of a good one
# for the truth, and look how far from it fewer steps end. Heun's method asks the model at both ends
# of a step, and goes along the mean. DPM-Solver++(2M) remembers the x0 of the step before. Guess
# which is best with 5 steps, and which with 40.

truth = sample("unipc", 300)[-1]
rows, curves = [], {}
for name, sampler in (("Euler, yours", euler), ("Heun", "heun"), ("DPM++ 2M", "dpmpp-2m")):
    row, errors, counts = [], [], (5, 10, 20, 40)
    for num_steps in counts:
        latent = sample(sampler, num_steps)[-1]
        errors.append(float(np.sqrt(np.mean((latent - truth) ** 2))))
        row.append((f"{name}, {num_steps} steps", model.decode_latents(latent)[0]))
    rows.append(row)
    curves[name] = np.log2(counts), np.log2(errors)
    print(f"  {name:12} {', '.join(f'{error:.3f}' for error in errors)} off after 5, 10, 20, 40")
save_picture(out / "09_samplers.png", rows)
save_plot(out / "09_errors.png", curves, "log2 of the number of steps", "log2 of the error")
print(f"Heun: {where(heun)}, DPM-Solver++(2M): {where(dpmpp_2m)}")

# With twice the steps Euler's error is a half: its order is 1. That of the others is a quarter or
# less: their order is 2, the slope of their lines is -2. With 40 steps they are far better. With 5
# they are worse: what they found elsewhere on the curve is too far away to help.

# --- Exercises: write these functions in my_answer.py, then run check.py 09 my_answer.py ----------
#
# 1. heun(denoise, latent, levels, next_noise): go as Euler does, ask for ε at the end, and go again
#    from the start along the mean of both ε. At σ = 0 no model is asked: the last step is Euler's.
# 2. dpmpp_2m(denoise, latent, levels, next_noise): with λ = -log σ and h = λ_next - λ a step is
#        latent_next = √((1 - ᾱ_next) / (1 - ᾱ)) latent + √ᾱ_next (1 - e^-h) D
#    with D = x0 in the first step, then D = x0 + h / (2 h_before) (x0 - x0_before). Where σ_next is
#    0, latent_next is x0. Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2.
# 3. find_order(steps, errors): the order p of a method, a float, if error = constant / steps^p.
