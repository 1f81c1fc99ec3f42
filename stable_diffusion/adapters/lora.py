"""LoRA: fine-tunings that are small matrices, added to the kernels of a pipeline.

A LoRA has, for each kernel W of shape (out, in) that it changes, two matrices of a low rank r: `up`
(out, r) and `down` (r, in). Loading one replaces W by

    W + scale * alpha / r * up @ down

so that the model runs as fast as before. For a convolution `down` is a convolution to r channels
with W's window, and `up` one of 1x1. Files differ in how they name a kernel and its two halves;
the tables below say it, after which each name is one of diffusers' names of kernels:

    kohya       lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, and .alpha
                lora_unet_input_blocks_1_1_proj_in.lora_down.weight
                lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight
    diffusers   unet.down_blocks.0.attentions.0.proj_in.lora_A.weight
                text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight
                down_blocks.0. ... .attn1.processor.to_q_lora.down.weight
    peft        base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight

References:
    Hu et al. 2021, https://arxiv.org/abs/2106.09685: LoRA.
    Kalajdzievski 2023, https://arxiv.org/abs/2312.03732: `use_rslora`, alpha / √r.
    https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py: kohya's names and alpha.
    https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/state_dict_utils.py and
    https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py: the others'.
"""

import json
import math
import numbers
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
from keras import ops
from safetensors import SafetensorError

from stable_diffusion.block import forget_compiled
from stable_diffusion.checkpoints import original
from stable_diffusion.checkpoints.diffusers import LAYOUTS
from stable_diffusion.checkpoints.diffusers_config import read_json
from stable_diffusion.checkpoints.layout import Slot
from stable_diffusion.checkpoints.tensors import (
    looks_like,
    open_safetensors,
    save_safetensors,
    summary,
)
from stable_diffusion.files import find_file

