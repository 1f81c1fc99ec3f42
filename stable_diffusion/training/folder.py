"""Lists the images of a folder with their captions, and the views of an image.

Images are the files with one of the `SUFFIXES`, also in subfolders, and all files that a metadata
file names. `captions.py` says where captions are. Links are followed wherever they lead, because
the user gave the folder, but a name in a metadata file must not lead out of it.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stable_diffusion.training.captions import (
    find_metadata,
    find_texts,
    normalize_name,
    read_caption,
    read_metadata,
)

SUFFIXES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .avif .bmp .gif .tif .tiff"
    " .heic .heif .jxl".split()  # those need a plugin of Pillow; without it they are unreadable
)
# Names of what systems and programs put into folders, in lower case. Others begin with a dot.
SYSTEM_NAMES = (
    *("@eadir", "#recycle", "__macosx", "thumbs.db", "desktop.ini", "lost+found"),
    *("$recycle.bin", "system volume information"),
)
RUN_FILES = ("settings.json", "loss.csv")  # that tell a folder of a run
REPEATS = re.compile(r"([0-9]+)_.*", re.DOTALL)  # kohya's names of folders, such as 10_cat
MAX_REPEATS = 9999
MAX_NAMES = 5  # of images without a caption, in an error


@dataclass(frozen=True)
class Example:
    """An image and its captions. Whenever the image is used, one of them is chosen.

    Attributes:
        path: path of the image.
        captions: tuple of str.
        digest: sha256 of the file; empty before the file is read.
        repeats: how many times as often as others it is used.
    """

    path: Path
    captions: tuple[str, ...]
    digest: str = ""
    repeats: int = 1

    def with_digest(self):
        """Returns the example with the digest of its file.

        Raises:
            ValueError: there is no such file.
        """
        if not self.path.is_file():
            raise ValueError(f"{self.path} can't be opened: there is no such file")
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


def read_folder(
    folder: str | Path,
    captions: list[str] | None = None,
    exclude: Iterable[str | Path] = (),
    repeats: bool = False,
) -> list[Example]:
    """Lists the images of a folder with their captions. Does not open the images.

    Not listed are hidden files and folders, the `SYSTEM_NAMES`, and folders of other runs.

    Args:
        folder: path of the folder. Images in subfolders count, too. A folder that several links
            lead to counts once.
        captions: captions of every image; files with captions are not read then. None reads each
            image's caption from the folder.
        exclude: paths of files and folders that are not listed either: what a run writes.
        repeats: whether an image in a folder `10_name` is used 10 times as often, as in kohya's
            programs.

    Returns:
        List of `Example`, sorted by path.

    Raises:
        ValueError: there is no such folder, it has no image, an image has no caption, the
            metadata file cannot be read, or it names a missing file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    files = _list_files(folder, exclude)
    metadata = None if captions else find_metadata(folder)
    known = _read_captions(folder, metadata, files) if metadata else {}
    paths = sorted({*known, *(path for path in files.values() if _has_suffix(path))})
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    if captions:
        known = dict.fromkeys(paths, captions)
    elif not metadata:
        texts = find_texts(files.values())
        known = {path: [text] for path in paths if (text := read_caption(path, texts))}
    if missing := [str(path.relative_to(folder)) for path in paths if not known.get(path)]:
        more = ", ..." if len(missing) > MAX_NAMES else ""
        where = metadata.name if metadata else "a .txt or .caption file beside them"
        raise ValueError(
            f"{folder}: {len(missing)} of {len(paths)} images have no caption in {where}: "
            f"{', '.join(missing[:MAX_NAMES])}{more}."
        )
    return [
        Example(path, tuple(known[path]), repeats=count_repeats(folder, path) if repeats else 1)
        for path in paths
    ]


def count_repeats(folder: Path, path: Path) -> int:
    """Returns how often kohya's programs use an image: 10 times in a folder `10_name`.

    Args:
        folder: path of the folder of images.
        path: path of an image in it.

    Raises:
        ValueError: the number is 0 or above `MAX_REPEATS`.
    """
    for name in reversed(path.relative_to(folder).parts[:-1]):
        if match := REPEATS.fullmatch(name):
            if not 1 <= int(match[1]) <= MAX_REPEATS:
                raise ValueError(f"{path}: {name} must begin with a number from 1 to {MAX_REPEATS}")
            return int(match[1])
    return 1


def _list_files(folder, exclude):
    """Lists what may be data in a folder: a dict from a file's identity to its path.

    The path is the one without links, if there is one.
    """
    own = {place for path in exclude for place in (_identify(path), os.path.realpath(path))}
    files, seen, folders, links = {}, set(), [str(folder)], []
    while folders or links:
        place = (folders or links).pop()
        real = os.path.realpath(place)
        if real in seen or (place != str(folder) and _is_private(real, own)):
            continue
        seen.add(real)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            identity = os.path.join(real, entry.name)
            if _is_hidden(entry.name) or identity in own:
                continue
            if os.path.isdir(entry.path):
                (links if entry.is_symlink() else folders).append(entry.path)
            else:
                files[identity] = Path(entry.path)
    return files


def _identify(path):
    """Returns what all paths of a file have in common: the real folder and the file's name."""
    path = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _is_private(folder, own):
    """Tells whether a folder belongs to a run: this one, or another one."""
    return folder in own or all(os.path.isfile(os.path.join(folder, n)) for n in RUN_FILES)


def _has_suffix(path):
    return path.suffix.lower() in SUFFIXES


def _read_captions(folder, metadata, files):
    """Returns the captions in a metadata file: dict from the path of an image to a list of str."""
    names = {path.relative_to(folder).as_posix(): path for path in files.values()}
    names = {normalize_name(name): path for name, path in names.items()} | names
    captions = {}
    for where, name, text in read_metadata(metadata):
        wanted = Path(name)
        if not name or "\0" in name or wanted.is_absolute() or ".." in wanted.parts:
            raise ValueError(f"{where} has a name that leads out of {folder}: {name!r:.200}")
        path = names.get(wanted.as_posix()) or names.get(normalize_name(wanted.as_posix()))
        if path is None:
            if not (folder / wanted).is_file():
                raise ValueError(f"{where} names {name!r:.200}, which doesn't exist.")
            path = files.get(_identify(folder / wanted))  # through a link to a folder
        if path is None:
            raise ValueError(
                f"{where} names {name!r:.200}, which is no data: it is hidden, or belongs to the "
                f"system or to a run."
            )
        captions.setdefault(path, []).extend([text] if text else [])
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
