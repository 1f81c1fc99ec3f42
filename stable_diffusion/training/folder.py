"""Lists the images of a folder with their captions, and the views of an image.

Captions are in one of these places:

    metadata.jsonl    one object in each line: {"file_name": "cat.png", "text": "a cat on a mat"}
    metadata.csv      a table with the columns file_name and text
    cat.txt           beside cat.png, if there is no metadata file

Hugging Face's image folders have the first two, kohya's programs the third. A file_name may lead
into subfolders, but not out of the folder.
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
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
MAX_NAMES = 5  # of images without a caption, in an error


@dataclass(frozen=True)
class Example:
    """An image and its captions. Whenever the image is used, one of them is chosen.

    Attributes:
        path: path of the image.
        captions: tuple of str.
        digest: sha256 of the file; empty before the file is read.
    """

    path: Path
    captions: tuple[str, ...]
    digest: str = ""

    def with_digest(self):
        """Returns the example with the digest of its file."""
        return replace(self, digest=hashlib.sha256(self.path.read_bytes()).hexdigest())


class View(NamedTuple):
    """A view of an image.

    Attributes:
        x, y: place of the crop from 0 to 1, see `images.crop_image`.
        flip: whether it is mirrored.
    """

    x: float
    y: float
    flip: bool


def read_folder(folder: str | Path, captions: list[str] | None = None) -> list[Example]:
    """Lists the images of a folder with their captions. Does not open the images.

    Args:
        folder: path of the folder. Images in subfolders count, too.
        captions: captions of every image. None reads each image's caption from the folder.

    Returns:
        List of `Example`, sorted by path.

    Raises:
        ValueError: there is no such folder, it has no image, an image has no caption, or the
            metadata file cannot be read or names a missing file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    metadata = [path for path in (folder / name for name in METADATA_FILES) if path.is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{folder} has both {' and '.join(METADATA_FILES)}; remove one.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    if captions:
        return [Example(path, tuple(captions)) for path in paths]
    if metadata:
        known = _read_metadata(folder, metadata[0])
    else:
        texts = {path: path.with_suffix(".txt") for path in paths}
        known = {path: _read_text(text) for path, text in texts.items() if text.is_file()}
    if missing := [str(path.relative_to(folder)) for path in paths if not known.get(path)]:
        more = ", ..." if len(missing) > MAX_NAMES else ""
        where = metadata[0].name if metadata else "a .txt file beside them"
        raise ValueError(
            f"{folder}: {len(missing)} of {len(paths)} images have no caption in {where}: "
            f"{', '.join(missing[:MAX_NAMES])}{more}."
        )
    return [Example(path, (known[path],)) for path in paths]


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no text file in UTF-8: {error}") from error


def _read_metadata(folder, path):
    """Returns a dict from the path of an image to its caption."""
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
        image = find_file(folder, name)
        if image is None:
            raise ValueError(f"{path}: entry {number} names {name!r}, which doesn't exist.")
        captions[image] = text.strip()
    return captions


def list_views(example: Example, crops: int = 1, flip: bool = False) -> list[View]:
    """Returns the views of an image to encode. They are always the same for the same file.

    Args:
        example: an `Example` with its digest, from which the random places follow.
        crops: number of places. 1 is the centre; more are random places.
        flip: whether each place is also used mirrored.
    """
    if crops == 1:
        places = [(0.5, 0.5)]
    else:
        rng = np.random.default_rng(int(example.digest[:16], 16))
        places = [tuple(place) for place in rng.random((crops, 2)).round(4).tolist()]
    return [View(*place, mirrored) for place in places for mirrored in (False, True)[: 1 + flip]]
