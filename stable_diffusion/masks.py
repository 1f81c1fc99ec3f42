"""Inpainting on pixels: masks, the part of an image that a model sees, and the seam.

A VAE does not give back the pixels that it got. So what is kept of an image is copied from it, and
what the model generates only goes where the mask says that it is painted.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stable_diffusion.checks import check_int
from stable_diffusion.images import (
    MAX_PIXELS,
    crop_image,
    find_box,
    fit_images,
    has_aspect,
    open_image,
    read_images,
)

SEAM = 8  # pixels of what the model generates that come to fit the kept ones beside them


@dataclass(frozen=True)
class Painting:
    """An image of which a part is painted.

    Attributes:
        image: uint8 array `(H, W, 3)`, of which the kept pixels stay as they are.
        painted: bool array `(H, W)`, True where it is painted.
        box: left, top, right and bottom of the part that the model sees, in pixels of the image. It
            may stand out of the image.
        seen: uint8 array `(h, w, 3)`: that part, as large as the model generates.
        seen_painted: bool array `(h, w)`: what of it is painted, also where only a part of a pixel
            is.
    """

    image: np.ndarray
    painted: np.ndarray
    box: tuple[int, int, int, int]
    seen: np.ndarray
    seen_painted: np.ndarray

    def find_cells(self, size: int) -> np.ndarray:
        """Returns which latent cells are painted: those of which any pixel is.

        Args:
            size: of a cell, in pixels.

        Returns:
            bool array `(h / size, w / size, 1)`.
        """
        height, width = self.seen_painted.shape
        cells = self.seen_painted.reshape(height // size, size, width // size, size)
        return cells.any((1, 3))[..., None]

    def hide(self) -> np.ndarray:
        """Returns what the model sees with grey in place of the painted part, `(h, w, 3)`."""
        return np.where(self.seen_painted[..., None], np.float32(127.5), self.seen)

    def paste(self, generated: np.ndarray) -> np.ndarray:
        """Puts what was generated where the image is painted.

        Args:
            generated: uint8 array `(h, w, 3)`.

        Returns:
            uint8 array `(H, W, 3)`. Each pixel that is kept equals the image's; next to them, what
            was generated fits them, see `fit_seam`.
        """
        generated = fit_seam(generated, self.seen, self.seen_painted)
        left, top, right, bottom = self.box
        size = right - left, bottom - top
        if size != generated.shape[1::-1]:
            resized = Image.fromarray(generated).resize(size, Image.Resampling.LANCZOS)
            generated = np.array(resized)
        height, width = self.painted.shape
        x, y = slice(max(left, 0), min(right, width)), slice(max(top, 0), min(bottom, height))
        part = generated[y.start - top : y.stop - top, x.start - left : x.stop - left]
        result = self.image.copy()
        result[y, x] = np.where(self.painted[y, x, None], part, self.image[y, x])
        return result


def fit_seam(generated: np.ndarray, image: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Makes the painted part of an image fit the kept part, at most `SEAM` pixels deep.

    What the kept pixels differ from those that were generated in their place is added to the
    painted pixels beside them: less and less, the farther they are. What the image shows where it
    is painted has no part in it.

    Args:
        generated, image: uint8 arrays `(H, W, 3)`.
        painted: bool array `(H, W)`.

    Returns:
        uint8 array `(H, W, 3)`; the image's pixels where it is kept.
    """
    known, result = ~painted, generated.astype("float32")
    difference = np.where(known[..., None], image - result, np.float32(0))
    result += difference
    for depth in range(1, SEAM + 1):
        count = _sum_neighbours(known[..., None].astype("float32"))
        ring = ~known & (count[..., 0] > 0)
        difference[ring] = (_sum_neighbours(difference) / np.maximum(count, 1))[ring]
        result[ring] += (1 - depth / (SEAM + 1)) * difference[ring]
        known |= ring
    return np.clip(np.rint(result), 0, 255).astype("uint8")


def _sum_neighbours(array):
    """Returns for each pixel of `(H, W, C)` the sum of the 3 x 3 around it."""
    for axis in (0, 1):
        ends = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        before, here, after = (np.arange(array.shape[axis]) + k for k in range(3))
        padded = np.pad(array, ends)
        array = sum(np.take(padded, places, axis) for places in (before, here, after))
    return array


