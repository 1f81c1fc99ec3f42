"""Diffusers' config files: reads a `Config` and a tokenizer from them, and writes them.

They are the `config.json` of each component, the files of the scheduler and of the tokenizer, and
`model_index.json`. All formats use them: those that have no config of their own (see `kerascv`,
`original` and `openvino`) store these files, too.

diffusers has no key for three of our fields: `norm_epsilon` of the UNet and of the VAE, and
`approximate_gelu`. In diffusers they are constants, those of the original implementation (see
`stable_diffusion.config`). If a model has other values, they are written under our own names.
diffusers ignores such keys with a warning: it loads the parameters, but computes with its
constants.
"""

import json
import re
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePosixPath

from stable_diffusion import noise_scheduler
from stable_diffusion.added_tokens import expand_tokens
from stable_diffusion.checkpoints.contents import check_file, describe_content
from stable_diffusion.checks import find_expected
from stable_diffusion.clip_tokenizer import END, START, SimpleTokenizer
from stable_diffusion.config import (
    BOUNDS,
    Config,
    SamplerConfig,
    TextConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from stable_diffusion.files import find_file
from stable_diffusion.noise_scheduler import NoiseScheduler
from stable_diffusion.replacing import FolderKind

FOLDERS = {  # component: subfolder of its config and parameters
    "text_encoder": "text_encoder",
    "diffusion_model": "unet",
    "decoder": "vae",
    "image_encoder": "vae",
}
CONFIG_FOLDER = "config"  # subfolder of these files in folders of other formats
CONFIGS = (
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
TOKENIZER_FILES = (
    "tokenizer/vocab.json",
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
)
ADDED = "tokenizer/added_tokens.json"  # missing if there are none
INDEX = "model_index.json"  # the class of each subfolder; we read only our own key in it
GUIDANCE = "_guidance_scale"  # our key; diffusers ignores keys that begin with an underscore
# diffusers' version that first had all keys which we write. Some pipelines ask for it.
VERSION = {"_diffusers_version": "0.30.0"}
MOST_CELLS = 8192  # along a side of the latents that a UNet was trained with
MERGES = "tokenizer/merges.txt"
FAST = "tokenizer/tokenizer.json"  # transformers 5 writes the whole tokenizer into this file
CONFIG_FILES = (INDEX, *CONFIGS, *TOKENIZER_FILES, MERGES)  # what `make_config_files` makes

# --- Tables from diffusers' keys to our fields --------------------------------------------------

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
    "time_cond_proj_dim": "guidance_width",
}
UNET_BLOCKS = {  # whether a stage has attention: its block on the way down, and on the way up
    True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    False: ("DownBlock2D", "UpBlock2D"),
}
MIDDLE = "UNetMidBlock2DCrossAttn"
PER_STAGE = (  # keys that may have a list, of which we support only equal values
    "cross_attention_dim",
    "layers_per_block",
    "only_cross_attention",
    "transformer_layers_per_block",
)
VAE = {
    "block_out_channels": "widths",
    "layers_per_block": "res_blocks",
    "latent_channels": "latent_channels",
    "norm_num_groups": "groups",
    "scaling_factor": "scaling_factor",
}
VAE_CLASSES = {"AutoencoderKL": VAEConfig, "AutoencoderTiny": TinyVAEConfig}
TINY_VAE = {
    "num_encoder_blocks": "encoder_blocks",
    "num_decoder_blocks": "decoder_blocks",
    "latent_channels": "latent_channels",
    "scaling_factor": "scaling_factor",
}
TINY_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")  # all are our one width
SCHEDULE = {
    "num_train_timesteps": "train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "beta_schedule",
    "prediction_type": "prediction_type",
    "timestep_spacing": "spacing",
    "steps_offset": "steps_offset",
    "rescale_betas_zero_snr": "zero_snr",
}
SAMPLER = {"_class_name": "scheduler", "algorithm_type": "algorithm"}
KARRAS = "use_karras_sigmas"
LINSPACE = (  # schedulers that space timesteps with linspace unless told otherwise
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)
# Values of keys that a file omits. It must have all other keys.
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
    "steps_offset": 1,  # diffusers' pipeline sets it
    "rescale_betas_zero_snr": False,
    # Our own keys, see above. The values are diffusers' constants.
    "norm_epsilon": 1e-6,
    "approximate_gelu": False,
}
# Keys for which we have no field. If a file has such a key, it must have this value.
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
        "norm_eps": 1e-5,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
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
    "tiny_vae": {
        "act_fn": "relu",
        "in_channels": 3,
        "out_channels": 3,
        "shift_factor": 0.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    },
    "scheduler": {
        "thresholding": False,
        "trained_betas": None,
    },
}


