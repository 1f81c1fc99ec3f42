"""The command `stable-diffusion`: draws pictures of prompts and writes them as PNG files."""

import argparse
import gc
import os
import re
import secrets
import sys
import unicodedata
from contextlib import contextmanager, suppress
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
takes to draw it again as text: prompt, negative, seed, steps, guidance, sampler, size (width x
height), weights and version.

Weights: "emoji" is part of the package, a small model that draws fruits and faces of animals on
coloured backgrounds. "sd1.4" and "sd2.1-base" are downloaded on first use, some gigabytes; their
licence is CreativeML Open RAIL-M. Anything else is a path: of a folder in diffusers' layout or of
KerasCV's .h5 files, or of a .safetensors or .ckpt file in the original layout; or hf://owner/name,
on the Hugging Face Hub.

examples:
  stable-diffusion "a red apple on a blue background"
  stable-diffusion "a red apple on a blue background" --seed 3 --batch 4
  stable-diffusion "a cat face on green" "a dog face on green" --out pets.png
  stable-diffusion "an astronaut riding a horse" --weights sd1.4 --negative blurry --jit
  stable-diffusion "an astronaut riding a horse" --weights model.safetensors

exit status: 0 done, 1 failed, 2 arguments that can't be used, 130 interrupted
"""
SEEDS = 2**32  # Keras takes a seed as an unsigned 32-bit integer
SLUG_LENGTH = 80  # characters of a prompt in a file's name


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        """Exits with status 2."""
        sys.exit(complain(f"{message} (see {NAME} --help)", 2))


def complain(message, status):
    """Prints `message` as one line to standard error, and returns `status`."""
    print(f"{NAME}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


def number(kind, low, high):
    """Returns a type of arguments: an int or a float from `low` to `high`."""

    def convert(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        noun = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun} from {low} to {high}")

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
        usage=f'{NAME} "PROMPT" ["PROMPT" ...] [options]',
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", metavar="PROMPT", nargs="+", type=text, help="what to draw, in quotes")
    add("--negative", metavar="TEXT", default="", type=text, help="what to steer away from")
    add("--weights", metavar="W", default="emoji", type=text, help="default: emoji; see below")
    add("--out", metavar="FILE", type=text, help="a .png file, or a folder; see below")
    add("--seed", metavar="S", type=number(int, 0, SEEDS - 1), help="default: a random one")
    add(
        "--batch",
        metavar="N",
        default=1,
        type=number(int, 1, 1024),
        help="pictures of each prompt, drawn at once (default: 1)",
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
    add("--sampler", default="ddim", choices=["ddim"], help="default: ddim")
    add("--jit", action="store_true", help="compile first: worth it for many or large pictures")
    add("--version", action="version", version=f"{NAME} {__version__}")
    return parser


def slug(prompt):
    """Returns a prompt's letters and digits, in lower case and joined by hyphens."""
    letters = unicodedata.normalize("NFKC", prompt).lower()
    return re.sub(r"[\W_]+", "-", letters)[:SLUG_LENGTH].strip("-") or "picture"


def get_paths(out, prompts, seeds):
    """Returns each picture's path, and makes the folders.

    Args:
        out: the argument `--out`, or None.
        prompts, seeds: each picture's.

    Raises:
        ValueError: `out` is no file that can be a PNG.
    """
    file = Path(out or ".")
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
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"argument --out: no folder {paths[0].parent}: {error.strerror}"
        ) from error
    return paths


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


def draw(args):
    """Draws and writes the pictures that the arguments ask for."""
    prompts = [prompt for prompt in args.prompts for _ in range(args.batch)]
    first = secrets.randbelow(SEEDS) if args.seed is None else args.seed
    seeds = [(first + n) % SEEDS for n in range(len(prompts))]
    paths = get_paths(args.out, prompts, seeds)

    show(f"loading {args.weights} ...")
    with quiet():
        from stable_diffusion import StableDiffusion
    model = StableDiffusion(args.height, args.width, args.jit, weights=args.weights)
    contexts = [model.encode_text(prompt) for prompt in args.prompts]
    model.encode_text(args.negative)  # fails at once if it is too long
    if unseen := get_unseen(model.checkpoint, [*args.prompts, args.negative]):
        show("")
        complain(f"the weights never saw these words: {', '.join(unseen)}", 0)
    for start in range(0, len(prompts), args.batch):
        batch = slice(start, start + args.batch)

        def progress(step, timestep, latent, done=start):
            show(f"{done} of {len(prompts)} pictures drawn, step {step + 1} of {args.steps} ")

        images = model.generate_image(
            contexts[start // args.batch],
            args.negative,
            args.batch,
            args.steps,
            args.guidance,
            seed=seeds[batch],
            verbose=0,
            callback=progress,
        )
        show("")
        for path, seed, image in zip(paths[batch], seeds[batch], images, strict=True):
            chunks = {
                "prompt": prompts[start],
                "negative": args.negative,
                "seed": seed,
                "steps": args.steps,
                "guidance": args.guidance,
                "sampler": args.sampler,
                "size": f"{image.shape[1]}x{image.shape[0]}",
                "weights": args.weights,
                "version": __version__,
            }
            write(path, image, chunks)
            print(path, flush=True)


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
