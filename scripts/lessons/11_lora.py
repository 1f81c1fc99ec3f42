"""Lesson 11, of three minutes: a LoRA teaches the model a character that it has never seen.

    python scripts/lessons/11_lora.py

Lesson 6 (guidance), lesson 8 (attention) and lesson 10 (training) come before.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from lesson import begin, save_picture, where
from keras import optimizers
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.adapters.lora import load_lora
from stable_diffusion.training import Cache, LoRA, NoisyLatents, Stream, read_folder

sys.path.append(str(Path(__file__).parents[1] / "character"))
import draw_character  # noqa: E402

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)
folder = TemporaryDirectory()  # goes away with this program
work = Path(folder.name)

# --- 1. Twenty images ----------------------------------------------------------------------------
#
# "A blip" is a teal drop with one eye, a yellow belly and two orange antennae. A script draws it 20
# times, each time in another place, and writes captions such as "a blip on a red background". What
# does the model make of a word that it does not know?

draw_character.main([str(work / "blip")])
examples = read_folder(work / "blip")
print(f"the first caption: {examples[0].captions[0]}")
shown = [(f"image {n}", np.array(Image.open(examples[n].path))) for n in range(4)]
prompts = [f"a blip on a {colour} background" for colour in ("blue", "cyan", "brown")]
prompts.append("a red apple on a green background")
options = {"seed": [0, 1, 2, 3], "num_steps": 25, "verbose": 0}
before = model.text_to_image(prompts, **options)

# --- 2. What a LoRA is ---------------------------------------------------------------------------
#
# One could train all numbers of the UNet. A LoRA (low-rank adaptation) leaves them as they are. For
# some kernels W (tables that a layer multiplies by) it learns two narrow ones, A and B, and uses
#
#     W + alpha / rank A B         W is (D, E), A is (D, rank), B is (rank, E)
#
# Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1. (This alpha is a mere factor, here
# equal to the rank.) A starts at random and B as zeros, so at first nothing changes. Here the LoRA
# is in the layers that make q, k, v and the output of attention.

student = StableDiffusion(weights="emoji", jit_compile=False)
method = LoRA(student, rank=4)
layer = next(iter(method.adapters.values()))
shapes = [tuple(part.shape) for part in (layer.kernel, layer.lora_kernel_a, layer.lora_kernel_b)]
print(f"\n{len(method.adapters)} kernels, such as W {shapes[0]}: A {shapes[1]}, B {shapes[2]}")
STEPS, ROUNDS = 400, 5
rate = optimizers.schedules.CosineDecay(4e-3, STEPS)
trained = method.compile(optimizers.AdamW(rate))
learned = sum(int(np.prod(part.shape)) for part in trained.trainable_weights)
print(f"{learned:,} of {trained.count_params():,} numbers learn: {where(LoRA)}")

# --- 3. Training ---------------------------------------------------------------------------------
#
# As in lesson 10: a latent, a timestep and noise, and the mean squared error of the answer. Images
# and captions are encoded once, because neither the VAE nor the text encoder learns. One caption in
# ten becomes "", so that guidance goes on working.

cache = Cache(work / "cache", student)
stream = Stream(cache.encode_examples(examples)[0])
schedule, size = student.config.schedule, STEPS // ROUNDS
for n in range(ROUNDS):
    batches = NoisyLatents(cache, [stream], schedule, 4, size, first_step=n * size, dropout=0.1)
    loss = trained.fit(batches, verbose=0).history["loss"][0]
    print(f"step {(n + 1) * size}: loss {loss:.3f}", flush=True)
method.save(work / "blip.safetensors", dtype="float16")

# --- 4. Before and after -------------------------------------------------------------------------
#
# The LoRA is a small file, which any copy of the model can load, and put away again.

kilobytes = (work / "blip.safetensors").stat().st_size / 1000
print(f"\nthe file: {kilobytes:.0f} kB; how it is added to the kernels: {where(load_lora)}")
model.load_lora(work / "blip.safetensors")
after = model.text_to_image(prompts, **options)
rows = [shown]
for when, images in (("before", before), ("after", after)):
    texts = [f"{when}: {text.removesuffix(' background')}" for text in prompts]
    rows.append(list(zip(texts, images, strict=True)))
save_picture(out / "11_lora.png", rows)

# It learned the character, also on cyan and brown, where it never saw it. But look at the apple: it
# has changed, too. What a LoRA adds is there for every prompt. A lower strength changes less, and
# more than 1 spoils everything:

row = []
for strength in (0.0, 0.5, 1.0, 1.5):
    model.unload_lora()
    model.load_lora(work / "blip.safetensors", strength)
    (image,) = model.text_to_image(prompts[:1], seed=0, num_steps=25, verbose=0)
    row.append((f"strength {strength}", image))
save_picture(out / "11_strength.png", [row])

# --- Exercises: write these functions in my_answer.py, then run check.py 11 my_answer.py ----------
#
# 1. merge_lora(kernel, a, b, alpha): W + alpha / rank A B, as a new array.
# 2. count_numbers(shapes, rank): how many numbers the A and B of some kernels have, an int. shapes
#    is a list of (D, E).
# 3. extract_lora(before, after, rank): the way back. A kernel was trained in full. Find A (D, rank)
#    and B (rank, E) so that before + A B is as near to after as can be (np.linalg.svd).
