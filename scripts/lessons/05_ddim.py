"""Lesson 5: DDIM. A dozen lines that walk from noise to an image.

    python scripts/lessons/05_ddim.py

Lesson 3 (adding noise) and lesson 4 (one step) come before.
"""

import numpy as np
from lesson import begin, save_picture, where

from stable_diffusion import StableDiffusion
from stable_diffusion.noise_scheduler import ddim, split_prediction, timestep_embedding

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)
schedule, kind = model.config.schedule, model.config.schedule.prediction_type
prompt = "a red apple on a blue background"
context = model.encode_text(prompt)


def predict(latent, t, alpha, context=context):
    """Returns what the model sees in a latent with noise: the clean latent x0, and the noise."""
    inputs = [latent, timestep_embedding([t], model.config.unet.widths[0]), context]
    output = np.asarray(model.diffusion_model.predict_on_batch(inputs))
    return split_prediction(output, latent, alpha, kind)


# --- 1. Where to stop on the way -----------------------------------------------------------------
#
# Lesson 4 showed that a single guess from pure noise is the mean of many apples. So we go in steps.
# Training knew 1000 noise levels; sampling may visit fewer. A level is a timestep and its ᾱ.

levels = schedule.levels(8)
print(f"levels of 8 steps, {where(schedule.levels)}:")
for timestep, alpha in levels:
    print(f"  t = {timestep}: ᾱ = {alpha:.4f}")

# The last has no timestep: the walk ends there, and no model is asked any more.

# --- 2. The walk ---------------------------------------------------------------------------------
#
# At each level: ask the model. It says which image it expects (x0) and which noise it sees (ε).
# Then mix the same two again, with less noise: at the next level. This is equation 12 of Song et
# al. 2021, https://arxiv.org/abs/2010.02502, without new noise (σ = 0):
#
#     x_next = √ᾱ_next x0 + √(1 - ᾱ_next) ε


def walk(latent, levels, context=context, seen=None):
    """Goes from noise to a clean latent; adds what it expects at each step to `seen`."""
    for (timestep, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = predict(latent, timestep, alpha, context)
        latent = alpha_next**0.5 * x0 + (1 - alpha_next) ** 0.5 * noise
        if seen is not None:
            seen.append((timestep, latent, x0))
    return latent


start = np.random.default_rng(2).normal(size=(1, *model.latent_shape)).astype("float32")
seen = []
latent = walk(start, levels, seen=seen)
print(f"\nfrom noise {start.shape} in {len(seen)} steps to a latent {latent.shape}")
above = [(f"after t = {t}", model.decode_latents(state)[0]) for t, state, _ in seen]
below = [("expected", model.decode_latents(x0)[0]) for *_, x0 in seen]
save_picture(out / "05_walk.png", [above[1::2], below[1::2]])

# Above is where we are, below what the model expects at that moment. It decides early on what goes
# where, and late on edges and lines.

# --- 3. Is it the package's? ---------------------------------------------------------------------
#
# The package does the same. (Its default guidance is lesson 6; a scale of 1 is none.)

options = {"diffusion_noise": start[0], "num_steps": 8, "unconditional_guidance_scale": 1.0}
*_, (_, _, theirs, _) = model.generate_latents(context, **options)
print(f"largest difference to {where(ddim)}: {np.abs(latent - theirs).max():.0e}")
assert np.allclose(latent, theirs, atol=1e-4)

# --- 4. How many steps? --------------------------------------------------------------------------
#
# Each step is an approximation: it goes straight on, while the true way bends. More steps are more
# exact. Guess how many are enough.

reference = walk(start, schedule.levels(200))
row = []
print()
for count in (1, 2, 5, 10, 25, 50):
    result = walk(start, schedule.levels(count))
    error = np.sqrt(np.mean((result - reference) ** 2))
    print(f"  steps {count:2}: {error:.3f} away from 200 steps")
    row.append((f"steps: {count}", model.decode_latents(result)[0]))
save_picture(out / "05_steps.png", [row])

# Twice the steps, about half the error. The error is the distance to where 200 steps lead, and not
# beauty! One step looks good here only because this model's apples are all alike: their mean is an
# apple. With more steps it becomes a particular one, lumps and all.

# --- 5. The same way back ------------------------------------------------------------------------
#
# Nothing in the walk is random, so it can be walked backwards: from an image to the noise that it
# would come from ("inversion"). The model is asked at the level where we are, and we mix in more
# noise. With 200 steps each way, the noise that we began with comes back.

upwards = [*reversed(schedule.levels(200)[:-1])]
back = walk(reference, upwards)
likeness = np.corrcoef(back.ravel(), start.ravel())[0, 1]
again = walk(back, schedule.levels(200))
print(
    f"\nback at t = {upwards[-1].timestep}: the correlation with the first noise is {likeness:.2f}"
)
rows = [("an image", reference), ("its noise", back), ("from that noise", again)]
save_picture(out / "05_back.png", [[(name, model.decode_latents(z)[0]) for name, z in rows]])

# --- Exercises: write these functions in my_answer.py, then run check.py 05 my_answer.py ----------
#
# 1. take_step(x0, noise, alpha_next): the latent at the next level.
# 2. sample(predict, latent, levels): the whole walk. predict(latent, t, alpha) returns (x0, noise),
#    levels is a list of (t, alpha), noisiest first; the last one is where it ends.
# 3. find_sigma(alpha, alpha_next, eta): σ of equation 16 of the same paper, how much noise is drawn
#    anew, from η = 0, as in this lesson, to 1: σ = η √((1 - ᾱ_next) / (1 - ᾱ)) √(1 - ᾱ / ᾱ_next).
