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

The tables below say what is different in the names of parameters, those of `diffusers_config` what
is in the JSON files.
"""

from pathlib import Path

import keras

from stable_diffusion.checkpoints.building import PARTS, Reader
from stable_diffusion.checkpoints.config import Config
from stable_diffusion.checkpoints.diffusers_config import (
    CONFIGS,
    FAST,
    FOLDERS,
    MERGES,
    TOKENIZER_FILES,
    config_files,
    read_config,
    read_files,
    read_json,
    read_tokenizer,
    write_files,
)
from stable_diffusion.checkpoints.files import find, new_folder
from stable_diffusion.checkpoints.layout import Layout
from stable_diffusion.checkpoints.tensors import (
    DTYPES,
    SafetensorsFiles,
    collect,
    load,
    save_safetensors,
)
from stable_diffusion.clip_tokenizer import SimpleTokenizer

SUFFIX = ".safetensors"
STEMS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
TRANSFORMER = {  # within a spatial transformer, also in the original layout
    "norm1": "transformer_blocks.0.norm1",
    "attn1": "transformer_blocks.0.attn1",
    "norm2": "transformer_blocks.0.norm2",
    "attn2": "transformer_blocks.0.attn2",
    "norm3": "transformer_blocks.0.norm3",
    "geglu": "transformer_blocks.0.ff.net.0",
    "ff_out": "transformer_blocks.0.ff.net.2",
    "to_out": "to_out.0",
}
VAE = {
    # The attention is four matrices there, and four 1x1 convolutions here and in older files.
    "within": {"norm": "group_norm", "attn": None, "to_out": "to_out.0"},
    "matrices": r"mid_attn/.*to_\w+/kernel$",
    "older": (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ),
}
LAYOUTS = {
    "text_encoder": Layout(
        names={
            "clip_embedding": "text_model.embeddings",
            "layer_{i}": "text_model.encoder.layers.{i}",
            "final_layer_norm": "text_model.final_layer_norm",
        },
        within={
            "to_q": "q_proj",
            "to_k": "k_proj",
            "to_v": "v_proj",
            "to_out": "out_proj",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        },
        ignored=r"(text_model\.)?embeddings\.position_ids|logit_scale|text_projection\.weight",
        older=(("text_model.", ""),),  # the newest transformers leave it out
    ),
    "diffusion_model": Layout(
        names={
            "time_embedding_{i}": "time_embedding.linear_{i}",
            "conv_in": "conv_in",
            "down_{i}_res_{j}": "down_blocks.{i}.resnets.{j}",
            "down_{i}_attn_{j}": "down_blocks.{i}.attentions.{j}",
            "down_{i}_downsample": "down_blocks.{i}.downsamplers.0.conv",
            "mid_res_{i}": "mid_block.resnets.{i}",
            "mid_attn_{i}": "mid_block.attentions.{i}",
            "up_{i}_res_{j}": "up_blocks.{i}.resnets.{j}",
            "up_{i}_attn_{j}": "up_blocks.{i}.attentions.{j}",
            "up_{i}_upsample": "up_blocks.{i}.upsamplers.0",
            "conv_norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        },
        within=TRANSFORMER,
    ),
    "decoder": Layout(
        names={
            "post_quant_conv": "post_quant_conv",
            "conv_in": "decoder.conv_in",
            "mid_res_{i}": "decoder.mid_block.resnets.{i}",
            "mid_attn": "decoder.mid_block.attentions.0",
            "up_{i}_res_{j}": "decoder.up_blocks.{i}.resnets.{j}",
            "up_{i}_upsample": "decoder.up_blocks.{i}.upsamplers.0.conv",
            "conv_norm_out": "decoder.conv_norm_out",
            "conv_out": "decoder.conv_out",
        },
        ignored=r"(encoder|quant_conv)\..*",
        **VAE,
    ),
    "image_encoder": Layout(
        names={
            "conv_in": "encoder.conv_in",
            "down_{i}_res_{j}": "encoder.down_blocks.{i}.resnets.{j}",
            "down_{i}_downsample": "encoder.down_blocks.{i}.downsamplers.0.conv",
            "mid_res_{i}": "encoder.mid_block.resnets.{i}",
            "mid_attn": "encoder.mid_block.attentions.0",
            "conv_norm_out": "encoder.conv_norm_out",
            "conv_out": "encoder.conv_out",
            "quant_conv": "quant_conv",
        },
        ignored=r"(decoder|post_quant_conv)\..*",
        **VAE,
    ),
}


def variables(part, model) -> dict:
    """Returns the variables of a part's model by diffusers' names of them."""
    return {slot.name: slot.variable for slot in LAYOUTS[part].slots(model)}


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
        self.files = read_files(self.folder)
        super().__init__(read_config(self.folder, self.files))

    def build(self, part, make):
        """See `Reader.build`.

        Raises:
            ValueError: the folder hasn't the part, or not all of it; the message lists what is
                missing, unused or misshapen.
        """
        if f"{FOLDERS[part]}/config.json" not in self.files:
            missing = self.folder / FOLDERS[part] / "config.json"
            raise ValueError(f"The {part} can't be loaded: there is no {missing}.")
        return super().build(part, make)

    def load(self, part, model):
        """Loads a part's parameters, in the dtype of the model's: all of them, or none.

        Args:
            part: key of `PARTS`.
            model: the model, built from the config.

        Raises:
            ValueError: as `build`.
        """
        layout = LAYOUTS[part]
        load(part, layout.slots(model), _tensors(self.folder, FOLDERS[part]), layout)

    def tokenizer(self):
        """Returns the folder's tokenizer; CLIP's where it has none.

        Raises:
            ValueError: files that disagree, or more tokens than the text encoder embeds.
        """
        return read_tokenizer(self.folder, self.files, self.config.text)


class HubFolder(DiffusersFolder):
    """Reads a repository in diffusers' layout; a part's parameters are downloaded when it is built.

    Args:
        repository: a `hub.Repository`.

    Raises:
        ValueError: as `DiffusersFolder`, and where a file can't be downloaded.
    """

    def __init__(self, repository):
        self.repository = repository
        names = {*CONFIGS, *TOKENIZER_FILES, MERGES, FAST} & {*repository.files}
        if not names:
            raise ValueError(
                f"{repository} is not in diffusers' layout: it has none of {', '.join(CONFIGS)}."
            )
        for name in sorted(names):
            repository.fetch(name)
        super().__init__(repository.folder)

    def build(self, part, make):
        """See `DiffusersFolder.build`."""
        subfolder = FOLDERS[part]
        there = [p.name for p in map(Path, self.repository.files) if p.parent.name == subfolder]
        if name := tensor_files(subfolder, there):
            path = self.repository.fetch(f"{subfolder}/{name}")
            for shard in shards(path) if name.endswith(".json") else ():
                self.repository.fetch(f"{subfolder}/{shard}")
        return super().build(part, make)


def save_diffusers(
    folder: str | Path,
    config: Config,
    models: dict,
    tokenizer: SimpleTokenizer | None = None,
    dtype: str = "float16",
):
    """Writes a checkpoint that `DiffusersFolder` and diffusers' `StableDiffusionPipeline` load.

    Everything goes to a new folder beside `folder`, which takes its place at the very end, see
    `files.new_folder`.

    Args:
        folder: path, of a folder that doesn't exist, is empty, or is a checkpoint to replace.
        config: the `Config` the models were built from.
        models: dict from part (key of `PARTS`) to model. The decoder and the image encoder are one
            file, so there must be both or none.
        tokenizer: None for CLIP's.
        dtype: "float16", "bfloat16" or "float32".

    Raises:
        ValueError: an unknown part or dtype, half a VAE, a folder of something else, a padding
            token that diffusers' files can't tell, or parameters that `dtype` can't hold.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if unknown := models.keys() - PARTS.keys():
        raise ValueError(f"Parts are {', '.join(PARTS)}, not {', '.join(sorted(unknown))}.")
    if ("decoder" in models) != ("image_encoder" in models):
        raise ValueError("The VAE is one file: pass decoder and image_encoder, or neither.")
    with new_folder(folder, "model_index.json") as written:
        write_files(written, config_files(config, models, tokenizer or SimpleTokenizer()))
        for subfolder in dict.fromkeys(FOLDERS[part] for part in models):
            slots = [
                slot
                for part, model in models.items()
                if FOLDERS[part] == subfolder
                for slot in LAYOUTS[part].slots(model)
            ]
            path = written / subfolder / f"{STEMS[subfolder]}.safetensors"
            save_safetensors(path, collect(slots, dtype))


