"""Measures how well a checkpoint draws pairs of subject and background it was never trained on.

    python scripts/emoji/first/emoji_data.py --out emoji.npz
    python scripts/emoji/first/evaluate_emoji.py emoji.npz

A picture shows the right subject if, of all subjects of the checkpoint drawn on that background
(in the centre, at full size), the right one is nearest to it: in mean squared error at 32x32
pixels (top-1), or among the nearest five (top-5). It has the right colour if the median of its
border is nearest to the named one. Which subjects the checkpoint has is in its subjects.txt.

All seeds are fixed: the same command prints the same numbers.

In comments on shapes, B is the number of pictures, N the number of subjects.
"""

import argparse
import json
import sys
from pathlib import Path

import emoji_data as emoji
import numpy as np

WEIGHTS = Path(__file__).parents[3] / "weights" / "emoji"
BORDER = 3  # pixels wide: thinner than the rim that every subject leaves
STEPS, GUIDANCE = 50, 7.5  # the defaults of the pipeline
BATCH = 32  # pictures drawn at once
TWICE = 64  # prompts at most that are drawn from two seeds


# --- Metrics: functions of uint8 pictures `(B, 128, 128, 3)`. ------------------------------------


def draw_references(pictures, colours):
    """Draws all subjects on each background, as they are compared.

    Args:
        pictures: uint8 `(N, 128, 128, 4)`, RGBA.
        colours: names of backgrounds.

    Returns:
        dict of colour to float32 thumbnails `(N, 32, 32, 3)`.
    """
    return {
        colour: emoji.thumbnails(
            np.stack([emoji.compose(picture, emoji.COLOURS[colour]) for picture in pictures])
        )
        for colour in dict.fromkeys(colours)
    }


def subject_ranks(drawn, pairs, references):
    """Ranks the right subject among all, by distance from what was drawn.

    Args:
        drawn: pictures, one of each pair.
        pairs: B tuples `(index of the subject, colour)`.
        references: see `draw_references`.

    Returns:
        int array `(B,)`: how many other subjects are as near or nearer; 0 is right.
    """
    thumbnails = emoji.thumbnails(drawn)
    ranks = []
    for thumbnail, (index, colour) in zip(thumbnails, pairs, strict=True):
        distance = emoji.distances(thumbnail[None], references[colour])[0]
        ranks.append(np.sum(distance <= distance[index]) - 1)
    return np.array(ranks)


