"""Files of named tensors: read one tensor at a time, and compared with a model before anything.

The formats that `Layout`s describe come in safetensors files, one or several, and in PyTorch's own
zip files, which are opened only in the way that runs nothing of what they say.
"""

import json
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy and safetensors what bfloat16 is
import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stable_diffusion.checkpoints.building import empty, to_tensor
from stable_diffusion.files import new_file

DTYPES = ("float32", "float16", "bfloat16")  # that files may have and models may be saved in
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")  # of PyTorch's own files, which are pickles
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}  # of safetensors
MAX_NAMES = 10  # of each kind, in an error
OUTPUTS = 32  # channels transposed at once, so that they stay in the processor's cache
AHEAD = 2  # tensors that are read while one is assigned

FAMILIES = (  # a name that only one kind of file has, and which
    ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL, which isn't supported"),
    ("label_emb.0.0.weight", "the UNet of Stable Diffusion XL, which isn't supported"),
    ("add_embedding.linear_1.weight", "the UNet of Stable Diffusion XL, which isn't supported"),
    ("joint_blocks.0.", "Stable Diffusion 3, which isn't supported"),
    ("double_blocks.0.", "Flux, which isn't supported"),
    ("controlnet_cond_embedding.", "a ControlNet, which isn't supported"),
    ("input_hint_block.", "a ControlNet, which isn't supported"),
    ("lora_down", "a LoRA, which load_lora loads"),
    ("lora_A", "a LoRA, which load_lora loads"),
    ("emb_params", "an embedding, which load_embedding loads"),
    ("cond_stage_model.model.", "Stable Diffusion 2 in the original layout"),
    ("cond_stage_model.transformer.", "Stable Diffusion 1 in the original layout"),
    ("model.diffusion_model.", "a diffusion model in the original layout"),
    ("first_stage_model.", "a VAE in the original layout"),
    ("input_blocks.0.0.", "a diffusion model in the original layout"),
    ("down_blocks.0.resnets.0.time_emb_proj.", "a UNet in diffusers' layout"),
    ("encoder.down_blocks.0.", "a VAE in diffusers' layout"),
    ("encoder.down.0.", "a VAE in the original layout"),
    ("text_model.encoder.", "a text encoder in diffusers' layout"),
)


class SafetensorsFiles:
    """One or several safetensors files, as one collection of tensors.

    Args:
        path: what errors name: the file, or the index of several.
        files: paths of the files; by default `path` alone.

    Attributes:
        shapes: dict from name to shape, of all tensors.
        odd: dict from name to dtype, of those that aren't float.
        metadata: dict of strings, of the first file.

    Raises:
        ValueError: a file that is missing, truncated or not in this format.
    """

    def __init__(self, path, files=None):
        self.path, self.shapes, self.odd, self._files = path, {}, {}, {}
        self.metadata = {}
        for file in files or [path]:
            try:
                with safe_open(file, framework="numpy"):  # checks all of the header
                    pass
                header, start = _header(file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is no intact safetensors file: {error}") from error
            metadata = header.pop("__metadata__", {})
            self.metadata = self.metadata or metadata
            for name, entry in header.items():
                self.shapes[name] = tuple(entry["shape"])
                if entry["dtype"] not in FLOATS:
                    self.odd[name] = entry["dtype"]
                dtype = FLOATS.get(entry["dtype"], "uint8")
                self._files[name] = file, start + entry["data_offsets"][0], dtype

    def read(self, name, row=0, rows=1):
        """Returns a tensor as numpy array, or the `row`-th of `rows` equal slices of it.

        The array is mapped from the file, only for as long as it is used: pages of a map that stays
        open count as this process's memory, and would at last be as large as the file.
        """
        file, start, dtype = self._files[name]
        shape = self.shapes[name]
        tensor = np.memmap(file, dtype, "r", start, shape) if np.prod(shape) else np.empty(shape)
        size = len(tensor) // rows if rows > 1 else None
        return tensor[row * size : (row + 1) * size] if rows > 1 else tensor


def _header(file):
    """Returns the header of a safetensors file that was checked, and where the data begin.

    Reference: https://github.com/huggingface/safetensors, "Format".
    """
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(size)), 8 + size


