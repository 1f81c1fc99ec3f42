"""The table of formats, and the functions that open and save a checkpoint of any format."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType

from stable_diffusion.checkpoints import hub
from stable_diffusion.checkpoints.contents import explain_missing, quote
from stable_diffusion.checkpoints.diffusers import (
    DIFFUSERS_FOLDER,
    VAE_CONFIG,
    DiffusersFolder,
    HubFolder,
    HubVAE,
    VAEFolder,
    save_diffusers,
)
from stable_diffusion.checkpoints.kerascv import (
    PRESETS,
    KerasCVFolder,
    KerasCVPreset,
    find_folder_kind,
    save_keras,
    save_kerascv,
)
from stable_diffusion.checkpoints.openvino import (
    NEEDED,
    OPENVINO_FOLDER,
    OpenVINOFolder,
    save_openvino,
)
from stable_diffusion.checkpoints.original import (
    SingleFile,
    check_name,
    find_only_file,
    is_single_file,
    save_original,
)
from stable_diffusion.checkpoints.reader import OtherVAE, Reader
from stable_diffusion.checkpoints.taesd import TinyFiles, choose_partner
from stable_diffusion.checkpoints.tensors import MAX_NAMES, SUFFIXES, check_dtype
from stable_diffusion.checks import check_path
from stable_diffusion.config import COMPONENTS, SD1, SD2, Config, TinyVAEConfig
from stable_diffusion.files import WEIGHTS_DIR
from stable_diffusion.replacing import check_output

EMBEDDED = {"emoji": WEIGHTS_DIR / "emoji"}  # presets that come with this package
KERASCV = {1: "sd1.4", 2: "sd2.1-base"}  # KerasCV's preset for each Stable Diffusion


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    Attributes:
        description: what the format is, for users.
        recognize: function of a path; returns whether it is a checkpoint of this format.
        read: function of `(path, config, ema, prediction_type, variant)`; returns a `Reader`.
        write: function of `(path, config, models, tokenizer, dtype)`; writes a checkpoint.
        find_kind: function of a `Config`; returns the `FolderKind`, or None for a single file.
        components: those keys of `COMPONENTS` that the format has.
    """

    description: str
    recognize: Callable
    read: Callable
    write: Callable
    find_kind: Callable
    components: tuple[str, ...] = tuple(COMPONENTS)


FORMATS = {  # `open_checkpoint` tries them in this order
    "diffusers": Format(
        "a folder in diffusers' layout",
        DiffusersFolder.recognize,
        lambda path, config, ema, predicts, variant: DiffusersFolder(path, variant),
        save_diffusers,
        lambda config: DIFFUSERS_FOLDER,
    ),
    "original": Format(
        "one .safetensors file in the original layout",
        is_single_file,
        lambda path, config, ema, predicts, variant: SingleFile(path, predicts, ema),
        save_original,
        lambda config: None,
    ),
    "openvino": Format(
        "a folder of models that OpenVINO runs, only for generating images",
        OpenVINOFolder.recognize,
        lambda path, config, ema, predicts, variant: OpenVINOFolder(path),
        save_openvino,
        lambda config: OPENVINO_FOLDER,
        NEEDED,
    ),
    "keras": Format(
        "a folder of Keras 3's .weights.h5",
        KerasCVFolder.recognize,  # also recognizes the next format
        lambda path, config, ema, predicts, variant: KerasCVFolder(path, config),
        save_keras,
        lambda config: find_folder_kind(config, "keras"),
    ),
    "kerascv": Format(
        "a folder of .h5 files that KerasCV loads",
        KerasCVFolder.recognize,
        lambda path, config, ema, predicts, variant: KerasCVFolder(path, config),
        save_kerascv,
        lambda config: find_folder_kind(config, "kerascv"),
    ),
}


