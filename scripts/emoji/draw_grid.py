"""Draws what the embedded checkpoint can do, as one picture.

    python scripts/emoji/draw_grid.py weights/emoji_samples.png

From top to bottom: eight subjects on four background colours; two subjects; the two styles, four
subjects in each; and one prompt after more and more steps, all from the same noise.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SUBJECTS = ("red apple", "cat face", "panda", "pizza", "rocket", "owl", "guitar", "robot")
COLOURS = ("blue", "green", "white", "black")
PAIRS = (
    "a cat and a dog on a pink background",
    "a cat to the left of a dog on a yellow background",
    "a dog to the left of a cat on a yellow background",
    "a red apple above a book on a cyan background",
    "a book above a red apple on a cyan background",
    "a rabbit and a carrot on a green background",
    "a robot next to a rocket on a black background",
    "a crown above a penguin on a purple background",
)
STYLED = ("octopus", "lemon", "tiger face", "teapot")
STYLE_COLOUR = "orange"
PROMPT, STEPS = "a red apple on a blue background", (1, 2, 3, 5, 10, 15, 25, 50)
GAP = 8  # white pixels between the parts


def list_parts():
    """Lists the prompts: parts of rows of eight."""
    plain = [
        [f"{_article(subject)} {subject} on a {colour} background" for subject in SUBJECTS]
        for colour in COLOURS
    ]
    styled = [
        f"{article}{subject} on an {STYLE_COLOUR} background"
        for article in ("a 3D ", "a flat ")
        for subject in STYLED
    ]
    return [plain, [list(PAIRS)], [styled]]


def _article(subject):
    return "an" if subject[0] in "aeiou" else "a"


def draw_grid(pipeline, seed, steps=None, guidance=None):
    """Draws the picture.

    Args:
        pipeline: the `StableDiffusion`.
        seed: of every picture.
        steps, guidance: of all pictures but the last row's steps; None is the pipeline's default.

    Returns:
        uint8 array `(rows * H + 3 * GAP, 8 * W, 3)`.
    """
    options = {"verbose": 0}
    if guidance is not None:
        options["unconditional_guidance_scale"] = guidance

    def draw_row(prompts, steps):
        some = options if steps is None else {**options, "num_steps": steps}
        return np.hstack(pipeline.text_to_image(prompts, seed=[seed] * len(prompts), **some))

    parts = [np.vstack([draw_row(row, steps) for row in part]) for part in list_parts()]
    parts.append(np.hstack([draw_row([PROMPT], count) for count in STEPS]))
    gap = np.full((GAP, parts[0].shape[1], 3), 255, "uint8")
    return np.vstack([parts[0], *(some for part in parts[1:] for some in (gap, part))])


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--weights", default="emoji", help="default: emoji")
    parser.add_argument("--steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's own")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    from stable_diffusion import StableDiffusion  # late: it takes seconds

    try:
        pipeline = StableDiffusion(jit_compile=False, weights=args.weights)
        grid = draw_grid(pipeline, args.seed, args.steps, args.guidance)
        Image.fromarray(grid).save(args.out)
    except (OSError, ValueError) as error:
        print(f"draw_grid: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
