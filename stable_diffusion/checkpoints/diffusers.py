"""Checkpoints in diffusers' layout, the one most published Stable Diffusions come in.

A folder has a subfolder for each part, with the part's config as JSON and its parameters as
safetensors:

    model_index.json                            which subfolder is what
    text_encoder/config.json                    `TextConfig`
    text_encoder/model.safetensors              part "text_encoder"
    unet/config.json                            `UNetConfig`
    unet/diffusion_pytorch_model.safetensors    part "diffusion_model"
    vae/config.json                             `VAEConfig`
    vae/diffusion_pytorch_model.safetensors     parts "decoder" and "image_encoder"
    scheduler/scheduler_config.json             `NoiseScheduler`
    tokenizer/{vocab.json,merges.txt,...}       `SimpleTokenizer`

The tables below say everything that is different in the names of parameters and configs. Three
fields have no word in diffusers, where they are constants (those of the original dialect, see
`checkpoints.config`): `norm_epsilon` of UNet and VAE, and `approximate_gelu`. Where a model departs
from them they are written under their own names, and `DiffusersFolder` reads them back. diffusers
ignores them with a warning: there such a model has the same parameters, but not the same dialect.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy and safetensors what bfloat16 is
import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stable_diffusion.checkpoints.building import PARTS, Reader
from stable_diffusion.checkpoints.config import Config, TextConfig, UNetConfig, VAEConfig
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.noise_scheduler import NoiseScheduler

FOLDERS = {
    "text_encoder": "text_encoder",
    "diffusion_model": "unet",
    "decoder": "vae",
    "image_encoder": "vae",
}
FILES = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}

# --- Names of parameters: ours, then diffusers'. -------------------------------------------------
#
# A path such as "down_0_attn_1/attn1/to_q/kernel" is translated component by component: the first
# by NAMES of its part, the last by LEAVES, those between by WITHIN (not in residual blocks, which
# are the same within).

NAMES = {
    "text_encoder": {
        "clip_embedding": "text_model.embeddings",
        "layer_{i}": "text_model.encoder.layers.{i}",
        "final_layer_norm": "text_model.final_layer_norm",
    },
    "diffusion_model": {
        "time_embedding_{i}": "time_embedding.linear_{i}",
        "conv_in": "conv_in",
        "down_{i}_res_{j}": "down_blocks.{i}.resnets.{j}",
        "down_{i}_attn_{j}": "down_blocks.{i}.attentions.{j}",
        "down_{i}_downsample": "down_blocks.{i}.downsamplers.0.conv",
        "mid_res_{j}": "mid_block.resnets.{j}",
        "mid_attn_{j}": "mid_block.attentions.{j}",
        "up_{i}_res_{j}": "up_blocks.{i}.resnets.{j}",
        "up_{i}_attn_{j}": "up_blocks.{i}.attentions.{j}",
        "up_{i}_upsample": "up_blocks.{i}.upsamplers.0",
        "conv_norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    "decoder": {
        "post_quant_conv": "post_quant_conv",
        "conv_in": "decoder.conv_in",
        "mid_res_{j}": "decoder.mid_block.resnets.{j}",
        "mid_attn": "decoder.mid_block.attentions.0",
        "up_{i}_res_{j}": "decoder.up_blocks.{i}.resnets.{j}",
        "up_{i}_upsample": "decoder.up_blocks.{i}.upsamplers.0.conv",
        "conv_norm_out": "decoder.conv_norm_out",
        "conv_out": "decoder.conv_out",
    },
    "image_encoder": {
        "conv_in": "encoder.conv_in",
        "down_{i}_res_{j}": "encoder.down_blocks.{i}.resnets.{j}",
        "down_{i}_downsample": "encoder.down_blocks.{i}.downsamplers.0.conv",
        "mid_res_{j}": "encoder.mid_block.resnets.{j}",
        "mid_attn": "encoder.mid_block.attentions.0",
        "conv_norm_out": "encoder.conv_norm_out",
        "conv_out": "encoder.conv_out",
        "quant_conv": "quant_conv",
    },
}
_VAE = {"norm": "group_norm", "attn": None, "to_out": "to_out.0"}  # None: no such component there
WITHIN = {
    "text_encoder": {
        "to_q": "q_proj",
        "to_k": "k_proj",
        "to_v": "v_proj",
        "to_out": "out_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    "diffusion_model": {
        "norm1": "transformer_blocks.0.norm1",
        "attn1": "transformer_blocks.0.attn1",
        "norm2": "transformer_blocks.0.norm2",
        "attn2": "transformer_blocks.0.attn2",
        "norm3": "transformer_blocks.0.norm3",
        "geglu": "transformer_blocks.0.ff.net.0",
        "ff_out": "transformer_blocks.0.ff.net.2",
        "to_out": "to_out.0",
    },
    "decoder": _VAE,
    "image_encoder": _VAE,
}
LEAVES = {
    "kernel": "weight",  # Dense (in, out) is Linear (out, in); (h, w, in, out) is (out, in, h, w)
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "embeddings": "weight",
}
# The VAE's attention is four matrices there, and four 1x1 convolutions here and in older files,
# which name them as the right column has it.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# What a file may have beside the part's parameters.
HARMLESS = {
    "text_encoder": r"(text_model\.)?embeddings\.position_ids|logit_scale",
    "diffusion_model": r"(?!)",
    "decoder": r"(encoder|quant_conv)\..*",
    "image_encoder": r"(decoder|post_quant_conv)\..*",
}

# --- Configs: diffusers' key, then our field. ----------------------------------------------------

TEXT = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "vocab_size": "vocab_size",
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
PAD_TOKENS = {"<|endoftext|>": None, "!": 0}
UNET = {
    "block_out_channels": "widths",
    "cross_attention_dim": "context_width",
    "layers_per_block": "res_blocks",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "use_linear_projection": "linear_projection",
    "norm_num_groups": "groups",
}
UNET_BLOCKS = {  # whether a level has attention: its blocks on the way down and up
    True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    False: ("DownBlock2D", "UpBlock2D"),
}
VAE = {
    "block_out_channels": "widths",
    "layers_per_block": "res_blocks",
    "latent_channels": "latent_channels",
    "norm_num_groups": "groups",
    "scaling_factor": "scaling_factor",
}
SCHEDULE = {
    "num_train_timesteps": "train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "beta_schedule",
    "prediction_type": "prediction_type",
    "timestep_spacing": "spacing",
    "steps_offset": "steps_offset",
}
SCHEDULE_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}
# Where a file leaves a key out; a key without a default has to be there.
DEFAULTS = {
    "vocab_size": 49408,
    "cross_attention_dim": 1280,
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,  # as diffusers' pipeline sets it
}
# What our fields cannot say, and so has to be as it is in Stable Diffusion where a file tells it.
FIXED = {
    "text_encoder": {"max_position_embeddings": 77, "layer_norm_eps": 1e-5},
    "unet": {
        "act_fn": "silu",
        "addition_embed_type": None,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
    },
    "vae": {
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "scheduler": {
        "rescale_betas_zero_snr": False,
        "thresholding": False,
        "trained_betas": None,
    },
}


class DiffusersFolder(Reader):
    """Reads a folder in diffusers' layout: config, parameters and vocabulary.

    Whatever scheduler the folder names, its noise schedule is read and DDIM is run on it, as by
    `DDIMScheduler.from_config`.

    Args:
        folder: path of a folder, on this computer. It needs only the parts that are asked for.

    Attributes:
        config: the `Config`; where a part's folder is missing, Stable Diffusion 1's of the part.

    Raises:
        ValueError: a config file that can't be read, or says what isn't supported here.
    """

    loads = True

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        super().__init__(_read_config(self.folder))

    def build(self, part, make):
        """See `Reader.build`.

        Raises:
            ValueError: the folder hasn't the part, or not all of it; the message lists what is
                missing, unused or misshapen.
        """
        folder = self.folder / FOLDERS[part]
        if not (folder / "config.json").is_file():
            raise ValueError(f"The {part} can't be loaded: there is no {folder / 'config.json'}.")
        return super().build(part, make)

    def load(self, part, model):
        """Loads a part's parameters, in the dtype of the model's: all of them, or none.

        Args:
            part: key of `PARTS`.
            model: the model, built from the config.

        Raises:
            ValueError: as `build`.
        """
        folder = self.folder / FOLDERS[part]
        path, shards = _find_tensors(folder, FILES[folder.name])
        with ExitStack() as stack:
            where = {}  # tensor name to open file
            for shard in shards:
                try:
                    file = stack.enter_context(safe_open(shard, framework="numpy"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{shard} is no intact safetensors file: {error}") from error
                where |= dict.fromkeys(file.keys(), file)
            names = {_older(name, where): v for name, v in _variables(part, model).items()}
            unused = sorted(k for k in where.keys() - names.keys() if not _harmless(part, k))
            shapes = {k: tuple(where[k].get_slice(k).get_shape()) for k in names.keys() & where}
            problems = {
                "missing": sorted(names.keys() - where.keys()),
                "unused": unused,
                "misshapen": [
                    f"{name} {shape}, not {_stored_shape(names[name])}"
                    for name, shape in sorted(shapes.items())
                    if _no_ones(shape) != _no_ones(_stored_shape(names[name]))
                ],
            }
            if any(problems.values()):
                raise ValueError(f"{path} doesn't fit the {part}: {_summary(problems)}")
            for name, variable in names.items():
                try:
                    variable.assign(_from_stored(where[name].get_tensor(name), variable))
                except SafetensorError as error:
                    raise ValueError(f"{name} in {path} can't be read: {error}") from error

    def tokenizer(self):
        """Returns the folder's tokenizer; CLIP's where it has none.

        Raises:
            ValueError: files that disagree, or more tokens than the text encoder embeds.
        """
        folder = self.folder / "tokenizer"
        merges = folder / "merges.txt"
        tokenizer = SimpleTokenizer(merges) if merges.is_file() else SimpleTokenizer()
        if (folder / "vocab.json").is_file():
            vocab = _read_json(folder / "vocab.json")
            if strange := sorted(set(tokenizer.encoder.items()) ^ set(vocab.items())):
                raise ValueError(
                    f"{folder / 'vocab.json'} doesn't follow from {merges}: {len(strange)} tokens "
                    f"have other ids, among them {strange[0][0]!r}."
                )
        if (folder / "added_tokens.json").is_file():
            added = _read_json(folder / "added_tokens.json")
            tokenizer.add_tokens(sorted(added, key=added.get))
            if wrong := [token for token, n in added.items() if tokenizer.encoder[token] != n]:
                raise ValueError(
                    f"{folder / 'added_tokens.json'} gives {wrong[0]!r} the id {added[wrong[0]]}, "
                    f"where {tokenizer.encoder[wrong[0]]} is next."
                )
        if len(tokenizer.vocab) > self.config.text.vocab_size:
            raise ValueError(
                f"The tokenizer of {self.folder} has {len(tokenizer.vocab)} tokens, its text "
                f"encoder an embedding for {self.config.text.vocab_size}."
            )
        return tokenizer


def save_diffusers(
    folder: str | Path,
    config: Config,
    models: dict,
    tokenizer: SimpleTokenizer | None = None,
    dtype: str = "float16",
):
    """Writes a checkpoint that `DiffusersFolder` and diffusers' `StableDiffusionPipeline` load.

    Everything goes to a new folder beside `folder`, which takes its place at the very end. Of a
    checkpoint that was there before, files that lie beside model_index.json are kept (a README, a
    licence), subfolders are not.

    Args:
        folder: path, of a folder that doesn't exist, is empty, or is a checkpoint to replace.
        config: the `Config` the models were built from. `NoiseScheduler.clip_sample` isn't
            written: DDIM clips nothing here, and False is what tells diffusers so.
        models: dict from part (key of `PARTS`) to model. The decoder and the image encoder are one
            file, so there must be both or none.
        tokenizer: None for CLIP's.
        dtype: "float16", "bfloat16" or "float32".

    Raises:
        ValueError: an unknown part or dtype, half a VAE, a folder of something else, a padding
            token that diffusers' files can't tell, or parameters that `dtype` can't hold.
    """
    folder = Path(folder).absolute()
    if dtype not in (known := ("float16", "bfloat16", "float32")):
        raise ValueError(f"dtype must be one of {', '.join(known)}, not {dtype!r}.")
    if unknown := models.keys() - PARTS.keys():
        raise ValueError(f"Parts are {', '.join(PARTS)}, not {', '.join(sorted(unknown))}.")
    if ("decoder" in models) != ("image_encoder" in models):
        raise ValueError("The VAE is one file: pass decoder and image_encoder, or neither.")
    if folder.exists() and not (
        folder.is_dir() and ((folder / "model_index.json").is_file() or not any(folder.iterdir()))
    ):
        raise ValueError(f"{folder} is no diffusers folder; it isn't replaced.")
    tokenizer = tokenizer or SimpleTokenizer()
    written = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        for name, data in _configs(config, models, tokenizer).items():
            _write_json(written / name, data)
        _write_merges(written / "tokenizer" / "merges.txt", tokenizer)
        for subfolder in dict.fromkeys(FOLDERS[part] for part in models):
            tensors = {}
            for part, model in models.items():
                if FOLDERS[part] == subfolder:
                    variables = _variables(part, model).items()
                    tensors |= {name: _to_stored(v, dtype) for name, v in variables}
            path = written / subfolder / f"{FILES[subfolder]}.safetensors"
            save_file(tensors, path, metadata={"format": "pt"})
            shutil.copymode(written / "model_index.json", path)  # not for the owner alone
        if folder.exists():
            for old in folder.iterdir():
                if old.is_file() and not (written / old.name).exists():
                    shutil.copy2(old, written)
            folder.rename(replaced)
        try:
            written.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)


# --- Parameters ----------------------------------------------------------------------------------


def _variables(part, model):
    """Returns the variables of a model by diffusers' names."""
    prefix = f"{model.name}/"  # a keras.Sequential puts its own name before those of its layers
    if not all(variable.path.startswith(prefix) for variable in model.weights):
        prefix = ""
    return {_name(part, v.path.removeprefix(prefix)): v for v in model.weights}


