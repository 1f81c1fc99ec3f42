"""A folder of pictures and their captions, and how a picture becomes what the VAE encodes.

Captions are where other tools put them:

    metadata.jsonl    {"file_name": "cat.png", "text": "a cat on a mat"}, one object a line
    metadata.csv      with the columns file_name and text
    cat.txt           beside cat.png, where there is no metadata file

The first two are the convention of Hugging Face's image folders, the third is kohya's. Names may
lead into subfolders, but not out of the folder.
"""

import csv
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stable_diffusion.files import find_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_NAMES = 5  # in an error


@dataclass(frozen=True)
class Example:
    """A picture and its captions, of which one is chosen each time.

    Attributes:
        path: path of the picture.
        captions: tuple of str.
        digest: sha256 of the file, empty as long as it hasn't been read.
    """

    path: Path
    captions: tuple[str, ...]
    digest: str = ""

    def with_digest(self):
        """Returns the example with its file's digest."""
        return replace(self, digest=hashlib.sha256(self.path.read_bytes()).hexdigest())


class View(NamedTuple):
    """What of a picture is seen: the place of the crop, 0 to 1 each, and whether it is mirrored."""

    x: float
    y: float
    flip: bool


def read_folder(folder: str | Path, captions: list[str] | None = None) -> list[Example]:
    """Lists the pictures of a folder with their captions; the pictures aren't opened yet.

    Args:
        folder: path.
        captions: of every picture, in place of those in the folder; None reads them from there.

    Returns:
        List of `Example`, sorted by path.

    Raises:
        ValueError: no such folder, no picture in it, a picture without a caption, or a metadata
            file that can't be read or names a file that isn't there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    metadata = [path for path in (folder / name for name in METADATA) if path.is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{folder} has both {' and '.join(METADATA)}; one must go.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} has no pictures ({', '.join(SUFFIXES)}).")
    if captions:
        return [Example(path, tuple(captions)) for path in paths]
    if metadata:
        known = _read_metadata(folder, metadata[0])
    else:
        texts = {path: path.with_suffix(".txt") for path in paths}
        known = {path: _read_text(text) for path, text in texts.items() if text.is_file()}
    if missing := [str(path.relative_to(folder)) for path in paths if not known.get(path)]:
        more = ", ..." if len(missing) > MAX_NAMES else ""
        where = metadata[0].name if metadata else "a .txt beside it"
        raise ValueError(
            f"{folder}: {len(missing)} of {len(paths)} pictures have no caption in {where}: "
            f"{', '.join(missing[:MAX_NAMES])}{more}."
        )
    return [Example(path, (known[path],)) for path in paths]


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no text file in UTF-8: {error}") from error


def _read_metadata(folder, path):
    """Returns a dict from a picture's path to its caption."""
    lines = _read_text(path).splitlines()
    try:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(lines))
        else:
            rows = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    captions = {}
    for number, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {}
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{path}: entry {number} needs file_name and text, both strings.")
        picture = find_file(folder, name)
        if picture is None:
            raise ValueError(f"{path}: entry {number} names {name!r}, which isn't there.")
        captions[picture] = text.strip()
    return captions


def list_views(example: Example, crops: int = 1, flip: bool = False) -> list[View]:
    """Returns the views of a picture that are encoded; of the same picture always the same.

    Args:
        example: with its digest, which determines the places of random crops.
        crops: 1 for the centre, more for so many random places.
        flip: whether each is also seen in a mirror.
    """
    if crops == 1:
        places = [(0.5, 0.5)]
    else:
        rng = np.random.default_rng(int(example.digest[:16], 16))
        places = [tuple(place) for place in rng.random((crops, 2)).round(4).tolist()]
    return [View(*place, mirrored) for place in places for mirrored in (False, True)[: 1 + flip]]
