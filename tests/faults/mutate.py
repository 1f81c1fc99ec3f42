"""Damages files at random: bytes, JSON, headers of safetensors, HDF5 and lines of text.

Each mutator changes one file in place. Its arguments are a numpy `Generator` and the path, and it
returns what it did, in a few words. The same generator gives the same damage.
"""

import contextlib
import json
import zlib

import h5py
import numpy as np

LONG = "x" * 5000  # errors must not quote all of it
STRANGE = [  # values that a JSON file may have in place of any other
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-30, 1e308, 10**9, 10**30, 2**63, -(2**31)),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "1", "epsilon", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "ﬁ\u202e", LONG),
    *([], {}, [[]], [None], [1] * 3, [[1, 2], [3]], {"a": {"b": {}}}, [0] * 100_000),
]
ODD_DTYPES = [
    *("f2", "f8", "i4", "u1", "c8", "S4", "?", ">f4", np.longdouble),
    np.dtype([("r", "f4"), ("i", "f4")]),
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X", "", None, 4]


def make_generator(kind, number):
    """Returns the generator of a case: the same in every process."""
    return np.random.default_rng(zlib.crc32(f"{kind} {number}".encode()))


def choose(rng, choices):
    """Returns one of a sequence, as it is."""
    return choices[int(rng.integers(len(choices)))]


# --- Bytes ---------------------------------------------------------------------------------------


def flip_bits(rng, path, start=0):
    data = bytearray(path.read_bytes())
    places = rng.integers(start, len(data), int(rng.integers(1, 4)))
    for place in places:
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return f"bits flipped at {places.tolist()}"


def flip_bits_near_the_start(rng, path):
    data = path.read_bytes()
    size = min(len(data), int(choose(rng, [16, 200, 2000])))
    path.write_bytes(data[:size])
    what = flip_bits(rng, path)
    path.write_bytes(path.read_bytes() + data[size:])
    return what


def truncate(rng, path):
    data = path.read_bytes()
    size = int(choose(rng, [rng.integers(len(data)), rng.integers(min(len(data), 20)), 0]))
    path.write_bytes(data[:size])
    return f"truncated to {size} bytes"


def insert_bytes(rng, path):
    data = path.read_bytes()
    place, some = int(rng.integers(len(data) + 1)), rng.bytes(int(rng.integers(1, 100)))
    path.write_bytes(data[:place] + some + data[place:])
    return f"{len(some)} bytes inserted at {place}"


def append_bytes(rng, path):
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 5000))))
    return "bytes appended"


def zero_bytes(rng, path):
    data = bytearray(path.read_bytes())
    place, size = int(rng.integers(len(data))), int(rng.integers(1, 600))
    data[place : place + size] = bytes(len(data[place : place + size]))
    path.write_bytes(data)
    return f"zeros from {place}"


def drop_bytes(rng, path):
    data = path.read_bytes()
    place, size = int(rng.integers(len(data))), int(rng.integers(1, 600))
    path.write_bytes(data[:place] + data[place + size :])
    return f"{size} bytes dropped at {place}"


def replace_content(rng, path):
    content = [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 42\n",
        b"<!DOCTYPE html><html><body>Not found</body></html>",
        b'{"error": "Repository not found"}',
        b"\x80\x02}q\x00.",
        b"PK\x03\x04",
        b"\xff" * 1000,
        b"[" * 100_000,
        LONG.encode(),
    ]
    index = int(rng.integers(len(content)))
    path.write_bytes(content[index])
    return f"other content: {content[index][:20]}"


BYTES = [
    *(flip_bits, flip_bits_near_the_start, truncate, insert_bytes, append_bytes),
    *(zero_bytes, drop_bytes, replace_content),
]


# --- JSON ----------------------------------------------------------------------------------------


def _list_places(data, place=()):
    """Returns the path of each value in a JSON document."""
    items = []
    if isinstance(data, dict):
        items = list(data.items())
    elif isinstance(data, list):
        items = list(enumerate(data))[:20]
    places = [place]
    for key, value in items:
        places += _list_places(value, (*place, key))
    return places


