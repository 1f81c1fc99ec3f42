"""Lesson 4: one step. What the model sees, what it answers, and what one can do with the answer.

    python scripts/lessons/04_one_step.py

Lesson 2 (context) and lesson 3 (adding noise) come before.
"""

import numpy as np
from lesson import begin, save_picture, where

from stable_diffusion import DiffusionModel, StableDiffusion
from stable_diffusion.noise_scheduler import diffuse, split_prediction, timestep_embedding

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)
unet, alphas = model.diffusion_model, model.config.schedule.alphas_cumprod
prompt = "a red apple on a blue background"

# --- 1. Three things go in -----------------------------------------------------------------------
#
# The model that removes noise is a UNet: a network of convolutions and attention that looks at an
# image at several sizes, coarse and fine, and returns something of the size that it got. It gets:
#
#   a latent with noise. A latent is a small stand-in for an image (lesson 7): 16x16 cells of 8
#   numbers for an image of 128x128 pixels. The decoder turns a latent into an image.
#   the timestep: how much noise there is. Not as a number, but as waves, see below.
#   the context: what the prompt says (lesson 2).

(image,) = model.text_to_image(prompt, seed=0, num_steps=25, verbose=0)
x0 = np.asarray(model.encode_images(image[None]))  # the latent of an image that we know
noise = np.random.default_rng(0).normal(size=x0.shape).astype("float32")
context, t = model.encode_text(prompt), 400
noisy = diffuse(x0, noise, alphas[t]).astype("float32")
embedding = timestep_embedding([t], model.config.unet.widths[0])  # as wide as its first layer
print(f"latent with noise  {noisy.shape}, {1 - alphas[t]:.0%} of its variance is noise")
print(f"timestep {t}       {embedding.shape}, as cosines and sines: {where(timestep_embedding)}")
print(f"context            {context.shape}")

# Why waves? A network handles numbers of about 1 best, and 400 and 401 should be nearly the same,
# 400 and 800 not. Slow waves say "about the middle", fast ones say exactly where. The picture has a
# column for each of the timesteps 0 to 99, and a row for each wave: cosines above, sines below, the
# fastest first. In 100 of 1000 timesteps the slow ones hardly change: white is 1, grey is 0.

waves = timestep_embedding(np.arange(100), model.config.unet.widths[0])
save_picture(out / "04_waves.png", [[("timesteps 0 to 99", (waves.T + 1) / 2)]])

# --- 2. One thing comes out ----------------------------------------------------------------------
#
# It has the latent's shape, and says what noise the model sees in there. Stable Diffusion 1 returns
# the noise ε itself. This checkpoint returns a mix from which both noise and image follow, v = √ᾱ ε
# - √(1 - ᾱ) x0, because that trains better (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512,
# appendix D). With lesson 3's x_t, in √(1 - ᾱ) x_t + √ᾱ v the x0 cancels, and ε is left:

output = np.asarray(unet.predict_on_batch([noisy, embedding, context]))
answer = (1 - alphas[t]) ** 0.5 * noisy + alphas[t] ** 0.5 * output
likeness = np.corrcoef(answer.ravel(), noise.ravel())[0, 1]
print(f"\nthe output         {output.shape}: {where(DiffusionModel)}")
print(f"the noise in it    {answer.shape}, its correlation with ours is {likeness:.3f}")

# --- 3. From the noise to the image --------------------------------------------------------------
#
# We know x_t, and now we have a guess of ε. So solve x_t = √ᾱ x0 + √(1 - ᾱ) ε for x0: equation 15
# of Ho et al. 2020, https://arxiv.org/abs/2006.11239.

guess = (noisy - (1 - alphas[t]) ** 0.5 * answer) / alphas[t] ** 0.5
kind = model.config.schedule.prediction_type
theirs = split_prediction(output, noisy, alphas[t], kind)  # the pair (x0, ε)
assert np.allclose(guess, theirs[0], atol=1e-4) and np.allclose(answer, theirs[1], atol=1e-5)
print(f"x0 from it         {guess.shape}: the package finds both in {where(split_prediction)}")

# --- 4. At every level ---------------------------------------------------------------------------
#
# Above: a latent with more and more noise. Below: what the model expects to be under it, at once.


def expect(t, text, start=x0):
    """Returns what the model expects under a latent with noise: the noisy one and x0."""
    noisy = diffuse(start, noise, alphas[t]).astype("float32")
    inputs = [noisy, timestep_embedding([t], model.config.unet.widths[0]), model.encode_text(text)]
    output = np.asarray(unet.predict_on_batch(inputs))
    return noisy, split_prediction(output, noisy, alphas[t], kind)[0]


above, below, size = [], [], np.abs(x0).mean()
print()
for t in (50, 200, 400, 600, 800):
    noisy, guess = expect(t, prompt)
    error = np.abs(guess - x0).mean()
    print(
        f"  t = {t}: {1 - alphas[t]:5.1%} noise; x0 is off by {error:.2f} on average, of {size:.2f}"
    )
    above.append((f"t = {t}", model.decode_latents(noisy)[0]))
    below.append((f"expected at {t}", model.decode_latents(guess)[0]))
save_picture(out / "04_levels.png", [above, below])

# With little noise it finds our apple, with its crooked stem and its white highlight. With much of
# it the model can only say what is likely: at 800 stem and highlight are washed out. It still looks
# like ours only because all red apples that this model knows are alike, and it answers with their
# mean. So one goes a little in that direction, and asks again: lesson 5.

# --- 5. The prompt matters most where little is seen ---------------------------------------------
#
# The same latents, but the prompt says something else. What will win: the latent or the prompt?
# Guess for 50, 400 and 800 before you open the picture.

row = []
for t in (50, 400, 800):
    _, guess = expect(t, "a green pear on a yellow background")
    row.append((f"asked for a pear at {t}", model.decode_latents(guess)[0]))
save_picture(out / "04_pear.png", [row])

# At 50 the latent wins: what is there need not be guessed. At 800 the prompt does. At 400 you see a
# pear through which the apple shines: the answer is a mean of what both say.

# --- Exercises: write these functions in my_answer.py, then run check.py 04 my_answer.py ----------
#
# 1. embed_timestep(t, dim): a timestep as waves, (dim): first dim/2 cosines, then as many sines, of
#    the angles t f_i with f_i = 10000^(-i / (dim/2)), i = 0, 1, ...
# 2. find_x0(noisy, noise, alpha): the latent under a noise that is known, as above.
# 3. find_loss(answer, noise): what training makes small: the mean squared error, a float.
