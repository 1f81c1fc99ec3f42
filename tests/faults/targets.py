"""Targets of saves: an old checkpoint with foreign files beside or in it."""

import os

import pytest
import writing
from children import call

LARGE = [pytest.param(format, marks=pytest.mark.large) for format in ("keras", "convert")]
FORMATS = ["diffusers", "original", "kerascv", *LARGE]
if os.environ.get("FAULTS_BACKEND") == "openvino":
    FORMATS = ["openvino"]
KILLS = 8  # unless `--kills` says another number
FOREIGN = ("README.md", "samples/1.png", ".git/HEAD", "src/train.py")


def count_kills(request, share):
    """Returns how many of all kills a test gets, at least one."""
    return max(1, round((request.config.getoption("--kills") or KILLS) * share))


def name_target(format, folder):
    return folder / ("model.safetensors" if format == "original" else "model-v1.5")


def list_files(folder):
    """Returns the content of each file, or None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def prepare(format, folder):
    """Saves the old checkpoint, and puts foreign files beside or into it."""
    target = name_target(format, folder)
    folder.mkdir()
    call(writing.save, format, str(target), 0)
    for name in FOREIGN:
        path = (folder if format == "original" else target) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"foreign {name}")
    return target


def check_foreign(files):
    foreign = {text for text in files.values() if text and text.startswith(b"foreign")}
    assert foreign == {f"foreign {name}".encode() for name in FOREIGN}
