"""Files and folders are replaced as a whole or not at all, and nobody else's file is touched.

A kill is simulated: from some call on, every function of the system that changes files raises
`Killed`, so that nothing is cleaned up either.
"""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import FEW, ROOT

from stable_diffusion import Decoder, StableDiffusion, locking
from stable_diffusion.checkpoints import (
    FORMATS,
    check_target,
    kerascv,
    open_checkpoint,
    tensors,
)
from stable_diffusion.files import HIDDEN, RECORD, STAGED, find_file, list_files
from stable_diffusion.locking import PREFIX, remove_leftovers
from stable_diffusion.replacing import (
    FolderKind,
    check_folder,
    check_output,
    replace_file,
    replace_folder,
)

CHANGES = ("mkdir", "rmdir", "replace", "unlink", "open", "chmod", "fsync")
KIND = FolderKind(
    "test checkpoint",
    frozenset(
        ["mark", "unet/config", "unet/parameters", "config/vae/parameters", "tokenizer/added"]
    ),
    lambda folder: find_file(folder, "mark") is not None,
    optional=frozenset(["tokenizer/added"]),
    rivals={"unet": "parameters.*"},
)
OLD = {name: f"old {name}" for name in KIND.owned - {"config/vae/parameters"}}
NEW = {name: f"new {name}" for name in KIND.owned - {"tokenizer/added"}}
MINE = {"src/main.py": "mine", "unet/notes": "mine", "README": "mine", ".git/unet/config": "mine"}


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def save(folder, files, kind=KIND):
    with replace_folder(folder, kind) as staged:
        write(staged, files)


def read(folder):
    """Returns what a reader sees: dict from the names of the kind to texts."""
    paths = {name: find_file(folder, name) for name in KIND.owned}
    return {name: path.read_text() for name, path in paths.items() if path}