PREFIXES = (  # before a kernel's name, and the component it is of; None if the name has to tell
    ("lora_unet_", "diffusion_model"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("unet.", "diffusion_model"),
    ("text_encoder.", "text_encoder"),
    ("base_model.model.", None),
)
TEXT_NAMES = ("text_model.", "encoder.layers.")  # how names begin that are the text encoder's
SUFFIXES = (  # after a kernel's name: a pattern, and what the tensor is
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_A(\.\w+)?\.weight", "down"),  # the optional word is the adapter's name
    (r"\.lora_B(\.\w+)?\.weight", "up"),
    (r"(\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
    (r"(\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
    (r"(\.lora|\.lora_linear_layer|_lora)?\.alpha", "alpha"),
)
OLDER = {  # component to what older files, and the newest transformers, name otherwise
    "text_encoder": (
        ("text_model.", ""),
        (".q_proj", ".to_q"),
        (".k_proj", ".to_k"),
        (".v_proj", ".to_v"),
        (".out_proj", ".to_out"),
    ),
    "diffusion_model": (
        (".to_out.0", ".to_out"),
        (".attn1.", ".attn1.processor."),
        (".attn2.", ".attn2.processor."),
    ),
}
UNSUPPORTED = (  # a pattern of names, and what the file is that has one
    (r"^transformer\.|double_blocks|joint_blocks", "for a transformer, not for Stable Diffusion 1"),
    (r"^lora_te2_|^text_encoder_2\.|transformer_blocks[._][1-9]", "for Stable Diffusion XL"),
    (r"dora_scale|lora_magnitude_vector", "of the kind DoRA"),
    (r"hada_w", "of the kind LoHa"),
    (r"lokr_w", "of the kind LoKr"),
    (r"lora_mid", "of the kind LoCon with a third, inner tensor"),
)
FIXED = {  # what an adapter's config has to say, where it says it
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "layer_replication": (None,),
    # The others change the kernels before training, not by what the file has.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOLDER_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)
METADATA = "lora_adapter_metadata"  # diffusers' key for the configs, by component
KEYS = {  # of `save_lora`: before a kernel, whether it has dots, its halves, alpha in the file
    "kohya": ("lora_unet_", "_", "lora_down", "lora_up", True),
    "diffusers": ("unet.", ".", "lora_A", "lora_B", False),
}
PATTERN_SECONDS = 1.0  # patterns come with the file; one that takes longer is refused


class _Adapter(NamedTuple):
    """What is added to one kernel: names of the halves in the file, and alpha / r."""

    component: str
    slot: Slot
    down: str
    up: str
    factor: float


def load_lora(pipeline, path: str | Path, scale: float = 1.0) -> int:
    """Adds a LoRA to a pipeline's diffusion model, text encoder, or both, as the file has it.

    Called several times, LoRAs add up. A component that the file changes is built, and its parameters
    loaded, if that hasn't happened yet. Sums are computed in float32 and rounded to the dtype of
    the kernel. Everything is checked before the first kernel is changed.

    Args:
        pipeline: a `StableDiffusion`.
        path: a .safetensors file with names of kohya's, diffusers' or peft's kind; or a folder with
            diffusers' pytorch_lora_weights.safetensors, or with peft's adapter_model.safetensors
            and adapter_config.json. Where neither file nor config tells alpha, it is the rank.
        scale: how strong it is: 1 is as it was trained, 0 nothing, and the same LoRA loaded with
            -scale undoes it nearly; `unload_lora` does exactly.

    Returns:
        The number of changed kernels.

    Raises:
        ValueError: a file that isn't such a LoRA, or doesn't fit the pipeline; the message lists
            what is unknown, incomplete or misshapen. The pipeline's parameters are unchanged.

    Example:
        ```python
        model = StableDiffusion()
        load_lora(model, "watercolour.safetensors", scale=0.8)
        model.text_to_image("a lighthouse, watercolour")
        unload_lora(model)
        ```
    """
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, not {scale!r}.")
    path = _lora_file(path)
    file = open_safetensors(path)
    for pattern, kind in UNSUPPORTED:
        if name := next((name for name in file.shapes if re.search(pattern, name)), None):
            raise ValueError(f"{path} is a LoRA {kind}, which isn't supported: it has {name}.")
    groups, problems = _group(file)
    if not groups:
        raise ValueError(f"{path} has no LoRA: {summary(problems)}{looks_like(file.shapes)}")
    slots = {
        component: _kernels(pipeline, component)
        for component in sorted({component for component, _ in groups})
    }
    adapters = _match(file, groups, problems, slots, _configs(path, file))
    if any(problems.values()):
        raise ValueError(
            f"{path} doesn't fit the pipeline, which is unchanged: {summary(problems)}"
        )
    before = _merge(file, adapters, float(scale))
    for component in slots:
        model = getattr(pipeline, component)
        places = {id(variable): n for n, variable in enumerate(model.weights)}
        for adapter, kernel in before:
            if adapter.component == component:
                pipeline.changes.keep(model, places[id(adapter.slot.variable)], kernel)
        forget_compiled(model)
    return len(adapters)


def unload_lora(pipeline) -> int:
    """Gives every kernel that `load_lora` changed the exact parameters that it had before.

    Kernels are restored in the models that were changed, also where another model has taken the
    place of one in the pipeline since; that one isn't touched. What was trained or loaded in these
    kernels after `load_lora` is lost.

    Args:
        pipeline: a `StableDiffusion`.

    Returns:
        The number of restored kernels, 0 if no LoRA was loaded.
    """
    restored = pipeline.changes.undo()
    for model in restored:
        forget_compiled(model)
    return sum(restored.values())


def name_kernels(unet) -> dict[str, str]:
    """Returns what diffusers calls the kernels of a UNet: dict from a variable's path to a name."""
    slots = LAYOUTS["diffusion_model"].slots(unet)
    return {
        slot.variable.path: slot.name.removesuffix(".weight")
        for slot in slots
        if slot.variable.path.endswith("/kernel")
    }


def save_lora(
    path: str | Path,
    halves: dict[str, tuple[np.ndarray, np.ndarray]],
    alpha: float,
    keys: str = "kohya",
    dtype: str = "float32",
):
    """Writes a LoRA of a UNet as a .safetensors file.

    Args:
        path: path of the file.
        halves: dict from a kernel's name, as of `name_kernels`, to its two halves as Keras has
            them: A `(h, w, in, rank)` or `(in, rank)`, and B `(rank, out)`.
        alpha: what is added to a kernel is alpha / rank * A B.
        keys: how tensors are called: "kohya" (which diffusers reads, too) or "diffusers" (peft's
            names after "unet."; alpha is in the metadata).
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: unknown keys.
    """
    if keys not in KEYS:
        raise ValueError(f"keys must be one of {', '.join(map(repr, KEYS))}, not {keys!r}.")
    prefix, dot, down, up, with_alpha = KEYS[keys]
    tensors = {}
    for name, (a, b) in halves.items():
        key = prefix + name.replace(".", dot)
        # Keras' (h, w, in, rank) to PyTorch's (rank, in, h, w), and (in, rank) to (rank, in).
        a = np.moveaxis(a, (-1, -2), (0, 1))
        b = b.T.reshape(*b.T.shape, *[1] * (a.ndim - 2))
        tensors[f"{key}.{down}.weight"] = np.ascontiguousarray(a.astype(dtype))
        tensors[f"{key}.{up}.weight"] = np.ascontiguousarray(b.astype(dtype))
        if with_alpha:
            tensors[f"{key}.alpha"] = np.array(alpha, dtype)
    rank = len(next(iter(halves.values()))[1])
    if keys == "kohya":
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
        }
    else:
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(halves),
        }
        packed = {f"unet.{key}": value for key, value in config.items()}
        metadata = {METADATA: json.dumps(packed, sort_keys=True)}
    save_safetensors(path, tensors, metadata)


def _lora_file(path):
    """Returns the path of the file that is meant by the path of a folder, or of a file."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [file for file in (find_file(path, name) for name in FOLDER_FILES) if file]
    if len(found) != 1:
        raise ValueError(f"{path} must have one of {', '.join(FOLDER_FILES)}; it has {len(found)}.")
    return found[0]


def _group(file):
    """Sorts a file's tensors by the kernel that they are for.

    Returns:
        A dict from (component, kernel as the file calls it) to a dict from "down", "up" and "alpha" to
        the tensor's name; and a dict of problems, see `summary`.
    """
    groups, problems = {}, {"unknown": [], "doubled": []}
    for key in sorted(file.shapes):
        component, name = None, key
        while found := [(prefix, of) for prefix, of in PREFIXES if name.startswith(prefix)]:
            name, component = name.removeprefix(found[0][0]), component or found[0][1]
        matches = ((re.fullmatch(f"(.+?){pattern}", name), kind) for pattern, kind in SUFFIXES)
        match, kind = next((pair for pair in matches if pair[0]), (None, None))
        if match is None:
            problems["unknown"].append(key)
            continue
        text = match[1].startswith(TEXT_NAMES)
        component = component or ("text_encoder" if text else "diffusion_model")
        if groups.setdefault((component, match[1]), {}).setdefault(kind, key) != key:
            problems["doubled"].append(key)
    return groups, problems


def _kernels(pipeline, component):
    """Returns the slots of a component's kernels, by all names that files may have for them."""
    model, slots = getattr(pipeline, component), {}
    theirs = LAYOUTS[component].slots(model)
    others = (
        original.find_slots(component, model, pipeline.config)
        if component == "diffusion_model"
        else theirs
    )
    for slot, other in zip(theirs, others, strict=True):
        if not slot.variable.path.endswith("/kernel"):
            continue
        names = [slot.name]
        for new, old in OLDER[component]:
            names += [name.replace(new, old) for name in names if new in name]
        names.append(other.name.removeprefix(original.LAYOUTS["diffusion_model"].prefix))
        for name in names:
            name = name.removesuffix(".weight")
            slots[name] = slots[name.replace(".", "_")] = slot
    return slots


def _match(file, groups, problems, slots, configs):
    """Finds the kernel of each group, and adds what is wrong with any to `problems`."""
    problems |= {
        "for no kernel": [],
        "without the other half": [],
        "misshapen": [],
        "not float": [],
    }
    adapters, taken = [], set()
    for (component, name), group in groups.items():
        slot, first = slots[component].get(name), min(group.values())
        if slot is None:
            problems["for no kernel"].append(first)
        elif not {"down", "up"} <= group.keys():
            problems["without the other half"].append(first)
        elif slot.name in taken:
            problems["doubled"].append(first)
        else:
            taken.add(slot.name)
            down, up = group["down"], group["up"]
            alpha, rank, root = _scaling(configs.get(component, {}), name)
            rank = rank or (*file.shapes[up], 0, 0)[1]
            wanted = {down: (rank, *slot.shape[1:]), up: (slot.shape[0], rank)}
            wanted |= {group["alpha"]: ()} if "alpha" in group else {}
            wrong = [n for n, shape in wanted.items() if not _same(file.shapes[n], shape)]
            problems["misshapen"] += [f"{n} {file.shapes[n]}, not {wanted[n]}" for n in wrong]
            problems["not float"] += [f"{n} {file.odd[n]}" for n in (down, up) if n in file.odd]
            if not wrong:
                alpha = _read(file, group["alpha"]).item() if "alpha" in group else alpha
                factor = (rank if alpha is None else alpha) / (rank**0.5 if root else rank)
                adapters.append(_Adapter(component, slot, down, up, factor))
    return adapters


def _same(shape, wanted):
    """Whether a tensor has the wanted shape, as matrix or as 1x1 convolution; and isn't empty."""
    if wanted == ():
        return math.prod(shape) == 1
    return 0 not in wanted and (*shape, 1, 1)[: max(4, len(shape))] == (*wanted, 1, 1)[:4]


def _merge(file, adapters, scale):
    """Adds adapters to their kernels: all of them, or none.

    Returns:
        A list of pairs of an adapter and what its kernel was before, numpy in the kernel's dtype.
    """
    before = []
    try:
        for adapter in adapters:
            variable, shape = adapter.slot.variable, adapter.slot.shape
            kernel = ops.convert_to_numpy(variable.value).astype(variable.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                down = _read(file, adapter.down).astype("float32").reshape(-1, math.prod(shape[1:]))
                up = _read(file, adapter.up).astype("float32").reshape(shape[0], -1)
                delta = np.float32(scale * adapter.factor) * (up @ down).reshape(shape)
                # PyTorch's (out, in, h, w) to (h, w, in, out), or (out, in) to (in, out).
                delta = np.moveaxis(delta, (0, 1), (-1, -2)).reshape(kernel.shape)
                merged = (kernel.astype("float32") + delta).astype(kernel.dtype)
            if not np.isfinite(merged.astype("float32")).all():
                raise ValueError(
                    f"{file.path} doesn't fit the pipeline, which is unchanged: with "
                    f"{adapter.up}, values are not finite in {variable.dtype}."
                )
            before.append((adapter, kernel))
            variable.assign(merged)
    except BaseException:  # whatever it is, also Ctrl-C
        for adapter, kernel in before:
            adapter.slot.variable.assign(kernel)
        raise
    return before


def _read(file, name):
    try:
        return file.read(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} in {file.path} can't be read: {error}") from error


# --- Configs: what a file doesn't say by its tensors ---------------------------------------------


def _configs(path, file):
    """Returns the adapter's config for each component, {} where there is none.

    Raises:
        ValueError: no config where there has to be one, or one that isn't supported.
    """
    where = f"{path}: {METADATA}"
    if path.name == PEFT_FILE:
        where = path.with_name(PEFT_CONFIG)
        configs = dict.fromkeys(("diffusion_model", "text_encoder"), read_json(where))
    else:
        try:
            packed = json.loads(file.metadata.get(METADATA, "{}"))
            configs = {
                component: {k.removeprefix(p): v for k, v in packed.items() if k.startswith(p)}
                for p, component in PREFIXES
                if p.endswith(".") and component
            }
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON object: {error}") from error
    for config in configs.values():
        for key, supported in FIXED.items():
            if (found := config.get(key, supported[0])) not in supported:
                accepted = " or ".join(map(repr, supported))
                raise ValueError(f"{where}: {key} must be {accepted}, not {found!r}.")
        for key in ("lora_alpha", "r"):
            for k, value in {key: config.get(key), **_patterns(config, key)}.items():
                if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e9):
                    raise ValueError(f"{where}: {k} must be a positive number, not {value!r}.")
    return configs


def _patterns(config, key):
    """Returns a config's exceptions from `key`: dict from pattern of kernels' names to value."""
    found = config.get({"lora_alpha": "alpha_pattern", "r": "rank_pattern"}[key]) or {}
    return found if isinstance(found, dict) else {"pattern": found}


def _scaling(config, name):
    """Returns alpha and rank, each None if the config doesn't tell, and whether rank is a root."""
    values = []
    for key in ("lora_alpha", "r"):
        value = config.get(key)
        for pattern, other in _patterns(config, key).items():
            try:
                if regex.fullmatch(rf"(.*\.)?({pattern})", name, timeout=PATTERN_SECONDS):
                    value = other
                    break
            except (regex.error, TimeoutError) as error:
                raise ValueError(f"The config has a bad pattern, {pattern!r}: {error}") from error
        values.append(value)
    return *values, bool(config.get("use_rslora"))
