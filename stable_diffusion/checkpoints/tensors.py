"""Files of named tensors: reads them, compares them with a model, loads them and writes them.

The formats that a `Layout` describes are stored in two kinds of files: safetensors, and PyTorch's
files, see `torch_files`. `open_tensors` opens both, each in one or several files.
"""

import json
import re
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import ml_dtypes
import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stable_diffusion.checkpoints.building import allocate_array, share_array
from stable_diffusion.checkpoints.contents import (
    SAFETENSORS,
    TORCH,
    check_file,
    describe_content,
    quote,
)
from stable_diffusion.checkpoints.torch_files import TorchFile
from stable_diffusion.replacing import replace_file

DTYPES = ("float32", "float16", "bfloat16")  # that this project writes
SAFETENSORS_SUFFIX = ".safetensors"
SUFFIXES = (SAFETENSORS_SUFFIX, ".sft", ".ckpt", ".pt", ".pth", ".bin")  # in folders, in any case
FLOATS = {  # safetensors' names of dtypes to numpy's
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
MAX_NAMES = 10  # of each kind of problem, in an error
OUTPUTS = 32  # channels that are transposed at once, so that they fit the processor's cache
PIECE = 2**18  # values that are copied and looked at at once, for the same reason
AHEAD = 2  # tensors that are read while another one is assigned

LORA = "a LoRA, which load_lora loads"
LORA_XL = "a LoRA for Stable Diffusion XL, which isn't supported"
EMBEDDING = "an embedding, which load_embedding loads"
FAMILIES = (  # part of a name that only one family of models has, and the family
    ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL, which isn't supported"),
    ("noise_augmentor.", "Stable unCLIP, which isn't supported"),
    ("embedder.model.visual.", "Stable unCLIP, which isn't supported"),
    ("label_emb.weight", "the upscaler of Stable Diffusion 2, which isn't supported"),
    ("label_emb.0.0.weight", "the UNet of Stable Diffusion XL, which isn't supported"),
    ("add_embedding.linear_1.weight", "the UNet of Stable Diffusion XL, which isn't supported"),
    ("joint_blocks.0.", "Stable Diffusion 3, which isn't supported"),
    ("double_blocks.0.", "Flux, which isn't supported"),
    ("controlnet_cond_embedding.", "a ControlNet, which isn't supported"),
    ("input_hint_block.", "a ControlNet, which isn't supported"),
    ("body.0.block1.", "a T2I adapter, which isn't supported"),
    ("body.0.resnets.0.block1.", "a T2I adapter, which isn't supported"),
    ("ip_adapter.", "an IP adapter, which isn't supported"),
    ("3.conv.0.weight", "a tiny VAE (TAESD), which vae= loads"),
    ("lora_te2_", LORA_XL),
    ("text_encoder_2.", LORA_XL),
    ("transformer_blocks_1_attn1_", LORA_XL),
    ("lora_down", LORA),
    ("lora_up", LORA),
    ("lora_A", LORA),
    ("lora.down", LORA),
    ("lora_linear_layer", LORA),
    ("hada_w", LORA),
    ("lokr_w", LORA),
    ("emb_params", EMBEDDING),
    ("string_to_param", EMBEDDING),
    ("clip_g", "an embedding for Stable Diffusion XL, which isn't supported"),
    ("conditioner.embedders.0.model.", "Stable Diffusion 2 in the original layout"),
    ("cond_stage_model.model.", "Stable Diffusion 2 in the original layout"),
    ("cond_stage_model.transformer.", "Stable Diffusion 1 in the original layout"),
    ("model.diffusion_model.", "a diffusion model in the original layout"),
    ("first_stage_model.", "a VAE in the original layout"),
    ("input_blocks.0.0.", "a diffusion model in the original layout"),
    ("down_blocks.0.resnets.0.time_emb_proj.", "a UNet in diffusers' layout"),
    ("encoder.down_blocks.0.", "a VAE in diffusers' layout"),
    ("encoder.down.0.", "a VAE in the original layout"),
    ("text_model.encoder.", "a text encoder in diffusers' layout"),
    ("vision_model.encoder.", "an image encoder of CLIP, which isn't supported"),
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
                raise ValueError(
                    f"{file} is no intact safetensors file: {quote(str(error))}"
                ) from error
            metadata = header.pop("__metadata__", None) or {}  # null is none, as safetensors says
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


def open_tensors(path: str | Path, files=None):
    """Opens a file of tensors, safetensors or PyTorch's. Its content tells which, not its suffix.

    Reads only the names and shapes of a safetensors file.

    Args:
        path: path of the file, or of the index of several files.
        files: paths of the files, all of the same kind. None is `path` only.

    Returns:
        A `SafetensorsFiles` or a `TorchFile`.

    Raises:
        ValueError: there is no such file, it is damaged, or it is something else; the message says
            what it is. Or PyTorch is needed and not installed, or it refuses the file.
    """
    files = files or [path]
    found = {file: describe_content(file) for file in files}
    for file, what in found.items():
        if what not in (SAFETENSORS, TORCH):
            raise ValueError(
                f"{file} is no intact safetensors file, nor one of PyTorch: it is {what}."
            )
    if len(set(found.values())) > 1:
        raise ValueError(f"{path} has files of two kinds, safetensors and PyTorch's.")
    kind = SafetensorsFiles if SAFETENSORS in found.values() else TorchFile
    return kind(path, files)


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a whole safetensors file, with tensors of all dtypes.

    Returns:
        Dict from name to numpy array, and the metadata.

    Raises:
        ValueError: the file is missing, truncated or not in this format.
    """
    check_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {quote(str(error))}") from error


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

    Warns:
        UserWarning: some parameters are NaN or infinite.
    """
    slots = [slot._replace(name=_find_name(slot.name, source.shapes, layout)) for slot in slots]
    _compare_tensors(component, slots, source, layout)

    bad = []  # names of tensors with values that are not finite

    def read(slot):
        tensor = source.read_tensor(slot.name, slot.row, slot.rows)
        value, finite = _convert_from_stored(tensor, slot.variable)
        if not finite:
            bad.append(slot.name)
        return value

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
            if not isinstance(error, Exception):
                raise
            raise ValueError(
                f"{quote(slot.name)} in {source.path} can't be read: {quote(str(error))}. All "
                f"parameters of the {component} are NaN now; load it again from another file."
            ) from error
    warn_about_values(source.path, component, bad)


def warn_about_values(path, component, names):
    """Warns, once, if some tensors of a file have values that are not finite.

    Args:
        path: path of the file.
        component: name of the model.
        names: names of these tensors.
    """
    if names:
        first, count = quote(min(names)), len(set(names))
        warnings.warn(
            f"{path} has values that are not finite (NaN or infinite), or not in the dtype of the "
            f"{component}: in {first}{f' and {count - 1} more tensors' if count > 1 else ''}. "
            f"Images will be black or broken.",
            stacklevel=2,
        )


def is_finite(array):
    """Returns whether no value of an array of floats is NaN or infinite.

    The bits of such values, read as an integer, are at least those of infinity. So the largest
    integer tells, much faster than a look at each value.
    """
    if not array.size:
        return True
    order, size = array.dtype.byteorder.strip("|"), array.dtype.itemsize
    signed, unsigned = f"{order}i{size}", f"{order}u{size}"
    infinity = np.array([np.inf, -np.inf], array.dtype)
    positive, negative = infinity.view(signed)[0], infinity.view(unsigned)[1]
    # Negative numbers are the smallest signed integers, and the largest unsigned ones.
    return bool(array.view(signed).max() < positive and array.view(unsigned).max() < negative)


def fill_with_nan(variables):
    """Fills variables with NaN, so that nobody uses a half-loaded model by mistake."""
    for variable in variables:
        variable.assign(ops.full(variable.shape, float("nan"), variable.dtype))


def check_dtype(dtype):
    """Raises a ValueError unless a dtype is None or one of `DTYPES`."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")


def cast_stored(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns an array in the dtype that a file gets.

    Args:
        name: name of the tensor, for the error.
        array: float array.
        dtype: one of `DTYPES`.

    Raises:
        ValueError: the dtype cannot hold a value, as float16 cannot hold 65520.
    """

    def cast(dtype):
        with np.errstate(over="ignore"):
            return array.astype(dtype)

    stored = cast(dtype)
    if not np.isfinite(stored.astype("float32")).all():
        fitting = [d for d in DTYPES if np.isfinite(cast(d).astype("float32")).all()]
        which = f"; {' and '.join(fitting)} can hold them" if fitting else ""
        raise ValueError(f"{name} has values that are not finite in {dtype}{which}.")
    return stored


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
        _sort_metadata(written)


def _sort_metadata(path):
    """Sorts the metadata of a safetensors file, whose order is random: equal files, equal bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


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
            phrases.append(
                f"{len(names)} {kind} ({', '.join(map(quote, names[:MAX_NAMES]))}{more})"
            )
    return "; ".join(phrases) + "."


def guess_family(shapes):
    """Returns a sentence that says what a file is, or "" if that is not known.

    Args:
        shapes: dict from the name of each tensor to its shape.
    """
    for clue, family in FAMILIES:
        if any(clue in name for name in shapes):
            return f" The file looks like {family}."
    if len(shapes) == 1 and len(*shapes.values()) in (1, 2):
        return f" The file looks like {EMBEDDING}."
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
    """Returns a tensor of a file in the layout, shape and dtype of a variable.

    Returns:
        The array, and whether all its values are finite.
    """
    value, finite = allocate_array(variable.shape, variable.dtype), True
    with np.errstate(over="ignore", invalid="ignore"):
        if not variable.path.endswith("/kernel"):
            flat, tensor = value.reshape(-1), tensor.reshape(-1)
            for start in range(0, len(flat), PIECE):
                some = flat[start : start + PIECE]
                some[...] = tensor[start : start + PIECE]
                finite = finite and is_finite(some)
            return value, finite
        outputs, inputs = tensor.shape[:2]
        tensor, kernel = tensor.reshape(outputs, inputs, -1), value.reshape(-1, inputs, outputs)
        for start in range(0, outputs, OUTPUTS):  # numpy's transpose at once needs twice the time
            some = np.array(tensor[start : start + OUTPUTS], value.dtype)
            finite = finite and is_finite(some)
            kernel[..., start : start + OUTPUTS] = some.transpose(2, 1, 0)
    return value, finite


def _convert_to_stored(slot, dtype):
    """Returns the variable of a slot in the layout of the file, as a numpy array of `dtype`."""
    value = ops.convert_to_numpy(ops.cast(slot.variable, "float32"))
    if slot.variable.path.endswith("/kernel"):
        value = value.transpose(-1, -2, *range(value.ndim - 2))
    return np.ascontiguousarray(cast_stored(slot.variable.path, value.reshape(slot.shape), dtype))
