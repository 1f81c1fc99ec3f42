"""The parser of all commands, types of arguments, and the names that arguments may have.

The names are those of tables elsewhere in the package. They stand here again because the tables
need Keras, whose import takes seconds, and `--help` should not. A test compares them.
"""

import argparse
import math
import sys
from contextlib import suppress

from stable_diffusion.command.terminal import print_message
from stable_diffusion.version import __version__

SAMPLERS = ("ddim", "dpmpp-2m", "unipc")
SPACINGS = ("linspace", "leading", "trailing", "quadratic")
DTYPES = ("float32", "float16", "bfloat16")
PREDICTION_TYPES = ("epsilon", "v_prediction")
FORMATS = {
    "diffusers": "a folder in diffusers' layout",
    "original": "one .safetensors file in the original layout",
    "openvino": "a folder of models that OpenVINO runs, only for generating images",
    "keras": "a folder of Keras 3's .weights.h5",
    "kerascv": "a folder of .h5 files that KerasCV loads",
}
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
        raise argparse.ArgumentTypeError(f"{argument!a} is not in UTF-8") from error
    return argument


def parse_colour(argument):
    """Parses a colour, a name or #rrggbb as Pillow knows them: returns three ints of 0 to 255."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(argument)[:3]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a colour") from error
