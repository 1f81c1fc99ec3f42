"""Checkpoints in diffusers' layout. Most Stable Diffusion models are published in it.

A folder has these files. Each config is JSON. Parameters are safetensors, or older files of PyTorch
with the suffix .bin; several variants of the same may be there, see `choose_file`:

    model_index.json                            the class of each subfolder, the guidance scale
    text_encoder/config.json                    `TextConfig`
    text_encoder/model.safetensors              component "text_encoder"
    unet/config.json                            `UNetConfig`
    unet/diffusion_pytorch_model.safetensors    component "diffusion_model"
    vae/config.json                             `VAEConfig` or `TinyVAEConfig`
    vae/diffusion_pytorch_model.safetensors     components "decoder" and "image_encoder"
    scheduler/scheduler_config.json             `NoiseScheduler`, `SamplerConfig`
    tokenizer/{vocab.json,merges.txt,...}       `SimpleTokenizer`

The tables below translate our names of parameters to those in the files. The tables in
`diffusers_config` do so for the fields of the JSON files.
"""

import re
from pathlib import Path, PurePosixPath

from stable_diffusion.checkpoints.contents import quote
from stable_diffusion.checkpoints.diffusers_config import (
    ADDED,
    CONFIG_FILES,
    CONFIGS,
    FAST,
    FOLDERS,
    INDEX,
    MERGES,
    TOKENIZER_FILES,
    VAE_CLASSES,
    make_config_files,
    read_config,
    read_config_files,
    read_json,
    read_tokenizer,
    write_config_files,
)
from stable_diffusion.checkpoints.layout import Layout
from stable_diffusion.checkpoints.names import (
    CLIP,
    TRANSFORMER,
    VAE_LAYOUTS,
    ignore_layers,
    name_tiny_vae,
)
from stable_diffusion.checkpoints.reader import Reader, check_components, make_missing_error
from stable_diffusion.checkpoints.tensors import (
    MAX_NAMES,
    SAFETENSORS_SUFFIX,
    SUFFIXES,
    check_dtype,
    collect_tensors,
    load_tensors,
    open_tensors,
    save_safetensors,
)
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import COMPONENTS, Config, TinyVAEConfig
from stable_diffusion.files import find_file, list_files
from stable_diffusion.replacing import FolderKind, replace_folder

