"""Converts a checkpoint from any format that is read to any that is written.

    python scripts/convert_checkpoint.py model.safetensors folder/
    python scripts/convert_checkpoint.py folder/ model.safetensors --dtype float16
    python scripts/convert_checkpoint.py sd1.4 kerascv/ --format kerascv
    python scripts/convert_checkpoint.py hf://owner/name folder/ --lora style.safetensors:0.8
    KERAS_BACKEND=openvino python scripts/convert_checkpoint.py emoji folder/ --format openvino

IN is whatever `StableDiffusion(weights=IN)` takes: a preset, a folder in diffusers' layout or of
.h5 files, a .safetensors or .ckpt file, hf://owner/name. OUT appears whole or not at all.
"""

import argparse
import sys
from pathlib import Path

import keras

from stable_diffusion import StableDiffusion
from stable_diffusion.checkpoints import FORMATS, open_checkpoint
from stable_diffusion.checkpoints.tensors import DTYPES


def get_parser():
    """Returns the parser of the command line."""
    formats = "\n".join(f"  {name:10} {what}" for name, what in FORMATS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="IN", help="what weights= takes")
    add("target", metavar="OUT", type=Path, help="a new folder, or a .safetensors file")
    add(
        "--format",
        choices=FORMATS,
        help="default: original for a .safetensors file, diffusers for a folder",
    )
    add("--dtype", choices=DTYPES, help="of the parameters; default: as they come, float32")
    add(
        "--prediction-type",
        choices=["epsilon", "v_prediction"],
        help="what the model predicts, where IN doesn't say",
    )
    add("--ema", action="store_true", help="take the moving average of an original-layout file")
    add(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        default=[],
        help="merge a LoRA into the parameters; may be repeated",
    )
    return parser


def parse_lora(argument):
    """Splits FILE[:SCALE] into a path and a float, 1.0 where there is none."""
    path, colon, scale = argument.rpartition(":")
    try:
        return (path, float(scale)) if colon else (argument, 1.0)
    except ValueError:
        return argument, 1.0  # the colon belongs to the path


def convert(args):
    """Loads and writes."""
    format = args.format or ("original" if args.target.suffix == ".safetensors" else "diffusers")
    if args.dtype and format in ("keras", "kerascv"):
        keras.config.set_dtype_policy(args.dtype)  # they are written as the models hold them
    checkpoint = open_checkpoint(args.source, prediction_type=args.prediction_type, ema=args.ema)
    model = StableDiffusion(jit_compile=False, weights=checkpoint)
    for path, scale in map(parse_lora, args.lora):
        model.load_lora(path, scale)
    model.save(args.target, format, args.dtype)
    print(args.target)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    args = get_parser().parse_args(argv)
    policy = keras.config.dtype_policy()
    try:
        convert(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"convert_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        keras.config.set_dtype_policy(policy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
