"""Lesson 6: guidance. The model is asked twice, and the difference of its answers gets more weight.

    python scripts/lessons/06_guidance.py

Lesson 4 (one step) and lesson 5 (DDIM) come before.
"""

import numpy as np
from lesson import begin, save_picture, where

from stable_diffusion import StableDiffusion
from stable_diffusion.noise_scheduler import split_prediction, timestep_embedding

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)
prompt = "a cat face on a green background"

# --- 1. Two questions about one latent -----------------------------------------------------------
#
# When this model was trained, one caption in ten was replaced by the empty text "". So it learned
# to answer two questions: which noise is in this latent, if it shows a cat face on green? And which
# noise is in it, if it may show anything? We ask both after 8 of 25 steps. (`generate_latents` is
# the walk of lesson 5: it yields the step, its timestep, the latent that it arrives at, and x0. It
# has guidance with a scale of 3 already, this checkpoint's own; what that is, comes now.)

steps = list(model.generate_latents(model.encode_text(prompt), num_steps=25, seed=0))
latent, timestep = steps[7][2], steps[8][1]  # where the eighth step ends, and the ninth begins
alpha = model.config.schedule.alphas_cumprod[timestep]
print(f"latent {latent.shape} at timestep {timestep}: {1 - alpha:.0%} of its variance is noise")


def predict_noise(text):
    """Returns the noise that the UNet sees in the latent when it is told a text."""
    embedding = timestep_embedding([timestep], model.config.unet.widths[0])
    inputs = [latent, embedding, model.encode_text(text)]
    output = np.asarray(model.diffusion_model.predict_on_batch(inputs))
    return split_prediction(output, latent, alpha, model.config.schedule.prediction_type)[1]


def find_x0(noise):
    """Returns what is left of the latent without a noise, as in lesson 4."""
    return (latent - (1 - alpha) ** 0.5 * noise) / alpha**0.5


with_prompt, without = predict_noise(prompt), predict_noise("")
difference = with_prompt - without
print(f"noise with the prompt  {with_prompt.shape}, standard deviation {with_prompt.std():.3f}")
print(f"noise without it       {without.shape}, standard deviation {without.std():.3f}")
print(f"the difference         {difference.shape}, standard deviation {difference.std():.3f}")

# Both answers are nearly the same noise. The small difference is all that the prompt says here, and
# it decides what one sees: without the prompt the model expects some yellow thing, which it sees in
# the latent by now. With the prompt it expects a cat. On the right is the size of the difference in
# each of the 16x16 cells: it is about eyes, ears and the outline, not about the background.

size = np.abs(difference[0]).mean(axis=-1)  # (16, 16): the mean of the 8 numbers of a cell
row = [
    ("x0 without the prompt", model.decode_latents(find_x0(without))[0]),
    ("x0 with the prompt", model.decode_latents(find_x0(with_prompt))[0]),
    ("the difference", (size / size.max()).repeat(8, 0).repeat(8, 1)),
]
save_picture(out / "06_difference.png", [row])

# --- 2. More of the difference -------------------------------------------------------------------
#
# Classifier-free guidance goes on in the direction of the difference:
#
#     guided = without + scale (with_prompt - without)
#
# Scale 0 ignores the prompt, 1 is the model's own answer, and above 1 is more than that. Ho and
# Salimans 2022, https://arxiv.org/abs/2207.12598, equation 6, write the same with w = scale - 1:
# guided = (1 + w) with_prompt - w without. All programs call 1 + w the guidance scale.

guided = without + 3.0 * difference
options = {"num_steps": 25, "latent": latent, "first_step": 8, "unconditional_guidance_scale": 3.0}
_, _, _, x0 = next(model.generate_latents(model.encode_text(prompt), **options))
print(f"\nThe package does it in {where(StableDiffusion._predict)}.")
print(f"Its x0 and ours differ by {np.abs(x0 - find_x0(guided)).max():.0e} at most.")

# --- 3. Which scale? -----------------------------------------------------------------------------
#
# Guess which you like best. 1 is what is probable, and it looks vague. 3 is clear. 7.5 is usual for
# the large models; for this small one it is too much: edges get hard, and the background gets a
# pattern that nobody asked for. Guidance has a price: the UNet does twice the work.

options = {"num_steps": 25, "seed": 0, "verbose": 0}
row = []
for scale in (1.0, 3.0, 7.5, 15.0):
    (image,) = model.text_to_image(prompt, unconditional_guidance_scale=scale, **options)
    row.append((f"scale {scale:g}", image))
save_picture(out / "06_scales.png", [row])

# --- 4. Negative prompts -------------------------------------------------------------------------
#
# Nothing says that the second question must be about "". Put another text there, and the walk leads
# away from that text. Away from green lies magenta, away from blue lies yellow. A negative prompt
# does not forbid a thing. It names what to walk away from.

row = []
for negative in ("", "a green background", "a blue background"):
    (image,) = model.text_to_image("a cat face", negative, **options)
    row.append((f'away from "{negative}"', image))
save_picture(out / "06_negative.png", [row])

# --- Exercises: write these functions in my_answer.py, then run check.py 06 my_answer.py ----------
#
# 1. guide(without, with_prompt, scale): the guided noise, as a new array.
# 2. find_scale(without, with_prompt, guided): the scale that somebody used, a float. In places the
#    prompt changes nothing, or nearly nothing: to divide by that would be a mistake.
# 3. guide_in_one_pass(unet, latent, context, negative, scale): the same with one run of the UNet on
#    a batch of two, the negative prompt first. unet(latents, contexts) returns noises; latent is
#    (1, h, w, C), context and negative are (1, T, D), and the result is (1, h, w, C).
