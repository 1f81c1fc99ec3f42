"""Draws images of a character that no checkpoint knows, with captions: a set to fine-tune on.

    python scripts/character/draw_character.py images

Blip is a teal teardrop with one eye, two orange antennae and a yellow belly. Each image shows it in
another place, size and tilt, looking another way, on another plain background. metadata.jsonl says
what each image shows. This script draws everything from circles and polygons, so the images are
under the licence of the project's code.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from stable_diffusion.files import find_file
from stable_diffusion.replacing import FolderKind, replace_folder

SIZE, FINE = 128, 4  # pixels; and how many times finer it is drawn before it is shrunk
COUNT = 20
BODY, BELLY, ANTENNA = (20, 160, 150), (250, 215, 80), (245, 130, 30)
BACKGROUNDS = {
    "red": (225, 45, 50),
    "green": (60, 170, 75),
    "blue": (50, 100, 220),
    "yellow": (250, 220, 70),
    "orange": (245, 145, 50),
    "purple": (135, 70, 180),
    "pink": (245, 150, 190),
    "white": (255, 255, 255),
    "black": (15, 15, 15),
    "gray": (150, 150, 150),
}


def draw_image(rng, background):
    """Draws one image.

    Args:
        rng: numpy Generator, for place, size, tilt and gaze.
        background: three values of 0 to 255.

    Returns:
        uint8 array `(128, 128, 3)`.
    """
    side = SIZE * FINE
    layer = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(layer)
    scale = side * rng.uniform(0.75, 0.95)

    def circle(x, y, radius, colour):  # from the character's centre; its height is 1
        x, y, radius = side / 2 + x * scale, side / 2 + y * scale, radius * scale
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    for way in (-1, 1):
        ends = [(way * 0.06, -0.2), (way * 0.2, -0.42)]
        line = [(side / 2 + x * scale, side / 2 + y * scale) for x, y in ends]
        pen.line(line, fill=ANTENNA, width=round(0.04 * scale))
        circle(way * 0.2, -0.42, 0.06, ANTENNA)
    circle(0, 0.12, 0.33, BODY)
    top = [(-0.27, -0.07), (0, -0.42), (0.27, -0.07)]
    pen.polygon([(side / 2 + x * scale, side / 2 + y * scale) for x, y in top], fill=BODY)
    circle(0, 0.27, 0.16, BELLY)
    circle(0, -0.05, 0.15, "white")
    gaze = rng.uniform(-0.05, 0.05, 2)
    circle(gaze[0], -0.05 + gaze[1], 0.07, "black")

    shift = tuple(int(x) for x in rng.uniform(-0.03, 0.03, 2) * side)
    tilt = float(rng.uniform(-12, 12))
    layer = layer.rotate(tilt, Image.Resampling.BICUBIC, translate=shift)
    image = Image.new("RGB", layer.size, background)
    image.paste(layer, mask=layer)
    return np.array(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def make_folder_kind(count):
    """Returns the `FolderKind` of a set of images, whose captions tell it from other folders."""
    return FolderKind(
        "set of images with captions",
        frozenset(["metadata.jsonl", *(f"{number:02}.png" for number in range(count))]),
        lambda folder: find_file(folder, "metadata.jsonl") is not None,
        rivals={"": r".*\.png"},
    )


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="a new folder for the images")
    add("--count", type=int, default=COUNT, help=f"number of images (default: {COUNT})")
    add("--name", default="blip", help="what captions call it (default: blip)")
    add("--seed", type=int, default=0, help="default: 0")
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.count < 1 or args.seed < 0:
        parser.error("--count must be at least 1, and --seed at least 0")
    rng, names = np.random.default_rng(args.seed), list(BACKGROUNDS)
    try:
        with replace_folder(args.folder, make_folder_kind(args.count)) as written:
            with open(written / "metadata.jsonl", "w", encoding="utf-8") as file:
                for number in range(args.count):
                    name = names[number % len(names)]
                    image = draw_image(rng, BACKGROUNDS[name])
                    Image.fromarray(image).save(written / f"{number:02}.png")
                    article = "an" if name[0] in "aeiou" else "a"
                    text = f"a {args.name} on {article} {name} background"
                    row = {"file_name": f"{number:02}.png", "text": text}
                    file.write(json.dumps(row) + "\n")
    except (OSError, ValueError) as error:
        print(f"draw_character: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {args.count} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
