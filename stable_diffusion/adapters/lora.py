"""LoRA: fine-tunings that consist of small matrices, which are added to kernels of a pipeline.

For each kernel W of shape (out, in) that a LoRA changes, it has two matrices of a low rank r: `up`
of shape (out, r), and `down` of shape (r, in). To load a LoRA means to replace W by

    W + scale * alpha / r * up @ down

so the model runs as fast as before. For a convolution, `down` is a convolution with the window of
W to r channels, and `up` is a 1x1 convolution. Other kinds have other matrices, also for biases and
norms (`lora_kinds.py`). Programs name the kernel and the two matrices in different ways, for
example:

    kohya       lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, and .alpha
                lora_unet_input_blocks_1_1_proj_in.lora_down.weight
                lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight
    diffusers   unet.down_blocks.0.attentions.0.proj_in.lora_A.weight
                text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight
                down_blocks.0. ... .attn1.processor.to_q_lora.down.weight
    peft        base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight
    ComfyUI     diffusion_model.input_blocks.1.1.proj_in.lora_down.weight
                text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight
    OneTrainer  unet.input_blocks.1.1.proj_in.lora_down.weight
                clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight
                lora_unet.down_blocks.0.attentions.0.proj_in.lora_down.weight
    LyCORIS     lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a

The table `KINDS` has one row for each way. Without the prefix and the suffix, each name is that of
a kernel in diffusers' layout, in the original layout, or in an older version of these (`OLDER`).
Files without names are in `lora_lists.py`. A file may also bring words, as embeddings.

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

from stable_diffusion.adapters.embedding import (
    add_word,
    check_words,
    mark_known_words,
    remove_word,
)
from stable_diffusion.adapters.lora_kinds import (
    LORA_KINDS,
    LoraKind,
    find_length_shape,
    find_lora_kind,
    scale_to_lengths,
)
from stable_diffusion.adapters.lora_lists import list_orders, read_lists
from stable_diffusion.block import forget_compiled
from stable_diffusion.checkpoints import original
from stable_diffusion.checkpoints.contents import quote
from stable_diffusion.checkpoints.diffusers import LAYOUTS
from stable_diffusion.checkpoints.diffusers_config import read_json
from stable_diffusion.checkpoints.layout import Slot
from stable_diffusion.checkpoints.tensors import (
    MAX_NAMES,
    cast_stored,
    check_dtype,
    guess_family,
    open_tensors,
    save_safetensors,
    summarize_problems,
)
from stable_diffusion.checks import check_path
from stable_diffusion.files import find_file


class Kind(NamedTuple):
    """One way to name the tensors of a LoRA.

    Files are read with the prefixes and suffixes of all kinds together, because programs mix them.

    Attributes:
        prefixes: dict from a text before the name of a kernel to the component that it belongs to,
            or to None if the name of the kernel tells it.
        suffixes: pairs of a pattern after the name of a kernel, and what the tensor is: "alpha", a
            part of a kind in `lora_kinds.py`, or "diff_b", the difference of the bias.
        written: how `save_lora` writes the kind, None if it does not: the prefix of the UNet, the
            separator in names of kernels, the names of `down` and `up`, and whether alpha is a
            tensor. If not, the metadata have it.
    """

    prefixes: dict[str, str | None]
    suffixes: tuple[tuple[str, str], ...]
    written: tuple[str, str, str, str, bool] | None = None


WITH_THEIR_NAMES = [f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"] + [
    f"lokr_w{n}{half}" for n in (1, 2) for half in ("", "_a", "_b")
]
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
            (r"\.dora_scale", "dora_scale"),
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
    # peft's other suffixes are among diffusers'.
    "peft": Kind(
        {"base_model.model.": None}, ((r"\.lora_magnitude_vector(\.\w+){0,2}", "magnitude"),)
    ),
    "lycoris": Kind(
        {"lycoris_": "diffusion_model"},
        (
            *((rf"\.{part}", part) for part in WITH_THEIR_NAMES),
            (r"\.(diff|w_norm)", "diff"),
            (r"\.(diff_b|b_norm)", "diff_b"),
        ),
    ),
    "comfyui": Kind(
        {
            "diffusion_model.": "diffusion_model",
            "text_encoders.clip_l.transformer.": "text_encoder",
            "text_encoders.clip_h.transformer.": "text_encoder",
        },
        (),
    ),
    "onetrainer": Kind(
        {
            "lora_unet.": "diffusion_model",
            "lora_te.": "text_encoder",
            "lora_te1.": "text_encoder",
            "clip_l.": "text_encoder",
        },
        (),
    ),
}
PREFIXES = {prefix: of for kind in KINDS.values() for prefix, of in kind.prefixes.items()}
SUFFIXES = [suffix for kind in KINDS.values() for suffix in kind.suffixes]
WRITTEN = {name: kind.written for name, kind in KINDS.items() if kind.written}
TEXT_NAMES = ("text_model.", "encoder.layers.")  # beginnings of names of the text encoder
TEXT_LAYER = re.compile(r"(?:text_model[._])?encoder[._]layers[._]([0-9]{1,3})(?=[._])")
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
    (r"lora_mid|hada_t[12]|lokr_t[12]", "of the kind LoCon, LoHa or LoKr with a third matrix"),
    (r"\.ia3_l|\.on_input$", "of the kind (IA)³"),
    (r"\.oft_|boft_", "of the kind OFT or BOFT"),
    (r"\.[ab][12]\.weight$", "of the kind GLoRA"),
)
FIXED = {  # accepted values of keys in an adapter's config
    "peft_type": ("LORA", "LOHA", "LOKR"),
    "use_dora": (False, True),
    "use_qalora": (False,),
    "layer_replication": (None,),
    # Other values mean that the kernels were changed before training, which the file does not tell.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
DIFFUSERS_STEM, PEFT_STEM = "pytorch_lora_weights", "adapter_model"  # of files in a folder
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' key for the adapters' configs
# Words in a LoRA: the web interfaces', OneTrainer's own, and the value of cloneofsimo's metadata.
BUNDLED = re.compile(r"bundle_emb\.(.+)\.(?:string_to_param\.\*|emb_params|clip_l)")
EMBEDDED = "<embed>"
BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}  # by the width of the text encoder
# Kernels whose inputs are as wide as the text encoder, in the UNet and there, and where it is told.
CROSS, WIDE = r"attn2[._](processor[._])?to_[kv]$", r"[qkv]_proj$|fc1$"
INPUTS = ("down", "diff", "hada_w1_b", "lokr_w1", "lokr_w1_b", "lokr_w2", "lokr_w2_b")
PATTERN_SECONDS = 1.0  # the file's patterns may be hostile: a slower one is refused


class _Adapter(NamedTuple):
    """What a LoRA adds to one parameter.

    Attributes:
        component: the parameter's component.
        slot: the parameter.
        kind: the `LoraKind`.
        tensors: dict from the kind's parts to the names of the tensors in the file.
        factor: alpha / r.
        lengths: for DoRA, the name of the lengths in the file and their shape beside the parameter.
    """

    component: str
    slot: Slot
    kind: LoraKind
    tensors: dict[str, str]
    factor: float
    lengths: tuple[str, tuple] | None


def load_lora(pipeline, path: str | Path, scale: float = 1.0) -> int:
    """Adds a LoRA to the kernels of a pipeline's diffusion model, text encoder, or both.

    Several LoRAs add up; only DoRA is no sum, it begins with the kernels as they are then. If a
    component that the file changes is not built yet, it is built and loaded. Sums are computed in
    float32 and rounded to the dtype of the kernel. Everything is checked before the first kernel is
    changed. Words that the file brings are added as by `load_embedding`, but one that the tokenizer
    has already is written <word> in prompts. What is for layers of the text encoder that the
    pipeline's config leaves out is ignored.

    Args:
        pipeline: a `StableDiffusion`.
        path: path of a file with names of one of the `KINDS`: safetensors, or PyTorch's (.pt,
            .bin), which needs PyTorch. Or of a folder with one file, or with diffusers'
            pytorch_lora_weights.safetensors (or .bin), or with peft's adapter_model.safetensors (or
            .bin) and adapter_config.json. If neither file nor config has alpha, it is the rank.
        scale: strength of the LoRA. 1 is the strength of its training, 0 has no effect. Loading
            the same LoRA with -scale undoes it, except for rounding; `unload_lora` is exact.

    Returns:
        The number of changed kernels, norms and biases.

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
    path = _find_lora_file(check_path("path", path))
    file = open_tensors(path)
    words = _find_words(file)
    names = sorted(file.shapes.keys() - words.values())
    for pattern, kind in UNSUPPORTED:
        if name := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(
                f"{path} is a LoRA {kind}, which isn't supported: it has {quote(name)}."
            )
    lists = read_lists(names)
    if lists:
        groups, problems = _group_lists(pipeline, file, lists), {"unknown": [], "doubled": []}
    else:
        groups, problems = _group_tensors(names)
        groups = _drop_cut_layers(groups, pipeline.config.text.depth)
    if not groups:
        raise ValueError(
            f"{path} has no LoRA: {summarize_problems(problems)}{guess_family(file.shapes)}"
        )
    slots = {
        component: _find_slots(pipeline, component)
        for component in sorted({component for component, _ in groups})
    }
    adapters = _match_groups(file, groups, problems, slots, _read_configs(path, file))
    if any(problems.values()):
        raise ValueError(
            f"{path} doesn't fit the pipeline, which is unchanged: {summarize_problems(problems)}"
            f"{_guess_base(pipeline, file, groups)}"
        )
    vectors = {token: _read_tensor(file, name) for token, name in words.items()}
    words = check_words(pipeline, mark_known_words(pipeline, vectors, path), path)
    before = _merge_adapters(file, adapters, float(scale))
    for component in slots:
        model = getattr(pipeline, component)
        places = {id(variable): n for n, variable in enumerate(model.weights)}
        for adapter, kernel in before:
            if adapter.component == component:
                pipeline.changes.keep_original(model, places[id(adapter.slot.variable)], kernel)
        forget_compiled(model)
    pipeline.changes.words += [add_word(pipeline, *word) for word in words]
    return len(adapters)


