"""Configs in diffusers' words: what its JSON files say of each model, and how it is read.

They are the `config.json` of each component, the scheduler's and the tokenizer's files. Formats without
a config of their own carry the same ones (see `kerascv` and `original`).

Three fields have no word in diffusers, where they are constants (those of the original dialect, see
`checkpoints.config`): `norm_epsilon` of UNet and VAE, and `approximate_gelu`. Where a model departs
from them they are written under their own names. diffusers ignores them with a warning: there such
a model has the same parameters, but not the same dialect.
"""

import json
import math
import tempfile
from pathlib import Path

from stable_diffusion.clip_tokenizer import END, START, SimpleTokenizer, expand_tokens
from stable_diffusion.config import Config, TextConfig, UNetConfig, VAEConfig
from stable_diffusion.files import find_file
from stable_diffusion.noise_scheduler import NoiseScheduler

FOLDERS = {  # component, and where its config and parameters are
    "text_encoder": "text_encoder",
    "diffusion_model": "unet",
    "decoder": "vae",
    "image_encoder": "vae",
}
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
INDEX = "model_index.json"  # which subfolder is what; only our own key in it is read
GUIDANCE = "_guidance_scale"  # diffusers passes over keys that begin with an underscore
MERGES = "tokenizer/merges.txt"
FAST = "tokenizer/tokenizer.json"  # all of a tokenizer in one, what transformers 5 writes

# --- diffusers' key, then our field -------------------------------------------------------------

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


# --- Reading ------------------------------------------------------------------------------------


def read_files(folder) -> dict:
    """Reads the files of a folder that `read_config` and `read_tokenizer` need, where they exist.

    Returns:
        Dict from a file's path in the folder to its JSON object; of `MERGES`, to its text.

    Raises:
        ValueError: a file that isn't what its name says.
    """
    paths = {name: find_file(folder, name) for name in (INDEX, *CONFIGS, *TOKENIZER_FILES)}
    files = {name: read_json(path) for name, path in paths.items() if path}
    if path := find_file(folder, MERGES):
        try:
            files[MERGES] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no text file: {error}") from error
    if path := find_file(folder, FAST):
        files |= _unpack(path, read_json(path))
    return files


def _unpack(path, data):
    """Returns the files that a tokenizer.json takes the place of."""
    try:
        model = data["model"]
        vocab, pairs = model["vocab"], model["merges"]
        pairs = [pair if isinstance(pair, str) else "{} {}".format(*pair) for pair in pairs]
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        added = {token: n for token, n in added.items() if token not in vocab}
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer of CLIP's kind: {error!r}") from error
    vocab_file, added_file = TOKENIZER_FILES[:2]
    return {MERGES: _merges_text(pairs), vocab_file: vocab, added_file: added}