def change_json(rng, data):
    """Changes one place of a JSON document; returns the document and what was done."""
    places = _list_places(data)
    place = choose(rng, places)
    if not place:
        place = choose(rng, places)  # the whole document more rarely
    if not place:
        value = choose(rng, STRANGE)
        return value, f"all is {value!r:.30}"
    *way, key = place
    parent = data
    for step in way:
        parent = parent[step]
    how = int(rng.integers(8))
    if how == 0:
        del parent[key]
        return data, f"{place} dropped"
    if how == 1 and isinstance(parent, dict):
        other = str(choose(rng, [key.upper(), f"{key} ", f"{key}_", "\0", "é" + key, LONG]))
        parent[other] = parent.pop(key)
        return data, f"{place} named {other!r:.30}"
    if how == 2 and isinstance(parent, dict):
        other = choose(rng, list(parent))
        parent[key], parent[other] = parent[other], parent[key]
        return data, f"{place} and {other!r:.30} swapped"
    if how == 3 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        old = parent[key]
        changed = [
            old + 1,
            old - 1,
            -old,
            old * 2,
            old * 1000,
            float(old),
            str(old),
            [old],
            not old,
        ]
        parent[key] = choose(rng, changed)
    elif how == 4:
        parent[key] = [parent[key]]
    elif how == 5 and isinstance(parent[key], str):
        text = parent[key]
        parent[key] = choose(rng, [text.upper(), text + " ", text[:-1], text + LONG, list(text)])
    else:
        parent[key] = choose(rng, STRANGE)
    return data, f"{place} is {parent[key]!r:.30}"


def change_json_file(rng, path):
    data, what = change_json(rng, json.loads(path.read_bytes()))
    path.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))
    return what


def double_json_key(rng, path):
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict) or not data:
        return truncate(rng, path)
    key, value = choose(rng, list(data)), choose(rng, STRANGE)
    text = json.dumps(data)
    path.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}", "utf-8")
    return f"{key} twice, then {value!r:.30}"


def nest_json(rng, path):
    depth = int(choose(rng, [100, 2000, 200_000]))
    path.write_text('{"a":' * depth + "1" + "}" * depth, "utf-8")
    return f"{depth} levels"


def recode_text(rng, path):
    data = path.read_bytes()
    text = data.decode("utf-8", "replace")
    codes = [("utf-16", text), ("utf-8-sig", text), ("latin-1", "é" + text), ("utf-8", text + "\0")]
    code, text = choose(rng, codes)
    path.write_bytes(text.encode(code, "replace"))
    return f"in {code}"


JSON = [change_json_file] * 6 + [double_json_key, nest_json, recode_text]


# --- Lines of text -------------------------------------------------------------------------------


def change_lines(rng, path):
    lines = path.read_bytes().split(b"\n")
    n, other = int(rng.integers(len(lines))), int(rng.integers(len(lines)))
    how = int(rng.integers(7))
    if how == 0:
        del lines[n]
    elif how == 1:
        lines[n], lines[other] = lines[other], lines[n]
    elif how == 2:
        lines.insert(other, lines[n])
    elif how == 3:
        lines[n] = choose(rng, [b"", b" ", b"a", b"a b c", b"\xff\xfe b", LONG.encode(), b"\0 \0"])
    elif how == 4:
        lines[n] = choose(rng, [b'"', b","]) + lines[n]
    elif how == 5:
        lines[n] += choose(rng, [b"\r", b" ", b",x", b"\xe2\x80\xa8y", b"\x85"])
    else:
        lines[n] = lines[n].replace(choose(rng, [b" ", b'"', b",", b"e"]), b"", 1)
    path.write_bytes(b"\n".join(lines))
    return f"line {n} changed ({how})"


TEXT = [change_lines] * 3 + [recode_text]


# --- safetensors ---------------------------------------------------------------------------------


