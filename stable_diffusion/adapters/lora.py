"""LoRA: fine-tunings that consist of small matrices, which are added to kernels of a pipeline.

For each kernel W of shape (out, in) that a LoRA changes, it has two matrices of a low rank r: `up`
of shape (out, r), and `down` of shape (r, in). To load a LoRA means to replace W by

    W + scale * alpha / r * up @ down

so the model runs as fast as before. For a convolution, `down` is a convolution with the window of
W to r channels, and `up` is a 1x1 convolution. Programs name the kernel and the two matrices in
different ways, for example:

    kohya       lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, and .alpha
                lora_unet_input_blocks_1_1_proj_in.lora_down.weight
                lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight
    diffusers   unet.down_blocks.0.attentions.0.proj_in.lora_A.weight
                text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight
                down_blocks.0. ... .attn1.processor.to_q_lora.down.weight
    peft        base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight

The table `KINDS` has one row for each way. Without the prefix and the suffix, each name is that of
a kernel in diffusers' layout, in the original layout, or in an older version of these (`OLDER`).

References:
    Hu et al. 2021, https://arxiv.org/abs/2106.09685: LoRA.
    Kalajdzievski 2023, https://arxiv.org/abs/2312.03732: `use_rslora`, alpha / √r.
    https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py: names and alpha of kohya.
    https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/state_dict_utils.py and
    https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py: the other names.
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
    check_dtype,
    guess_family,
    open_safetensors,
    save_safetensors,
    summarize_problems,
)
from stable_diffusion.files import find_file


class Kind(NamedTuple):
    """One way to name the tensors of a LoRA.

    Files are read with the prefixes and suffixes of all kinds together, because programs mix them.

    Attributes:
        prefixes: dict from a text before the name of a kernel to the component that it belongs to,
            or to None if the name of the kernel tells it.
        suffixes: pairs of a pattern after the name of a kernel, and what the tensor is: "down",
            "up" or "alpha".
        written: how `save_lora` writes the kind, None if it does not: the prefix of the UNet, the
            separator in names of kernels, the names of `down` and `up`, and whether alpha is a
            tensor. If not, the metadata have it.
    """

    prefixes: dict[str, str | None]
    suffixes: tuple[tuple[str, str], ...]
    written: tuple[str, str, str, str, bool] | None = None


KINDS = {
    "kohya": Kind(
        {
            "lora_unet_": "diffusion_model",
            "lora_te_": "text_encoder",
            "lora_te1_": "text_encoder",
        },
        (
            (r"\.lora_down\.weight", "down"),
            (r"\.lora_up\.weight", "up"),
        ),
        ("lora_unet_", "_", "lora_down", "lora_up", True),
    ),
    "diffusers": Kind(
        {"unet.": "diffusion_model", "text_encoder.": "text_encoder"},
        (
            (r"\.lora_A(\.\w+)?\.weight", "down"),  # the optional word is the adapter's name
            (r"\.lora_B(\.\w+)?\.weight", "up"),
            (r"(\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
            (r"(\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
            (r"(\.lora|\.lora_linear_layer|_lora)?\.alpha", "alpha"),
        ),
        ("unet.", ".", "lora_A", "lora_B", False),
    ),
    "peft": Kind({"base_model.model.": None}, ()),  # its suffixes are among diffusers'
}
PREFIXES = {prefix: of for kind in KINDS.values() for prefix, of in kind.prefixes.items()}
SUFFIXES = [suffix for kind in KINDS.values() for suffix in kind.suffixes]
WRITTEN = {name: kind.written for name, kind in KINDS.items() if kind.written}
TEXT_NAMES = ("text_model.", "encoder.layers.")  # beginnings of names of the text encoder
OLDER = {  # names that older programs, and the newest transformers, write in another way
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
UNSUPPORTED = (  # a pattern that only one kind of file has in its names, and that kind
    (
        r"^transformer\.|double_blocks|joint_blocks",
        "for a transformer, not for Stable Diffusion 1 or 2",
    ),
    (r"^lora_te2_|^text_encoder_2\.|transformer_blocks[._][1-9]", "for Stable Diffusion XL"),
    (r"dora_scale|lora_magnitude_vector", "of the kind DoRA"),
    (r"hada_w", "of the kind LoHa"),
    (r"lokr_w", "of the kind LoKr"),
    (r"lora_mid", "of the kind LoCon with a third matrix"),
)
FIXED = {  # accepted values of keys in an adapter's config
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "layer_replication": (None,),
    # Other values mean that the kernels were changed before training, which the file does not tell.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOLDER_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)
METADATA = "lora_adapter_metadata"  # diffusers' key for the adapters' configs
PATTERN_SECONDS = 1.0  # the file's patterns may be hostile: a slower one is refused


class _Adapter(NamedTuple):
    """What a LoRA adds to one kernel.

    Attributes:
        component: the kernel's component.
        slot: the kernel.
        down, up: names of the matrices in the file.
        factor: alpha / r.
    """

    component: str
    slot: Slot
    down: str
    up: str
    factor: float


def load_lora(pipeline, path: str | Path, scale: float = 1.0) -> int:
    """Adds a LoRA to the kernels of a pipeline's diffusion model, text encoder, or both.

    Several LoRAs add up. If a component that the file changes is not built yet, it is built and
    loaded. Sums are computed in float32 and rounded to the dtype of the kernel. Everything is
    checked before the first kernel is changed.

    Args:
        pipeline: a `StableDiffusion`.
        path: path of a .safetensors file with names of one of the `KINDS`; or of a folder with
            diffusers' pytorch_lora_weights.safetensors, or with peft's adapter_model.safetensors
            and adapter_config.json. If neither file nor config has alpha, it is the rank.
        scale: strength of the LoRA. 1 is the strength of its training, 0 has no effect. Loading
            the same LoRA with -scale undoes it, except for rounding; `unload_lora` is exact.

    Returns:
        The number of changed kernels.

    Raises:
        ValueError: the file is no LoRA of these kinds, or does not fit the pipeline. The message
            lists what is unknown, incomplete or misshapen. The parameters are unchanged then.

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
    path = _find_lora_file(path)
    file = open_safetensors(path)
    for pattern, kind in UNSUPPORTED:
        if name := next((name for name in file.shapes if re.search(pattern, name)), None):
            raise ValueError(f"{path} is a LoRA {kind}, which isn't supported: it has {name}.")
    groups, problems = _group_tensors(file)
    if not groups:
        raise ValueError(
            f"{path} has no LoRA: {summarize_problems(problems)}{guess_family(file.shapes)}"
        )
    slots = {
        component: _find_kernels(pipeline, component)
        for component in sorted({component for component, _ in groups})
    }
    adapters = _match_groups(file, groups, problems, slots, _read_configs(path, file))
    if any(problems.values()):
        raise ValueError(
            f"{path} doesn't fit the pipeline, which is unchanged: {summarize_problems(problems)}"
        )
    before = _merge_adapters(file, adapters, float(scale))
    for component in slots:
        model = getattr(pipeline, component)
        places = {id(variable): n for n, variable in enumerate(model.weights)}
        for adapter, kernel in before:
            if adapter.component == component:
                pipeline.changes.keep_original(model, places[id(adapter.slot.variable)], kernel)
        forget_compiled(model)
    return len(adapters)


