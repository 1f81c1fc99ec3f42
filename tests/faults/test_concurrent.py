"""Several processes that write to one place at the same time."""

import pytest
import writing
from children import Child, call
from targets import check_foreign, list_files, prepare

ROUNDS = 1  # or a tenth of `--kills`


@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_two_saves_to_one_place(format, tmp_path, request):
    target = prepare(format, tmp_path / "in")
    names = set(list_files(tmp_path / "in"))
    right = []
    for seed in (1, 2):
        call(writing.save, format, str(target), seed)
        right.append(call(writing.identify, str(target)))
    for _ in range(max(ROUNDS, (request.config.getoption("--kills") or 0) // 10)):
        children = [Child(writing.try_to_save) for _ in right]
        for seed, child in enumerate(children, 1):
            child.send(format, str(target), seed)
        errors = [child.receive() for child in children]
        for child in children:
            child.kill()
        refused = [error for error in errors if error]
        assert len(refused) < 2, refused
        assert all(str(target) in error and "\n" not in error for error in refused)
        saved = [state for state, error in zip(right, errors, strict=True) if not error]
        assert call(writing.identify, str(target)) in saved
        files = list_files(tmp_path / "in")
        check_foreign(files)
        assert set(files) == names


def test_two_processes_with_one_cache(tmp_path):
    (tmp_path / "in").mkdir()
    target = tmp_path / "in" / "cache"
    children = [Child(writing.save) for _ in range(2)]
    for child in children:
        child.send("cache", str(target), 0)
    for child in children:
        child.receive()
        child.kill()
    files = list_files(target)
    call(writing.save, "cache", str(tmp_path / "in" / "other"), 0)
    assert files == list_files(tmp_path / "in" / "other")