def split_safetensors(data):
    """Returns the header of a safetensors file, and the bytes of its tensors."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header, tensors, length=None):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + tensors


def change_header_length(rng, path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    lengths = [length + 1, length - 1, length + 8, 0, 1, 2**63, 2**64 - 1, 10**8, 10**9, len(data)]
    length = choose(rng, lengths)
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    return f"length of the header {length}"


def change_header(rng, path):
    header, tensors = split_safetensors(path.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    name, other = choose(rng, names), choose(rng, names)
    entry = header[name]
    start, end = entry["data_offsets"]
    how = int(rng.integers(10))
    if how == 0:
        entry["dtype"] = choose(rng, DTYPES)
        what = f"{name} is {entry['dtype']}"
    elif how == 1:
        shape = entry["shape"]
        shapes = [shape[::-1], [*shape, 1], [1, *shape], shape[1:], [int(np.prod(shape))], [0]]
        shapes += [[-n for n in shape], [2**62, 4], [2**32, 2**32], [*shape[:-1], 1.5], "x", None]
        entry["shape"] = choose(rng, shapes)
        what = f"{name} has the shape {entry['shape']}"
    elif how == 2:
        shifts = [(0, 4), (4, 4), (-4, 0), (4, 0), (0, -4), (2**40, 2**40), (-(2**40), 0), (1, 1)]
        first, last = choose(rng, shifts)
        entry["data_offsets"] = [start + first, end + last]
        what = f"{name} has the offsets {entry['data_offsets']}"
    elif how == 3:
        entry["data_offsets"] = list(header[other]["data_offsets"])
        what = f"{name} overlaps {other}"
    elif how == 4:
        texts = [name[:-1], name.upper(), f"x.{name}", "", LONG, "é", name.replace(".0", ".1", 1)]
        renamed = choose(rng, texts)
        header[renamed] = header.pop(name)
        what = f"{name} is named {renamed[:40]!r}"
    elif how == 5:
        header[name], header[other] = header[other], header[name]
        what = f"{name} and {other} are swapped"
    elif how == 6:
        header[f"{name}.more"] = entry | {"data_offsets": [end, end], "shape": [0]}
        what = f"empty tensor {name}.more"
    elif how == 7:
        tensors += bytes(16)
        header["additional"] = {"dtype": "F32", "shape": [4]}
        header["additional"]["data_offsets"] = [len(tensors) - 16, len(tensors)]
        what = "one tensor more"
    elif how == 8:
        del header[name]
        for each in header.values():  # the others move up
            if "data_offsets" in each and each["data_offsets"][0] >= end:
                each["data_offsets"] = [n - end + start for n in each["data_offsets"]]
        tensors = tensors[:start] + tensors[end:]
        what = f"{name} is missing"
    else:
        header, what = change_json(rng, header)
    path.write_bytes(join_safetensors(header, tensors))
    return what


def change_metadata(rng, path):
    header, tensors = split_safetensors(path.read_bytes())
    metadata = header.get("__metadata__") or {}
    packed = [key for key, value in metadata.items() if value.startswith("{")]
    if packed and rng.integers(4):
        key = choose(rng, packed)
        data, what = change_json(rng, json.loads(metadata[key]))
        metadata[key] = json.dumps(data)
    else:
        metadata, what = change_json(rng, metadata)
    header["__metadata__"] = metadata
    path.write_bytes(join_safetensors(header, tensors))
    return f"metadata: {what}"


def change_numbers(rng, path):
    """Flips bits of tensors only, so that the file stays intact."""
    data = path.read_bytes()
    return "numbers: " + flip_bits(rng, path, 8 + int.from_bytes(data[:8], "little"))


def write_not_finite(rng, path):
    header, tensors = split_safetensors(path.read_bytes())
    names = [name for name, entry in header.items() if entry.get("dtype") == "F32"]
    name = choose(rng, names)
    value = float(choose(rng, ["nan", "inf", "-inf", "3e38"]))
    start = header[name]["data_offsets"][0]
    tensors = tensors[:start] + np.float32(value).tobytes() + tensors[start + 4 :]
    path.write_bytes(join_safetensors(header, tensors))
    return f"numbers: {name} has {value}"


SAFETENSORS = [
    *([change_header] * 8 + [change_metadata] * 2 + [change_numbers] * 3),
    *(write_not_finite, change_header_length, change_header_length),
]


# --- HDF5 ----------------------------------------------------------------------------------------


def change_hdf5(rng, path):
    """Changes one dataset, group or attribute; the file stays an intact HDF5 file."""
    datasets, groups = [], [""]
    with h5py.File(path, "r+") as file:
        file.visititems(
            lambda name, item: (datasets if isinstance(item, h5py.Dataset) else groups).append(name)
        )
        how = int(rng.integers(16))
        name, other, group = (choose(rng, names) for names in (datasets, datasets, groups))
        if how >= 12:
            return _change_attribute(rng, file, choose(rng, [group, *groups[:1]]))
        if how == 11 and group:
            del file[group]
            return f"{group} dropped"
        value = file[name][()]
        if how == 10:
            file[name][...] = choose(
                rng, [np.nan, np.inf, 1e30, -0.0, rng.normal(size=value.shape)]
            )
            return f"{name} has other numbers"
        del file[name]
        if how == 0:
            return f"{name} dropped"
        if how == 1:
            dtype = choose(rng, ODD_DTYPES)
            if np.dtype(dtype).names:
                file.create_dataset(name, value.shape, dtype)
            else:
                file[name] = value.astype(dtype)
            return f"{name} is {dtype}"
        if how == 2:
            shapes = [value.shape[::-1], (*value.shape, 1), (value.size,), (1, *value.shape), (0,)]
            file.create_dataset(name, choose(rng, [*shapes, (), None]), "f4")
            return f"{name} has another shape"
        if how == 3:
            file.create_group(name)
            return f"{name} is a group"
        if how == 4:
            file[name] = h5py.SoftLink(choose(rng, [f"/{other}", "/nowhere", f"/{name}", "/"]))
            return f"{name} is a link"
        if how == 5:
            file[name] = h5py.ExternalLink(
                str(choose(rng, ["/etc/passwd", path.name, "nowhere.h5"])), other
            )
            return f"{name} is an external link"
        if how == 6:
            size = value.nbytes
            source = choose(rng, ["/etc/passwd", "/dev/zero", "missing", str(path)])
            file.create_dataset(name, value.shape, "f4", external=[(source, 0, size)])
            return f"{name} is stored in {source}"
        if how == 7:
            layout = h5py.VirtualLayout(value.shape, "f4")
            layout[...] = h5py.VirtualSource("/etc/passwd", "x", value.shape)
            file.create_virtual_dataset(name, layout)
            return f"{name} is virtual"
        if how == 8:
            huge = (2**40,) if value.ndim < 2 else (2**30, *value.shape[1:])
            file.create_dataset(name, huge, "f4", chunks=tuple(min(n, 64) for n in huge))
            return f"{name} is huge"
        options = {"compression": "gzip"} if value.ndim else {}
        file.create_dataset(name, data=value, **options)
        return f"{name} is compressed"


def _change_attribute(rng, file, group):
    attributes = file[group or "/"].attrs
    if not attributes:
        file[group or "/"].attrs["more"] = 1
        return f"{group} has an attribute more"
    key = choose(rng, sorted(attributes))
    old = attributes[key]
    how = int(rng.integers(8))
    if how == 0 or np.ndim(old) == 0:
        del attributes[key]
        return f"{key} of {group} dropped"
    names = [name.encode() if isinstance(name, str) else name for name in old]
    n = int(rng.integers(len(names))) if names else 0
    if how == 1:
        names = names[::-1]
    elif how == 2:
        names = names[:-1]
    elif how == 3:
        names.append(names[n])
    elif how == 4:
        names[n] = choose(rng, [b"", b"/", b"..", b"\xff\xfe", b"nowhere", LONG.encode()])
    values = [names, [1.5] * len(names), b"name", np.zeros((200_000,), "S1"), h5py.Empty("S1")]
    # h5py writes no bytes that are not ASCII, and HDF5 no attributes of more than 64 kB.
    with contextlib.suppress(UnicodeDecodeError, OSError):
        attributes[key] = names if how < 5 else choose(rng, values[1:])
    return f"{key} of {group} changed ({how})"


HDF5 = [change_hdf5]
