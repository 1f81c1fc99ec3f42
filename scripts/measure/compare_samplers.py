"""Compares the samplers by how near they come to DDIM's picture of 500 steps, in how many steps.

    python scripts/compare_samplers.py
    python scripts/emoji_data.py --out emoji.npz
    python scripts/compare_samplers.py --data emoji.npz

Each row draws the same pictures, of pairs the checkpoint was never trained on, from the same noise.
"error" is the root of the mean squared difference of the latents, over the standard deviation of
the reference's; "PSNR" is of the pictures, in dB. "passes" counts runs of the UNet
for a picture, of which guidance takes two a step; DeepCache's runs of the finest level alone are
counted by the time they take. With --data the subjects and colours are judged, too, as
scripts/evaluate_emoji.py does.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

import evaluate_emoji as evaluation

REFERENCE = {"sampler": "ddim", "num_steps": 500}
SAMPLERS = ("ddim", "dpmpp-2m", "dpmpp-2m-quadratic", "unipc")
INTERVALS = ((0, 800), (0, 600), (200, 800))  # timesteps with guidance
CACHES = (2, 3, 5)  # steps that share deep features
BATCH = 16  # pictures drawn at once


def draw(pipeline, prompts, **options):
    """Returns latents and pictures of the prompts, each from a seed of its own, and the seconds."""
    latents, pictures, start = [], [], time.perf_counter()
    for first in range(0, len(prompts), BATCH):
        some, trajectory = prompts[first : first + BATCH], []
        pictures.append(
            pipeline.text_to_image(
                some,
                seed=list(range(first, first + len(some))),
                verbose=0,
                callback=lambda step, timestep, latent, kept=trajectory: kept.append(latent),
                **options,
            )
        )
        latents.append(trajectory[-1])
    return np.concatenate(latents), np.concatenate(pictures), time.perf_counter() - start


def get_rows(steps):
    """Yields the name of each row, its options and the passes of the UNet, None where unknown."""
    for count in steps:
        for name in SAMPLERS:
            yield name, {"sampler": name, "num_steps": count}, 2 * count
    for first, last in INTERVALS:
        for count in (12, 50):
            options = {"sampler": "unipc", "num_steps": count}
            options["guidance_interval"] = first, last
            yield f"unipc, guided {first}-{last}", options, None
    for cache in CACHES:
        for name, count in (("ddim", 50), ("unipc", 20)):
            options = {"sampler": name, "num_steps": count, "deep_cache": cache}
            yield f"{name}, cache {cache}", options, None


def count_passes(options, schedule):
    """Returns the passes with guidance in an interval, None for a cache."""
    if "guidance_interval" not in options:
        return None
    from stable_diffusion.samplers.multistep import get_levels

    first, last = options["guidance_interval"]
    levels = get_levels(schedule, options["num_steps"])
    return sum(1 + (first <= timestep <= last) for timestep, _ in levels)


def compare(pipeline, prompts, steps, judge=None):
    """Returns the rows of the table, dicts, the first of them the reference."""
    draw(pipeline, prompts[:BATCH], num_steps=2)  # traces the models
    latents, pictures, seconds = draw(pipeline, prompts, **REFERENCE)
    rows = [{"name": "ddim (reference)", "steps": REFERENCE["num_steps"], "seconds": seconds}]
    rows[0] |= {"passes": 2 * REFERENCE["num_steps"], "error": 0.0, "psnr": float("inf")}
    rows[0] |= judge(pictures) if judge else {}
    for name, options, passes in get_rows(steps):
        evaluation.say(f"{name}, {options['num_steps']} steps")
        if "deep_cache" in options:
            draw(pipeline, prompts[:BATCH], **{**options, "num_steps": 2})
        found, drawn, seconds = draw(pipeline, prompts, **options)
        row = {"name": name, "steps": options["num_steps"], "seconds": seconds}
        row["passes"] = passes or count_passes(options, pipeline.config.schedule)
        row["error"] = float(np.sqrt(np.mean((found - latents) ** 2)) / np.std(latents))
        mean = np.mean((drawn.astype("float64") - pictures) ** 2)
        row["psnr"] = float(10 * np.log10(255**2 / max(mean, 1e-10)))
        rows.append(row | (judge(drawn) if judge else {}))
    evaluation.say("")
    # A cached run is as many passes as take the same time.
    each = np.median([row["seconds"] / row["passes"] for row in rows if row["passes"]])
    for row in rows:
        row["passes"] = row["passes"] or row["seconds"] / each
    return rows


def show(rows):
    """Returns the rows as a table."""
    judged = "top1" in rows[0]
    lines = [f"{'sampler':24}{'steps':>6}{'passes':>8}{'error':>8}{'PSNR':>7}{'seconds':>9}"]
    lines[0] += f"{'top-1':>8}{'top-5':>8}{'colour':>8}" if judged else ""
    for row in rows:
        line = "{name:24}{steps:6}{passes:8.0f}{error:8.3f}{psnr:7.1f}{seconds:9.1f}".format(**row)
        if judged:
            line += "{top1:7.1f}%{top5:7.1f}%{colour:7.1f}%".format(**row)
        lines.append(line)
    return "\n".join(lines)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default=str(evaluation.WEIGHTS))
    parser.add_argument("--data", type=Path, help="what scripts/emoji_data.py wrote")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 12, 15, 20, 30, 50])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args(argv)
    try:
        from stable_diffusion import StableDiffusion

        judge, subjects = None, (Path(args.weights) / "subjects.txt").read_text("utf-8")
        subjects = subjects.splitlines()
        pairs = evaluation.choose_pairs(subjects, args.pictures)
        if args.data:
            data = evaluation.emoji.load(args.data)
            subjects, pictures = evaluation.emoji.read_subjects(args.weights, *data)
            references = evaluation.draw_references(pictures, [colour for _, colour in pairs])

            def judge(drawn):
                return evaluation.score(drawn, pairs, references)

        prompts = [evaluation.emoji.caption(subjects[index], colour) for index, colour in pairs]
        pipeline = StableDiffusion(jit_compile=False, weights=args.weights)
        rows = compare(pipeline, prompts, args.steps, judge)
    except (OSError, ValueError) as error:
        print(f"compare_samplers: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=2) if args.json else show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
