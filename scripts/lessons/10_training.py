"""Lesson 10: a diffusion model from nothing. A small network learns a spiral, point by point.

    python scripts/lessons/10_training.py

Lesson 3 (adding noise) and lesson 9 (samplers) come before. Nothing is loaded here. An "image" is
one point of a plane: two numbers. The noise, the loss and the sampler are Stable Diffusion's.
"""

import numpy as np
from lesson import begin, save_picture, where
from keras import Input, Model, layers, ops, optimizers, utils
from PIL import Image, ImageDraw

from stable_diffusion.noise_scheduler import (
    NoiseScheduler,
    ddim,
    diffuse,
    split_prediction,
    timestep_embedding,
)

out, rng = begin(__doc__), np.random.default_rng(0)
utils.set_random_seed(0)

# --- 1. The data ---------------------------------------------------------------------------------
#
# Points on a spiral. Nobody will tell the network what a spiral is. It sees only single points, as
# Stable Diffusion saw only single photos.


def draw_points(count):
    """Returns points of the spiral, float32 (count, 2), from about -2 to 2."""
    angle = 1.5 * np.pi * (1 + 2 * rng.random(count))
    spiral = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 8
    return (spiral + rng.normal(0, 0.03, (count, 2))).astype("float32")


def plot(points, colours):
    """Returns an image with a dot for each point, uint8 (160, 160, 3)."""
    image = Image.new("RGB", (160, 160), "white")
    pen = ImageDraw.Draw(image)
    for (x, y), colour in zip(80 + 35 * points * (1, -1), colours, strict=True):
        pen.rectangle((x, y, x + 1, y + 1), fill=tuple(colour))
    return np.array(image)


# --- 2. The network ------------------------------------------------------------------------------
#
# In place of the UNet: three layers of 128 units. It gets a point with noise, and the timestep as
# 64 waves (lesson 4). It returns the noise that it sees. The point also comes as waves, sin(x),
# cos(x), sin(2 x) and so on: without them it would learn a blob long before it learns a spiral.

point, when = Input((2,)), Input((64,))
waves = [wave(k * point) for k in (1, 2, 4, 8) for wave in (ops.sin, ops.cos)]
x = layers.Concatenate()([point, when, *waves])
for _ in range(3):
    x = layers.Dense(128, activation="silu")(x)
network = Model([point, when], layers.Dense(2)(x))
print(f"{network.count_params():,} parameters; Stable Diffusion's UNet has 859,520,964")

# --- 3. Training ---------------------------------------------------------------------------------
#
# Ho et al. 2020, https://arxiv.org/abs/2006.11239, algorithm 1: take a point, a timestep and noise,
# all at random. Mix point and noise (lesson 3). Let the network say which noise it sees. The loss
# is the mean squared error of its answer: equation 14. Do so some millions of times.

schedule = NoiseScheduler()  # 1000 timesteps, as in the paper
COUNT, BATCH, ROUNDS = 200_000, 1000, 16
rate = optimizers.schedules.CosineDecay(5e-3, ROUNDS * COUNT // BATCH)
network.compile(optimizers.Adam(rate), loss="mse")
print(f"adding noise: {where(diffuse)}")
for number in range(ROUNDS):
    points, timesteps = draw_points(COUNT), rng.integers(len(schedule), size=COUNT)
    noise = rng.standard_normal(points.shape).astype("float32")
    noisy = diffuse(points, noise, schedule.alphas_cumprod[timesteps][:, None]).astype("float32")
    inputs = [noisy, timestep_embedding(timesteps, 64)]
    history = network.fit(inputs, noise, batch_size=BATCH, verbose=0)
    print(f"round {number + 1:2} of {ROUNDS}: loss {history.history['loss'][0]:.4f}", flush=True)

# A network that always answers 0 would have a loss of 1. Ours falls fast, and then hardly any more:
# where a noisy point lies between two arms of the spiral, nobody can know from which one it came.
# The best answer is then the mean of both, and that is what the network learns.

# --- 4. Sampling ---------------------------------------------------------------------------------
#
# The package's DDIM does not care that these are points. It wants a `denoise`, as in lesson 9. We
# start with 4000 points of noise. Each keeps its first colour, so you see where it goes.


def denoise(latent, alpha, timestep=None):
    when = timestep_embedding([timestep] * len(latent), 64)
    return split_prediction(network.predict_on_batch([latent, when]), latent, alpha)


start = rng.standard_normal((4000, 2)).astype("float32")
turn = np.arctan2(start[:, 1], start[:, 0])[:, None] + np.array([0, 2, 4]) * np.pi / 3
colours = (127 + 127 * np.cos(turn)).astype("uint8")
images = [("noise", plot(start, colours))]
print(f"\nsampling: {where(ddim)}")
for step, (_, latent, _) in enumerate(ddim(denoise, start, schedule.levels(50), None), 1):
    if step in (40, 45, 48, 50):
        images.append((f"after {step} of 50 steps", plot(latent, colours)))
points = draw_points(4000)
images.append(("the data", plot(points, 0 * colours)))
save_picture(out / "10_spiral.png", [images[:3], images[3:]])
apart = [np.sqrt(((points - one) ** 2).sum(-1).min()) for one in latent[:500]]
print(f"from a sample {latent.shape[1:]} to the nearest point of the data: {np.median(apart):.3f}")

# For most of the walk nothing seems to happen: with so much noise the network can only say "about
# the middle". The spiral appears in the last steps, where the noise is as thin as its arms.

# --- Exercises: write these functions in my_answer.py, then run check.py 10 my_answer.py ----------
#
# 1. compute_loss(predict, x0, noise, timesteps, alphas_cumprod): the loss of a batch, a float.
#    predict(noisy, timesteps) returns the noise it sees. x0 and noise are (B, 2), timesteps (B).
# 2. split_noise(answer, noisy, alpha): the pair of x0 and noise, if `answer` is the noise that a
#    network sees in `noisy`.
# 3. guess_best(points, noisy, alpha): no network! If only these points (N, 2) exist, the best guess
#    of x0 (B, 2) is their mean, each weighted by exp(-|noisy - √ᾱ point|² / (2 (1 - ᾱ))).
