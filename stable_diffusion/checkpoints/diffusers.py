"""Checkpoints in diffusers' layout, the one most published Stable Diffusions come in.

A folder has a subfolder for each component, with the component's config as JSON and its parameters as
safetensors:

    model_index.json                            which subfolder is what
    text_encoder/config.json                    `TextConfig`
    text_encoder/model.safetensors              component "text_encoder"
    unet/config.json                            `UNetConfig`
    unet/diffusion_pytorch_model.safetensors    component "diffusion_model"
    vae/config.json                             `VAEConfig`
    vae/diffusion_pytorch_model.safetensors     components "decoder" and "image_encoder"
    scheduler/scheduler_config.json             `NoiseScheduler`
    tokenizer/{vocab.json,merges.txt,...}       `SimpleTokenizer`

The tables below say what is different in the names of parameters, those of `diffusers_config` what
is in the JSON files.
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
    config_files,
    read_config,
    read_files,
    read_json,
    read_tokenizer,
    write_files,
)
from stable_diffusion.checkpoints.layout import Layout
from stable_diffusion.checkpoints.names import CLIP, TRANSFORMER
from stable_diffusion.checkpoints.reader import Reader
from stable_diffusion.checkpoints.tensors import (
    DTYPES,
    SafetensorsFiles,
    collect_tensors,
    load_tensors,
    save_safetensors,
)
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import COMPONENTS, Config
from stable_diffusion.files import find_file, new_folder

SUFFIX = ".safetensors"
STEMS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
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

    Whatever scheduler the folder names, its noise schedule is read and DDIM is run on it, as by
    `DDIMScheduler.from_config`.

    Args:
        folder: path of a folder, on this computer. It needs only the components that are asked for.

    Attributes:
        config: the `Config`; where a component's folder is missing, Stable Diffusion 1's of the component.

    Raises:
        ValueError: a config file that can't be read, or says what isn't supported here.
    """

    loads = True

    @staticmethod
    def recognize(path):
        """Tells whether a path is such a folder."""
        return (path / INDEX).is_file() or (path / "unet").is_dir()

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = read_files(self.folder)
        super().__init__(read_config(self.folder, self.files))

    def build(self, component, make):
        """See `Reader.build`.

        Raises:
            ValueError: the folder hasn't the component, or not all of it; the message lists what is
                missing, unused or misshapen.
        """
        if f"{FOLDERS[component]}/config.json" not in self.files:
            missing = self.folder / FOLDERS[component] / "config.json"
            raise ValueError(f"The {component} can't be loaded: there is no {missing}.")
        return super().build(component, make)

    def load(self, component, model):
        """Loads a component's parameters, in the dtype of the model's: all of them, or none.

        Args:
            component: key of `COMPONENTS`.
            model: the model, built from the config.

        Raises:
            ValueError: as `build`.
        """
        layout = LAYOUTS[component]
        load_tensors(
            component, layout.slots(model), _tensors(self.folder, FOLDERS[component]), layout
        )

    def tokenizer(self):
        """Returns the folder's tokenizer; CLIP's where it has none.

        Raises:
            ValueError: files that disagree, or more tokens than the text encoder embeds.
        """
        return read_tokenizer(self.folder, self.files, self.config.text)


class HubFolder(DiffusersFolder):
    """Reads a repository in diffusers' layout; a component's parameters are downloaded when it is built.

    Args:
        repository: a `hub.Repository`.

    Raises:
        ValueError: as `DiffusersFolder`, and where a file can't be downloaded.
    """

    def __init__(self, repository):
        self.repository = repository
        names = {*CONFIGS, *TOKENIZER_FILES, INDEX, MERGES, FAST} & {*repository.files}
        if not names - {INDEX}:
            raise ValueError(
                f"{repository} is not in diffusers' layout: it has none of {', '.join(CONFIGS)}."
            )
        for name in sorted(names):
            repository.fetch(name)
        super().__init__(repository.folder)

    def build(self, component, make):
        """See `DiffusersFolder.build`."""
        subfolder = FOLDERS[component]
        there = [p.name for p in map(Path, self.repository.files) if p.parent.name == subfolder]
        if name := tensor_files(subfolder, there):
            path = self.repository.fetch(f"{subfolder}/{name}")
            for shard in shards(path) if name.endswith(".json") else ():
                self.repository.fetch(f"{subfolder}/{shard}")
        return super().build(component, make)


def save_diffusers(
    folder: str | Path,
    config: Config,
    models: dict,
    tokenizer: SimpleTokenizer | None = None,
    dtype: str | None = None,
):
    """Writes a checkpoint that `DiffusersFolder` and diffusers' `StableDiffusionPipeline` load.

    Everything goes to a new folder beside `folder`, which takes its place at the very end, see
    `files.new_folder`.

    Args:
        folder: path, of a folder that doesn't exist, is empty, or is a checkpoint to replace.
        config: the `Config` the models were built from.
        models: dict from component (key of `COMPONENTS`) to model. The decoder and the image encoder are one
            file, so there must be both or none.
        tokenizer: None for CLIP's.
        dtype: "float16", "bfloat16" or "float32"; None is that of the parameters.

    Raises:
        ValueError: an unknown component or dtype, half a VAE, a folder of something else, a padding
            token that diffusers' files can't tell, or parameters that `dtype` can't hold.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if unknown := models.keys() - COMPONENTS.keys():
        raise ValueError(f"Parts are {', '.join(COMPONENTS)}, not {', '.join(sorted(unknown))}.")
    if ("decoder" in models) != ("image_encoder" in models):
        raise ValueError("The VAE is one file: pass decoder and image_encoder, or neither.")
    with new_folder(folder, INDEX) as written:
        write_files(written, config_files(config, models, tokenizer or SimpleTokenizer()))
        for subfolder in dict.fromkeys(FOLDERS[component] for component in models):
            slots = [
                slot
                for component, model in models.items()
                if FOLDERS[component] == subfolder
                for slot in LAYOUTS[component].slots(model)
            ]
            path = written / subfolder / f"{STEMS[subfolder]}.safetensors"
            save_safetensors(path, collect_tensors(slots, dtype))


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
    path = find_file(folder, f"{subfolder}/{name}")
    if not name.endswith(".json"):
        return SafetensorsFiles(path)
    files = {shard: find_file(folder, f"{subfolder}/{shard}") for shard in shards(path)}
    if missing := [shard for shard, file in files.items() if file is None]:
        raise ValueError(f"{path} names {missing[0]!r}, which is missing.")
    return SafetensorsFiles(path, list(files.values()))
