"""Saves to a disk that is full: one error that names the path, and nothing has changed."""

import subprocess

import pytest
import writing
from children import call
from mutate import make_generator
from targets import FORMATS, check_foreign, list_files, prepare

TIMES = 1  # of each format, or a tenth of `--kills`


def check_refused(error, target, before, after):
    assert error is not None, "it was saved"
    assert str(target) in error and "\n" not in error, error
    check_foreign(after)
    assert after == before


@pytest.mark.parametrize("format", FORMATS)
def test_no_large_files(format, tmp_path, request):
    target = prepare(format, tmp_path / "in")
    if format == "convert":
        call(writing.save, format, str(target), 1)  # also makes the source
    before = list_files(tmp_path / "in")
    sizes = [len(content) for content in before.values() if content]
    for number in range(max(TIMES, (request.config.getoption("--kills") or 0) // 10)):
        size = int(make_generator(f"disk {format}", number).integers(max(sizes)))
        seed = 1 if format == "convert" else 2
        error = call(writing.fail_to_save, format, str(target), seed, size)
        check_refused(error, target, before, list_files(tmp_path / "in"))


@pytest.mark.large
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        for format in ("diffusers", "original", "keras", "kerascv"):
            folder = disk / format
            target = prepare(format, folder)
            size = sum(len(content) for content in list_files(folder).values() if content)
            free = 1000 * int(subprocess.check_output(["stat", "-fc", "%a", disk])) * 4
            filler = disk / "filler"
            filler.write_bytes(bytes(max(0, free - size // 2)))
            before = list_files(folder)
            error = call(writing.try_to_save, format, str(target), 1)
            check_refused(error, target, before, list_files(folder))
            filler.unlink()
            assert call(writing.try_to_save, format, str(target), 1) is None
            subprocess.run(["rm", "-r", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
