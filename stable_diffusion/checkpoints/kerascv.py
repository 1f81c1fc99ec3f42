"""KerasCV's checkpoints: Keras 2 "legacy" .h5 files, published or in a folder.

Such a file lists its layers and each layer's tensors in the order in which Keras 2 built them. The
names count instances (`dense_17`), so they are no key: the order is, and it is the order of the
layers and weights of this project's models.
"""

import re
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from stable_diffusion.checkpoints.building import Reader
from stable_diffusion.checkpoints.config import SD1, SD2, Config
from stable_diffusion.checkpoints.hub import download

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


class Preset(NamedTuple):
    """A published checkpoint: its `Config`, and the file of each part."""

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


class KerasCVFiles(Reader):
    """Loads each part from one .h5 file; subclasses say from which.

    The file is found before the part is built, so that a missing one is told at once.
    """

    loads = True

    def find(self, part) -> str:
        """Returns the path of a part's file."""
        raise NotImplementedError

    def build(self, part, make):
        self.find(part)
        return super().build(part, make)

    def load(self, part, model):
        model.load_weights(self.find(part))


class KerasCVPreset(KerasCVFiles):
    """Loads a published checkpoint. A part's file is downloaded when the part is first built.

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

    def find(self, part):
        return download(self.files[part])


class KerasCVFolder(KerasCVFiles):
    """Loads files with the published names from a folder; only the parts asked for must be there.

    The folder is Stable Diffusion 2's if it has that one's text encoder or diffusion model. If it
    has both versions', `config` decides.

    Args:
        folder: path of the folder.
        config: the `Config`. Unless it is a custom one, the folder's version replaces it.

    Raises:
        ValueError: no such folder; `build`: no such file in it.
    """

    def __init__(self, folder, config):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {self.folder}.")
        v1, v2 = (
            (self.folder / files["text_encoder"]).is_file()
            or (self.folder / files["diffusion_model"]).is_file()
            for files in (V1_FILES, V2_FILES)
        )
        if v1 == v2:
            v2 = config.unet.linear_projection
        self.files = V2_FILES if v2 else V1_FILES
        if config in (SD1, SD2):
            config = SD2 if v2 else SD1
        super().__init__(config)

    def find(self, part):
        path = self.folder / self.files[part]
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
            raise ValueError(
                f"{self.folder} has no {path.name}, the file of the {part.replace('_', ' ')}. "
                f"It has: {there}."
            )
        return str(path)


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
    with _open(path) as file:
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
                for spoilt, *_ in pairs[: i + 1]:
                    spoilt.assign(np.full(spoilt.shape, np.nan, "float32"))
                if not isinstance(error, OSError):
                    raise
                raise ValueError(
                    f"{path} is corrupt: {name} can't be read ({error}). Parameters of the model "
                    f"{model.name!r} are NaN now; load it again from another file."
                ) from error


def _open(path):
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
    if attribute in group.attrs:
        names = list(group.attrs[attribute])
    else:
        names = []
        while (chunk := f"{attribute}{len(names)}") in group.attrs:
            names.append(group.attrs[chunk])
        names = [name for chunk in names for name in chunk]
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _read_layers(file, path):
    """Returns `(layer, [(tensor, dataset), …])` of each layer with tensors, in order."""
    root = _root(file)
    if root is None:
        raise ValueError(f"{path} is not in Keras 2's legacy layout: it has no list of layers.")
    try:
        layers = [(name, root[name]) for name in _read_names(root, "layer_names")]
        layers = [
            (layer, [(name, group[name]) for name in _read_names(group, "weight_names")])
            for layer, group in layers
        ]
        return [(layer, tensors) for layer, tensors in layers if tensors]
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is corrupt: its layers can't be listed ({error}).") from error


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
