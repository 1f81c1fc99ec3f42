"""What the embedded checkpoint draws: scenes, their pictures and their captions.

A scene is one or two subjects on a plain background. Everything lies on a grid of latent cells (8
pixels), and small subjects on one of half their box (32 pixels), where the UNet's coarsest cells
begin too. So a subject has the same latents wherever it is.

    python scripts/emoji/compositions.py pictures.npz --sheet scenes.png

draws random scenes with their captions.
"""

import argparse
import sys
import textwrap
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pictures import load_pictures, read_subjects
from PIL import Image, ImageDraw, ImageFont

SIZE = 128  # pixels a picture is wide and high
CELL = 8  # pixels a latent cell is wide

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 216),
    "yellow": (252, 220, 60),
    "orange": (250, 140, 22),
    "purple": (126, 48, 178),
    "pink": (255, 164, 204),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "brown": (116, 70, 34),
    "cyan": (64, 212, 232),
}
UNNAMED_COLOUR = "white"  # the background that no caption names
STYLES = ("3d", "flat")  # the first is what no caption names
FILL = {None: 100, "large": 120, "small": 56}  # pixels of a subject's longer side
STEP = 32  # pixels from the middle to a place beside it
PLACES = {"left": (-STEP, 0), "right": (STEP, 0), "top": (0, -STEP), "bottom": (0, STEP)}
RELATIONS = {  # where the first and the second of two subjects are; None is "and"
    None: ("left", "right"),
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}


@dataclass(frozen=True)
class Scene:
    """One or two subjects on a plain background.

    Args:
        subjects: their names.
        colour: of the background, a key of `COLOURS`.
        style: one of `STYLES`.
        size: of a single subject: None, "small" or "large".
        place: of a single subject: None (the middle) or a key of `PLACES`, which makes it small.
        relation: of two subjects, a key of `RELATIONS`.
    """

    subjects: tuple[str, ...]
    colour: str
    style: str = STYLES[0]
    size: str | None = None
    place: str | None = None
    relation: str | None = None

    def __post_init__(self):
        known = {"colour": COLOURS, "style": STYLES, "size": FILL, "relation": RELATIONS}
        known["place"] = {None, *PLACES}
        for field, values in known.items():
            if (value := getattr(self, field)) not in values:
                raise ValueError(f"{field} must be one of {list(values)}, not {value!r}")
        if len(self.subjects) not in (1, 2):
            raise ValueError(f"a scene has one or two subjects, not {len(self.subjects)}")
        if len(self.subjects) == 2 and (self.size or self.place):
            raise ValueError("two subjects have neither a size nor a place")
        if len(self.subjects) == 1 and self.relation:
            raise ValueError("one subject has no relation")
        if self.size == "large" and self.place:
            raise ValueError(f"a large subject has no room to be at the {self.place}")

    def spots(self):
        """Lists what is where: tuples of subject, fill in pixels and offset from the middle."""
        if len(self.subjects) == 2:
            places = RELATIONS[self.relation]
            return [
                (name, FILL["small"], PLACES[place])
                for name, place in zip(self.subjects, places, strict=True)
            ]
        if self.place:
            return [(self.subjects[0], FILL["small"], PLACES[self.place])]
        return [(self.subjects[0], FILL[self.size], (0, 0))]


# --- What is never trained on. -------------------------------------------------------------------


def is_colour_held_out(subject, colour):
    """Tells whether a subject is never on a background of this colour in training."""
    return zlib.crc32(f"{subject}|{colour}".encode()) % 10 == 0


def is_pair_held_out(first, second):
    """Tells whether two subjects are never in one picture in training."""
    return zlib.crc32("|".join(sorted((first, second))).encode()) % 10 == 0


def is_held_out(scene):
    """Tells whether a scene is kept from training: for a colour or for the two subjects."""
    return any(is_colour_held_out(name, scene.colour) for name in scene.subjects) or (
        len(scene.subjects) == 2 and is_pair_held_out(*scene.subjects)
    )


# --- Pictures. -----------------------------------------------------------------------------------


