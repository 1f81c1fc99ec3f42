"""The command `stable-diffusion`: draws pictures of prompts and writes them as PNG files."""

import argparse
import gc
import json
import math
import os
import re
import secrets
import sys
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stable_diffusion import __version__

NAME = "stable-diffusion"
DESCRIPTION = """\
Draws pictures of prompts with Stable Diffusion and writes them as PNG files. The paths of the
pictures go to standard output, one a line; everything else goes to standard error.
"""
EPILOG = """\
Without --out a picture is named after its prompt and seed, as in
a-red-apple-on-a-blue-background-0.png, and put into the current folder. With --out FILE.png it
gets this name; of several, FILE-1.png, FILE-2.png and so on. With --out FOLDER/ the names are as
without, but in that folder. Folders are made where they are missing. A file of the same name is
overwritten: the same command with the same --seed writes the same files again.

Each picture has a seed of its own: the first --seed, each next one 1 more. Its PNG has all that it
takes to draw it again as text: prompt, negative, seed, steps, guidance, sampler, dtype, size (width
x height), weights and version.

A file of --prompts has one prompt a line. If its name ends in .jsonl, each line is a JSON object,
as {"prompt": "a cat", "negative": "blurry", "seed": 3}, of which only the prompt is needed. Each
picture goes to --out FOLDER under the number of its line and its name, as 00001-a-cat-3.png. Seeds
start from 0 unless --seed is given. What the folder has already, drawn with the same options, isn't
drawn again: a command that was interrupted goes on where it stopped.

Weights: "emoji" is part of the package, a small model that draws 520 kinds of emoji on coloured
backgrounds. "sd1.4" and "sd2.1-base" are downloaded on first use, some gigabytes; their
licence is CreativeML Open RAIL-M. Anything else is a path: of a folder in diffusers' layout, of
KerasCV's .h5 files or of models for OpenVINO, or of a .safetensors or .ckpt file in the original
layout; or hf://owner/name, on the Hugging Face Hub.

examples:
  stable-diffusion "a red apple on a blue background"
  stable-diffusion "a red apple on a blue background" --seed 3 --batch 4
  stable-diffusion "a cat face on green" "a dog face on green" --out pets.png
  stable-diffusion "an astronaut riding a horse" --weights sd1.4 --negative blurry --jit
  stable-diffusion "an astronaut" --weights model.safetensors --sampler dpmpp-2m --steps 20
  stable-diffusion --prompts prompts.txt --batch 8 --out pictures/

exit status: 0 done, 1 failed, 2 arguments that can't be used, 130 interrupted
"""
# Those of `samplers.SAMPLERS`, whose import takes Keras.
SAMPLERS = ("ddim", "dpmpp-2m", "dpmpp-2m-quadratic", "unipc")
DTYPES = ("float32", "bfloat16", "float16")
KEYS = {"prompt": str, "negative": str, "seed": int}  # of a line in JSON
SEEDS = 2**32  # Keras takes a seed as an unsigned 32-bit integer
SLUG_LENGTH = 80  # characters of a prompt in a file's name


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        """Exits with status 2."""
        sys.exit(complain(f"{message} (see {self.prog} --help)", 2, self.prog))


def complain(message, status, name=NAME):
    """Prints `message` as one line to standard error, and returns `status`."""
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


def number(kind, low, high=math.inf):
    """Returns a type of arguments: an int or a float from `low` to `high`."""

    def convert(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        noun = "an integer" if kind is int else "a number"
        limit = f"from {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {limit}")

    return convert


