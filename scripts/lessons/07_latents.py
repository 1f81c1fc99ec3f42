"""Lesson 7: latents and the VAE. What the model works on in place of pixels, and what that loses.

    python scripts/lessons/07_latents.py

Lesson 2 (context) and lesson 5 (DDIM) come before.
"""

import numpy as np
from lesson import begin, save_picture, where
from PIL import Image, ImageDraw

from stable_diffusion import Decoder, ImageEncoder, StableDiffusion
from stable_diffusion.image_encoder import encode_moments
from stable_diffusion.images import normalize_pixels

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)

# --- 1. There and back ---------------------------------------------------------------------------
#
# The VAE (variational autoencoder) is two networks. The image encoder makes a latent of an image,
# the decoder makes an image of a latent. The walk from noise to an image runs between them, on
# latents only. That is latent diffusion: Rombach et al. 2022, https://arxiv.org/abs/2112.10752,
# section 3.1. It costs a fraction of the same walk on pixels. We take a cat and an apple that the
# model made, a drawing with thin lines, which it has never seen, and pixels at random.

prompts = ["a cat face on a green background", "a red apple on a blue background"]
cat, apple = model.text_to_image(prompts, seed=[0, 0], verbose=0)
paper = Image.new("RGB", (128, 128), "white")
pen = ImageDraw.Draw(paper)
for radius in range(10, 60, 10):
    pen.ellipse((64 - radius, 64 - radius, 64 + radius, 64 + radius), outline="navy")
pen.text((8, 2), "Can you read this?", fill="red")
random = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype("uint8")

images = np.stack([cat, apple, np.array(paper), random])
latents = np.asarray(model.encode_images(images))
decoded = model.decode_latents(latents)
print(f"images {images.shape} -> latents {latents.shape} -> images {decoded.shape}")
print(f"{cat.size:,} numbers become {latents[0].size:,}: {cat.size // latents[0].size} times fewer")
print(f"encoder: {where(ImageEncoder)}, decoder: {where(Decoder)}")

# Each side is 8 times shorter: a cell of the latent stands for 8x8 pixels. What got lost is told by
# the peak signal to noise ratio (PSNR), in decibels: 10 log10(255² / mean squared error). At 20 one
# sees the loss at once, at 40 hardly. Guess the order of the four before you look.

errors = ((images.astype("float64") - decoded) ** 2).mean(axis=(1, 2, 3))
names = "cat", "apple", "thin lines", "random pixels"
above, below = [], []
for n, psnr in enumerate(10 * np.log10(255**2 / errors)):
    print(f"  {names[n]:14} PSNR {psnr:.1f} dB")
    above.append((names[n], images[n]))
    below.append((f"decoded: {psnr:.1f} dB", decoded[n]))
save_picture(out / "07_psnr.png", [above, below])

# Emoji come back nearly as they were. Lines get soft, letters are lost, random pixels become worms.
# The VAE keeps one number in 24, and has learned which ones matter for images like its own.

# --- 2. What the channels mean -------------------------------------------------------------------
#
# A cell has 8 numbers, its channels. Above: each channel of the cat's latent. Below: the cat, after
# 1.5 was added to that channel in every cell. The first four channels carry colour and light. The
# last four change nearly nothing that way: they carry what changes from cell to cell, the edges.

latent = latents[:1]
more = np.split(latent + 1.5 * np.eye(8, dtype="float32")[:, None, None], 2)  # twice four latents
changed = np.concatenate([model.decode_latents(some) for some in more])  # (8, 128, 128, 3)
tiles = (latent[0] / 4 + 0.5).clip(0, 1).repeat(8, 0).repeat(8, 1)  # 0 is grey, 2 is white
rows = [
    [(f"channel {n}", tiles[::2, ::2, n]) for n in range(8)],
    [(f"channel {n} + 1.5", changed[n, ::2, ::2]) for n in range(8)],
]
save_picture(out / "07_channels.png", rows)

# --- 3. The scaling factor -----------------------------------------------------------------------
#
# The encoder is a little unsure: for each number it returns a mean, and the logarithm of a variance
# around it, the "moments". The variance is tiny, so the package takes the mean. Noise has variance
# 1, and mixing (lesson 3) wants the same of latents. So they are multiplied by the scaling factor,
# 1 / the standard deviation over many images: appendix G of the paper. Stable Diffusion 1 has
# 0.18215. (Cat and apple have strong colours, so theirs stays a little above 1.)

moments = encode_moments(model.image_encoder, normalize_pixels(images))  # (4, 16, 16, 16)
mean, log_variance = np.split(np.asarray(moments), 2, axis=-1)
factor, unsure = model.config.vae.scaling_factor, np.exp(log_variance / 2).mean()
print(f"\nmoments {moments.shape}: the means are unsure by {unsure:.2f}")
print(f"standard deviation in cat and apple: {mean[:2].std():.2f}")
print(f"times the scaling factor, {factor:.3f}: {latents[:2].std():.2f}")
assert np.allclose(mean * factor, latents, atol=1e-4)

# --- 4. Halfway between two images ---------------------------------------------------------------
#
# Mix the latents of cat and apple, and you get a double exposure, as with pixels: a latent is still
# a small image. Mix their contexts, and the model makes one thing that is a bit of both.

share = np.float32([0.2, 0.4, 0.6, 0.8])[:, None, None, None]
double = model.decode_latents((1 - share) * latents[0] + share * latents[1])
one, two = np.asarray(model.encode_text(prompts))
contexts = (1 - share[..., 0]) * one + share[..., 0] * two
mixed = model.generate_image(contexts, batch_size=4, seed=[0] * 4, verbose=0)
print(f"\n4 latents -> {double.shape}, 4 contexts {contexts.shape} -> {mixed.shape}")
names = [f"{one:.0%} apple" for one in share.ravel()]
rows = [
    [(f"latents, {name}", image) for name, image in zip(names, double, strict=True)],
    [(f"contexts, {name}", image) for name, image in zip(names, mixed, strict=True)],
]
save_picture(out / "07_between.png", rows)

# --- Exercises: write these functions in my_answer.py, then run check.py 07 my_answer.py ----------
#
# 1. fit_colours(latents, colours): small previews need no decoder, because the colour of a cell is
#    nearly a sum of its channels, each times a number. latents is (M, C), of M cells, colours is
#    (M, 3). Find the numbers by least squares (np.linalg.lstsq), (C + 1, 3); the last row is added.
# 2. find_scaling_factor(latents): of unscaled latents (B, h, w, C) the number that gives them a
#    standard deviation of 1, over all of their numbers together.
# 3. blend_latents(a, b, mask): for painting a part of an image anew. a and b are (h, w, C), mask is
#    (8 h, 8 w), 1 where b shall be. A cell takes as much of b as the mean of its 8x8 pixels says.