def unload_lora(pipeline) -> int:
    """Restores everything that `load_lora` changed, bit for bit, and removes words that it brought.

    Kernels are restored in the models that were changed. If another model was assigned to the
    pipeline since then, that one is not changed. If these kernels were trained or loaded again
    after `load_lora`, that is lost.

    Args:
        pipeline: a `StableDiffusion`.

    Returns:
        The number of restored kernels, norms and biases, 0 if no LoRA was loaded.
    """
    restored = pipeline.changes.restore_originals()
    for model in restored:
        forget_compiled(model)
    while pipeline.changes.words:
        remove_word(pipeline, *pipeline.changes.words.pop())
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
        ValueError: the keys or the dtype are unknown, or the dtype cannot hold a value. Nothing is
            written then.
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
        tensors |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
        if with_alpha:
            tensors[f"{key}.alpha"] = np.array(alpha, "float32")
    tensors = {key: np.array(cast_stored(key, t, dtype), order="C") for key, t in tensors.items()}
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
    for suffix in (".safetensors", ".bin"):
        names = (DIFFUSERS_STEM + suffix, PEFT_STEM + suffix)
        found = [file for file in (find_file(path, name) for name in names) if file]
        if len(found) == 1:
            return found[0]
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    if only := original.find_only_file(files):
        return path / only
    some = ", ".join(map(quote, files[:MAX_NAMES])) or "nothing"
    raise ValueError(
        f"{path} must have one file of a LoRA: {DIFFUSERS_STEM}.safetensors, "
        f"{PEFT_STEM}.safetensors or only one file of tensors. It has {some}."
    )


