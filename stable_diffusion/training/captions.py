"""Captions: metadata files, text files beside the images, and captions that are too long.

Where several could be the caption of an image, this is the order:

    metadata.jsonl    one object in each line: {"file_name": "cat.png", "text": "a cat on a mat"}
    metadata.csv      a table with the columns file_name and text
    cat.png.txt, cat.png.caption, cat.txt, cat.caption    beside cat.png

If there is a metadata file, text files are not read. An empty text file counts as none. The endings
.txt and .caption may be in upper case.
"""

import csv
import json
import os
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

from stable_diffusion.checkpoints.contents import check_file

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
TEXT_SUFFIXES = (".txt", ".caption")
# Where a caption may be cut: after each word, and after each character of scripts without spaces.
PIECES = re.compile(r"[^\W\u2e80-\U0010ffff]+|.", re.DOTALL)


def normalize_name(name: str) -> str:
    """Returns a file's name in Unicode's form NFC: "é" may be one character or two."""
    return unicodedata.normalize("NFC", name)


def find_metadata(folder: Path) -> Path | None:
    """Returns the path of a folder's metadata file, or None.

    Raises:
        ValueError: the folder has both kinds, or it is no file but, for example, a pipe.
    """
    found = [path for path in (folder / name for name in METADATA_FILES) if os.path.lexists(path)]
    for path in found:
        check_file(path)
    if len(found) > 1:
        raise ValueError(f"{folder} has both {' and '.join(METADATA_FILES)}; remove one.")
    return found[0] if found else None


def read_metadata(path: Path) -> list[tuple[str, str, str]]:
    """Reads a metadata file.

    Returns:
        List of tuples, one for each entry: where it is in the file, for errors; the name of an
        image; and its caption.

    Raises:
        ValueError: the file cannot be read, or an entry is something else.
    """
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                entries = list(_read_rows(file))
        else:  # not splitlines(): a caption may contain any other line break, such as U+2028
            lines = path.read_text("utf-8-sig").split("\n")
            entries = [json.loads(line) for line in lines if line.strip(" \t\r")]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    found = []
    for number, entry in enumerate(entries, 1):
        values = [entry.get(key) for key in COLUMNS] if isinstance(entry, dict) else []
        where = f"{path}: entry {number}"
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where} needs file_name and text, both strings.")
        try:
            "".join(values).encode()
        except UnicodeEncodeError as error:  # "\ud800" in JSON
            raise ValueError(f"{where} is no Unicode text: {error}") from error
        found.append((where, values[0], values[1].strip()))
    return found


def _read_rows(file):
    """Yields the rows of a table as dicts.

    Raises:
        ValueError, csv.Error: a column is missing, or a row does not fit.
    """
    reader = csv.DictReader(file, strict=True)  # strict: an open quote would swallow what follows
    header = list(reader.fieldnames or [])
    if any(header.count(column) != 1 for column in COLUMNS):
        raise ValueError(
            f"its first row must have the columns {' and '.join(COLUMNS)}, separated by commas, "
            f"not {','.join(header)!r:.200}"
        )
    for number, row in enumerate(reader, 1):
        if None in row:  # where DictReader puts what it has too much
            raise ValueError(
                f"entry {number} (line {reader.line_num}) has {len(header) + len(row[None])} "
                f"fields, not {len(header)}; a text with commas needs quotes"
            )
        yield row


def find_texts(paths: list[Path]) -> dict[tuple[str, str], Path]:
    """Returns those of some files that may be captions, as a dict for `read_caption`."""
    # Of a.TXT and a.txt the second is sorted last and wins.
    return {
        (os.path.realpath(path.parent), normalize_name(path.stem) + path.suffix.lower()): path
        for path in sorted(paths)
        if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()
    }


def read_caption(image: Path, texts: dict[tuple[str, str], Path]) -> str:
    """Reads the caption from the text file beside an image; "" if there is none.

    Args:
        image: path of the image.
        texts: the result of `find_texts`.

    Raises:
        ValueError: the file is not in UTF-8.
    """
    parent = os.path.realpath(image.parent)
    for base in (image.name, image.stem):
        for suffix in TEXT_SUFFIXES:
            path = texts.get((parent, normalize_name(base) + suffix))
            if path and (text := _read_text(path)):
                return text
    return ""


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no text file in UTF-8: {error}") from error


def find_long_captions(tokenizer, examples: list, limit: int) -> dict[str, tuple[int, list[Path]]]:
    """Finds captions that have too many tokens.

    Args:
        tokenizer: the tokenizer of the checkpoint.
        examples: list of `Example`.
        limit: greatest number of tokens, start and end included.

    Returns:
        Dict from each such caption to the number of its tokens and the paths of its images.
    """
    lengths, found = {}, {}
    for example in examples:
        for text in dict.fromkeys(example.captions):
            if text not in lengths:
                lengths[text] = len(tokenizer.encode(text))
            if lengths[text] > limit:
                found.setdefault(text, (lengths[text], []))[1].append(example.path)
    return found


def truncate_captions(tokenizer, examples: list, limit: int) -> list:
    """Cuts captions that have too many tokens after the last word that fits.

    Args and returns are those of `find_long_captions` and a list of `Example`.
    """
    cut = {
        text: _truncate(tokenizer, text, limit)
        for text in find_long_captions(tokenizer, examples, limit)
    }
    return [
        replace(example, captions=tuple(cut.get(text, text) for text in example.captions))
        for example in examples
    ]


def _truncate(tokenizer, text, limit):
    """Returns the longest beginning of a text that fits, at the end of a word where possible."""

    def find_longest(ends):
        fits, too_long = 0, len(ends)  # numbers of pieces
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            piece = text[: ends[middle - 1]]
            if tokenizer.count_least(piece) <= limit and len(tokenizer.encode(piece)) <= limit:
                fits = middle
            else:
                too_long = middle
        return text[: ends[fits - 1]].rstrip() if fits else ""

    return find_longest([match.end() for match in PIECES.finditer(text)]) or find_longest(
        range(1, len(text) + 1)  # the first word is too long itself
    )
