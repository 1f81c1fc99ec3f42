"""The parser of all commands, types of arguments, and the names that arguments may have.

The names are those of tables elsewhere in the package. They stand here again because the tables
need Keras, whose import takes seconds, and `--help` should not. A test compares them.
"""

import argparse
import math
import sys
from contextlib import suppress
from difflib import get_close_matches

from stable_diffusion.command.terminal import print_message
from stable_diffusion.version import __version__

AUTO = "auto"  # the sampler that the checkpoint names
SAMPLERS = (
    "ddim",
    "ddpm",
    "pndm",
    "euler",
    "euler-a",
    "heun",
    "dpmpp-2m",
    "dpmpp-2m-sde",
    "unipc",
    "lcm",
)
NOISE_SOURCES = ("keras", "torch", "philox")
PROMPT_SYNTAXES = ("webui",)
SPACINGS = ("linspace", "leading", "trailing", "quadratic", "karras")
DTYPES = ("float32", "float16", "bfloat16")
PREDICTION_TYPES = ("epsilon", "v_prediction")
FORMATS = {
    "diffusers": "a folder in diffusers' layout",
    "original": "one .safetensors file in the original layout",
    "openvino": "a folder of models that OpenVINO runs, only for generating images",
    "keras": "a folder of Keras 3's .weights.h5",
    "kerascv": "a folder of .h5 files that KerasCV loads",
}
# A dot in a folder's name, as in my-model-v1.5, is no suffix. These are suffixes of files only.
FILE_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".h5", ".keras", ".zip")
TRAINED_PARAMETERS = ("all", "cross-attention")
LORA_TARGETS = ("cross-attention", "attention", "transformers", "all")
LORA_KEYS = ("kohya", "diffusers")
RATE_SCHEDULES = ("constant", "cosine")
DISTRIBUTIONS = ("data", "model")
SEEDS = 2**32  # Keras takes a seed as an unsigned 32-bit integer


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and knows `--version`.

    Args:
        prog: name of the command.
        **options: of `argparse.ArgumentParser`.
    """

    def __init__(self, prog, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, formatter_class=formatter, allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")

    def error(self, message):
        """Exits with status 2."""
        print_message(self.prog, f"{message} (see {self.prog} --help)")
        sys.exit(2)


def add_checkpoint_options(parser):
    """Adds the options of all commands that say how a checkpoint is read."""
    parser.add_argument(
        "--variant",
        metavar="V",
        type=parse_text,
        help="which files of a folder in diffusers' layout to read, such as fp16, ema or non_ema "
        "(default: the plain ones)",
    )
    parser.add_argument(
        "--vae",
        metavar="FILE",
        type=parse_text,
        help="another VAE, also a tiny one (TAESD): a file, a folder in diffusers' layout, or "
        "hf://owner/name",
    )
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the model predicts, if the checkpoint does not say it",
    )


def add_clip_skip(add):
    """Adds the option --clip-skip to a parser or a group of options, by its method `add`."""
    add(
        "--clip-skip",
        metavar="N",
        default=0,
        type=make_number_type(int, 0, 99),
        help="how many of the text encoder's last layers to leave out: the web interfaces' number "
        "minus 1 (default: 0)",
    )


def add_sampling_options(add):
    """Adds what says how images are sampled to a parser, by its method `add`."""
    add(
        "--steps",
        metavar="N",
        type=make_number_type(int, 1, 1000),
        help="fewer are faster, more give finer images (default: 50; 4 if the weights say that "
        "they are for few)",
    )
    add(
        "--guidance",
        metavar="G",
        type=make_number_type(float, 0, 1000),
        help="how closely to follow the prompt; at 1 or less the model runs without guidance, in "
        "half the time (default: the one that the weights come with; 7.5 if they have none)",
    )
    add(
        "--guidance-rescale",
        metavar="R",
        type=make_number_type(float, 0, 1),
        help="how much of guidance's overexposure to take back, 0 to 1 (default: 0)",
    )
    size = make_number_type(int, 1, 65536)
    add("--height", metavar="H", type=size, help="in pixels (default: the weights' own size)")
    add("--width", metavar="W", type=size, help="in pixels (default: the weights' own size)")
    add(
        "--sampler",
        default=AUTO,
        choices=(AUTO, *SAMPLERS),
        type=parse_sampler,
        help="default: auto, the one that the weights name; ddim if they name none, lcm if they "
        "are for few steps",
    )
    add("--spacing", choices=SPACINGS, help="of the timesteps (default: the weights' own)")
    add(
        "--syntax",
        choices=PROMPT_SYNTAXES,
        help="of prompts; webui as web interfaces read them (default: all is text)",
    )
    add_clip_skip(add)
    add(
        "--noise-source",
        default="keras",
        choices=NOISE_SOURCES,
        help="what makes noise of the seed: torch as diffusers, philox as web interfaces on a GPU "
        "(default: keras, which differs between backends)",
    )
    add("--dtype", choices=DTYPES, help="of parameters and computation (default: float32)")


def open_with_options(args, weights, **options):
    """Opens a checkpoint with the options of `add_checkpoint_options`."""
    from stable_diffusion.checkpoints import open_checkpoint

    known = {"variant": args.variant, "vae": args.vae, "prediction_type": args.prediction_type}
    return open_checkpoint(weights, **known, **options)


def make_number_type(kind, low, high=math.inf):
    """Returns a type of arguments: an int or a float (`kind`) from `low` to `high`."""

    def parse_number(argument):
        with suppress(ValueError):
            if low <= kind(argument) <= high:
                return kind(argument)
        noun = "an integer" if kind is int else "a number"
        limit = f"from {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{argument!r} is not {noun} {limit}")

    return parse_number


def parse_text(argument):
    """Parses a prompt or a path: any text, but no bytes that are not UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{argument!a:.200} is not in UTF-8") from error
    return argument


def parse_sampler(argument):
    """Parses the name of a sampler; a misspelt one is told with the nearest."""
    known = (AUTO, *SAMPLERS)
    if argument not in known and (near := get_close_matches(argument, known, 1, 0.4)):
        message = f"there is no sampler {argument!r:.200}; did you mean {near[0]!r}?"
        raise argparse.ArgumentTypeError(message)
    return argument


def parse_colour(argument):
    """Parses a colour, a name or #rrggbb as Pillow knows them: returns three ints of 0 to 255."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(argument)[:3]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a colour") from error
