"""Files of named tensors: reads them, compares them with a model, loads them and writes them.

The formats that a `Layout` describes are stored in two kinds of files: safetensors, in one or
several files, and PyTorch's zip files, which contain a pickle. PyTorch opens these in the mode that
does not run the pickle's program.
"""

import json
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy and safetensors the dtype bfloat16
import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stable_diffusion.checkpoints.building import allocate_array, share_array
from stable_diffusion.files import replace_file

DTYPES = ("float32", "float16", "bfloat16")  # that this project writes
SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")  # of PyTorch's files, which contain a pickle
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}  # safetensors' to numpy's
MAX_NAMES = 10  # of each kind of problem, in an error
OUTPUTS = 32  # channels that are transposed at once, so that they fit the processor's cache
AHEAD = 2  # tensors that are read while another one is assigned

FAMILIES = (  # part of a name that only one family of models has, and the family
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
    """One or several safetensors files, seen as one collection of tensors.

    Args:
        path: path that errors name: that of the file, or of the index of several files.
        files: paths of the files. None is `path` only.

    Attributes:
        shapes: dict from the name of each tensor to its shape.
        odd: dict from the names of those tensors that are not float to their dtypes.
        metadata: dict of strings, of the first file that has any.

    Raises:
        ValueError: a file is missing, truncated or not in this format.
    """

    def __init__(self, path, files=None):
        self.path, self.shapes, self.odd, self._files = path, {}, {}, {}
        self.metadata = {}
        for file in files or [path]:
            try:
                with safe_open(file, framework="numpy"):  # checks the whole header
                    pass
                header, start = _read_header(file)
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

    def read_tensor(self, name, row=0, rows=1):
        """Returns a tensor as a numpy array, or slice number `row` of `rows` equal slices of it.

        The array is a map of the file. Drop it soon: the system counts the pages of an open map as
        memory of this process, up to the size of the file.
        """
        file, start, dtype = self._files[name]
        shape = self.shapes[name]
        tensor = np.memmap(file, dtype, "r", start, shape) if np.prod(shape) else np.empty(shape)
        size = len(tensor) // rows if rows > 1 else None
        return tensor[row * size : (row + 1) * size] if rows > 1 else tensor


def _read_header(file):
    """Returns the header of an intact safetensors file, and the position of the first tensor.

    Reference: https://github.com/huggingface/safetensors, "Format".
    """
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(size)), 8 + size


def open_safetensors(path: str | Path) -> SafetensorsFiles:
    """Opens a safetensors file; reads only the names and shapes of its tensors.

    Raises:
        ValueError: there is no such file, or it is damaged or in another format.
    """
    path = Path(path)
    if path.suffix in TORCH_SUFFIXES:
        raise ValueError(
            f"{path} is a pickle, which can run any program, and isn't opened. Convert it to "
            f".safetensors first: load it with torch.load(weights_only=True), and write its "
            f"tensors with safetensors.torch.save_file."
        )
    if path.suffix != SAFETENSORS_SUFFIX or not path.is_file():
        raise ValueError(f"path must be that of a .safetensors file, not {str(path)!r}.")
    return SafetensorsFiles(path)


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a whole safetensors file, with tensors of all dtypes.

    Returns:
        Dict from name to numpy array, and the metadata.

    Raises:
        ValueError: the file is missing, truncated or not in this format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from error


