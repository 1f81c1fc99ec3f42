"""Keras' checkpoints: a folder of KerasCV's .h5 files, or of Keras 3's .weights.h5 files.

KerasCV's files have Keras 2's "legacy" layout. Such a file lists its layers, and the tensors of
each layer, in the order in which Keras 2 built them. The names contain counters (`dense_17`), which
differ from run to run. So tensors are matched by their order, which is the order of the layers and
weights of this project's models.

Neither format contains a config. The folders that this project writes have a subfolder `config`
with diffusers' config files.
"""

import os
import re
from collections import Counter
from contextlib import contextmanager
from itertools import islice, zip_longest
from math import prod
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from keras import ops

from stable_diffusion.checkpoints.contents import check_file, describe_content, quote
from stable_diffusion.checkpoints.diffusers_config import (
    CONFIG_FOLDER,
    drop_index,
    make_config_files,
    make_folder_kind,
    read_config,
    read_config_files,
    read_tokenizer,
    write_config_files,
)
from stable_diffusion.checkpoints.hub import download_published
from stable_diffusion.checkpoints.reader import Reader, make_missing_error
from stable_diffusion.checkpoints.tensors import fill_with_nan, is_finite, warn_about_values
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import COMPONENTS, SD1, SD2, Config
from stable_diffusion.files import find_file, list_files
from stable_diffusion.replacing import replace_file, replace_folder

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


class Preset(NamedTuple):
    """A published checkpoint: its `Config`, and the file of each component."""

    config: Config
    files: dict[str, str]


PRESETS = {
    "sd1.4": Preset(SD1, V1_FILES),
    "sd2.1-base": Preset(SD2, V2_FILES),
}

LOOKS = (  # a shape that only one of the published files has, and that file
    ((77, 768), "kcv_encoder.h5, the text encoder of Stable Diffusion 1"),
    ((77, 1024), "text_encoder_v2_1.h5, the text encoder of Stable Diffusion 2"),
    ((3, 3, 9, 320), "an inpainting diffusion model, which has 9 channels of input"),
    ((768, 320), "kcv_diffusion_model.h5, the diffusion model of Stable Diffusion 1"),
    ((1024, 320), "diffusion_model_v2_1.h5, the diffusion model of Stable Diffusion 2"),
    ((1, 1, 4, 4), "kcv_decoder.h5, the VAE's decoder"),
    ((3, 3, 3, 128), "vae_encoder.h5, the VAE's image encoder"),
)
OTHER_FORMATS = (".keras", ".weights.json")  # of Keras 3, which are not HDF5
FLOAT_BYTES = (2, 4, 8)  # of the floats that numpy and all backends have
MAX_DIFFERENCES = 10
HDF5_OVERHEAD, HDF5_OVERHEAD_EACH = 1 << 16, 1 << 12  # bytes of a file, and of each tensor, at most
MAX_LISTED = 100_000  # names of layers or tensors; Stable Diffusion has a few hundred


class KerasCVFiles(Reader):
    """Loads each component from one .h5 file. Subclasses find the file."""

    loads = True

    def find_component(self, component) -> str:
        """Returns the path of the file of a component.

        Raises:
            ValueError: there is no such file.
        """
        raise NotImplementedError

    def load(self, component, model):
        model.load_weights(self.find_component(component))


class KerasCVPreset(KerasCVFiles):
    """Loads a published checkpoint. Downloads the file of a component when it is built.

    Args:
        name: a key of `PRESETS`.

    Raises:
        ValueError: there is no such preset.
    """

    def __init__(self, name):
        if name not in PRESETS:
            raise ValueError(f"The presets are {', '.join(PRESETS)}; there is no {name!r}.")
        config, self.files = PRESETS[name]
        super().__init__(config)

    def find_component(self, component):
        return download_published(self.files[component])


