"""Keras' checkpoints: KerasCV's Keras 2 "legacy" .h5 files and Keras 3's .weights.h5, in a folder.

A legacy file lists its layers and each layer's tensors in the order in which Keras 2 built them.
The names count instances (`dense_17`), so they are no key: the order is, and it is the order of the
layers and weights of this project's models.

Neither format says what a model looks like. The folders that this project writes have a subfolder
`config` that does, in diffusers' words.
"""

import re
from collections import Counter
from contextlib import contextmanager
from itertools import islice, zip_longest
from math import prod
from pathlib import Path
from typing import NamedTuple

import h5py
from keras import ops

from stable_diffusion.checkpoints.diffusers_config import (
    config_files,
    read_config,
    read_files,
    read_tokenizer,
    without_index,
    write_files,
)
from stable_diffusion.checkpoints.hub import download_published
from stable_diffusion.checkpoints.reader import Reader
from stable_diffusion.checkpoints.tensors import spoil
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import COMPONENTS, SD1, SD2, Config
from stable_diffusion.files import new_file, new_folder

V1_FILES = {
    "text_encoder": "kcv_encoder.h5",
    "diffusion_model": "kcv_diffusion_model.h5",
    "decoder": "kcv_decoder.h5",
    "image_encoder": "vae_encoder.h5",
}
V2_FILES = V1_FILES | {  # the VAE is the same
    "text_encoder": "text_encoder_v2_1.h5",
    "diffusion_model": "diffusion_model_v2_1.h5",
}
KERAS_FILES = {component: f"{component}.weights.h5" for component in COMPONENTS}
CONFIG = "config"  # subfolder


class Preset(NamedTuple):
    """A published checkpoint: its `Config`, and the file of each component."""

    config: Config
    files: dict[str, str]


PRESETS = {
    "sd1.4": Preset(SD1, V1_FILES),
    "sd2.1-base": Preset(SD2, V2_FILES),
}

LOOKS = (  # a shape that only one kind of file has, and which
    ((77, 768), "kcv_encoder.h5, the text encoder of Stable Diffusion 1"),
    ((77, 1024), "text_encoder_v2_1.h5, the text encoder of Stable Diffusion 2"),
    ((3, 3, 9, 320), "an inpainting diffusion model, which takes 9 channels"),
    ((768, 320), "kcv_diffusion_model.h5, the diffusion model of Stable Diffusion 1"),
    ((1024, 320), "diffusion_model_v2_1.h5, the diffusion model of Stable Diffusion 2"),
    ((1, 1, 4, 4), "kcv_decoder.h5, the VAE's decoder"),
    ((3, 3, 3, 128), "vae_encoder.h5, the VAE's image encoder"),
)
OTHER_FORMATS = (".keras", ".weights.json")  # of Keras 3, which are not HDF5
MAX_DIFFERENCES = 10
MAX_LISTED = 100_000  # names of layers or tensors; Stable Diffusion has a few hundred


class KerasCVFiles(Reader):
    """Loads each component from one .h5 file; subclasses say from which.

    The file is found before the component is built, so that a missing one is told at once.
    """

    loads = True

    def find(self, component) -> str:
        """Returns the path of a component's file."""
        raise NotImplementedError

    def build(self, component, make):
        self.find(component)
        return super().build(component, make)

    def load(self, component, model):
        model.load_weights(self.find(component))


class KerasCVPreset(KerasCVFiles):
    """Loads a published checkpoint. A component's file is downloaded when the component is first built.

    Args:
        name: a key of `PRESETS`.

    Raises:
        ValueError: no such preset.
    """

    def __init__(self, name):
        if name not in PRESETS:
            raise ValueError(f"The presets are {', '.join(PRESETS)}; there is no {name!r}.")
        config, self.files = PRESETS[name]
        super().__init__(config)

    def find(self, component):
        return download_published(self.files[component])