def _name(part, path):
    """Translates a variable's path to diffusers' name."""
    first, *within, leaf = path.split("/")
    for ours, theirs in NAMES[part].items():
        pattern = re.escape(ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        if (match := re.fullmatch(pattern, first)) and leaf in LEAVES:
            table = {} if "_res_" in first else WITHIN[part]
            within = filter(None, (table.get(name, name) for name in within))
            return ".".join([theirs.format(**match.groupdict()), *within, LEAVES[leaf]])
    raise ValueError(f"diffusers' layout has no place for the {part}'s variable {path}.")


def _older(name, stored):
    """Returns what `name` is called among the `stored` ones, if that is another known name."""
    if name not in stored:
        if (short := name.removeprefix("text_model.")) in stored:
            return short  # as the newest transformers name the text encoder's
        for new, old in OLD_NAMES.items():
            if f".{new}." in name and (older := name.replace(f".{new}.", f".{old}.")) in stored:
                return older
    return name


def _harmless(part, name):
    return re.fullmatch(HARMLESS[part], name) is not None


def _stored_shape(variable):
    """Returns the shape a variable has there: kernels have the output first."""
    shape = tuple(variable.shape)
    if variable.path.endswith("/kernel"):
        shape = (shape[-1], shape[-2], *shape[:-2])
    return _without_cells(shape, variable)


def _without_cells(shape, variable):
    """Takes the 1x1 off the kernels of the VAE's attention, which are matrices there."""
    return shape[:2] if re.search(r"mid_attn/.*to_\w+/kernel$", variable.path) else shape


def _no_ones(shape):
    """Takes the 1x1 off a kernel: as convolution or matrix, it is the same projection."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _from_stored(tensor, variable):
    if variable.path.endswith("/kernel"):
        tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    return tensor.astype("float32").reshape(variable.shape)


def _to_stored(variable, dtype):
    value = ops.convert_to_numpy(ops.cast(variable, "float32"))
    if variable.path.endswith("/kernel"):
        value = value.transpose(-1, -2, *range(value.ndim - 2))
    value = value.reshape(_stored_shape(variable))
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(value.astype(dtype))
    if not np.isfinite(stored.astype("float32")).all():
        raise ValueError(f"{variable.path} has values that are not finite in {dtype}.")
    return stored


def _find_tensors(folder, stem):
    """Returns the file that a user knows of, and the safetensors files that it consists of."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return folder / name, [folder / name]
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
        if (path := folder / name).is_file():
            shards = sorted(set(_read_json(path).get("weight_map", {}).values()))
            if bad := [s for s in shards if Path(s).name != s or not s.endswith(".safetensors")]:
                raise ValueError(f"{path} names {bad[0]!r}, which is no file beside it.")
            if missing := [s for s in shards if not (folder / s).is_file()]:
                raise ValueError(f"{path} names {missing[0]!r}, which is missing.")
            return path, [folder / shard for shard in shards]
    raise ValueError(f"There is no {stem}.safetensors in {folder}, nor an fp16 or sharded one.")


def _summary(problems, most=10):
    parts = []
    for kind, names in problems.items():
        if names:
            more = ", ..." if len(names) > most else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:most])}{more})")
    return "; ".join(parts) + "."