class Sprites:
    """The subjects in every style and size.

    Args:
        pictures: dict from style to uint8 `(subjects, side, side, 4)`, see `pictures.py`.
        names: of the subjects, in their order; None is those of `pictures.py`.
        fills: pixels of their longer sides; None is those of the scenes.
    """

    def __init__(self, pictures, names=None, fills=None):
        self.names = list(read_subjects() if names is None else names)
        self.index = {name: number for number, name in enumerate(self.names)}
        self.sprites = {
            (style, fill): np.stack([_resize(picture, fill) for picture in some])
            for style, some in pictures.items()
            for fill in fills or FILL.values()
        }

    def get(self, name, style, fill, mirrored=False):
        """Returns a subject: float32 colours `(fill, fill, 3)` and alpha `(fill, fill, 1)`."""
        sprite = self.sprites[style, fill][self.index[name]].astype("float32")
        sprite = sprite[:, ::-1] if mirrored else sprite
        return sprite[..., :3], sprite[..., 3:] / 255

    def draw(self, scene, mirrored=(False, False), shift=(0, 0)):
        """Draws a scene.

        Args:
            scene: the `Scene`.
            mirrored: whether the first and the second subject look the other way.
            shift: pixels to the right and down.

        Returns:
            uint8 `(128, 128, 3)`.
        """
        return self.draw_spots(scene.spots(), scene.colour, scene.style, mirrored, shift)

    def draw_spots(self, spots, colour, style, mirrored=(False, False), shift=(0, 0)):
        """Draws what `Scene.spots` lists; what lies outside is cut off."""
        canvas = np.empty((SIZE, SIZE, 3), "float32")
        canvas[:] = COLOURS[colour]
        for (name, fill, offset), flip in zip(spots, mirrored, strict=False):
            rgb, alpha = self.get(name, style, fill, flip)
            left, top = (
                (SIZE - fill) // 2 + int(some) + int(more)
                for some, more in zip(offset, shift, strict=True)
            )
            right, bottom = min(left + fill, SIZE), min(top + fill, SIZE)
            inside = slice(max(-top, 0), bottom - top), slice(max(-left, 0), right - left)
            view = canvas[max(top, 0) : bottom, max(left, 0) : right]
            view += alpha[inside] * (rgb[inside] - view)
        return np.rint(canvas).astype("uint8")

    def mask(self, scene, mirrored=(False, False), shift=(0, 0)):
        """Tells which pixels of a picture are background and nothing else: bool `(128, 128)`."""
        free = np.ones((SIZE, SIZE), bool)
        for (name, fill, offset), flip in zip(scene.spots(), mirrored, strict=False):
            _, alpha = self.get(name, scene.style, fill, flip)
            left, top = (
                (SIZE - fill) // 2 + int(some) + int(more)
                for some, more in zip(offset, shift, strict=True)
            )
            free[top : top + fill, left : left + fill] &= alpha[..., 0] == 0
        return free


def _resize(picture, fill):
    """Brings the longer side of what isn't transparent to `fill` pixels: `(fill, fill, 4)`.

    Pillow resizes RGBA with premultiplied alpha, so the colour of transparent pixels stays hidden.
    """
    image = Image.fromarray(picture)
    image = image.crop(image.getchannel("A").getbbox())
    factor = fill / max(image.size)
    size = [max(1, round(side * factor)) for side in image.size]
    result = Image.new("RGBA", (fill, fill))
    corner = (fill - size[0]) // 2, (fill - size[1]) // 2
    result.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    return np.asarray(result)


# --- Captions. -----------------------------------------------------------------------------------

# The grammar of the names: which take "an", and which take no article.
AN_PREFIXES = ("a", "e", "i", "o", "u", "hour", "x-ray")
A_PREFIXES = ("uni", "ufo", "one-", "ewe", "euro")  # the exceptions among them
PREPOSITIONS = frozenset("at behind blowing from in of on with without".split())
UNCOUNTABLE = frozenset(
    "bacon badminton bowling bread broccoli butter camping candy coffee construction cooking"
    " coral corn cream dango dice dna falafel fire food garlic hockey ice lacrosse lightning"
    " luggage meat money oden pong popcorn rice sake salt soap spaghetti sushi tea tennis thread"
    " wood yarn".split()
)
PROPER_NAMES = frozenset({"santa claus", "statue of liberty", "mount fuji", "tokyo tower"})