# --- Reading ------------------------------------------------------------------------------------


def read_config_files(folder, subfolder="") -> dict:
    """Reads those files of a folder that `read_config` and `read_tokenizer` need.

    Args:
        folder: path of the checkpoint.
        subfolder: the subfolder of these files.

    Returns:
        Dict from the path of each existing file, relative to the subfolder, to its JSON object.
        The value of `MERGES` is the text of the file.

    Raises:
        ValueError: the content of a file does not match its name.
    """

    def find(name):
        return find_file(folder, PurePosixPath(subfolder, name))

    paths = {name: find(name) for name in (INDEX, *CONFIGS, *TOKENIZER_FILES)}
    files = {name: read_json(path) for name, path in paths.items() if path}
    if path := find(MERGES):
        try:
            files[MERGES] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no text file: {error}") from error
    if path := find(FAST):
        files |= _unpack_tokenizer(path, read_json(path))
    return files


def _unpack_tokenizer(path, data):
    """Returns the files that a tokenizer.json replaces."""
    try:
        model = data["model"]
        vocab, pairs = model["vocab"], model["merges"]
        pairs = [pair if isinstance(pair, str) else "{} {}".format(*pair) for pair in pairs]
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        added = {token: n for token, n in added.items() if token not in vocab}
        merges = _format_merges(pairs)
        merges.encode()  # JSON can hold halves of characters, which no text file has
    except (LookupError, TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"{path} is no tokenizer of CLIP's kind: {error!r:.200}") from error
    vocab_file, added_file = TOKENIZER_FILES[:2]
    return {MERGES: merges, vocab_file: vocab, added_file: added}


def read_json(path):
    """Returns the JSON object in a file.

    Raises:
        ValueError: the file cannot be read, or it has no JSON object.
    """
    check_file(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON file: it is {describe_content(path)} ({error})."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must be a JSON object, not {type(data).__name__}.")
    return data


def _make_error(path, key, value, supported):
    return ValueError(f"{path}: {key} must be {supported}, not {value!r:.200}.")


def _translate_choice(path, key, value, choices):
    """Returns the value of a dict for one of its keys; a ValueError names the supported keys."""
    if not isinstance(value, str) or value not in choices:
        raise _make_error(path, key, value, "one of " + ", ".join(map(repr, choices)))
    return choices[value]


def _read_fields(path, data, table, like, bounds):
    """Reads fields of the dataclass `like`, whose annotations and `bounds` tell what to expect."""
    kinds, found = {field.name: field.type for field in fields(like)}, {}
    for key, field in table.items():
        value = data.get(key, DEFAULTS.get(key))
        if expected := find_expected(value, kinds[field], bounds.get(field)):
            raise _make_error(path, key, value, expected)
        found[field] = tuple(value) if isinstance(value, list) else value
    return found


def _read_own_fields(path, data, like, *names):
    """Reads fields for which diffusers has no key."""
    return _read_fields(path, data, {name: name for name in names}, like, BOUNDS)