def _find_words(file):
    """Returns the words that a file brings: dict from token to the name of its vectors."""
    words = {match[1]: name for name in file.shapes if (match := BUNDLED.fullmatch(name))}
    return words | {name: name for name in file.shapes if file.metadata.get(name) == EMBEDDED}


def _group_tensors(names):
    """Groups the tensors of a file by the kernel that they belong to.

    Returns:
        A dict from `(component, name of the kernel in the file)` to a dict from what a tensor is,
        see `Kind.suffixes`, to its name; and a dict of problems, see `summarize_problems`.
    """
    groups, problems = {}, {"unknown": [], "doubled": []}
    for key in names:
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


def _drop_cut_layers(groups, depth):
    """Returns groups without those of layers after the last one of the text encoder.

    Its config may leave out some that the LoRA was trained with. Such a LoRA changes the same in
    the last layer and in those, and something in all before; otherwise it has wrong names.
    """
    layers = {}
    for component, name in groups:
        if component == "text_encoder" and (match := TEXT_LAYER.match(name)):
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = name
    last = layers.get(depth - 1, {}).keys()
    cut = {
        ("text_encoder", name)
        for number, names in layers.items()
        if number >= depth and names.keys() == last and len(layers) == max(layers) + 1
        for name in names.values()
    }
    return {key: group for key, group in groups.items() if key not in cut}


