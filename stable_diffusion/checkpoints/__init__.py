"""Where parameters come from and go to: presets, folders and files, one module for each format."""

from dataclasses import replace
from pathlib import Path

from stable_diffusion.checkpoints import embedding, hub, lora, openvino
from stable_diffusion.checkpoints.building import PARTS, Reader, release
from stable_diffusion.checkpoints.config import SD1, SD2
from stable_diffusion.checkpoints.diffusers import DiffusersFolder, HubFolder, save_diffusers
from stable_diffusion.checkpoints.kerascv import PRESETS, KerasCVFolder, KerasCVPreset, save_keras
from stable_diffusion.checkpoints.original import TORCH_FILES, SingleFile, save_original
from stable_diffusion.checkpoints.tensors import DTYPES
from stable_diffusion.clip_tokenizer import WEIGHTS_DIR

KERASCV = {"SD1": "sd1.4", "SD2": "sd2.1-base"}
FORMATS = {
    "diffusers": "a folder in diffusers' layout",
    "original": "one .safetensors file in the original layout",
    "keras": "a folder of Keras 3's .weights.h5",
    "kerascv": "a folder of .h5 files that KerasCV loads",
    "openvino": "a folder of models that OpenVINO runs, for drawing alone",
}


def open_checkpoint(
    weights, config=None, preset="SD1", prediction_type: str | None = None, ema: bool = False
) -> Reader:
    """Finds the reader for what a user passed as `weights=`.

    Args:
        weights: None for fresh random parameters; a preset's name ("emoji", "sd1.4",
            "sd2.1-base"; "kerascv" is the one that KerasCV has for `preset`); a folder in
            diffusers' layout, of KerasCV's .h5 files, of Keras 3's .weights.h5 or of OpenVINO's
            .xml; a file in the original layout, .safetensors or .ckpt; "hf://owner/name",
            optionally with @revision or /FILE.safetensors, on the Hugging Face Hub; or a `Reader`,
            as this function returns.
        config: the `Config` where `weights` doesn't tell it; None is that of `preset`.
        preset: "SD1" or "SD2".
        prediction_type: what the model predicts, "epsilon" or "v_prediction"; None is what the
            checkpoint says. Files in the original layout mostly don't.
        ema: whether to load the moving average that files in the original layout may have.

    Returns:
        A `Reader`. Nothing is downloaded before a part is built, except configs from the hub.

    Raises:
        ValueError: no such preset, folder or file, or no known format.
    """
    if isinstance(weights, Reader):
        return weights
    reader = _find(weights, config or {"SD1": SD1, "SD2": SD2}[preset], preset, ema)
    if prediction_type:
        schedule = replace(reader.config.schedule, prediction_type=prediction_type)
        reader.config = replace(reader.config, schedule=schedule)
    return reader


def _find(weights, config, preset, ema):
    weights = KERASCV[preset] if weights == "kerascv" else weights
    if str(weights).startswith(hub.SCHEME):
        repository, file = hub.find(str(weights))
        if not file:
            return HubFolder(repository)
        weights = repository.fetch(file)
    path = WEIGHTS_DIR / "emoji" if weights == "emoji" else Path(weights or "")
    single = path.suffix == ".safetensors" or path.suffix in TORCH_FILES
    if ema and not (single and path.is_file()):
        raise ValueError(f"ema is for files in the original layout, not for {str(weights)!r}.")
    if weights is None:
        return Reader(config)
    if weights in PRESETS:
        return KerasCVPreset(weights)
    if single and path.is_file():
        return SingleFile(path, ema=ema)
    if (path / "model_index.json").is_file() or (path / "unet").is_dir():
        return DiffusersFolder(path)
    if (path / "diffusion_model.xml").is_file():
        return openvino.OpenVINOFolder(path)
    if path.is_dir() and any(path.glob("*.h5")):
        return KerasCVFolder(path, config)
    raise ValueError(
        f"weights must be None, a preset ({', '.join(['emoji', *PRESETS])}), a folder in "
        f"diffusers' layout, of .h5 or of OpenVINO's files, a .safetensors or .ckpt file in the "
        f"original layout, or hf://owner/name, not {str(weights)!r}."
    )


def save(pipeline, path: str | Path, format: str = "diffusers", dtype: str | None = None):
    """Writes a pipeline's four parts (for OpenVINO the three that draw), to be loaded again.

    Parts that are not built yet are built first. What was loaded into them, as LoRAs and
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
    parts = openvino.PARTS if format == "openvino" else PARTS
    models = {part: getattr(pipeline, part) for part in parts}
    own = models["diffusion_model"].weights[0].dtype
    arguments = path, pipeline.config, models, pipeline.tokenizer
    if format == "openvino":
        openvino.save_openvino(*arguments, dtype)
    elif format in ("keras", "kerascv"):
        if dtype not in (None, own):
            raise ValueError(f"The {format} format is written in the models' {own}, not {dtype}.")
        save_keras(*arguments, legacy=format == "kerascv")
    else:
        writer = {"diffusers": save_diffusers, "original": save_original}[format]
        writer(*arguments, dtype or own)
