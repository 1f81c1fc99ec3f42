"""The command `stable-diffusion`: generates images from prompts and writes them as PNG files."""

import argparse
import json
import os
import re
import secrets
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from stable_diffusion.command.arguments import (
    DTYPES,
    SAMPLERS,
    SEEDS,
    SPACINGS,
    Parser,
    make_number_type,
    parse_text,
)
from stable_diffusion.command.png import is_generated, write_png
from stable_diffusion.command.terminal import (
    print_message,
    run_command,
    show_progress,
    silence_tensorflow,
)
from stable_diffusion.version import __version__

NAME = "stable-diffusion"
USAGE = f'{NAME} "PROMPT" ["PROMPT" ...] [options]\n       {NAME} --prompts FILE [options]'
DESCRIPTION = """\
Generates images from prompts with Stable Diffusion and writes them as PNG files. It prints the
paths of the images to standard output, one a line, and everything else to standard error.
"""
EPILOG = """\
Names. Without --out an image gets its name from its prompt and its seed, as in
a-red-apple-on-a-blue-background-0.png, and goes to the current folder. With --out FILE.png it gets
this name; several images get FILE-1.png, FILE-2.png and so on. With --out FOLDER/ the images have
the same names as without --out, and go to that folder. Missing folders are made. A file of the same
name is replaced: the same command with the same --seed writes the same files again.

Text in the PNG. Each image has its own seed: the first has --seed, each next one 1 more. Its PNG
says as text how it was generated, so that it can be generated again: prompt, negative, seed, steps,
guidance, sampler, spacing (only if --spacing was given), dtype, size (width x height), weights and
version.

Files of prompts. A file for --prompts has one prompt a line. If the name of the file ends in
.jsonl, each line is a JSON object such as {"prompt": "a cat", "negative": "blurry", "seed": 3}, of
which only the prompt is needed. Each image goes to --out FOLDER. Its name begins with the number of
its line, as in 00001-a-cat-3.png. Seeds begin at 0 unless --seed is given. An image that the folder
already has, generated with the same options, is not generated again: if a command was interrupted,
give it again and it goes on where it stopped.

Weights. "emoji" is part of the package: a small model of 520 kinds of emoji on coloured
backgrounds. "sd1.4" and "sd2.1-base" are downloaded on first use, some gigabytes; their licence is
CreativeML Open RAIL-M. Anything else is a path: a folder in diffusers' layout, of KerasCV's .h5
files or of models for OpenVINO, or a .safetensors or .ckpt file in the original layout; or
hf://owner/name on the Hugging Face Hub.

examples:
  stable-diffusion "a red apple on a blue background"
  stable-diffusion "a red apple on a blue background" --seed 3 --batch 4
  stable-diffusion "a cat face on green" "a dog face on green" --out pets.png
  stable-diffusion "an astronaut riding a horse" --weights sd1.4 --negative blurry --jit
  stable-diffusion "an astronaut" --weights model.safetensors --sampler dpmpp-2m --steps 20
  stable-diffusion --prompts prompts.txt --batch 8 --out images/

exit status: 0 done, 1 failed, 2 arguments that cannot be used, 130 interrupted
"""
LINE_KEYS = {"prompt": str, "negative": str, "seed": int}  # of a line in JSON
SLUG_LENGTH = 80  # characters of a prompt in a file's name


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser(NAME, usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="*", type=parse_text, help="what to show, in quotes")
    add("--prompts", metavar="FILE", type=parse_text, help="read prompts from a file; see below")
    add("--negative", metavar="TEXT", default="", type=parse_text, help="what not to show")
    add(
        "--weights", metavar="W", default="emoji", type=parse_text, help="default: emoji; see below"
    )
    add("--out", metavar="FILE", type=parse_text, help="a .png file, or a folder; see below")
    add("--seed", metavar="S", type=make_number_type(int, 0, SEEDS - 1), help="default: random")
    add(
        "--batch",
        metavar="N",
        default=1,
        type=make_number_type(int, 1, 1024),
        help="images of each prompt, generated together; with --prompts, how many prompts are "
        "generated together (default: 1)",
    )
    add(
        "--steps",
        metavar="N",
        default=50,
        type=make_number_type(int, 1, 1000),
        help="fewer are faster, more give finer images (default: 50)",
    )
    add(
        "--guidance",
        metavar="G",
        type=make_number_type(float, 0, 1000),
        help="how closely to follow the prompt; at 1 or less the model runs without guidance, in "
        "half the time (default: the one that the weights come with; 7.5 if they have none)",
    )
    size = make_number_type(int, 1, 65536)
    add("--height", metavar="H", type=size, help="in pixels (default: the weights' own size)")
    add("--width", metavar="W", type=size, help="in pixels (default: the weights' own size)")
    add("--sampler", default="ddim", choices=SAMPLERS, help="default: ddim")
    add("--spacing", choices=SPACINGS, help="of the timesteps (default: the weights' own)")
    add("--dtype", choices=DTYPES, help="of parameters and computation (default: float32)")
    add("--jit", action="store_true", help="compile first; pays off for many or large images")
    return parser