def _group_lists(pipeline, file, lists):
    """Groups the matrices of a file without names, see `lora_lists.py`, as `_group_tensors` does.

    Raises:
        ValueError: the matrices fit the kernels in no order.
    """
    groups, kind = {}, LORA_KINDS["LoRA"]
    for given, pairs in lists.items():
        components = [given] if given else ["diffusion_model", "text_encoder"]
        found, counts = None, []
        for component in components:
            slots = _find_slots(pipeline, component)
            names = [name.removesuffix(".weight") for name in {s.name for s in slots.values()}]
            for order in list_orders(component, names):
                counts.append(f"{len(order)} of the {component}")
                if len(order) == len(pairs) and all(
                    pair.keys() == {"up", "down"}
                    and not _find_misfits(file, kind, pair, slots[n].shape)[1]
                    for n, pair in zip(order, pairs, strict=True)
                ):
                    found = {(component, n): p for n, p in zip(order, pairs, strict=True)}
        if found is None:
            downs = [file.shapes[pair["down"]] for pair in pairs if "down" in pair]
            bases = {BASES[size] for shape in downs for size in shape[1:2] if size in BASES}
            raise ValueError(
                f"{file.path} has {len(pairs)} pairs of matrices without names. They fit no order "
                f"of the kernels that such files change: {', '.join(dict.fromkeys(counts))}."
                f"{_say_base(pipeline, bases)}"
            )
        groups |= found
    return groups


def _find_slots(pipeline, component):
    """Returns the slots of a component's parameters: dict from all names that files may use.

    The name of a kernel, or of the factors of a norm, is that of its layer. A bias has ".bias".
    """
    model, slots = getattr(pipeline, component), {}
    theirs = LAYOUTS[component].find_slots(model)
    others = (
        original.find_slots(component, model, pipeline.config)
        if component == "diffusion_model"
        else theirs
    )
    for slot, other in zip(theirs, others, strict=True):
        if slot.variable.path.endswith("/embeddings"):
            continue
        names = [slot.name]
        for new, old in OLDER[component]:
            names += [name.replace(new, old) for name in names if new in name]
        names.append(other.name.removeprefix(original.LAYOUTS["diffusion_model"].prefix))
        for name in names:
            layer, _, leaf = name.rpartition(".")
            end = ".bias" if leaf == "bias" else ""
            slots[layer + end] = slots[layer.replace(".", "_") + end] = slot
    return slots


