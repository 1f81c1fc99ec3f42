"""The kinds of files that are damaged: an intact sample of each, and what is right.

`run_case` makes a damaged copy of the sample, reads it with the package, and compares what was read
with what the damaged file says. The files are read a second time without the package's code.
"""

import contextlib
import io
import os
import re
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import keras
import mutate
from kinds_of_adapters import (
    check_embedding,
    check_lora,
    write_embedding,
    write_kohya,
    write_named_embedding,
    write_peft,
    write_with_merges,
)
from kinds_of_checkpoints import (
    check_diffusers,
    check_keras,
    check_kerascv,
    check_openvino,
    check_single,
    check_tokenizer,
    write_diffusers,
    write_fast,
    write_foreign,
    write_openvino,
    write_shards,
    write_single,
)
from kinds_of_runs import (
    check_cache,
    check_images,
    check_log,
    check_settings,
    check_state,
    write_cache,
    write_csv,
    write_jsonl,
    write_log,
    write_settings,
    write_state,
)
from samples import Wrong, make_models, make_pipeline, write_checkpoint

from stable_diffusion.command import convert

CPU_SECONDS, MEGABYTES = 20, 1500  # that a case may use
MAX_QUOTED = 200  # characters of a file, in an error
MAX_MESSAGE = 4000  # characters of an error


@dataclass(frozen=True)
class Kind:
    """A kind of files.

    Attributes:
        write: function of a folder; writes the sample.
        mutators: list of pairs: a pattern of the paths that are changed, and functions of
            `mutate`.
        check: function of the damaged copy and of the sample. It returns normally if what was read
            is right, raises a ValueError if it was refused, and `Wrong` if it is wrong.
        command: name of the checkpoint that `stable-diffusion-convert` reads, if it is one.
        renews: whether damaged files are made anew.
    """

    write: Callable
    mutators: list
    check: Callable
    command: str | None = None
    renews: bool = False


def run_case(kind, number, folder):
    """Damages a sample and reads it; returns a dict that says what happened.

    Args:
        kind: a key of `KINDS`.
        number: number of the case.
        folder: path of a folder for the sample and its copies.
    """
    rng, own = mutate.make_generator(kind, number), KINDS[kind]
    sample, copy = Path(folder) / kind / "sample", Path(folder) / kind / f"copy-{os.getpid()}"
    if not sample.exists():
        written = sample.with_name(f"new-{os.getpid()}")
        written.mkdir(parents=True)
        own.write(written)
        with contextlib.suppress(OSError):  # another process was faster
            written.rename(sample)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sample, copy)
    what = _damage(rng, own, copy)
    listed = _list_files(copy)
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
    start, before = time.process_time(), _read_peak()
    result = {"kind": kind, "number": number, "what": what}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        result["outcome"], result["message"] = _judge(own, copy, sample, what)
    used = time.process_time() - start, _read_peak() - before
    if result["outcome"] == "refused" and own.command and number % 8 == 0:
        result |= _judge_command(copy / own.command, copy / "out")
    if used[0] > CPU_SECONDS or used[1] > MEGABYTES:
        result |= {"outcome": "fault", "message": f"{used[0]:.1f} s, {used[1]:.0f} MB"}
    if not own.renews and _list_files(copy) != listed:
        result |= {"outcome": "fault", "message": "files were changed"}
    return result


def _damage(rng, own, copy):
    """Changes one file of a copy; returns what was done."""
    pattern, mutators = mutate.choose(rng, own.mutators)
    path = mutate.choose(rng, sorted(p for p in copy.rglob(pattern) if p.is_file()))
    if rng.integers(30) == 0 and own.command:
        return f"{path.name}: {_replace_entry(rng, path)}"
    mutator = mutate.choose(rng, mutators)
    return f"{path.name}: {mutator.__name__}: {mutator(rng, path)}"


def _replace_entry(rng, path):
    """Puts something else in the place of a file."""
    how = int(rng.integers(6))
    path.unlink()
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how < 5:
        path.symlink_to(["/dev/zero", "/etc/passwd", "nowhere"][how - 2])
    return ["a folder", "a pipe", "/dev/zero", "a link out", "a dangling link", "missing"][how]


