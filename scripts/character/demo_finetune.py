"""Teaches the embedded checkpoint a new character by each method of finetune.py, and measures it.

    python scripts/emoji_data.py --out emoji.npz
    python scripts/demo_finetune.py --work runs/finetune --data emoji.npz --picture methods.png

draw_character.py draws the pictures of the character. Each method is one run of finetune.py, in a
process of its own so that its peak memory can be told. Then the checkpoint before and after draws
the character on each background from the same seeds.

distance: of each drawn picture to the nearest training picture, as root mean square of the
difference of pixels at 32x32, in levels of 0 to 255; the mean of all drawn pictures. What it can be
at best is the distance of training pictures to each other.

With --data, pairs of subject and background are drawn, too, and judged as evaluate_emoji.py does:
how much of what the checkpoint knew is left. Without it, this part is left out.

In comments on shapes, N is the number of pictures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import draw_character
import emoji_data as emoji
import evaluate_emoji as evaluation

HERE = Path(__file__).parent
NAME, TOKEN, WORD = "blip", "<blip>", "frog"
STEPS, GUIDANCE, SEEDS = 30, 3.0, (0, 1)  # of the pictures that are drawn
THUMBNAIL = 32  # pixels
CLASS_SUBJECTS, CLASS_PICTURES = 48, 64
PAIRS = 48  # of subject and background
COLUMNS = 8  # pictures of each method that are shown
BATCH = 16  # pictures drawn at once
MIB = 2**20
COMMON = ["--dropout", "0.1", "--schedule", "cosine", "--warmup", "20", "--save-every", "100000"]
COMMON += ["--save-dtype", "float16"]  # as the checkpoint's own files are
METHODS = {  # name to arguments of finetune.py, without the class prompts of DreamBooth
    "full": ["--method", "full", "--rate", "3e-4", "--steps", "150"],
    "cross-attention": [
        *("--method", "full", "--parameters", "cross-attention"),
        *("--rate", "1e-3", "--steps", "200"),
    ],
    "LoRA": ["--method", "lora", "--rank", "4", "--rate", "3e-3", "--steps", "300"],
    "textual inversion": [
        *("--method", "textual-inversion", "--token", TOKEN, "--initializer", WORD),
        *("--vectors", "4", "--rate", "1e-2", "--steps", "300"),
    ],
    "DreamBooth": ["--method", "dreambooth", "--rate", "3e-4", "--steps", "150"],
    "DreamBooth, LoRA": [
        *("--method", "dreambooth", "--parameters", "lora", "--rate", "3e-3", "--steps", "300"),
    ],
    "DreamBooth, no prior": [
        *("--method", "dreambooth", "--rate", "3e-4", "--steps", "150"),
        *("--prior-weight", "0"),
    ],
}


def run(command):
    """Runs a command; returns its peak memory in bytes and how many seconds it took.

    Raises:
        ValueError: it failed.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return usage.ru_maxrss * 1024, time.perf_counter() - begun


def thumbnails(pictures):
    """Shrinks pictures by averaging: uint8 `(N, H, W, 3)` to float `(N, 32 * 32 * 3)`."""
    count, height, width, _ = pictures.shape
    blocks = pictures.reshape(
        count, THUMBNAIL, height // THUMBNAIL, THUMBNAIL, width // THUMBNAIL, 3
    )
    return blocks.mean((2, 4)).reshape(count, -1)


def distances(some, others):
    """Returns the distance of each of `some` from each of `others`, `(N, M)`."""
    some, others = thumbnails(some), thumbnails(others)
    return np.sqrt(np.mean((some[:, None] - others) ** 2, axis=-1))


def draw(pipeline, prompts, seeds):
    """Draws a picture of each prompt, uint8 `(N, H, W, 3)`."""
    batches = [
        pipeline.text_to_image(
            prompts[start : start + BATCH],
            num_steps=STEPS,
            unconditional_guidance_scale=GUIDANCE,
            seed=seeds[start : start + BATCH],
            verbose=0,
        )
        for start in range(0, len(prompts), BATCH)
    ]
    return np.concatenate(batches)


def open_result(weights, out):
    """Returns the pipeline with what was trained."""
    from stable_diffusion import StableDiffusion

    if out is None:
        return StableDiffusion(jit_compile=False, weights=weights)
    if out.is_dir():
        return StableDiffusion(jit_compile=False, weights=out)
    pipeline = StableDiffusion(jit_compile=False, weights=weights)
    if "inversion" in out.name:
        pipeline.load_embedding(out)
    else:
        pipeline.load_lora(out)
    return pipeline


