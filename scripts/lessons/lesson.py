"""What the lessons share: their pictures, and where things are written."""

import argparse
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stable_diffusion.command.terminal import silence_tensorflow

with silence_tensorflow():  # so lessons import this module before Keras: a lesson begins in silence
    import keras  # noqa: F401

    from stable_diffusion.explain.boxes import find_source

SMALLEST = 192  # pixels of the shorter side of an image in a picture; smaller ones are enlarged,
LONGEST = 640  # but not beyond so many pixels of the longer side
MARGIN, LABEL = 12, 26  # pixels around each image, and above it for its label
INK, PAPER = (32, 33, 36), (255, 255, 255)
COLOURS = [(31, 90, 180), (214, 80, 40), (40, 140, 80), (140, 80, 160), (120, 120, 120)]
PLOT = (640, 360)  # width and height of a plot's axes, in pixels
SMOOTH = 3  # a plot is drawn so many times larger, and scaled down


class Wrong(Exception):
    """An answer to an exercise that is wrong; the text says why."""


def begin(doc):
    """Prints a lesson's title, and returns the folder for its pictures.

    Args:
        doc: the lesson's docstring. Its first line is the title.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lesson_pictures"),
        help="folder for the pictures (default: lesson_pictures, here)",
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    # It would warn of tracing anew, because lessons run models on batches of many sizes.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    print(f"{doc.partition(chr(10))[0]}\n")
    return out


def where(thing):
    """Returns where a function, method or class is written: "stable_diffusion/decoder.py:14"."""
    return find_source(thing)


def save_picture(path, rows):
    """Saves labelled images as one picture.

    Args:
        path: of the PNG file.
        rows: list of rows, each a list of pairs of a label and an image: uint8 `(H, W, 3)` or
            `(H, W)`, or floats from 0 to 1, or an `Image`. Small ones are enlarged.
    """
    drawn = [[_add_label(*pair) for pair in row] for row in rows]
    width = max(sum(cell.width for cell in row) for row in drawn)
    height = sum(max(cell.height for cell in row) for row in drawn)
    picture, top = Image.new("RGB", (width + MARGIN, height + MARGIN), PAPER), 0
    for row in drawn:
        left = 0
        for cell in row:
            picture.paste(cell, (left, top))
            left += cell.width
        top += max(cell.height for cell in row)
    _save(picture, path)


def save_plot(path, curves, x_label, y_label, points=False):
    """Saves curves, or clouds of points, as a picture.

    Args:
        path: of the PNG file.
        curves: dict from a name to the pair of arrays x and y, `(n,)` each.
        x_label, y_label: what the axes show.
        points: whether points are drawn, not lines; both axes have the same scale then.
    """
    ends = [np.concatenate([np.ravel(curve[axis]) for curve in curves.values()]) for axis in (0, 1)]
    low, high = (np.array([function(some) for some in ends]) for function in (np.min, np.max))
    span = np.where(high > low, high - low, 1.0)
    low, high = low - 0.04 * span, high + 0.04 * span
    size = np.array([PLOT[1], PLOT[1]] if points else PLOT) * SMOOTH
    if points:
        middle, reach = (low + high) / 2, (high - low).max() / 2
        low, high = middle - reach, middle + reach
    left, top, gap = 64 * SMOOTH, (MARGIN if len(curves) == 1 else 28) * SMOOTH, 48 * SMOOTH
    whole = (left + size[0] + 24 * SMOOTH, 24 * SMOOTH + top + size[1] + gap)
    legend = left + size[0]
    picture = Image.new("RGB", tuple(map(int, whole)), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13 * SMOOTH)

    def place(x, y):
        share = (np.stack([x, y], -1) - low) / (high - low)
        return np.array([left, top]) + np.stack([share[..., 0], 1 - share[..., 1]], -1) * size

    for axis in (0, 1):
        for value in _list_ticks(low[axis], high[axis]):
            at = place(*(np.array([value, low[1]]) if axis == 0 else np.array([low[0], value])))
            text = f"{value:g}"
            if axis == 0:
                draw.line([at[0], top, at[0], top + size[1]], (232, 232, 232), SMOOTH)
                draw.text((at[0], at[1] + 4 * SMOOTH), text, INK, font, anchor="ma")
            else:
                draw.line([left, at[1], left + size[0], at[1]], (232, 232, 232), SMOOTH)
                draw.text((left - 6 * SMOOTH, at[1]), text, INK, font, anchor="rm")
    box = [left, top, left + size[0], top + size[1]]
    for n, (x, y) in enumerate(curves.values()):
        spots, colour = place(np.ravel(x), np.ravel(y)), COLOURS[n % len(COLOURS)]
        if points:
            for spot in spots:
                draw.ellipse([*(spot - 2 * SMOOTH), *(spot + 2 * SMOOTH)], colour)
        else:
            draw.line([tuple(spot) for spot in spots], colour, 2 * SMOOTH, joint="curve")
    for n, name in reversed([*enumerate(curves)] if len(curves) > 1 else []):
        draw.text((legend, top - 6 * SMOOTH), name, COLOURS[n % len(COLOURS)], font, anchor="rs")
        legend -= font.getlength(name) + 16 * SMOOTH
    draw.rectangle(box, outline=(150, 150, 150), width=SMOOTH)
    draw.text((left + size[0] / 2, whole[1] - 20 * SMOOTH), x_label, INK, font, anchor="mb")
    side = Image.new("L", (int(size[1]), 20 * SMOOTH))
    ImageDraw.Draw(side).text((size[1] / 2, 10 * SMOOTH), y_label, 255, font, anchor="mm")
    side = side.rotate(90, expand=True)
    picture.paste(INK, (0, top), side)
    _save(picture.resize([n // SMOOTH for n in picture.size], Image.Resampling.LANCZOS), path)


def _list_ticks(low, high):
    """Returns about five round numbers between two."""
    step = 10.0 ** np.floor(np.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 7)
    return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0  # -0 is 0


def _add_label(label, image):
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        image = (255 * image).round().astype("uint8") if image.dtype.kind == "f" else image
        image = Image.fromarray(image).convert("RGB")
    factor = max(1, min(round(SMALLEST / min(image.size)), LONGEST // max(image.size)))
    image = image.resize([factor * n for n in image.size], Image.Resampling.NEAREST)
    font = ImageFont.load_default(size=14)
    width = max(image.width, int(font.getlength(label)))
    cell = Image.new("RGB", (width + MARGIN, image.height + LABEL + MARGIN), PAPER)
    ImageDraw.Draw(cell).text((MARGIN, 8), label, INK, font)
    cell.paste(image, (MARGIN, LABEL + 4))
    return cell


def _save(picture, path):
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"-> {path}")