def unload_lora(pipeline) -> int:
    """Restores every kernel that `load_lora` changed, bit for bit.

    Kernels are restored in the models that were changed. If another model was assigned to the
    pipeline since then, that one is not changed. If these kernels were trained or loaded again
    after `load_lora`, that is lost.

    Args:
        pipeline: a `StableDiffusion`.

    Returns:
        The number of restored kernels, 0 if no LoRA was loaded.
    """
    restored = pipeline.changes.restore_originals()
    for model in restored:
        forget_compiled(model)
    return sum(restored.values())


def name_kernels(unet) -> dict[str, str]:
    """Returns diffusers' names of the kernels of a UNet: dict from a variable's path to a name."""
    slots = LAYOUTS["diffusion_model"].find_slots(unet)
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
        halves: dict from the name of a kernel, see `name_kernels`, to its two matrices in Keras'
            form: A `(h, w, in, rank)` or `(in, rank)`, and B `(rank, out)`.
        alpha: a number. The LoRA adds alpha / rank * A B to a kernel.
        keys: a key of `KINDS` that is written: "kohya", which most programs read, diffusers among
            them, or "diffusers".
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: the keys or the dtype are unknown.
    """
    if keys not in WRITTEN:
        raise ValueError(f"keys must be one of {', '.join(map(repr, WRITTEN))}, not {keys!r}.")
    check_dtype(dtype)
    prefix, dot, down, up, with_alpha = WRITTEN[keys]
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


def _find_lora_file(path):
    """Returns the path of the file in a folder. If `path` is no folder, returns it unchanged."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [file for file in (find_file(path, name) for name in FOLDER_FILES) if file]
    if len(found) != 1:
        raise ValueError(f"{path} must have one of {', '.join(FOLDER_FILES)}; it has {len(found)}.")
    return found[0]


def _group_tensors(file):
    """Groups the tensors of a file by the kernel that they belong to.

    Returns:
        A dict from `(component, name of the kernel in the file)` to a dict from "down", "up" and
        "alpha" to the name of the tensor; and a dict of problems, see `summarize_problems`.
    """
    groups, problems = {}, {"unknown": [], "doubled": []}
    for key in sorted(file.shapes):
        component, name = None, key
        while found := [(p, of) for p, of in PREFIXES.items() if name.startswith(p)]:
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


