"""Measures whether the heat map of a noun lies on its object, on the embedded checkpoint.

    python scripts/measure/heat_maps.py [--prompts 100]

The prompts are "SUBJECT on a COLOUR background", subjects drawn from the checkpoint's list, in one
of four colours. The object is what differs from the plain background by more than a third of the
largest difference in the image: a background's colour is the median of the outer 6 pixels. The
score of a place is the mean of the maps of the subject's words. Printed is the area under the curve
(ROC) of that score against the object's pixels: 0.5 is chance, 1 if all of the object's pixels have
higher values than all others. Beside it the same for the words "on" and "background", and for a
spot in the middle, because objects lie in the middle.

All seeds are fixed: the same command prints the same numbers.
"""

import argparse
import time

import numpy as np

from stable_diffusion import StableDiffusion
from stable_diffusion.explain import heat_maps
from stable_diffusion.files import WEIGHTS_DIR

COLOURS = ("blue", "green", "yellow", "black")
BORDER = 6  # pixels around an image that are plain


def area_under_curve(score, positive):
    """Returns the probability that a random positive place scores higher than another.

    Args:
        score: float array.
        positive: bool array of its shape, with some of either kind.

    Reference: Mann and Whitney 1947; equal scores count as half.
    """
    values, ranks = np.unique(score, return_inverse=True)
    counts = np.bincount(ranks.ravel(), minlength=len(values))
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank, from 1, of equal scores
    ranked, n = middle[ranks.reshape(score.shape)][positive].sum(), int(positive.sum())
    return (ranked - n * (n + 1) / 2) / (n * (positive.size - n))


def find_object(image):
    """Tells which pixels of an image `(H, W, 3)` differ from its plain background."""
    pixels = image.astype(float)
    inside = np.zeros(image.shape[:2], bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    distance = np.linalg.norm(pixels - np.median(pixels[~inside], axis=0), axis=-1)
    return inside & (distance > distance.max() / 3)


def make_spot(size):
    """Returns a score that falls from the middle of an image outwards."""
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in size)
    return -np.hypot(rows[:, None], columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    names = (WEIGHTS_DIR / "emoji" / "subjects.txt").read_text("utf-8").split("\n")
    subjects = np.random.default_rng(0).permutation([name for name in names if name])
    model = StableDiffusion(weights="emoji", jit_compile=False)
    areas, start = [], time.perf_counter()
    for n, subject in enumerate(subjects[: args.prompts]):
        prompt = f"{subject} on a {COLOURS[n % len(COLOURS)]} background"
        result = heat_maps(model, prompt, seed=n, num_steps=args.steps, verbose=0)
        there = find_object(result.image)
        noun = np.mean([result.maps[word] for word in subject.split()], axis=0)
        scores = {"noun": noun, "on": result.maps["on"], "background": result.maps["background"]}
        scores["spot"] = make_spot(there.shape)
        areas.append({name: area_under_curve(score, there) for name, score in scores.items()})
        print(f"{areas[-1]['noun']:.3f}  {there.mean():4.0%} of the image  {prompt}", flush=True)
    seconds = (time.perf_counter() - start) / len(areas)
    print(f"\n{len(areas)} prompts of {args.steps} steps, {seconds:.1f} s each")
    for name in areas[0]:
        some = np.array([area[name] for area in areas])
        print(
            f"{name:10}  mean {some.mean():.3f}  median {np.median(some):.3f}"
            f"  lowest tenth {np.quantile(some, 0.1):.3f}"
        )


if __name__ == "__main__":
    main()