@dataclass
class Job:
    """An image that is to be generated, and the path of its file."""

    prompt: str
    negative: str
    seed: int
    path: Path


def make_slug(prompt):
    """Returns a prompt's letters and digits, in lower case and joined by hyphens."""
    letters = unicodedata.normalize("NFKC", prompt).lower()
    return re.sub(r"[\W_]+", "-", letters)[:SLUG_LENGTH].strip("-") or "image"


def list_jobs(args):
    """Returns the `Job`s of the prompts in the command line.

    Raises:
        ValueError: `--out` is a file, but not a PNG.
    """
    prompts = [prompt for prompt in args.prompt for _ in range(args.batch)]
    first = secrets.randbelow(SEEDS) if args.seed is None else args.seed
    seeds = [(first + n) % SEEDS for n in range(len(prompts))]
    out, file = args.out, Path(args.out or ".")
    if not out or out.endswith(("/", os.sep)) or file.is_dir():
        paths = [
            file / f"{make_slug(prompt)}-{seed}.png"
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    elif file.suffix.lower() != ".png":
        raise ValueError(f"argument --out: {out!r} is neither a .png file nor a folder")
    elif len(seeds) == 1:
        paths = [file]
    else:
        paths = [file.with_stem(f"{file.stem}-{n + 1}") for n in range(len(seeds))]
    return [
        Job(prompt, args.negative, seed, path)
        for prompt, seed, path in zip(prompts, seeds, paths, strict=True)
    ]


def read_jobs(args):
    """Returns the `Job`s of the prompts in a file, see `EPILOG`.

    Raises:
        ValueError: a file that cannot be read; the message names the line.
    """
    file, folder = Path(args.prompts), Path(args.out or ".")
    if folder.suffix.lower() == ".png" or folder.is_file():
        raise ValueError(f"argument --out: with --prompts it is a folder, not {args.out!r}")
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not in UTF-8"
        raise ValueError(f"argument --prompts: {file}: {reason}") from error
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = read_object(line) if file.suffix == ".jsonl" else {"prompt": line.strip()}
        except (ValueError, RecursionError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"argument --prompts: {file}, line {number}: {error}") from error
        seed = data.get("seed", ((args.seed or 0) + len(jobs)) % SEEDS)
        path = folder / f"{number:05}-{make_slug(data['prompt'])}-{seed}.png"
        jobs.append(Job(data["prompt"], data.get("negative", args.negative), seed, path))
    if not jobs:
        raise ValueError(f"argument --prompts: {file} has no prompts")
    return jobs


def read_object(line):
    """Returns a line of JSON as a dict with some of `LINE_KEYS`, always with the prompt.

    Raises:
        ValueError, RecursionError, argparse.ArgumentTypeError: it is something else.
    """
    data = json.loads(line)
    if not isinstance(data, dict) or "prompt" not in data:
        raise ValueError('it must be an object with a "prompt"')
    for key, value in data.items():
        if type(value) is not LINE_KEYS.get(key):
            raise ValueError(f"it can't have {key!a}: {value!a}")
        if isinstance(value, str):
            parse_text(value)
    if not 0 <= data.get("seed", 0) < SEEDS:
        raise ValueError(f"the seed must be from 0 to {SEEDS - 1}, not {data['seed']}")
    return data


def split_words(text):
    """Splits a text into its words, in lower case: "T-Rex, woman's hat" has four.

    An emoji is a word too; punctuation is not.
    """
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    runs = re.findall(r"[^\W_]+(?:'[^\W_]+)*|.", text)
    return [run for run in runs if run[0].isalnum() or unicodedata.category(run[0]) == "So"]


def find_unseen_words(checkpoint, texts):
    """Returns the words of texts that a checkpoint was not trained on, each once, in their order.

    A checkpoint lists the words that it was trained on in a file words.txt beside its
    model_index.json, one word a line. Without this file no word counts as unseen.
    """
    try:
        seen = (checkpoint.folder / "words.txt").read_text("utf-8").split()
    except (AttributeError, OSError):  # it is not a folder, or there is no such file
        return []
    words = dict.fromkeys(word for text in texts for word in split_words(text))
    return [word for word in words if word not in seen]


def describe_job(args, job, model):
    """Returns the text for an image's PNG: dict of str to str."""
    import keras

    guidance = model.config.guidance_scale if args.guidance is None else args.guidance
    text = {
        "prompt": job.prompt,
        "negative": job.negative,
        "seed": job.seed,
        "steps": args.steps,
        "guidance": float(guidance),
        "sampler": args.sampler,
        "spacing": args.spacing,
        "dtype": keras.config.dtype_policy().name,
        "size": f"{model.img_width}x{model.img_height}",
        "weights": args.weights,
        "version": __version__,
    }
    return {key: str(value) for key, value in text.items() if value is not None}


def generate_images(args):
    """Generates the images that the arguments ask for, and writes them."""
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("it needs either a PROMPT or --prompts FILE (see --help)")
    jobs = read_jobs(args) if args.prompts else list_jobs(args)
    folder = jobs[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"argument --out: no folder {folder}: {error.strerror}") from error

    show_progress(f"loading {args.weights} ...")
    with silence_tensorflow():
        import keras

        from stable_diffusion.stable_diffusion import StableDiffusion
    if args.dtype:
        keras.config.set_dtype_policy(args.dtype)
    model = StableDiffusion(args.height, args.width, args.jit, weights=args.weights)
    texts = {job.path: describe_job(args, job, model) for job in jobs}
    if args.prompts:
        missing = [job for job in jobs if not is_generated(job.path, texts[job.path])]
        if len(missing) < len(jobs):
            there = f"{len(jobs) - len(missing)} of {len(jobs)} images"
            print_message(NAME, f"{there} are there already, generated with these options")
        jobs = missing
    encode = make_encode(model, jobs, at_once=not args.prompts)

    for start in range(0, len(jobs), args.batch):
        batch = jobs[start : start + args.batch]

        def show_step(step, timestep, latent, x0, done=start):
            images = f"{done} of {len(jobs)} images generated"
            show_progress(f"{images}, step {step + 1} of {args.steps} ")

        images = model.generate_image(
            encode([job.prompt for job in batch]),
            encode([job.negative for job in batch]),
            len(batch),
            args.steps,
            args.guidance,
            seed=[job.seed for job in batch],
            verbose=0,
            callback=show_step,
            sampler=args.sampler,
            spacing=args.spacing,
        )
        show_progress("")
        for job, image in zip(batch, images, strict=True):
            write_png(job.path, image, texts[job.path])
            print(job.path, flush=True)


def make_encode(model, jobs, at_once):
    """Returns a function that encodes a list of texts of `jobs`, `(texts, 77, D)`.

    Tells the user which words the model has never seen.

    Args:
        model: the `StableDiffusion`.
        jobs: list of `Job`.
        at_once: whether to encode all texts now, and then to free the text encoder's memory. This
            is for few texts: their contexts stay in memory.

    Raises:
        ValueError: a text that is too long.
    """
    import numpy as np

    from stable_diffusion.checkpoints import release

    texts = list(dict.fromkeys(text for job in jobs for text in (job.prompt, job.negative)))
    for text in texts:
        model.tokenize(text)  # raises the error before the first image is generated
    if unseen := find_unseen_words(model.checkpoint, texts):
        print_message(NAME, f"the weights never saw these words: {', '.join(unseen)}")
    if not at_once:
        return model.encode_text
    encoded = {text: model.encode_text(text) for text in texts}
    if model.checkpoint.loads:
        release(model, "text_encoder")
    return lambda texts: np.concatenate([encoded[text] for text in texts])


def main(argv: list[str] | None = None) -> int:
    """Runs the command with `argv`, or this process's arguments; returns its exit status."""

    def work(argv):
        generate_images(get_parser().parse_intermixed_args(argv))

    return run_command(NAME, work, argv)


if __name__ == "__main__":
    sys.exit(main())
