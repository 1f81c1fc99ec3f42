"""Teaches the embedded checkpoint a new character by each method of fine-tuning, and measures it.

    python scripts/emoji/first/emoji_data.py --out emoji.npz
    python scripts/character/demo_finetune.py --work runs --data emoji.npz --picture out.png

draw_character.py draws the images of the character. Each method is one run of the command
stable-diffusion-finetune, as a process of its own, so that its peak memory can be read. Then the
checkpoint before and after training generates the character on each background from the same seeds.

distance: from each generated image to the nearest training image, as root mean square of the
difference of pixels at 32x32, in levels of 0 to 255; the mean over all generated images. For
comparison, the first row is the distance of training images from each other.

With --data, pairs of subject and background are generated, too, and judged as evaluate_emoji.py
does: this shows how much of its earlier knowledge the checkpoint still has.

In comments on shapes, N is the number of images.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import draw_character
import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "emoji" / "first"))
import emoji_data as emoji
import evaluate_emoji as evaluation

NAME, TOKEN, WORD = "blip", "<blip>", "frog"
STEPS, GUIDANCE, SEEDS = 30, 3.0, (0, 1)  # of the generated images
THUMBNAIL = 32  # pixels
CLASS_SUBJECTS, CLASS_IMAGES = 48, 64
PAIRS = 48  # of subject and background
COLUMNS = 8  # images of each method that are shown
BATCH = 16  # images generated at once
MIB = 2**20
COMMON = ["--dropout", "0.1", "--schedule", "cosine", "--warmup", "20", "--save-every", "100000"]
COMMON += ["--save-dtype", "float16"]  # as the checkpoint's own files are
METHODS = {  # name: arguments of stable-diffusion-finetune, but the class prompts of DreamBooth
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


def run_measured(command):
    """Runs a command; returns its peak memory in bytes and the seconds that it needed.

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


def shrink(images):
    """Shrinks images by averaging: uint8 `(N, H, W, 3)` to float `(N, 32 * 32 * 3)`."""
    count, height, width, _ = images.shape
    blocks = images.reshape(count, THUMBNAIL, height // THUMBNAIL, THUMBNAIL, width // THUMBNAIL, 3)
    return blocks.mean((2, 4)).reshape(count, -1)


def measure_distances(some, others):
    """Returns the distance of each of `some` from each of `others`, `(N, M)`."""
    some, others = shrink(some), shrink(others)
    return np.sqrt(np.mean((some[:, None] - others) ** 2, axis=-1))


def generate(pipeline, prompts, seeds):
    """Generates an image of each prompt, uint8 `(N, H, W, 3)`."""
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
    """Returns the pipeline with the result of training; `out` None is the one before."""
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


class Judge:
    """Judges how much a checkpoint knows about the subjects that it was trained on.

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

    def judge(self, pipeline):
        """Returns the shares of right subjects and backgrounds in percent, a dict."""
        if not self.pairs:
            return {}
        prompts = [emoji.caption(self.subjects[n], c) for n, c in self.pairs]
        images = generate(pipeline, prompts, list(range(len(prompts))))
        return evaluation.score(images, self.pairs, self.references)


def list_class_prompts(folder, backgrounds):
    """Returns prompts of subjects that the checkpoint knows, evenly chosen from its list."""
    subjects = (folder / "subjects.txt").read_text("utf-8").splitlines()
    chosen = np.linspace(0, len(subjects) - 1, min(CLASS_SUBJECTS, len(subjects))).astype(int)
    return [
        emoji.caption(subjects[n], backgrounds[place % len(backgrounds)])
        for place, n in enumerate(chosen)
    ]


def teach(name, args, folder, backgrounds):
    """Trains by a method; returns the path of the result, and a dict of what the run needed.

    Args:
        name: key of `METHODS`.
        args: arguments of the command line.
        folder: the checkpoint's.
        backgrounds: names of colours.
    """
    options, prompts = METHODS[name], []
    slug = name.replace(", ", "-").replace(" ", "-")
    single = "lora" in options or "textual-inversion" in options
    out = args.work / (f"{slug}.safetensors" if single else slug)
    images = args.work / ("token" if "textual-inversion" in options else "images")
    command = [sys.executable, "-m", "stable_diffusion.command.finetune", images]
    command += ["--out", out, *COMMON, *options]
    command += ["--weights", args.weights, "--cache", args.work / "cache", "--restart"]
    if "dreambooth" in options and "--prior-weight" not in options:
        prompts = list_class_prompts(folder, backgrounds)
        command += [f"--class-images={CLASS_IMAGES}"]
    command += [f"--class-prompt={prompt}" for prompt in prompts]
    memory, seconds = run_measured(command)
    files = [out] if single else (out / "unet").iterdir()
    size = sum(file.stat().st_size for file in files)
    return out, {"memory": memory, "seconds": seconds, "bytes": size}


def demonstrate(args):
    """Does everything; returns the rows of the table, and writes the picture."""
    from stable_diffusion.checkpoints import open_checkpoint

    args.work.mkdir(parents=True, exist_ok=True)
    for folder, name in (("images", NAME), ("token", TOKEN)):
        draw_character.main([str(args.work / folder), "--name", name])
    paths = sorted((args.work / "images").glob("*.png"))
    trained = np.stack([np.asarray(Image.open(path)) for path in paths])
    apart = measure_distances(trained, trained)
    np.fill_diagonal(apart, np.inf)

    folder = open_checkpoint(args.weights).folder
    backgrounds = list(draw_character.BACKGROUNDS)
    judge = Judge(args.data, folder)
    rows = [{"method": "training images", "distance": float(apart.min(1).mean())}]
    grid = [np.hstack(trained[:COLUMNS])]
    for name in (None, *args.methods):
        print(name or "before", file=sys.stderr, flush=True)
        out, row = (None, {}) if name is None else teach(name, args, folder, backgrounds)
        pipeline = open_result(args.weights, out)
        word = TOKEN if out and "inversion" in out.name else NAME
        prompts = [f"a {word} on {_article(b)} {b} background" for b in backgrounds for _ in SEEDS]
        images = generate(pipeline, prompts, [seed for _ in backgrounds for seed in SEEDS])
        row["distance"] = float(measure_distances(images, trained).min(1).mean())
        rows.append({"method": name or "before"} | row | judge.judge(pipeline))
        grid.append(np.hstack(images[:: len(SEEDS)][:COLUMNS]))
    Image.fromarray(np.vstack(grid)).save(args.picture)
    return rows


def _article(word):
    return "an" if word[0] in "aeiou" else "a"


def format_rows(rows):
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


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of the runs")
    add("--weights", default="emoji", help="default: emoji")
    add("--data", type=Path, help="what emoji_data.py wrote")
    add("--picture", type=Path, required=True, help="a PNG to write, with a row for each method")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    args = get_parser().parse_args(argv)
    try:
        rows = demonstrate(args)
    except (OSError, ValueError) as error:
        print(f"demo_finetune: {error}", file=sys.stderr)
        return 2
    (args.work / "rows.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    print(format_rows(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