@contextmanager
def _naming(path):
    """Puts the path of a file before the message of a ValueError about its values."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_config(where, files) -> Config:
    """Returns the config that files describe.

    Args:
        where: path of the folder or file that they came from, for errors.
        files: dict, see `read_config_files`. If the file of a component is missing, its part of
            the config is that of Stable Diffusion 1.

    Raises:
        ValueError: a file describes a model that is not supported, or no component has a file.
    """
    where = Path(where)
    paths = {name.split("/")[0]: where / name for name in CONFIGS}
    data = {name.split("/")[0]: files[name] for name in CONFIGS if name in files}
    if not data:
        raise ValueError(f"{where} has none of {', '.join(CONFIGS)}.")
    if "unet" in data:
        data["unet"] = _join_stages(data["unet"])
    tiny = _find_vae_class(data.get("vae", {})) is TinyVAEConfig
    for name in paths:
        for key, value in FIXED["tiny_vae" if tiny and name == "vae" else name].items():
            if (found := data.get(name, {}).get(key, value)) != value:
                raise _make_error(paths[name], key, found, repr(value))
    text, unet, vae = TextConfig(), UNetConfig(norm_epsilon=1e-6), VAEConfig(norm_epsilon=1e-6)
    if "text_encoder" in data:
        text = _read_text(paths["text_encoder"], data["text_encoder"], where, files)
    if "vae" in data:
        vae = (_read_tiny_vae if tiny else _read_vae)(paths["vae"], data["vae"])
    scale, size = vae.cell_size, 64
    if "unet" in data:
        unet, size = _read_unet(paths["unet"], data["unet"], scale)
    if "unet" in data and "text_encoder" in data and unet.context_width != text.width:
        supported = f"{text.width}, which is hidden_size in {paths['text_encoder']}"
        raise _make_error(paths["unet"], "cross_attention_dim", unet.context_width, supported)
    schedule = _read_schedule(paths["scheduler"], data.get("scheduler"))
    sampler = _read_sampler(paths["scheduler"], data.get("scheduler", {}))
    guidance = _read_guidance(where / INDEX, files.get(INDEX, {}))
    with _naming(where):
        return Config(text, unet, vae, schedule, size * scale, guidance, sampler)


def _read_guidance(path, data):
    """Returns the guidance scale in `INDEX`, or the default of `Config` if it has none."""
    scale = data.get(GUIDANCE, Config.guidance_scale)
    if expected := find_expected(scale, float, BOUNDS["guidance_scale"]):
        raise _make_error(path, GUIDANCE, scale, expected)
    return float(scale)


def read_tokenizer(where, files, config) -> SimpleTokenizer:
    """Returns the tokenizer that files describe, or CLIP's if there are no such files.

    Args:
        where, files: see `read_config`.
        config: the `TextConfig` of the text encoder.

    Raises:
        ValueError: files contradict each other, or there are more tokens than the text encoder has
            embeddings.
    """
    where = Path(where)
    if MERGES not in files:
        tokenizer = SimpleTokenizer()
    else:
        with tempfile.TemporaryDirectory() as folder:
            merges = Path(folder) / "merges.txt"
            try:
                merges.write_text(files[MERGES], encoding="utf-8")
                tokenizer = SimpleTokenizer(merges)
            except ValueError as error:
                raise ValueError(f"{where / MERGES} is not a list of BPE pairs.") from error
    vocab, added = (_check_ids(where / name, files.get(name, {})) for name in TOKENIZER_FILES[:2])
    if vocab and vocab != tokenizer.encoder:
        strange = sorted(set(tokenizer.encoder.items()) ^ set(vocab.items()))
        raise ValueError(
            f"{where / TOKENIZER_FILES[0]} contradicts {where / MERGES}: {len(strange)} tokens "
            f"have other ids, for example {strange[0][0]!r:.200}."
        )
    tokenizer.add_tokens(sorted(added, key=added.get))
    if wrong := [token for token, n in added.items() if tokenizer.encoder[token] != n]:
        raise ValueError(
            f"{where / TOKENIZER_FILES[1]} gives {wrong[0]!r:.200} the id {added[wrong[0]]}, but "
            f"the next free id is {tokenizer.encoder[wrong[0]]}."
        )
    if len(tokenizer.vocab) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {where} has {len(tokenizer.vocab)} tokens, but its text encoder has "
            f"only {config.vocab_size} embeddings."
        )
    expand_tokens(tokenizer)
    return tokenizer


def _check_ids(path, data):
    """Returns `data`; raises a ValueError unless it is a dict from token to id."""
    if not isinstance(data, dict) or not all(type(n) is int for n in data.values()):
        raise ValueError(f"{path} must have an int for each token.")
    return data


def _read_text(path, data, where, files):
    found = _read_fields(path, data, TEXT, TextConfig, BOUNDS)
    if found["width"] % found["heads"]:
        raise _make_error(path, "num_attention_heads", found["heads"], "a divisor of hidden_size")
    activations = ACTIVATIONS | {"gelu_new": "gelu_tanh"}
    activation = _translate_choice(
        path, "hidden_act", data.get("hidden_act", "quick_gelu"), activations
    )
    pad_token = None
    for name in TOKENIZER_FILES[2:]:
        if name in files:
            pad = files[name].get("pad_token") or "<|endoftext|>"
            pad = pad.get("content") if isinstance(pad, dict) else pad
            pad_token = _translate_choice(where / name, "pad_token", pad, PAD_TOKENS)
    return TextConfig(**found, activation=activation, pad_token=pad_token)


def _join_stages(data):
    """Returns the config of a UNet with one value for each list of `PER_STAGE` of equal ones."""
    widths = data.get("block_out_channels")
    stages = len(widths) if isinstance(widths, list) else 0
    joined = {
        key: data[key][0]
        for key in PER_STAGE
        if isinstance(data.get(key), list) and data[key] and data[key] == data[key][:1] * stages
    }
    return data | joined


def _check_groups(path, found):
    if any(width % found["groups"] for width in found["widths"]):
        supported = "a divisor of each of block_out_channels"
        raise _make_error(path, "norm_num_groups", found["groups"], supported)


def _read_unet(path, data, cell_size):
    """Returns the `UNetConfig`, and the side of the latents that it was trained with."""
    found = _read_fields(path, data, UNET, UNetConfig, BOUNDS)
    widths = found["widths"]
    # diffusers' name is misleading: "attention_head_dim" is the number of heads, not their width.
    heads = data.get("attention_head_dim", 8)
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    bad = find_expected(heads, tuple[int, ...], BOUNDS["heads"]) or len(heads) != len(widths)
    if bad or any(width % n for n, width in zip(heads, widths, strict=True)):
        supported = f"an int or a list of {len(widths)}, which divide block_out_channels"
        raise _make_error(path, "attention_head_dim", heads, supported)
    kinds = [down for down, _ in UNET_BLOCKS.values()]
    default = [kinds[0]] * (len(widths) - 1) + [kinds[1]]
    down = data.get("down_block_types", default)
    if not isinstance(down, list) or len(down) != len(widths) or any(d not in kinds for d in down):
        supported = f"{len(widths)} of {', '.join(map(repr, kinds))}"
        raise _make_error(path, "down_block_types", down, supported)
    attention = tuple(name == kinds[0] for name in down)
    up = [UNET_BLOCKS[stage][1] for stage in reversed(attention)]
    if (other := data.get("up_block_types", up)) != up:
        raise _make_error(path, "up_block_types", other, f"{up}, to match down_block_types")
    middle = data.get("mid_block_type", MIDDLE)
    if middle not in (MIDDLE, None):
        raise _make_error(path, "mid_block_type", middle, f"{MIDDLE!r} or None")
    size = 64 if data.get("sample_size") is None else data["sample_size"]
    if expected := find_expected(size, int, (1, MOST_CELLS)):
        raise _make_error(path, "sample_size", size, expected)
    _check_groups(path, found)
    with _naming(path):
        config = UNetConfig(
            **found,
            heads=tuple(heads),
            attention=attention,
            middle=middle is not None,
            **_read_own_fields(path, data, UNetConfig, "norm_epsilon", "approximate_gelu"),
            cell_size=cell_size,
        )
    return config, size


def _read_vae(path, data):
    found = _read_fields(path, data, VAE, VAEConfig, BOUNDS)
    for key, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        types = [kind] * len(found["widths"])
        if (other := data.get(f"{key}_block_types", types)) != types:
            raise _make_error(path, f"{key}_block_types", other, types)
    own = _read_own_fields(path, data, VAEConfig, "norm_epsilon")
    _check_groups(path, found)
    with _naming(path):
        return VAEConfig(**found, **own)


def _find_vae_class(data):
    """Returns the class of config for a VAE; one that is unknown is read as diffusers' usual."""
    name = data.get("_class_name")
    return VAE_CLASSES.get(name, VAEConfig) if isinstance(name, str) else VAEConfig