class KerasCVFolder(KerasCVFiles):
    """Loads the files of a folder: KerasCV's published names, or `<component>.weights.h5`.

    The folder needs only the components that are used. With published names, the names of the text
    encoder and of the diffusion model tell whether it is Stable Diffusion 1 or 2. If the folder has
    the files of both versions, `config` decides.

    Args:
        folder: path of the folder.
        config: the `Config`. The config files in the folder replace it. If there are none, and it
            is that of Stable Diffusion 1 or 2, the version that the names tell replaces it.

    Raises:
        ValueError: there is no such folder. Method `build`: the folder has no such file.
    """

    @staticmethod
    def recognize(path):
        """Returns whether a path is a folder in one of these formats."""
        return any(name.endswith(".h5") for name in list_files(path))

    def __init__(self, folder, config):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {self.folder}.")
        has = {
            version: any(
                find_file(self.folder, files[component])
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
        self.names = KERAS_FILES if has["keras"] else V2_FILES if v2 else V1_FILES
        self.files = read_config_files(self.folder, CONFIG_FOLDER)
        if self.files:
            config = read_config(self.folder / CONFIG_FOLDER, self.files)
        elif config in (SD1, SD2) and not has["keras"]:
            config = SD2 if v2 else SD1
        super().__init__(config)

    def tokenizer(self):
        """Returns the tokenizer in the subfolder `config`, or CLIP's if there is none."""
        return read_tokenizer(self.folder / CONFIG_FOLDER, self.files, self.config.text)

    def check(self, component):
        """See `Reader.check`."""
        self.find_component(component)

    def find_component(self, component):
        path = find_file(self.folder, self.names[component])
        if path is None:
            there = ", ".join(list_files(self.folder)) or "no files"
            raise make_missing_error(
                component,
                f"{self.folder} has no {self.names[component]}, the file of the {component}. It "
                f"has: {there}.",
            )
        return str(path)


def find_folder_kind(config, format):
    """Returns the `FolderKind` of one of the Keras formats.

    Args:
        config: the `Config` of the checkpoint, which decides KerasCV's names.
        format: "keras" or "kerascv".
    """
    v2 = config.unet.linear_projection
    files = KERAS_FILES if format == "keras" else V2_FILES if v2 else V1_FILES
    # Of a folder with files of several of these formats, each program loads others.
    known = {*KERAS_FILES.values(), *V1_FILES.values(), *V2_FILES.values()}
    marks = KERAS_FILES.values() if format == "keras" else known - {*KERAS_FILES.values()}
    return make_folder_kind(
        {"keras": "folder of Keras' .weights.h5 files", "kerascv": "folder of KerasCV's files"}[
            format
        ],
        files.values(),
        lambda folder: any(find_file(folder, name) for name in marks),
        "|".join(map(re.escape, ["diffusion_model.xml", *sorted(known - {*files.values()})])),
    )


def save_keras(folder, config, models, tokenizer=None, dtype=None):
    """Writes a folder of Keras 3's .weights.h5 files, one for each component.

    Args:
        folder: path of a folder that does not exist, is empty, or is a checkpoint to replace.
        config: the `Config` that the models were built from. The subfolder `config` gets it.
        models: dict from component to model.
        tokenizer: a `SimpleTokenizer`; None is CLIP's.
        dtype: None, or the dtype of the models. The format has no other.

    Raises:
        ValueError: the folder contains something else, or `dtype` is another one.
    """
    _save_folder(folder, config, models, tokenizer, dtype, "keras")


def save_kerascv(folder, config, models, tokenizer=None, dtype=None):
    """Writes a folder of .h5 files with KerasCV's names, which its models load.

    Arguments and errors are those of `save_keras`; and KerasCV has no UNet that sees the guidance
    scale.
    """
    if config.unet.guidance_width:
        raise ValueError(
            "format must be 'diffusers', 'keras' or 'openvino', not 'kerascv': KerasCV has no "
            "diffusion model with an embedding of the guidance scale."
        )
    _save_folder(folder, config, models, tokenizer, dtype, "kerascv")


def _save_folder(folder, config, models, tokenizer, dtype, format):
    own = models["diffusion_model"].weights[0].dtype
    if dtype not in (None, own):
        raise ValueError(
            f"The {format} format has the dtype of the models, {own}; dtype must be None or that, "
            f"not {dtype!r}."
        )
    names = V2_FILES if config.unet.linear_projection else V1_FILES
    with replace_folder(folder, find_folder_kind(config, format)) as written:
        files = make_config_files(config, models, tokenizer or SimpleTokenizer())
        write_config_files(written / CONFIG_FOLDER, drop_index(files))
        for component, model in models.items():
            if format == "kerascv":
                save_legacy(model, written / names[component])
            else:
                _check_space(model, written / KERAS_FILES[component])
                model.save_weights(written / KERAS_FILES[component])


def _check_space(model, path):
    """Raises an OSError unless the disk has room for a file: HDF5 can crash on a full disk."""
    sizes = [4 * prod(variable.shape) + HDF5_OVERHEAD_EACH for variable in model.weights]
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, HDF5_OVERHEAD + sum(sizes))


def save_legacy(model, path):
    """Writes the parameters of a model in Keras 2's legacy layout.

    HDF5 has no bfloat16; such parameters are written as float32.

    Args:
        model: a built Keras model.
        path: path of the file. One that exists is replaced, as a whole or not at all.

    Reference: `save_weights_to_hdf5_group` in Keras 2's keras/saving/legacy/hdf5_format.py.
    """
    with replace_file(path) as written:
        _check_space(model, written)
        _write_legacy(model, written)


def _write_legacy(model, path):
    with h5py.File(path, "w") as file:
        layers = [layer for layer in model.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.15.0"
        for layer in layers:
            group = file.create_group(layer.name)
            names = [f"{variable.path}:0" for variable in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, variable in zip(names, layer.weights, strict=True):
                value = ops.convert_to_numpy(variable)
                half = value.dtype.name == "bfloat16"
                group[name] = value.astype("float32") if half else value


def load_h5(model, path, load, **kwargs):
    """Loads the parameters of a model from a .h5 file of Keras 2 or 3: all of them, or none.

    Args:
        model: a built Keras model.
        path: path of the file.
        load: function that loads Keras 3's formats; its arguments are the path and `kwargs`.
        **kwargs: passed to `load`.

    Raises:
        ValueError: the file is truncated, corrupt or of another model; the message names the file
            and says what differs.

    Warns:
        UserWarning: some parameters are NaN or infinite.
    """
    check_file(path)
    if is_legacy(path):
        return load_legacy(model, path)
    if not str(path).endswith(OTHER_FORMATS):
        _compare_shapes(model, path)
    try:
        load(path, **kwargs)
    except Exception as error:  # Keras raises many types
        fill_with_nan(model.weights)
        raise ValueError(
            f"{path} can't be loaded: {quote(str(error))} All parameters of the model "
            f"{model.name!r} are NaN now; load it again from another file."
        ) from error
    bad = [v.path for v in model.weights if not is_finite(ops.convert_to_numpy(v))]
    warn_about_values(path, model.name, bad)


def _compare_shapes(model, path):
    """Raises a ValueError unless a .weights.h5 has as many tensors of each shape as the model.

    Tensors of an optimizer do not count. Keras saves them with those of a compiled model, also
    with those of one that is a layer of another.
    """
    shapes = []

    def note(name, item):
        shape = getattr(item, "shape", None)  # a group has none
        if shape is not None and "/optimizer/" not in f"/{name}":
            shapes.append(shape)

    with _open_h5(path) as file, _explain_errors(path):
        file.visititems(note)
    ours = [tuple(variable.shape) for variable in model.weights]
    missing, unused = Counter(ours) - Counter(shapes), Counter(shapes) - Counter(ours)
    if missing or unused:
        listed = []
        for kind, counter in {"missing": missing, "unused": unused}.items():
            some = ", ".join(map(str, islice(counter, MAX_DIFFERENCES)))
            listed += [f"{sum(counter.values())} {kind} ({some})"] if counter else []
        raise ValueError(
            f"{path} doesn't fit the model {model.name!r}, which is unchanged. It has "
            f"{len(shapes)} tensors, the model {len(ours)}; by shape {'; '.join(listed)}."
        )


def is_legacy(path) -> bool:
    """Returns whether a file has Keras 2's legacy layout, like KerasCV's files.

    `load_legacy` reads such files. `keras.Model.load_weights` may read the others.

    Args:
        path: path of a file of parameters.

    Raises:
        ValueError: the file is missing or truncated, or it is not HDF5 and has none of the suffixes
            of Keras 3's other formats.
    """
    if str(path).endswith(OTHER_FORMATS):
        return False
    with _open_h5(path) as file, _explain_errors(path):
        return _find_layers(file) is not None


def load_legacy(model, path):
    """Loads parameters from a Keras 2 legacy .h5 file, by their order.

    The number of layers, the number of tensors in each layer and all shapes are compared with the
    model before the first parameter is assigned. So a file of another model leaves the model
    unchanged. Tensors are read one at a time. If reading fails midway, the parameters that were
    assigned already are filled with NaN, so that nobody uses a half-loaded model by mistake. To
    restore them would need twice the memory.

    Args:
        model: a built Keras model.
        path: path of the file.

    Raises:
        ValueError: the file is truncated, corrupt or of another model; the message names the file
            and says what differs.
    """
    ours = [(layer.name, layer.weights) for layer in model.layers if layer.weights]
    with _open_h5(path) as file:
        with _explain_errors(path):
            theirs = _read_layers(file, path)
            _compare_layers(model, ours, path, theirs)
        pairs = [
            (variable, *tensor)
            for (_, variables), (_, tensors) in zip(ours, theirs, strict=True)
            for variable, tensor in zip(variables, tensors, strict=True)
        ]
        bad = []  # names of tensors with values that are not finite
        for i, (variable, name, dataset) in enumerate(pairs):
            try:
                value = dataset[()]
                with np.errstate(over="ignore"):
                    variable.assign(value)
                    if not is_finite(value.astype(variable.dtype, copy=False)):
                        bad.append(name)
            except BaseException as error:  # also Ctrl-C
                fill_with_nan(variable for variable, *_ in pairs[: i + 1])
                if not isinstance(error, Exception):
                    raise
                raise ValueError(
                    f"{path} is corrupt: {quote(name)} can't be read ({quote(str(error))}). "
                    f"Parameters of the model {model.name!r} are NaN now; load it again from "
                    f"another file."
                ) from error
    warn_about_values(path, model.name, bad)


@contextmanager
def _explain_errors(path):
    """Turns an error that h5py raises about an open file into a ValueError that names the file."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, TypeError, UnicodeError, SystemError) as error:
        why = quote(str(error.args[0] if error.args else error)).rstrip(".")
        raise ValueError(f"{path} is corrupt: {why}.") from error


def _open_h5(path):
    """Opens an HDF5 file.

    Raises:
        ValueError: the file is missing, truncated or not HDF5; or it has tensors or links that lead
            to other files, or floats of an odd size.
    """
    check_file(path)
    try:
        if not h5py.is_hdf5(path):
            raise ValueError(f"{path} is not an HDF5 file: it is {describe_content(path)}.")
        file = h5py.File(path, "r")
    except OSError as error:
        sizes = re.search(r"truncated file: eof = (\d+).* stored_eof = (\d+)", str(error))
        if sizes is None:
            raise ValueError(f"{path} can't be read: {error}.") from error
        raise ValueError(
            f"{path} is truncated: it has {sizes[1]} of {sizes[2]} bytes. Copy it again."
        ) from error
    try:
        with _explain_errors(path):
            _check_objects(file)
    except ValueError:
        file.close()
        raise
    return file


def _check_objects(file):
    """Raises a LookupError if a file has something that no program writes for parameters.

    HDF5 lets a tensor or link lead to any other file on the computer.
    """

    def check_link(name, link):
        if isinstance(link, h5py.ExternalLink):
            return f"{quote(name)} is a link to another file, {quote(link.filename)}"

    def check_object(name, item):
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                return f"{quote(name)} is stored in another file"
            if item.dtype.kind == "f" and item.dtype.itemsize not in FLOAT_BYTES:
                return f"{quote(name)} has floats of {8 * item.dtype.itemsize} bits"

    # The first result ends the visit. An exception in a function that HDF5 calls is not safe.
    if found := file.visititems_links(check_link) or file.visititems(check_object):
        raise LookupError(found)


def _find_layers(file):
    """Returns the group that lists the layers, or None.

    In files of `model.save` it is a subgroup.
    """
    for group in (file, file.get("model_weights")):
        if group is not None and not {"layer_names", "layer_names0"}.isdisjoint(group.attrs):
            return group
    return None


def _read_names(group, attribute):
    """Reads a list of names. Keras 2 split lists of more than 64 kB into numbered chunks."""
    names, chunks = [], [attribute]
    if attribute not in group.attrs:
        chunks = [f"{attribute}{n}" for n in range(len(group.attrs))]
        chunks = [chunk for chunk in chunks if chunk in group.attrs]
    for chunk in chunks:
        if (count := prod(group.attrs.get_id(chunk).shape)) > MAX_LISTED:
            raise LookupError(f"{chunk} has {count:,} names")  # before they fill the memory
        names += list(group.attrs[chunk])
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise LookupError(f"{attribute} has {quote(wrong[0])}, which is no name")
    return names


def _read_layers(file, path):
    """Returns `(name, [(name of tensor, dataset), …])` of each layer with tensors, in order."""
    root = _find_layers(file)
    if root is None:
        raise ValueError(f"{path} is not in Keras 2's legacy layout: it has no list of layers.")
    layers = [
        (name, _find_member(root, name, h5py.Group)) for name in _read_names(root, "layer_names")
    ]
    layers = [
        (
            layer,
            [
                (name, _find_member(group, name, h5py.Dataset))
                for name in _read_names(group, "weight_names")
            ],
        )
        for layer, group in layers
    ]
    return [(layer, tensors) for layer, tensors in layers if tensors]


def _find_member(group, name, kind):
    """Returns a group or dataset of a group; a LookupError says if it is of the other kind."""
    member = group[name]
    if not isinstance(member, kind):
        raise LookupError(f"{quote(name)} is a {type(member).__name__}, not a {kind.__name__}")
    return member


def _compare_layers(model, ours, path, theirs):
    """Raises a ValueError unless layers, tensors and shapes agree and all tensors are float."""
    differences = []
    for (_, variables), (_, tensors) in zip_longest(ours, theirs, fillvalue=("", [])):
        for variable, tensor in zip_longest(variables, tensors):
            left = f"{variable.path} {tuple(variable.shape)}" if variable is not None else "nothing"
            right = f"{quote(tensor[0])} {tensor[1].shape}" if tensor else "nothing"
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
        f"{_describe_size(theirs, shapes)}, the model {_describe_size(ours, our_shapes)}.{looks}\n"
        f"The first {min(total, MAX_DIFFERENCES)} of {total} differences, model | file:\n{listed}"
    )


def _describe_size(layers, shapes):
    numbers = sum(map(prod, shapes))
    return f"{len(layers)} layers with {len(shapes)} tensors of {numbers:,} parameters"
