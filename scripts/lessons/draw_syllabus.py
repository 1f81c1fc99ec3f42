"""Makes the pictures of the syllabus: one that each lesson saved, small.

for lesson in scripts/lessons/[01]*.py; do python $lesson; done
python scripts/lessons/draw_syllabus.py lesson_pictures weights/pictures/lessons
"""

import argparse
from pathlib import Path

from PIL import Image

PICTURES = {  # lesson: the name of its picture
    "01": "01_tokens",
    "02": "02_looks",
    "03": "03_noise",
    "04": "04_levels",
    "05": "05_steps",
    "06": "06_scales",
    "07": "07_channels",
    "08": "08_words",
    "09": "09_samplers",
    "10": "10_spiral",
    "11": "11_lora",
}
WIDTH = 560  # pixels at most


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", type=Path, help="folder that the lessons wrote")
    parser.add_argument("out", type=Path, help="folder for the small ones")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number, name in PICTURES.items():
        with Image.open(args.pictures / f"{name}.png") as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        picture.save(args.out / f"{number}.jpg", quality=75, optimize=True)


if __name__ == "__main__":
    main()
