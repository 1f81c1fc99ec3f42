"""Compares the samplers: how near they come to DDIM with 500 steps, in how many steps.

    python scripts/measure/compare_samplers.py
    python scripts/emoji/first/emoji_data.py --out emoji.npz
    python scripts/measure/compare_samplers.py --data emoji.npz

Each row generates the same images from the same noise. Their prompts are pairs of subject and
colour that the checkpoint was never trained on. The columns are:

error    root of the mean squared difference of the latents from the reference's, over the standard
         deviation of the reference's latents
PSNR     of the images against the reference's, in dB
passes   runs of the UNet for each image; guidance needs two a step. Runs of only the UNet's finest
         stage (DeepCache) are counted as the number of whole runs that need the same time.

With --data the subjects and colours are judged, too, as by scripts/emoji/first/evaluate_emoji.py.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "emoji" / "first"))
import evaluate_emoji as evaluation

REFERENCE = {"sampler": "ddim", "num_steps": 500}
SAMPLERS = {  # name of the row: options of `generate_latents`
    "ddim": {"sampler": "ddim"},
    "dpmpp-2m": {"sampler": "dpmpp-2m"},
    "dpmpp-2m, quadratic": {"sampler": "dpmpp-2m", "spacing": "quadratic"},
    "unipc": {"sampler": "unipc"},
}
INTERVALS = ((0, 800), (0, 600), (200, 800))  # timesteps with guidance
CACHES = (2, 3, 5)  # steps that share deep features
BATCH = 16  # images generated at once


def generate(pipeline, prompts, **options):
    """Generates an image of each prompt, each from a seed of its own.

    Returns:
        The latents, the images, and the seconds that they took.
    """
    latents, images, start = [], [], time.perf_counter()
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        seeds = list(range(first, first + len(some)))
        steps = pipeline.generate_latents(
            pipeline.encode_text(some), batch_size=len(some), seed=seeds, **options
        )
        *_, (_, _, latent, _) = steps
        latents.append(latent)
        images.append(pipeline.decode_latents(latent))
    return np.concatenate(latents), np.concatenate(images), time.perf_counter() - start


def list_rows(steps):
    """Yields the name of each row and its options."""
    for count in steps:
        for name, options in SAMPLERS.items():
            yield name, {**options, "num_steps": count}
    for first, last in INTERVALS:
        for count in (12, 50):
            options = {"sampler": "unipc", "num_steps": count}
            yield f"unipc, guided {first}-{last}", {**options, "guidance_interval": (first, last)}
    for cache in CACHES:
        for name, count in (("ddim", 50), ("unipc", 20)):
            options = {"sampler": name, "num_steps": count}
            yield f"{name}, cache {cache}", {**options, "deep_cache": cache}


def count_passes(schedule, num_steps, sampler, spacing=None, guidance_interval=None, deep_cache=1):
    """Counts the runs of the UNet for an image; None if some runs are not of the whole UNet."""
    from stable_diffusion.samplers import find_sampler

    if deep_cache > 1:
        return None
    if guidance_interval is None:
        return 2 * num_steps
    first, last = guidance_interval
    levels = schedule.levels(num_steps, spacing, find_sampler(sampler))
    return sum(1 + (first <= level.timestep <= last) for level in levels[:-1])


def compare(pipeline, prompts, steps, judge=None, guidance=None):
    """Returns the rows of the table as dicts. The first row is the reference.

    Args:
        pipeline: the `StableDiffusion`.
        prompts: list of str.
        steps: numbers of steps to compare.
        judge: function of images that returns further columns, a dict.
        guidance: above 1; None is the checkpoint's own.
    """
    schedule = pipeline.config.schedule
    run = partial(generate, pipeline, unconditional_guidance_scale=guidance)
    run(prompts[:BATCH], num_steps=2)  # traces the models
    latents, images, seconds = run(prompts, **REFERENCE)
    rows = [{"name": "ddim (reference)", "steps": REFERENCE["num_steps"], "seconds": seconds}]
    rows[0] |= {"passes": 2 * REFERENCE["num_steps"], "error": 0.0, "psnr": float("inf")}
    rows[0] |= judge(images) if judge else {}
    for name, options in list_rows(steps):
        evaluation.say(f"{name}, {options['num_steps']} steps")
        if "deep_cache" in options:
            run(prompts[:BATCH], **{**options, "num_steps": 2})
        found, generated, seconds = run(prompts, **options)
        row = {"name": name, "steps": options["num_steps"], "seconds": seconds}
        row["passes"] = count_passes(schedule, **options)
        row["error"] = float(np.sqrt(np.mean((found - latents) ** 2)) / np.std(latents))
        mean = np.mean((generated.astype("float64") - images) ** 2)
        row["psnr"] = float(10 * np.log10(255**2 / max(mean, 1e-10)))
        rows.append(row | (judge(generated) if judge else {}))
    evaluation.say("")
    # A run with DeepCache counts as the number of passes that need the same time.
    each = np.median([row["seconds"] / row["passes"] for row in rows if row["passes"]])
    for row in rows:
        row["passes"] = row["passes"] or row["seconds"] / each
    return rows


def format_rows(rows):
    """Returns the rows as the text of a table."""
    judged = "top1" in rows[0]
    lines = [f"{'sampler':24}{'steps':>6}{'passes':>8}{'error':>8}{'PSNR':>7}{'seconds':>9}"]
    lines[0] += f"{'top-1':>8}{'top-5':>8}{'colour':>8}" if judged else ""
    for row in rows:
        line = "{name:24}{steps:6}{passes:8.0f}{error:8.3f}{psnr:7.1f}{seconds:9.1f}".format(**row)
        if judged:
            line += "{top1:7.1f}%{top5:7.1f}%{colour:7.1f}%".format(**row)
        lines.append(line)
    return "\n".join(lines)


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", default=str(evaluation.WEIGHTS), help="a folder (default: weights/emoji)")
    add("--data", type=Path, help="what scripts/emoji/first/emoji_data.py wrote")
    add("--images", type=int, default=32, help="how many in each row (default: 32)")
    add("--steps", type=int, nargs="+", default=[5, 8, 10, 12, 15, 20, 30, 50])
    add("--guidance", type=float, help="above 1 (default: the checkpoint's own)")
    add("--json", action="store_true", help="print JSON in place of the table")
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.guidance is not None and args.guidance <= 1:
        parser.error("--guidance must be above 1")
    try:
        from stable_diffusion import StableDiffusion

        judge, subjects = None, (Path(args.weights) / "subjects.txt").read_text("utf-8")
        subjects = subjects.splitlines()
        pairs = evaluation.choose_pairs(subjects, args.images)
        if args.data:
            data = evaluation.emoji.load(args.data)
            subjects, pictures = evaluation.emoji.read_subjects(args.weights, *data)
            references = evaluation.draw_references(pictures, [colour for _, colour in pairs])

            def judge(images):
                return evaluation.score(images, pairs, references)

        prompts = [evaluation.emoji.caption(subjects[index], colour) for index, colour in pairs]
        pipeline = StableDiffusion(jit_compile=False, weights=args.weights)
        rows = compare(pipeline, prompts, args.steps, judge, args.guidance)
    except (OSError, ValueError) as error:
        print(f"compare_samplers: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=2) if args.json else format_rows(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
