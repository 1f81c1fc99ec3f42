"""A walk from prompt to prompt: frames between images, as an animation or a folder of PNGs."""

import math
from pathlib import Path

from stable_diffusion.command.animation import SUFFIXES, write_animation
from stable_diffusion.replacing import check_folder, check_output, replace_file


def plan_frames(stops, frames):
    """Returns where each frame is: the number of the stop before it, and how far it is from there.

    Args:
        stops: number of prompts, 2 or more.
        frames: number of frames, at least one for each prompt.

    Returns:
        List of pairs of an int from 0 to `stops` - 2, and a float from 0 to 1.
    """
    places = [n * (stops - 1) / (frames - 1) for n in range(frames)]
    starts = [min(int(place), stops - 2) for place in places]
    return [(start, place - start) for start, place in zip(starts, places, strict=True)]


def mix_linearly(start, end, share):
    """Returns (1 - share) start + share end: arrays of the same shape."""
    return (1 - share) * start + share * end


def mix_on_sphere(start, end, share):
    """Returns noise between two: on the great circle, so that it is as strong as they are.

    Args:
        start, end: arrays of the same shape.
        share: 0 for the first to 1 for the second.

    Reference: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3 (slerp),
    https://doi.org/10.1145/325165.325242.
    """
    import numpy as np

    lengths = np.linalg.norm(start) * np.linalg.norm(end)
    angle = math.acos(np.clip(np.sum(start * end) / lengths, -1, 1))
    if math.sin(angle) < 1e-3:  # nearly parallel
        return mix_linearly(start, end, share)
    weights = [math.sin((1 - share) * angle), math.sin(share * angle)]
    return (weights[0] * start + weights[1] * end) / math.sin(angle)


def check_walk(out):
    """Checks whether `save_walk` can write there.

    Raises:
        ValueError: it is neither an animation nor a folder, or the system does not allow it.
    """
    path = Path(out or "")
    if out and path.suffix.lower() in SUFFIXES and not path.is_dir():
        check_output(path)
    elif out and (path.is_dir() or out.endswith("/") or not path.suffix):
        check_folder(path)
    else:
        raise ValueError("argument --out: a walk goes to a .gif, a .webp or a folder")


def save_walk(out, images):
    """Writes images as an animation, whole or not at all, or as PNGs 0001.png, 0002.png, ...

    Args:
        out: path of a .gif, a .webp or a folder.
        images: list of uint8 arrays `(H, W, 3)`.

    Returns:
        List of the paths of the files.
    """
    from PIL import Image

    path = Path(out)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        write_animation(path, images)
        return [path]
    paths = [path / f"{n:04}.png" for n in range(1, len(images) + 1)]
    for name, image in zip(paths, images, strict=True):
        with replace_file(name) as written:
            Image.fromarray(image).save(written, "png")
    return paths
