"""Damaged and hostile files: one clear error, quickly, and without large allocations."""

import json
import os
import struct
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

from stable_diffusion.checkpoints.kerascv import load_h5, save_legacy
from stable_diffusion.checkpoints.layout import Layout
from stable_diffusion.checkpoints.tensors import SafetensorsFiles, load_tensors
from stable_diffusion.files import find_file, replace_file, replace_folder

SECONDS, BYTES = 2.0, 30e6  # that an error may take; the files here have a few kB
LAYOUT = Layout(names={"first": "one", "second": "two"})


@pytest.fixture
def model():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.Dense(3, name="second"),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.standard_normal(w.shape) for w in model.weights])
    return model


@pytest.fixture
def content(model, tmp_path):
    """The bytes of a file that fits the model."""
    tensors = {
        slot.name: np.random.default_rng(i).standard_normal(slot.shape).astype("float32")
        for i, slot in enumerate(LAYOUT.find_slots(model))
    }
    save_file(tensors, tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


@contextmanager
def quick(seconds_allowed=SECONDS):
    tracemalloc.start()
    start = time.process_time()  # others may use the processor, too
    try:
        yield
    finally:
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < seconds_allowed and peak < BYTES


def values(model):
    return [ops.convert_to_numpy(weight).copy() for weight in model.weights]


def load_safetensors(model, path):
    load_tensors("model", LAYOUT.find_slots(model), SafetensorsFiles(path), LAYOUT)


def check_refused(model, path, match="x.safetensors"):
    before = values(model)
    with quick(), pytest.raises(ValueError, match=match):
        load_safetensors(model, path)
    for actual, expected in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(actual, expected)


def with_header(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def test_the_good_file(model, content, tmp_path):
    load_safetensors(model, tmp_path / "good.safetensors")
    kernel = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    np.testing.assert_array_equal(values(model)[0], kernel.T)


def test_truncated(model, content, tmp_path):
    path = tmp_path / "x.safetensors"
    for size in [*range(0, 40, 3), *range(40, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:size])
        check_refused(model, path, "x.safetensors is no intact safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        with_header(b"[" * 100_000),
        with_header(b"\xff\xfe"),
        with_header([1]),
        with_header({"one.bias": entry(data_offsets=[0, 8])}, b"1234"),
        with_header({"one.bias": entry(data_offsets=[8, 0])}, b"12345678"),
        with_header({"one.bias": entry(data_offsets=[-8, 0])}, b"12345678"),
        with_header({"one.bias": entry(shape=[-2])}, b"12345678"),
        with_header({"one.bias": entry(shape=[2**40, 2**40])}, b"12345678"),
        with_header({"one.bias": entry(shape=[2**62])}, b"12345678"),
        with_header({"one.bias": entry(shape="2")}, b"12345678"),
        with_header({"one.bias": entry(dtype="F31")}, b"12345678"),
        with_header({"one.bias": entry(dtype=3)}, b"12345678"),
        with_header({"one.bias": entry(), "two.bias": entry(data_offsets=[4, 12])}, b"x" * 12),
        with_header({"one.bias": entry(), "two.bias": entry(data_offsets=[0, 8])}, b"x" * 8),
        with_header({"one.bias": entry(), "two.bias": entry(data_offsets=[16, 24])}, b"x" * 24),
        with_header({"one.bias": entry()}, b"x" * 100),
        with_header({"one.bias": {"dtype": "F32"}}, b"x" * 8),
        with_header({"__metadata__": {"a": [1]}, "one.bias": entry()}, b"x" * 8),
    ],
)
def test_hostile_headers(content, model, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    check_refused(model, path, "x.safetensors is no intact safetensors file")


def test_changed_bytes_of_the_header(model, content, tmp_path):
    """Whatever one byte is changed to: an error that names the file, or a file that fits."""
    path = tmp_path / "x.safetensors"
    rng = np.random.default_rng(0)
    end = 8 + int.from_bytes(content[:8], "little")
    for place in rng.integers(0, end, 300):
        damaged = bytearray(content)
        damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with quick():
            try:
                load_safetensors(model, path)
            except ValueError as error:
                assert "x.safetensors" in str(error)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_no_floats(dtype, model, content, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({s.name: np.ones(s.shape, dtype) for s in LAYOUT.find_slots(model)}, path)
    check_refused(model, path, r"unchanged: 4 not float \(one.bias ")


def test_a_file_that_vanishes_midway(model, content, tmp_path):
    """Then the model is of two halves, and says so by NaN."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    source = SafetensorsFiles(path)
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="can't be read: .* All parameters of the model are NaN"):
        load_tensors("model", LAYOUT.find_slots(model), source, LAYOUT)
    assert all(np.isnan(value).all() for value in values(model))


# HDF5


@pytest.mark.parametrize("kind", ["legacy", "keras"])
def test_changed_bytes_of_hdf5(kind, model, tmp_path):
    """Anywhere but in the heap of names, where HDF5's own library can loop without an end.

    Before it refuses the length of a name it asks the system for that much memory, up to 4 GB.
    """
    path = tmp_path / ("x.h5" if kind == "legacy" else "x.weights.h5")
    if kind == "legacy":
        save_legacy(model, path)
    else:
        model.save_weights(path)
    content = path.read_bytes()
    heap = content.find(b"GCOL")  # only Keras 2's layout has one
    places = [n for n in range(len(content)) if heap < 0 or not heap <= n < heap + 4096]
    rng = np.random.default_rng(0)
    loaded = 0
    for place in [*rng.choice(places[:2000], 100), *rng.choice(places, 100)]:
        damaged = bytearray(content)
        damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with quick(10 * SECONDS):
            try:
                load_h5(model, path, model.load_weights)
                loaded += 1
            except ValueError as error:
                assert path.name in str(error)
    assert 20 < loaded < 200  # many bytes are parameters or padding


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5"])
def test_hdf5_of_another_model(suffix, model, tmp_path):
    path = tmp_path / f"x{suffix}"
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(9)])
    save_legacy(other, path) if suffix == ".h5" else other.save_weights(path)
    before = values(model)
    with quick(), pytest.raises(ValueError, match="doesn't fit the model .*, which is unchanged"):
        load_h5(model, path, model.load_weights)
    for actual, expected in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_hdf5_with_absurd_shapes(model, tmp_path):
    path = tmp_path / "x.h5"
    save_legacy(model, path)
    with h5py.File(path, "a") as file:
        name = file["first"].attrs["weight_names"][0]
        assert file["first"][name].shape == (4, 8)
        del file["first"][name]
        file["first"].create_dataset(name, (2**40, 2**20), "float32", chunks=(1024, 1024))
    with quick(), pytest.raises(ValueError, match="doesn't fit the model"):
        load_h5(model, path, model.load_weights)


# Paths


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_names_that_lead_out_of_the_folder(name, tmp_path):
    (tmp_path / "x").write_text("secret")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="has a name that leads out of it"):
        find_file(tmp_path / "model", name)


def test_links(tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "model"
    secret.write_text("x")
    (folder / "unet").mkdir(parents=True)
    (folder / "inside.json").write_text("x")
    (folder / "unet" / "config.json").symlink_to("../inside.json")
    assert find_file(folder, "unet/config.json").read_text() == "x"
    (folder / "outside.json").symlink_to(secret)
    (folder / "vae").symlink_to(tmp_path)
    for name in ("outside.json", "vae/secret"):
        with pytest.raises(ValueError, match="is a link that leads out of"):
            find_file(folder, name)
    assert find_file(folder, "absent.json") is None


def test_links_of_the_hubs_cache(tmp_path):
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    (home / "blobs" / "abc").write_text("x")
    (tmp_path / "secret").write_text("x")
    folder = home / "snapshots" / "123"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").symlink_to("../../../blobs/abc")
    (folder / "unet" / "other.json").symlink_to("../../../../secret")
    assert find_file(folder, "unet/config.json").read_text() == "x"
    with pytest.raises(ValueError, match="is a link that leads out of"):
        find_file(folder, "unet/other.json")


# Writing


def test_new_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_file(path) as written:
        Path(written).write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replace_file(path) as written:
        Path(written).write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with replace_folder(folder, "mark") as written:
        (written / "mark").write_text("old")
        (written / "unet").mkdir()
    (folder / "README.md").write_text("kept")
    with pytest.raises(RuntimeError), replace_folder(folder, "mark") as written:
        (written / "mark").write_text("half")
        raise RuntimeError
    assert (folder / "mark").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
    with replace_folder(folder, "mark") as written:
        (written / "mark").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "mark": "new",
        "README.md": "kept",
    }
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(ValueError, match="is no checkpoint of this format"):
        with replace_folder(tmp_path / "letters", "mark"):
            pass