def _match_groups(file, groups, problems, slots, configs):
    """Finds the parameters of each group of tensors, and adds what is wrong to `problems`.

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
        for end, tensors in _split_group(group):
            slot, first = slots[component].get(name + end), min(tensors.values())
            alpha = tensors.pop("alpha", None)
            part = next((part for part in ("dora_scale", "magnitude") if part in tensors), None)
            lengths = tensors.pop(part, None)
            kind = find_lora_kind(tensors.keys())
            if slot is None or (len(slot.shape) == 1 and tensors.keys() != {"diff"}):
                problems["for no kernel"].append(first)
            elif kind is None:
                problems["without the other half"].append(first)
            elif slot.name in taken:
                problems["doubled"].append(first)
            else:
                taken.add(slot.name)
                value, given, root = _find_scaling(configs.get(component, {}), name)
                rank, wrong = _find_misfits(file, kind, tensors, slot.shape, given)
                rank = given or rank  # peft's LoKr has the factor alpha / r without matrices, too
                if alpha and not _has_shape(file.shapes[alpha], ()):
                    wrong.append(f"{alpha} {file.shapes[alpha]}, not ()")
                if lengths:
                    found = file.shapes[lengths]
                    lengths = lengths, find_length_shape(part, slot.shape, found)
                    if lengths[1] is None:
                        wrong.append(f"{lengths[0]} {found} beside a kernel {slot.shape}")
                problems["misshapen"] += wrong
                names = [*tensors.values(), *(lengths or ())[:1]]
                problems["not float"] += [f"{n} {file.odd[n]}" for n in names if n in file.odd]
                if not wrong:
                    value = _read_tensor(file, alpha).item() if alpha else value
                    value = rank if value is None else value
                    factor = value / (rank**0.5 if root else rank) if rank else 1.0
                    adapters.append(_Adapter(component, slot, kind, tensors, factor, lengths))
    return adapters


def _split_group(group):
    """Returns the tensors of a group for the kernel, with "", and for its bias, with ".bias"."""
    kernel = {part: key for part, key in group.items() if part != "diff_b"}
    if "diff_b" not in group:
        return [("", kernel)]
    bias = (".bias", {"diff": group["diff_b"]})
    return [bias] if kernel.keys() <= {"alpha"} else [("", kernel), bias]


def _find_misfits(file, kind, tensors, shape, rank=None):
    """Returns the rank of an adapter, None if it has none, and a list of misshapen tensors.

    Args:
        file: the file.
        kind: a `LoraKind`.
        tensors: dict from the kind's parts to names.
        shape: the parameter's shape as PyTorch has it.
        rank: the rank in the config, if it has one.
    """
    rank, fitting = kind.expect(shape, {p: file.shapes[n] for p, n in tensors.items()}, rank)
    return rank, [
        f"{tensors[part]} {file.shapes[tensors[part]]}, not {wanted}"
        for part, wanted in fitting.items()
        if not _has_shape(file.shapes[tensors[part]], wanted)
    ]


def _guess_base(pipeline, file, groups):
    """Returns a sentence that says which model a LoRA was made for, if it is another one."""
    bases = set()
    for (component, name), group in groups.items():
        if re.search(WIDE if component == "text_encoder" else CROSS, name):
            sizes = [file.shapes[group[part]][1:2] for part in INPUTS if part in group]
            bases |= {BASES[size] for size in [math.prod(sum(sizes, ()))] if size in BASES}
    return _say_base(pipeline, bases)


def _say_base(pipeline, bases):
    """Returns a sentence about the first of some `BASES` that is not the pipeline's."""
    others = sorted(bases - {BASES.get(pipeline.config.text.width)})
    return f" It was made for {others[0]}." if others else ""


def _has_shape(shape, wanted):
    """Returns whether a shape is the wanted one, as a matrix or 1x1 convolution, and not empty."""
    if wanted == ():
        return math.prod(shape) == 1
    return 0 not in wanted and (*shape, 1, 1)[: max(4, len(shape))] == (*wanted, 1, 1)[:4]


