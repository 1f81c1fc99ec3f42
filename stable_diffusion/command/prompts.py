"""The web interfaces' prompts in the command: their LoRAs, and a hint where they look like text."""

import re
from pathlib import Path

from stable_diffusion.command.terminal import print_message

# What is unlikely in a text: (word:1.3), BREAK and <lora:name>.
WEB_SYNTAX = re.compile(r"\([^()]*:\s*[-+]?[.\d]+\s*\)|\bBREAK\b|<lora:[^>]+>")
LORA_SUFFIXES = (".safetensors", ".pt", ".bin")


def show_hint(name, jobs):
    """Says once if a prompt looks as if it were for web interfaces, but is read as text."""
    texts = [text for job in jobs for text in (job.prompt, job.negative)]
    if any(map(WEB_SYNTAX.search, texts)):
        print_message(
            name,
            "a prompt has (word:1.3), BREAK or <lora:name>, which are text unless --syntax webui "
            "is given",
        )


def find_loras(jobs, lora_folder):
    """Takes the LoRAs out of the prompts of `Job`s: sets `text` and `loras`.

    Args:
        jobs: list of `generate.Job`.
        lora_folder: path of a folder where the files are, also in folders in it; or None.

    Raises:
        ValueError: a LoRA that is not in the folder, or is there several times.
    """
    from stable_diffusion.prompts import split_loras

    if lora_folder and not Path(lora_folder).is_dir():
        raise ValueError(f"argument --lora-folder: no folder {lora_folder}")
    files = {}
    for path in sorted(Path(lora_folder).rglob("*")) if lora_folder else ():
        if path.suffix in LORA_SUFFIXES and path.is_file():
            files.setdefault(path.stem, []).append(path)
    for job in jobs:
        job.text, loras = split_loras(job.prompt)
        for name, _ in loras:
            if not lora_folder:
                raise ValueError(
                    f"<lora:{name:.200}> needs --lora-folder FOLDER, where its file is"
                )
            if len(found := files.get(name, [])) != 1:
                said = " and ".join(map(str, found[:2])) or "no such .safetensors, .pt or .bin"
                raise ValueError(f"<lora:{name:.200}> in --lora-folder {lora_folder}: {said}")
        job.loras = tuple((files[name][0], scale) for name, scale in loras)


def load_loras(model, loras):
    """Makes the LoRAs of a `Job` the only ones that change a pipeline."""
    model.unload_lora()
    for path, scale in loras:
        model.load_lora(path, scale)


def count_chunks(model, job):
    """Returns how many chunks the text and the negative text of a `Job` have, a list of two."""
    from stable_diffusion.prompts import split_prompt

    return [len(split_prompt(model, text)) for text in (job.text, job.negative)]
