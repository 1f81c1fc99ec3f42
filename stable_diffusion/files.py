"""Files and folders: finds files safely, and replaces a file or folder as a whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel has the folder inside the package; a checkout or editable install has it beside it.
WEIGHTS_DIR = (_PACKAGE if (_PACKAGE / "weights").is_dir() else _PACKAGE.parent) / "weights"


def find_file(folder, name):
    """Returns the path of a file in a folder, or None if there is no such file.

    The name may come from a file of unknown origin, such as an index in a checkpoint. It must not
    lead out of the folder. Links into the `blobs` folder beside a snapshot are accepted, because
    the cache of huggingface_hub consists of such links.

    Args:
        folder: path of the folder.
        name: path of the file, relative to the folder.

    Raises:
        ValueError: the name is empty or absolute, or it leads out of the folder, either by itself
            or through a link.
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
def replace_file(path):
    """Yields a temporary path to write to, and moves that file to `path` at the end.

    After an error nothing is moved, and the temporary file is removed. So readers see the old file
    or the whole new one.

    Args:
        path: path of a file, which may exist.
    """
    path = Path(path)
    written = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield written
        # Some libraries write files that only the owner can read.
        os.chmod(written, 0o666 & ~_read_umask())
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder, mark):
    """Yields a temporary folder to write to, and moves it to `folder` at the end.

    After an error nothing is moved, and the temporary folder is removed. If an older checkpoint is
    replaced, the files beside its `mark` are kept (a README, a licence), unless the new checkpoint
    has files of the same names. Subfolders of the older one are removed.

    Args:
        folder: path of a folder that does not exist, is empty, or contains `mark`.
        mark: name of a file or subfolder that every checkpoint of this format has.

    Raises:
        ValueError: the folder contains something else. It is not changed.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (
        folder.is_dir() and ((folder / mark).exists() or not any(folder.iterdir()))
    ):
        raise ValueError(
            f"{folder} is no checkpoint of this format, and isn't replaced. Pass a path that "
            f"doesn't exist, an empty folder, or a folder with {mark}."
        )
    written = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        written.mkdir(parents=True)
        yield written
        for path in written.rglob("*"):
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_read_umask())
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


def _read_umask():
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
