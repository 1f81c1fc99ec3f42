"""Checkpoints: configs, tensors of each format, and tokenizers."""

import json
import os
import re
import subprocess
import sys
from functools import cache

import h5py
import mutate
import numpy as np
from samples import (
    COMPONENT_FOLDERS,
    Wrong,
    compare_model,
    equal,
    expect,
    find_places,
    list_variables,
    load_component,
    make_pipeline,
    match_values,
    parse_safetensors,
    read_variable,
    write_checkpoint,
    write_tensors,
)

from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.config import COMPONENTS

# --- Configs -------------------------------------------------------------------------------------

FIELDS = {  # key in a file: the value in our config, and that of a file without the key
    "text_encoder/config.json": {
        "hidden_size": (lambda c: c.text.width, None),
        "num_hidden_layers": (lambda c: c.text.depth, None),
        "num_attention_heads": (lambda c: c.text.heads, None),
        "intermediate_size": (lambda c: c.text.hidden, None),
        "vocab_size": (lambda c: c.text.vocab_size, 49408),
        "hidden_act": (lambda c: c.text.activation, "quick_gelu"),
    },
    "unet/config.json": {
        "time_cond_proj_dim": (lambda c: c.unet.guidance_width, None),
        "block_out_channels": (lambda c: c.unet.widths, None),
        "cross_attention_dim": (lambda c: c.unet.context_width, 1280),
        "layers_per_block": (lambda c: c.unet.res_blocks, None),
        "in_channels": (lambda c: c.unet.in_channels, 4),
        "out_channels": (lambda c: c.unet.out_channels, 4),
        "use_linear_projection": (lambda c: c.unet.linear_projection, False),
        "norm_num_groups": (lambda c: c.unet.groups, 32),
        "attention_head_dim": (lambda c: c.unet.heads, 8),
        "down_block_types": (
            lambda c: [f"{'CrossAttn' * a}DownBlock2D" for a in c.unet.attention],
            None,
        ),
        "sample_size": (lambda c: c.size // c.unet.cell_size, 64),
    },
    "vae/config.json": {
        "block_out_channels": (lambda c: c.vae.widths, None),
        "layers_per_block": (lambda c: c.vae.res_blocks, None),
        "latent_channels": (lambda c: c.vae.latent_channels, 4),
        "norm_num_groups": (lambda c: c.vae.groups, 32),
        "scaling_factor": (lambda c: c.vae.scaling_factor, 0.18215),
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": (lambda c: c.schedule.train_timesteps, 1000),
        "beta_start": (lambda c: c.schedule.beta_start, 0.0001),
        "beta_end": (lambda c: c.schedule.beta_end, 0.02),
        "beta_schedule": (lambda c: c.schedule.beta_schedule, "linear"),
        "prediction_type": (lambda c: c.schedule.prediction_type, "epsilon"),
        "timestep_spacing": (lambda c: c.schedule.spacing, "leading"),
        "rescale_betas_zero_snr": (lambda c: c.schedule.zero_snr, False),
        "set_alpha_to_one": (lambda c: c.schedule.final_alpha == 1.0, True),
    },
    "model_index.json": {"_guidance_scale": (lambda c: c.guidance_scale, 7.5)},
}
FREE = {  # keys that say nothing about the model, or that others imply
    "text_encoder/config.json": "architectures model_type bos_token_id eos_token_id pad_token_id",
    "unet/config.json": "_class_name up_block_types",
    "vae/config.json": "_class_name sample_size down_block_types up_block_types",
    "scheduler/scheduler_config.json": "_class_name clip_sample steps_offset",
}


def check_config(config, files, intact):
    """Compares a config with the JSON files that it came from."""
    for name, fields in FIELDS.items():
        data, before = files.get(name), intact.get(name, {})
        if data is None:
            continue
        for key, (read, default) in fields.items():
            expected = data.get(key, default)
            if key in ("sample_size", "_guidance_scale") and expected is None:
                expected = default
            found = read(config)
            expect(_same(expected, found), f"{name}: {key} is {expected!r:.40}, loaded {found!r}")
        known = [*fields, *FREE.get(name, "").split()]
        for key in before.keys() & data.keys() - set(known) if name != "model_index.json" else ():
            if key.startswith("_"):
                continue  # diffusers' own notes, such as its version
            expect(_same(data[key], before[key]), f"{name}: {key} {data[key]!r:.40} is ignored")
    alphas = np.asarray(config.schedule.alphas_cumprod)
    good = np.isfinite(alphas).all() and (np.diff(alphas) <= 0).all()
    expect(good and 0 <= alphas[-1] and alphas[0] <= 1, "alphas_cumprod out of order")
    expect(0 < config.vae.scaling_factor < np.inf, "scaling_factor")


def _same(stored, loaded):
    """Returns whether a value of JSON is the one that was loaded; a list may repeat a number."""
    if isinstance(loaded, tuple | list):
        stored = stored if isinstance(stored, list) else [stored] * len(loaded)
        return len(stored) == len(loaded) and all(map(_same, stored, loaded))
    if isinstance(stored, list):
        return bool(stored) and all(_same(value, loaded) for value in stored)
    if isinstance(loaded, int | float) and isinstance(stored, int | float):
        return stored == loaded
    return type(stored) is type(loaded) and stored == loaded


def read_jsons(folder):
    return {name: json.loads((folder / name).read_bytes()) for name in FIELDS if _is(folder / name)}


def _is(path):
    return path.is_file()


# --- Checkpoints ---------------------------------------------------------------------------------


def write_single(folder):
    write_checkpoint(folder, "model.safetensors", "original")


def write_foreign(folder):
    """A file as other programs write it, without our metadata."""
    write_single(folder)
    path = folder / "model.safetensors"
    header, tensors = mutate.split_safetensors(path.read_bytes())
    header["__metadata__"] = {"format": "pt"}
    path.write_bytes(mutate.join_safetensors(header, tensors))


@cache
def read_intact_config(path):
    return open_checkpoint(path).config


def check_single(copy, sample):
    path = copy / "model.safetensors"
    reader = open_checkpoint(path)
    tensors, metadata = parse_safetensors(path)
    for component, places in find_places(sample).items():
        model = load_component(reader, component)
        compare_model(component, model, tensors, places)
    key = "stable_diffusion.config"
    if key not in metadata:
        _write_without_metadata(sample)
        intact = read_intact_config(sample.with_name("foreign.safetensors"))
        expect(reader.config == intact, f"detected {reader.config}")
        return
    intact = json.loads(parse_safetensors(sample / "model.safetensors")[1][key])
    check_config(reader.config, json.loads(metadata[key]), intact)


def _write_without_metadata(sample):
    path = sample.with_name("foreign.safetensors")
    if not path.exists():
        header, tensors = mutate.split_safetensors((sample / "model.safetensors").read_bytes())
        header["__metadata__"] = {"format": "pt"}
        path.write_bytes(mutate.join_safetensors(header, tensors))


def write_diffusers(folder):
    write_checkpoint(folder, "model", "diffusers")


def write_shards(folder):
    """A folder whose UNet is in two files with an index."""
    write_diffusers(folder)
    path = folder / "model/unet/diffusion_pytorch_model.safetensors"
    tensors, _ = parse_safetensors(path)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, some in shards.items():
        write_tensors(path.with_name(shard), {name: tensors[name] for name in some})
    listed = {name: shard for shard, some in shards.items() for name in some}
    index = {"metadata": {"total_size": path.stat().st_size}, "weight_map": listed}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()


def check_diffusers(copy, sample):
    folder = copy / "model"
    reader = open_checkpoint(folder)
    places = find_places(sample)
    for component in COMPONENTS:
        model = load_component(reader, component)
        tensors = {}
        for file in (folder / COMPONENT_FOLDERS[component]).glob("*.safetensors"):
            found = parse_safetensors(file)[0]
            expect(not found.keys() & tensors.keys(), "a tensor is in two shards")
            tensors |= {f"{file.parent.name}/{name}": tensor for name, tensor in found.items()}
        compare_model(component, model, tensors, places[component])
    check_config(reader.config, read_jsons(folder), read_jsons(sample / "model"))


# --- HDF5 ----------------------------------------------------------------------------------------


def read_legacy(path):
    """Returns the tensors of a legacy file in the order that it states."""
    tensors = []
    with h5py.File(path) as file:
        for layer in file.attrs["layer_names"]:
            group = file[layer]
            tensors += [group[name][()] for name in group.attrs["weight_names"]]
    return tensors


def check_kerascv(copy, sample):
    for _, model, path in _load_changed(copy, sample):
        stored = read_legacy(path)
        expect(len(stored) == len(model.weights), f"{len(stored)} tensors were accepted")
        for variable, value in zip(model.weights, stored, strict=True):
            value = np.asarray(value).astype("float32")
            expect(equal(read_variable(variable), value), f"{variable.path} is another tensor")


def check_keras(copy, sample):
    for component, model, path in _load_changed(copy, sample):
        variables = list_variables(model)
        with h5py.File(path) as file:
            for variable_path, name in find_datasets(sample, component).items():
                variable = variables[variable_path]
                expect(name in file, f"loaded without {name}")
                value = np.asarray(file[name][()]).astype("float32")
                expect(equal(read_variable(variable), value), f"{variable_path} is not {name}")


def _load_changed(copy, sample):
    """Yields each changed component, its model with the parameters of its file, and the file."""
    reader = open_checkpoint(copy / "model")
    for component in _list_changed(reader, sample):
        model = load_component(reader, component)
        path = reader.folder / reader.names[component]
        _check_links(path)
        yield component, model, path


def _list_changed(reader, sample):
    """Returns the components whose files differ from the sample's: Keras needs long for each."""
    pairs = {c: (reader.folder / file, sample / "model" / file) for c, file in reader.names.items()}
    return [
        component
        for component, (path, intact) in pairs.items()
        if not path.is_file() or path.is_symlink() or path.read_bytes() != intact.read_bytes()
    ]


@cache
def find_datasets(sample, component):
    tensors = {}
    with h5py.File(sample / "model" / f"{component}.weights.h5") as file:
        file.visititems(
            lambda name, item: tensors.update({name: item[()]} if hasattr(item, "dtype") else {})
        )
    tensors = {name: np.asarray(value, "float32") for name, value in tensors.items() if value.shape}
    places = match_values(getattr(make_pipeline(), component), tensors)
    return {path: name for path, (name, _) in places.items()}


def _check_links(path):
    """Nothing outside of the file may have been read."""
    with h5py.File(path) as file:

        def visit(group):
            for name in group:
                link = group.get(name, getlink=True)
                expect(not isinstance(link, h5py.ExternalLink), f"external link {name}")
                item = group.get(name) if isinstance(link, h5py.HardLink) else None
                if isinstance(item, h5py.Dataset):
                    expect(not item.external and not item.is_virtual, f"external {name}")
                elif isinstance(item, h5py.Group):
                    visit(item)

        visit(file)


# --- OpenVINO ------------------------------------------------------------------------------------


def write_openvino(folder):
    """Writes the sample in another process, because Keras' backend must be OpenVINO."""
    code = (
        "import pathlib, samples, sys; samples.write_checkpoint(pathlib.Path(sys.argv[1]), 'model',"
    )
    code = f"{code} 'openvino')"
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"KERAS_BACKEND": "openvino"},
        check=True,
        capture_output=True,
    )