# --- Configs, reading ----------------------------------------------------------------------------


def _read_json(path):
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must be a JSON object, not {type(data).__name__}.")
    return data


def _unsupported(path, key, value, supported):
    return ValueError(f"{path}: {key} must be {supported}, not {value!r}.")


def _choose(path, key, value, choices):
    """Looks a value up in the dict of those that are supported."""
    if not isinstance(value, str) or value not in choices:
        raise _unsupported(path, key, value, "one of " + ", ".join(map(repr, choices)))
    return choices[value]


def _fields(path, data, table, like):
    """Reads the fields of the dataclass `like`, of the types that its defaults have."""
    fields = {}
    for key, field in table.items():
        kind = type(getattr(like, field))
        value = data.get(key, DEFAULTS.get(key))
        if kind is tuple:
            good = (
                isinstance(value, list) and value and all(type(n) is int and n > 0 for n in value)
            )
            good, supported = good, "a list of positive ints"
        elif kind is float:
            good, supported = type(value) in (int, float), "a number"
        else:
            good, supported = type(value) is kind, f"of type {kind.__name__}"
            if kind is int and key != "steps_offset":
                good, supported = good and value > 0, "a positive int"
        if not good:
            raise _unsupported(path, key, value, supported)
        fields[field] = tuple(value) if kind is tuple else kind(value)
    return fields


