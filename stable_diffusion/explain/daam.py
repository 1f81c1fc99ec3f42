"""Heat maps: which part of an image looks at which word of the prompt."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from stable_diffusion.explain.probe import attention_probe
from stable_diffusion.explain.words import find_words

# Colours from cold to hot: six of matplotlib's colour map "inferno", which is even to the eye.
HEAT = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)]
)
HEAT_SHARE = 0.65  # of an overlay; the rest is the image in grey


@dataclass(frozen=True)
class HeatMaps:
    """An image, and where it looks at each word of its prompt.

    Attributes:
        image: uint8 array `(H, W, 3)`.
        maps: a dict from each word, as it stands in the prompt, to float32 `(H, W)` from 0 to 1.
            Each map is divided by its own maximum, so compare places, not words.
        repeats: a dict from each word to the maps of every place where it stands in the prompt.
    """

    image: np.ndarray
    maps: dict[str, np.ndarray]
    repeats: dict[str, list[np.ndarray]] = field(repr=False)

    def overlay(self, word, n=None):
        """Returns the image in grey under the colours of a word's map, from dark to bright.

        Args:
            word: a word of the prompt.
            n: which one, from 0, if it stands there several times; None is the mean of all.

        Returns:
            uint8 array `(H, W, 3)`.

        Raises:
            ValueError: no such word, or not so often.
        """
        if word not in self.maps:
            raise ValueError(f"word must be one of {', '.join(self.maps)}, not {word!r:.200}.")
        if n is None:
            return overlay_map(self.image, self.maps[word])
        if n not in range(len(self.repeats[word])):
            raise ValueError(f"{word!r} stands {len(self.repeats[word])} times there, not {n!r}.")
        return overlay_map(self.image, self.repeats[word][n])


def heat_maps(model, prompt, seed=None, **options):
    """Generates an image, and a heat map of each word of its prompt.

    The probabilities of all cross-attention layers are upscaled to the image, and summed over
    layers, heads and steps. What the map of a word shows is how much each place attended to it.

    Args:
        model: the `StableDiffusion`.
        prompt: str.
        seed: int, or None for another image each time.
        **options: those of `text_to_image`, such as `prompt_syntax="webui"` for long prompts; with
            `image` those of `image_to_image`, and with `mask` too those of `inpaint`.

    Returns:
        A `HeatMaps`.

    Raises:
        ValueError: several prompts, a larger batch, and as the task and `attention_probe`.

    Reference: Tang et al. 2023, https://arxiv.org/abs/2210.04885 (DAAM), equation 5.
    """
    if not isinstance(prompt, str) or options.get("batch_size", 1) != 1:
        raise ValueError(f"Heat maps are made of one image of one prompt, not {prompt!r:.200}.")
    if "crop" in options:
        raise ValueError("Heat maps are of the whole image: crop is not possible.")
    words = find_words(model, prompt, options.get("prompt_syntax"))
    task = model.inpaint if "mask" in options else model.text_to_image
    task = model.image_to_image if "image" in options and "mask" not in options else task
    sums = AttentionSums()
    with attention_probe(model, sums.add, kinds="cross"):
        (image,) = task(prompt, seed=seed, **options)
    repeats = sums.find_maps(words, image.shape[:2])
    maps = {word: normalize_map(np.mean(some, axis=0)) for word, some in repeats.items()}
    repeats = {word: list(map(normalize_map, some)) for word, some in repeats.items()}
    return HeatMaps(image, maps, repeats)


class AttentionSums:
    """Sums of cross-attention to the prompt, over layers and heads: a function for a probe.

    Attributes:
        sums: dict from `(step, (h, w))` to float32 `(h, w, S)`: of the layers of that size.
    """

    def __init__(self):
        self.sums = {}

    def add(self, probabilities, place):
        """Adds what a layer of `attention_probe` shows; of a batch only the first image."""
        for one in probabilities[place.prompt][:1]:  # none in a pass of the negative prompt
            key, sums = (place.step, place.size), one.sum(axis=0).reshape(*place.size, -1)
            self.sums[key] = self.sums[key] + sums if key in self.sums else sums

    def find_maps(self, words, size, step=None):
        """Returns the maps of words, upscaled, and summed over layers and heads.

        Args:
            words: list of `words.Word`.
            size: of the maps, `(H, W)`.
            step: number of the step; None for the sum over all.

        Returns:
            Dict from the text of each word to a list of float32 arrays `(H, W)`, one for each place
            where it stands.
        """
        totals = {}
        for (at, cells), sums in self.sums.items():
            if step in (None, at):
                totals[cells] = totals[cells] + sums if cells in totals else sums
        maps = {}
        for word in words:
            tokens = list(word.positions)
            parts = [_upscale(sums[..., tokens].sum(-1), size) for sums in totals.values()]
            maps.setdefault(word.text, []).append(sum(parts, np.zeros(size, "float32")))
        return maps


def normalize_map(heat):
    """Divides a map by its maximum; one of zeros stays as it is."""
    return heat / max(heat.max(), np.finfo("float32").tiny)


def overlay_map(image, heat):
    """Returns an image in grey under the colours of a map.

    Args:
        image: uint8 array `(H, W, 3)`.
        heat: float array `(H, W)` from 0 to 1.

    Returns:
        uint8 array `(H, W, 3)`.
    """
    grey = np.array(Image.fromarray(image).convert("L"), "float32")[..., None]
    return (HEAT_SHARE * colour_map(heat) + (1 - HEAT_SHARE) * grey).round().astype("uint8")


def colour_map(heat):
    """Returns the colours of a map `(H, W)` of values from 0 to 1: uint8 `(H, W, 3)`."""
    places = np.linspace(0, 1, len(HEAT))
    return (
        np.stack([np.interp(heat, places, HEAT[:, n]) for n in range(3)], -1)
        .round()
        .astype("uint8")
    )


def _upscale(heat, size):
    height, width = size
    scaled = Image.fromarray(heat.astype("float32")).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.maximum(np.array(scaled), 0)
