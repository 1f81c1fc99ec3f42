"""Prepares the pictures and captions that train the small embedded Stable Diffusion.

The pictures are the 128-pixel bitmaps of the Noto Color Emoji font (SIL OFL 1.1), the names are
Unicode's, from the `emoji` package. Drawn on plain coloured backgrounds they make captioned
examples that compose: "a red apple on a blue background".

    python scripts/emoji/first/emoji_data.py --out data.npz

Needs fonttools, emoji and pillow; without --font also Debian's apt-get and dpkg-deb.
In comments on shapes, N is the number of subjects.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import textwrap
import zipfile
import zlib
from pathlib import Path

import numpy as np

FONT_PACKAGE = "fonts-noto-color-emoji"
SIZE = 128  # height of the font's bitmaps, and side of every picture here
THUMBNAIL = 32  # side of the pictures that are compared
FILL = 112  # longer side of every subject: 87.5 % of the picture

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

SCALES = {None: 1.0, "large": 1.0, "small": 0.55}
SIDES = {  # the words, and the offset in pixels; a side needs room, so it implies the small scale
    "left": ("on the left", (-29, 0)),
    "right": ("on the right", (29, 0)),
    "top": ("at the top", (0, -29)),
    "bottom": ("at the bottom", (0, 29)),
}
SHIFT = 4  # pixels at most, and
SHRINK = 0.92  # at least, of the jitter that makes two pictures of one caption differ
PLAIN_SHARE = 0.65  # of all samples: centred, full size, the common template
COMMON_SHARE = 0.4  # of the other samples: still the common template

# A subject is a pictograph of these ranges. The gaps are signs, arrows, letters and clock faces.
RANGES = (
    (0x1F300, 0x1F4FF),  # nature, food, activities, animals, clothing, objects
    (0x1F56F, 0x1F5FF),  # more objects
    (0x1F600, 0x1F64F),  # faces
    (0x1F680, 0x1F6AA),  # vehicles
    (0x1F6CB, 0x1F6FF),  # furniture, more vehicles
    (0x1F900, 0x1F9FF),  # more faces, food, animals, clothing, objects
    (0x1FA70, 0x1FAFF),  # more of all
)
OBJECTS_ELSEWHERE = (
    "⌚⌛⌨⏰⏱☀☁☂☃☄☎☕☘☠♟⚓⚔⚖⚗⚙⚡⚰⚽⚾⛅⛈⛏⛑⛓⛩⛪⛰⛲⛴⛵⛸⛺⛽✂✈✉✏✒✨❄❤⭐"
    "🔋🔌🔍🔑🔒🔔🔖🔗🔥🔦🔧🔨🔩🔪🔫🔬🔭🔮🔱🕊🕌🕍🚬🚲🚽🚿🛁"
)
# People and hands are what comes in skin tones; they are dropped as such, except these.
SKIN_TONE = "\U0001f3fb"
PEOPLE_KEPT = "🎅👼👍"
MAX_WORDS = 4

EXCLUDED_WORDS = frozenset(
    "flag flags sign symbol button no oncoming person people silhouette speaker small".split()
)
EXCLUDED_NAMES = frozenset(
    name.strip()
    for names in (
        # signs, tiles and abstract marks
        "cyclone, cinema, musical score, flower playing cards, family, speaking head, zzz",
        "diamond with a dot, heart decoration, white flower, hundred points, currency exchange",
        "chart increasing with yen, vibration mode, mobile phone off, antenna bars, khanda",
        "dashing away, sweat droplets, dizzy, left speech bubble, right anger bubble, wireless",
        "place of worship, elevator, globe with meridians, level slider, map of japan, biting lip",
        "pouring liquid, wedding, foggy, fog, moon viewing ceremony, dotted line face",
        "envelope with arrow, mobile phone with arrow",
        # the same look as another subject
        "night with stars, sunrise over mountains, cityscape at dusk, globe showing americas",
        "globe showing asia-australia, new moon, waxing crescent moon, first quarter moon",
        "waxing gibbous moon, waning gibbous moon, last quarter moon, waning crescent moon",
        "new moon face, first quarter moon face, last quarter moon face, sun behind large cloud",
        "front-facing baby chick, woman's clothes, love hotel, japanese post office",
        "admission tickets, yen banknote, pound banknote, computer disk, dvd, page with curl",
        "tear-off calendar, card index, card index dividers, card file box, bookmark tabs",
        "notebook with decorative cover, outbox tray, inbox tray, e-mail, incoming envelope",
        "linked paperclips, fountain pen, ballot box with ballot, low battery, light rail",
        "high-speed train, station, tram car, suspension railway, mountain railway",
        "aerial tramway, passenger ship, airplane departure, airplane arrival",
        "horizontal traffic light, 1st place medal, 2nd place medal, 3rd place medal",
        # faces that differ from another only in a nuance
        "grinning squinting face, grinning face with sweat, relieved face, face savoring food",
        "smirking face, expressionless face, downcast face with sweat, pensive face",
        "confused face, confounded face, disappointed face, persevering face, hushed face",
        "sad but relieved face, anguished face, weary face, sleepy face, tired face",
        "anxious face with sweat, astonished face, squinting face with tongue, drooling face",
        "face with raised eyebrow, woozy face, face holding back tears, smiling face with tear",
        "face with diagonal mouth, shaking face, angry face with horns, grinning cat",
        "cat with wry smile, kissing cat, weary cat",
    )
    for name in names.split(",")
)
RENAMED = {  # official names that describe a variant or are no nouns
    "globe showing europe-africa": "globe",
    "headphone": "headphones",
    "high voltage": "lightning bolt",
    "hourglass done": "hourglass",
    "locked": "padlock",
    "magnifying glass tilted left": "magnifying glass",
    "star-struck": "star-struck face",
    "vertical traffic light": "traffic light",
}

# What stays where subjects that look alike are thinned out: what one thinks of first.
FAMILIAR = frozenset(
    name.strip()
    for names in (
        "red apple, carrot, pineapple, watermelon, pear, pizza, hamburger, hot dog, cookie",
        "doughnut, birthday cake, popcorn, tulip, cactus, palm tree, christmas tree, horse, bear",
        "elephant, giraffe, koala, rabbit, rabbit face, mouse, hedgehog, snake, spider, ant, crab",
        "butterfly, owl, snail, turtle, flamingo, bat, cow face, cat face, dog face, pig face",
        "tiger face, frog, panda, penguin, snowman, volcano, mountain, cloud, fire, balloon, bell",
        "hammer, spoon, teapot, chair, door, bicycle, violin, trumpet, traffic light, teddy bear",
        "magnifying glass, padlock, hot beverage, guitar, rose, sunflower, octopus, anchor",
        "star, tent, shark, duck, motorcycle, flying saucer, grinning face, thinking face",
    )
    for name in names.split(",")
)

# The grammar of the names: which take 'an', and which take no article.
AN_PREFIXES = ("a", "e", "i", "o", "u", "hour", "x-ray")
A_PREFIXES = ("uni", "one-", "ewe", "euro")  # the exceptions among them
PREPOSITIONS = frozenset("at behind blowing from in of on with without".split())
UNCOUNTABLE = frozenset(
    "bacon badminton bowling bread broccoli butter camping candy construction cooking coral cream"
    " dango dna falafel fire food garlic hockey ice lacrosse lightning luggage meat money oden"
    " pong popcorn rice sake salt soap spaghetti sushi tea tennis thread wood yarn".split()
)
PROPER_NAMES = frozenset({"santa claus", "statue of liberty", "mount fuji", "tokyo tower"})


def natural_name(name):
    """Turns the package's ':red_apple:' into 'red apple'."""
    words = name.strip(":").replace("_", " ").lower()
    words = words.replace("’", "'").replace("ñ", "n")
    return RENAMED.get(words, words)