def _own_fields(data, *names):
    """Reads what diffusers has no word for; the original dialect where nothing is said."""
    original = {"norm_epsilon": 1e-6, "approximate_gelu": False}
    return {name: data.get(name, original[name]) for name in names}


def _read_config(folder):
    paths = {name: folder / name / "config.json" for name in ("text_encoder", "unet", "vae")}
    paths["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    data = {name: _read_json(path) for name, path in paths.items() if path.is_file()}
    if not data:
        raise ValueError(f"{folder} has none of {', '.join(f'{n}/config.json' for n in FILES)}.")
    for name, fixed in FIXED.items():
        for key, value in fixed.items():
            if (found := data.get(name, {}).get(key, value)) != value:
                raise _unsupported(paths[name], key, found, repr(value))
    text, unet, vae = TextConfig(), UNetConfig(norm_epsilon=1e-6), VAEConfig(norm_epsilon=1e-6)
    if "text_encoder" in data:
        text = _read_text(paths["text_encoder"], data["text_encoder"], folder)
    if "vae" in data:
        vae = _read_vae(paths["vae"], data["vae"])
    scale, size = 2 ** (len(vae.widths) - 1), 64
    if "unet" in data:
        unet, size = _read_unet(paths["unet"], data["unet"], scale)
    schedule = _read_schedule(paths["scheduler"], data.get("scheduler"))
    return Config(text, unet, vae, schedule, size * scale)


def _read_text(path, data, folder):
    fields = _fields(path, data, TEXT, TextConfig)
    if fields["width"] % fields["heads"]:
        raise _unsupported(path, "num_attention_heads", fields["heads"], "a divisor of hidden_size")
    activations = ACTIVATIONS | {"gelu_new": "gelu_tanh"}
    activation = _choose(path, "hidden_act", data.get("hidden_act", "quick_gelu"), activations)
    pad_token = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file := folder / "tokenizer" / name).is_file():
            pad = _read_json(file).get("pad_token") or "<|endoftext|>"
            pad = pad.get("content") if isinstance(pad, dict) else pad
            pad_token = _choose(file, "pad_token", pad, PAD_TOKENS)
    return TextConfig(**fields, activation=activation, pad_token=pad_token)


