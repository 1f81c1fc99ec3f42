"""Changes a word of a prompt and keeps the image's layout: prompt to prompt.

    python scripts/examples/prompt_to_prompt.py "a cat face on a green background" \
        "a dog face on a green background" edited.png --seed 3
    python scripts/examples/prompt_to_prompt.py "a red apple on a blue background" \
        "a red apple on a blue background" edited.png --weight red=-1

Three images side by side: of the first prompt, of the second with the first one's attention, and of
the second by itself. All begin with the same noise.

Both are generated as one batch. While they are, the second gets the attention of the first: in
early steps what its cells see of each other, longer what they see of the words. A word in another's
place gets its map (replace), words that were added keep their own (refine), and a word's map can be
multiplied (reweight). Hertz et al. 2022, https://arxiv.org/abs/2208.01626, section 3.2.
"""

import argparse
from difflib import SequenceMatcher

import numpy as np
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.explain import attention_probe
from stable_diffusion.explain.words import find_words


def align_tokens(source, target):
    """Returns which token of the first prompt each token of the second stands for.

    Args:
        source, target: ids of the two prompts' tokens.

    Returns:
        Two lists: places in the second prompt, and the places in the first that they stand for. A
        token that was added stands for none.
    """
    pairs = []
    for change, i, i_end, j, j_end in SequenceMatcher(None, source, target, False).get_opcodes():
        if change in ("equal", "replace"):
            stretch = (i_end - i) / (j_end - j)  # the new words may have more tokens, or fewer
            pairs += [(place, i + int((place - j) * stretch)) for place in range(j, j_end)]
    return [place for place, _ in pairs], [place for _, place in pairs]


def edit_image(model, source, target, seed, words=0.8, cells=0.4, weights=(), **options):
    """Generates the image of a prompt, and that of another one with its layout.

    Args:
        model: the `StableDiffusion`.
        source, target: the two prompts.
        seed: int, of both.
        words, cells: share of the steps, from 0 to 1, in which cross-attention and self-attention
            are those of the first prompt.
        weights: dict from a word of the second prompt to a factor of its map, in all steps.
        **options: see `StableDiffusion.text_to_image`.

    Returns:
        uint8 array `(2, H, W, 3)`: both images.
    """
    num_steps = options.setdefault("num_steps", 50)
    new, old = align_tokens(model.tokenize(source), model.tokenize(target))
    places = {word.text: [] for word in find_words(model, target)}
    for word in find_words(model, target):
        places[word.text] += word.positions
    if unknown := {*weights} - {*places}:
        raise ValueError(f"The prompt has no {', '.join(unknown)}, only {', '.join(places)}.")

    def control(probabilities, place):
        of_both = probabilities[place.prompt]  # (2, N, T, S), a view: what is changed here counts
        if place.kind == "self" and place.step < cells * num_steps:
            of_both[1] = of_both[0]
        if place.kind == "cross" and place.step < words * num_steps:
            of_both[1][..., new] = of_both[0][..., old]
        for word, factor in dict(weights).items() if place.kind == "cross" else ():
            of_both[1][..., places[word]] *= factor
        return probabilities

    with attention_probe(model, control):
        return model.text_to_image([source, target], seed=[seed, seed], **options)


def read_weight(text):
    """Reads "word=2.5" as a pair."""
    word, _, factor = text.rpartition("=")
    if not word:
        raise argparse.ArgumentTypeError(f"{text!r} is not WORD=FACTOR")
    return word, float(factor)


def read_share(text):
    """Reads a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return float(text)


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("source", help="the first prompt")
    add("target", help="the second prompt")
    add("out", help="PNG file to write")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50)
    add("--words", type=read_share, default=0.8, help="share of the steps (default: 0.8)")
    add("--cells", type=read_share, default=0.4, help="share of the steps (default: 0.4)")
    add("--weight", type=read_weight, action="append", default=[], help="WORD=FACTOR of its map")
    args = parser.parse_args()
    model = StableDiffusion(weights="emoji", jit_compile=False)
    shares = {"words": args.words, "cells": args.cells, "weights": dict(args.weight)}
    options = {"num_steps": args.steps, "verbose": 0}
    try:
        pair = edit_image(model, args.source, args.target, args.seed, **shares, **options)
    except ValueError as error:
        parser.error(str(error))
    alone = model.text_to_image(args.target, seed=args.seed, **options)
    Image.fromarray(np.hstack([*pair, *alone])).save(args.out)


if __name__ == "__main__":
    main()
