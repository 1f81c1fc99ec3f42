"""Replaces a file, or a checkpoint's files in a folder: as a whole or not at all.

A folder is saved in three steps, so that a kill at any moment leaves the old or the new checkpoint:

1. The new files are written into the hidden subfolder `files.HIDDEN`, and flushed to the disk.
2. A record of their names is flushed and renamed to `files.RECORD`. From now on the new checkpoint
   is the valid one: `files.find_file` finds the new files where they are.
3. Each file is renamed into its place. Then the hidden subfolder is removed.

After a kill before step 2 the next save discards the new files, and after a later kill it goes on
with step 3. A lock tells a killed save from a living one, see `locking`.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from stable_diffusion.files import HIDDEN, RECORD, STAGED, list_files, read_record
from stable_diffusion.locking import PREFIX, hold_folder, make_temporary, try_to

MAX_NAMES = 5  # in an error
# How libraries state the number of an error of the system: safetensors and HDF5.
SYSTEM_ERROR = re.compile(r"\b(?:os error|errno =) (\d+)")


@dataclass(frozen=True)
class FolderKind:
    """What a save writes into a folder, and what it must not meet there.

    All names are relative to the folder.

    Attributes:
        name: what errors call such a folder.
        owned: names of the files that a save may write.
        recognize: function of a folder; returns whether it is of this kind, so that a save may
            replace its files.
        optional: those of `owned` that are removed when a save does not write them, because the
            old ones would be read together with the new files.
        rivals: dict from a subfolder ("" is the folder) to a pattern of names. A reader would take
            such a file for one that is saved. A folder with one is refused.
    """

    name: str
    owned: frozenset[str]
    recognize: Callable
    optional: frozenset[str] = frozenset()
    rivals: dict[str, str] = field(default_factory=dict)


def check_output(path, kind: FolderKind | None = None):
    """Checks whether `replace_file` or `replace_folder` can write a path. Leaves it as it is.

    It finds what it can before hours of work. Besides the checks of these functions it tries to
    write, and removes the temporary files that killed calls left there.

    Args:
        path: path of a file, or of a folder if there is a kind.
        kind: the `FolderKind`, or None.

    Raises:
        ValueError: see `replace_folder` and `replace_file`.
        OSError: the system does not allow it.
    """
    real = _check_folder(path, kind) if kind else _check_file(path)
    with _name_in_errors(path), hold_folder(real) if kind else make_temporary(real.parent):
        pass


def check_folder(path):
    """Checks whether files can be written into a folder, which is made if it does not exist.

    Raises:
        ValueError: the path, or one above it, is a file.
        OSError: the system does not allow it.
    """
    real = Path(os.path.realpath(path))
    while not os.path.lexists(real) and real != real.parent:
        real = real.parent
    if not real.is_dir():
        raise ValueError(f"{path} can't be a folder: {real} is a file.")
    with _name_in_errors(path), make_temporary(real):
        pass


@contextmanager
def replace_file(path, flush: bool = True):
    """Yields a temporary path to write to, and moves that file to `path` at the end.

    After an error nothing is moved, and the temporary file is removed. So readers see the old file
    or the whole new one. If the path is a link, it stays one, and its target is replaced.

    Args:
        path: path of a file, which may exist. Its folder must exist.
        flush: whether to wait until the disk has the file. A file that may get lost, such as one
            of a cache, does not need that.

    Raises:
        ValueError: the path is a folder or no regular file, or its folder is missing.
        OSError: the system does not allow it, or the disk is full. The error names the path.
    """
    real = _check_file(path)
    with _name_in_errors(path), make_temporary(real.parent) as folder:
        written = folder / STAGED
        yield written
        # Some libraries write files that only the owner can read.
        os.chmod(written, 0o666 & ~_read_umask())
        if flush:
            _flush(written)
        os.replace(written, real)
        if flush:
            _flush(real.parent)


@contextmanager
def replace_folder(folder, kind: FolderKind):
    """Yields a temporary folder to write to, and moves its files into `folder` at the end.

    Of a folder of the same kind only the files that the kind owns are replaced. All other files and
    folders stay as they are. After an error before the files are moved nothing is changed.

    Args:
        folder: path of a folder that does not exist, is empty, or is of this kind. The folder
            above it must exist.
        kind: the `FolderKind`.

    Raises:
        ValueError: the folder contains something else, or a file that a reader would take for a
            new one; a file to replace is a link, a folder or a mount point; or another process is
            saving to the folder. Nothing is changed then.
        OSError: the system does not allow it, or the disk is full. The error names the path.
    """
    real = _check_folder(folder, kind)
    with _name_in_errors(folder), hold_folder(real) as hidden:
        _finish_save(real, kind)
        staged, made = hidden / STAGED, []
        os.mkdir(staged)
        yield staged
        for path in staged.rglob("*"):
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_read_umask())
            _flush(path)
        paths = [path for path in staged.rglob("*") if path.is_file()]
        moved = {path.relative_to(staged).as_posix() for path in paths}
        if foreign := moved - kind.owned:
            raise ValueError(f"A {kind.name} has no {min(foreign)}.")
        removed = {name for name in kind.optional - moved if (real / name).is_file()}
        try:
            # What may need space on the disk comes before the record.
            for parent in sorted({p for name in moved for p in PurePosixPath(name).parents}):
                if not (real / parent).exists():
                    os.mkdir(real / parent)
                    made.insert(0, real / parent)
            for path in (staged, real, real.parent):
                _flush(path)
            _write_record(hidden, {"moved": sorted(moved), "removed": sorted(removed)})
        except BaseException:
            for parent in made:
                try_to(os.rmdir, parent)
            raise
        _finish_save(real, kind)


def _write_record(hidden, record):
    part = hidden / f"{RECORD}.part"
    try:
        part.write_text(json.dumps(record), "utf-8")
        _flush(part)
        os.replace(part, hidden / RECORD)
    finally:
        try_to(os.unlink, part)
    _flush(hidden)


def _finish_save(folder, kind):
    """Moves the files of a record into their places; without a record, discards new files."""
    hidden, record = folder / HIDDEN, read_record(folder)
    staged = hidden / STAGED
    if staged.is_symlink():
        raise ValueError(f"{staged} must be a folder that this package made.")
    if foreign := (record.moved | record.removed) - kind.owned:
        raise ValueError(
            f"{folder} has an unfinished save of something else than a {kind.name}: it names "
            f"{min(foreign):.200}. Finish it with another save of the same kind, or remove "
            f"{hidden}."
        )
    if record.moved or record.removed:
        for name in sorted(record.moved):
            if (staged / name).is_file():
                os.makedirs((folder / name).parent, exist_ok=True)
                os.replace(staged / name, folder / name)
        for name in record.removed:
            with suppress(FileNotFoundError):
                os.unlink(folder / name)
        for name in {PurePosixPath(name).parent for name in record.moved | record.removed}:
            _flush(folder / name)
        os.unlink(hidden / RECORD)
        _flush(hidden)
    if staged.exists():
        shutil.rmtree(staged)


# --- Checks -------------------------------------------------------------------------------------


def _check_file(path):
    """Returns the path of a file with all links resolved; for errors see `replace_file`."""
    real = Path(os.path.realpath(path))
    _check_parent(path, real)
    if os.path.lexists(real):
        _check_owned(path, real, _list_mounts(), folder=False)
        if real.parent.name == "blobs" and real.parent.parent.name.startswith("models--"):
            raise ValueError(f"{path} is a file in the cache of the hub, and isn't replaced.")
    else:
        with suppress(FileNotFoundError):
            os.stat(real)  # a name that is too long raises its own error
    return real


def _check_folder(path, kind):
    """Returns the path of a folder with all links resolved; for errors see `replace_folder`."""
    real = Path(os.path.realpath(path))
    if not os.path.lexists(real):
        _check_parent(path, real)
        return real
    if not real.is_dir():
        raise ValueError(f"{path} is a file, and a {kind.name} needs a folder.")
    ours = {real / parent for name in kind.owned for parent in PurePosixPath(name).parents}
    there = [
        entry.name
        for entry in sorted(real.iterdir())
        if entry.name != HIDDEN and not (entry in ours and entry.is_dir() and _is_empty(entry))
    ]
    if there and not kind.recognize(real):
        raise ValueError(
            f"{path} is not empty, and it is no {kind.name}: it has {_join(there)}. Pass a new or "
            f"an empty folder."
        )
    rivals = [
        PurePosixPath(subfolder, name).as_posix()
        for subfolder, pattern in kind.rivals.items()
        for name in list_files(real, subfolder)
        if re.fullmatch(pattern, name)
    ]
    if rivals := sorted({*rivals} - kind.owned):
        raise ValueError(
            f"{path} has {_join(rivals)}, which a program could load instead of what is saved. "
            f"Remove that first, or pass a new folder."
        )
    mounts = _list_mounts()
    for name in sorted(kind.owned):
        _check_owned(path, real / name, mounts, folder=False)
        for parent in PurePosixPath(name).parents:
            _check_owned(path, real / parent, mounts - {str(real)}, folder=True)
    return real


def _check_parent(path, real):
    if not real.parent.is_dir():
        raise ValueError(f"{path} can't be written: there is no folder {real.parent}.")


def _check_owned(path, place, mounts, folder):
    """Raises an error if a file cannot be renamed to a place, or a folder cannot get files.

    Args:
        path: what the user wants to write, for the error.
        place: path of the file or folder.
        mounts: set of all mount points.
        folder: whether it must be a folder.
    """
    if not os.path.lexists(place):
        return
    mode = os.lstat(place).st_mode
    if stat.S_ISLNK(mode):
        wrong = f"is a link to {os.path.realpath(place)}, which isn't changed"
    elif not folder and stat.S_ISDIR(mode):
        wrong = "is a folder, not a file"
    elif not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        wrong = f"is no {'folder' if folder else 'regular file'}"
    elif str(place) in mounts:
        wrong = "is a mount point, where nothing can be renamed to"
    elif not os.access(place, os.W_OK | (os.X_OK if folder else 0)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    else:
        return
    raise ValueError(f"{path} can't be written: {place} {wrong}.")


def _is_empty(folder):
    return not any(path.is_symlink() or not path.is_dir() for path in folder.rglob("*"))


def _list_mounts():
    """Returns the paths of all mount points; where the system does not list them, none."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return set()
    octal = re.compile(r"\\(\d{3})")  # a space is \040
    return {octal.sub(lambda match: chr(int(match[1], 8)), line.split()[4]) for line in lines}


def _join(names):
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


@contextmanager
def _name_in_errors(path):
    """Lets errors of the system name the path that the user knows, also those of libraries."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number is None and (match := SYSTEM_ERROR.search(str(error))):
            number = int(match[1])
        name = getattr(error, "filename", None)
        if number is None or (name is not None and PREFIX not in str(name)):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _flush(path):
    """Waits until the disk has a file, or the names in a folder."""
    folder = os.path.isdir(path)
    try:
        file = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:  # Windows, and some file systems, flush no folders
        if not folder or error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def _read_umask():
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