def text(argument):
    """The type of prompts: any text, which bytes in another encoding are not."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{argument!a} is not in UTF-8") from error
    return argument


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser(
        prog=NAME,
        usage=f'{NAME} "PROMPT" ["PROMPT" ...] [options]\n       {NAME} --prompts FILE [options]',
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="*", type=text, help="what to draw, in quotes")
    add("--prompts", metavar="FILE", type=text, help="draw what a file lists; see below")
    add("--negative", metavar="TEXT", default="", type=text, help="what to steer away from")
    add("--weights", metavar="W", default="emoji", type=text, help="default: emoji; see below")
    add("--out", metavar="FILE", type=text, help="a .png file, or a folder; see below")
    add("--seed", metavar="S", type=number(int, 0, SEEDS - 1), help="default: a random one")
    add(
        "--batch",
        metavar="N",
        default=1,
        type=number(int, 1, 1024),
        help="pictures of each prompt, drawn at once; of a file, how many at once (default: 1)",
    )
    add(
        "--steps",
        metavar="N",
        default=50,
        type=number(int, 1, 1000),
        help="fewer are faster, more are finer (default: 50)",
    )
    add(
        "--guidance",
        metavar="G",
        default=7.5,
        type=number(float, 0, 1000),
        help="how far to follow the prompt; up to 1 not at all, in half the time (default: 7.5)",
    )
    size = number(int, 1, 65536)
    add("--height", metavar="H", type=size, help="in pixels (default: the weights' native size)")
    add("--width", metavar="W", type=size, help="in pixels (default: the weights' native size)")
    add("--sampler", default="ddim", choices=SAMPLERS, help="default: ddim")
    add("--dtype", choices=DTYPES, help="of parameters and computation (default: float32)")
    add("--jit", action="store_true", help="compile first: worth it for many or large pictures")
    add("--version", action="version", version=f"{NAME} {__version__}")
    return parser


def slug(prompt):
    """Returns a prompt's letters and digits, in lower case and joined by hyphens."""
    letters = unicodedata.normalize("NFKC", prompt).lower()
    return re.sub(r"[\W_]+", "-", letters)[:SLUG_LENGTH].strip("-") or "picture"


@dataclass
class Picture:
    """What is to be drawn, and where it goes."""

    prompt: str
    negative: str
    seed: int
    path: Path