def _read_peak():
    """Returns the most memory that this process had, in megabytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", text)[1]) / 1024


def _list_files(folder):
    return {
        str(path): path.lstat().st_size if path.is_file() else None for path in folder.rglob("*")
    }


def _judge(own, copy, sample, what):
    """Returns the outcome, "right", "refused" or "fault", and a message."""
    try:
        own.check(copy, sample)
    except Wrong as error:
        return "fault", f"wrong: {error}"
    except ValueError as error:
        if type(error) is not ValueError:
            return "fault", traceback.format_exc()[-2000:]
        message = str(error)
        if re.search(r"([^.])\1{%d}" % MAX_QUOTED, message) or len(message) > MAX_MESSAGE:  # noqa: UP031
            return "fault", f"the error has {len(message)} characters: {message[:300]}"
        if "numbers:" in what and "finite" not in message:
            return "fault", f"refused changed numbers: {message[:300]}"
        return "refused", message
    except BaseException:
        return "fault", traceback.format_exc()[-2000:]
    return "right", ""


def _judge_command(source, target):
    """Converts a refused checkpoint: this must end with one line and status 2."""
    error, out = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(out),
    ):
        warnings.simplefilter("ignore")
        try:
            status = convert.main([str(source), str(target)])
        except BaseException:
            return {"outcome": "fault", "message": f"convert: {traceback.format_exc()[-2000:]}"}
    lines = error.getvalue().strip().splitlines()
    if status != 2 or len(lines) != 1 or target.exists():
        return {"outcome": "fault", "message": f"convert: {status}, {lines}"}
    return {}


# --- The table -----------------------------------------------------------------------------------

FLIPS = mutate.BYTES
TENSORS = [("*.safetensors", [*mutate.SAFETENSORS * 2, *FLIPS])]
CONFIGS = [("*config.json", mutate.JSON * 2 + FLIPS)] * 6 + [("model_index.json", mutate.JSON)]
TOKENIZER = [("tokenizer/*.json", mutate.JSON * 2 + FLIPS)]
MERGES = [("merges.txt", mutate.TEXT * 4 + FLIPS)]
H5 = [("*.h5", mutate.HDF5 * 12 + FLIPS)]
KINDS = {
    "single file": Kind(write_single, TENSORS, check_single, "model.safetensors"),
    "foreign file": Kind(write_foreign, TENSORS, check_single, "model.safetensors"),
    "config": Kind(write_diffusers, CONFIGS, check_diffusers, "model"),
    "tokenizer": Kind(write_diffusers, TOKENIZER + MERGES, check_tokenizer, "model"),
    "fast tokenizer": Kind(write_fast, TOKENIZER, check_tokenizer, "model"),
    "shards": Kind(
        write_shards,
        [("*.index.json", mutate.JSON + FLIPS), *TENSORS],
        check_diffusers,
        "model",
    ),
    "kerascv": Kind(lambda f: write_checkpoint(f, "model", "kerascv"), H5, check_kerascv, "model"),
    "keras": Kind(lambda f: write_checkpoint(f, "model", "keras"), H5, check_keras, "model"),
    "lora kohya": Kind(write_kohya, TENSORS, check_lora),
    "lora peft": Kind(write_peft, TENSORS, check_lora),
    "embedding": Kind(write_with_merges(write_embedding), TENSORS, check_embedding),
    "named embedding": Kind(write_with_merges(write_named_embedding), TENSORS, check_embedding),
    "jsonl": Kind(write_jsonl, [("*.jsonl", mutate.TEXT * 3 + FLIPS)], check_images),
    "csv": Kind(write_csv, [("*.csv", mutate.TEXT * 3 + FLIPS)], check_images),
    "state": Kind(write_state, TENSORS, check_state),
    "settings": Kind(
        write_settings,
        [("settings.json", mutate.JSON * 2 + FLIPS)],
        check_settings,
        renews=True,
    ),
    "log": Kind(write_log, [("loss.csv", mutate.TEXT * 3 + FLIPS)], check_log),
    "cache": Kind(write_cache, [("*.npy", FLIPS)], check_cache, renews=True),
}
if find_spec("openvino"):
    KINDS["openvino"] = Kind(
        write_openvino,
        [("*.xml", [*FLIPS, mutate.change_lines]), ("*.bin", FLIPS)],
        check_openvino,
        "model",
    )

if __name__ != "__mp_main__" and keras.backend.backend() == "numpy":
    make_pipeline(), make_models()  # in the server, so that its children have them