def tensor_files(subfolder, names):
    """Returns which of a subfolder's files to take: the tensors' file, or the index of several.

    Where there is one in float16 as well, the dtype policy decides.

    Args:
        subfolder: key of `STEMS`.
        names: names of the files that there are.
    """
    stem = STEMS[subfolder]
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    is_full = keras.config.dtype_policy().variable_dtype == "float32"
    known = full + half if is_full else half + full
    return next((name for name in known if name in names), None)


def shards(path):
    """Returns the names of the files that an index lists."""
    listed = read_json(path).get("weight_map")
    listed = listed.values() if isinstance(listed, dict) else [None]
    if bad := [
        n for n in listed if not isinstance(n, str) or Path(n).name != n or not n.endswith(SUFFIX)
    ]:
        raise ValueError(f"{path} names {bad[0]!r}, which is no .safetensors file beside it.")
    return sorted(set(listed))


def _tensors(folder, subfolder):
    """Opens the safetensors files of a subfolder."""
    name = tensor_files(subfolder, [p.name for p in (folder / subfolder).iterdir()])
    if name is None:
        stem = f"{STEMS[subfolder]}.safetensors"
        raise ValueError(f"There is no {stem} in {folder / subfolder}, nor an fp16 or sharded one.")
    path = find(folder, f"{subfolder}/{name}")
    if not name.endswith(".json"):
        return SafetensorsFiles(path)
    files = {shard: find(folder, f"{subfolder}/{shard}") for shard in shards(path)}
    if missing := [shard for shard, file in files.items() if file is None]:
        raise ValueError(f"{path} names {missing[0]!r}, which is missing.")
    return SafetensorsFiles(path, list(files.values()))