def _read_tiny_vae(path, data):
    default = TinyVAEConfig()
    data = {key: getattr(default, field) for key, field in TINY_VAE.items()} | data
    found = _read_fields(path, data, TINY_VAE, TinyVAEConfig, BOUNDS)
    width = default.width
    for key, blocks in zip(TINY_WIDTHS, ("encoder_blocks", "decoder_blocks"), strict=True):
        widths = data.get(key, [width] * len(found[blocks]))
        if expected := find_expected(widths, tuple[int, ...], BOUNDS["width"]):
            raise _make_error(path, key, widths, expected)
        width = widths[0] if key == TINY_WIDTHS[0] else width
        if list(widths) != [width] * len(found[blocks]):
            supported = f"{len(found[blocks])} times {width}, one width for all stages of both ways"
            raise _make_error(path, key, widths, supported)
    with _naming(path):
        return TinyVAEConfig(width, **found)


def _read_schedule(path, data):
    if data is None:  # the schedule of Stable Diffusion
        data = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        data["set_alpha_to_one"] = False
    to_one = data.get("set_alpha_to_one", data.get("_class_name") != "PNDMScheduler")
    if not isinstance(to_one, bool):
        raise _make_error(path, "set_alpha_to_one", to_one, "true or false")
    found = _read_fields(path, data, SCHEDULE, NoiseScheduler, noise_scheduler.BOUNDS)
    if found["spacing"] == "leading" and not found["steps_offset"]:
        found["steps_offset"] = 1  # as diffusers' pipeline reads it
    with _naming(path):
        return NoiseScheduler(**found, final_alpha=1.0 if to_one else None, clip_sample=False)


