"""Draws what the embedded checkpoint can do, as one picture: subjects by background colours.

python scripts/draw_grid.py weights/emoji_samples.png
"""

import argparse

import numpy as np
from PIL import Image

from stable_diffusion import StableDiffusion

SUBJECTS = ["red apple", "banana", "strawberry", "lemon", "cat face", "dog face", "frog", "panda"]
COLOURS = ["blue", "green", "white", "black"]


def main():
    """Draws one picture of each subject on each colour, all from the same noise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="PNG file to write")
    parser.add_argument("--weights", default="emoji")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = StableDiffusion(jit_compile=False, weights=args.weights)
    rows = []
    for colour in COLOURS:
        pictures = model.text_to_image(
            [f"a {subject} on a {colour} background" for subject in SUBJECTS],
            num_steps=args.steps,
            unconditional_guidance_scale=args.guidance,
            seed=[args.seed] * len(SUBJECTS),
        )
        rows.append(np.hstack(pictures))
    Image.fromarray(np.vstack(rows)).save(args.out)


if __name__ == "__main__":
    main()
