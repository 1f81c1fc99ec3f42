"""Checkpoints in the original layout: one file with all components, .safetensors or .ckpt.

CompVis and Stability AI published Stable Diffusion 1 and 2 in this layout, and most community sites
share models in it. The name of a tensor tells its component:

    model.diffusion_model.*         the diffusion model
    first_stage_model.*             the VAE: decoder and image encoder
    cond_stage_model.transformer.*  the text encoder of Stable Diffusion 1, as transformers names it
    cond_stage_model.model.*        the text encoder of Stable Diffusion 2, as OpenCLIP names it
    model_ema.*                     the diffusion model's moving average

Such a file has no config. The shapes of its tensors tell most of it, and the rest is as in Stable
Diffusion 1 or 2. Files that this project writes have diffusers' config files in their metadata. So
narrower models, and models in KerasCV's dialect, come back unchanged.

Reference for the names: https://github.com/CompVis/stable-diffusion (ldm/modules) and
https://github.com/mlfoundations/open_clip (transformer.py).
"""

import json
import re
import warnings
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from stable_diffusion.checkpoints.diffusers_config import (
    CONFIGS,
    FOLDERS,
    INDEX,
    MERGES,
    drop_index,
    make_config_files,
    read_config,
    read_tokenizer,
)
from stable_diffusion.checkpoints.layout import Layout
from stable_diffusion.checkpoints.names import CLIP, TRANSFORMER, VAE_LAYOUTS, ignore_layers
from stable_diffusion.checkpoints.reader import Reader, check_components, make_missing_error
from stable_diffusion.checkpoints.tensors import (
    SAFETENSORS_SUFFIX,
    SUFFIXES,
    collect_tensors,
    guess_family,
    load_tensors,
    open_tensors,
    save_safetensors,
)
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import SD1, SD2, Config, undo_departures

