"""Checkpoints in diffusers' layout. Most Stable Diffusion models are published in it.

A folder has these files. Each config is JSON, and parameters are safetensors:

    model_index.json                            the class of each subfolder, the guidance scale
    text_encoder/config.json                    `TextConfig`
    text_encoder/model.safetensors              component "text_encoder"
    unet/config.json                            `UNetConfig`
    unet/diffusion_pytorch_model.safetensors    component "diffusion_model"
    vae/config.json                             `VAEConfig`
    vae/diffusion_pytorch_model.safetensors     components "decoder" and "image_encoder"
    scheduler/scheduler_config.json             `NoiseScheduler`
    tokenizer/{vocab.json,merges.txt,...}       `SimpleTokenizer`

The tables below translate our names of parameters to those in the files. The tables in
`diffusers_config` do so for the fields of the JSON files.
"""

from pathlib import Path

import keras

from stable_diffusion.checkpoints.diffusers_config import (
    CONFIGS,
    FAST,
    FOLDERS,
    INDEX,
    MERGES,
    TOKENIZER_FILES,
    make_config_files,
    read_config,
    read_config_files,
    read_json,
    read_tokenizer,
    write_config_files,
)
from stable_diffusion.checkpoints.layout import Layout
from stable_diffusion.checkpoints.names import CLIP, TRANSFORMER
from stable_diffusion.checkpoints.reader import Reader, check_components
from stable_diffusion.checkpoints.tensors import (
    SAFETENSORS_SUFFIX,
    SafetensorsFiles,
    check_dtype,
    collect_tensors,
    load_tensors,
    save_safetensors,
)
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import Config
from stable_diffusion.files import find_file, replace_folder

