"""Checks of values that users and files give: their types and bounds."""

import math
import operator
import os
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin

import numpy as np

MOST_ENTRIES = 10  # of a tuple, such as the stages of a UNet


def check_int(name, value, low=1, high=math.inf) -> int:
    """Returns an integer of any type, numpy's too, as an int.

    Raises:
        ValueError: it is no integer from `low` to `high`.
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        limit = f"from {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be an int {limit}, not {value!r:.200}.")
    return number


def check_number(name, value, low=-math.inf, high=math.inf) -> float:
    """Returns a finite number of any type, numpy's too, as a float.

    Raises:
        ValueError: it is no finite number from `low` to `high`.
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool | np.bool_) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        limit = "a finite number" if low == -math.inf else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {limit}, not {value!r:.200}.")
    return number


def check_path(name, value) -> Path:
    """Returns a path.

    Raises:
        ValueError: it is neither a str nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name} must be a str or a path, not {value!r:.200}.")
    return Path(value)


def list_prompts(prompt, name="prompt") -> list[str]:
    """Returns prompts as a list: one, or each of several.

    Raises:
        ValueError: no str, and no list of at least one.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    good = np.ndim(prompts) == 1 and all(isinstance(text, str) for text in prompts)
    if not good or not len(prompts):
        raise ValueError(f"{name} must be a str or a list of at least one, not {prompt!r:.200}.")
    return list(prompts)


def count_prompts(prompt) -> int:
    """Returns how many prompts there are, of texts or of encoded text `(..., T, D)`.

    Raises:
        ValueError: see `list_prompts`.
    """
    return math.prod(np.shape(prompt)[:-2]) if is_encoded(prompt) else len(list_prompts(prompt))


def is_encoded(text) -> bool:
    """Tells whether something is encoded text `(..., T, D)`, and no str or list of them."""
    return np.ndim(text) > 1 and (hasattr(text, "shape") or np.asarray(text).dtype.kind in "fiu")


def list_negatives(negative, batch_size) -> list[str]:
    """Returns the texts of a negative prompt; none if it is None or encoded text `(..., T, D)`.

    Raises:
        ValueError: it is something else, or its entries are not 1 or `batch_size`.
    """
    if negative is None:
        return []
    if is_encoded(negative):
        texts, count = [], math.prod(np.shape(negative)[:-2])
    else:
        texts = list_prompts(negative, "negative_prompt")
        count = len(texts)
    check_entries("negative_prompt", count, batch_size)
    return texts


def check_entries(name, count, batch_size):
    """Raises a ValueError unless a batch can have `count` entries, each repeated."""
    if not count or batch_size % count:
        raise ValueError(f"{name} must have 1 or batch_size={batch_size} entries, not {count}.")


def read_interval(interval) -> tuple[float, float]:
    """Returns the two ends of an interval of timesteps.

    Raises:
        ValueError: it has not two numbers.
    """
    try:
        first, last = (float(end) for end in interval)
        if math.isnan(first) or math.isnan(last):
            raise ValueError("not a number")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"guidance_interval must be two timesteps, first and last, not {interval!r:.200}."
        ) from error
    return first, last


def check_start(num_steps, first_step, latent, from_image, diffusion_noise, seed):
    """Checks where `StableDiffusion.generate_latents` begins: its arguments of these names.

    `from_image` tells whether the sampler makes its own first latent of an image.

    Raises:
        ValueError: a step that is none of `num_steps`, or arguments that exclude each other.
    """
    if diffusion_noise is not None and seed is not None:
        raise ValueError("Pass diffusion_noise or seed, not both: the seed only draws noise.")
    if from_image and latent is not None:
        raise ValueError("Pass an image or latent, not both: sampling begins with one of them.")
    if check_int("first_step", first_step, 0, num_steps - 1) and latent is None and not from_image:
        raise ValueError(f"first_step {first_step!r} needs the latent where it begins.")


def check_channels(config, given):
    """Checks whether a UNet sees what it is made for: the latent, and maybe `given` more channels.

    Raises:
        ValueError: a model for another task.
    """
    seen, latent = config.unet.in_channels, config.vae.latent_channels
    expected = 2 * latent + 1 if given else latent
    tasks = {
        latent: "other tasks than inpainting with a model of its own",
        latent + 1: "depth to image, which is not supported",
        2 * latent: "instruct-pix2pix, which is not supported",
        2 * latent + 1: "inpainting, and needs an image and a mask",
    }
    if seen != expected:
        task = tasks.get(seen, "another task, which is not supported")
        raise ValueError(
            f"The diffusion model has {seen} channels of input, not {expected}: it is made for "
            f"{task}."
        )


def find_first_step(num_steps, strength) -> int:
    """Returns the first of `num_steps` steps when sampling starts from an image, as in diffusers.

    Args:
        num_steps: number of steps from noise alone.
        strength: share of them that is taken, over 0 and at most 1; rounded down to whole steps.

    Raises:
        ValueError: another strength, or one that leaves no step.
    """
    num_steps = check_int("num_steps", num_steps)
    taken = int(num_steps * check_number("strength", strength, 0, 1))
    if not taken:
        least = math.ceil(1e6 / num_steps) / 1e6
        raise ValueError(
            f"strength must be at least {least:g} with {num_steps} steps, not {strength!r:.200}: "
            f"it is the share of them that is taken."
        )
    return num_steps - taken


def find_expected(value, kind, bounds=None):
    """Compares a value with the type of a dataclass' field.

    Args:
        value: the value.
        kind: the annotation of the field: int, float, another class, a `Literal`, a tuple of any
            length, or one of several of these, of which one may be None.
        bounds: the least and the largest number, of ints and floats.

    Returns:
        None if the value is one, otherwise what it should be, as in "a positive int up to 9".
    """
    if isinstance(kind, UnionType):
        kinds = [one for one in get_args(kind) if one is not NoneType]
        if value is None and len(kinds) < len(get_args(kind)):
            return None
        expected = [find_expected(value, one, bounds) for one in kinds]
        return None if None in expected else " or ".join(expected)
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"one of {get_args(kind)}"
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        good = isinstance(value, tuple | list) and 0 < len(value) <= MOST_ENTRIES
        if good and all(find_expected(entry, inner, bounds) is None for entry in value):
            return None
        what = "bools" if inner is bool else f"positive ints up to {bounds[1]}"
        return f"a list of {what}, of 1 to {MOST_ENTRIES}"
    if kind not in (int, float):
        return None if isinstance(value, kind) else f"of type {kind.__name__}"
    low, high = bounds
    number = isinstance(value, int | np.integer) or kind is float and isinstance(value, float)
    if number and not isinstance(value, bool) and low <= value <= high:
        return None
    if kind is int:
        return f"a positive int up to {high}" if low == 1 else f"an int from {low} to {high}"
    return f"a number from {low:g} to {high:g}"


def check_fields(instance, bounds):
    """Compares the fields of a dataclass with their annotations.

    Args:
        instance: the instance.
        bounds: dict from the name of a field to the least and the largest number. Each field of
            numbers must have a row.

    Raises:
        ValueError: a value of another type, or outside its bounds.
    """
    for field in fields(instance):
        value = getattr(instance, field.name)
        if expected := find_expected(value, field.type, bounds.get(field.name)):
            raise ValueError(f"{field.name} must be {expected}, not {value!r:.200}.")