# Other words for a subject, which training has now and then.
ALIASES = {
    "airplane": "plane",
    "automobile": "car",
    "baby chick": "chick",
    "bicycle": "bike",
    "birthday cake": "cake",
    "closed book": "book",
    "couch and lamp": "couch",
    "crescent moon": "moon",
    "delivery truck": "truck",
    "doughnut": "donut",
    "ear of corn": "corn",
    "face screaming in fear": "screaming face",
    "fire engine": "fire truck",
    "flying saucer": "ufo",
    "french fries": "fries",
    "game die": "dice",
    "gem stone": "diamond",
    "hamburger": "burger",
    "honeybee": "bee",
    "hot beverage": "coffee",
    "jack-o-lantern": "pumpkin",
    "lady beetle": "ladybug",
    "loudly crying face": "crying face",
    "metro": "subway",
    "military medal": "medal",
    "mobile phone": "phone",
    "motorcycle": "motorbike",
    "mantelpiece clock": "clock",
    "necktie": "tie",
    "padlock": "lock",
    "pile of poo": "poop",
    "red apple": "apple",
    "red heart": "heart",
    "smiling face with sunglasses": "cool face",
    "spiral shell": "shell",
    "television": "tv",
    "water wave": "wave",
    "wrapped gift": "gift",
}

# How a sentence goes on after what is in the picture, and how it may begin. {ground} is "a blue
# background", {thing} "a red apple", or "a cat to the left of a dog".
COMMON = "{thing} on {ground}"
WORDINGS = (
    "{thing}, {colour} background",
    "{thing} on {colour}",
    "{bare} on {colour}",
    "{bare}, {colour} background",
    "{thing} in front of {ground}",
    "{thing} against {ground}",
    "{thing} with {ground}",
    "an emoji of {thing} on {ground}",
    "an emoji of {thing}, {colour} background",
    "a picture of {thing} on {ground}",
    "a picture of {thing}, {colour} background",
    "an image of {thing} on {ground}",
    "an icon of {thing} on {ground}",
    "a drawing of {thing} on {ground}",
    "draw {thing} on {ground}",
    "{ground} with {thing}",
    "on {ground}, {thing}",
)
UNNAMED = ("{thing}", "{bare}", "an emoji of {thing}", "a picture of {thing}", "draw {thing}")

AT = {  # a single subject's place
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "in the upper half"),
    "bottom": ("at the bottom", "in the lower half"),
}
PLACED = (  # {at} is "on the left"
    "{thing} {at} of {ground}",
    "{thing} {at}, {colour} background",
    "{thing} {at} on {colour}",
    "{bare} {at} on {colour}",
    "{bare}, {at}, {colour} background",
    "an emoji of {thing} {at} of {ground}",
    "a picture of {thing} {at} of {ground}",
    "a drawing of {thing} {at} of {ground}",
    "{ground} with {thing} {at}",
    "{at} of {ground}, {thing}",
    "{at}, {thing}, {colour} background",
    "draw {thing} {at} of {ground}",
)
AND = (
    "{first} and {second}",
    "{bare_first} and {bare_second}",
    "{first} with {second}",
    "{first} beside {second}",
    "{first} next to {second}",
)
LEFT_OF = (  # the first is the one on the left
    "{first} to the left of {second}",
    "{first} left of {second}",
    "{second} to the right of {first}",
    "{second} right of {first}",
    "{first} on the left and {second} on the right",
    "{first} on the left, {second} on the right",
)
ABOVE = (
    "{first} above {second}",
    "{second} below {first}",
    "{first} over {second}",
    "{second} under {first}",
    "{first} on top of {second}",
    "{first} at the top and {second} at the bottom",
)
STYLE_WORDS = {"3d": "3D", "flat": "flat"}
STYLED = ("{caption}, {style}", "{caption}, {style} style", "{caption} in {style} style")
DRAWN = frozenset({"an emoji", "a picture", "an image", "an icon", "a drawing"})


def with_article(words):
    """Puts "a" or "an" before words."""
    is_an = words.startswith(AN_PREFIXES) and not words.startswith(A_PREFIXES)
    return f"{'an' if is_an else 'a'} {words}"


