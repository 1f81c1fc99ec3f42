"""Adapters: LoRAs and textual inversions."""

import json
import re
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from kinds_of_checkpoints import write_diffusers
from samples import (
    CONFIG,
    equal,
    expect,
    find_places,
    make_pipeline,
    make_tokenizer,
    parse_safetensors,
    read_variable,
    write_tensors,
)

from stable_diffusion import StableDiffusion
from stable_diffusion.clip_tokenizer import SimpleTokenizer

RANK, ALPHA = 2, 3.0
KERNEL = {  # of the UNet: those with a LoRA
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.attentions.0.proj_in",
}
TEXT_KERNEL = "text_model.encoder.layers.0.mlp.fc1"


@cache
def name_kernels():
    """Returns diffusers' names of the kernels: dict from a name to component, path and axes."""
    with tempfile.TemporaryDirectory() as folder:
        write_diffusers(Path(folder))
        places = find_places(Path(folder))
    return {
        name.split("/", 1)[1].removesuffix(".weight"): (component, path, axes)
        for component in ("diffusion_model", "text_encoder")
        for path, (name, axes) in places[component].items()
        if path.endswith("/kernel")
    }


def _make_lora(prefixes, dot, down, up):
    rng, tensors, kernels = np.random.default_rng(1), {}, name_kernels()
    variables = {v.path: v for c in prefixes for v in getattr(make_pipeline(), c).weights}
    for name in sorted({*KERNEL, TEXT_KERNEL}):
        component, path, axes = kernels[name]
        shape = tuple(variables[path].shape)
        shape = (shape[-1], shape[-2], *shape[:-2])  # PyTorch's (out, in, h, w)
        key = prefixes[component] + name.replace(".", dot)
        tensors[f"{key}.{down}.weight"] = rng.normal(size=(RANK, *shape[1:]))
        tensors[f"{key}.{up}.weight"] = rng.normal(size=(shape[0], RANK, *[1] * (len(shape) - 2)))
    return tensors


def write_kohya(folder):
    prefixes = {"diffusion_model": "lora_unet_", "text_encoder": "lora_te_"}
    tensors = _make_lora(prefixes, "_", "lora_down", "lora_up")
    for name in [name for name in tensors if "lora_up" in name]:
        tensors[name.replace("lora_up.weight", "alpha")] = np.array(ALPHA)
    write_tensors(folder / "lora.safetensors", tensors, {"ss_network_module": "networks.lora"})


