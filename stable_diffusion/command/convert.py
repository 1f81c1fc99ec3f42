"""The command `stable-diffusion-convert`: converts a checkpoint from any format to any other."""

import sys
from pathlib import Path

from stable_diffusion.command import arguments
from stable_diffusion.command.arguments import (
    DTYPES,
    FILE_SUFFIXES,
    Parser,
    add_checkpoint_options,
    open_with_options,
    parse_text,
)
from stable_diffusion.command.terminal import run_command, silence_tensorflow

NAME = "stable-diffusion-convert"
USAGE = f"{NAME} IN OUT [options]"
DESCRIPTION = """\
Converts a checkpoint from any format that is read to any format that is written, and prints the
path of the result. OUT appears whole or not at all. In a folder that is a checkpoint of the same
format, only the files of the format are replaced.
"""
FORMAT_LINES = "\n".join(f"  {name:10} {what}" for name, what in arguments.FORMATS.items())
EPILOG = f"""\
IN is what `StableDiffusion(weights=IN)` accepts: "emoji", which is part of the package; "sd1.4" or
"sd2.1-base", which are downloaded; a folder in diffusers' layout or of .h5 files; a .safetensors or
.ckpt file; or hf://owner/name on the Hugging Face Hub.

formats:
{FORMAT_LINES}

examples:
  {NAME} model.safetensors folder/
  {NAME} folder/ model.safetensors --dtype float16
  {NAME} sd1.4 kerascv/ --format kerascv
  {NAME} hf://owner/name folder/ --lora style.safetensors:0.8
  KERAS_BACKEND=openvino {NAME} emoji folder/ --format openvino

exit status: 0 done, 1 failed, 2 arguments or files that cannot be used,
130 interrupted, 143 ended by SIGTERM
"""


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser(NAME, usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("source", metavar="IN", type=parse_text, help="the checkpoint to read; see below")
    add("target", metavar="OUT", type=Path, help="a new folder, or a .safetensors file")
    add(
        "--format",
        choices=arguments.FORMATS,
        help="default: original for a .safetensors file, diffusers for a folder",
    )
    add("--dtype", choices=DTYPES, help="of the parameters; default: as they are loaded, float32")
    add_checkpoint_options(parser)
    add(
        "--ema",
        action="store_true",
        help="read the moving average of the parameters, which a file in the original layout may "
        "have",
    )
    add(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        default=[],
        help="merge a LoRA into the parameters; may be given several times",
    )
    return parser


def parse_lora(argument):
    """Splits FILE[:SCALE] into a path and a float, which is 1.0 if it is missing."""
    path, colon, scale = argument.rpartition(":")
    try:
        return (path, float(scale)) if colon else (argument, 1.0)
    except ValueError:
        return argument, 1.0  # the colon belongs to the path


def choose_format(target):
    """Returns the format that the name of the target means.

    Raises:
        ValueError: the name is that of a file of another format.
    """
    suffix = target.suffix.lower()
    if suffix == ".safetensors":
        return "original"
    if suffix in FILE_SUFFIXES and not target.is_dir():
        raise ValueError(f"OUT must be a folder or a .safetensors file, not {str(target)!r}")
    return "diffusers"


def convert_checkpoint(args):
    """Reads the checkpoint and writes it in the other format."""
    format = args.format or choose_format(args.target)
    with silence_tensorflow():
        import keras

        from stable_diffusion.checkpoints import FORMATS, check_target
        from stable_diffusion.stable_diffusion import StableDiffusion
    policy = keras.config.dtype_policy()
    if args.dtype and format in ("keras", "kerascv"):
        keras.config.set_dtype_policy(args.dtype)  # these formats store what the models hold
    try:
        checkpoint = open_with_options(args, args.source, ema=args.ema)
        check_target(args.target, format, checkpoint.config)
        for component in FORMATS[format].components:
            checkpoint.check(component)
        model = StableDiffusion(jit_compile=False, weights=checkpoint)
        for path, scale in map(parse_lora, args.lora):
            model.load_lora(path, scale)
        model.save(args.target, format, args.dtype)
    finally:
        keras.config.set_dtype_policy(policy)
    print(args.target)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with `argv`, or this process's arguments; returns its exit status."""

    def work(argv):
        convert_checkpoint(get_parser().parse_args(argv))

    return run_command(NAME, work, argv)


if __name__ == "__main__":
    sys.exit(main())
