"""Damaged and hostile files: one clear error, quickly, and without large allocations."""

import json
import os
import struct
import time
import tracemalloc
import warnings
from contextlib import contextmanager
from pathlib import Path

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

from stable_diffusion.checkpoints.kerascv import load_h5, save_legacy
from stable_diffusion.checkpoints.layout import Layout
from stable_diffusion.checkpoints.tensors import SafetensorsFiles, is_finite, load_tensors
from stable_diffusion.files import find_file
from stable_diffusion.replacing import replace_file

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


def stored(variable):
    value = ops.convert_to_numpy(variable)
    return np.ascontiguousarray(value.T)


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


def test_metadata_that_are_null_are_none(model, content, tmp_path):
    """As the library safetensors reads them."""
    path, size = tmp_path / "x.safetensors", int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size]) | {"__metadata__": None}
    path.write_bytes(with_header(header, content[8 + size :]))
    assert SafetensorsFiles(path).metadata == {}
    load_safetensors(model, path)


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


@pytest.mark.parametrize("kind", ["link", "storage", "virtual", "group", "float128", "number"])
@pytest.mark.parametrize("suffix", [".h5", ".weights.h5"])
def test_what_no_program_writes_into_hdf5(kind, suffix, model, tmp_path):
    """Other files, odd floats and the like are refused while the model is unchanged."""
    path = tmp_path / f"x{suffix}"
    save_legacy(model, path) if suffix == ".h5" else model.save_weights(path)
    os.mkfifo(tmp_path / "pipe")  # to read it would never end
    with h5py.File(path, "a") as file:
        first = file["first" if suffix == ".h5" else "layers/dense"]
        name = first.attrs["weight_names"][0] if suffix == ".h5" else "vars/0"
        del first[name]
        if kind == "link":
            first[name] = h5py.ExternalLink("pipe", "x")
        elif kind == "storage":
            first.create_dataset(name, (4, 8), "float32", external=str(tmp_path / "pipe"))
        elif kind == "virtual":
            layout = h5py.VirtualLayout((4, 8), "float32")
            layout[:] = h5py.VirtualSource(tmp_path / "pipe", "x", (4, 8), "float32")
            first.create_virtual_dataset(name, layout)
        elif kind == "group":
            first.create_group(name)
        elif kind == "float128":
            first.create_dataset(name, (4, 8), "float128")
        elif kind == "number":
            first.create_dataset(name, (4, 8), "float32")
            first.attrs["weight_names"] = [1, 2]
            if suffix != ".h5":  # has no such list
                first[name].attrs.clear()
                del first[name]
    before = values(model)
    with quick(), pytest.raises(ValueError, match=path.name):
        load_h5(model, path, model.load_weights)
    for actual, expected in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(actual, expected)


# Values that are not finite


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", ">f4", ">f8"])
def test_finite(dtype):
    dtype = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    largest = float(ml_dtypes.finfo(dtype).max)
    good = np.array([0.0, -0.0, 1.0, largest, -largest, 1e-30], "float64").astype(dtype)
    assert is_finite(good) and is_finite(good[1:2]) and is_finite(good[:0])
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        for place in range(len(good)):
            bad = good.copy()
            bad[place] = value
            assert not is_finite(bad)


@pytest.mark.parametrize("format", ["safetensors", "h5", "weights.h5"])
@pytest.mark.parametrize(
    ("place", "value"), [("kernel", np.nan), ("bias", np.inf), ("kernel", -np.inf)]
)
def test_values_that_are_not_finite(place, value, format, model, tmp_path):
    path = tmp_path / f"x.{format}"
    variable = model.layers[1].kernel if place == "kernel" else model.layers[1].bias
    new = ops.convert_to_numpy(variable).copy()
    new.flat[-1] = value
    variable.assign(new)
    if format == "safetensors":
        slots = LAYOUT.find_slots(model)
        save_file({slot.name: stored(slot.variable) for slot in slots}, path)
    else:
        save_legacy(model, path) if format == "h5" else model.save_weights(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if format == "safetensors":
            load_safetensors(model, path)
        else:
            load_h5(model, path, model.load_weights)
    (said,) = [str(warning.message) for warning in caught if warning.category is UserWarning]
    name = f"two.{'weight' if place == 'kernel' else 'bias'}"
    name = name if format == "safetensors" else f"second/{place}"
    assert f"{path} has values that are not finite" in said and name in said
    assert not np.isfinite(values(model)[2 + (place == "bias")]).all()  # it is loaded, nevertheless


def test_values_that_the_dtype_cannot_hold(tmp_path):
    half = keras.layers.Dense(2, dtype="float16", name="first")
    model = keras.Sequential([keras.Input((2,)), half])
    large = {"one.weight": np.full((2, 2), 1e6, "float32"), "one.bias": np.zeros(2, "float32")}
    save_file(large, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="or not in the dtype of the model: in one.weight"):
        load_safetensors(model, tmp_path / "x.safetensors")


def test_eight_bits(model, tmp_path):
    rng = np.random.default_rng(0)
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        slots = LAYOUT.find_slots(model)
        tensors = {slot.name: rng.normal(size=slot.shape).astype(dtype) for slot in slots}
        save_file(tensors, tmp_path / "x.sft")
        load_safetensors(model, tmp_path / "x.sft")
        for slot in slots:
            expected = tensors[slot.name].astype("float32").T
            np.testing.assert_array_equal(ops.convert_to_numpy(slot.variable), expected)


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