def list_paintings(image, mask, height: int, width: int, crop: int | None = None) -> list[Painting]:
    """Reads images and their masks.

    Args:
        image: one image or several, see `images.read_images`.
        mask: one mask for all, or one for each: see `read_mask`, or a list of these, or an array
            `(B, H, W)`. It has the aspect of its image, and any size.
        height, width: of what the model generates, in pixels.
        crop: None to scale each image to this size, and to crop it in the middle. Otherwise the
            image stays as it is, and the model sees its painted part with at least so many pixels
            around it.

    Raises:
        ValueError: no images or masks of this kind; another number of masks than of images; a mask
            of another aspect, or one that keeps everything.
    """
    images, masks = read_images(image), _list_masks(mask)
    if len(masks) not in (1, len(images)):
        raise ValueError(f"{len(images)} images need one mask or one each, not {len(masks)}.")
    masks = masks * (len(images) // len(masks))
    crop = None if crop is None else check_int("crop", crop, 0)
    if crop is not None and len({image.size for image in images}) > 1:
        raise ValueError("With crop, all images must have the same size.")
    fitted = fit_images(images, height, width) if crop is None else [None] * len(images)
    paintings = []
    for image, keeps, seen in zip(images, masks, fitted, strict=True):
        if not has_aspect(keeps.shape[::-1], image.size):
            raise ValueError(
                f"The mask has {keeps.shape[1]} x {keeps.shape[0]} pixels; it needs the aspect of "
                f"its image, which has {image.width} x {image.height}."
            )
        painted = ~keeps
        if not painted.any():
            raise ValueError("The mask keeps everything: there is nothing to paint.")
        if crop is None:
            box = find_box(painted.shape[::-1], height, width)
            painted = _scale_painted(painted, (width, height), box)
            if not painted.any():
                raise ValueError("What the mask paints lies outside the part that is generated.")
            paintings.append(Painting(seen, painted, (0, 0, width, height), seen, painted))
        else:
            painted = _scale_painted(painted, image.size)
            paintings.append(_crop(np.array(image), painted, height, width, crop))
    return paintings


def _crop(image, painted, height, width, padding):
    """Returns a `Painting` whose model sees the surroundings of the painted part only."""
    left, right = _find_span(painted.any(0), padding)
    top, bottom = _find_span(painted.any(1), padding)
    scale = max((right - left) / width, (bottom - top) / height)
    x = _widen(left, right, round(scale * width), image.shape[1])
    y = _widen(top, bottom, round(scale * height), image.shape[0])
    box = x[0], y[0], x[1], y[1]
    ends = [(max(-a, 0), max(b - n, 0)) for (a, b), n in ((y, len(image)), (x, image.shape[1]))]
    part = slice(max(y[0], 0), max(y[1], 0)), slice(max(x[0], 0), max(x[1], 0))
    seen = np.pad(image[part], [*ends, (0, 0)], mode="edge")
    seen_painted = np.pad(painted[part], ends)
    seen = crop_image(Image.fromarray(seen), height, width)
    return Painting(image, painted, box, seen, _scale_painted(seen_painted, (width, height)))


def _find_span(used, padding):
    """Returns first and last index, plus 1, of the entries that are True, with some around."""
    found = np.flatnonzero(used)
    return int(found[0]) - padding, int(found[-1]) + 1 + padding


def _widen(start, end, length, most):
    """Widens a span to a length, and shifts it into the first `most` pixels if it has room."""
    length = max(length, end - start)
    start -= (length - (end - start)) // 2
    start = min(max(start, 0), most - length) if length <= most else (most - length) // 2
    return start, start + length


def _list_masks(masks):
    """Returns masks as bool arrays `(H, W)`, True where they are 1 or white."""
    several = isinstance(masks, list | tuple)
    if not several and isinstance(getattr(masks, "ndim", None), int) and not _is_single(masks):
        masks, several = np.asarray(masks), True
    masks = list(masks) if several else [masks]
    if not masks:
        raise ValueError("mask must be one mask, or a list of at least one.")
    return [read_mask(mask) for mask in masks]


def _is_single(mask):
    return mask.ndim == 2 or mask.ndim == 3 and mask.shape[-1] == 1


def read_mask(mask, white_keeps: bool = True) -> np.ndarray:
    """Returns what a mask keeps: bool array `(H, W)`.

    Args:
        mask: a path, an image of Pillow's, or an array `(H, W)` or `(H, W, 1)`. 1 and white are
            kept, 0 and black are painted. Floats are split at 0.5, ints at 128 if one is above 1,
            images at 128.
        white_keeps: False if it is the other way round.

    Raises:
        ValueError: something else, or other values.
    """
    white = _find_white(mask)
    return white if white_keeps else ~white


def _find_white(mask):
    if isinstance(mask, str | Path):
        return np.array(open_image(mask).convert("L")) >= 128
    if isinstance(mask, Image.Image):
        return np.array(ImageOps.exif_transpose(mask).convert("L")) >= 128
    mask = np.asarray(mask)
    mask = mask[..., 0] if mask.ndim == 3 and mask.shape[-1] == 1 else mask
    if mask.dtype.kind not in "buif" or mask.ndim != 2 or not 0 < mask.size <= MAX_PIXELS:
        raise ValueError(
            f"mask must be a path, an image of Pillow's or an array (H, W), not {mask.dtype} "
            f"{mask.shape}."
        )
    if mask.dtype.kind == "b":
        return mask
    low, high = mask.min(), mask.max()
    most = 1 if mask.dtype.kind == "f" else 255
    if not 0 <= low <= high <= most:
        raise ValueError(f"mask must have values from 0 to {most}, not from {low:g} to {high:g}.")
    return mask >= (0.5 if high <= 1 else 128)


def _scale_painted(painted, size, box=None):
    """Scales a mask to a width and height: a pixel is painted if any part of it is."""
    if painted.shape[::-1] == size and box in (None, (0, 0, *size)):
        return painted
    share = Image.fromarray(painted.astype("float32"))
    return np.array(share.resize(size, Image.Resampling.BOX, box=box)) > 1e-6