def _read_sampler(path, data):
    """Returns the `SamplerConfig`. An unknown class is no error: `samplers` tells of it."""
    data = {"_class_name": SamplerConfig.scheduler} | data
    found = _read_fields(path, data, SAMPLER, SamplerConfig, {})
    for key, field in SAMPLER.items():
        if found[field] is not None and not re.fullmatch(r"[\w+. -]{1,100}", found[field], re.A):
            raise _make_error(path, key, found[field], "a name")
    karras = data.get(KARRAS)
    if not isinstance(karras, bool | None):
        raise _make_error(path, KARRAS, karras, "true or false")
    own = "linspace" if found["scheduler"] in LINSPACE and "timestep_spacing" not in data else None
    return SamplerConfig(**found, spacing="karras" if karras else own)


# --- Writing ------------------------------------------------------------------------------------


def make_config_files(config, models, tokenizer) -> dict:
    """Returns the files that describe a checkpoint, in the form of `read_config_files`.

    Args:
        config: the `Config` that the models were built from. Its `NoiseScheduler.clip_sample` is
            not written: our DDIM never clips, so the file says False.
        models: dict from component to model. Only these components get a file.
        tokenizer: a `SimpleTokenizer`.

    Raises:
        ValueError: diffusers' files cannot express the padding token or the last alpha.
    """
    text, unet, vae, schedule = config.text, config.unet, config.vae, config.schedule
    end = tokenizer.end_of_text  # the last learned token; added tokens follow
    pad_id = None if text.pad_token == tokenizer.end_of_text else text.pad_token
    pads = {n: token for token, n in PAD_TOKENS.items()}
    if pad_id not in pads:
        raise ValueError(f"pad_token must be one of {', '.join(map(str, pads))}, not {pad_id}.")
    if schedule.final_alpha not in (None, 1.0):
        raise ValueError(f"final_alpha must be None or 1.0, not {schedule.final_alpha}.")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pads[pad_id]}
    present = dict.fromkeys(FOLDERS[component] for component in models)
    own = {GUIDANCE: config.guidance_scale}
    vae_class = next(name for name, kind in VAE_CLASSES.items() if isinstance(vae, kind))
    files = {
        INDEX: {
            "_class_name": "StableDiffusionPipeline",
            **VERSION,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", config.sampler.scheduler],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", vae_class],
            **({} if config.guidance_scale == Config.guidance_scale else own),
        },
        MERGES: _list_merges(tokenizer),
        "tokenizer/vocab.json": {t: n for n, t in enumerate(tokenizer.vocab[: end + 1])},
        "tokenizer/special_tokens_map.json": special,
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": FIXED["text_encoder"]["max_position_embeddings"],
            **special,
        },
        "scheduler/scheduler_config.json": _make_scheduler(schedule, config.sampler),
    }
    if added := tokenizer.vocab[end + 1 :]:
        ids = {token: n for n, token in enumerate(added, end + 1)}
        files["tokenizer/added_tokens.json"] = ids
    if "text_encoder" in present:
        files["text_encoder/config.json"] = {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **{key: getattr(text, field) for key, field in TEXT.items()},
            **FIXED["text_encoder"],
            # An embedding may have made it larger than `text.vocab_size`.
            "vocab_size": int(models["text_encoder"].weights[0].shape[0]),
            "hidden_act": next(key for key, act in ACTIVATIONS.items() if act == text.activation),
            "bos_token_id": tokenizer.start_of_text,
            "eos_token_id": tokenizer.end_of_text,
            "pad_token_id": tokenizer.end_of_text if pad_id is None else pad_id,
        }
    if "unet" in present:
        files["unet/config.json"] = {
            "_class_name": "UNet2DConditionModel",
            **VERSION,
            **{key: getattr(unet, field) for key, field in UNET.items()},
            **FIXED["unet"],
            "attention_head_dim": list(unet.heads),
            "down_block_types": [UNET_BLOCKS[stage][0] for stage in unet.attention],
            "up_block_types": [UNET_BLOCKS[stage][1] for stage in reversed(unet.attention)],
            "mid_block_type": MIDDLE if unet.middle else None,
            "sample_size": config.size // unet.cell_size,
            **_list_departures(unet, "norm_epsilon", "approximate_gelu"),
        }
    if "vae" in present and isinstance(vae, TinyVAEConfig):
        files["vae/config.json"] = {
            "_class_name": vae_class,
            **VERSION,
            **{key: getattr(vae, field) for key, field in TINY_VAE.items()},
            **FIXED["tiny_vae"],
            **dict.fromkeys(TINY_WIDTHS, vae.widths),
        }
    elif "vae" in present:
        files["vae/config.json"] = {
            "_class_name": vae_class,
            **VERSION,
            **{key: getattr(vae, field) for key, field in VAE.items()},
            **FIXED["vae"],
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
            "sample_size": config.size,
            **_list_departures(vae, "norm_epsilon"),
        }
    return files