def open_checkpoint(
    weights,
    config=None,
    version: int = 1,
    prediction_type: str | None = None,
    ema: bool = False,
    variant: str | None = None,
    vae=None,
) -> Reader:
    """Returns the reader of a checkpoint in any format.

    Args:
        weights: one of these:

            - None: random parameters
            - the name of a preset: "emoji", "sd1.4" or "sd2.1-base"; "kerascv" is KerasCV's preset
              for `version`
            - a folder in diffusers' layout, of KerasCV's .h5 files, of Keras 3's .weights.h5 files
              or of OpenVINO's .xml files
            - a file in the original layout, safetensors or PyTorch's (.ckpt), or a folder with one
              such file; its content tells which, not its suffix
            - "hf://owner/name" on the Hugging Face hub, optionally followed by @revision,
              /FILE.safetensors or both
            - a `Reader`, the result of this function
        config: the `Config` if `weights` contains none; None is that of `version`.
        version: version of Stable Diffusion, 1 or 2.
        prediction_type: what the model predicts: "epsilon" or "v_prediction". None reads it from
            the checkpoint. Most files in the original layout do not tell it.
        ema: whether to load the moving average of the diffusion model. Only files in the original
            layout may have one.
        variant: which files of a folder in diffusers' layout to load, such as "fp16", "ema" or
            "non_ema": those with this word in their names. A component that has none is loaded as
            usual: from its safetensors, otherwise those of "fp16", otherwise PyTorch's .bin.
        vae: where the VAE comes from instead: a file of only a VAE, or of a whole model, with
            names of the original layout or of diffusers; a folder in diffusers' layout, or its
            subfolder vae; a tiny VAE (TAESD) in diffusers' layout, or one of its two original
            files, or a folder of both; or anything else that `weights` may be. None is `weights`.

    Returns:
        A `Reader`. Parameters are downloaded when a component is built; config files from the hub
        are downloaded at once.

    Raises:
        ValueError: there is no such preset, folder or file, its format is unknown, or an argument
            is of another type.
    """
    for name, value in {"weights": weights, "vae": vae}.items():
        if not isinstance(value, str | os.PathLike | Reader | NoneType):
            raise ValueError(f"{name} must be None, a str, a path or a Reader, not {value!r:.200}.")
    reader = weights
    if not isinstance(weights, Reader):
        config = config or {1: SD1, 2: SD2}[version]
        reader = _find_reader(weights, config, version, ema, prediction_type, variant)
        if prediction_type:
            schedule = replace(reader.config.schedule, prediction_type=prediction_type)
            reader.config = replace(reader.config, schedule=schedule)
    return reader if vae is None else OtherVAE(reader, open_vae(vae))


def open_vae(vae) -> Reader:
    """Returns the reader of a VAE.

    Args:
        vae: see `open_checkpoint`; not None.

    Raises:
        ValueError: it is no VAE that the package reads.
    """
    if isinstance(vae, Reader):
        return vae
    path = Path(vae)
    if str(vae).startswith(hub.SCHEME):
        repository, file = hub.find_repository(str(vae))
        if not file and VAE_CONFIG in repository.files:
            return HubVAE(repository)
        if not file or not TinyFiles.recognize(path := repository.fetch_file(file)):
            return open_checkpoint(vae)
        if partner := choose_partner(file, repository.files):
            repository.fetch_file(partner)
    elif VAEFolder.recognize(path):
        return VAEFolder(vae)
    elif VAEFolder.recognize(path / "vae"):
        return DiffusersFolder(vae)
    return TinyFiles(path) if TinyFiles.recognize(path) else open_checkpoint(vae)


def _find_reader(weights, config, version, ema, prediction_type, variant):
    """Returns the reader of a checkpoint, see `open_checkpoint`."""
    weights = KERASCV[version] if weights == "kerascv" else weights
    if weights is None or weights in PRESETS:
        _check_options(weights, ema, variant)
        return Reader(config) if weights is None else KerasCVPreset(weights)
    path = EMBEDDED[weights] if weights in EMBEDDED else Path(weights)
    if str(weights).startswith(hub.SCHEME):
        repository, file = hub.find_repository(str(weights))
        file = file or find_only_file(repository.files)
        if not file:
            _check_options(weights, ema, None)
            return HubFolder(repository, variant)
        path = repository.fetch_file(file)
    if not os.path.exists(path) or not str(weights):
        raise _make_error(weights, path)
    known = next((format for format in FORMATS.values() if format.recognize(path)), None)
    if known is None and (file := find_only_file(os.listdir(path))):
        known, path = FORMATS["original"], path / file
    if known is None:
        raise _make_error(weights, path)
    single, folder = known is FORMATS["original"], known is FORMATS["diffusers"]
    _check_options(weights, ema and not single, variant and not folder)
    return known.read(path, config, ema, prediction_type, variant)


