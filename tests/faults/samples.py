"""The models of the samples, and what is in their files, read without the package."""

from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from pathlib import Path

import ml_dtypes
import mutate
import numpy as np
from helpers import MAKE, write_merges
from keras import ops

from stable_diffusion import StableDiffusion
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import (
    COMPONENTS,
    Config,
    TextConfig,
    UNetConfig,
    VAEConfig,
    undo_departures,
)

PAIRS = 86
SPECIAL = 600  # id of the added token, after 512 bytes, 86 pairs, start and end of text
TOKEN = "<cat>"
CONFIG = undo_departures(  # its shapes tell all numbers, so that a file needs no metadata
    Config(
        TextConfig(64, 1, 1, 64, vocab_size=SPECIAL + 1),
        UNetConfig((32, 32), (8, 8), (True, False), 64, res_blocks=1, cell_size=2),
        VAEConfig((32, 32), res_blocks=1),
        size=64,
    )
)
COMPONENT_FOLDERS = {
    "text_encoder": "text_encoder",
    "diffusion_model": "unet",
    "decoder": "vae",
    "image_encoder": "vae",
}


class Wrong(AssertionError):  # noqa: N818
    """Something wrong was accepted, or something that is right was not."""


def expect(condition, message):
    """Raises `Wrong` unless a condition holds."""
    if not condition:
        raise Wrong(message)


# --- What is in the files, read without the package ----------------------------------------------

NUMPY_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def parse_safetensors(path):
    """Returns the float tensors of a file, and its metadata."""
    header, data = mutate.split_safetensors(path.read_bytes())
    metadata, tensors = header.pop("__metadata__", None) or {}, {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] in NUMPY_DTYPES:
            flat = np.frombuffer(data[start:end], NUMPY_DTYPES[entry["dtype"]])
            tensors[name] = flat.astype("float32").reshape(entry["shape"])
    return tensors, metadata


def hash_values(array):
    """Returns bytes that two arrays share if they have the same values in any order."""
    return np.sort(np.ravel(array)).tobytes()


def match_values(model, tensors):
    """Finds each variable of a model in a file by its values, which are random.

    Returns:
        Dict from the path of a variable to the name of its tensor and the order of its axes.
    """
    names = {hash_values(tensor): name for name, tensor in tensors.items()}
    found = {}
    for path, variable in list_variables(model).items():
        value = read_variable(variable)
        name = names[hash_values(value)]
        tensor = tensors[name]
        for axes in permutations(range(tensor.ndim)):
            turned = tensor.transpose(axes)
            if turned.size == value.size and (turned.reshape(value.shape) == value).all():
                found[path] = name, axes
                break
        else:
            raise AssertionError(f"{path} is not {name}")
    return found


def list_variables(model):
    """Returns a dict from the path of a variable, without the model's own name, to the variable."""
    return {v.path.removeprefix(f"{model.name}/"): v for v in model.weights}


def read_variable(variable):
    return ops.convert_to_numpy(variable.value).astype("float32")


def equal(a, b):
    """Returns whether two arrays have the same values, where NaN equals NaN."""
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=True)


# --- The models ----------------------------------------------------------------------------------


@cache
def make_tokenizer(folder):
    tokenizer = SimpleTokenizer(write_merges(Path(folder) / "merges.txt", PAIRS))
    tokenizer.add_tokens(TOKEN)
    return tokenizer


@cache
def make_pipeline(seed=0):
    """Returns a pipeline with random parameters, all of them different."""
    pipeline = StableDiffusion(weights=None, config=CONFIG, jit_compile=False)
    rng = np.random.default_rng(seed)
    for component in COMPONENTS:
        for variable in getattr(pipeline, component).weights:
            variable.assign(rng.normal(size=variable.shape).astype("float32"))
    return pipeline


@cache
def make_models():
    """Returns models to load into."""
    return {component: make(CONFIG) for component, make in MAKE.items()}


def _make_component(component, config, download_weights):
    return MAKE[component](replace(CONFIG, **{COMPONENTS[component]: config}))


def load_component(reader, component):
    """Loads a component; returns its model. If it is refused, the model must say so.

    A model of the sample's shape exists already. Others are built.
    """
    field = COMPONENTS[component]
    wanted = getattr(reader.config, field)
    if field == "unet":
        wanted = replace(wanted, cell_size=CONFIG.unet.cell_size)
    if wanted != getattr(CONFIG, field):
        return reader.build(component, partial(_make_component, component))
    model = make_models()[component]
    before = [read_variable(variable) for variable in model.weights]
    try:
        reader.load(component, model)
    except ValueError as error:
        now = [read_variable(v) for v in model.weights]
        if all(equal(a, b) for a, b in zip(now, before, strict=True)):
            raise
        expect("NaN" in str(error), f"the {component} changed, and {str(error)[:200]!r} is silent")
        unusable = any(np.isnan(value).all() for value in now)
        for variable, value in zip(model.weights, before, strict=True):
            variable.assign(value)
        expect(unusable, f"the {component} is half loaded")
        raise
    return model


def compare_model(component, model, tensors, places):
    """Compares a model with the tensors of a file."""
    for path, variable in list_variables(model).items():
        expect(path in places, f"{component} has {path}")
        name, axes = places[path]
        expect(name in tensors, f"{component} loaded without {name}")
        tensor, value = tensors[name], read_variable(variable)
        expect(tensor.size == value.size, f"{name} has the shape {tensor.shape}")
        if {tensor.ndim, len(axes)} == {2, 4}:  # a matrix is a convolution of 1x1
            expect(tensor.size == np.prod(tensor.shape[:2]), f"{name} has {tensor.shape}")
            tensor = tensor.reshape(*tensor.shape[:2], *[1] * (len(axes) - 2))
        axes = axes if tensor.ndim == len(axes) else range(tensor.ndim)
        expected = tensor.transpose(axes).reshape(value.shape)
        expect(equal(value, expected), f"{path} is not {name}")


# --- Files ---------------------------------------------------------------------------------------


def write_checkpoint(folder, name, format):
    pipeline = make_pipeline()
    pipeline._tokenizer = make_tokenizer(str(folder.parent))
    pipeline.save(folder / name, format, "float32")


def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file without the library."""
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, tensor in tensors.items():
        start, data = len(data), data + tensor.astype("<f4").tobytes()
        offsets = [start, len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    path.write_bytes(mutate.join_safetensors(header, data))


@cache
def find_places(path, suffix="**/*.safetensors"):
    """Returns, for each component, where a sample's files have its parameters."""
    tensors = {}
    for file in sorted(path.glob(suffix)):
        part = f"{file.parent.name}/" if file.parent != path else ""
        tensors |= {part + name: t for name, t in parse_safetensors(file)[0].items()}
    pipeline = make_pipeline()
    return {c: match_values(getattr(pipeline, c), tensors) for c in COMPONENTS}
