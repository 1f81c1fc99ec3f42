"""The table of formats, and the functions that open and save a checkpoint of any format."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stable_diffusion.checkpoints import hub
from stable_diffusion.checkpoints.diffusers import DiffusersFolder, HubFolder, save_diffusers
from stable_diffusion.checkpoints.kerascv import (
    PRESETS,
    KerasCVFolder,
    KerasCVPreset,
    save_keras,
    save_kerascv,
)
from stable_diffusion.checkpoints.openvino import NEEDED, OpenVINOFolder, save_openvino
from stable_diffusion.checkpoints.original import SingleFile, is_single_file, save_original
from stable_diffusion.checkpoints.reader import Reader
from stable_diffusion.checkpoints.tensors import check_dtype
from stable_diffusion.config import COMPONENTS, SD1, SD2
from stable_diffusion.files import WEIGHTS_DIR

EMBEDDED = {"emoji": WEIGHTS_DIR / "emoji"}  # presets that come with this package
KERASCV = {1: "sd1.4", 2: "sd2.1-base"}  # KerasCV's preset for each Stable Diffusion


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    Attributes:
        description: what the format is, for users.
        recognize: function of a path; returns whether it is a checkpoint of this format.
        read: function of `(path, config, ema)`; returns a `Reader`.
        write: function of `(path, config, models, tokenizer, dtype)`; writes a checkpoint.
        components: those keys of `COMPONENTS` that the format has.
    """

    description: str
    recognize: Callable
    read: Callable
    write: Callable
    components: tuple[str, ...] = tuple(COMPONENTS)


FORMATS = {  # `open_checkpoint` tries them in this order
    "diffusers": Format(
        "a folder in diffusers' layout",
        DiffusersFolder.recognize,
        lambda path, config, ema: DiffusersFolder(path),
        save_diffusers,
    ),
    "original": Format(
        "one .safetensors file in the original layout",
        is_single_file,
        lambda path, config, ema: SingleFile(path, ema=ema),
        save_original,
    ),
    "openvino": Format(
        "a folder of models that OpenVINO runs, only for generating images",
        OpenVINOFolder.recognize,
        lambda path, config, ema: OpenVINOFolder(path),
        save_openvino,
        NEEDED,
    ),
    "keras": Format(
        "a folder of Keras 3's .weights.h5",
        KerasCVFolder.recognize,  # also recognizes the next format
        lambda path, config, ema: KerasCVFolder(path, config),
        save_keras,
    ),
    "kerascv": Format(
        "a folder of .h5 files that KerasCV loads",
        KerasCVFolder.recognize,
        lambda path, config, ema: KerasCVFolder(path, config),
        save_kerascv,
    ),
}


def open_checkpoint(
    weights, config=None, version: int = 1, prediction_type: str | None = None, ema: bool = False
) -> Reader:
    """Returns the reader of a checkpoint in any format.

    Args:
        weights: one of these:

            - None: random parameters
            - the name of a preset: "emoji", "sd1.4" or "sd2.1-base"; "kerascv" is KerasCV's preset
              for `version`
            - a folder in diffusers' layout, of KerasCV's .h5 files, of Keras 3's .weights.h5 files
              or of OpenVINO's .xml files
            - a .safetensors or .ckpt file in the original layout
            - "hf://owner/name" on the Hugging Face hub, optionally followed by @revision,
              /FILE.safetensors or both
            - a `Reader`, the result of this function
        config: the `Config` if `weights` contains none; None is that of `version`.
        version: version of Stable Diffusion, 1 or 2.
        prediction_type: what the model predicts: "epsilon" or "v_prediction". None reads it from
            the checkpoint. Most files in the original layout do not tell it.
        ema: whether to load the moving average of the diffusion model. Only files in the original
            layout may have one.

    Returns:
        A `Reader`. Parameters are downloaded when a component is built; config files from the hub
        are downloaded at once.

    Raises:
        ValueError: there is no such preset, folder or file, or its format is unknown.
    """
    if isinstance(weights, Reader):
        return weights
    reader = _find_reader(weights, config or {1: SD1, 2: SD2}[version], version, ema)
    if prediction_type:
        schedule = replace(reader.config.schedule, prediction_type=prediction_type)
        reader.config = replace(reader.config, schedule=schedule)
    return reader


def _find_reader(weights, config, version, ema):
    """Returns the reader of a checkpoint, see `open_checkpoint`."""
    weights = KERASCV[version] if weights == "kerascv" else weights
    if str(weights).startswith(hub.SCHEME):
        repository, file = hub.find_repository(str(weights))
        if not file:
            return HubFolder(repository)
        weights = repository.fetch_file(file)
    path = EMBEDDED[weights] if weights in EMBEDDED else Path(weights or "")
    if ema and not is_single_file(path):
        raise ValueError(
            f"ema must be False, except for a file in the original layout, not {str(weights)!r}."
        )
    if weights is None:
        return Reader(config)
    if weights in PRESETS:
        return KerasCVPreset(weights)
    for format in FORMATS.values():
        if format.recognize(path):
            return format.read(path, config, ema)
    raise ValueError(
        f"weights must be None, a preset ({', '.join([*EMBEDDED, *PRESETS])}), a folder in "
        f"diffusers' layout, of .h5 or of OpenVINO's files, a .safetensors or .ckpt file in the "
        f"original layout, or hf://owner/name, not {str(weights)!r}."
    )


def save_checkpoint(
    pipeline, path: str | Path, format: str = "diffusers", dtype: str | None = None
):
    """Writes the four components of a pipeline, or three for OpenVINO.

    Components that are not built yet are built first. LoRAs and embeddings that were loaded are
    written with the components.

    Args:
        pipeline: a `StableDiffusion`.
        path: path of the folder, or of the .safetensors file.
        format: a key of `FORMATS`.
        dtype: "float32", "float16" or "bfloat16". None keeps the dtype of the parameters; the
            Keras formats have no other. For OpenVINO None is bfloat16 if the processor computes in
            it, and float16 otherwise.

    Raises:
        ValueError: the format or dtype is unknown, the path contains something else, or the dtype
            cannot hold the parameters. Nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.")
    check_dtype(dtype)
    chosen = FORMATS[format]
    models = {component: getattr(pipeline, component) for component in chosen.components}
    chosen.write(path, pipeline.config, models, pipeline.tokenizer, dtype)