class KerasCVFolder(KerasCVFiles):
    """Loads files from a folder: with KerasCV's published names, or one .weights.h5 for each component.

    Only the components asked for must be there. Published names are Stable Diffusion 2's if the folder
    has that one's text encoder or diffusion model. If it has both versions', `config` decides.

    Args:
        folder: path of the folder.
        config: the `Config`. The folder's own replaces it if there is one; so does the version's
            that the names show, unless `config` is a custom one.

    Raises:
        ValueError: no such folder; `build`: no such file in it.
    """

    @staticmethod
    def recognize(path):
        """Tells whether a path is such a folder."""
        return path.is_dir() and any(path.glob("*.h5"))

    def __init__(self, folder, config):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {self.folder}.")
        has = {
            version: any(
                (self.folder / files[component]).is_file()
                for component in COMPONENTS
                if component in files
            )
            for version, files in {
                "1": {k: V1_FILES[k] for k in ("text_encoder", "diffusion_model")},
                "2": {k: V2_FILES[k] for k in ("text_encoder", "diffusion_model")},
                "keras": KERAS_FILES,
            }.items()
        }
        v2 = has["2"] if has["1"] != has["2"] else config.unet.linear_projection
        self.files = KERAS_FILES if has["keras"] else V2_FILES if v2 else V1_FILES
        self.configs = read_files(self.folder / CONFIG)
        if self.configs:
            config = read_config(self.folder / CONFIG, self.configs)
        elif config in (SD1, SD2) and not has["keras"]:
            config = SD2 if v2 else SD1
        super().__init__(config)

    def tokenizer(self):
        """Returns the tokenizer in the folder's `config`; CLIP's where there is none."""
        return read_tokenizer(self.folder / CONFIG, self.configs, self.config.text)

    def find(self, component):
        path = self.folder / self.files[component]
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
            raise ValueError(
                f"{self.folder} has no {path.name}, the file of the {component.replace('_', ' ')}. "
                f"It has: {there}."
            )
        return str(path)


def save_keras(folder, config, models, tokenizer=None, dtype=None):
    """Writes a folder of Keras 3's .weights.h5, one for each component, in the models' dtype.

    Args:
        folder: path, of a folder that doesn't exist, is empty, or is a checkpoint to replace.
        config: the `Config` the models were built from; it goes to the subfolder `config`.
        models: dict from component to model.
        tokenizer: None for CLIP's.
        dtype: None, or the models' own.

    Raises:
        ValueError: a folder of something else, or another dtype.
    """
    _save_folder(folder, config, models, tokenizer, dtype, "keras")


def save_kerascv(folder, config, models, tokenizer=None, dtype=None):
    """Writes a folder of .h5 files that KerasCV loads with `load_weights`, under its names.

    Arguments and errors are those of `save_keras`.
    """
    _save_folder(folder, config, models, tokenizer, dtype, "kerascv")


def _save_folder(folder, config, models, tokenizer, dtype, format):
    own = models["diffusion_model"].weights[0].dtype
    if dtype not in (None, own):
        raise ValueError(f"The {format} format is written in the models' {own}, not {dtype}.")
    names = V2_FILES if config.unet.linear_projection else V1_FILES
    with new_folder(folder, CONFIG) as written:
        files = config_files(config, models, tokenizer or SimpleTokenizer())
        write_files(written / CONFIG, without_index(files))
        for component, model in models.items():
            if format == "kerascv":
                save_legacy(model, written / names[component])
            else:
                model.save_weights(written / KERAS_FILES[component])