def read_all(folder):
    """Returns all that is in a folder, with links as they are."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Flushes nothing: hundreds of times would take a minute."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@contextmanager
def kill(monkeypatch, call):
    """Kills at a call, counted from 0; yields a list that has one entry for each call."""
    calls = []

    def wrap(function):
        def count(*args, **options):
            calls.append(function)
            if len(calls) > call:
                raise Killed
            return function(*args, **options)

        return count

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, wrap(getattr(os, name)))
        yield calls


# Killed


@pytest.mark.parametrize("before", [OLD | MINE, {}, None], ids=["replaced", "empty", "new"])
def test_a_kill_leaves_the_old_or_the_new_files(before, tmp_path, monkeypatch):
    seen, mine = [], MINE if before else {}
    while "done" not in seen:
        folder = tmp_path / f"{len(seen)}"
        if before is not None:
            folder.mkdir()
            write(folder, before)
        with kill(monkeypatch, len(seen)), suppress(Killed):
            save(folder, NEW)
            seen.append("done")
        if "done" not in seen:
            found, there = read(folder), read_all(folder) if folder.exists() else {}
            assert found in (NEW, OLD if before else {}), f"killed before call {len(seen)}"
            seen.append("new" if found == NEW else "old")
            names = [name for name in (*found, *mine) if name.startswith("unet/")]
            assert [f"unet/{name}" for name in list_files(folder, "unet")] == sorted(names)
            assert there == (read_all(folder) if folder.exists() else {}), "a reader has written"
            check_output(folder, KIND)
        save(folder, OLD)  # finishes or discards what is there, and goes on
        kept = {"config/vae/parameters"} if seen[-1] != "old" else set()  # this save has none
        assert read(folder) == OLD | {name: NEW[name] for name in kept}
        assert {name: (folder / name).read_text() for name in mine} == mine
        assert not (folder / HIDDEN).exists()
    assert seen.count("old") > 10 and seen.count("new") > 10
    assert seen == ["old"] * seen.count("old") + ["new"] * seen.count("new") + ["done"]


def test_a_kill_while_the_next_save_finishes(tmp_path, monkeypatch):
    """The state between: everything of the first save, then everything of the second."""
    newest = {name: f"newest {name}" for name in NEW}
    for first in range(50, 90, 6):
        for second in range(0, 90, 11):
            folder = tmp_path / f"{first}-{second}"
            write(folder, OLD)
            for files, call in ((NEW, first), (newest, second)):
                with kill(monkeypatch, call), suppress(Killed):
                    save(folder, files)
                assert read(folder) in (OLD, NEW, newest)
            save(folder, newest)
            assert read(folder) == newest and not (folder / HIDDEN).exists()


def test_a_kill_leaves_the_old_or_the_new_file(tmp_path, monkeypatch):
    path, seen = tmp_path / "x", []
    while "done" not in seen:
        path.write_text("old")
        with kill(monkeypatch, len(seen)), suppress(Killed), replace_file(path) as written:
            written.write_text("new")
        seen.append(path.read_text())
        with replace_file(tmp_path / "y") as written:  # another save removes what is left
            written.write_text("y")
        assert sorted(os.listdir(tmp_path)) == ["x", "y"], f"killed before call {len(seen)}"
        if seen[-1] == "new":
            with kill(monkeypatch, 1000) as calls, replace_file(path) as written:
                written.write_text("new")
            seen += ["done"] if len(seen) > len(calls) else []
    assert seen.count("old") > 5


@pytest.mark.parametrize(
    "check",
    [lambda folder: check_output(folder / "x"), lambda folder: check_folder(folder / "a" / "b")],
    ids=["file", "folder"],
)
def test_the_next_check_removes_what_a_killed_one_left(check, tmp_path, monkeypatch):
    with kill(monkeypatch, 1000) as calls:
        check(tmp_path)
    left = 0
    for call in range(len(calls)):
        with kill(monkeypatch, call), suppress(Killed):
            check(tmp_path)
        left += len(os.listdir(tmp_path))
        check(tmp_path)
        assert not os.listdir(tmp_path), f"killed before call {call}"
    assert left > 1


def test_leftovers_of_living_writers_and_of_others_stay(tmp_path):
    names = [f"{PREFIX}save", f"{PREFIX}0123456g", f"{PREFIX}01234567", ".x.123.new"]
    for name in names:
        write(tmp_path, {f"{name}/lock": "", f"{name}/other": "mine"})
    (tmp_path / f"{PREFIX}89abcdef").symlink_to(tmp_path / names[0])
    before = read_all(tmp_path)
    with replace_file(tmp_path / "x") as living:
        living.write_text("x")
        with replace_file(tmp_path / "y") as written:
            written.write_text("y")
        assert living.read_text() == "x"
    assert read_all(tmp_path) == before | {"x": b"x", "y": b"y"}


def test_another_process_removes_the_hidden_folder_while_it_is_empty(tmp_path, monkeypatch):
    mkdir, made = os.mkdir, []

    def remove_the_first(path, *args):
        mkdir(path, *args)
        made.append(path)
        if len(made) == 1:
            remove_leftovers(tmp_path)
            assert not os.path.lexists(path)

    monkeypatch.setattr(os, "mkdir", remove_the_first)
    with replace_file(tmp_path / "x") as written:
        written.write_text("new")
    assert len(made) == 2 and read_all(tmp_path) == {"x": b"new"}


def test_a_folder_that_another_process_saves_to(tmp_path):
    write(tmp_path / "model", OLD)
    code = (
        "import sys; from pathlib import Path; from stable_diffusion.locking import take_lock;"
        "take_lock(Path(sys.argv[1])); print(flush=True); input()"
    )
    hidden = tmp_path / "model" / HIDDEN
    command, pipe = [sys.executable, "-c", code, str(hidden)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as other:
        other.stdout.readline()
        for call in (check_output, lambda *args: save(args[0], NEW)):
            with pytest.raises(ValueError, match="model is being saved to by another process"):
                call(tmp_path / "model", KIND)
        other.kill()
    save(tmp_path / "model", NEW)  # its lock ended with it
    assert read(tmp_path / "model").items() >= NEW.items() and not hidden.exists()


def test_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "fcntl", None)
    save(tmp_path / "model", NEW)
    with replace_file(tmp_path / "x") as written:
        written.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["model", "x"]
    assert read(tmp_path / "model") == NEW


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        '{"moved": ["mark"]}',
        '{"moved": ["../x"], "removed": []}',
        '{"moved": [], "removed": ["/x"]}',
        '{"moved": [3], "removed": []}',
        "[" * 10**5,
    ],
)
def test_damaged_records(record, tmp_path):
    write(tmp_path, {"mark": "old", f"{HIDDEN}/{RECORD}": record})
    for call in (find_file, list_files, lambda *_: check_output(tmp_path, KIND)):
        with pytest.raises(ValueError, match=f"{RECORD} is no intact record of a save"):
            call(tmp_path, "mark")


def test_a_record_of_something_else_removes_nothing(tmp_path):
    record = {"moved": [], "removed": ["src/main.py"]}
    write(tmp_path, OLD | MINE | {f"{HIDDEN}/{RECORD}": json.dumps(record)})
    with pytest.raises(ValueError, match="unfinished save of something else .* src/main.py"):
        save(tmp_path, NEW)
    assert (tmp_path / "src" / "main.py").read_text() == "mine"


# What is there already


def test_only_own_files_are_replaced(tmp_path):
    write(tmp_path / "model", OLD | MINE)
    (tmp_path / "model" / "link").symlink_to("src")
    before = read_all(tmp_path / "model")
    save(tmp_path / "model", NEW)
    changed = {name: text.encode() for name, text in NEW.items()}
    expected = before | changed | {"config": False, "config/vae": False}
    del expected["tokenizer/added"]
    assert read_all(tmp_path / "model") == expected
    assert os.listdir(tmp_path) == ["model"]


def refuse(tmp_path, message, kind=KIND):
    """Checks that a save to a folder is refused before the work, and that nothing is changed."""
    before = read_all(tmp_path)
    for call in (check_output, lambda *args: replace_folder(*args).__enter__()):
        with pytest.raises((ValueError, OSError), match=message) as error:
            call(tmp_path / "model", kind)
        assert "model" in str(error.value) and "\n" not in str(error.value)
    assert read_all(tmp_path) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (MINE, "not empty, and it is no test checkpoint: it has .git, README, src, unet"),
        ({"config/mine": ""}, "it has config"),
        ({"config/vae/config": ""}, "it has config"),
        ({f"{n}": "" for n in range(9)}, "it has 0, 1, 2, 3, 4, ..."),
        (OLD | {"unet/parameters.fp16": ""}, "has unet/parameters.fp16, which a program could"),
        ({"mark": "", "unet": "a file"}, "unet is no folder"),
        ({"mark/a": "", "unet/config": ""}, "no test checkpoint: it has mark, unet"),
        ({"mark": "", "unet/config/mine": ""}, "unet/config is a folder, not a file"),
    ],
)
def test_what_is_refused(files, message, tmp_path):
    write(tmp_path / "model", files)
    refuse(tmp_path, message)


def test_a_folder_that_a_killed_first_save_left_is_empty(tmp_path):
    (tmp_path / "model" / "config" / "vae").mkdir(parents=True)
    write(tmp_path / "model", {f"{HIDDEN}/{STAGED}/mark": "half", f"{HIDDEN}/lock": ""})
    save(tmp_path / "model", OLD)
    assert read(tmp_path / "model") == OLD and not (tmp_path / "model" / HIDDEN).exists()


def test_errors_leave_nothing(tmp_path):
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "model", KIND) as staged:
        write(staged, {"mark": "half"})
        raise RuntimeError
    with pytest.raises(ValueError, match="A test checkpoint has no other"):
        save(tmp_path / "model", {"other": "x"})
    with pytest.raises(RuntimeError), replace_file(tmp_path / "x") as written:
        written.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


# Links and mount points


def test_outputs_through_links(tmp_path):
    write(tmp_path / "real", OLD)
    (tmp_path / "x").write_text("old")
    links = {"model": "real", "link": "x", "dangling": "made", "dangling_file": "made_file"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    for link in ("model", "dangling"):
        check_output(tmp_path / link, KIND)
        save(tmp_path / link, NEW)
    for link in ("link", "dangling_file"):
        check_output(tmp_path / link)
        with replace_file(tmp_path / link) as written:
            written.write_text("new")
        assert (tmp_path / links[link]).read_text() == "new"
    assert {link: os.readlink(tmp_path / link) for link in links} == links
    assert read(tmp_path / "real") == read(tmp_path / "made") == NEW
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent" / "x")
    for kind in (KIND, None):
        with pytest.raises(ValueError, match="nowhere can't be written: there is no folder"):
            check_output(tmp_path / "nowhere", kind)


@pytest.mark.parametrize("name", ["unet/config", "unet"])
def test_links_inside_are_refused(name, tmp_path):
    """Writing through them would change another checkpoint."""
    write(tmp_path / "other", OLD)
    write(tmp_path / "model", {"mark": "old", "tokenizer/added": "old"})
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).symlink_to(tmp_path / "other" / name)
    refuse(tmp_path, f"model/{name} is a link to .*other/{name}, which isn't changed")


def test_files_of_the_hubs_cache_are_refused(tmp_path):
    blob = tmp_path / "models--owner--name" / "blobs" / "123"
    write(tmp_path, {str(blob): "x"})
    (tmp_path / "x.safetensors").symlink_to(blob)
    with pytest.raises(ValueError, match="in the cache of the hub"):
        check_output(tmp_path / "x.safetensors")


@contextmanager
def mount(*arguments):
    """Mounts something for the time of the block; the last argument is where."""
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("mounting needs Linux and its administrator")
    try:
        yield arguments[-1]
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)


@pytest.fixture
def linux():
    if not shutil.which("mount"):
        pytest.skip("there is no command mount")


def test_mount_points(tmp_path, linux):
    write(tmp_path, {f"source/{name}": text for name, text in OLD.items()})
    write(tmp_path, {"a file": "old", "mounted file": "", "model/unet/x": ""})
    write(tmp_path / "model", OLD)
    (tmp_path / "point").mkdir()
    with mount("--bind", tmp_path / "source", tmp_path / "point"):
        check_output(tmp_path / "point", KIND)
        save(tmp_path / "point", NEW)
    assert read(tmp_path / "source") == NEW
    with mount("--bind", tmp_path / "a file", tmp_path / "mounted file"):
        with pytest.raises(ValueError, match="mounted file is a mount point"):
            check_output(tmp_path / "mounted file")
    with mount("--bind", tmp_path / "source" / "unet", tmp_path / "model" / "unet"):
        with pytest.raises(ValueError, match="unet is a mount point"):
            check_output(tmp_path / "model", KIND)


# What the system does not allow


def test_a_full_disk(tmp_path, linux):
    with mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path):
        write(tmp_path / "model", OLD | MINE)
        (tmp_path / "x").write_text("old")
        before = read_all(tmp_path)
        with pytest.raises(OSError, match="No space left on device: .*/model'") as error:
            save(tmp_path / "model", NEW | {"unet/parameters": "x" * 2**19})
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space left on device: .*/x'"):
            with replace_file(tmp_path / "x") as written:
                written.write_bytes(bytes(2**19))
        with pytest.raises(OSError, match="No space left on device: .*/x'"):
            tensors.save_safetensors(tmp_path / "x", {"a": np.zeros(2**19)})
        with pytest.raises(OSError, match="No space left on device: .*/x'"):
            model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(1000)])
            kerascv.save_legacy(model, tmp_path / "x")
        assert read_all(tmp_path) == before


def test_a_disk_that_is_full_at_any_call(tmp_path, monkeypatch):
    """Each call that may need space fails once: nothing is changed before the files are moved."""
    write(tmp_path / "model", OLD | MINE)
    before, here, os_mkdir = read_all(tmp_path), threading.get_ident(), os.mkdir
    for name in ("mkdir", "fsync", "open"):
        original = getattr(os, name)
        for failing in range(100):
            calls = []

            def fail(*args, failing=failing, calls=calls, original=original, **options):
                there = original is os_mkdir and os.path.lexists(args[0])  # needs no space
                # pytest-xdist has threads of its own
                if there or threading.get_ident() != here:
                    return original(*args, **options)
                calls.append(args)
                record = tmp_path / "model" / HIDDEN / RECORD
                if len(calls) == failing + 1 and not record.exists():
                    raise OSError(errno.ENOSPC, "No space left on device")
                return original(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                try:
                    save(tmp_path / "model", NEW)
                except OSError as error:
                    assert error.filename.endswith("model")
                    assert read_all(tmp_path) == before, (name, failing)
                    continue
            break
        assert failing > 2 and read(tmp_path / "model") == NEW
        shutil.rmtree(tmp_path / "model")
        write(tmp_path / "model", OLD | MINE)


def test_a_read_only_disk(tmp_path, linux):
    with mount("-t", "tmpfs", "tmpfs", tmp_path):
        write(tmp_path / "model", OLD)
        (tmp_path / "x").write_text("old")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        assert read(tmp_path / "model") == OLD
        for name, kind in {"model": KIND, "new": KIND, "x": None, "y": None}.items():
            with pytest.raises(OSError, match=rf"(Read-only|Permission denied).*/{name}"):
                check_output(tmp_path / name, kind)
        with pytest.raises(OSError, match="Read-only"):
            check_folder(tmp_path / "a" / "b")


def test_a_reader_of_a_killed_save_needs_no_permission_to_write(tmp_path, linux, monkeypatch):
    with mount("-t", "tmpfs", "tmpfs", tmp_path):
        write(tmp_path / "model", OLD)
        with kill(monkeypatch, 60), suppress(Killed):
            save(tmp_path / "model", NEW)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        assert read(tmp_path / "model") == NEW and (tmp_path / "model" / HIDDEN).exists()


def test_no_permission(tmp_path, monkeypatch):
    """A file that may not be changed, or one in a folder that may not."""
    write(tmp_path / "model", OLD)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("unet/config"))
    refuse(tmp_path, "Permission denied: '.*/model/unet/config'")


def test_paths_of_the_other_kind(tmp_path):
    write(tmp_path, {"file": "x", "folder/x": ""})
    os.mkfifo(tmp_path / "pipe")
    for path, kind, message in [
        ("file", KIND, "file is a file, and a test checkpoint needs a folder"),
        ("folder", None, "folder is a folder, not a file"),
        ("pipe", None, "pipe is no regular file"),
        ("pipe", KIND, "pipe is a file"),
        ("absent/x", None, "absent/x can't be written: there is no folder .*absent"),
        ("absent/x", KIND, "absent/x can't be written: there is no folder .*absent"),
        ("file/x", KIND, "file/x can't be written: there is no folder .*file"),
        ("x" * 256, None, "File name too long: '.*xxx'"),
        ("x" * 256, KIND, "File name too long: '.*xxx'"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            check_output(tmp_path / path, kind)
    with pytest.raises(ValueError, match="file/x can't be a folder: .*file is a file"):
        check_folder(tmp_path / "file" / "x")
    check_folder(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_the_longest_names(tmp_path):
    path = tmp_path / ("é" * 127 + "x")  # 255 bytes
    check_output(path)
    with replace_file(path) as written:
        written.write_text("x")
    save(tmp_path / ("y" * 255), NEW)
    assert path.read_text() == "x" and read(tmp_path / ("y" * 255)) == NEW


# Flushing


def test_files_are_flushed_before_they_replace_others(tmp_path, monkeypatch):
    done, replace = [], os.replace

    def fsync(file):
        done.append(os.readlink(f"/proc/self/fd/{file}") if Path("/proc/self/fd").exists() else "")

    def move(source, target):
        done.append(f"> {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs Linux' list of open files")
    with replace_file(tmp_path / "x") as written:
        written.write_text("x")
    assert done == [str(written), f"> {tmp_path / 'x'}", str(tmp_path)]
    done.clear()
    with replace_file(tmp_path / "x", flush=False) as written:
        written.write_text("x")
    assert done == [f"> {tmp_path / 'x'}"]
    done.clear()
    save(tmp_path / "model", NEW)
    hidden = tmp_path / "model" / HIDDEN
    record = done.index(f"> {hidden / RECORD}")
    before, after = done[:record], done[record + 1 :]
    assert {str(hidden / STAGED / name) for name in NEW} < {*before}
    assert {str(hidden / STAGED / "unet"), str(hidden / STAGED), str(tmp_path)} < {*before}
    assert before[-1] == f"{hidden / RECORD}.part" and after[0] == str(hidden)
    moves = [n for n, call in enumerate(after) if call.startswith("> ")]
    assert len(moves) == len(NEW)
    assert after.index(str(tmp_path / "model" / "unet"), moves[-1]) < len(after) - 1


def test_file_systems_that_flush_no_folders(tmp_path, monkeypatch):
    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path / "model", NEW)
    assert read(tmp_path / "model") == NEW


# The formats


PROJECT = {"src/main.py": "mine", ".git/HEAD": "mine", "config/mine": "mine", "README": "mine"}
FOLDERS = [
    name
    for name, format in FORMATS.items()
    if format.find_kind(FEW) and (name != "openvino" or keras.backend.backend() == "openvino")
]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(weights=None, jit_compile=False, config=FEW)


@pytest.mark.large  # tests/faults kills processes, every day
@pytest.mark.parametrize("format", FOLDERS)
def test_a_killed_save_of_each_format(format, model, tmp_path, monkeypatch):
    """A reader finds the old checkpoint or the new one, and all that the user has there."""
    owned = FORMATS[format].find_kind(FEW).owned

    def read_owned(folder):
        paths = {name: find_file(folder, name) for name in owned}
        files = {name: path.read_bytes() for name, path in paths.items() if path}
        # OpenVINO gives the layers other numbers in each save.
        graphs = [name for name in files if name.endswith(".xml")]
        return files | {name: re.sub(rb"_\d+", b"", files[name]) for name in graphs}

    model.save(tmp_path / "old", format)
    write(tmp_path / "old", PROJECT)
    variable = model.decoder.weights[0]
    variable.assign(variable + 1)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    with kill(monkeypatch, 10**9) as calls:
        model.save(tmp_path / "new", format)
    old, new, seen = read_owned(tmp_path / "old"), read_owned(tmp_path / "new"), set()
    assert {name for name in old if old[name] != new[name]}
    for share in (0.5, 0.85, 0.95):
        folder = tmp_path / f"{share}"
        shutil.copytree(tmp_path / "old", folder)
        with kill(monkeypatch, int(share * len(calls))), suppress(Killed):
            model.save(folder, format)
        found, there = read_owned(folder), read_all(folder)
        assert found in (old, new)
        if found == new and (folder / HIDDEN / RECORD).exists():
            reader = open_checkpoint(folder, config=FEW)
            make = lambda **options: Decoder(64, 64, **options)  # noqa: E731
            built = reader.build("decoder", make)
            if format == "openvino":
                assert built.path.with_suffix(".bin").read_bytes() == new["decoder.bin"]
            else:
                assert all(map(np.array_equal, built.get_weights(), model.decoder.get_weights()))
            seen.add("staged")
        assert (
            read_all(folder) == there
            and PROJECT.items() <= {name: (folder / name).read_text() for name in PROJECT}.items()
        )
        seen.add("new" if found == new else "old")
    assert seen >= {"old", "new"}


INDEX = {"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}


@pytest.mark.parametrize(
    ("format", "files", "message"),
    [
        *((format, PROJECT, "it has .git, README, config, src") for format in FORMATS),
        *((format, {"config/mine": ""}, "it has config") for format in FORMATS),
        ("diffusers", {"model_index.json": "[]", "x": ""}, "it has model_index.json, x"),
        ("diffusers", {"model_index.json": '{"a": 1}'}, "it has model_index.json"),
        *(
            ("diffusers", INDEX | {name: ""}, f"has {name}, which a program could load instead")
            for name in (
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.non_ema.safetensors",
                "unet/diffusion_pytorch_model.safetensors.index.json",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "text_encoder/model.fp16.safetensors",
                "text_encoder/pytorch_model.bin",
                "vae/diffusion_pytorch_model.bin",
                "tokenizer/tokenizer.json",
            )
        ),
        ("keras", {"decoder.weights.h5": "", "kcv_decoder.h5": ""}, "has kcv_decoder.h5, which"),
        ("keras", {"decoder.weights.h5": "", "unet/x": ""}, "has unet/x, which"),
        ("keras", {"decoder.weights.h5": ""} | INDEX, "has model_index.json, which"),
        (
            "keras",
            {"decoder.weights.h5": "", "config/tokenizer/tokenizer.json": ""},
            "has config/tokenizer/tokenizer.json, which",
        ),
        ("kerascv", {"kcv_decoder.h5": "", "decoder.weights.h5": ""}, "has decoder.weights.h5, wh"),
        ("kerascv", {"text_encoder_v2_1.h5": ""}, "has text_encoder_v2_1.h5, which"),
        (
            "openvino",
            {"diffusion_model.xml": "", "unet/config.json": ""},
            "has unet/config.json, w",
        ),
    ],
)
def test_what_each_format_refuses(format, files, message, tmp_path):
    target = tmp_path / "x"
    if format == "original":
        target, message = tmp_path / "x.safetensors", "x.safetensors is a folder, not a file"
    write(target, files)
    before = read_all(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_target(target, format, FEW)
    assert read_all(tmp_path) == before


def test_a_save_is_refused_before_models_are_built(tmp_path):
    write(tmp_path / "x", PROJECT)
    model = StableDiffusion(weights=None, jit_compile=False, config=FEW)
    with pytest.raises(ValueError, match="is not empty"):
        model.save(tmp_path / "x")
    assert model._text_encoder is None


def test_added_tokens_of_an_older_checkpoint_go(model, tmp_path):
    folder, name = tmp_path / "my-model-v1.5", "tokenizer/added_tokens.json"
    write(folder, INDEX | {name: '{"<old>": 49408}', "tokenizer/mine": ""})
    model.save(folder)
    assert sorted(os.listdir(folder / "tokenizer")) == [
        "merges.txt",
        "mine",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
