"""The table of formats: what opens a checkpoint of each, and what writes one."""

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
from stable_diffusion.checkpoints.tensors import DTYPES
from stable_diffusion.config import COMPONENTS, SD1, SD2
from stable_diffusion.files import WEIGHTS_DIR

EMBEDDED = {"emoji": WEIGHTS_DIR / "emoji"}  # presets that are a part of this package
KERASCV = {1: "sd1.4", 2: "sd2.1-base"}  # version of Stable Diffusion to KerasCV's preset


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    Attributes:
        description: what the user gets.
        recognize: function of a path: whether it is a checkpoint of this format.
        read: function of `(path, config, ema)` that returns a `Reader`.
        write: function of `(path, config, models, tokenizer, dtype)` that writes a checkpoint.
        components: which of `COMPONENTS` it has.
    """

    description: str
    recognize: Callable
    read: Callable
    write: Callable
    components: tuple[str, ...] = tuple(COMPONENTS)


FORMATS = {  # in the order in which they are tried
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
        KerasCVFolder.recognize,  # reads the next format, too
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
    """Finds the reader for what a user passed as `weights=`.

    Args:
        weights: None for fresh random parameters; a preset's name ("emoji", "sd1.4",
            "sd2.1-base"; "kerascv" is the one that KerasCV has for `version`); a folder in
            diffusers' layout, of KerasCV's .h5 files, of Keras 3's .weights.h5 or of OpenVINO's
            .xml; a file in the original layout, .safetensors or .ckpt; "hf://owner/name",
            optionally with @revision or /FILE.safetensors, on the Hugging Face Hub; or a `Reader`,
            as this function returns.
        config: the `Config` where `weights` doesn't tell it; None is that of `version`.
        version: of Stable Diffusion, 1 or 2.
        prediction_type: what the model predicts, "epsilon" or "v_prediction"; None is what the
            checkpoint says. Files in the original layout mostly don't.
        ema: whether to load the moving average that files in the original layout may have.

    Returns:
        A `Reader`. Nothing is downloaded before a component is built, except configs from the hub.

    Raises:
        ValueError: no such preset, folder or file, or no known format.
    """
    if isinstance(weights, Reader):
        return weights
    reader = _find_reader(weights, config or {1: SD1, 2: SD2}[version], version, ema)
    if prediction_type:
        schedule = replace(reader.config.schedule, prediction_type=prediction_type)
        reader.config = replace(reader.config, schedule=schedule)
    return reader


def _find_reader(weights, config, version, ema):
    weights = KERASCV[version] if weights == "kerascv" else weights
    if str(weights).startswith(hub.SCHEME):
        repository, file = hub.find_repository(str(weights))
        if not file:
            return HubFolder(repository)
        weights = repository.fetch(file)
    path = EMBEDDED[weights] if weights in EMBEDDED else Path(weights or "")
    if ema and not is_single_file(path):
        raise ValueError(f"ema is for files in the original layout, not for {str(weights)!r}.")
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
    """Writes a pipeline's four components (for OpenVINO the three that generate images).

    Components that are not built yet are built first. What was loaded into them, such as LoRAs and
    embeddings, is written with them.

    Args:
        pipeline: a `StableDiffusion`.
        path: path of the folder, or of the .safetensors file.
        format: a key of `FORMATS`.
        dtype: "float32", "float16" or "bfloat16"; None is that of the diffusion model's
            parameters. The Keras formats have no other; OpenVINO's takes None as bfloat16
            where the processor computes in it, else as float16.

    Raises:
        ValueError: an unknown format or dtype, a path that is something else already, or parameters
            that the dtype can't hold. Nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    chosen = FORMATS[format]
    models = {component: getattr(pipeline, component) for component in chosen.components}
    chosen.write(path, pipeline.config, models, pipeline.tokenizer, dtype)