def save_legacy(model, path):
    """Writes a model's parameters as Keras 2 did, as float32 unless they are float16 or float64.

    Args:
        model: a built Keras model.
        path: path of the file; one that exists is replaced at the very end.

    Reference: `save_weights_to_hdf5_group` in Keras 2's keras/saving/legacy/hdf5_format.py.
    """
    with new_file(path) as written, h5py.File(written, "w") as file:
        layers = [layer for layer in model.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.15.0"
        for layer in layers:
            group = file.create_group(layer.name)
            names = [f"{variable.path}:0" for variable in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, variable in zip(names, layer.weights, strict=True):
                value = ops.convert_to_numpy(variable)
                half = value.dtype.name == "bfloat16"  # which HDF5 has no word for
                group[name] = value.astype("float32") if half else value


def load_h5(model, path, load, **kwargs):
    """Loads a model's parameters from a .h5 file of either kind: all of them, or none.

    Args:
        model: a built Keras model.
        path: path of the file.
        load: function of the path that loads Keras 3's formats.
        **kwargs: passed to it.

    Raises:
        ValueError: the file is truncated, corrupt or of another model; the message names the file
            and what differs.
    """
    if is_legacy(path):
        return load_legacy(model, path)
    if not str(path).endswith(OTHER_FORMATS):
        _compare_shapes(model, path)
    try:
        load(path, **kwargs)
    except Exception as error:  # which, depends on what Keras was doing
        spoil(model.weights)
        raise ValueError(
            f"{path} can't be loaded: {error} All parameters of the model {model.name!r} are NaN "
            f"now; load it again from another file."
        ) from error


def _compare_shapes(model, path):
    """Raises a ValueError unless a .weights.h5 has as many tensors of each shape as the model.

    An optimizer's, which Keras saves with those of a compiled model, don't count.
    """
    shapes = []

    def note(name, item):
        shape = getattr(item, "shape", None)  # a group has none
        if shape is not None and not name.startswith("optimizer/"):
            shapes.append(shape)

    with _open(path) as file, _readable(path):
        file.visititems(note)
    ours = [tuple(variable.shape) for variable in model.weights]
    missing, unused = Counter(ours) - Counter(shapes), Counter(shapes) - Counter(ours)
    if missing or unused:
        listed = [
            f"{sum(counter.values())} {kind} ({', '.join(map(str, islice(counter, 10)))})"
            for kind, counter in {"missing": missing, "unused": unused}.items()
            if counter
        ]
        raise ValueError(
            f"{path} doesn't fit the model {model.name!r}, which is unchanged. It has "
            f"{len(shapes)} tensors, the model {len(ours)}; by shape {'; '.join(listed)}."
        )


def is_legacy(path) -> bool:
    """Tells KerasCV's .h5, Keras 2's legacy layout, from Keras 3's formats.

    Args:
        path: path of a file of parameters.

    Returns:
        Whether `load_legacy` reads it. If not, `keras.Model.load_weights` may.

    Raises:
        ValueError: the file is missing, truncated, or neither HDF5 nor named as Keras 3's formats.
    """
    if str(path).endswith(OTHER_FORMATS):
        return False
    with _open(path) as file, _readable(path):
        return _root(file) is not None


def load_legacy(model, path):
    """Loads parameters from a Keras 2 legacy .h5 file, by order.

    Number of layers, number of tensors in each and all shapes are compared with the model before
    the first parameter is assigned, so a file of another model leaves the model as it was. Tensors
    are read one at a time. If reading fails midway, those already assigned are filled with NaN, so
    that a model of two halves can't be used unnoticed; restoring them would take twice the memory.

    Args:
        model: a built Keras model.
        path: path of the file.

    Raises:
        ValueError: the file is truncated, corrupt or of another model; the message names the file
            and what differs.
    """
    ours = [(layer.name, layer.weights) for layer in model.layers if layer.weights]
    with _open(path) as file:
        with _readable(path):
            theirs = _read_layers(file, path)
            _compare(model, ours, path, theirs)
        pairs = [
            (variable, *tensor)
            for (_, variables), (_, tensors) in zip(ours, theirs, strict=True)
            for variable, tensor in zip(variables, tensors, strict=True)
        ]
        for i, (variable, name, dataset) in enumerate(pairs):
            try:
                variable.assign(dataset[()])
            except BaseException as error:  # whatever it is, also Ctrl-C
                spoil(variable for variable, *_ in pairs[: i + 1])
                if not isinstance(error, OSError):
                    raise
                raise ValueError(
                    f"{path} is corrupt: {name} can't be read ({error}). Parameters of the model "
                    f"{model.name!r} are NaN now; load it again from another file."
                ) from error


@contextmanager
def _readable(path):
    """Turns what h5py raises about an open file into a ValueError that names the file."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, TypeError, UnicodeError) as error:
        why = str(error.args[0] if error.args else error).rstrip(".")
        raise ValueError(f"{path} is corrupt: {why}.") from error


def _open(path):
    """Opens an HDF5 file; a ValueError names one that is missing, truncated or something else."""
    path = Path(path)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {wrong}; the path of a .h5 file is needed.")
    try:
        if not h5py.is_hdf5(path):
            with path.open("rb") as file:
                start = file.read(24)
            raise ValueError(
                f"{path} is not an HDF5 file: its {path.stat().st_size} bytes begin with {start!r}."
            )
        return h5py.File(path, "r")
    except OSError as error:
        sizes = re.search(r"truncated file: eof = (\d+).* stored_eof = (\d+)", str(error))
        if sizes is None:
            raise ValueError(f"{path} can't be read: {error}.") from error
        raise ValueError(
            f"{path} is truncated: it has {sizes[1]} of {sizes[2]} bytes. Copy it again."
        ) from error


def _root(file):
    """Returns the group that lists the layers, or None. A whole saved model has it further in."""
    for group in (file, file.get("model_weights")):
        if group is not None and not {"layer_names", "layer_names0"}.isdisjoint(group.attrs):
            return group
    return None


def _read_names(group, attribute):
    """Reads a list of names, which Keras 2 cut into numbered chunks where it is over 64 kB."""
    names, chunks = [], [attribute]
    if attribute not in group.attrs:
        chunks = [f"{attribute}{n}" for n in range(len(group.attrs))]
        chunks = [chunk for chunk in chunks if chunk in group.attrs]
    for chunk in chunks:
        if (count := prod(group.attrs.get_id(chunk).shape)) > MAX_LISTED:
            raise LookupError(f"{chunk} has {count:,} names")  # before there is memory for them
        names += list(group.attrs[chunk])
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _read_layers(file, path):
    """Returns `(layer, [(tensor, dataset), …])` of each layer with tensors, in order."""
    root = _root(file)
    if root is None:
        raise ValueError(f"{path} is not in Keras 2's legacy layout: it has no list of layers.")
    layers = [(name, root[name]) for name in _read_names(root, "layer_names")]
    layers = [
        (layer, [(name, group[name]) for name in _read_names(group, "weight_names")])
        for layer, group in layers
    ]
    return [(layer, tensors) for layer, tensors in layers if tensors]


def _compare(model, ours, path, theirs):
    """Raises a ValueError unless layers, tensors and shapes agree and all tensors are float."""
    differences = []
    for (_, variables), (_, tensors) in zip_longest(ours, theirs, fillvalue=("", [])):
        for variable, tensor in zip_longest(variables, tensors):
            left = f"{variable.path} {tuple(variable.shape)}" if variable is not None else "nothing"
            right = f"{tensor[0]} {tensor[1].shape}" if tensor else "nothing"
            if variable is None or not tensor or tuple(variable.shape) != tensor[1].shape:
                differences.append(f"  {left} | {right}")
            elif tensor[1].dtype.kind != "f":
                differences.append(f"  {left} | {right} is {tensor[1].dtype}, not float")
    if not differences:
        return
    shapes = [tensor.shape for _, tensors in theirs for _, tensor in tensors]
    looks = next((f" The file looks like {look}." for shape, look in LOOKS if shape in shapes), "")
    our_shapes = [tuple(variable.shape) for _, variables in ours for variable in variables]
    total, listed = len(differences), "\n".join(differences[:MAX_DIFFERENCES])
    raise ValueError(
        f"{path} doesn't fit the model {model.name!r}, which is unchanged. It has "
        f"{_count(theirs, shapes)}, the model {_count(ours, our_shapes)}.{looks}\n"
        f"The first {min(total, MAX_DIFFERENCES)} of {total} differences, model | file:\n{listed}"
    )


def _count(layers, shapes):
    numbers = sum(map(prod, shapes))
    return f"{len(layers)} layers with {len(shapes)} tensors of {numbers:,} parameters"
