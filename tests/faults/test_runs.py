"""Runs of `stable-diffusion-finetune` that are killed at random moments, or that meet another one.

    pytest -m large tests/faults/test_runs.py --kills 200

After a kill there is no result, or the whole one, and foreign files are as they were. The same
command goes on, and in the end each file is as if nobody had killed the run.
"""

import re
import shutil
import time
from collections import Counter

import pytest
import runs
from children import Child, call, kill_while
from mutate import make_generator
from targets import count_kills, list_files

pytestmark = pytest.mark.large
BACKEND = "tensorflow"  # NumPy's cannot train
SHARE = 0.1  # of the kills
IN_A_ROW = 2  # kills of one run
ROUNDS = 1  # of two runs at once, or a fortieth of `--kills`
OUT, WORK = "out.safetensors", "runs/work"
FOREIGN = [  # beside what a run writes, and in it
    *("README.md", "runs/README.md", f"{WORK}/README.md", f"{WORK}/previews/mine.png"),
    *(f"{WORK}/cache/00/mine.npy", f"{WORK}/.stable-diffusion-mine/new"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of what runs read."""
    folder = tmp_path_factory.mktemp("data")
    call(runs.write_data, str(folder), backend=BACKEND)
    return folder


@pytest.fixture(scope="module")
def clean(data, tmp_path_factory):
    """The files of a run without a kill, how often it touches files, and its seconds."""
    folder = tmp_path_factory.mktemp("clean") / "in"
    arguments = prepare(data, folder)
    start = time.monotonic()
    status, _, error, touches = call(runs.run, *arguments, backend=BACKEND)
    seconds = time.monotonic() - start
    assert (status, error) == (0, "")
    return read_files(folder), touches, seconds


def prepare(data, folder):
    """Makes a folder for a run, with foreign files; returns the arguments of `runs.run`."""
    folder.mkdir()
    for name in FOREIGN:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"foreign {name}")
    return str(data), str(folder / OUT), str(folder / WORK)


def check_foreign(folder):
    for name in FOREIGN:
        assert (folder / name).read_text() == f"foreign {name}"


def read_files(folder):
    """Returns the content of each file, without what is never the same: speed, and times."""
    files = list_files(folder)
    for name in [name for name in files if "tensorboard/" in name]:
        del files[name]
    log = files[f"{WORK}/loss.csv"].decode()
    files[f"{WORK}/loss.csv"] = [line.rsplit(",", 1)[0] for line in log.splitlines()]
    return files


def read_result(folder):
    """Returns the content of the result, or None if there is nothing."""
    return (folder / OUT).read_bytes() if (folder / OUT).exists() else None


def compare(after, files):
    """Returns the names of the files that are not the same."""
    return sorted(n for n in after.keys() | files.keys() if after.get(n) != files.get(n))


def test_a_killed_run(data, clean, tmp_path, request):
    files, touches, seconds = clean
    kills, starts = Counter(), Counter()
    for number in range(count_kills(request, SHARE / IN_A_ROW)):
        rng, folder = make_generator("kill run", number), tmp_path / str(number)
        arguments = prepare(data, folder)
        where = f"{number}"
        for _ in range(IN_A_ROW):
            what = kill_while(runs.run, arguments, rng, touches, seconds, BACKEND)
            where += f", {what}"
            check_foreign(folder)
            state = read_result(folder)
            assert state in (None, files[OUT]), f"{where}: half a result"
            kills[what if what == "finished" else "new" if state else "none"] += 1
        status, said, error, _ = call(runs.run, *arguments, backend=BACKEND)
        assert (status, error) == (0, ""), f"{where}: {error}"
        assert not (different := compare(read_files(folder), files)), f"{where}: {different}"
        starts[(re.findall("going on (after step .) of 4", said) or ["anew"])[0]] += 1
        shutil.rmtree(folder)
    print(f"kills: {dict(kills)}, the run then began {dict(starts)}")


def test_two_runs_in_one_folder(data, clean, tmp_path, request):
    files, _, seconds = clean
    for number in range(max(ROUNDS, (request.config.getoption("--kills") or 0) // 40)):
        rng, folder = make_generator("two runs", number), tmp_path / str(number)
        arguments = prepare(data, folder)
        children = [Child(runs.run, BACKEND) for _ in range(2)]
        for child in children:
            child.send(*arguments)
            time.sleep(rng.uniform(0, seconds / 4))
        first, second = sorted(child.receive() for child in children)
        for child in children:
            child.kill()
        assert first[0] == 0 and first[2] == ""
        message = f"another run uses {folder / WORK}; wait for its end, or pass another --work"
        assert second[:3] == (2, "", f"stable-diffusion-finetune: {message}\n")
        assert not (different := compare(read_files(folder), files)), f"{number}: {different}"