def _check_options(weights, ema, variant):
    """Raises a ValueError if options are given that the format of `weights` does not have."""
    if ema:
        raise ValueError(
            f"ema must be False, except for a file in the original layout, not {str(weights)!r}."
        )
    if variant:
        raise ValueError(
            f"variant must be None, except for a folder in diffusers' layout, not for "
            f"{str(weights)!r}."
        )


def _make_error(weights, path):
    """Returns the error about `weights` that are no checkpoint: what they are, and what is one."""
    presets = [*EMBEDDED, *PRESETS]
    address = re.fullmatch(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+)", str(weights))
    if os.path.exists(path) and str(weights):
        names = sorted(os.listdir(path))
        some = ", ".join(map(quote, names[:MAX_NAMES])) or "nothing"
        found = f"{path} is a folder without a checkpoint. It has {some}."
        if several := [name for name in names if name.lower().endswith(SUFFIXES)]:
            found += f" Pass the path of a file in it, such as {quote(str(path / several[0]))}."
    elif address and not Path(address[1]).parent.is_dir():
        found = f"There is no {path}. A repository of the hub is {hub.SCHEME}{address[1]}."
    elif "://" in str(weights):
        found = f"{weights} is an address; download the file first."
    elif near := get_close_matches(str(weights), presets, 1):
        found = f"There is no {path}. Did you mean {near[0]!r}?"
    else:
        found = explain_missing(path)
    return ValueError(
        f"{found} weights must be None, a preset ({', '.join(presets)}), a folder in diffusers' "
        f"layout, of .h5 or of OpenVINO's files, a .safetensors or .ckpt file in the original "
        f"layout, or hf://owner/name, not {str(weights)!r}."
    )


def check_target(path: str | Path, format: str, config: Config):
    """Checks whether a checkpoint can be written, before any component is built.

    Args:
        path, format: see `save_checkpoint`.
        config: the `Config` of the checkpoint.

    Raises:
        ValueError, OSError: see `replacing.check_output`; or there is no such format, or the name
            of a single file has another suffix than .safetensors; or the format has no names for
            a tiny VAE.
    """
    check_path("path", path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.")
    if isinstance(config.vae, TinyVAEConfig) and format in ("original", "kerascv"):
        raise ValueError(
            f"format must be 'diffusers', 'keras' or 'openvino', not {format!r}, which has no "
            f"names for a tiny VAE."
        )
    kind = FORMATS[format].find_kind(config)
    if kind is None:
        check_name(path)
    check_output(path, kind)


def save_checkpoint(
    pipeline, path: str | Path, format: str = "diffusers", dtype: str | None = None
):
    """Writes the four components of a pipeline, or three for OpenVINO.

    In a folder that is a checkpoint of the same format only the files of this format are replaced;
    all others stay. Components that are not built yet are built first. LoRAs and embeddings that
    were loaded are written with the components.

    Args:
        pipeline: a `StableDiffusion`.
        path: path of the folder, or of the .safetensors file.
        format: a key of `FORMATS`.
        dtype: "float32", "float16" or "bfloat16". None keeps the dtype of the parameters; the
            Keras formats have no other. For OpenVINO None is bfloat16 if the processor computes in
            it, and float16 otherwise.

    Raises:
        ValueError: the format or dtype is unknown, the path contains something else (see
            `check_target`), the pipeline's checkpoint lacks a component, or the dtype cannot hold
            the parameters. Nothing is written then.
        OSError: the path can't be written, or the disk is full. What was there is unchanged.
    """
    check_dtype(dtype)
    check_target(path, format, pipeline.config)
    chosen = FORMATS[format]
    pipeline.check_components(*chosen.components)
    models = {component: getattr(pipeline, component) for component in chosen.components}
    chosen.write(path, pipeline.config, models, pipeline.tokenizer, dtype)
