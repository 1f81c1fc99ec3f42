"""LoRAs without names: cloneofsimo's files of December 2022 and later, which count their matrices.

    safetensors    unet:0:up, unet:0:down, unet:1:up, ... and text_encoder:0:up, ...
    PyTorch        a list: up, down, up, down, ... of the UNet, or of the text encoder

They belong to the linear layers of all modules of some classes, in the order in which PyTorch lists
the modules of diffusers' UNet, which has `mid_block` last, and of transformers' CLIP. In a block of
the transformer, diffusers first had the feed-forward layer between the two attentions; later it
came last. The shapes tell.

Reference: https://github.com/cloneofsimo/lora/blob/master/lora_diffusion/lora.py
"""

import re

LISTED = re.compile(r"(?:(unet|text_encoder):)?(\d+)(?::(up|down))?")
COMPONENTS = {"unet": "diffusion_model", "text_encoder": "text_encoder"}
BLOCKS = ("down_blocks", "up_blocks", "mid_block")
ATTENTION = [f"attn{n}.to_{half}" for n in (1, 2) for half in ("q", "k", "v", "out.0")]
GEGLU = "ff.net.0.proj"
TRANSFORMERS = ([*ATTENTION[:4], GEGLU, *ATTENTION[4:]], [*ATTENTION, GEGLU])
TEXT = [f"self_attn.{half}_proj" for half in ("k", "v", "q", "out")]


def read_lists(names: list[str]) -> dict[str, list[dict[str, str]]]:
    """Reads the names of the tensors of such a file.

    Args:
        names: the names. Those of a list are its indices, "0", "1" and so on.

    Returns:
        Dict from each component, "" if it is not told, to a list of dicts from "up" and "down" to
        the name of the tensor. Empty if the file is of another kind.
    """
    found = {name: LISTED.fullmatch(name) for name in names}
    if not all(found.values()):
        return {}
    lists = {}
    for name, match in found.items():
        number, half = int(match[2]), match[3]
        if (match[1] is None) != (half is None):
            return {}
        if half is None:  # a list of PyTorch
            number, half = number // 2, ("up", "down")[number % 2]
        lists.setdefault(COMPONENTS.get(match[1], ""), {}).setdefault(number, {})[half] = name
    return {of: [pairs[number] for number in sorted(pairs)] for of, pairs in lists.items()}


def list_orders(component: str, names: list[str]) -> list[list[str]]:
    """Returns the possible orders of the kernels that such a list belongs to.

    Args:
        component: "diffusion_model" or "text_encoder".
        names: diffusers' names of the component's kernels, without ".weight".
    """
    orders = []
    for inner in TRANSFORMERS if component == "diffusion_model" else [TEXT]:
        places = {}
        for name in names:
            end = next((end for end in inner if name.endswith(f".{end}")), None)
            if end:
                first = [n for n, block in enumerate(BLOCKS) if name.startswith(block)]
                numbers = [int(n) for n in re.findall(r"\.(\d+)\b", name.removesuffix(end))]
                places[name] = (first, numbers, inner.index(end))
        orders.append(sorted(places, key=places.get))
    return orders
