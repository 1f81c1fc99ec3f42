"""Generating an image again from the text in its PNG, and showing this text."""

import re
import shlex

from stable_diffusion.command.parameters import KEY, find_nearest
from stable_diffusion.command.png import hash_file, read_text
from stable_diffusion.command.terminal import print_message
from stable_diffusion.version import __version__

OPTIONS = {  # from the keys of `generate.describe_job` to options with this value
    "negative": "--negative",
    "seed": "--seed",
    "noise source": "--noise-source",
    "steps": "--steps",
    "guidance": "--guidance",
    "guidance rescale": "--guidance-rescale",
    "sampler": "--sampler",
    "eta": "--eta",
    "spacing": "--spacing",
    "syntax": "--syntax",
    "lora folder": "--lora-folder",
    "dtype": "--dtype",
    "weights": "--weights",
    "variant": "--variant",
    "vae": "--vae",
    "prediction type": "--prediction-type",
    "clip skip": "--clip-skip",
    "image": "--image",
    "strength": "--strength",
    "mask": "--mask",
    "crop": "--crop",
}
FILES = {"image": "image sha256", "mask": "mask sha256"}
OTHERS = ("prompt", "size", "jit", "backend", "batch", "version", *FILES.values(), KEY)


def list_options(text):
    """Returns the options with which an image was generated.

    Args:
        text: dict of str to str, the text of its PNG.

    Returns:
        List of str such as "--seed=3", without the prompt.

    Raises:
        ValueError: the text is not of an image that this command generated, or it has keys of
            another version.
    """
    if not {"prompt", "seed", "steps", "sampler", "weights"} <= {*text}:
        raise ValueError("it has no text of stable-diffusion that says how it was generated")
    if unknown := [key for key in text if key not in OPTIONS and key not in OTHERS]:
        raise ValueError(f"version {__version__} does not know its text {unknown[0]!r:.200}")
    options = [f"{option}={text[key]}" for key, option in OPTIONS.items() if key in text]
    if size := re.fullmatch(r"(\d+)x(\d+)", text.get("size", "")):
        options += [f"--width={size[1]}", f"--height={size[2]}"]
    return [*options, *(["--jit"] if "jit" in text else [])]


def read_redo(path):
    """Reads what `--redo` needs.

    Args:
        path: path of a PNG.

    Returns:
        Its text, and the options of `list_options`.

    Raises:
        ValueError: see `list_options`, or the file is no intact PNG.
    """
    text = read_text(path)
    try:
        return text, list_options(text)
    except ValueError as error:
        raise ValueError(f"argument --redo: {path}: {error}") from error


def check_redo(name, args, text):
    """Checks that what an image was generated from is still the same; tells what may differ.

    Args:
        name: of the command, for messages.
        args: the arguments, those of the PNG and those that were given.
        text: the text of the PNG.

    Raises:
        ValueError: a file has changed.
    """
    for key, value in FILES.items():
        path = getattr(args, key)
        if path is None or path != text.get(key):
            continue
        try:
            found = hash_file(path)
        except OSError as error:
            raise ValueError(f"argument --{key}: {path}: {error.strerror}") from error
        if found != text.get(value):
            raise ValueError(f"argument --redo: {path} has changed since the image was generated")
    if text.get("version") != __version__:
        said = f"version {text.get('version', '?')} generated the image, and this is {__version__}"
        print_message(name, f"{said}: it may come out differently")


def check_backend(name, text):
    """Tells if another backend generated an image than that which generates it again."""
    import keras

    if (used := text.get("backend", "tensorflow")) != (now := keras.backend.backend()):
        print_message(
            name,
            f"KERAS_BACKEND={used} generated the image, and this is {now}: it may come out "
            f"differently",
        )


def read_place(text):
    """Returns an image's place in its batch, from 0, and the batch's size: two ints."""
    said = re.fullmatch(r"(\d{1,4}) of (\d{1,4})", text.get("batch", "1 of 1"))
    place, size = map(int, said.groups()) if said else (1, 1)
    return (place - 1, size) if 1 <= place <= size else (0, 1)


def make_info(path):
    """Returns what `--info` prints: the text of a PNG, and the command that comes nearest.

    Raises:
        ValueError: the file is no intact PNG, or its text does not say how it was generated.
    """
    text = read_text(path)
    lines = [f"{key}: {value}" for key, value in text.items() if key != KEY]
    if KEY in text:
        lines += ["", f"{KEY}:", text[KEY]]
    try:
        options = [part for part in list_options(text) if not part.endswith("=")]
        prompt, heading, notes = text["prompt"], "command:", []
    except ValueError as error:
        if KEY not in text:
            raise ValueError(f"argument --info: {path}: {error}") from error
        nearest, notes = find_nearest(text[KEY])
        prompt, heading = nearest.pop(""), "nearest command:"
        options = [f"{option}={value}" for option, value in nearest.items()]
    words = [*options, *["--"] * prompt.startswith("-"), prompt]
    lines += ["", heading, shlex.join(["stable-diffusion", *words])]
    return "\n".join([*lines, "", "not taken over:", *notes] if notes else lines)