def takes_article(name):
    """Tells "a red apple" from "grapes", "sushi" and "santa claus"."""
    words = name.split()
    ends = [place for place, word in enumerate(words) if word in PREPOSITIONS and place > 0]
    head = words[ends[0] - 1] if ends else words[-1]
    is_plural = head.endswith("s") and not head.endswith(("ss", "us", "os"))
    return not (is_plural or head in UNCOUNTABLE or name in PROPER_NAMES)


def _name(subject, *adjectives):
    """Returns a subject bare, "large flat red apple", and with its article if it takes one."""
    bare = " ".join([*filter(None, adjectives), subject])
    return bare, with_article(bare) if takes_article(subject) else bare


def list_captions(scene, names_style=None):
    """Lists all wordings of a scene, the common one first.

    Args:
        scene: the `Scene`.
        names_style: whether the captions say the style; None is only where it isn't the usual one.

    Returns:
        List of str: "a red apple on a blue background" and others, each once.
    """
    if names_style is None:
        names_style = scene.style != STYLES[0]
    style = STYLE_WORDS[scene.style] if names_style else None
    captions = _list_sentences(scene, style)  # the style beside the subject's name
    if style:
        plain = _list_sentences(scene, None)
        for number, caption in enumerate(plain):
            captions.append(STYLED[number % len(STYLED)].format(caption=caption, style=style))
            start = " ".join(caption.split()[:2])
            if start in DRAWN:  # "a flat picture of a red apple"
                drawn = with_article(f"{style} {start.split()[1]}")
                captions.append(drawn + caption[len(start) :])
    return list(dict.fromkeys(captions))


def _list_sentences(scene, style):
    """Lists captions with the style's word, or without where it is None, before each subject."""
    words = {"colour": scene.colour, "ground": with_article(f"{scene.colour} background")}
    if len(scene.subjects) == 2:
        things = _list_pairs(scene, style)
        return [
            wording.format(**words, thing=thing, bare=thing)
            for wording in (COMMON, *WORDINGS)
            for thing in things
        ]
    name = scene.subjects[0]
    bare, thing = _name(name, scene.size, style)
    words |= {"bare": bare, "thing": thing}
    if not scene.place:
        return [wording.format(**words) for wording in (COMMON, *WORDINGS)]
    captions = []
    sizes = [scene.size] if scene.size else [None, "small"]  # what has a place is small
    for size in sizes:
        bare, thing = _name(name, size, style)
        words |= {"bare": bare, "thing": thing}
        for at in AT[scene.place]:
            captions += [wording.format(**words, at=at) for wording in PLACED]
    return captions


def _list_pairs(scene, style):
    """Lists the phrases of two subjects: "a cat to the left of a dog", "a dog right of a cat"."""
    names = [_name(subject, style) for subject in scene.subjects]
    phrases = AND
    if scene.relation in ("left of", "right of"):
        phrases = LEFT_OF
    elif scene.relation:
        phrases = ABOVE
    if scene.relation in ("right of", "below"):  # the phrases tell them from the other side
        names = names[::-1]
    (bare_first, first), (bare_second, second) = names
    things = [
        phrase.format(first=first, second=second, bare_first=bare_first, bare_second=bare_second)
        for phrase in phrases
    ]
    return _own_phrase_first(things, scene.relation)


def _own_phrase_first(things, relation):
    """Puts the phrase that says the relation's own words first: "a dog to the right of a cat"."""
    own = {"right of": 2, "below": 1}.get(relation, 0)
    return [things[own], *things[:own], *things[own + 1 :]]


def list_unnamed(scene, names_style=None):
    """Lists captions that leave out the background's colour, which is then the usual one.

    Returns:
        List of str; empty where the colour isn't `UNNAMED_COLOUR` or the subject has a place.
    """
    if scene.colour != UNNAMED_COLOUR or scene.place:
        return []
    if names_style is None:
        names_style = scene.style != STYLES[0]
    style = STYLE_WORDS[scene.style] if names_style else None
    if len(scene.subjects) == 2:
        things = _list_pairs(scene, style)
        return [word.format(thing=thing, bare=thing) for word in UNNAMED for thing in things]
    bare, thing = _name(scene.subjects[0], scene.size, style)
    return [word.format(thing=thing, bare=bare) for word in UNNAMED]


