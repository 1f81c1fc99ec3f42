"""Gets the pictures that train the embedded checkpoint: 520 subjects in two styles.

    python scripts/emoji/pictures.py --out pictures.npz

The style "3d" is Microsoft's Fluent Emoji (MIT), 256 pixels a side, from the npm package
@lobehub/fluent-emoji-3d. The style "flat" is Google's Noto Color Emoji (SIL OFL 1.1), 128 pixels
high, from Debian's package fonts-noto-color-emoji. Both are checked by their hash. Where npm or
apt-get can't get them, --fluent and --noto name the files.

Needs fonttools and pillow; without --fluent npm, without --noto Debian's apt-get and dpkg-deb.
"""

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"
FLUENT_SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
NOTO = "fonts-noto-color-emoji"  # 2.042
NOTO_SHA256 = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"  # of the .ttf
SUBJECTS = Path(__file__).with_name("subjects.tsv")
SIDES = {"3d": 256, "flat": 136}  # pixels of the largest picture of each style


def read_subjects():
    """Returns a dict from each subject's name to its emoji, a code point in hexadecimal."""
    rows = [line.split("\t") for line in SUBJECTS.read_text("utf-8").splitlines()]
    return {name: code for code, name in rows}


def check_hash(data, sha256, what):
    """Raises a ValueError if the bytes aren't those that the hash is of."""
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{what}: its sha256 is {found}, not {sha256}")


def run_command(command, folder):
    """Runs a command; raises an OSError with its last line if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(f"{command[0]} isn't installed; {command[-1]} comes from it") from error
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{' '.join(map(str, command))}: {complaint}")


def find_file(folder, pattern, what):
    """Returns the first file in a folder, at any depth; raises an OSError if there is none."""
    for path in sorted(Path(folder).rglob(pattern)):
        return path
    raise OSError(f"{what} holds no {pattern}")


def center(picture, side):
    """Crops the transparent rim away and centres what is left: RGBA, uint8 `(side, side, 4)`."""
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    result = Image.new("RGBA", (side, side))
    result.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.array(result)


def read_fluent(path, codes):
    """Reads the subjects from the npm package.

    Args:
        path: the .tgz file.
        codes: of the subjects, see `read_subjects`.

    Returns:
        uint8 `(subjects, 256, 256, 4)`.

    Raises:
        OSError, ValueError: there is no such file, or it is another one.
    """
    check_hash(Path(path).read_bytes(), FLUENT_SHA256, path)
    pictures = []
    with tarfile.open(path) as package:
        names = set(package.getnames())
        for code in codes:
            paths = [f"package/assets/{code}{end}.webp" for end in ("", "-fe0f")]
            member = next(name for name in paths if name in names)
            pictures.append(center(Image.open(package.extractfile(member)), SIDES["3d"]))
    return np.stack(pictures)


def read_noto(path, codes):
    """Reads the subjects from the font, a .ttf or a .deb with it.

    Returns:
        uint8 `(subjects, 136, 136, 4)`.

    Raises:
        OSError, ValueError: there is no such file, or it is another one.
    """
    from fontTools.ttLib import TTFont

    with tempfile.TemporaryDirectory() as folder:
        if Path(path).suffix == ".deb":
            run_command(["dpkg-deb", "-x", Path(path).resolve(), "."], folder)
            path = find_file(folder, "NotoColorEmoji.ttf", path)
        data = Path(path).read_bytes()
    check_hash(data, NOTO_SHA256, path)
    font = TTFont(io.BytesIO(data))
    bitmaps, glyphs = font["CBDT"].strikeData[0], font.getBestCmap()
    images = [Image.open(io.BytesIO(bitmaps[glyphs[int(code, 16)]].imageData)) for code in codes]
    return np.stack([center(image, SIDES["flat"]) for image in images])


def get_pictures(fluent=None, noto=None):
    """Gets the pictures of all subjects, downloading what no path is given of.

    Returns:
        dict from style to uint8 `(subjects, side, side, 4)`, RGBA.
    """
    codes = read_subjects().values()
    with tempfile.TemporaryDirectory() as folder:
        if fluent is None:
            run_command(["npm", "pack", FLUENT], folder)
            fluent = find_file(folder, "*.tgz", FLUENT)
        if noto is None:
            run_command(["apt-get", "download", NOTO], folder)
            noto = find_file(folder, "*.deb", NOTO)
        return {"3d": read_fluent(fluent, codes), "flat": read_noto(noto, codes)}


def save_pictures(path, pictures):
    """Writes the data set; a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **pictures)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_pictures(path):
    """Reads the data set that this script wrote.

    Returns:
        dict from style to uint8 `(subjects, side, side, 4)`, RGBA.

    Raises:
        OSError, ValueError: there is no such file, or it holds something else.
    """
    count = len(read_subjects())
    with open(path, "rb") as file:
        try:
            data = np.load(file)
            pictures = {style: data[style] for style in SIDES}
        except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: isn't a data set of pictures.py ({error})") from error
    for style, side in SIDES.items():
        if (shape := pictures[style].shape) != (count, side, side, 4):
            raise ValueError(f"{path}: pictures of the style {style!r} have the shape {shape}")
    return pictures


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the data set to write, .npz")
    parser.add_argument("--fluent", type=Path, help="the .tgz that npm pack writes")
    parser.add_argument("--noto", type=Path, help="NotoColorEmoji.ttf, or Debian's .deb with it")
    args = parser.parse_args(argv)
    try:
        pictures = get_pictures(args.fluent, args.noto)
        save_pictures(args.out, pictures)
    except (OSError, ValueError) as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(read_subjects())} subjects in {len(pictures)} styles")
    return 0


if __name__ == "__main__":
    sys.exit(main())
