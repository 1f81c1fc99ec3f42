"""Measures how well a checkpoint draws scenes that it was never trained on.

    python scripts/emoji/pictures.py --out pictures.npz
    python scripts/emoji/evaluate.py pictures.npz

Scenes are held out by compositions.py's rules; their references are drawn from the pictures, so no
other model judges. A picture shows the right subject if, of all subjects in all styles, the right
one is nearest to it: in mean squared error at 32x32 pixels, mirrored or not and moved as training
moves it. Two subjects are both there if they are the nearest in two opposite places. A picture
has the right colour if the median of its border is nearest to the named one. Grain is the standard
deviation of its outer 6 pixels, which are plain, in levels of 255. Edges are its gradient energy
relative to the reference's.

A checkpoint that knows no styles, as the project's first, is measured on single subjects only, in
the style "flat", at the size at which it draws them.

All seeds are fixed: the same command prints the same numbers.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from compositions import (
    CELL,
    COLOURS,
    FILL,
    PLACES,
    RELATIONS,
    SIZE,
    STEP,
    STYLES,
    Sprites,
    draw_scene,
    draw_sheet,
    list_captions,
    make_caption,
)
from pictures import load_pictures

WEIGHTS = Path(__file__).parents[2] / "weights" / "emoji"
BORDER = 3  # pixels wide, to tell the background's colour
RING = 6  # pixels wide, to measure grain: what every single subject of the usual size leaves free
THUMBNAIL = 32  # side of the pictures that are compared
BOX = 2 * STEP  # pixels: where one of two subjects is
BATCH = 32  # pictures drawn at once
OLD_FILL = 112  # pixels of a subject's longer side in the first checkpoint
AXES = (("left", "right"), ("top", "bottom"))  # places that two subjects have together
CHUNK = 2080  # references compared at once


# --- Measures of uint8 pictures. -----------------------------------------------------------------


def shrink(pictures, side=THUMBNAIL):
    """Shrinks pictures `(B, H, H, C)` to float32 `(B, side, side, C)`, by averaging."""
    count, height, _, channels = pictures.shape
    factor = height // side
    blocks = pictures.reshape(count, side, factor, side, factor, channels)
    return blocks.mean((2, 4), dtype="float32")


def name_colours(pictures):
    """Names the colour that the median of each picture's border is nearest to."""
    edge = np.ones(pictures.shape[1:3], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    median = np.median(pictures[:, edge], axis=1)  # (B, 3)
    names, values = list(COLOURS), np.array(list(COLOURS.values()), "float64")
    error = np.sum((median[:, None] - values) ** 2, axis=-1)
    return [names[n] for n in error.argmin(axis=1)]


def measure_grain(pictures):
    """Returns the deviation of each picture's outer pixels, in levels: float `(B,)`.

    It is the root of the three channels' mean variance.
    """
    ring = np.ones(pictures.shape[1:3], bool)
    ring[RING:-RING, RING:-RING] = False
    return np.sqrt(pictures[:, ring].astype("float64").var(axis=1).mean(axis=-1))


def measure_edges(pictures):
    """Returns the mean squared difference of neighbouring pixels of each picture: `(B,)`."""
    x = pictures.astype("float64")
    return sum(np.mean(np.diff(x, axis=axis) ** 2, axis=(1, 2, 3)) for axis in (1, 2))


def measure_psnr(pictures, references):
    """Returns the peak signal-to-noise ratio of each picture in dB: `(B,)`."""
    error = np.mean((pictures.astype("float64") - references) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


# --- References. ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How a reference shows a subject."""

    name: str
    style: str
    mirrored: bool = False
    shift: tuple[int, int] = (0, 0)


class References:
    """All subjects of one size in the middle of a square, to be compared with pictures.

    Args:
        sprites: the `Sprites`.
        styles: which of their styles.
        fill: pixels of a subject's longer side.
        side: of the square, in pixels.
        shifts: pixels by which they may be moved, across and down.
    """

    def __init__(self, sprites, styles, fill, side, shifts=(0,)):
        self.looks, inside, alphas = [], [], []
        moves = list(product(shifts, shifts))
        for style, name, mirrored in product(styles, sprites.names, (False, True)):
            rgb, alpha = sprites.get(name, style, fill, mirrored)
            for across, down in moves:
                canvas = np.zeros((1, side, side, 4), "float32")
                left, top = (side - fill) // 2 + across, (side - fill) // 2 + down
                view = canvas[0, top : top + fill, left : left + fill]
                view[..., :3], view[..., 3:] = rgb * alpha, alpha
                small = shrink(canvas)[0]
                inside.append(small[..., :3].astype("float16"))
                alphas.append(small[..., 3:].astype("float16"))
                self.looks.append(Look(name, style, mirrored, (across, down)))
        self.inside, self.alphas = np.stack(inside), np.stack(alphas)

    def find(self, pictures, colour):
        """Finds what is nearest to pictures on a background of this colour.

        Args:
            pictures: uint8 `(B, side, side, 3)`.
            colour: key of `COLOURS`.

        Returns:
            List of B `Look`s.
        """
        thumbnails = shrink(pictures).reshape(len(pictures), -1)
        best = np.full(len(pictures), np.inf)
        looks = [None] * len(pictures)
        for start in range(0, len(self.looks), CHUNK):
            part = slice(start, start + CHUNK)
            rgb = np.array(COLOURS[colour], "float32")
            drawn = self.inside[part].astype("float32")
            drawn += (1 - self.alphas[part].astype("float32")) * rgb
            drawn = drawn.reshape(len(drawn), -1)
            error = np.sum(drawn**2, axis=1) - 2 * thumbnails @ drawn.T  # and a constant
            for row, nearest in enumerate(error.argmin(axis=1)):
                if error[row, nearest] < best[row]:
                    best[row] = error[row, nearest]
                    looks[row] = self.looks[start + nearest]
        return looks


def cut_box(picture, offset):
    """Cuts the square around a place out of a picture: `(64, 64, 3)`."""
    left, top = ((SIZE - BOX) // 2 + some for some in offset)
    return picture[top : top + BOX, left : left + BOX]


class Judge:
    """Finds out what pictures show.

    Args:
        sprites: the `Sprites`.
        styles: those that the checkpoint knows.
        fill: pixels of a subject's longer side where no size is named.
        shifts: pixels by which training moves it.
    """

    def __init__(self, sprites, styles, fill, shifts):
        self.sprites, self.styles, self.fill, self.shifts = sprites, styles, fill, shifts
        self.references = {}

    def _get(self, fill, side, shifts=(0,)):
        if (key := (fill, side)) not in self.references:
            self.references[key] = References(self.sprites, self.styles, fill, side, shifts)
        return self.references[key]

    def judge_single(self, pictures, scenes):
        """Judges pictures of one subject each.

        Returns:
            dict of lists, a value for each picture: "subject" and "style" (is it the right one?),
            "edges" (relative to the reference of what was found).
        """
        groups = defaultdict(list)
        for number, scene in enumerate(scenes):
            groups[scene.colour, scene.size, scene.place].append(number)
        found = {}
        for (colour, size, place), numbers in groups.items():
            some = pictures[numbers]
            if place:
                references = self._get(FILL["small"], BOX)
                some = np.stack([cut_box(picture, PLACES[place]) for picture in some])
            elif size:
                references = self._get(FILL[size], SIZE)
            else:
                references = self._get(self.fill, SIZE, self.shifts)
            found.update(zip(numbers, references.find(some, colour), strict=True))
        looks = [found[number] for number in range(len(scenes))]
        drawn = [
            self.sprites.draw_spots(
                [(look.name, fill, offset)], scene.colour, look.style, (look.mirrored,), look.shift
            )
            for look, scene in zip(looks, scenes, strict=True)
            for fill, offset in [self._find_spot(scene)]
        ]
        pairs = list(zip(looks, scenes, strict=True))
        return {
            "subject": [look.name == scene.subjects[0] for look, scene in pairs],
            "style": [look.style == scene.style for look, scene in pairs],
            "edges": (measure_edges(pictures) / measure_edges(np.stack(drawn))).tolist(),
        }

    def _find_spot(self, scene):
        """Returns the fill and the offset of a single subject."""
        [(_, fill, offset)] = scene.spots()
        return (fill if scene.size or scene.place else self.fill), offset

    def judge_pairs(self, pictures, scenes):
        """Judges pictures of two subjects each.

        Returns:
            dict of lists, a value for each picture: "both" (are both there?), "relation" (are they
            where they should be?), "style" (of the two), "edges".
        """
        references = self._get(FILL["small"], BOX)
        groups = defaultdict(list)
        for number, scene in enumerate(scenes):
            groups[scene.colour].append(number)
        found = [{} for _ in scenes]
        for colour, numbers in groups.items():
            for place, offset in PLACES.items():
                boxes = np.stack([cut_box(pictures[number], offset) for number in numbers])
                for number, look in zip(numbers, references.find(boxes, colour), strict=True):
                    found[number][place] = look
        result = defaultdict(list)
        for picture, scene, looks in zip(pictures, scenes, found, strict=True):
            result["both"].append(
                any({looks[place].name for place in axis} == set(scene.subjects) for axis in AXES)
            )
            here = [looks[place] for place in RELATIONS[scene.relation]]
            result["relation"].append(tuple(look.name for look in here) == scene.subjects)
            result["style"].append(all(look.style == scene.style for look in here))
            flips = tuple(look.mirrored for look in here)
            drawn = self.sprites.draw(scene, flips)
            result["edges"].append(
                float(measure_edges(picture[None])[0] / measure_edges(drawn[None])[0])
            )
        return dict(result)


# --- What is measured. ---------------------------------------------------------------------------


def choose_scenes(names, kinds, count, styles=STYLES, seed=0):
    """Chooses different scenes that weren't trained on.

    Args:
        names: of the subjects.
        kinds: keys of `compositions.KINDS`, taken in turn.
        count: how many.
        styles: taken in turn.
        seed: of the choice.

    Returns:
        List of `Scene`.
    """
    rng = np.random.default_rng(seed)
    scenes = {}
    while len(scenes) < count:
        kind = kinds[len(scenes) % len(kinds)]
        style = styles[len(scenes) // len(kinds) % len(styles)]
        scenes[draw_scene(rng, names, True, kind, style)] = None
    return list(scenes)


def draw_pictures(pipeline, prompts, first_seed=0, **options):
    """Draws prompts, each from a seed of its own: uint8 `(B, 128, 128, 3)`."""
    batches = []
    for start in range(0, len(prompts), BATCH):
        say(f"{start} of {len(prompts)} pictures drawn")
        some = prompts[start : start + BATCH]
        seeds = [first_seed + start + n for n in range(len(some))]
        batches.append(pipeline.text_to_image(some, seed=seeds, verbose=0, **options))
    say("")
    return np.concatenate(batches)


def reconstruct(pipeline, pictures):
    """Encodes and decodes pictures, uint8 to uint8."""
    batches = []
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH].astype("float32") / 127.5 - 1
        latent = pipeline.image_encoder.predict_on_batch(batch)
        batches.append(np.asarray(pipeline.decoder.predict_on_batch(latent), "float32"))
    return np.clip((np.concatenate(batches) + 1) * 127.5, 0, 255).round().astype("uint8")


def percent(values):
    """Returns the share of true values in percent."""
    return 100 * float(np.mean(values))


class Evaluation:
    """Everything that is measured of one checkpoint.

    Args:
        pipeline: the `StableDiffusion`.
        sprites: the `Sprites`, with the size `OLD_FILL` too where `knows_styles` is false.
        knows_styles: whether captions name styles, sizes mean what they do here, and there are
            pictures of two subjects.
        options: keywords of `text_to_image`: steps and guidance.
    """

    def __init__(self, pipeline, sprites, knows_styles, options):
        self.pipeline, self.sprites, self.options = pipeline, sprites, options
        self.knows_styles = knows_styles
        self.styles = STYLES if knows_styles else ("flat",)
        self.fill = FILL[None] if knows_styles else OLD_FILL
        shifts = (-CELL, 0, CELL) if knows_styles else (-4, 0, 4)
        self.judge = Judge(sprites, self.styles, self.fill, shifts)

    def caption(self, scene):
        """Returns the common caption of a scene, as the checkpoint knows it."""
        return make_caption(scene) if self.knows_styles else list_captions(scene, False)[0]

    def draw_scenes(self, scenes):
        """Draws scenes with the pipeline, uint8 `(B, 128, 128, 3)`."""
        return draw_pictures(
            self.pipeline, [self.caption(scene) for scene in scenes], **self.options
        )

    def measure_plain(self, count):
        """Measures pictures of one subject in the middle, of the usual size."""
        scenes = choose_scenes(self.sprites.names, ["plain"], count, self.styles)
        pictures = self.draw_scenes(scenes)
        judged, grain = self.judge.judge_single(pictures, scenes), measure_grain(pictures)
        colours = [scene.colour for scene in scenes]
        return {
            "count": count,
            "subject": percent(judged["subject"]),
            "style": percent(judged["style"]),
            "colour": percent(np.array(name_colours(pictures)) == colours),
            "grain": float(np.median(grain)),
            "grain_90": float(np.percentile(grain, 90)),
            "edges": float(np.median(judged["edges"])),
            "wrong": [
                self.caption(scene)
                for scene, right in zip(scenes, judged["subject"], strict=True)
                if not right
            ],
        }

    def measure_placed(self, count):
        """Measures pictures of one small or large subject, or of one beside the middle."""
        kinds = ["small", "large", "place", "place"]
        scenes = choose_scenes(self.sprites.names, kinds, count, self.styles)
        pictures = self.draw_scenes(scenes)
        judged = self.judge.judge_single(pictures, scenes)
        return {
            "count": count,
            "subject": percent(judged["subject"]),
            "style": percent(judged["style"]),
            "edges": float(np.median(judged["edges"])),
        }

    def measure_pairs(self, count):
        """Measures pictures of two subjects."""
        scenes = choose_scenes(self.sprites.names, ["pair"], count, self.styles)
        pictures = self.draw_scenes(scenes)
        judged = self.judge.judge_pairs(pictures, scenes)
        both = np.array(judged["both"])
        related = np.array([scene.relation is not None for scene in scenes])
        right = np.array(judged["relation"])[both & related]
        return {
            "count": count,
            "both": percent(both),
            "relation": percent(right) if len(right) else None,
            "colour": percent(
                np.array(name_colours(pictures)) == [scene.colour for scene in scenes]
            ),
            "style": percent(judged["style"]),
            "edges": float(np.median(judged["edges"])),
        }

    def measure_vae(self, count):
        """Measures how the VAE reconstructs scenes, in each style."""
        result = {"count": count}
        kinds = ["plain", "pair", "plain", "place"] if self.knows_styles else ["plain"]
        for style in self.styles:
            scenes = choose_scenes(self.sprites.names, kinds, count, [style])
            pictures = np.stack([self._draw_reference(scene) for scene in scenes])
            again = reconstruct(self.pipeline, pictures)
            psnr = measure_psnr(again, pictures)
            result[style] = {
                "psnr": float(np.mean(psnr)),
                "least": float(np.min(psnr)),
                "edges": float(np.median(measure_edges(again) / measure_edges(pictures))),
                "grain": float(np.median(measure_grain(again))),
            }
        return result

    def _draw_reference(self, scene):
        if self.knows_styles:
            return self.sprites.draw(scene)
        spots = [(scene.subjects[0], self.fill, (0, 0))]
        return self.sprites.draw_spots(spots, scene.colour, scene.style)

    def draw_samples(self, path, count):
        """Writes random held-out prompts and what comes of them as one PNG."""
        kinds = ["plain", "pair", "plain", "place"] if self.knows_styles else ["plain"]
        scenes = choose_scenes(self.sprites.names, kinds, count, self.styles, seed=1)
        pictures = self.draw_scenes(scenes)
        draw_sheet(path, pictures, [self.caption(scene) for scene in scenes], 8)


def evaluate(evaluation, plain, placed, pairs):
    """Measures all; see `show_tables` for what. A count of 0 leaves a part out."""
    result = {"vae": evaluation.measure_vae(64)}
    if plain:
        result["plain"] = evaluation.measure_plain(plain)
    if placed and evaluation.knows_styles:
        result["placed"] = evaluation.measure_placed(placed)
    if pairs and evaluation.knows_styles:
        result["pairs"] = evaluation.measure_pairs(pairs)
    return result


LABELS = {
    "subject": "subject is the right one            {:7.1f} %",
    "both": "both subjects are there             {:7.1f} %",
    "relation": "  and where they should be          {:7.1f} %",
    "colour": "background's colour                 {:7.1f} %",
    "style": "style                               {:7.1f} %",
    "grain": "grain of the background, median     {:7.2f} levels",
    "grain_90": "  the 90th percentile               {:7.2f} levels",
    "edges": "edges, relative to the reference's  {:7.2f}",
    "psnr": "VAE, PSNR                           {:7.2f} dB",
    "least": "  the least                         {:7.2f} dB",
}
TITLES = {
    "plain": "{} scenes of one subject",
    "placed": "{} scenes of one subject, small, large or beside the middle",
    "pairs": "{} scenes of two subjects",
}


def show_tables(result):
    """Returns the result of `evaluate` as text."""
    lines = []
    for style, row in result["vae"].items():
        if style != "count":
            lines += [f"the VAE, {result['vae']['count']} scenes, style {style!r}"]
            lines += [f"  {LABELS[key].format(value)}" for key, value in row.items()] + [""]
    for part, title in TITLES.items():
        if part in result:
            row = result[part]
            lines += [title.format(row["count"]) + ", none trained on"]
            lines += [
                f"  {LABELS[key].format(row[key])}" for key in LABELS if row.get(key) is not None
            ] + [""]
    if wrong := result.get("plain", {}).get("wrong"):
        lines += ["subject isn't the nearest one: " + "; ".join(wrong)]
    return "\n".join(lines).rstrip()


def say(message):
    """Shows how far it is, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def check_subjects(weights, names):
    """Tells whether a checkpoint knows styles.

    Raises:
        ValueError: it doesn't say what it draws, or that is something else.
    """
    folder = Path(weights)
    for name in ("subjects.txt", "words.txt"):
        if not (folder / name).is_file():
            raise ValueError(f"there is no {folder / name}, which tells what the checkpoint draws")
    subjects = (folder / "subjects.txt").read_text("utf-8").splitlines()
    if strange := sorted(set(subjects) ^ set(names)):
        raise ValueError(f"{folder / 'subjects.txt'}: other subjects, as {', '.join(strange[:5])}")
    return "flat" in (folder / "words.txt").read_text("utf-8").split()


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", type=Path, help="what pictures.py wrote")
    parser.add_argument("--weights", default=str(WEIGHTS), help="a folder in diffusers' layout")
    parser.add_argument("--plain", type=int, default=300, help="scenes of one subject")
    parser.add_argument("--placed", type=int, default=100, help="with a size or a place")
    parser.add_argument("--pairs", type=int, default=200, help="scenes of two subjects")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's own")
    parser.add_argument("--samples", type=Path, help="also draw 64 random prompts, a PNG")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    args = parser.parse_args(argv)
    if min(args.plain, args.placed, args.pairs) < 0 or args.steps < 1:
        parser.error("numbers of scenes must be at least 0, and of steps at least 1")
    options = {"num_steps": args.steps}
    if args.guidance is not None:
        options["unconditional_guidance_scale"] = args.guidance
    try:
        pictures = load_pictures(args.pictures)
        sprites = Sprites(pictures, fills=[*FILL.values(), OLD_FILL])
        knows_styles = check_subjects(args.weights, sprites.names)
        from stable_diffusion import StableDiffusion  # late: it takes seconds

        pipeline = StableDiffusion(jit_compile=False, weights=args.weights)
        evaluation = Evaluation(pipeline, sprites, knows_styles, options)
        result = evaluate(evaluation, args.plain, args.placed, args.pairs)
        if args.samples:
            evaluation.draw_samples(args.samples, 64)
    except (OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if args.json else show_tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