STEMS = {  # names of the files of parameters, without suffix: of safetensors, and of .bin
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}
HALF = "fp16"  # the variant that is loaded without being asked for
SHARD = re.compile(r"-\d{5}-of-\d{5}")  # in the name of a part of several
UNSUPPORTED = (  # a part of the name of a pipeline, and what it is
    ("XL", "Stable Diffusion XL"),
    ("UnCLIP", "Stable unCLIP"),
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("Flux", "Flux"),
)
VAE_CONFIG = "config.json"  # of a folder that has only a VAE
LAYOUTS = {
    "text_encoder": CLIP,
    "diffusion_model": Layout(
        names={
            "time_embedding_guidance": "time_embedding.cond_proj",
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
    **VAE_LAYOUTS,
}


class DiffusersFolder(Reader):
    """Reads a folder in diffusers' layout: config, parameters and vocabulary.

    Of the folder's scheduler the noise schedule is read, on which the pipeline runs any sampler,
    like `DDIMScheduler.from_config`; and its class, which `sampler="auto"` means.

    Args:
        folder: path of a folder on this computer. It needs only the components that are used.
        variant: a word in the names of files, such as "ema", see `choose_file`.

    Attributes:
        config: the `Config`. If the folder of a component is missing, its part of the config is
            that of Stable Diffusion 1.

    Raises:
        ValueError: a config file cannot be read, or it describes a model that is not supported; or
            no component has files of the variant.
    """

    loads = True
    folders = FOLDERS

    @staticmethod
    def recognize(path):
        """Returns whether a path is a folder in this format."""
        return find_file(path, INDEX) is not None or list_files(path, "unet") != []

    def __init__(self, folder: str | Path, variant: str | None = None):
        self.folder, self.variant = Path(folder), variant
        self.files = read_config_files(self.folder)
        _check_pipeline(self.folder / INDEX, self.files.get(INDEX, {}))
        self.check_variant()
        super().__init__(read_config(self.folder, self.files))

    def list_files(self, subfolder):
        """Returns the names of the files in a subfolder of the checkpoint."""
        return list_files(self.folder, subfolder)

    def check_variant(self):
        """Raises a ValueError if a variant is asked for that no component has."""
        known = {v for name in STEMS for v in list_variants(name, self.list_files(name)) if v}
        if self.variant is not None and self.variant not in known:
            raise ValueError(
                f"variant must be None or one that the folder has ("
                f"{', '.join(map(quote, sorted(known))) or 'it has none'}), not {self.variant!r}."
            )

    def check(self, component):
        """See `Reader.check`."""
        if f"{FOLDERS[component]}/config.json" not in self.files:
            missing = self.folder / FOLDERS[component] / "config.json"
            raise make_missing_error(
                component, f"The {component} can't be loaded: there is no {missing}."
            )
        subfolder = self.folders[component]
        choose_file(self.folder / subfolder, self.list_files(subfolder), self.variant)

    def load(self, component, model):
        """Loads the parameters of a component in the dtype of the model: all of them, or none.

        Args:
            component: key of `COMPONENTS`.
            model: the model, built from the config.

        Raises:
            ValueError: the parameters do not fit the model; the message lists what is missing,
                unused or misshapen.
        """
        layout, subfolder = find_layout(component, self.config), self.folders[component]
        if component == "text_encoder":
            layout = ignore_layers(layout, self.config.text.depth)
        where, names = self.folder / subfolder, self.list_files(subfolder)
        source = _open_files(self.folder, subfolder, choose_file(where, names, self.variant))
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
        variant: see `DiffusersFolder`.

    Raises:
        ValueError: see `DiffusersFolder`; or a file cannot be downloaded.
    """

    def __init__(self, repository, variant=None):
        self.repository = repository
        names = {*CONFIGS, *TOKENIZER_FILES, INDEX, MERGES, FAST} & {*repository.files}
        if not names - {INDEX}:
            raise ValueError(
                f"{repository} is not in diffusers' layout: it has none of {', '.join(CONFIGS)}."
                f"{_list_single_files(repository)}"
            )
        for name in sorted(names):
            repository.fetch_file(name)
        super().__init__(repository.folder, variant)

    def list_files(self, subfolder):
        """See `DiffusersFolder.list_files`."""
        paths = map(PurePosixPath, self.repository.files)
        return [path.name for path in paths if path.parent == PurePosixPath(subfolder)]

    def build(self, component, make):
        """See `DiffusersFolder.build`."""
        subfolder = FOLDERS[component]
        if f"{subfolder}/config.json" in self.files:
            where, names = self.folder / subfolder, self.list_files(subfolder)
            name = choose_file(where, names, self.variant)
            path = self.repository.fetch_file(f"{subfolder}/{name}")
            for shard in list_shards(path) if name.endswith(".json") else ():
                self.repository.fetch_file(f"{subfolder}/{shard}")
        return super().build(component, make)


def _is_replaceable(folder):
    """Returns whether a folder is a checkpoint: other programs also have a model_index.json."""
    path = find_file(folder, INDEX)
    if path is None:
        return find_file(folder, "unet/config.json") is not None
    try:
        return isinstance(read_json(path).get("_class_name"), str)
    except ValueError:
        return False


DIFFUSERS_FOLDER = FolderKind(
    "checkpoint in diffusers' layout",
    frozenset([*CONFIG_FILES, *(f"{sub}/{stems[0]}.safetensors" for sub, stems in STEMS.items())]),
    _is_replaceable,
    optional=frozenset([ADDED]),
    # Variants, several files with an index, and the formats of other frameworks.
    rivals={
        **dict.fromkeys(STEMS, r"(diffusion_|pytorch_|flax_|tf_)*model[.-].*"),
        "tokenizer": re.escape(Path(FAST).name),
    },
)


class VAEFolder(DiffusersFolder):
    """Reads a folder that has only a VAE: a config.json, and the parameters beside it.

    Args:
        folder: path of the folder, such as the subfolder vae of a checkpoint.

    Raises:
        ValueError: see `DiffusersFolder`; or the folder has something else than a VAE.
    """

    folders = dict.fromkeys(FOLDERS, ".")

    @staticmethod
    def recognize(path):
        """Returns whether a path is a folder in this format."""
        return (path / VAE_CONFIG).is_file()

    def __init__(self, folder):
        self.folder, self.variant = Path(folder), None
        path = self.folder / VAE_CONFIG
        config = read_json(path)
        if (kind := config.get("_class_name")) not in [*VAE_CLASSES]:
            known = " or ".join(map(repr, VAE_CLASSES))
            raise ValueError(f"{path}: _class_name must be {known}, not {kind!r:.100}.")
        self.files = {"vae/config.json": config}
        Reader.__init__(self, read_config(self.folder, self.files))


class HubVAE(VAEFolder):
    """Downloads a repository that has only a VAE, and reads it.

    Args:
        repository: a `hub.Repository`.

    Raises:
        ValueError: see `VAEFolder`; or a file cannot be downloaded.
    """

    def __init__(self, repository):
        super().__init__(repository.fetch_file(VAE_CONFIG).parent)
        name = choose_file(self.folder, [name for name in repository.files if "/" not in name])
        path = repository.fetch_file(name)
        for shard in list_shards(path) if name.endswith(".json") else ():
            repository.fetch_file(shard)


def find_layout(component, config) -> Layout:
    """Returns the layout of a component that is built from a `Config`."""
    if COMPONENTS[component] == "vae" and isinstance(config.vae, TinyVAEConfig):
        other = "encoder" if component == "decoder" else "decoder"
        return name_tiny_vae(component, config.vae, ignored=rf"{other}\..*")
    return LAYOUTS[component]


def save_diffusers(
    folder: str | Path,
    config: Config,
    models: dict,
    tokenizer: SimpleTokenizer | None = None,
    dtype: str | None = None,
):
    """Writes a checkpoint that `DiffusersFolder` and diffusers' `StableDiffusionPipeline` load.

    The folder appears as a whole or not at all, see `replacing.replace_folder`.

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
    with replace_folder(folder, DIFFUSERS_FOLDER) as written:
        files = make_config_files(config, models, tokenizer or SimpleTokenizer())
        write_config_files(written, files)
        for subfolder in dict.fromkeys(FOLDERS[component] for component in models):
            slots = [
                slot
                for component, model in models.items()
                if FOLDERS[component] == subfolder
                for slot in find_layout(component, config).find_slots(model)
            ]
            path = written / subfolder / f"{STEMS[subfolder][0]}{SAFETENSORS_SUFFIX}"
            save_safetensors(path, collect_tensors(slots, dtype))


def list_variants(subfolder, names):
    """Finds the files of parameters in a subfolder.

    Args:
        subfolder: key of `STEMS`.
        names: names of the files in the subfolder.

    Returns:
        Dict from variant, None for files without one, to the names of its files: the file of
        parameters, or the index of several files, those of safetensors first.
    """
    variants = {}
    for stem, suffix in zip(STEMS[subfolder], (SAFETENSORS_SUFFIX, ".bin"), strict=True):
        stem, suffix = re.escape(stem), re.escape(suffix)
        pattern = rf"{stem}(?:\.([\w-]+))?{suffix}|{stem}{suffix}\.index(?:\.([\w-]+))?\.json"
        for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
            if (match := re.fullmatch(pattern, name)) and not SHARD.search(name):
                variants.setdefault(match[1] or match[2], []).append(name)
    return variants


def choose_file(folder, names, variant=None):
    """Returns the name of the file to load: the file of parameters, or the index of several files.

    Args:
        folder: path of a subfolder, whose name is a key of `STEMS`; or of one that is only a VAE.
        names: names of the files in it.
        variant: a word in the name. If no file has it, and if it is None, the file is the
            safetensors without a variant, otherwise that of "fp16", otherwise a .bin.

    Raises:
        ValueError: there is no such file. The message says which variants there are.
    """
    subfolder = folder.name if folder.name in STEMS else "vae"
    variants = list_variants(subfolder, names)
    if variant is not None and variant in variants:
        return variants[variant][0]
    usual = [*variants.get(None, ()), *variants.get(HALF, ())]
    usual.sort(key=lambda name: ".bin" in name)
    if usual:
        return usual[0]
    if variants:
        raise ValueError(
            f"{folder} has only files of a variant: pass variant="
            f"{' or '.join(repr(quote(name)) for name in sorted(variants))}."
        )
    raise ValueError(
        f"There is no {STEMS[subfolder][0]}{SAFETENSORS_SUFFIX} in {folder}, nor a file of a "
        f"variant, a sharded one or a .bin."
    )


def list_shards(path):
    """Returns the names of the files that an index names, sorted.

    Raises:
        ValueError: the index names something else than a file of tensors beside it.
    """
    listed = read_json(path).get("weight_map")
    listed = listed.values() if isinstance(listed, dict) else [None]
    for name in listed:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith((SAFETENSORS_SUFFIX, ".bin"))
        ):
            raise ValueError(
                f"{path} names {quote(name)!r}, which is no .safetensors file beside it, nor .bin."
            )
    return sorted(set(listed))


def _check_pipeline(path, index):
    """Raises a ValueError if the class of a pipeline tells that it is of another family."""
    name = index.get("_class_name")
    for part, family in UNSUPPORTED if isinstance(name, str) else ():
        if part in name:
            raise ValueError(f"{path}: the folder has {family} ({quote(name)}), not supported.")


def _list_single_files(repository):
    """Returns a sentence about files in the original layout, or "" if there are none."""
    files = [name for name in sorted(repository.files) if name.lower().endswith(SUFFIXES)]
    addresses = ", ".join(f"{repository}/{quote(name)}" for name in files[:MAX_NAMES])
    return f" Files of tensors in it: {addresses}." if files else ""


def _open_files(folder, subfolder, name):
    """Opens the file or files of a component: the file of parameters, or those of an index."""
    path = find_file(folder, f"{subfolder}/{name}")
    if path is None:
        raise ValueError(f"{folder / subfolder / name} is missing, or it is no file.")
    if not name.endswith(".json"):
        return open_tensors(path)
    files = {shard: find_file(folder, f"{subfolder}/{shard}") for shard in list_shards(path)}
    if missing := [shard for shard, file in files.items() if file is None]:
        raise ValueError(f"{path} names {quote(missing[0])!r}, which is missing.")
    return open_tensors(path, list(files.values()))