STEMS = {  # names of the files of parameters, without suffix
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
VAE = {
    # The attention's projections are matrices in these files. They are 1x1 convolutions here, and
    # in older files.
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
    "text_encoder": CLIP,
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


class DiffusersFolder(Reader):
    """Reads a folder in diffusers' layout: config, parameters and vocabulary.

    Of the folder's scheduler only the noise schedule is read, whatever class it has. The pipeline
    runs DDIM on it, like `DDIMScheduler.from_config`.

    Args:
        folder: path of a folder on this computer. It needs only the components that are used.

    Attributes:
        config: the `Config`. If the folder of a component is missing, its part of the config is
            that of Stable Diffusion 1.

    Raises:
        ValueError: a config file cannot be read, or it describes a model that is not supported.
    """

    loads = True

    @staticmethod
    def recognize(path):
        """Returns whether a path is a folder in this format."""
        return (path / INDEX).is_file() or (path / "unet").is_dir()

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = read_config_files(self.folder)
        super().__init__(read_config(self.folder, self.files))

    def build(self, component, make):
        """See `Reader.build`.

        Raises:
            ValueError: the folder does not have the component, or the parameters do not fit it; the
                message lists what is missing, unused or misshapen.
        """
        if f"{FOLDERS[component]}/config.json" not in self.files:
            missing = self.folder / FOLDERS[component] / "config.json"
            raise ValueError(f"The {component} can't be loaded: there is no {missing}.")
        return super().build(component, make)

    def load(self, component, model):
        """Loads the parameters of a component in the dtype of the model: all of them, or none.

        Args:
            component: key of `COMPONENTS`.
            model: the model, built from the config.

        Raises:
            ValueError: see `build`.
        """
        layout = LAYOUTS[component]
        source = _open_tensors(self.folder, FOLDERS[component])
        load_tensors(component, layout.find_slots(model), source, layout)

    def tokenizer(self):
        """Returns the folder's tokenizer, or CLIP's if it has none.

        Raises:
            ValueError: see `read_tokenizer`.
        """
        return read_tokenizer(self.folder, self.files, self.config.text)


class HubFolder(DiffusersFolder):
    """Reads a repository in diffusers' layout. Downloads a component when it is built.

    The config files are downloaded at once.

    Args:
        repository: a `hub.Repository`.

    Raises:
        ValueError: see `DiffusersFolder`; or a file cannot be downloaded.
    """

    def __init__(self, repository):
        self.repository = repository
        names = {*CONFIGS, *TOKENIZER_FILES, INDEX, MERGES, FAST} & {*repository.files}
        if not names - {INDEX}:
            raise ValueError(
                f"{repository} is not in diffusers' layout: it has none of {', '.join(CONFIGS)}."
            )
        for name in sorted(names):
            repository.fetch_file(name)
        super().__init__(repository.folder)

    def build(self, component, make):
        """See `DiffusersFolder.build`."""
        subfolder = FOLDERS[component]
        there = [p.name for p in map(Path, self.repository.files) if p.parent.name == subfolder]
        if name := choose_file(subfolder, there):
            path = self.repository.fetch_file(f"{subfolder}/{name}")
            for shard in list_shards(path) if name.endswith(".json") else ():
                self.repository.fetch_file(f"{subfolder}/{shard}")
        return super().build(component, make)


def save_diffusers(
    folder: str | Path,
    config: Config,
    models: dict,
    tokenizer: SimpleTokenizer | None = None,
    dtype: str | None = None,
):
    """Writes a checkpoint that `DiffusersFolder` and diffusers' `StableDiffusionPipeline` load.

    The folder appears as a whole or not at all, see `files.replace_folder`.

    Args:
        folder: path of a folder that does not exist, is empty, or is a checkpoint to replace.
        config: the `Config` that the models were built from.
        models: dict from component (key of `COMPONENTS`) to model. The decoder and the image
            encoder share one file, so there must be both or neither.
        tokenizer: a `SimpleTokenizer`; None is CLIP's.
        dtype: "float16", "bfloat16" or "float32"; None keeps the dtype of the parameters.

    Raises:
        ValueError: a component or dtype is unknown, only one half of the VAE is given, the folder
            contains something else, diffusers' files cannot express the padding token or the last
            alpha, or `dtype` cannot hold the parameters.
    """
    check_dtype(dtype)
    check_components(models)
    if ("decoder" in models) != ("image_encoder" in models):
        raise ValueError(
            f"The VAE is one file: pass decoder and image_encoder, or neither, not only "
            f"{'decoder' if 'decoder' in models else 'image_encoder'}."
        )
    with replace_folder(folder, INDEX) as written:
        files = make_config_files(config, models, tokenizer or SimpleTokenizer())
        write_config_files(written, files)
        for subfolder in dict.fromkeys(FOLDERS[component] for component in models):
            slots = [
                slot
                for component, model in models.items()
                if FOLDERS[component] == subfolder
                for slot in LAYOUTS[component].find_slots(model)
            ]
            path = written / subfolder / f"{STEMS[subfolder]}{SAFETENSORS_SUFFIX}"
            save_safetensors(path, collect_tensors(slots, dtype))


def choose_file(subfolder, names):
    """Returns the name of the file to load: the file of parameters, or the index of several files.

    If a subfolder has a variant in float16, too, Keras' dtype policy decides.

    Args:
        subfolder: key of `STEMS`.
        names: names of the files in the subfolder.

    Returns:
        The name, or None if there is no such file.
    """
    stem = STEMS[subfolder]
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    is_full = keras.config.dtype_policy().variable_dtype == "float32"
    known = full + half if is_full else half + full
    return next((name for name in known if name in names), None)


def list_shards(path):
    """Returns the names of the files that an index names, sorted.

    Raises:
        ValueError: the index names something else than a .safetensors file beside it.
    """
    listed = read_json(path).get("weight_map")
    listed = listed.values() if isinstance(listed, dict) else [None]
    for name in listed:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(SAFETENSORS_SUFFIX)
        ):
            raise ValueError(f"{path} names {name!r}, which is no .safetensors file beside it.")
    return sorted(set(listed))


def _open_tensors(folder, subfolder):
    """Opens the safetensors file or files of a subfolder."""
    name = choose_file(subfolder, [p.name for p in (folder / subfolder).iterdir()])
    if name is None:
        stem = f"{STEMS[subfolder]}.safetensors"
        raise ValueError(f"There is no {stem} in {folder / subfolder}, nor an fp16 or sharded one.")
    path = find_file(folder, f"{subfolder}/{name}")
    if not name.endswith(".json"):
        return SafetensorsFiles(path)
    files = {shard: find_file(folder, f"{subfolder}/{shard}") for shard in list_shards(path)}
    if missing := [shard for shard, file in files.items() if file is None]:
        raise ValueError(f"{path} names {missing[0]!r}, which is missing.")
    return SafetensorsFiles(path, list(files.values()))