def _read_unet(path, data, latent_scale):
    """Returns the `UNetConfig` and the side in latent cells it was trained at."""
    fields = _fields(path, data, UNET, UNetConfig)
    widths = fields["widths"]
    # In this class "attention_head_dim" has always been the number of heads, not their width.
    heads = data.get("attention_head_dim", 8)
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    good = isinstance(heads, list) and len(heads) == len(widths)
    if not good or any(type(n) is not int or n < 1 or w % n for n, w in zip(heads, widths)):  # noqa: B905
        supported = f"an int or {len(widths)} of them, divisors of block_out_channels"
        raise _unsupported(path, "attention_head_dim", heads, supported)
    kinds = [down for down, _ in UNET_BLOCKS.values()]
    default = [kinds[0]] * (len(widths) - 1) + [kinds[1]]
    down = data.get("down_block_types", default)
    if len(down) != len(widths) or not set(down) <= set(kinds):
        supported = f"{len(widths)} of {', '.join(map(repr, kinds))}"
        raise _unsupported(path, "down_block_types", down, supported)
    attention = tuple(name == kinds[0] for name in down)
    up = [UNET_BLOCKS[level][1] for level in reversed(attention)]
    if (found := data.get("up_block_types", up)) != up:
        raise _unsupported(path, "up_block_types", found, f"{up}, as on the way down")
    size = data.get("sample_size") or 64
    if type(size) is not int or size < 1:
        raise _unsupported(path, "sample_size", size, "an int")
    config = UNetConfig(
        **fields,
        heads=tuple(heads),
        attention=attention,
        **_own_fields(data, "norm_epsilon", "approximate_gelu"),
        latent_scale=latent_scale,
    )
    return config, size


