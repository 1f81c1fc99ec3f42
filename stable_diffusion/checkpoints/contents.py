"""What a file is. Its content tells, because people rename files; errors say what was found."""

import re
import stat
import zipfile
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

SAFETENSORS, TORCH, HDF5 = "a safetensors file", "a PyTorch file", "an HDF5 file"
# The first pickle of PyTorch's files before version 1.6: torch.serialization.MAGIC_NUMBER.
LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
STARTS = (  # of files, and what such a file is
    (b"\x89HDF\r\n\x1a\n", HDF5),
    (LEGACY_TORCH, TORCH),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    (b"GGUF", "a GGUF file, which isn't supported"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"RIFF", "an image"),
    (b"7z\xbc\xaf", "an archive: unpack it first"),
    (b"Rar!", "an archive: unpack it first"),
    (b"\x1f\x8b", "an archive: unpack it first"),
    (b"\x80", "a pickle, but not one of PyTorch"),
)
TYPES = (  # what a path may be, apart from a file
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
HEADER = 512  # bytes at the beginning of a file that are looked at
MAX_HEADER = 100_000_000  # bytes of a safetensors header, in the library
QUOTED = 200  # characters of a file that an error quotes at most


def quote(value):
    """Returns what a file has as text for an error: its first `QUOTED` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def check_file(path):
    """Raises a ValueError unless a path is that of a file: no folder, pipe or device.

    To open a pipe would wait for its writer, and a device may have no end.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ValueError(explain_missing(path)) from error
    if not stat.S_ISREG(mode):
        what = next((name for test, name in TYPES if test(mode)), "something else")
        raise ValueError(f"{path} must be a file; it is {what}.")


def explain_missing(path):
    """Returns a sentence about a path that does not exist, with the nearest name that does."""
    path = Path(path)
    with suppress(OSError, ValueError, StopIteration):
        if path.is_symlink():
            return f"{path} is a link to {path.readlink()}, which doesn't exist."
        folder = next(parent for parent in path.parents if parent.is_dir())
        wanted = path.relative_to(folder).parts[0]
        if near := get_close_matches(wanted, [other.name for other in folder.iterdir()], 1):
            return f"There is no {path}. Did you mean {folder / near[0]}?"
    return f"There is no {path}."


def describe_content(path):
    """Returns what a file is: `SAFETENSORS`, `TORCH`, `HDF5`, or a phrase for an error.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(HEADER)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}.") from error
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return _describe_zip(path)
    for known, what in STARTS:
        if start.startswith(known):
            return what
    return _describe_text(start) if start else "empty"


def _describe_zip(path):
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a zip file that is truncated or damaged: download it again"
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH
    return "a zip file, but not one of PyTorch"


def _describe_text(start):
    text = start.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if re.match(r"(<!--.*?-->\s*)?<(!doctype html|html|head|\?xml)", text, re.I | re.S):
        return "a web page: the download was answered with an error or a form"
    shown = quote(" ".join(text.split()))
    if text[:1] in ("{", "["):
        return f"a JSON text: {shown}"
    if shown and shown.isprintable() and "\ufffd" not in shown[:24]:
        return f"a text: {shown}"
    return f"of no known format: it begins with {start[:24]!r}"