def write_peft(folder):
    prefixes = {"diffusion_model": "unet.", "text_encoder": "text_encoder."}
    tensors = _make_lora(prefixes, ".", "lora_A", "lora_B")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    config = {f"{prefix}{key}": v for prefix in prefixes.values() for key, v in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    write_tensors(folder / "lora.safetensors", tensors, metadata)


LORA_NAME = re.compile(
    r"(?P<key>.+?)\.(?:lora_(?P<half>down|up|A|B)\.weight|(?P<alpha>alpha))", re.DOTALL
)


def check_lora(copy, sample):
    path = copy / "lora.safetensors"
    pipeline = make_pipeline()
    before = {
        variable.path: read_variable(variable)
        for component in ("diffusion_model", "text_encoder")
        for variable in getattr(pipeline, component).weights
    }
    try:
        pipeline.load_lora(path)
    except ValueError:
        _check_variables(pipeline, before, {}, "a refused LoRA")
        raise
    try:
        _check_variables(pipeline, before, _read_deltas(path), "a LoRA")
    finally:
        pipeline.unload_lora()
    _check_variables(pipeline, before, {}, "an unloaded LoRA")


def _check_variables(pipeline, before, deltas, what):
    for component in ("diffusion_model", "text_encoder"):
        for variable in getattr(pipeline, component).weights:
            value, expected = read_variable(variable), before[variable.path]
            if variable.path in deltas:
                expected = expected + deltas[variable.path]
                scale = np.abs(expected).max()
                good = np.allclose(value / scale, expected / scale, rtol=0, atol=1e-5)
            else:
                good = equal(value, expected)
            expect(good, f"{what} changed {variable.path}")


def _read_deltas(path):
    """Returns what a LoRA adds to each kernel, by the formula."""
    tensors, metadata = parse_safetensors(path)
    kernels, groups, deltas = name_kernels(), {}, {}
    names = {f"lora_unet_{n.replace('.', '_')}": n for n in kernels}
    names |= {f"lora_te_{n.replace('.', '_')}": n for n in kernels}
    names |= {f"{prefix}.{n}": n for n in kernels for prefix in ("unet", "text_encoder")}
    for name, tensor in tensors.items():
        match = LORA_NAME.fullmatch(name)
        expect(match and match["key"] in names, f"{name!r:.60} is not known, and was ignored")
        groups.setdefault(match["key"], {})[match["half"] or "alpha"] = tensor
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    for key, group in groups.items():
        down, up = (group.get(a, group.get(b)) for a, b in (("down", "A"), ("up", "B")))
        expect(down is not None and up is not None, f"{key} is incomplete")
        _, variable, _ = kernels[names[key]]
        rank, prefix = len(down), key.split(".")[0]
        alpha = config.get(f"{prefix}.lora_alpha")
        alpha = float(group["alpha"].ravel()[0]) if "alpha" in group else alpha
        stated = config.get(f"{prefix}.r")
        expect(stated in (None, rank), f"r is {stated!r}, not {rank}")
        product = up.reshape(len(up), -1).astype("f8") @ down.reshape(rank, -1).astype("f8")
        delta = product.reshape(len(up), *down.shape[1:])
        delta = delta * ((rank if alpha is None else alpha) / rank)
        target = next(
            v.shape
            for c in ("diffusion_model", "text_encoder")
            for v in getattr(make_pipeline(), c).weights
            if v.path == variable
        )
        turned = np.moveaxis(delta.reshape(*delta.shape[:2], *target[:-2]), (0, 1), (-1, -2))
        deltas[variable] = turned.reshape(target)
    return deltas


def write_embedding(folder):
    vectors = np.random.default_rng(2).normal(size=(3, CONFIG.text.width))
    write_tensors(folder / "style.safetensors", {"emb_params": vectors}, {"name": "style"})


def write_named_embedding(folder):
    vector = np.random.default_rng(3).normal(size=CONFIG.text.width)
    write_tensors(folder / "learned.safetensors", {"<dog>": vector})


def check_embedding(copy, sample):
    (path,) = copy.iterdir()
    whole = make_pipeline()
    pipeline = StableDiffusion(weights=None, config=CONFIG, jit_compile=False)
    pipeline._text_encoder = encoder = whole.text_encoder
    pipeline._tokenizer = tokenizer = SimpleTokenizer(sample.parent / "merges.txt")
    table, count = read_variable(encoder.weights[0]), len(tokenizer.vocab)
    try:
        pipeline.load_embedding(path)
    except ValueError:
        expect(pipeline._text_encoder is encoder, "a refused embedding changed the encoder")
        expect(len(tokenizer.vocab) == count, "a refused embedding changed the tokenizer")
        expect(equal(read_variable(encoder.weights[0]), table), "a refused embedding changed rows")
        raise
    tensors, _ = parse_safetensors(path)
    expect(len(tensors) == 1, f"one of {len(tensors)} tensors was taken")
    ((name, vectors),) = tensors.items()
    word = path.stem if name == "emb_params" else name
    vectors = vectors.reshape(-1, CONFIG.text.width)
    ids = list(range(count, count + len(vectors)))
    rows = read_variable(pipeline.text_encoder.weights[0])
    expect(equal(rows[ids], vectors), "the rows are not the vectors")
    expect(equal(rows[: ids[0]], table[: ids[0]]), "other rows changed")
    expect(tokenizer.encode(word)[1:-1] == ids, f"{word!r:.60} is not found")


def write_with_merges(write):
    def write_both(folder):
        write(folder)
        make_tokenizer(str(folder.parent))

    return write_both
