"""Files and folders: found where they are allowed to be, written whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel has the folder inside the package; a checkout or editable install has it beside it.
WEIGHTS_DIR = (_PACKAGE if (_PACKAGE / "weights").is_dir() else _PACKAGE.parent) / "weights"


def find_file(folder, name):
    """Returns the path of a file of a folder, or None if there is no such file.

    Args:
        folder: path of the checkpoint's folder.
        name: path of the file in it, as a checkpoint may say: a text of unknown origin.

    Raises:
        ValueError: the name is absolute or leads out of the folder, by itself or through a link.
            Links into the `blobs` beside a snapshot, as in huggingface_hub's cache, are in order.
    """
    folder, name = Path(folder), str(name)
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} has a name that leads out of it: {name!r}.")
    path = folder / name
    if not path.is_file():
        return None
    homes = [folder.resolve()]
    homes += [p.parent.parent / "blobs" for p in (homes[0], *homes[0].parents) if _is_snapshot(p)]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link that leads out of {folder}, to {path.resolve()}.")
    return path


def _is_snapshot(folder):
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


@contextmanager
def new_file(path):
    """Gives the path of a temporary file that takes the place of `path` if nothing goes wrong."""
    path = Path(path)
    written = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield written
        os.chmod(written, 0o666 & ~_umask())  # what a library writes can be for the owner alone
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def new_folder(folder, mark):
    """Gives the path of a temporary folder that takes the place of `folder` in the end.

    Of a checkpoint that was there before, files that lie beside `mark` are kept (a README, a
    licence) unless the new one has them, and subfolders are not.

    Args:
        folder: path of a folder that doesn't exist, is empty, or has the file or folder `mark`.
        mark: name in it that tells a checkpoint of this format.

    Raises:
        ValueError: a folder of something else, which is left alone.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (
        folder.is_dir() and ((folder / mark).exists() or not any(folder.iterdir()))
    ):
        raise ValueError(f"{folder} is no checkpoint of this format; it isn't replaced.")
    written = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        written.mkdir(parents=True)
        yield written
        for path in written.rglob("*"):
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())
        if folder.exists():
            for old in folder.iterdir():
                if old.is_file() and not (written / old.name).exists():
                    shutil.copy2(old, written)
            folder.rename(replaced)
        try:
            written.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