VAE = {
    "within": {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out", "attn": None},
    "residual": {"conv_shortcut": "nin_shortcut"},
    "prefix": "first_stage_model.",
    "older": (  # diffusers' names, which some programs write among the original ones
        ("attn_1.q.", "attn_1.to_q."),
        ("attn_1.k.", "attn_1.to_k."),
        ("attn_1.v.", "attn_1.to_v."),
        ("attn_1.proj_out.", "attn_1.to_out.0."),
    ),
}
LAYOUTS = {
    "diffusion_model": Layout(
        names={
            "time_embedding_guidance": "time_embed.cond_proj",  # no program's: see `save_original`
            "time_embedding_1": "time_embed.0",
            "time_embedding_2": "time_embed.2",
            "conv_in": "input_blocks.0.0",
            "down_{i}_res_{j}": "input_blocks.{n}.0",
            "down_{i}_attn_{j}": "input_blocks.{n}.1",
            "down_{i}_downsample": "input_blocks.{n}.0.op",
            "mid_res_0": "middle_block.0",
            "mid_attn_0": "middle_block.1",
            "mid_res_1": "middle_block.2",
            "up_{i}_res_{j}": "output_blocks.{n}.0",
            "up_{i}_attn_{j}": "output_blocks.{n}.1",
            "up_{i}_upsample": "output_blocks.{n}.{u}",
            "conv_norm_out": "out.0",
            "conv_out": "out.2",
        },
        within=TRANSFORMER,
        residual={
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "conv_shortcut": "skip_connection",
        },
        prefix="model.diffusion_model.",
    ),
    "decoder": Layout(
        names={
            "post_quant_conv": "post_quant_conv",
            "conv_in": "decoder.conv_in",
            "mid_res_0": "decoder.mid.block_1",
            "mid_attn": "decoder.mid.attn_1",
            "mid_res_1": "decoder.mid.block_2",
            "up_{i}_res_{j}": "decoder.up.{r}.block.{j}",
            "up_{i}_upsample": "decoder.up.{r}.upsample.conv",
            "conv_norm_out": "decoder.norm_out",
            "conv_out": "decoder.conv_out",
        },
        ignored=r"(encoder|quant_conv|loss|model_ema)\..*",
        **VAE,
    ),
    "image_encoder": Layout(
        names={
            "conv_in": "encoder.conv_in",
            "down_{i}_res_{j}": "encoder.down.{i}.block.{j}",
            "down_{i}_downsample": "encoder.down.{i}.downsample.conv",
            "mid_res_0": "encoder.mid.block_1",
            "mid_attn": "encoder.mid.attn_1",
            "mid_res_1": "encoder.mid.block_2",
            "conv_norm_out": "encoder.norm_out",
            "conv_out": "encoder.conv_out",
            "quant_conv": "quant_conv",
        },
        ignored=r"(decoder|post_quant_conv|loss|model_ema)\..*",
        **VAE,
    ),
}
CLIP_LAYOUT = replace(CLIP, prefix="cond_stage_model.transformer.")
OPENCLIP_LAYOUT = Layout(
    names={
        "clip_embedding": None,
        "layer_{i}": "transformer.resblocks.{i}",
        "final_layer_norm": "ln_final",
    },
    within={
        "position_embedding": "positional_embedding",
        "layer_norm1": "ln_1",
        "self_attn": "attn",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out": "out_proj",
        "layer_norm2": "ln_2",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
    },
    prefix="cond_stage_model.model.",
    special=(
        (r"positional_embedding\.weight", "positional_embedding"),
        (r"attn\.(?P<qkv>[qkv])\.(weight|bias)", r"attn.in_proj_\2"),
    ),
    ignored=r"text_projection(\.weight)?|logit_scale|attn_mask",
)
ROOTS = {  # one tensor of each component, and the prefixes that files put before its names
    "diffusion_model": ("input_blocks.0.0.weight", ("model.diffusion_model.", "")),
    "decoder": ("decoder.conv_in.weight", ("first_stage_model.", "vae.", "")),
    "image_encoder": ("encoder.conv_in.weight", ("first_stage_model.", "vae.", "")),
    "clip": (
        "final_layer_norm.weight",
        (
            "cond_stage_model.transformer.text_model.",
            "cond_stage_model.transformer.",
            "text_model.",
        ),
    ),
    "openclip": (
        "ln_final.weight",
        ("cond_stage_model.model.", "conditioner.embedders.0.model.", ""),
    ),
}
VAE_BLOCKS = {  # a tensor of each block of a stage: in the original layout, and in diffusers'
    "image_encoder": (
        "encoder.down.{0}.block.{1}.conv2.weight",
        "encoder.down_blocks.{0}.resnets.{1}.conv2.weight",
    ),
    "decoder": (
        "decoder.up.{0}.block.{1}.conv2.weight",
        "decoder.up_blocks.{0}.resnets.{1}.conv2.weight",
    ),
}
CONFIG_KEY = "stable_diffusion.config"  # key of the metadata: JSON of diffusers' config files
# Config files that are not stored: others imply them.
UNNEEDED = ("tokenizer/vocab.json", "tokenizer/tokenizer_config.json")
# The last layer of OpenCLIP. No model uses it, but other programs expect it in the file. We write
# zeros.
UNUSED = "cond_stage_model.model.transformer.resblocks.{}."
V_KEYS = ("v_pred", "v-pred")  # an empty tensor with such a name marks a model that predicts v
ZERO_SNR_KEYS = ("ztsnr",)  # and such a name one whose last timestep has no signal
V_DEVIATION = 0.09  # see `_guess_prediction_type`


def is_single_file(path):
    """Returns whether a path is one of a file, or of a pipe or device, which is refused later."""
    return path.exists() and not path.is_dir()


def find_only_file(names):
    """Returns the name of the only file of tensors in a folder, or None.

    Args:
        names: names of the folder's files, relative to it. It must not be in diffusers' layout.
    """
    files = [name for name in names if "/" not in name and name.lower().endswith(SUFFIXES)]
    return files[0] if len(files) == 1 and not {*CONFIGS, INDEX} & {*names} else None


class SingleFile(Reader):
    """Reads a file in the original layout. It needs only the components that are used.

    Args:
        path: path of a safetensors file, or of a file of PyTorch, which needs PyTorch.
        prediction_type: what the model predicts, "epsilon" or "v_prediction". None reads it from
            the file's metadata, from an empty tensor that is a mark, or from a .yaml file beside it
            with the same name. If nothing tells, it is "epsilon" for Stable Diffusion 1, and a
            guess for Stable Diffusion 2, with a warning.
        ema: whether to load the moving average of the diffusion model instead of its parameters.

    Attributes:
        config: the `Config` in the metadata. If there is none, that which the tensors show, in the
            original dialect.

    Raises:
        ValueError: the file cannot be read, is of another family of models, or has no moving
            average although `ema` is set.
    """

    loads = True

    def __init__(self, path: str | Path, prediction_type: str | None = None, ema: bool = False):
        self.path, self.ema = Path(path), ema
        self.source = open_tensors(self.path)
        names = self.source.shapes
        if "isn't supported" in (family := guess_family(names)):
            raise ValueError(f"{path} can't be loaded.{family}")
        self.roots = self.find_roots(names)
        if all(root is None for root in self.roots.values()):
            raise ValueError(
                f"{path} has no component of a Stable Diffusion in the original layout: it has no "
                f"tensor like {ROOTS['diffusion_model'][1][0]}{ROOTS['diffusion_model'][0]}."
                f"{family}"
            )
        if ema and not any(name.startswith("model_ema.") for name in names):
            raise ValueError(f"{path} has no moving average: it has no tensors model_ema.*.")
        self.files = _read_metadata(self.source)
        if self.files:
            config = read_config(self.path, self.files)
            found = prediction_type or config.schedule.prediction_type
            config = replace(config, schedule=replace(config.schedule, prediction_type=found))
        else:
            config = self._detect_config(prediction_type)
        super().__init__(config)

    @staticmethod
    def find_roots(names):
        """Returns a dict from each component to the prefix of its names, None if it is missing."""
        return {
            component: next((root for root in roots if root + name in names), None)
            for component, (name, roots) in ROOTS.items()
        }

    def check(self, component):
        """See `Reader.check`."""
        self._find_layout(component)
        name = f"{FOLDERS[component]}/config.json"
        if self.files and name not in self.files:
            raise ValueError(f"{self.path}: {CONFIG_KEY} in its metadata has no {name}.")

    def load(self, component, model):
        """Loads the parameters of a component: all of them, or none and a ValueError."""
        layout = self._find_layout(component)
        slots = layout.find_slots(model, **_get_counts(component, self.config))
        if component == "diffusion_model" and self.ema:
            slots = [slot._replace(name=_name_average(slot.name)) for slot in slots]
            layout = replace(layout, prefix="model_ema.", ignored="decay|num_updates")
        load_tensors(component, slots, self.source, layout)

    def tokenizer(self):
        """Returns the tokenizer in the metadata, or CLIP's if there is none."""
        return read_tokenizer(self.path, self.files, self.config.text)

    def _find_layout(self, component):
        """Returns the layout of a component, with the prefix that it has in this file."""
        if component == "text_encoder":
            depth = self.config.text.depth
            if self.roots["openclip"] is not None:
                layout = ignore_layers(OPENCLIP_LAYOUT, depth)  # see UNUSED
                return replace(layout, prefix=self.roots["openclip"])
            root = self.roots["clip"]
            root = root and root.removesuffix("text_model.")
            layout = ignore_layers(CLIP_LAYOUT, depth)
        else:
            root = self.roots[component]
            layout = LAYOUTS[component]
            if component in VAE_BLOCKS:
                _, diffusers = VAE_BLOCKS[component]
                if f"{root}{diffusers.format(0, 0)}" in self.source.shapes:
                    layout = VAE_LAYOUTS[component]
        if root is None:
            raise make_missing_error(
                component,
                f"{self.path} has no {component}: none of its tensors is a {layout.prefix}*."
                f"{guess_family(self.source.shapes)}",
            )
        return replace(layout, prefix=root)

    def _detect_config(self, prediction_type=None):
        """Returns the config that the shapes of the tensors show, in the original dialect."""
        shapes, roots = self.source.shapes, self.roots
        projections = [len(s) for name, s in shapes.items() if name.endswith(".1.proj_in.weight")]
        v2 = roots["openclip"] is not None or projections[:1] == [2]
        config = undo_departures(SD2 if v2 else SD1)
        try:
            unet = _detect_unet(shapes, roots["diffusion_model"], config.unet)
            text = _detect_text(shapes, roots, config.text)
            _compare_widths(roots, unet, text)
            vae = _detect_vae(shapes, roots, config.vae)
        except KeyError as error:
            raise ValueError(
                f"{self.path} is no Stable Diffusion 1 or 2: it has no {error}."
                f"{guess_family(shapes)}"
            ) from error
        except ValueError as error:  # of a config
            raise ValueError(
                f"{self.path} has no model of this package: {error}{guess_family(shapes)}"
            ) from error
        marked = prediction_type or _find_prediction_type(self.source, self.path)
        predicted = marked or "epsilon"
        if v2 and not marked and unet.in_channels == 4 and roots["diffusion_model"] is not None:
            predicted = _guess_prediction_type(self.source, roots["diffusion_model"])
        schedule = replace(
            config.schedule,
            prediction_type=predicted,
            zero_snr=any(key in shapes for key in ZERO_SNR_KEYS),
        )
        # The published models have latents of 64x64 cells, or of 96x96.
        cells = 96 if v2 and predicted == "v_prediction" else 64
        unet = replace(unet, cell_size=vae.cell_size)
        return Config(text, unet, vae, schedule, cells * vae.cell_size)


def save_original(
    path: str | Path,
    config: Config,
    models: dict,
    tokenizer: SimpleTokenizer | None = None,
    dtype: str | None = None,
):
    """Writes one .safetensors file that `SingleFile` and programs for the original layout load.

    Args:
        path: path of the file. One that exists is replaced, as a whole or not at all.
        config: the `Config` that the models were built from.
        models: dict from component (key of `COMPONENTS`) to model.
        tokenizer: a `SimpleTokenizer`; None is CLIP's.
        dtype: "float16", "bfloat16" or "float32"; None keeps the dtype of the parameters.

    Raises:
        ValueError: a component or dtype is unknown, the path has another suffix than .safetensors,
            diffusers' config files cannot express the config, `dtype` cannot hold the parameters,
            or the UNet sees the guidance scale, for which the layout has no name.
    """
    check_name(path)
    check_components(models)
    if config.unet.guidance_width:
        raise ValueError(
            "format must be 'diffusers', 'keras' or 'openvino', not 'original': the layout has no "
            "name for the guidance scale's embedding, which this diffusion model has."
        )
    files = drop_index(make_config_files(config, models, tokenizer or SimpleTokenizer()))
    files = {name: data for name, data in files.items() if name not in UNNEEDED}
    if (
        tokenizer is None
        or files[MERGES] == make_config_files(config, {}, SimpleTokenizer())[MERGES]
    ):
        del files[MERGES]
    tensors = {}
    for component, model in models.items():
        tensors |= collect_tensors(find_slots(component, model, config), dtype)
    used, unused = (UNUSED.format(config.text.depth - n) for n in (1, 0))
    last = {name: tensor for name, tensor in tensors.items() if name.startswith(used)}
    tensors |= {name.replace(used, unused): np.zeros_like(x) for name, x in last.items()}
    save_safetensors(path, tensors, {CONFIG_KEY: json.dumps(files)})


def check_name(path):
    """Raises a ValueError unless a path has the suffix that `save_original` needs."""
    if Path(path).suffix != SAFETENSORS_SUFFIX:
        raise ValueError(f"The path of a single file must end in .safetensors, not {str(path)!r}.")


def find_slots(component, model, config):
    """Returns the slots of a component in the original layout, see `Layout.find_slots`."""
    if component == "text_encoder":
        layout = CLIP_LAYOUT if config.text.activation == "quick_gelu" else OPENCLIP_LAYOUT
    else:
        layout = LAYOUTS[component]
    return layout.find_slots(model, **_get_counts(component, config))


def _get_counts(component, config):
    """Returns those arguments of `Layout.find_slots` that the names of blocks depend on."""
    if component == "diffusion_model":
        return {"attention": config.unet.attention, "res_blocks": config.unet.res_blocks}
    stages = (False,) * len(config.vae.widths)
    return {} if component == "text_encoder" else {"attention": stages}


def _read_metadata(source):
    """Returns the config files that `save_original` put into the metadata."""
    try:
        files = json.loads(source.metadata.get(CONFIG_KEY, "{}"))
        good = all(
            isinstance(data, str if name == MERGES else dict) for name, data in files.items()
        )
    except (ValueError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{source.path}: {CONFIG_KEY} in its metadata is no JSON of config files.")
    return files


def _find_prediction_type(source, path):
    """Returns what a file says that its diffusion model predicts, None if it says nothing.

    The metadata say it, an empty tensor, or a .yaml file beside it.
    """
    found = source.metadata.get("modelspec.predict_key")
    found = source.metadata.get("modelspec.prediction_type", found)
    if any(key in source.shapes for key in V_KEYS):
        found = "v"
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^\s*parameterization\s*:\s*[\"']?(\w+)", text, re.MULTILINE):
            found = match[1]
    return found and ("v_prediction" if found.startswith("v") else "epsilon")


def _guess_prediction_type(source, root):
    """Returns what a diffusion model of Stable Diffusion 2 predicts, and warns that it is a guess.

    The biases of one normalisation vary more in the published models that predict v: with a
    standard deviation of 0.2 or so, and 0.05 in the others. Other programs guess in this way, too.
    """
    pattern = re.escape(root) + r"output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias"
    matches = filter(None, (re.fullmatch(pattern, name) for name in source.shapes))
    last = max(matches, key=lambda match: int(match[1]), default=None)
    deviation = np.std(source.read_tensor(last[0]), dtype="float64") if last else 0.0
    guess = "v_prediction" if deviation > V_DEVIATION else "epsilon"
    warnings.warn(
        f"{source.path} does not say what it predicts. It is taken for {guess}; prediction_type= "
        f"(in commands --prediction-type) says it.",
        stacklevel=2,
    )
    return guess


def _name_average(name):
    """Returns the name of a parameter's moving average, which has no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def _count_names(shapes, template):
    """Returns for how many numbers from 0 on there is a name that the template makes of them."""
    return next(i for i in count() if template.format(i) not in shapes)


def _detect_text(shapes, roots, like):
    """Returns the config of the text encoder. Its heads are 64 wide, as in SD 1 and 2."""
    if (root := roots["openclip"]) is not None:
        embedding, hidden = "token_embedding.weight", "transformer.resblocks.{}.mlp.c_fc.weight"
    elif (root := roots["clip"]) is not None:
        embedding, hidden = "embeddings.token_embedding.weight", "encoder.layers.{}.mlp.fc1.weight"
    else:
        return like
    vocab_size, width = shapes[root + embedding]
    depth = _count_names(shapes, root + hidden)
    return replace(
        like,
        width=width,
        depth=depth - (roots["openclip"] is not None and depth != SD2.text.depth),  # see UNUSED
        heads=max(1, width // 64),
        hidden=shapes[root + hidden.format(0)][0],
        vocab_size=vocab_size,
    )


def _detect_unet(shapes, root, like):
    """Returns the config of the UNet. SD 1 has 8 heads in each stage; heads of SD 2 are 64 wide."""
    if root is None:
        return like
    stages = [[]]
    for n in range(1, len(shapes)):
        block = f"{root}input_blocks.{n}."
        if f"{block}0.op.weight" in shapes:
            stages.append([])
        elif f"{block}0.out_layers.3.weight" in shapes:
            width = shapes[f"{block}0.out_layers.3.weight"][0]
            stages[-1].append((width, f"{block}1.proj_in.weight" in shapes))
        else:
            break
    if not all(stage and set(stage) == {stage[0]} for stage in stages):
        raise KeyError("stage of equal blocks")
    widths = tuple(stage[0][0] for stage in stages)
    return replace(
        like,
        widths=widths,
        heads=tuple(w // 64 for w in widths) if like.linear_projection else (8,) * len(widths),
        attention=tuple(stage[0][1] for stage in stages),
        context_width=_find_context_width(shapes, root),
        res_blocks=len(stages[0]),
        in_channels=shapes[f"{root}input_blocks.0.0.weight"][1],
        out_channels=shapes[f"{root}out.2.weight"][0],
        middle=f"{root}middle_block.0.in_layers.0.weight" in shapes,
    )


def _find_context_width(shapes, root):
    """Returns the width of the context, which every cross-attention shows."""
    end = ".transformer_blocks.0.attn2.to_k.weight"
    names = (name for name in shapes if name.startswith(root) and name.endswith(end))
    return shapes[next(names, f"{root}*{end}")][-1]


def _compare_widths(roots, unet, text):
    """Raises a ValueError if a file has a UNet and a text encoder that do not fit each other."""
    encoded = any(roots[kind] is not None for kind in ("clip", "openclip"))
    if encoded and roots["diffusion_model"] is not None and unet.context_width != text.width:
        raise ValueError(
            f"the diffusion model attends to vectors of {unet.context_width} numbers, but the text "
            f"encoder makes vectors of {text.width}."
        )


def _detect_vae(shapes, roots, like):
    """Returns the config of the VAE: from its encoder, or from its decoder if it has none."""
    half = "image_encoder" if roots["image_encoder"] is not None else "decoder"
    if (root := roots[half]) is None:
        return like
    ours, theirs = VAE_BLOCKS[half]
    blocks = theirs if root + theirs.format(0, 0) in shapes else ours
    stages = _count_names(shapes, root + blocks.replace("{1}", "0"))
    widths = [shapes[root + blocks.format(i, 0)][0] for i in range(max(1, stages))]
    res_blocks = _count_names(shapes, root + blocks.replace("{0}", "0").replace("{1}", "{}"))
    if half == "image_encoder":
        channels = shapes[root + "encoder.conv_out.weight"][0] // 2  # means and variances
    else:
        channels, res_blocks = shapes[root + "decoder.conv_in.weight"][1], res_blocks - 1
        if "up_blocks" in blocks:  # which are numbered from the coarsest on
            widths.reverse()
    return replace(like, widths=tuple(widths), res_blocks=res_blocks, latent_channels=channels)
