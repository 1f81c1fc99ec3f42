"""PyTorch's files: those that people have load, and nothing of any file is run.

What names a file contains is found without PyTorch. The other tests have the marker `torch`.
"""

import builtins
import os
import pickle
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from stable_diffusion.checkpoints import torch_files
from stable_diffusion.checkpoints.contents import LEGACY_TORCH
from stable_diffusion.checkpoints.tensors import open_tensors
from stable_diffusion.checkpoints.torch_files import StandIn, TorchFile, list_globals

BODY = bytes(range(256))


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_zip(path, data, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
    return path


def write_legacy(path, data):
    parts = (pickle.dumps(part, protocol=2) for part in (1001, {"little_endian": True}))
    path.write_bytes(LEGACY_TORCH + b"".join(parts) + data + pickle.dumps([], protocol=2))
    return path


WRITE = {"zip": write_zip, "legacy": write_legacy}


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A path that exists as soon as a file was run, in this process or in another."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists()


MALICIOUS = {  # how a pickle makes a file called trace, and the name that is refused
    "posix.system": Call(os.system, "touch trace"),
    "posix.mkdir": {"state_dict": {"a": Call(os.mkdir, "trace")}},
    "builtins.eval|__builtin__.eval": Call(builtins.eval, "open('trace', 'w').close()"),
    "builtins.getattr|__builtin__.getattr": Call(getattr, Path("trace"), "touch"),
    "subprocess.call|commands.call": Call(subprocess.call, ["touch", "trace"]),
    "pickle.loads|_pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, "trace"))),
}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_is_run(name, kind, trace, monkeypatch):
    """Refused before PyTorch sees it: this needs no PyTorch."""
    monkeypatch.setattr(torch_files, "_import_torch", None)
    path = WRITE[kind](trace.with_name("x.ckpt"), pickle.dumps(MALICIOUS[name], protocol=2))
    with pytest.raises(ValueError, match=f"refused, and nothing in it was run: .* ({name})"):
        open_tensors(path)


def test_they_would_run(tmp_path, monkeypatch):
    """The pickles above do what they are made for, where they are loaded by Python."""
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "trace"
    for value in MALICIOUS.values():
        loaded = pickle.loads(pickle.dumps(value, protocol=2))
        if callable(loaded):  # a method that a next call would call
            loaded()
        trace.rmdir() if trace.is_dir() else trace.unlink()


@pytest.mark.parametrize("kind", WRITE)
def test_names_of_a_file(kind, tmp_path):
    data = {"a": np.float32(1), "b": types.SimpleNamespace(), "c": (Path("x"), print)}
    names = list(list_globals(WRITE[kind](tmp_path / "x.pt", pickle.dumps(data, protocol=2))))
    assert {name.rpartition(".")[2] for name in names} >= {"scalar", "SimpleNamespace", "print"}
    newer = WRITE[kind](tmp_path / "y.pt", pickle.dumps(data, protocol=4))
    assert "a name that it computes (STACK_GLOBAL)" in list(list_globals(newer))


def test_damaged_and_oversized(tmp_path, monkeypatch):
    path, data = tmp_path / "x.pt", pickle.dumps({"a": "b"}, protocol=2)
    huge = b"\x80\x02X" + 4 * b"\xfe"  # a str of 4 GB
    damaged = [(content, write_zip) for content in (data[:-1], b"", BODY, huge)]
    for content, write in [*damaged, (huge, write_legacy)]:
        write(path, content)
        tracemalloc.start()
        with pytest.raises(ValueError, match="x.pt is a PyTorch file that is damaged, or was made"):
            TorchFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()
    write_zip(path, data, compression=zipfile.ZIP_DEFLATED)  # may be small, and fill the memory
    with pytest.raises(ValueError, match="a part is compressed, which PyTorch never does"):
        TorchFile(path)
    monkeypatch.setattr(torch_files, "MAX_PICKLE", 10)
    with pytest.raises(ValueError, match=f"its pickle has {len(data)} bytes"):
        TorchFile(write_zip(path, data))


def test_stand_ins_do_nothing(trace):
    made = StandIn(Call(os.mkdir, "trace"), anything=3)
    made.__setstate__({"__class__": Call})
    assert type(made) is StandIn and vars(made) == {"state": {"__class__": Call}}


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cpu"])
def test_older_pytorch(version, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
    path = write_zip(tmp_path / "x.pt", pickle.dumps({}, protocol=2))
    with pytest.raises(ValueError, match=f"needs PyTorch 2.6 or newer, not {version[:3]}"):
        TorchFile(path)


# With PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch reads these files, and isn't installed")


@pytest.fixture
def lightning(monkeypatch):
    """A class with the name of one of PyTorch Lightning's, which isn't installed."""
    kind = type("ModelCheckpoint", (), {})
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint, kind.__module__ = kind, name
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    yield kind
    module.ModelCheckpoint = None  # a stand-in takes its place


def contents(torch, lightning):
    """What the files of 2022 and 2023 contain: names, and what they contain."""
    import argparse
    import collections

    a = torch.arange(6.0).reshape(2, 3)
    flat = {"a": a, "b": a.half()}
    callbacks = {lightning: {"best_model_score": a[0, 0]}, "x": lightning()}
    return {
        "flat": flat,
        "state_dict": {"state_dict": flat, "epoch": 3, "optimizer_states": [{"state": {0: a}}]},
        "twice": {"state_dict": {"state_dict": flat}},
        "model": {"model": flat, "state_dict": 3},
        "parameters": {"a": torch.nn.Parameter(a), "b": torch.nn.Parameter(a.half())},
        "callbacks": {"state_dict": flat, "callbacks": callbacks},
        "numpy": {"state_dict": flat, "step": np.int64(1), "loss": [np.float32(2), np.ones(3)]},
        "python": {
            "state_dict": collections.OrderedDict(flat),
            "hyper_parameters": argparse.Namespace(lr=1.0, path=Path("x")),
            "counts": collections.defaultdict(list, {"x": [1]}),
        },
        "keys": {"state_dict": {**flat, 3: a, None: a, ("x",): a}, 7: 8},
    }


NAMES = (
    "flat",
    "state_dict",
    "twice",
    "model",
    "parameters",
    "callbacks",
    "numpy",
    "python",
    "keys",
)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name",
    "flat state_dict twice model parameters callbacks numpy python keys".split(),
)
def test_files_that_people_have(name, zipped, torch, lightning, tmp_path):
    data = contents(torch, lightning)[name]
    torch.save(data, tmp_path / "x.any", _use_new_zipfile_serialization=zipped)
    file = open_tensors(tmp_path / "x.any")
    assert file.shapes == {"a": (2, 3), "b": (2, 3)} and file.odd == {}
    for key in file.shapes:
        np.testing.assert_array_equal(file.read_tensor(key), np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(file.read_tensor("a", 1, 2), [[3, 4, 5]])


@pytest.mark.torch
def test_lists_and_odd_tensors(torch, tmp_path):
    torch.save([torch.ones(2), torch.ones(3, 1)], tmp_path / "x.pt")
    assert open_tensors(tmp_path / "x.pt").shapes == {"0": (2,), "1": (3, 1)}
    odd = {
        "int": torch.ones(2, dtype=torch.int32),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
    }
    torch.save(odd, tmp_path / "x.pt")
    assert open_tensors(tmp_path / "x.pt").odd.keys() == odd.keys()
    for data in (3, "x", {}, {"state_dict": None}, None):
        torch.save(data, tmp_path / "x.pt")
        assert open_tensors(tmp_path / "x.pt").shapes == {}


@pytest.mark.torch
def test_eight_bits(torch, tmp_path):
    value = torch.tensor([0.5, -448.0])
    torch.save({"a": value.to(torch.float8_e4m3fn)}, tmp_path / "x.pt")
    np.testing.assert_array_equal(open_tensors(tmp_path / "x.pt").read_tensor("a"), value)


@pytest.mark.torch
@pytest.mark.parametrize("kind", WRITE)
def test_pytorch_refuses_the_rest(kind, torch, trace):
    """Its own functions pass the first wall, and stand-ins can't be used to call anything."""
    inner = write_zip(trace.with_name("y.pt"), pickle.dumps(Call(os.mkdir, "trace"), protocol=2))
    for function in (torch.load, torch.hub.load, torch.jit.load):
        data = pickle.dumps(Call(function, str(inner)), protocol=2)
        path = WRITE[kind](trace.with_name("x.pt"), data)
        with pytest.raises(ValueError, match=r"Found: torch\.[\w.]*load$"):
            open_tensors(path)
    # numpy's function for scalars unpickles an object if it is asked to.
    scalar = np.float32(1).__reduce__()[0]
    hidden = pickle.dumps(Call(os.mkdir, "trace"), protocol=2)
    data = pickle.dumps({"a": Call(scalar, np.dtype("O"), hidden)}, protocol=2)
    assert open_tensors(WRITE[kind](trace.with_name("x.pt"), data)).shapes == {}
