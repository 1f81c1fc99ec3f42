"""The text that AUTOMATIC1111's web interface puts into its PNGs, under the key "parameters".

    a red (apple:1.2)
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 3, Size: 512x512

Reference: https://github.com/AUTOMATIC1111/stable-diffusion-webui, version 1.10.1:
`create_infotext` in modules/processing.py, modules/infotext_utils.py.
"""

import json
import re
from pathlib import Path

KEY = "parameters"
NEGATIVE = "Negative prompt:"
LEAST_PAIRS = 3  # of the last line; a line with fewer belongs to the prompt
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
SCHEDULES = {"karras": "Karras", "linspace": "Uniform", "trailing": "SGM Uniform"}
NOISE = {"keras": "Keras", "torch": "CPU", "philox": "NV"}
NOISE_READ = {"CPU": "torch", "NV": "philox", "GPU": "philox", "Keras": "keras"}
# Without a schedule of their own: in timesteps with an offset of 1, and those in Karras' σ.
LEADING, KARRAS = ("DDIM", "PLMS", "UniPC"), ("DPM++ 2M",)
READ = (  # keys that `find_nearest` uses
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Seed",
    "Size",
    "Model",
    "Clip skip",
    "RNG",
    "Denoising strength",
    "Eta DDIM",
)
_PAIR = re.compile(r'\s*(\w[\w /-]*):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_BRACKETS = re.compile(r"[\\()\[\]]")


def make_parameters(text):
    """Returns the web interface's text for an image.

    Args:
        text: dict of str to str, as `generate.describe_job` returns it.

    Returns:
        str of two or three lines, or more if a prompt has several.
    """
    prompts = [text["prompt"], text["negative"]]
    if "syntax" not in text:  # brackets that are weights there, but were text here
        prompts = [_BRACKETS.sub(r"\\\g<0>", prompt) for prompt in prompts]
    values = {
        "Steps": text["steps"],
        "Sampler": SAMPLERS[text["sampler"]],
        "Schedule type": SCHEDULES.get(text.get("spacing")),
        "CFG scale": text["guidance"],
        "Seed": text["seed"],
        "Size": text["size"],
        "Model": Path(text["weights"]).stem,
        "Denoising strength": text.get("strength"),
        "Clip skip": str(int(text["clip skip"]) + 1) if "clip skip" in text else None,
        "RNG": NOISE[text.get("noise source", "keras")],
        "Eta DDIM": text.get("eta"),
    }
    pairs = [f"{key}: {_quote(value)}" for key, value in values.items() if value is not None]
    negative = f"\n{NEGATIVE} {prompts[1]}" if prompts[1] else ""
    return f"{prompts[0]}{negative}\n{', '.join(pairs)}".strip()


def _quote(value):
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def read_parameters(parameters):
    """Reads the web interface's text.

    Returns:
        The prompt, the negative prompt, and a dict of str to str of the rest.
    """
    *lines, last = parameters.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < LEAST_PAIRS:
        lines, pairs = [*lines, last], []
    lines = [line.strip() for line in lines]
    start = next((n for n, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = [line.removeprefix(NEGATIVE).strip() for line in lines[start:]]
    values = {key: _unquote(value) for key, value in pairs}
    return "\n".join(lines[:start]), "\n".join(negative), values


def _unquote(value):
    try:
        text = json.loads(value) if value.startswith('"') else value
    except ValueError:
        text = value
    return text if isinstance(text, str) else value


def find_nearest(parameters):
    """Returns the options that come nearest to the web interface's text.

    Returns:
        Dict from options to their values, with the prompt under "", and a list of notes about what
        could not be taken over.
    """
    prompt, negative, values = read_parameters(parameters)
    notes = [f"{key}: {value}" for key, value in values.items() if key not in READ]
    sampler, spacing = _find_sampler(values)
    if values.get("Sampler") and sampler is None:
        notes.insert(0, f"Sampler: {values['Sampler']}")
    width, _, height = values.get("Size", "").partition("x")
    skip = values.get("Clip skip", "1")
    noise = NOISE_READ.get(values.get("RNG", "GPU")) if values else None
    options = {
        "": prompt,
        "--syntax": "webui",
        "--negative": negative or None,
        "--weights": f"{values['Model']}.safetensors" if "Model" in values else None,
        "--seed": values.get("Seed"),
        "--noise-source": noise if noise != "keras" else None,
        "--steps": values.get("Steps"),
        "--guidance": values.get("CFG scale"),
        "--sampler": sampler,
        "--eta": values.get("Eta DDIM"),
        "--spacing": spacing,
        "--width": width or None,
        "--height": height or None,
        "--clip-skip": str(int(skip) - 1) if skip.isdecimal() and int(skip) > 1 else None,
        "--image": "ORIGINAL" if "Denoising strength" in values else None,
        "--strength": values.get("Denoising strength"),
    }
    if "<lora:" in prompt:
        options["--lora-folder"] = "FOLDER"
    return {key: value for key, value in options.items() if value is not None}, notes


def _find_sampler(values):
    """Returns our names of the sampler and the spacing, None where there is none."""
    name = values.get("Sampler", "")
    schedule = values.get("Schedule type", "Automatic" if "Schedule type" in values else "")
    if name.endswith(" Karras"):  # before version 1.9
        name, schedule = name.removesuffix(" Karras"), "Karras"
    names = {theirs: ours for ours, theirs in SAMPLERS.items()}
    spacings = {theirs: ours for ours, theirs in SCHEDULES.items()}
    spacing = spacings.get(schedule)
    if name in LEADING:
        spacing = "leading"
    elif schedule == "Automatic" and name in KARRAS:
        spacing = "karras"
    elif spacing is None and name in names:
        spacing = "linspace"
    return names.get(name), spacing if name in names else None