def run_openvino(folder):
    """Returns what the text encoder and the decoder compute."""
    reader = open_checkpoint(folder)
    inputs = np.full((1, 77), 42, "int32"), np.arange(77, dtype="int32")[None]
    reader.build("diffusion_model", None)
    text = reader.build("text_encoder", None).predict_on_batch(list(inputs))
    return text, reader.build("decoder", None).predict_on_batch(np.ones((1, 32, 32, 4), "float32"))


@cache
def run_sample(folder):
    return run_openvino(folder)


def check_openvino(copy, sample):
    """Each file of parameters is as it is stored; the graph is read by OpenVINO only."""
    found, intact = run_openvino(copy / "model"), run_sample(sample / "model")
    for a, b in zip(found, intact, strict=True):
        expect(a.shape == b.shape, f"the result has the shape {a.shape}")
    changed = [
        path.suffix
        for path in (copy / "model").iterdir()
        if path.is_file() and path.read_bytes() != (sample / "model" / path.name).read_bytes()
    ]
    expect(changed or all(map(equal, found, intact)), "another result without another file")


# --- Tokenizers ----------------------------------------------------------------------------------

WORDS = "a photo of the cat and their other thing in on inner thin orange station"


def write_fast(folder):
    """A folder whose tokenizer is one file, as transformers 5 writes it."""
    write_diffusers(folder)
    tokenizer = folder / "model/tokenizer"
    lines = (tokenizer / "merges.txt").read_text("utf-8").splitlines()[1:]
    vocab = json.loads((tokenizer / "vocab.json").read_bytes())
    added = {**json.loads((tokenizer / "added_tokens.json").read_bytes())}
    data = {
        "added_tokens": [{"id": n, "content": token} for token, n in added.items()],
        "model": {"vocab": vocab, "merges": [line.split(" ") for line in lines]},
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    for name in ("merges.txt", "vocab.json", "added_tokens.json"):
        (tokenizer / name).unlink()


def check_tokenizer(copy, sample):
    folder = copy / "model"
    reader = open_checkpoint(folder)
    tokenizer = reader.tokenizer()
    folder /= "tokenizer"
    lines, vocab, added, files = None, None, {}, {}
    for path in folder.iterdir():
        if path.suffix == ".json" and path.is_file():
            files[path.name] = json.loads(path.read_bytes())
        elif path.is_file():
            text = path.read_bytes().decode("utf-8")
            lines = [line.split() for line in re.split("\r\n|\r|\n", text)[1:] if line.strip()]
    if "tokenizer.json" in files:
        data = files["tokenizer.json"]
        vocab, lines = data["model"]["vocab"], data["model"]["merges"]
        lines = [pair.split(" ") if isinstance(pair, str) else pair for pair in lines]
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
    else:
        vocab, added = (files.get(f"{name}.json", {}) for name in ("vocab", "added_tokens"))
    pads = [
        files[name]["pad_token"]
        for name in ("special_tokens_map.json", "tokenizer_config.json")
        if files.get(name, {}).get("pad_token")
    ]
    pads = [pad["content"] if isinstance(pad, dict) else pad for pad in pads]
    expected = [{"<|endoftext|>": None, "!": 0}[pad] for pad in pads] or [None]
    expect(reader.config.text.pad_token in expected, f"pad_token {reader.config.text.pad_token}")
    for token, n in {**(vocab or {}), **added}.items():
        expect(tokenizer.encoder.get(token) == n, f"{token!r:.40} is {n}")
    if lines is None:  # CLIP's own, whose text encoder has more tokens
        raise Wrong("a tokenizer without merges was accepted")
    expect(len(tokenizer.vocab) <= reader.config.text.vocab_size, "more tokens than embeddings")
    known = vocab or tokenizer.encoder
    for word in WORDS.split():
        ids = [known[piece] for piece in merge_word(word, lines)]
        found = tokenizer.encode(word)[1:-1]
        expect(found == ids, f"{word} is {found}, not {ids}")


def merge_word(word, pairs):
    """Byte-pair encoding of a word of letters, as in the paper."""
    ranks = {tuple(pair): n for n, pair in enumerate(pairs)}
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while True:
        known = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]
        if not known:
            return pieces
        first = min(known, key=ranks.get)
        n, joined = 0, []
        while n < len(pieces):
            if tuple(pieces[n : n + 2]) == first:
                joined.append("".join(first))
                n += 2
            else:
                joined.append(pieces[n])
                n += 1
        pieces = joined