def open_safetensors(path: str | Path) -> SafetensorsFiles:
    """Opens a file, of which only the names and shapes are read yet.

    Raises:
        ValueError: no such file, one in another format, or a damaged one.
    """
    path = Path(path)
    if path.suffix in TORCH_SUFFIXES:
        raise ValueError(
            f"{path} is a pickle, which can run any program, and isn't opened. Convert it to "
            f".safetensors first: load it with torch.load(weights_only=True), and write its "
            f"tensors with safetensors.torch.save_file."
        )
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"path must be that of a .safetensors file, not {str(path)!r}.")
    return SafetensorsFiles(path)


class TorchFile:
    """A .ckpt, .pt or .bin of PyTorch: a zip file with a pickle, of which only tensors are read.

    PyTorch opens it with `weights_only=True`, which knows tensors and plain containers and refuses
    whatever else a pickle can do, and maps it into memory instead of reading it all.

    Args: path: path of the file.

    Attributes: as `SafetensorsFiles`.

    Raises:
        ValueError: PyTorch isn't installed, or refuses the file.
    """

    def __init__(self, path):
        self.path, self.metadata = path, {}
        try:
            import torch
        except ImportError as error:
            raise ValueError(
                f"{path} is a PyTorch file: it needs PyTorch, which isn't installed. "
                f"Install it, or convert the file to .safetensors where it is: "
                f"stable-diffusion-convert {Path(path).name} OUT.safetensors"
            ) from error
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of many types; the message may be pages long
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{path} was refused, and nothing in it was run: PyTorch finds more in it than "
                f"tensors, or it is no zip file of PyTorch 1.6 or newer ({reason})"
            ) from error
        data = data.get("state_dict", data) if isinstance(data, dict) else {}
        self._tensors = {k: v for k, v in data.items() if isinstance(v, torch.Tensor)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.odd = {n: str(t.dtype) for n, t in self._tensors.items() if not t.is_floating_point()}

    def read(self, name, row=0, rows=1):
        """Returns a tensor as numpy array, or the `row`-th of `rows` equal slices of it."""
        tensor = self._tensors[name]
        size = tensor.shape[0] // rows if rows > 1 else None
        tensor = tensor[row * size : (row + 1) * size] if rows > 1 else tensor
        return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()


def load_tensors(component, slots, source, layout):
    """Assigns the tensors of a file to a model's variables: all of them, or none.

    Args:
        component: what the model is called in errors.
        slots: list of `Slot`.
        source: a `SafetensorsFiles` or the like.
        layout: the `Layout` that the slots are from.

    Raises:
        ValueError: names or shapes differ, and the model is unchanged; or a tensor can't be read
            after all, and all parameters are NaN, so that a model of two halves can't be used
            unnoticed. The message names the file and lists what differs.
    """
    slots = [slot._replace(name=_older(slot.name, source.shapes, layout)) for slot in slots]
    _compare(component, slots, source, layout)

    def read(slot):
        return _from_stored(source.read(slot.name, slot.row, slot.rows), slot.variable)

    with ThreadPoolExecutor(2) as pool:  # numpy transposes and casts without holding the others up
        waiting, coming = deque(), iter(slots)
        try:
            for slot in islice(coming, AHEAD):
                waiting.append((slot, pool.submit(read, slot)))
            while waiting:
                slot, future = waiting.popleft()
                slot.variable.assign(to_tensor(future.result()))
                waiting.extend((s, pool.submit(read, s)) for s in islice(coming, 1))
        except BaseException as error:  # whatever it is, also Ctrl-C
            pool.shutdown(cancel_futures=True)
            spoil(slot.variable for slot in slots)
            if not isinstance(error, SafetensorError | OSError | ValueError | RuntimeError):
                raise
            raise ValueError(
                f"{slot.name} in {source.path} can't be read: {error}. All parameters of the "
                f"{component} are NaN now; load it again from another file."
            ) from error


def spoil(variables):
    """Fills variables with NaN, so that a model that is loaded in part can't be used unnoticed."""
    for variable in variables:
        variable.assign(ops.full(variable.shape, float("nan"), variable.dtype))


def collect_tensors(slots, dtype):
    """Returns the tensors of a file, numpy arrays by their names there.

    Args:
        slots: list of `Slot`; those of one tensor one after the other.
        dtype: one of `DTYPES`; None is that of each variable.

    Raises:
        ValueError: an unknown dtype, or a value that it can't hold.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    tensors = {}
    for slot in slots:
        value = to_stored(slot, dtype or slot.variable.dtype)
        tensors[slot.name] = np.concatenate([tensors[slot.name], value]) if slot.row else value
    return tensors


def save_safetensors(path, tensors, metadata=None):
    """Writes a safetensors file; a reader sees the old file or the whole new one, never a part."""
    with new_file(path) as written:
        save_file(tensors, written, metadata={"format": "pt"} | (metadata or {}))


def _compare(component, slots, source, layout):
    """Raises a ValueError unless the file has the slots' tensors, in their shapes, and no other."""
    wanted = {slot.name: (slot.shape[0] * slot.rows, *slot.shape[1:]) for slot in slots}
    ours = {name for name in source.shapes if name.startswith(layout.prefix)}
    ignored = re.compile(re.escape(layout.prefix) + f"({layout.ignored})")
    shared = sorted(wanted.keys() & source.shapes)
    problems = {
        "missing": sorted(wanted.keys() - source.shapes),
        "unused": sorted(name for name in ours - wanted.keys() if not ignored.fullmatch(name)),
        "misshapen": [
            f"{name} {source.shapes[name]}, not {wanted[name]}"
            for name in shared
            if _no_ones(source.shapes[name]) != _no_ones(wanted[name])
        ],
        "not float": [f"{name} {source.odd[name]}" for name in shared if name in source.odd],
    }
    if any(problems.values()):
        raise ValueError(
            f"{source.path} doesn't fit the {component}, which is unchanged: {summary(problems)}"
            f"{looks_like(source.shapes)}"
        )


def summary(problems):
    """Returns one sentence of a dict of lists of names: counts, and the first of each kind."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = ", ..." if len(names) > MAX_NAMES else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:MAX_NAMES])}{more})")
    return "; ".join(parts) + "."


def looks_like(names):
    """Returns a sentence on which kind of file has such names, empty if none is known."""
    for clue, family in FAMILIES:
        if any(clue in name for name in names):
            return f" The file looks like {family}."
    return ""


def _older(name, stored, layout):
    """Returns what `name` is called among the `stored` ones, if that is another known name."""
    for new, old in layout.older:
        if name not in stored and new in name and (other := name.replace(new, old)) in stored:
            return other
    return name


def _no_ones(shape):
    """Takes the 1x1 off a kernel: as convolution or matrix, it is the same projection."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _from_stored(tensor, variable):
    """Returns a tensor of a file as its variable has it, in the variable's shape and dtype."""
    value = empty(variable.shape, variable.dtype)
    if not variable.path.endswith("/kernel"):
        value[...] = tensor.reshape(variable.shape)
        return value
    outputs, inputs = tensor.shape[:2]
    tensor = tensor.reshape(outputs, inputs, -1)
    kernel = value.reshape(-1, inputs, outputs)
    for start in range(0, outputs, OUTPUTS):  # numpy alone would take twice as long
        some = np.array(tensor[start : start + OUTPUTS])
        kernel[..., start : start + OUTPUTS] = some.transpose(2, 1, 0)
    return value


def to_stored(slot, dtype):
    """Returns a variable as the slot has it in a file, a numpy array of `dtype`."""
    value = ops.convert_to_numpy(ops.cast(slot.variable, "float32"))
    if slot.variable.path.endswith("/kernel"):
        value = value.transpose(-1, -2, *range(value.ndim - 2))
    value = value.reshape(slot.shape)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(value.astype(dtype))
    if not np.isfinite(stored.astype("float32")).all():
        raise ValueError(f"{slot.variable.path} has values that are not finite in {dtype}.")
    return stored
