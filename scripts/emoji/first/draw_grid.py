"""Draws what the embedded checkpoint can do, as one picture.

    python scripts/emoji/first/draw_grid.py weights/emoji_samples.png

The upper rows are subjects on background colours, each row one colour. The last row is one prompt
after more and more steps, all from the same noise.
"""

import argparse

import numpy as np
from PIL import Image

from stable_diffusion import StableDiffusion

SUBJECTS = ["red apple", "cat face", "panda", "pizza", "rocket", "owl", "guitar", "grinning face"]
COLOURS = ["blue", "green", "white", "black"]
PROMPT, STEPS = "a red apple on a blue background", [1, 2, 3, 5, 10, 15, 25, 50]
GAP = 8  # white pixels above the last row


def draw(model, steps, guidance, seed):
    """Draws the picture.

    Args:
        model: the `StableDiffusion`.
        steps, guidance: of the upper rows' pictures; the last row has the same guidance.
        seed: of every picture.

    Returns:
        uint8 array `(rows * H + GAP, columns * W, 3)`.
    """

    def row(prompts, steps):
        pictures = model.text_to_image(
            prompts, num_steps=steps, unconditional_guidance_scale=guidance,
            seed=[seed] * len(prompts), verbose=0,
        )  # fmt: skip
        return np.hstack(pictures)

    rows = [
        row([f"a {subject} on a {colour} background" for subject in SUBJECTS], steps)
        for colour in COLOURS
    ]
    last = np.hstack([row([PROMPT], count) for count in STEPS])
    return np.vstack([*rows, np.full((GAP, last.shape[1], 3), 255, "uint8"), last])


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="PNG file to write")
    parser.add_argument("--weights", default="emoji", help="default: emoji")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--guidance", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    model = StableDiffusion(jit_compile=False, weights=args.weights)
    Image.fromarray(draw(model, args.steps, args.guidance, args.seed)).save(args.out)


if __name__ == "__main__":
    main()