def get_pictures(args):
    """Returns the pictures that are asked for in the command line.

    Raises:
        ValueError: `--out` is no file that can be a PNG.
    """
    prompts = [prompt for prompt in args.prompt for _ in range(args.batch)]
    first = secrets.randbelow(SEEDS) if args.seed is None else args.seed
    seeds = [(first + n) % SEEDS for n in range(len(prompts))]
    out, file = args.out, Path(args.out or ".")
    if not out or out.endswith(("/", os.sep)) or file.is_dir():
        paths = [
            file / f"{slug(prompt)}-{seed}.png" for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    elif file.suffix.lower() != ".png":
        raise ValueError(f"argument --out: {out!r} is neither a .png file nor a folder")
    elif len(seeds) == 1:
        paths = [file]
    else:
        paths = [file.with_stem(f"{file.stem}-{n + 1}") for n in range(len(seeds))]
    return [
        Picture(prompt, args.negative, seed, path)
        for prompt, seed, path in zip(prompts, seeds, paths, strict=True)
    ]


def read_pictures(args):
    """Returns the pictures that are asked for in a file, see `EPILOG`.

    Raises:
        ValueError: a file that can't be read; the message names the line.
    """
    file, folder = Path(args.prompts), Path(args.out or ".")
    if folder.suffix.lower() == ".png" or folder.is_file():
        raise ValueError(f"argument --out: with --prompts it is a folder, not {args.out!r}")
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not in UTF-8"
        raise ValueError(f"argument --prompts: {file}: {reason}") from error
    pictures = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = read_object(line) if file.suffix == ".jsonl" else {"prompt": line.strip()}
        except (ValueError, RecursionError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"argument --prompts: {file}, line {number}: {error}") from error
        seed = data.get("seed", ((args.seed or 0) + len(pictures)) % SEEDS)
        path = folder / f"{number:05}-{slug(data['prompt'])}-{seed}.png"
        negative = data.get("negative", args.negative)
        pictures.append(Picture(data["prompt"], negative, seed, path))
    if not pictures:
        raise ValueError(f"argument --prompts: {file} has no prompts")
    return pictures


def read_object(line):
    """Returns a line of JSON as a dict with some of `KEYS`, the prompt always.

    Raises:
        ValueError, RecursionError, argparse.ArgumentTypeError: it is something else.
    """
    data = json.loads(line)
    if not isinstance(data, dict) or "prompt" not in data:
        raise ValueError('it takes an object with a "prompt"')
    for key, value in data.items():
        if type(value) is not KEYS.get(key):
            raise ValueError(f"it can't have {key!a}: {value!a}")
        if isinstance(value, str):
            text(value)
    if not 0 <= data.get("seed", 0) < SEEDS:
        raise ValueError(f"the seed must be from 0 to {SEEDS - 1}, not {data['seed']}")
    return data


def write(path, image, chunks):
    """Writes a picture as a PNG with text chunks: the whole file, or none.

    Args:
        path: where to.
        image: uint8 array `(H, W, 3)`.
        chunks: dict of what is written as text.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items():
        info.add_text(key, str(value))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, "png", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def split_words(text):
    """Returns the words of a text, in lower case; of "T-Rex, woman's hat" four.

    An emoji is a word too, punctuation is none.
    """
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    runs = re.findall(r"[^\W_]+(?:'[^\W_]+)*|.", text)
    return [run for run in runs if run[0].isalnum() or unicodedata.category(run[0]) == "So"]


def get_unseen(checkpoint, texts):
    """Returns the words that a checkpoint wasn't trained on, each once, in their order.

    A checkpoint says what it was trained on in a file words.txt beside its model_index.json, one
    word a line. Of one that doesn't say, none.
    """
    try:
        seen = (checkpoint.folder / "words.txt").read_text("utf-8").split()
    except (AttributeError, OSError):  # it isn't a folder, or there is no such file
        return []
    words = dict.fromkeys(word for text in texts for word in split_words(text))
    return [word for word in words if word not in seen]


def show(message):
    """Shows `message` in place of the last one, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


@contextmanager
def quiet():
    """Drops what TensorFlow's C++ code prints when it is imported, unless its setting is set.

    The setting alone silences what comes later, but no longer the first lines.
    """
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def get_chunks(args, picture, height, width):
    """Returns what is written into a picture's PNG as text: dict of str to str."""
    import keras

    chunks = {
        "prompt": picture.prompt,
        "negative": picture.negative,
        "seed": picture.seed,
        "steps": args.steps,
        "guidance": args.guidance,
        "sampler": args.sampler,
        "dtype": keras.config.dtype_policy().name,
        "size": f"{width}x{height}",
        "weights": args.weights,
        "version": __version__,
    }
    return {key: str(value) for key, value in chunks.items()}


def is_drawn(path, chunks):
    """Tells whether a file is a whole PNG with just these text chunks."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.text == chunks
    except (OSError, SyntaxError, ValueError, AttributeError):  # none, or not one of ours
        return False


def draw(args):
    """Draws and writes the pictures that the arguments ask for."""
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("it takes either a PROMPT or --prompts FILE (see --help)")
    pictures = read_pictures(args) if args.prompts else get_pictures(args)
    folder = pictures[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"argument --out: no folder {folder}: {error.strerror}") from error

    show(f"loading {args.weights} ...")
    with quiet():
        import keras
        import numpy as np

        from stable_diffusion import StableDiffusion, checkpoints
    if args.dtype:
        keras.config.set_dtype_policy(args.dtype)
    model = StableDiffusion(args.height, args.width, args.jit, weights=args.weights)
    chunks = {p.path: get_chunks(args, p, model.img_height, model.img_width) for p in pictures}
    if args.prompts:
        left = [p for p in pictures if not is_drawn(p.path, chunks[p.path])]
        if len(left) < len(pictures):
            show("")
            complain(f"{len(pictures) - len(left)} of {len(pictures)} are drawn already", 0)
        pictures = left
    texts = list(dict.fromkeys(text for p in pictures for text in (p.prompt, p.negative)))
    for text in texts:
        model.tokenize(text)  # which says so if it is too long
    if unseen := get_unseen(model.checkpoint, texts):
        show("")
        complain(f"the weights never saw these words: {', '.join(unseen)}", 0)
    encoded = {}
    if not args.prompts:  # they are few; with all encoded, the encoder's memory can be freed
        encoded = {text: model.encode_text(text) for text in texts}
        if model.checkpoint.loads:
            checkpoints.release(model, "text_encoder")

    def encode(texts):
        texts = list(texts)
        return np.concatenate([encoded[t] for t in texts]) if encoded else model.encode_text(texts)

    for start in range(0, len(pictures), args.batch):
        batch = pictures[start : start + args.batch]

        def progress(step, timestep, latent, done=start):
            show(f"{done} of {len(pictures)} pictures drawn, step {step + 1} of {args.steps} ")

        images = model.generate_image(
            encode(picture.prompt for picture in batch),
            encode(picture.negative for picture in batch),
            len(batch),
            args.steps,
            args.guidance,
            seed=[picture.seed for picture in batch],
            verbose=0,
            callback=progress,
            sampler=args.sampler,
        )
        show("")
        for picture, image in zip(batch, images, strict=True):
            write(picture.path, image, chunks[picture.path])
            print(picture.path, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with `argv`, or the command line's, and returns its exit status."""
    try:
        draw(get_parser().parse_intermixed_args(argv))
    except KeyboardInterrupt:
        show("")
        return complain("interrupted", 130)
    except ValueError as error:
        show("")
        return complain(error, 2)
    except (OSError, ImportError, MemoryError) as error:
        show("")
        return complain(f"{type(error).__name__}: {error}", 1)
    if argv is None:
        gc.freeze()  # else Python takes seconds, before it ends, to look for garbage
    return 0


if __name__ == "__main__":
    sys.exit(main())