def is_subject(char, name, known):
    """Tells whether an emoji is one of the subjects.

    Args:
        char: the emoji, one code point.
        name: its natural name.
        known: all emoji, to look up whether this one comes in skin tones.
    """
    in_ranges = any(first <= ord(char) <= last for first, last in RANGES)
    is_person = char + SKIN_TONE in known and char not in PEOPLE_KEPT
    words = name.split()
    return (
        (in_ranges or char in OBJECTS_ELSEWHERE)
        and not is_person
        and len(words) <= MAX_WORDS
        and EXCLUDED_WORDS.isdisjoint(words)
        and name not in EXCLUDED_NAMES
    )


def fit(picture):
    """Centres a subject in the picture and brings its longer side to `FILL` pixels.

    Args:
        picture: PIL image, RGBA, any size.

    Returns:
        PIL image, RGBA, `SIZE` by `SIZE`. Pillow resizes RGBA with premultiplied alpha, so the
        colour hidden in transparent pixels does not bleed into the edges.
    """
    from PIL import Image

    picture = picture.crop(picture.getchannel("A").getbbox())
    factor = FILL / max(picture.size)
    size = [max(1, round(side * factor)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    result = Image.new("RGBA", (SIZE, SIZE))
    result.paste(picture, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return result


def extract(font_path):
    """Reads the subjects from a font file.

    Args:
        font_path: path to NotoColorEmoji.ttf with colour bitmaps (table CBDT).

    Returns:
        Names, list of str, in the order of the code points; pictures, uint8 (N, 128, 128, 4).

    Raises:
        ValueError: the file is no font or has no colour bitmaps.
    """
    from fontTools.ttLib import TTFont, TTLibError
    from PIL import Image

    import emoji

    try:
        font = TTFont(font_path)
        bitmaps, glyph_of = font["CBDT"].strikeData[0], font.getBestCmap()
    except (TTLibError, KeyError) as error:
        raise ValueError(f"{font_path}: not a font with colour bitmaps ({error})") from error

    subjects = {}
    for sequence, entry in sorted(emoji.EMOJI_DATA.items()):
        char = sequence.rstrip("\ufe0f")  # the variation selector asks for the coloured form
        name = natural_name(entry["en"])
        is_whole = entry["status"] == emoji.STATUS["fully_qualified"]  # else a part, as a hair
        if not is_whole or len(char) != 1 or ord(char) not in glyph_of:
            continue
        if is_subject(char, name, emoji.EMOJI_DATA):
            png = bitmaps[glyph_of[ord(char)]].imageData
            subjects.setdefault(name, fit(Image.open(io.BytesIO(png)).convert("RGBA")))
    return list(subjects), np.stack([np.asarray(picture) for picture in subjects.values()])


def run(command, cwd):
    """Runs a command and raises an OSError with its last line of complaint if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{' '.join(map(str, command))}: {complaint}")


def read_font(font, folder):
    """Finds the font: a .ttf as it is, a .deb unpacked, or the Debian package downloaded.

    Args:
        font: path to a .ttf or .deb file, or None to download the package.
        folder: temporary folder for what is downloaded and unpacked.

    Returns:
        Names and pictures, see `extract`.

    Raises:
        OSError, ValueError: there is no such file, or no such font in it.
    """
    if font is not None and not font.is_file():
        raise OSError(f"{font}: no such file")
    if font is None:
        run(["apt-get", "download", FONT_PACKAGE], cwd=folder)
        font = next(Path(folder).glob("*.deb"))
    if font.suffix == ".deb":
        run(["dpkg-deb", "-x", font.resolve(), "."], cwd=folder)
        package, font = font, next(Path(folder).rglob("NotoColorEmoji.ttf"), None)
        if font is None:
            raise ValueError(f"{package}: holds no NotoColorEmoji.ttf")
    return extract(font)


def save(path, names, pictures):
    """Writes the data set; a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, names=np.array(names), pictures=pictures)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """Reads the data set.

    Args:
        path: the file that this script wrote.

    Returns:
        Names, list of str; pictures, uint8 (N, 128, 128, 4), RGBA.

    Raises:
        OSError, ValueError: there is no such file, or it holds something else.
    """
    with open(path, "rb") as file:
        try:
            data = np.load(file)
            return data["names"].tolist(), data["pictures"]
        except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a data set of emoji ({error})") from error


def read_subjects(folder, names, pictures):
    """Chooses the subjects of a checkpoint, in the order of its subjects.txt.

    Args:
        folder: the checkpoint's, see scripts/emoji/first/train_emoji.py.
        names, pictures: the data set, see `load`.

    Returns:
        Names and pictures of the chosen ones.

    Raises:
        ValueError: the checkpoint doesn't say, or the data set hasn't all of them.
    """
    path = Path(folder) / "subjects.txt"
    if not path.is_file():
        raise ValueError(f"there is no {path}, which tells what the checkpoint draws")
    subjects = path.read_text("utf-8").splitlines()
    if missing := sorted(set(subjects) - set(names)):
        raise ValueError(f"{path}: the data set hasn't these subjects: {', '.join(missing)}")
    return subjects, pictures[[names.index(subject) for subject in subjects]]


def thumbnails(pictures):
    """Shrinks pictures to `THUMBNAIL` pixels a side, by averaging.

    Args:
        pictures: array (N, 128, 128, C).

    Returns:
        float32 (N, 32, 32, C).
    """
    factor = SIZE // THUMBNAIL
    count, _, _, channels = pictures.shape
    blocks = pictures.reshape(count, THUMBNAIL, factor, THUMBNAIL, factor, channels)
    return blocks.mean((2, 4), dtype="float32")


def distances(one, other):
    """Compares each picture of one set with each of another.

    Args:
        one, other: thumbnails, float32 (N, 32, 32, 3) and (M, 32, 32, 3), of 0 to 255.

    Returns:
        float32 (N, M), the mean squared errors.
    """
    one, other = (x.reshape(len(x), -1) for x in (one, other))
    squares = np.sum(one**2, axis=1)[:, None] + np.sum(other**2, axis=1)
    return np.maximum(squares - 2 * one @ other.T, 0) / one.shape[1]


def distinct(names, pictures, count):
    """Chooses the subjects that are easiest to tell apart.

    Of the two that are closest on average over all backgrounds, one is dropped, until `count` are
    left: the one that isn't in `FAMILIAR` or, where neither is, has the longer name.

    Args:
        names: list of str.
        pictures: uint8 (N, 128, 128, 4), RGBA.
        count: how many to keep.

    Returns:
        Names and pictures of the kept ones, in the same order.
    """
    alpha = pictures[..., 3:] / np.float32(255)
    inside, alpha = thumbnails(pictures[..., :3] * alpha), thumbnails(alpha)
    distance = np.zeros((len(names), len(names)), "float32")
    for rgb in COLOURS.values():
        drawn = inside + (1 - alpha) * np.array(rgb, "float32")
        distance += distances(drawn, drawn)
    np.fill_diagonal(distance, np.inf)
    familiar = [n for n, name in enumerate(names) if name in FAMILIAR]
    distance[np.ix_(familiar, familiar)] = np.inf
    kept = list(range(len(names)))
    while len(kept) > max(count, len(familiar), 1):
        pair = np.unravel_index(distance.argmin(), distance.shape)
        worse = max(pair, key=lambda n: (names[n] not in FAMILIAR, len(names[n]), n))
        distance[worse] = distance[:, worse] = np.inf
        kept.remove(worse)
    return [names[n] for n in kept], pictures[kept]


def held_out(name, colour):
    """Tells whether a pair of subject and background is kept from training: one in ten."""
    return zlib.crc32(f"{name}|{colour}".encode()) % 10 == 0


def compose(picture, rgb, scale=1.0, offset=(0, 0)):
    """Draws a subject on a plain background.

    Args:
        picture: uint8 (128, 128, 4), RGBA; blended in sRGB.
        rgb: the background, three values of 0 to 255.
        scale: size of the picture relative to the result, above 0 and at most 1.
        offset: pixels to the right and down from the centre; clipped so that the picture stays
            inside, at scale 1 therefore without effect.

    Returns:
        uint8 (128, 128, 3).

    Raises:
        ValueError: the scale is out of range.
    """
    from PIL import Image

    if not 0 < scale <= 1:
        raise ValueError(f"scale must be above 0 and at most 1, got {scale}")
    side = max(1, round(SIZE * scale))
    subject = Image.fromarray(picture)
    if side != SIZE:
        subject = subject.resize((side, side), Image.Resampling.LANCZOS)
    room = SIZE - side
    corner = tuple(min(max(room // 2 + round(shift), 0), room) for shift in offset)
    result = Image.new("RGB", (SIZE, SIZE), tuple(rgb))
    result.paste(subject, corner, subject)
    return np.array(result)


def with_article(words):
    """Puts 'a' or 'an' before words."""
    is_an = words.startswith(AN_PREFIXES) and not words.startswith(A_PREFIXES)
    return f"{'an' if is_an else 'a'} {words}"


def takes_article(name):
    """Tells 'a red apple' from 'grapes', 'sushi' and 'santa claus'."""
    words = name.split()
    ends = [place for place, word in enumerate(words) if word in PREPOSITIONS and place > 0]
    head = words[ends[0] - 1] if ends else words[-1]
    is_plural = head.endswith("s") and not head.endswith(("ss", "us", "os"))
    return not (is_plural or head in UNCOUNTABLE or name in PROPER_NAMES)


def captions(name, colour, size=None, side=None):
    """Describes a picture, in each of the ways that there are.

    Args:
        name: the subject.
        colour: name of the background's colour.
        size: None, "small" or "large".
        side: None, "left", "right", "top" or "bottom".

    Returns:
        List of str, lower case; first the common one, "a red apple on a blue background".

    Raises:
        ValueError: an unknown size or side.
    """
    if size not in SCALES:
        raise ValueError(f"size must be one of {list(SCALES)}, got {size!r}")
    if side is not None and side not in SIDES:
        raise ValueError(f"side must be None or one of {list(SIDES)}, got {side!r}")
    bare = f"{size} {name}" if size else name
    thing = with_article(bare) if takes_article(name) else bare
    ground = with_article(f"{colour} background")
    place, comma = (f"{SIDES[side][0]} of", f" {SIDES[side][0]},") if side else ("on", ",")
    common = f"{thing} {place} {ground}"
    return [
        common,
        f"{bare} {f'{SIDES[side][0]}, ' if side else ''}on {colour}",
        f"a picture of {thing}{comma} {colour} background",
        f"an emoji of {common}",
    ]


def caption(name, colour, rng=None, size=None, side=None):
    """Describes a picture.

    Args:
        name, colour, size, side: see `captions`.
        rng: numpy Generator that picks one of `captions`; None takes the common one.

    Returns:
        str, lower case.

    Raises:
        ValueError: an unknown size or side.
    """
    common, *others = captions(name, colour, size, side)
    if rng is None or rng.random() < COMMON_SHARE:
        return common
    return others[rng.integers(len(others))]


def jitter(rng):
    """Draws how a plain picture departs from the centre and the full size, see `compose`.

    Args:
        rng: numpy Generator.

    Returns:
        Scale and offset. There is room for all of the offset only where the scale leaves it.
    """
    return rng.uniform(SHRINK, 1), tuple(rng.uniform(-SHIFT, SHIFT, 2))


def sample(rng, names, pictures, split="train"):
    """Draws one captioned picture.

    Args:
        rng: numpy Generator.
        names: list of str.
        pictures: uint8 (N, 128, 128, 4), RGBA.
        split: "train" for the pairs of subject and background to train on, "held_out" for the
            others.

    Returns:
        Picture, uint8 (128, 128, 3); caption, str.

    Raises:
        ValueError: an unknown split, or none of the pairs belongs to it.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    colours = list(COLOURS)
    for _ in range(10_000):
        index, colour = rng.integers(len(names)), colours[rng.integers(len(colours))]
        if held_out(names[index], colour) == (split == "held_out"):
            break
    else:
        raise ValueError(f"no pair of these {len(names)} subjects is in the split {split!r}")
    name, picture, rgb = names[index], pictures[index], COLOURS[colour]

    if rng.random() < PLAIN_SHARE:
        return compose(picture, rgb), caption(name, colour)
    side = [None, None, None, None, *SIDES][rng.integers(8)]
    size = ([None, "small"] if side else list(SCALES))[rng.integers(2 if side else 3)]
    scale, offset = (SCALES["small"], SIDES[side][1]) if side else (SCALES[size], (0, 0))
    return compose(picture, rgb, scale, offset), caption(name, colour, rng, size, side)


def draw_sheet(path, pictures, labels, columns):
    """Writes a contact sheet: uint8 RGB pictures with their labels below."""
    from PIL import Image, ImageDraw, ImageFont

    width, line, letters = SIZE + 8, 12, 22
    height = SIZE + 4 + 3 * line
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = place % columns * width + 4, place // columns * height + 2
        sheet.paste(Image.fromarray(picture), (x, y))
        for number, part in enumerate(textwrap.wrap(label, letters)[:3]):
            draw.text((x, y + SIZE + number * line), part, fill="black", font=font)
    sheet.save(path)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the data set to write, .npz")
    parser.add_argument("--font", type=Path, help=f"NotoColorEmoji.ttf or {FONT_PACKAGE}_*.deb")
    parser.add_argument("--sheet", type=Path, help="also draw all subjects with names, .png")
    parser.add_argument("--samples", type=Path, help="also draw random samples, .png")
    args = parser.parse_args(argv)

    try:
        with tempfile.TemporaryDirectory() as folder:
            names, pictures = read_font(args.font, folder)
        save(args.out, names, pictures)
        if args.sheet:
            white = [compose(picture, COLOURS["white"]) for picture in pictures]
            draw_sheet(args.sheet, white, names, columns=16)
        if args.samples:
            rng = np.random.default_rng(0)
            draws = [sample(rng, names, pictures) for _ in range(96)]
            draw_sheet(args.samples, *zip(*draws, strict=True), columns=12)
    except (OSError, ValueError) as error:
        print(f"emoji_data: {error}", file=sys.stderr)
        return 2

    pairs = [(name, colour) for name in names for colour in COLOURS]
    kept = sum(held_out(*pair) for pair in pairs)
    print(f"{args.out}: {len(names)} subjects, {len(COLOURS)} backgrounds,", end=" ")
    print(f"{len(pairs)} pairs, {kept} of them held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
