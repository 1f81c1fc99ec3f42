"""Where parameters come from: presets and folders, one reader for each format."""

from pathlib import Path

from stable_diffusion.checkpoints.building import Reader
from stable_diffusion.checkpoints.config import SD1, SD2
from stable_diffusion.clip_tokenizer import WEIGHTS_DIR

KERASCV = {"SD1": "sd1.4", "SD2": "sd2.1-base"}


def open_checkpoint(weights, config=None, preset="SD1") -> Reader:
    """Finds the reader for what a user passed as `weights=`.

    Args:
        weights: None for fresh random parameters; a preset's name ("emoji", "sd1.4",
            "sd2.1-base"; "kerascv" is the one that KerasCV has for `preset`); or a folder, of
            KerasCV's .h5 files or in diffusers' layout.
        config: the `Config` where `weights` doesn't tell it; None is that of `preset`.
        preset: "SD1" or "SD2".

    Returns:
        A `Reader`. Nothing is downloaded before a part is built.

    Raises:
        ValueError: no such preset or folder, or no known format.
    """
    from stable_diffusion.checkpoints.diffusers import DiffusersFolder
    from stable_diffusion.checkpoints.kerascv import PRESETS, KerasCVFolder, KerasCVPreset

    config = config or {"SD1": SD1, "SD2": SD2}[preset]
    if weights is None:
        return Reader(config)
    weights = KERASCV[preset] if weights == "kerascv" else weights
    if weights in PRESETS:
        return KerasCVPreset(weights)
    folder = WEIGHTS_DIR / "emoji" if weights == "emoji" else Path(weights)
    if (folder / "model_index.json").is_file() or (folder / "unet").is_dir():
        return DiffusersFolder(folder)
    if folder.is_dir() and any(folder.glob("*.h5")):
        return KerasCVFolder(folder, config)
    raise ValueError(
        f"weights must be None, a preset ({', '.join(['emoji', *PRESETS])}), a folder in "
        f"diffusers' layout or one of KerasCV's .h5 files, not {str(weights)!r}."
    )