def read_json(path):
    """Returns the JSON object in a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def read_config(where, files) -> Config:
    """Returns the config that JSON files describe.

    Args:
        where: path of the folder or file they come from, for errors.
        files: dict as of `read_files`. Where a component's is missing, Stable Diffusion 1's stands in.

    Raises:
        ValueError: a file that says what isn't supported here, or none of a model.
    """
    where = Path(where)
    paths = {name.split("/")[0]: where / name for name in CONFIGS}
    data = {name.split("/")[0]: files[name] for name in CONFIGS if name in files}
    if not data:
        raise ValueError(f"{where} has none of {', '.join(CONFIGS)}.")
    for name, fixed in FIXED.items():
        for key, value in fixed.items():
            if (found := data.get(name, {}).get(key, value)) != value:
                raise _unsupported(paths[name], key, found, repr(value))
    text, unet, vae = TextConfig(), UNetConfig(norm_epsilon=1e-6), VAEConfig(norm_epsilon=1e-6)
    if "text_encoder" in data:
        text = _read_text(paths["text_encoder"], data["text_encoder"], where, files)
    if "vae" in data:
        vae = _read_vae(paths["vae"], data["vae"])
    scale, size = 2 ** (len(vae.widths) - 1), 64
    if "unet" in data:
        unet, size = _read_unet(paths["unet"], data["unet"], scale)
    schedule = _read_schedule(paths["scheduler"], data.get("scheduler"))
    guidance = _read_guidance(where / INDEX, files.get(INDEX, {}))
    return Config(text, unet, vae, schedule, size * scale, guidance)


def _read_guidance(path, data):
    scale = data.get(GUIDANCE, Config.guidance_scale)
    if type(scale) not in (int, float) or not 0 <= scale < math.inf:
        raise _unsupported(path, GUIDANCE, scale, "a number from 0")
    return float(scale)


def read_tokenizer(where, files, config) -> SimpleTokenizer:
    """Returns the tokenizer that files describe; CLIP's where there are none.

    Args:
        where, files: as of `read_config`.
        config: the `TextConfig` of the text encoder.

    Raises:
        ValueError: files that disagree, or more tokens than the text encoder embeds.
    """
    where = Path(where)
    tokenizer = SimpleTokenizer()
    if MERGES in files:
        with tempfile.TemporaryDirectory() as folder:
            merges = Path(folder) / "merges.txt"
            merges.write_text(files[MERGES], encoding="utf-8")
            try:
                tokenizer = SimpleTokenizer(merges)
            except ValueError as error:
                raise ValueError(f"{where / MERGES} is not a list of BPE pairs.") from error
    vocab, added = (_ids(where / name, files.get(name, {})) for name in TOKENIZER_FILES[:2])
    if vocab and (strange := sorted(set(tokenizer.encoder.items()) ^ set(vocab.items()))):
        raise ValueError(
            f"{where / TOKENIZER_FILES[0]} doesn't follow from {where / MERGES}: {len(strange)} "
            f"tokens have other ids, among them {strange[0][0]!r}."
        )
    tokenizer.add_tokens(sorted(added, key=added.get))
    if wrong := [token for token, n in added.items() if tokenizer.encoder[token] != n]:
        raise ValueError(
            f"{where / TOKENIZER_FILES[1]} gives {wrong[0]!r} the id {added[wrong[0]]}, where "
            f"{tokenizer.encoder[wrong[0]]} is next."
        )
    if len(tokenizer.vocab) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {where} has {len(tokenizer.vocab)} tokens, its text encoder an "
            f"embedding for {config.vocab_size}."
        )
    expand_tokens(tokenizer)
    return tokenizer


def _ids(path, data):
    """Returns a dict from token to id, if that is what it is."""
    if not isinstance(data, dict) or not all(type(n) is int for n in data.values()):
        raise ValueError(f"{path} must have an int for each token.")
    return data


def _read_text(path, data, where, files):
    fields = _fields(path, data, TEXT, TextConfig)
    if fields["width"] % fields["heads"]:
        raise _unsupported(path, "num_attention_heads", fields["heads"], "a divisor of hidden_size")
    activations = ACTIVATIONS | {"gelu_new": "gelu_tanh"}
    activation = _choose(path, "hidden_act", data.get("hidden_act", "quick_gelu"), activations)
    pad_token = None
    for name in TOKENIZER_FILES[2:]:
        if name in files:
            pad = files[name].get("pad_token") or "<|endoftext|>"
            pad = pad.get("content") if isinstance(pad, dict) else pad
            pad_token = _choose(where / name, "pad_token", pad, PAD_TOKENS)
    return TextConfig(**fields, activation=activation, pad_token=pad_token)


def _read_unet(path, data, cell_size):
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
        cell_size=cell_size,
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


# --- Writing ------------------------------------------------------------------------------------


def config_files(config, models, tokenizer) -> dict:
    """Returns the files that describe a checkpoint, as `read_files` does.

    Args:
        config: the `Config` the models were built from. `NoiseScheduler.clip_sample` isn't
            written: DDIM clips nothing here, and False is what tells diffusers so.
        models: dict from component to model; the files are of these components.
        tokenizer: a `SimpleTokenizer`.

    Raises:
        ValueError: a padding token or a last alpha that diffusers' files can't tell.
    """
    text, unet, vae, schedule = config.text, config.unet, config.vae, config.schedule
    end = tokenizer.end_of_text  # the last of the learned tokens; added ones follow
    pad_id = None if text.pad_token == tokenizer.end_of_text else text.pad_token
    pads = {n: token for token, n in PAD_TOKENS.items()}
    if pad_id not in pads:
        raise ValueError(f"pad_token must be one of {', '.join(map(str, pads))}, not {pad_id}.")
    if schedule.final_alpha not in (None, 1.0):
        raise ValueError(f"final_alpha must be None or 1.0, not {schedule.final_alpha}.")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pads[pad_id]}
    present = dict.fromkeys(FOLDERS[component] for component in models)
    own = {GUIDANCE: config.guidance_scale}
    files = {
        INDEX: {
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
            **({} if config.guidance_scale == Config.guidance_scale else own),
        },
        MERGES: _merges(tokenizer),
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
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            **{key: getattr(schedule, field) for key, field in SCHEDULE.items()},
            **FIXED["scheduler"],
            "clip_sample": False,
            "set_alpha_to_one": schedule.final_alpha is not None,
        },
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
            "sample_size": config.size // unet.cell_size,
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


def without_index(files):
    """Returns what formats without diffusers' index keep of `config_files`."""
    index = files[INDEX]
    own = {INDEX: {GUIDANCE: index[GUIDANCE]}} if GUIDANCE in index else {}
    return {name: data for name, data in files.items() if name != INDEX} | own


def write_files(folder, files):
    """Writes what `config_files` returned into a folder."""
    for name, data in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(data, str):
            data = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        path.write_text(data, encoding="utf-8")


def _merges(tokenizer):
    """Returns the pairs that the tokenizer joins, in the order in which they were learned."""
    vocab, joined = tokenizer.vocab, tokenizer._joined
    pairs = sorted(joined, key=joined.get)  # each is two characters, whose codes are ids
    return _merges_text(f"{vocab[ord(a)]} {vocab[ord(b)]}" for a, b in pairs)


def _merges_text(pairs):
    return "\n".join(["#version: 0.2", *pairs, ""])
