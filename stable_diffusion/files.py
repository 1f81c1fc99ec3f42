"""Finds files: those of the package, and those of a folder that somebody may be saving to.

`replacing` writes folders. While it moves new files into place, and after it was killed then, a
record in the folder says which files are new and which are gone. Readers find files with
`find_file` and `list_files`, which follow the record. They write nothing.
"""

import json
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_PACKAGE = Path(__file__).resolve().parent
# A wheel has the folder inside the package; a checkout or editable install has it beside it.
WEIGHTS_DIR = (_PACKAGE if (_PACKAGE / "weights").is_dir() else _PACKAGE.parent) / "weights"
HIDDEN = ".stable-diffusion-save"  # subfolder of a folder that is being saved
STAGED = "new"  # its subfolder of new files
RECORD = "commit.json"  # its file: the record
MAX_RECORD = 1 << 20  # bytes; ours have less than 2000


class Record(NamedTuple):
    """The names of files that become valid or invalid together, relative to their folder.

    Attributes:
        moved: new files. They are in `STAGED`, or already in their place.
        removed: old files that are no longer valid, or already gone.
    """

    moved: frozenset[str]
    removed: frozenset[str]


def read_record(folder) -> Record:
    """Returns the record of a folder; without one, a record of no files.

    Raises:
        ValueError: the record is damaged, or it has a name that leads out of the folder.
    """
    path = Path(folder, HIDDEN, RECORD)
    if not path.is_file():
        return Record(frozenset(), frozenset())
    try:
        with path.open(encoding="utf-8") as file:
            data = json.loads(file.read(MAX_RECORD))
        lists = [data[field] for field in Record._fields]
        if not all(isinstance(names, list) and all(map(_is_inside, names)) for names in lists):
            raise ValueError("a name leads out of the folder")
    except FileNotFoundError:  # the save has just ended
        return Record(frozenset(), frozenset())
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no intact record of a save: {error!r:.200}. Remove {path.parent} if you "
            f"don't know where it comes from."
        ) from error
    return Record(*map(frozenset, lists))


def find_file(folder, name):
    """Returns the path of a file in a folder, or None if there is no such file.

    The name may come from a file of unknown origin, such as an index in a checkpoint. It must not
    lead out of the folder. Links into the `blobs` folder beside a snapshot are accepted, because
    the cache of huggingface_hub consists of such links.

    Args:
        folder: path of the folder. If it is a checkpoint, that of the whole checkpoint.
        name: path of the file, relative to the folder.

    Raises:
        ValueError: the name is empty or absolute, or it leads out of the folder, either by itself
            or through a link; or the record of a killed save is damaged.
    """
    folder, name = Path(folder), str(name)
    if not _is_inside(name):
        raise ValueError(f"{folder} has a name that leads out of it: {name!r:.200}.")
    record, plain = read_record(folder), PurePosixPath(name).as_posix()
    if plain in record.removed:
        return None
    staged = folder / HIDDEN / STAGED / name
    path = staged if plain in record.moved and staged.is_file() else folder / name
    if not path.is_file():
        return None
    homes = [folder.resolve()]
    homes += [p.parent.parent / "blobs" for p in (homes[0], *homes[0].parents) if is_snapshot(p)]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link that leads out of {folder}, to {path.resolve()}.")
    return path


def list_files(folder, subfolder="") -> list[str]:
    """Returns the names of the files in a folder or in one of its subfolders, sorted.

    Args:
        folder: see `find_file`.
        subfolder: path of the subfolder, relative to the folder.

    Raises:
        ValueError: the record of a killed save is damaged.
    """
    record, where = read_record(folder), Path(folder, subfolder)
    there = [path.name for path in where.iterdir() if path.is_file()] if where.is_dir() else []
    names = {PurePosixPath(subfolder, name) for name in there}
    names |= {p for p in map(PurePosixPath, record.moved) if p.parent == PurePosixPath(subfolder)}
    return sorted(path.name for path in names if path.as_posix() not in record.removed)


def _is_inside(name):
    """Returns whether a name is a path that stays in its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def is_snapshot(folder):
    """Returns whether a folder is a snapshot in the cache of huggingface_hub."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