def _find_kernels(pipeline, component):
    """Returns the slots of a component's kernels: dict from all names that files may use."""
    model, slots = getattr(pipeline, component), {}
    theirs = LAYOUTS[component].find_slots(model)
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


def _match_groups(file, groups, problems, slots, configs):
    """Finds the kernel of each group of tensors, and adds what is wrong to `problems`.

    Returns:
        A list of `_Adapter`, of the groups without problems.
    """
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
            alpha, rank, root = _find_scaling(configs.get(component, {}), name)
            rank = rank or (*file.shapes[up], 0, 0)[1]
            wanted = {down: (rank, *slot.shape[1:]), up: (slot.shape[0], rank)}
            wanted |= {group["alpha"]: ()} if "alpha" in group else {}
            wrong = [n for n, shape in wanted.items() if not _has_shape(file.shapes[n], shape)]
            problems["misshapen"] += [f"{n} {file.shapes[n]}, not {wanted[n]}" for n in wrong]
            problems["not float"] += [f"{n} {file.odd[n]}" for n in (down, up) if n in file.odd]
            if not wrong:
                alpha = _read_tensor(file, group["alpha"]).item() if "alpha" in group else alpha
                factor = (rank if alpha is None else alpha) / (rank**0.5 if root else rank)
                adapters.append(_Adapter(component, slot, down, up, factor))
    return adapters


def _has_shape(shape, wanted):
    """Returns whether a shape is the wanted one, as a matrix or 1x1 convolution, and not empty."""
    if wanted == ():
        return math.prod(shape) == 1
    return 0 not in wanted and (*shape, 1, 1)[: max(4, len(shape))] == (*wanted, 1, 1)[:4]


def _merge_adapters(file, adapters, scale):
    """Adds adapters to their kernels: all of them, or none.

    Returns:
        A list of pairs: an adapter, and the value of its kernel before, a numpy array of the
        kernel's dtype.
    """
    before = []
    try:
        for adapter in adapters:
            variable, shape = adapter.slot.variable, adapter.slot.shape
            kernel = ops.convert_to_numpy(variable.value).astype(variable.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                down = (
                    _read_tensor(file, adapter.down)
                    .astype("float32")
                    .reshape(-1, math.prod(shape[1:]))
                )
                up = _read_tensor(file, adapter.up).astype("float32").reshape(shape[0], -1)
                delta = np.float32(scale * adapter.factor) * (up @ down).reshape(shape)
                # PyTorch's (out, in, h, w) to (h, w, in, out), or (out, in) to (in, out).
                delta = np.moveaxis(delta, (0, 1), (-1, -2)).reshape(kernel.shape)
                merged = (kernel.astype("float32") + delta).astype(kernel.dtype)
            if not np.isfinite(merged.astype("float32")).all():
                raise ValueError(
                    f"{file.path} doesn't fit the pipeline, which is unchanged: with {adapter.up} "
                    f"some values are not finite in {variable.dtype}."
                )
            before.append((adapter, kernel))
            variable.assign(merged)
    except BaseException:  # also Ctrl-C
        for adapter, kernel in before:
            adapter.slot.variable.assign(kernel)
        raise
    return before


def _read_tensor(file, name):
    try:
        return file.read_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} in {file.path} can't be read: {error}") from error


# --- Configs: alpha and rank, if they are not tensors --------------------------------------------


def _read_configs(path, file):
    """Returns a dict from each component to the adapter's config, {} if it has none.

    Raises:
        ValueError: peft's config file is missing, or a config is not supported.
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
                for p, component in PREFIXES.items()
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
            for k, value in {key: config.get(key), **_find_patterns(config, key)}.items():
                if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e9):
                    raise ValueError(f"{where}: {k} must be a positive number, not {value!r}.")
    return configs


def _find_patterns(config, key):
    """Returns a config's exceptions from `key`: dict from pattern of names to value."""
    found = config.get({"lora_alpha": "alpha_pattern", "r": "rank_pattern"}[key]) or {}
    return found if isinstance(found, dict) else {"pattern": found}


def _find_scaling(config, name):
    """Returns alpha and rank of a kernel, and whether the factor is alpha / √rank.

    Alpha and rank are None if the config does not have them.
    """
    values = []
    for key in ("lora_alpha", "r"):
        value = config.get(key)
        for pattern, other in _find_patterns(config, key).items():
            try:
                if regex.fullmatch(rf"(.*\.)?({pattern})", name, timeout=PATTERN_SECONDS):
                    value = other
                    break
            except (regex.error, TimeoutError) as error:
                raise ValueError(
                    f"The adapter's config has a bad pattern, {pattern!r}: {error}"
                ) from error
        values.append(value)
    return *values, bool(config.get("use_rslora"))