def _read_vae(path, data):
    fields = _fields(path, data, VAE, VAEConfig)
    for key, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        types = [kind] * len(fields["widths"])
        if (found := data.get(f"{key}_block_types", types)) != types:
            raise _unsupported(path, f"{key}_block_types", found, types)
    return VAEConfig(**fields, **_own_fields(data, "norm_epsilon"))


def _read_schedule(path, data):
    if data is None:  # Stable Diffusion's
        data = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        data["set_alpha_to_one"] = False
    for key, choices in SCHEDULE_CHOICES.items():
        _choose(path, key, data.get(key, DEFAULTS[key]), dict.fromkeys(choices))
    to_one = data.get("set_alpha_to_one", data.get("_class_name") != "PNDMScheduler")
    if not isinstance(to_one, bool):
        raise _unsupported(path, "set_alpha_to_one", to_one, "true or false")
    fields = _fields(path, data, SCHEDULE, NoiseScheduler)
    return NoiseScheduler(**fields, final_alpha=1.0 if to_one else None, clip_sample=False)


# --- Configs, writing ----------------------------------------------------------------------------


def _configs(config, models, tokenizer):
    """Returns every JSON file of a checkpoint, by its path in the folder."""
    text, unet, vae, schedule = config.text, config.unet, config.vae, config.schedule
    start, end = (tokenizer.vocab[n] for n in (tokenizer.start_of_text, tokenizer.end_of_text))
    pad_id = None if text.pad_token == tokenizer.end_of_text else text.pad_token
    pads = {n: token for token, n in PAD_TOKENS.items()}
    if pad_id not in pads:
        raise ValueError(f"pad_token must be one of {', '.join(map(str, pads))}, not {pad_id}.")
    if schedule.final_alpha not in (None, 1.0):
        raise ValueError(f"final_alpha must be None or 1.0, not {schedule.final_alpha}.")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pads[pad_id]}
    present = dict.fromkeys(FOLDERS[part] for part in models)
    files = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "tokenizer/vocab.json": {
            t: n for n, t in enumerate(tokenizer.vocab[: _learned(tokenizer)])
        },
        "tokenizer/special_tokens_map.json": special,
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": FIXED["text_encoder"]["max_position_embeddings"],
            **special,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            **{key: getattr(schedule, field) for key, field in SCHEDULE.items()},
            **FIXED["scheduler"],
            "clip_sample": False,
            "set_alpha_to_one": schedule.final_alpha is not None,
        },
    }
    if added := tokenizer.vocab[_learned(tokenizer) :]:
        ids = {token: n for n, token in enumerate(added, _learned(tokenizer))}
        files["tokenizer/added_tokens.json"] = ids
    if "text_encoder" in present:
        files["text_encoder/config.json"] = {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **{key: getattr(text, field) for key, field in TEXT.items()},
            **FIXED["text_encoder"],
            # Textual inversion can have made it larger than the config's.
            "vocab_size": int(models["text_encoder"].weights[0].shape[0]),
            "hidden_act": next(key for key, act in ACTIVATIONS.items() if act == text.activation),
            "bos_token_id": tokenizer.start_of_text,
            "eos_token_id": tokenizer.end_of_text,
            "pad_token_id": tokenizer.end_of_text if pad_id is None else pad_id,
        }
    if "unet" in present:
        files["unet/config.json"] = {
            "_class_name": "UNet2DConditionModel",
            **{key: getattr(unet, field) for key, field in UNET.items()},
            **FIXED["unet"],
            "attention_head_dim": list(unet.heads),
            "down_block_types": [UNET_BLOCKS[level][0] for level in unet.attention],
            "up_block_types": [UNET_BLOCKS[level][1] for level in reversed(unet.attention)],
            "sample_size": config.size // unet.latent_scale,
            **_departures(unet, "norm_epsilon", "approximate_gelu"),
        }
    if "vae" in present:
        files["vae/config.json"] = {
            "_class_name": "AutoencoderKL",
            **{key: getattr(vae, field) for key, field in VAE.items()},
            **FIXED["vae"],
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
            "sample_size": config.size,
            **_departures(vae, "norm_epsilon"),
        }
    return files


def _departures(config, *names):
    """Returns the fields that diffusers has no word for and that aren't as they are there."""
    original = _own_fields({}, *names)
    return {n: getattr(config, n) for n in names if getattr(config, n) != original[n]}


def _learned(tokenizer):
    """Returns how many tokens aren't added ones: the last of them is end of text."""
    return tokenizer.end_of_text + 1


def _write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_merges(path, tokenizer):
    """Writes the pairs that the tokenizer joins, in the order in which they were learned."""
    vocab, joined = tokenizer.vocab, tokenizer._joined
    pairs = sorted(joined, key=joined.get)  # each is two characters, whose codes are ids
    lines = [f"{vocab[ord(a)]} {vocab[ord(b)]}" for a, b in pairs]
    path.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