def make_caption(scene):
    """Returns the common caption of a scene: "a red apple on a blue background"."""
    return list_captions(scene)[0]


COMMON_SHARE = 0.3  # of the captions in training
NAMED_STYLE_SHARE = 0.25  # of those of the usual style say it
UNNAMED_SHARE = 0.4  # of those on the usual background leave it out
ALIAS_SHARE = 0.25  # of the subjects that have another name are called by it


def draw_caption(rng, scene):
    """Draws a wording at random, as training has them."""
    called = tuple(
        ALIASES[name] if name in ALIASES and rng.random() < ALIAS_SHARE else name
        for name in scene.subjects
    )
    scene = replace(scene, subjects=called)
    names_style = scene.style != STYLES[0] or rng.random() < NAMED_STYLE_SHARE
    unnamed = list_unnamed(scene, names_style)
    if unnamed and rng.random() < UNNAMED_SHARE:
        return unnamed[rng.integers(len(unnamed))]
    captions = list_captions(scene, names_style)
    if rng.random() < COMMON_SHARE:
        return captions[0]
    return captions[rng.integers(len(captions))]


# --- Random scenes. ------------------------------------------------------------------------------

KINDS = {  # kind, and its share
    "plain": 0.46,
    "large": 0.06,
    "small": 0.07,
    "place": 0.11,
    "pair": 0.30,
}
FLAT_SHARE = 0.35
SHIFTS = (-CELL, 0, 0, CELL)  # pixels that a plain picture is moved, across and down
MIRRORED_SHARE = 0.25  # of single subjects


def draw_scene(rng, names, held_out=False, kind=None, style=None):
    """Draws a random scene.

    Args:
        rng: numpy Generator.
        names: of the subjects.
        held_out: whether it is one that is never trained on, or one that is.
        kind: a key of `KINDS`; None draws one.
        style: one of `STYLES`; None draws one.

    Returns:
        A `Scene`.
    """
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    style = style or STYLES[int(rng.random() < FLAT_SHARE)]
    while True:
        count = 2 if kind == "pair" else 1
        subjects = tuple(names[n] for n in rng.choice(len(names), count, replace=False))
        scene = Scene(subjects, str(rng.choice(list(COLOURS))), style)
        if kind in ("large", "small"):
            scene = replace(scene, size=kind)
        elif kind == "place":
            scene = replace(scene, place=str(rng.choice(list(PLACES))))
        elif kind == "pair":
            scene = replace(scene, relation=list(RELATIONS)[rng.integers(len(RELATIONS))])
        if is_held_out(scene) == held_out:
            return scene


def draw_variation(rng, scene):
    """Draws how one picture of a scene differs from another: keywords of `Sprites.draw`."""
    if len(scene.subjects) == 2:
        return {}
    shift = (0, 0)
    if not (scene.size or scene.place):
        shift = tuple(int(n) for n in rng.choice(SHIFTS, 2))
    return {"mirrored": (bool(rng.random() < MIRRORED_SHARE),), "shift": shift}


def draw_sheet(path, pictures, labels, columns):
    """Writes a contact sheet: uint8 RGB pictures with their labels below."""
    width, line, letters = SIZE + 8, 12, 22
    height = SIZE + 4 + 4 * line
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = place % columns * width + 4, place // columns * height + 2
        sheet.paste(Image.fromarray(picture), (x, y))
        for number, part in enumerate(textwrap.wrap(label, letters)[:4]):
            draw.text((x, y + SIZE + number * line), part, fill="black", font=font)
    sheet.save(path)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, help="what pictures.py wrote")
    parser.add_argument("--sheet", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    try:
        sprites = Sprites(load_pictures(args.pictures))
        rng = np.random.default_rng(args.seed)
        scenes = [draw_scene(rng, sprites.names) for _ in range(96)]
        drawn = [sprites.draw(scene, **draw_variation(rng, scene)) for scene in scenes]
        draw_sheet(args.sheet, drawn, [draw_caption(rng, scene) for scene in scenes], 12)
    except (OSError, ValueError) as error:
        print(f"compositions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
