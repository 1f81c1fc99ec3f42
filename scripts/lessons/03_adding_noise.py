"""Lesson 3: adding noise. The way down, which the model learns to walk up.

    python scripts/lessons/03_adding_noise.py

Nothing that lessons 1 and 2 say of prompts is needed here.
"""

import numpy as np
from lesson import begin, save_picture, save_plot, where

from stable_diffusion import NoiseScheduler, StableDiffusion
from stable_diffusion.noise_scheduler import diffuse

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)
(image,) = model.text_to_image("a cat face on a green background", seed=3, num_steps=25, verbose=0)

# --- 1. An image and noise -----------------------------------------------------------------------
#
# A diffusion model learns to remove noise. For that one needs images with noise, and they are easy
# to make. We mix an image x0 with noise ε, whose numbers are normal: mean 0, variance 1.
#
#     x_t = √ᾱ x0 + √(1 - ᾱ) ε
#
# This is equation 4 of Ho et al. 2020, https://arxiv.org/abs/2006.11239.
# ᾱ (alpha bar) says how much of the image is left: 1 is all, 0 is nothing. The package calls one of
# them `alpha`, and the list of all 1000 `alphas_cumprod`. Why the square roots? Variances add up.
# If x0 has variance 1, then x_t has ᾱ + (1 - ᾱ) = 1 too: it never gets larger or smaller, only
# noisier.

x0 = image / 127.5 - 1  # pixels from 0 to 255 become numbers from -1 to 1
x0 = x0 / x0.std()  # and get variance 1: the mean squared distance from their mean
noise = np.random.default_rng(0).normal(size=x0.shape)
print(f"x0 {x0.shape}, noise {noise.shape}; made by {where(diffuse)}")
row = []
for alpha in (1.0, 0.9, 0.5, 0.1, 0.01):
    noisy = diffuse(x0, noise, alpha)
    print(f"  ᾱ = {alpha:4}: variance {noisy.var():.2f}, of which noise {1 - alpha:.0%}")
    row.append((f"alpha = {alpha}", ((noisy + 2) / 4).clip(0, 1)))
save_picture(out / "03_noise.png", [row])

# Half of the variance is noise in the middle picture, and you still see the cat. At 0.1 you still
# see a face. At 0.01 you see noise; a model still sees a little. That is the point: at
# every level there is something to guess: fine lines on the left, "is it round?" on the right.

# --- 2. A thousand levels ------------------------------------------------------------------------
#
# Training uses 1000 levels, the timesteps t. Each step multiplies what is left of the image by a
# number a little below 1: ᾱ_t = (1 - β_1) (1 - β_2) ... (1 - β_t). (The paper counts from 1, the
# code and all below from 0: ᾱ_0 = 1 - β_0.) The list of the βs is the noise schedule. It is chosen,
# not learned. That of this checkpoint, and that of Stable Diffusion 1:

own = model.config.schedule
usual = NoiseScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
timesteps = np.arange(1000)
print(f"\nβ from {usual.betas[0]:.5f} to {usual.betas[-1]:.3f}: {where(NoiseScheduler)}")
for t in (0, 250, 500, 750, 999):
    print(f"  t = {t:3}: ᾱ = {own.alphas_cumprod[t]:.4f} here, {usual.alphas_cumprod[t]:.4f} there")
assert np.allclose(np.cumprod(1 - usual.betas), usual.alphas_cumprod)
curves = {"this checkpoint": own.alphas_cumprod, "Stable Diffusion 1": usual.alphas_cumprod}
curves = {name: (timesteps, alphas) for name, alphas in curves.items()}
save_plot(out / "03_schedule.png", curves, "timestep t", "alpha: how much of the variance is image")

# At t = 999 nearly nothing is left. So pure noise, which is easy to draw, looks to the model like
# an image at t = 999. That is how it generates: it starts there and walks back (lesson 5).

# --- 3. Signal to noise --------------------------------------------------------------------------
#
# The ratio ᾱ / (1 - ᾱ) is the signal to noise ratio. 1 means as much image as noise. At which
# timestep is that? Guess before you look: in the middle, at 500? The curve in the picture tells.

snr = own.alphas_cumprod / (1 - own.alphas_cumprod)
equal = int(np.argmin(np.abs(snr - 1)))
print(f"\nas much image as noise: at t = {equal}, where the ratio is {snr[equal]:.3f}")

# --- 4. What the model is trained on -------------------------------------------------------------
#
# One step of training: take an image (a latent, lesson 7), a random timestep and noise. Mix them.
# Show the mix and the timestep to the model, and ask: which noise did I add? The loss is the mean
# squared error of its answer: equation 14 of the paper. That is all. The package adds noise to a
# batch, each image at its own timestep:

batch = np.stack([x0] * 3).astype("float32")
some = np.random.default_rng(1).normal(size=batch.shape).astype("float32")
mixed = np.asarray(own.add_noise(batch, some, np.array([0, equal, 999])))
print(f"\na batch of three timesteps: {mixed.shape}, {where(NoiseScheduler.add_noise)}")
for n, t in enumerate((0, equal, 999)):
    likeness = np.corrcoef(mixed[n].ravel(), x0.ravel())[0, 1]
    print(f"  t = {t:3}: the correlation with the image is {likeness:.2f}: √ᾱ, up to chance")

# --- Exercises: write these functions in my_answer.py, then run check.py 03 my_answer.py ----------
#
# 1. add_noise(x0, noise, alpha): x_t of the equation above.
# 2. find_timestep(betas): the first timestep (from 0) at which there is more noise than image in
#    the variance, an int. betas is (1000), as in NoiseScheduler.betas.
# 3. find_noise(noisy, x0, alpha): the noise that was added. Solve the equation for ε.