def _make_scheduler(schedule, sampler):
    """Returns scheduler_config.json."""
    data = {
        "_class_name": sampler.scheduler,
        **VERSION,
        **{key: getattr(schedule, field) for key, field in SCHEDULE.items()},
        **FIXED["scheduler"],
        "clip_sample": False,
        "set_alpha_to_one": schedule.final_alpha is not None,
    }
    if sampler.algorithm is not None:
        data["algorithm_type"] = sampler.algorithm
    if sampler.scheduler == "PNDMScheduler":
        data["skip_prk_steps"] = True  # as Stable Diffusion has it
    if sampler.spacing == "karras":
        data[KARRAS] = True
    if sampler.spacing == "linspace":  # the class' own, which is not the schedule's
        del data["timestep_spacing"]
    return data


def _list_departures(config, *names):
    """Returns the fields for which diffusers has no key and whose values differ from it."""
    return {n: getattr(config, n) for n in names if getattr(config, n) != DEFAULTS[n]}


def drop_index(files):
    """Returns config files without diffusers' index, but with our own key in it.

    For formats other than diffusers'.

    Args:
        files: dict, see `make_config_files`.
    """
    index = files[INDEX]
    own = {INDEX: {GUIDANCE: index[GUIDANCE]}} if GUIDANCE in index else {}
    return {name: data for name, data in files.items() if name != INDEX} | own


def make_folder_kind(name, files, recognize, rivals="") -> FolderKind:
    """Returns the `FolderKind` of a format that has these files in `CONFIG_FOLDER`.

    Args:
        name: what errors call such a folder.
        files: names of the files of parameters.
        recognize: see `FolderKind`.
        rivals: pattern of names of other formats' files, which a reader would load instead.
    """
    place = {name: f"{CONFIG_FOLDER}/{name}" for name in CONFIG_FILES}
    return FolderKind(
        name,
        frozenset([*files, *place.values()]),
        recognize,
        # Without them the guidance scale is the default, and no tokens were added.
        optional=frozenset([place[INDEX], place[ADDED]]),
        rivals={
            "": rf"{re.escape(INDEX)}|{rivals}",  # `open_checkpoint` tries diffusers' layout first
            "unet": ".*",
            f"{CONFIG_FOLDER}/tokenizer": re.escape(Path(FAST).name),
        },
    )


def write_config_files(folder, files):
    """Writes the result of `make_config_files` into a folder."""
    for name, data in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(data, str):
            data = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        path.write_text(data, encoding="utf-8")


def _list_merges(tokenizer):
    """Returns the pairs that the tokenizer joins, in the order in which they were learned."""
    vocab, joined = tokenizer.vocab, tokenizer._joined
    pairs = sorted(joined, key=joined.get)  # a pair is two characters, whose codes are the ids
    return _format_merges(f"{vocab[ord(a)]} {vocab[ord(b)]}" for a, b in pairs)


def _format_merges(pairs):
    return "\n".join(["#version: 0.2", *pairs, ""])