def _merge_adapters(file, adapters, scale):
    """Adds adapters to their parameters: all of them, or none.

    Returns:
        A list of pairs: an adapter, and the value of its parameter before, a numpy array of the
        parameter's dtype.
    """
    before = []
    try:
        for adapter in adapters:
            variable = adapter.slot.variable
            old = ops.convert_to_numpy(variable.value).astype(variable.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                delta = _compute_difference(file, adapter, old.astype("float32"), scale)
                merged = (old.astype("float32") + delta).astype(old.dtype)
            if not np.isfinite(merged.astype("float32")).all():
                raise ValueError(
                    f"{file.path} doesn't fit the pipeline, which is unchanged: with "
                    f"{quote(max(adapter.tensors.values()))} some values are not finite in "
                    f"{variable.dtype}."
                )
            before.append((adapter, old))
            variable.assign(merged)
    except BaseException:  # also Ctrl-C
        for adapter, old in before:
            adapter.slot.variable.assign(old)
        raise
    return before


def _compute_difference(file, adapter, old, scale):
    """Returns what an adapter adds to a parameter, float32, in the shape that Keras has.

    Args:
        file, adapter: see `_merge_adapters`.
        old: the parameter's value, float32.
        scale: strength of the LoRA.
    """
    shape = adapter.slot.shape
    tensors = {part: _read_float32(file, name) for part, name in adapter.tensors.items()}
    delta = adapter.kind.multiply(tensors).reshape(shape)
    if adapter.lengths is None:
        delta = np.float32(scale * adapter.factor) * delta
    else:
        # Keras' (h, w, in, out) to PyTorch's (out, in, h, w), and (in, out) to (out, in).
        weight = np.moveaxis(old, (-1, -2), (0, 1)).reshape(shape)
        lengths = _read_float32(file, adapter.lengths[0]).reshape(adapter.lengths[1])
        new = scale_to_lengths(weight + np.float32(adapter.factor) * delta, lengths)
        delta = np.float32(scale) * (new - weight)
    return (np.moveaxis(delta, (0, 1), (-1, -2)) if len(shape) > 1 else delta).reshape(old.shape)


def _read_float32(file, name):
    return _read_tensor(file, name).astype("float32")


def _read_tensor(file, name):
    try:
        return file.read_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{quote(name)} in {file.path} can't be read: {quote(str(error))}"
        ) from error


# --- Configs: alpha and rank, if they are not tensors --------------------------------------------


def _read_configs(path, file):
    """Returns a dict from each component to the adapter's config, {} if it has none.

    Raises:
        ValueError: peft's config file is missing, or a config is not supported.
    """
    where = f"{path}: {METADATA}"
    if path.stem == PEFT_STEM:
        where = path.with_name(PEFT_CONFIG)
        configs = dict.fromkeys(("diffusion_model", "text_encoder"), read_json(where))
    else:
        try:
            packed = json.loads(file.metadata.get(METADATA, "{}"))
            configs = {
                component: {k.removeprefix(p): v for k, v in packed.items() if k.startswith(p)}
                for p, component in KINDS["diffusers"].prefixes.items()
            }
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON object: {error}") from error
    for config in configs.values():
        for key, supported in FIXED.items():
            if (found := config.get(key, supported[0])) not in supported:
                accepted = " or ".join(map(repr, supported))
                raise ValueError(f"{where}: {key} must be {accepted}, not {found!r:.200}.")
        for key in (_name_alpha(config), "r"):
            for k, value in {key: config.get(key), **_find_patterns(config, key)}.items():
                if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e9):
                    raise ValueError(
                        f"{where}: {quote(k)} must be a positive number, not {value!r:.200}."
                    )
    return configs


def _name_alpha(config):
    """Returns the key of alpha in a config; peft's LoHa and LoKr have another one than its LoRA."""
    return "lora_alpha" if config.get("peft_type", "LORA") == "LORA" else "alpha"


def _find_patterns(config, key):
    """Returns a config's exceptions from `key`: dict from pattern of names to value."""
    found = config.get("rank_pattern" if key == "r" else "alpha_pattern") or {}
    return found if isinstance(found, dict) else {"pattern": found}


def _find_scaling(config, name):
    """Returns alpha and rank of a kernel, and whether the factor is alpha / √rank.

    Alpha and rank are None if the config does not have them.
    """
    values = []
    for key in (_name_alpha(config), "r"):
        value = config.get(key)
        for pattern, other in _find_patterns(config, key).items():
            try:
                if regex.fullmatch(rf"(.*\.)?({pattern})", name, timeout=PATTERN_SECONDS):
                    value = other
                    break
            except (regex.error, TimeoutError) as error:
                raise ValueError(
                    f"The adapter's config has a bad pattern, {pattern!r:.200}: {error}"
                ) from error
        values.append(value)
    return *values, bool(config.get("use_rslora"))