class TorchFile:
    """A file of PyTorch (.ckpt, .pt, .bin): a zip file with a pickle. Only its tensors are read.

    PyTorch opens it with `weights_only=True`. In this mode it accepts tensors and plain containers,
    and refuses everything else that a pickle can do. It maps the file into memory.

    Args:
        path: path of the file.

    Attributes:
        shapes, odd, metadata: as in `SafetensorsFiles`; the metadata are empty.

    Raises:
        ValueError: PyTorch is not installed, or it refuses the file.
    """

    def __init__(self, path):
        self.path, self.metadata = path, {}
        try:
            import torch
        except ImportError as error:
            raise ValueError(
                f"{path} is a PyTorch file: opening it needs PyTorch, which isn't installed. "
                f"Install it, or convert the file to .safetensors on a computer that has it: "
                f"stable-diffusion-convert {Path(path).name} OUT.safetensors"
            ) from error
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of many types; the message can be pages long
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{path} was refused, and nothing in it was run: it contains more than tensors, or "
                f"it is no zip file of PyTorch 1.6 or newer ({reason})"
            ) from error
        data = data.get("state_dict", data) if isinstance(data, dict) else {}
        self._tensors = {k: v for k, v in data.items() if isinstance(v, torch.Tensor)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.odd = {n: str(t.dtype) for n, t in self._tensors.items() if not t.is_floating_point()}

    def read_tensor(self, name, row=0, rows=1):
        """Returns a tensor as a numpy array, or slice number `row` of `rows` equal slices of it."""
        tensor = self._tensors[name]
        size = tensor.shape[0] // rows if rows > 1 else None
        tensor = tensor[row * size : (row + 1) * size] if rows > 1 else tensor
        return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()


def load_tensors(component, slots, source, layout):
    """Assigns the tensors of a file to the variables of a model: all of them, or none.

    Args:
        component: name of the model, for errors.
        slots: list of `Slot`.
        source: a `SafetensorsFiles` or a `TorchFile`.
        layout: the `Layout` that the slots came from.

    Raises:
        ValueError: names or shapes differ; the model is unchanged then. Or a tensor could not be
            read after all; then all parameters are filled with NaN, so that nobody uses a
            half-loaded model by mistake. The message names the file and lists what differs.
    """
    slots = [slot._replace(name=_find_name(slot.name, source.shapes, layout)) for slot in slots]
    _compare_tensors(component, slots, source, layout)

    def read(slot):
        tensor = source.read_tensor(slot.name, slot.row, slot.rows)
        return _convert_from_stored(tensor, slot.variable)

    with ThreadPoolExecutor(2) as pool:  # numpy transposes and casts in several threads at once
        waiting, coming = deque(), iter(slots)
        try:
            for slot in islice(coming, AHEAD):
                waiting.append((slot, pool.submit(read, slot)))
            while waiting:
                slot, future = waiting.popleft()
                slot.variable.assign(share_array(future.result()))
                waiting.extend((s, pool.submit(read, s)) for s in islice(coming, 1))
        except BaseException as error:  # also Ctrl-C
            pool.shutdown(cancel_futures=True)
            fill_with_nan(slot.variable for slot in slots)
            if not isinstance(error, SafetensorError | OSError | ValueError | RuntimeError):
                raise
            raise ValueError(
                f"{slot.name} in {source.path} can't be read: {error}. All parameters of the "
                f"{component} are NaN now; load it again from another file."
            ) from error


def fill_with_nan(variables):
    """Fills variables with NaN, so that nobody uses a half-loaded model by mistake."""
    for variable in variables:
        variable.assign(ops.full(variable.shape, float("nan"), variable.dtype))


def check_dtype(dtype):
    """Raises a ValueError unless a dtype is None or one of `DTYPES`."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")


def collect_tensors(slots, dtype):
    """Returns the tensors of a file: dict from name to numpy array.

    Args:
        slots: list of `Slot`. Those of the same tensor stand one after the other.
        dtype: one of `DTYPES`. None keeps the dtype of each variable.

    Raises:
        ValueError: the dtype is unknown, or it cannot hold a value.
    """
    check_dtype(dtype)
    tensors = {}
    for slot in slots:
        value = _convert_to_stored(slot, dtype or slot.variable.dtype)
        tensors[slot.name] = np.concatenate([tensors[slot.name], value]) if slot.row else value
    return tensors


def save_safetensors(path, tensors, metadata=None):
    """Writes a safetensors file, as a whole or not at all.

    Args:
        path: path of the file. One that exists is replaced.
        tensors: dict from name to numpy array.
        metadata: dict of strings.
    """
    with replace_file(path) as written:
        save_file(tensors, written, metadata={"format": "pt"} | (metadata or {}))


def _compare_tensors(component, slots, source, layout):
    """Raises a ValueError unless a file has the tensors of the slots, in their shapes, only."""
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
            if _drop_ones(source.shapes[name]) != _drop_ones(wanted[name])
        ],
        "not float": [f"{name} {source.odd[name]}" for name in shared if name in source.odd],
    }
    if any(problems.values()):
        raise ValueError(
            f"{source.path} doesn't fit the {component}, which is unchanged: "
            f"{summarize_problems(problems)}{guess_family(source.shapes)}"
        )


def summarize_problems(problems):
    """Returns one sentence with the number of problems of each kind, and the first few names.

    Args:
        problems: dict from the kind of problem to a list of names.
    """
    phrases = []
    for kind, names in problems.items():
        if names:
            more = ", ..." if len(names) > MAX_NAMES else ""
            phrases.append(f"{len(names)} {kind} ({', '.join(names[:MAX_NAMES])}{more})")
    return "; ".join(phrases) + "."


def guess_family(names):
    """Returns a sentence that says what a file with such names is, or "" if that is not known."""
    for clue, family in FAMILIES:
        if any(clue in name for name in names):
            return f" The file looks like {family}."
    return ""


def _find_name(name, stored, layout):
    """Returns a name, or its older form if the `stored` names have only that."""
    for new, old in layout.older:
        if name not in stored and new in name and (other := name.replace(new, old)) in stored:
            return other
    return name


def _drop_ones(shape):
    """Returns a kernel's shape without 1x1: convolution and matrix are the same projection."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _convert_from_stored(tensor, variable):
    """Returns a tensor of a file in the layout, shape and dtype of a variable."""
    value = allocate_array(variable.shape, variable.dtype)
    if not variable.path.endswith("/kernel"):
        value[...] = tensor.reshape(variable.shape)
        return value
    outputs, inputs = tensor.shape[:2]
    tensor = tensor.reshape(outputs, inputs, -1)
    kernel = value.reshape(-1, inputs, outputs)
    for start in range(0, outputs, OUTPUTS):  # numpy's transpose at once needs twice the time
        some = np.array(tensor[start : start + OUTPUTS])
        kernel[..., start : start + OUTPUTS] = some.transpose(2, 1, 0)
    return value


def _convert_to_stored(slot, dtype):
    """Returns the variable of a slot in the layout of the file, as a numpy array of `dtype`."""
    value = ops.convert_to_numpy(ops.cast(slot.variable, "float32"))
    if slot.variable.path.endswith("/kernel"):
        value = value.transpose(-1, -2, *range(value.ndim - 2))
    value = value.reshape(slot.shape)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(value.astype(dtype))
    if not np.isfinite(stored.astype("float32")).all():
        raise ValueError(f"{slot.variable.path} has values that are not finite in {dtype}.")
    return stored
