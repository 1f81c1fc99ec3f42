"""Draws Stable Diffusion's three parts, and the stages of its UNet.

    python scripts/drawings/draw_models.py weights/pictures

This writes model.svg and unet.svg into the folder. All shapes are computed from the config, as the
models compute them; no model is built.
"""

import argparse
import random
from pathlib import Path

from svg import MONO_WIDTH, Drawing

from stable_diffusion.components import MAX_PROMPT_LENGTH
from stable_diffusion.config import SD1

PROMPT = "a red apple on a blue background"
RED, BLUE, GREEN = (205, 50, 50), (84, 140, 212), (70, 150, 70)
LINE = 20  # from line to line in a box
# The UNet: places are the middles of boxes
WIDTH, TOP, PITCH = 1000, 186, 168  # of the drawing; of the finest stage, and from stage to stage
LEFT, RIGHT, INDENT = 145, 73, 12  # of the outer boxes, and how much more for each stage
BOX, GAP, PART = 80, 22, 22  # width of a box, between boxes, and height of a part of a box
OUT = 8  # from a box to the dot where a skip connection leaves its output
COME = 14  # from where an arrow turns to the box that it enters
ARCH = 18  # between skip connections
BADGES = {"res": ("orange", "t"), "attn": ("blue", "c")}  # colours, and what enters


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write model.svg and unet.svg into")
    folder = parser.parse_args().folder
    drawings = {"model.svg": draw_model(SD1), "unet.svg": draw_unet(SD1)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in drawings.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        parser.error(str(error))


# The three parts


def paint_apple(noise, cells=8):
    """Returns an apple behind noise, as rows of colours.

    Args:
        noise: 0 for the apple only, to 1 for noise only.
        cells: how many cells the image is wide.
    """
    source = random.Random(0)
    rows = []
    for i in range(cells):
        y = (i + 0.5) / cells
        row = []
        for j in range(cells):
            x = (j + 0.5) / cells
            colour = RED if (x - 0.5) ** 2 + (y - 0.57) ** 2 < 0.33**2 else BLUE
            if 0.1 < y < 0.3 and 0.5 < x < 0.7:
                colour = GREEN
            mixed = [(1 - noise) * value + noise * source.randrange(256) for value in colour]
            row.append(tuple(map(round, mixed)))
        rows.append(row)
    return rows


def draw_model(config):
    """Returns the SVG of the three-part model of a `Config`, at the size of its training images."""
    height, width = config.resolve_size()
    cell = config.vae.cell_size
    latent = str((height // cell, width // cell, config.vae.latent_channels))
    context = str((MAX_PROMPT_LENGTH, config.text.width))
    d = Drawing(
        1000,
        700,
        "Stable Diffusion: a prompt becomes tokens and a context; noise becomes a latent in a "
        "loop; the latent becomes an image",
    )
    d.add_text(32, 36, f"Stable Diffusion 1 at {height}×{width} pixels", 18, "ink", "start", "bold")
    d.add_text(968, 36, "shapes: of one prompt and one image", 12, "soft", "end")

    # The text
    for y, name, text in (72, "prompt", f"“{PROMPT}”"), (128, "negative prompt", "empty"):
        d.add_text(44, y, name, 12, "soft", "start")
        d.add_box(32, y + 10, 254, 30, "plain", 15)
        d.add_text(159, y + 25, text, 12.5)
        d.add_arrow((286, y + 25), (318, y + 25))
    _add_box(d, 318, 84, 126, 82, "plain", "Tokenizer", "clip_tokenizer.py")
    _add_labelled(d, 444, 125, 530, "tokens", f"({MAX_PROMPT_LENGTH})")
    _add_box(d, 530, 84, 150, 82, "blue", "Text encoder", "text_encoder.py", number=1)

    # The loop
    d.add_box(232, 212, 736, 304, "panel", 10)
    d.add_text(248, 234, "The loop: once for each step", 13, "ink", "start", "bold")
    _add_image(d, 32, 274, "noise", paint_apple(1))
    d.add_arrow((120, 318), (272, 318))
    d.add_text(176, 304, latent, 12, "soft", kind="mono")
    _add_image(d, 272, 274, "latent", paint_apple(0.55))
    d.add_arrow((360, 318), (530, 318))
    d.add_text(442, 304, latent, 12, "soft", kind="mono")
    d.add_arrow((605, 166), (605, 270), ink="blue")
    d.add_text(615, 189, "context", 12, "blue", "start")
    d.add_text(670, 189, context, 12, "blue", "start", "mono")
    _add_box(
        d, 530, 270, 150, 96, "orange", "UNet", "diffusion_model.py", "predicts the noise", number=2
    )
    for y, name in (294, "with prompt"), (342, "without"):
        d.add_arrow((680, y), (790, y))
        d.add_text(732, y - 11, name, 12, "soft")
        d.add_text(732, y + 12, latent, 12, "soft", kind="mono")
    lines = "without + scale", "× (with − without)"
    _add_box(d, 790, 270, 162, 96, "plain", "Guidance", "stable_diffusion.py", *lines)
    d.add_arrow((871, 366), (871, 412))
    _add_named(d, 861, 387, "noise", latent)
    _add_box(d, 790, 412, 162, 74, "plain", "Sampler", "noise_scheduler.py", "latent − some noise")
    d.add_box(550, 430, 110, 32, "plain", 16)
    d.add_text(605, 446, "timestep")
    d.add_arrow((605, 430), (605, 366))
    d.add_arrow((660, 446), (790, 446))
    d.add_arrow((871, 486), (871, 502), (316, 502), head=False)
    d.add_arrow((316, 502), (316, 362))
    _add_named(d, 532, 488, "latent, less noisy", latent)

    # The image
    d.add_dot(316, 502)
    d.add_arrow((316, 502), (316, 572))
    d.add_text(328, 534, "after the last step", 12, "soft", "start")
    _add_image(d, 272, 572, "", paint_apple(0.12))
    _add_labelled(d, 360, 616, 530, "latent", latent)
    _add_box(d, 530, 575, 150, 82, "green", "VAE decoder", "decoder.py", number=3)
    _add_labelled(d, 680, 616, 809, "image", str((height, width, 3)))
    _add_apple(d, 809, 554, 124)

    for x, colour in (32, "blue"), (54, "orange"), (76, "green"):
        d.add_box(x, 594, 18, 14, colour, 4)
    d.add_text(106, 601, "trained models", 12, "soft", "start")
    d.add_box(76, 622, 18, 14, "plain", 4)
    d.add_text(106, 629, "nothing to train", 12, "soft", "start")
    return d.join()


def _add_box(d, x, y, width, height, colour, name, module, *lines, number=None):
    """Draws a box with a name, lines below it, the module that it is in, and its number."""
    texts = [(name, 15, "ink", "bold"), *((line, 12, "ink", "") for line in lines)]
    if module:
        texts.append((module, 11, "soft", "mono"))
    d.add_box(x, y, width, height, colour)
    start = y + height / 2 - LINE * (len(texts) - 1) / 2
    for i, text in enumerate(texts):
        d.add_text(x + width / 2, start + LINE * i, *text[:3], kind=text[3])
    if number:
        d.add_dot(x, y, 11, colour, str(number))


def _add_labelled(d, x, y, x_to, name, shape):
    """Draws an arrow to the right with a name above and a shape below."""
    d.add_arrow((x, y), (x_to, y))
    d.add_text((x + x_to) / 2 - 3, y - 13, name, 12, "soft")
    d.add_text((x + x_to) / 2 - 3, y + 14, shape, 12, "soft", kind="mono")


def _add_named(d, x, y, name, shape, size=12):
    """Writes a name and a shape, which ends at `x`."""
    d.add_text(x, y, shape, size, "soft", "end", "mono")
    d.add_text(x - size * MONO_WIDTH * len(shape) - 6, y, name, size, "soft", "end")


def _add_image(d, x, y, name, rows, size=88):
    """Draws a small image with its name above."""
    d.add_cells(x, y, size, rows)
    if name:
        d.add_text(x + size / 2, y - 12, name, 12, "soft")


def _add_apple(d, x, y, size):
    """Draws `paint_apple` without noise and cells."""
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in (BLUE, RED, GREEN)]
    d.parts += [
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{colours[0]}"/>',
        f'<g transform="translate({x} {y}) scale({size})">',
        f'<path d="M.5.31C.62.2.84.28.84.53.84.75.7.92.59.92.55.92.53.9.5.9.47.9.45.92.41.92'
        f'.3.92.16.75.16.53.16.28.38.2.5.31Z" fill="{colours[1]}"/>',
        '<path d="M.5.34C.5.26.48.2.44.14" fill="none" stroke="#5a3a22" stroke-width=".035" '
        'stroke-linecap="round"/>',
        f'<path d="M.5.25C.5.12.62.08.74.1.73.22.63.28.5.25Z" fill="{colours[2]}"/>',
        "</g>",
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" class="frame"/>',
    ]


# The UNet


def list_stages(c, height, width):
    """Returns what goes through a UNet, as `_unet` in diffusion_model.py computes it.

    Args:
        c: the `UNetConfig`.
        height, width: of the image in pixels.

    Returns:
        A list of dicts, one for each stage, the finest first. `down` is a list of shapes: of the
        feature map that comes into the stage and of those after its blocks, all of which are skip
        connections. `joined` is a list of pairs of channels, one for each concatenation on the way
        up: from before, and from the skip connection. `up` is the shape after these blocks, `out`
        that after upsampling, None for the finest stage. `attention` is whether it has attention.
    """
    size = (height // c.cell_size, width // c.cell_size)
    stages, skips, channels = [], [], c.widths[0]
    for stage_width, attention in zip(c.widths, c.attention, strict=True):
        down = [(*size, channels), *[(*size, stage_width)] * c.res_blocks]
        stages.append({"down": down, "attention": attention})
        skips += down
        channels = stage_width
        size = tuple((side + 1) // 2 for side in size)
    for stage, stage_width in zip(reversed(stages), reversed(c.widths), strict=True):
        stage["joined"] = []
        for _ in range(c.res_blocks + 1):
            skip = skips.pop()
            stage["joined"].append((channels, skip[2]))
            channels = stage_width
        stage["up"] = (*skip[:2], stage_width)
        stage["out"] = None if stage is stages[0] else (2 * skip[0], 2 * skip[1], stage_width)
    return stages


def draw_unet(config):
    """Returns the SVG of the stages of a `Config`'s UNet, at the size of its training images.

    Args:
        config: a `Config` whose UNet has two blocks in each stage, and a middle.
    """
    c = config.unet
    height, width = config.resolve_size()
    stages = list_stages(c, height, width)
    middle_y = TOP + PITCH * (len(stages) - 1) + 92
    d = Drawing(WIDTH, middle_y + 154, "The UNet's stages, on the way down and on the way up")
    name = f"The UNet of Stable Diffusion 1 at {height}×{width} pixels"
    d.add_text(32, 36, name, 18, "ink", "start", "bold")
    d.add_text(WIDTH - 32, 36, "shapes: (height, width, channels)", 12, "soft", "end")
    for i, stage in enumerate(stages):
        y = TOP + PITCH * i
        downs, ups = _place_blocks(i)
        d.add_text(32, y - 10, f"stage {i}", 14, "ink", "start", "bold")
        d.add_text(32, y + 10, "{}×{}".format(*stage["up"]), 12, "soft", "start", "mono")
        _add_skips(d, y, downs, ups, stage)
        parts = ("res", "attn") if stage["attention"] else ("res",)
        blocks = [["downsample" if i else "conv_in"], *[parts] * c.res_blocks]
        _add_blocks(d, y, downs, blocks)
        blocks = [("{} + {}".format(*joined), *parts) for joined in stage["joined"]]
        _add_blocks(d, y, ups, [*blocks, ["upsample" if i else "conv_out"]])
        if i:
            _add_ways(d, i, stages)

    top, bottom = TOP - 106, TOP - PART / 2
    downs, ups = _place_blocks(0)
    shape = str((*stages[0]["down"][0][:2], c.in_channels))
    d.add_arrow((downs[0], top + 11), (downs[0], bottom))
    _add_named(d, downs[0] + BOX / 2, top, "latent", shape)
    shape = str((*stages[0]["up"][:2], c.out_channels))
    d.add_arrow((ups[-1], bottom), (ups[-1], top + 11))
    _add_named(d, ups[-1] + BOX / 2, top, "noise", shape)

    _add_middle(d, middle_y, len(stages) - 1, stages[-1])
    _add_notes(d, middle_y + 80, c, stages[0])
    return d.join()


def _place_blocks(stage):
    """Returns the middles of a stage's boxes on the way down, and on the way up."""
    left = LEFT + INDENT * stage
    right = WIDTH - RIGHT - INDENT * stage
    step = BOX + GAP
    return [left + step * j for j in range(3)], [right - step * j for j in (3, 2, 1, 0)]


def _add_blocks(d, y, places, blocks):
    """Draws the boxes of a stage on one way, and the arrows between them."""
    for x, parts in zip(places, blocks, strict=True):
        if x != places[0]:
            d.add_arrow((x - GAP - BOX / 2, y), (x - BOX / 2, y))
        high = y - PART * len(parts) / 2
        for part in parts:
            ink, letter = BADGES.get(part, ("plain", ""))
            joined = "+" in part
            d.add_box(x - BOX / 2, high, BOX, PART, "violet" if joined else ink, 4)
            ink = "violet" if joined else "ink"
            shift = -9 if letter else 0
            size = 12 if letter else 11
            d.add_text(x + shift, high + PART / 2, part, size, ink, kind="mono" if joined else "")
            if letter:
                d.add_dot(x + BOX / 2 - 14, high + PART / 2, 7.5, BADGES[part][0], letter)
            high += PART


def _add_skips(d, y, downs, ups, stage):
    """Draws a stage's skip connections: the last feature map of the way down is the first up."""
    to = y - PART * (2 + stage["attention"]) / 2
    for j, (x, shape) in enumerate(zip(downs, stage["down"], strict=True)):
        last = len(downs) - 1 - j
        start, end, high = x + BOX / 2 + OUT, ups[last], to - 20 - ARCH * last
        d.add_arrow((start, y), (start, high), (end, high), (end, to), ink="violet")
        d.add_dot(start, y, 3, "violet")
        d.add_label((downs[-1] + BOX / 2 + OUT + ups[0]) / 2, high, str(shape), ink="violet")


def _add_ways(d, i, stages):
    """Draws the ways down to a stage and up from it."""
    downs, ups = _place_blocks(i)
    downs_above, ups_above = _place_blocks(i - 1)
    above, y = TOP + PITCH * (i - 1), TOP + PITCH * i
    between = above + PART * (2 + stages[i - 1]["attention"]) / 2 + 28
    end = downs[0], y - PART / 2
    start = _leave(d, downs_above[-1], above)
    d.add_arrow(start, (start[0], between), (end[0], between), end)
    d.add_label((start[0] + end[0]) / 2, between, str(stages[i - 1]["down"][-1]))
    start, end = (ups[-1], y - PART / 2), _come(ups_above[0], above)
    d.add_arrow(start, (start[0], between), (end[0], between), end, (end[0] + COME, above))
    d.add_label((start[0] + end[0]) / 2, between, str(stages[i]["out"]))


def _leave(d, x, y):
    """Draws the output of the last box on the way down, up to its dot, and returns the dot."""
    end = x + BOX / 2 + OUT, y
    d.add_arrow((x + BOX / 2, y), end, head=False)
    d.add_dot(*end, 3, "violet")
    return end


def _come(x, y):
    """Returns where an arrow turns into the first box on the way up."""
    return x - BOX / 2 - COME, y


def _add_middle(d, y, last, stage):
    """Draws the middle, between the ways down and up of the last stage."""
    downs, ups = _place_blocks(last)
    above = TOP + PITCH * last
    between = above + PART * (2 + stage["attention"]) / 2 + 16
    start, end = _leave(d, downs[-1], above), _come(ups[0], above)
    center = (start[0] + end[0]) / 2
    places = [center + (BOX + GAP) * j for j in (-1, 0, 1)]
    top = y - PART / 2
    d.add_arrow(start, (start[0], between), (places[0], between), (places[0], top))
    d.add_arrow(
        (places[-1], top), (places[-1], between), (end[0], between), end, (end[0] + COME, above)
    )
    shape = str(stage["down"][-1])
    d.add_text(places[0] - 10, (between + top) / 2, shape, 12, "soft", "end", "mono")
    d.add_text(places[-1] + 10, (between + top) / 2, shape, 12, "soft", "start", "mono")
    _add_blocks(d, y, places, [["res"], ["attn"], ["res"]])
    d.add_text(32, y, "middle", 14, "ink", "start", "bold")


def _add_notes(d, y, c, stage):
    """Writes what the signs mean."""
    d.add_box(32, y - 36, WIDTH - 64, 1, "panel", 0)
    notes = [
        (
            "t",
            f"timestep embedding ({c.widths[0]})",
            f"dense, SiLU, dense: ({4 * c.widths[0]})",
            "enters each res, a ResnetBlock",
        ),
        (
            "c",
            f"context {(MAX_PROMPT_LENGTH, c.context_width)}",
            "enters each attn, a SpatialTransformer:",
            "self-attention, cross-attention, GEGLU",
        ),
        (
            "+",
            "skip connections",
            "{} + {}: the channels that come in, and".format(*stage["joined"][0]),
            "those of the way down, concatenated",
        ),
    ]
    inks = {letter: ink for ink, letter in BADGES.values()} | {"+": "violet"}
    for i, (letter, *lines) in enumerate(notes):
        x = 42 + 308 * i
        d.add_dot(x, y, 10, inks[letter], letter)
        for j, line in enumerate(lines):
            d.add_text(
                x + 20,
                y + 21 * j,
                line,
                13 if not j else 12,
                "soft" if j else "ink",
                "start",
                "" if j else "bold",
            )


if __name__ == "__main__":
    main()