def border_colours(drawn):
    """Names the colour that the median of each picture's border is nearest to."""
    edge = np.ones(drawn.shape[1:3], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    median = np.median(drawn[:, edge], axis=1)  # (B, 3)
    names, values = list(emoji.COLOURS), np.array(list(emoji.COLOURS.values()), "float64")
    error = np.sum((median[:, None] - values) ** 2, axis=-1)
    return [names[n] for n in error.argmin(axis=1)]


def psnr(one, other):
    """Returns the peak signal-to-noise ratio of each picture in dB, float array `(B,)`."""
    error = np.mean((one.astype("float64") - other) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def difference(one, other):
    """Returns the mean absolute difference of pixels, in levels of 0 to 255: a float."""
    return float(np.mean(np.abs(one.astype("float64") - other)))


def score(drawn, pairs, references):
    """Returns the shares, in percent, of pictures with the right subject and colour."""
    ranks = subject_ranks(drawn, pairs, references)
    right = [colour for _, colour in pairs] == np.array(border_colours(drawn))
    return {
        "top1": 100 * float(np.mean(ranks < 1)),
        "top5": 100 * float(np.mean(ranks < 5)),
        "colour": 100 * float(np.mean(right)),
    }


# --- What is measured. ---------------------------------------------------------------------------


def choose_pairs(subjects, count, seed=0):
    """Chooses pairs that weren't trained on, at random, each once.

    Returns:
        List of tuples `(index of the subject, colour)`: `count`, or all where there are fewer.
    """
    pairs = [
        (index, colour)
        for index, subject in enumerate(subjects)
        for colour in emoji.COLOURS
        if emoji.held_out(subject, colour)
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [pairs[n] for n in order]


class Artist:
    """Draws the pairs with a pipeline, each from a seed of its own, and remembers the pictures."""

    def __init__(self, pipeline, subjects, pairs):
        self.pipeline, self.pairs = pipeline, pairs
        self.prompts = [emoji.caption(subjects[index], colour) for index, colour in pairs]
        self.drawn = {}

    def __call__(self, steps, guidance, first_seed=0, count=None):
        key = steps, guidance, first_seed, count
        if key not in self.drawn:
            prompts = self.prompts[:count]
            batches = []
            for start in range(0, len(prompts), BATCH):
                some = prompts[start : start + BATCH]
                say(f"{steps} steps, guidance {guidance:g}: {start} of {len(prompts)} drawn")
                seeds = [first_seed + start + n for n in range(len(some))]
                batches.append(
                    self.pipeline.text_to_image(
                        some,
                        num_steps=steps,
                        unconditional_guidance_scale=guidance,
                        seed=seeds,
                        verbose=0,
                    )
                )
            say("")
            self.drawn[key] = np.concatenate(batches)
        return self.drawn[key]


def reconstruct(pipeline, pictures):
    """Encodes and decodes pictures, uint8 to uint8."""
    batches = []
    for start in range(0, len(pictures), BATCH):
        say(f"VAE: {start} of {len(pictures)} reconstructed")
        batch = pictures[start : start + BATCH].astype("float32") / 127.5 - 1
        latent = pipeline.image_encoder.predict_on_batch(batch)
        batches.append(np.asarray(pipeline.decoder.predict_on_batch(latent), "float32"))
    say("")
    return np.clip((np.concatenate(batches) + 1) * 127.5, 0, 255).round().astype("uint8")


def evaluate(pipeline, subjects, pictures, pairs, steps, guidance):
    """Measures everything.

    Args:
        pipeline: the `StableDiffusion`.
        subjects, pictures: names and RGBA pictures of all subjects.
        pairs: see `choose_pairs`.
        steps: numbers of steps to compare, at the default guidance.
        guidance: guidances to compare, at the default number of steps.

    Returns:
        dict with "pairs", "subjects", "psnr" (dB) and the rows of the tables "default", "steps"
        and "guidance", each a dict.
    """
    artist = Artist(pipeline, subjects, pairs)
    references = draw_references(pictures, [colour for _, colour in pairs])
    plain = [emoji.compose(pictures[index], emoji.COLOURS[colour]) for index, colour in pairs]
    plain, twice = np.stack(plain), pairs[:TWICE]

    def row(steps, guidance):
        return score(artist(steps, guidance), pairs, references)

    def guidance_row(scale):
        other = artist(STEPS, scale, len(pairs), len(twice))  # seeds that no other picture has
        one = artist(STEPS, scale)[: len(twice)]
        usual = artist(STEPS, GUIDANCE)[: len(twice)]
        seeds = {"two_seeds": difference(one, other), "from_usual": difference(one, usual)}
        return {"guidance": scale, **row(STEPS, scale), **seeds}

    return {
        "pairs": len(pairs),
        "subjects": len(subjects),
        "psnr": float(np.mean(psnr(reconstruct(pipeline, plain), plain))),
        "default": row(STEPS, GUIDANCE),
        "steps": [{"steps": count, **row(count, GUIDANCE)} for count in steps],
        "guidance": [guidance_row(scale) for scale in guidance],
    }


def show_tables(result):
    """Returns the result of `evaluate` as text."""
    total = result["default"]
    lines = [
        f"{result['pairs']} pairs never trained on, of {result['subjects']} subjects; "
        f"{STEPS} steps, guidance {GUIDANCE}",
        "",
        f"subject, top-1                   {total['top1']:6.1f} %",
        f"subject, top-5                   {total['top5']:6.1f} %",
        f"background's colour              {total['colour']:6.1f} %",
        f"VAE reconstruction, PSNR         {result['psnr']:6.1f} dB",
    ]
    if result["steps"]:
        lines += ["", "steps      top-1    top-5   colour"]
    for row in result["steps"]:
        lines += ["{steps:5}  {top1:7.1f}% {top5:7.1f}% {colour:7.1f}%".format(**row)]
    if result["guidance"]:
        lines += ["", "guidance   top-1    top-5   colour  two seeds  from usual"]
    for row in result["guidance"]:
        numbers = "{guidance:8g} {top1:6.1f}% {top5:7.1f}% {colour:7.1f}%"
        lines += [(numbers + " {two_seeds:10.1f} {from_usual:11.1f}").format(**row)]
    if result["guidance"]:
        lines += ["", "two seeds: mean difference (of 255 levels) between two pictures of a prompt"]
        lines += [f"from usual: the same between this guidance and {GUIDANCE}, from one seed"]
    return "\n".join(lines)


def say(message):
    """Shows how far it is, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def positive(kind):
    """Returns a type of arguments: a positive int or float."""

    def convert(text):
        if not 0 < kind(text) < float("inf"):
            raise ValueError(text)
        return kind(text)

    convert.__name__ = f"positive {kind.__name__}"  # argparse says it
    return convert


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="what scripts/emoji/first/emoji_data.py wrote")
    parser.add_argument("--weights", default=str(WEIGHTS), help="a diffusers folder")
    parser.add_argument("--pairs", type=positive(int), default=300, help="default: 300")
    whole, decimal = positive(int), positive(float)
    parser.add_argument("--steps", type=whole, nargs="*", default=[5, 10, 20, 50])
    parser.add_argument("--guidance", type=decimal, nargs="*", default=[1, 3, 7.5])
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    args = parser.parse_args(argv)
    try:
        subjects, pictures = emoji.read_subjects(args.weights, *emoji.load(args.data))
        pairs = choose_pairs(subjects, args.pairs)
        if not pairs:
            raise ValueError(f"no pair of these {len(subjects)} subjects is held out")
        from stable_diffusion import StableDiffusion  # late: it takes seconds

        pipeline = StableDiffusion(jit_compile=False, weights=args.weights)
        result = evaluate(pipeline, subjects, pictures, pairs, args.steps, args.guidance)
    except (OSError, ValueError) as error:
        print(f"evaluate_emoji: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if args.json else show_tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