class Knowledge:
    """Judges what a checkpoint knows of the subjects that it was trained on.

    Args:
        data: path of what emoji_data.py wrote, or None for no judgement.
        folder: the checkpoint's, which lists its subjects.
    """

    def __init__(self, data, folder):
        self.pairs = None
        if data:
            self.subjects, pictures = emoji.read_subjects(folder, *emoji.load(data))
            self.pairs = evaluation.choose_pairs(self.subjects, PAIRS)
            colours = [colour for _, colour in self.pairs]
            self.references = evaluation.draw_references(pictures, colours)

    def __call__(self, pipeline):
        if not self.pairs:
            return {}
        prompts = [emoji.caption(self.subjects[n], c) for n, c in self.pairs]
        drawn = draw(pipeline, prompts, list(range(len(prompts))))
        return evaluation.score(drawn, self.pairs, self.references)


def class_prompts(folder, backgrounds):
    """Returns prompts of subjects that the checkpoint knows, evenly chosen from its list."""
    subjects = (folder / "subjects.txt").read_text("utf-8").splitlines()
    chosen = np.linspace(0, len(subjects) - 1, min(CLASS_SUBJECTS, len(subjects))).astype(int)
    return [
        emoji.caption(subjects[n], backgrounds[place % len(backgrounds)])
        for place, n in enumerate(chosen)
    ]


def teach(name, args, folder, backgrounds):
    """Trains by a method; returns its result's path and what the run took.

    Args:
        name: key of `METHODS`.
        args: the command line's.
        folder: of the checkpoint.
        backgrounds: names of colours.
    """
    options, slug = METHODS[name], name.replace(", ", "-").replace(" ", "-")
    single = "lora" in options or "textual-inversion" in options
    out = args.work / (f"{slug}.safetensors" if single else slug)
    pictures = args.work / ("token" if "textual-inversion" in options else "pictures")
    command = [sys.executable, HERE / "finetune.py", pictures, "--out", out, *COMMON, *options]
    command += ["--weights", args.weights, "--cache", args.work / "cache", "--restart"]
    if "dreambooth" in options and "--prior-weight" not in options:
        command += [f"--class-pictures={CLASS_PICTURES}"]
        command += [f"--class-prompt={prompt}" for prompt in class_prompts(folder, backgrounds)]
    memory, seconds = run(command)
    files = [out] if single else (out / "unet").iterdir()
    return out, {"memory": memory, "seconds": seconds, "bytes": sum(map(_size, files))}


def _size(path):
    return path.stat().st_size


def demonstrate(args):
    """Does everything; returns the rows of the table, and writes the picture."""
    from stable_diffusion.checkpoints import open_checkpoint

    args.work.mkdir(parents=True, exist_ok=True)
    for folder, name in (("pictures", NAME), ("token", TOKEN)):
        draw_character.main([str(args.work / folder), "--name", name])
    paths = sorted((args.work / "pictures").glob("*.png"))
    trained = np.stack([np.asarray(Image.open(path)) for path in paths])
    apart = distances(trained, trained)
    np.fill_diagonal(apart, np.inf)

    folder = open_checkpoint(args.weights).folder
    backgrounds = list(draw_character.BACKGROUNDS)
    knowledge = Knowledge(args.data, folder)
    rows = [{"method": "training pictures", "distance": float(apart.min(1).mean())}]
    grid = [np.hstack(trained[:COLUMNS])]
    for name in (None, *args.methods):
        print(name or "before", file=sys.stderr, flush=True)
        out, row = (None, {}) if name is None else teach(name, args, folder, backgrounds)
        pipeline = open_result(args.weights, out)
        word = TOKEN if out and "inversion" in out.name else NAME
        prompts = [f"a {word} on {_article(b)} {b} background" for b in backgrounds for _ in SEEDS]
        drawn = draw(pipeline, prompts, [seed for _ in backgrounds for seed in SEEDS])
        row["distance"] = float(distances(drawn, trained).min(1).mean())
        rows.append({"method": name or "before"} | row | knowledge(pipeline))
        grid.append(np.hstack(drawn[:: len(SEEDS)][:COLUMNS]))
    Image.fromarray(np.vstack(grid)).save(args.picture)
    return rows


def _article(word):
    return "an" if word[0] in "aeiou" else "a"


def show(rows):
    """Returns the rows as a table in Markdown."""
    lines = [
        "| method | seconds | peak memory | file | distance | subject right | background right |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["method"],
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{row['memory'] / MIB:.0f} MiB" if "memory" in row else "",
            f"{row['bytes'] / MIB:.2f} MiB" if "bytes" in row else "",
            f"{row['distance']:.1f}",
            f"{row['top1']:.0f} %" if "top1" in row else "",
            f"{row['colour']:.0f} %" if "colour" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--weights", default="emoji", help="default: emoji")
    parser.add_argument("--data", type=Path, help="what emoji_data.py wrote")
    parser.add_argument("--picture", type=Path, required=True, help="PNG of a row for each method")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args(argv)
    try:
        rows = demonstrate(args)
    except (OSError, ValueError) as error:
        print(f"demo_finetune: {error}", file=sys.stderr)
        return 2
    (args.work / "rows.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
