"""The base class of all readers of checkpoints, and `release`, which frees memory."""

import gc
from copy import copy
from dataclasses import replace
from weakref import WeakSet

import keras

from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import COMPONENTS, Config, TinyVAEConfig, VAEConfig

loaded_models = WeakSet()  # models whose parameters came from a checkpoint


class Reader:
    """Builds the components of a pipeline with random parameters. Subclasses load parameters.

    Attributes:
        config: the `Config` of the checkpoint.
        loads: whether `load` loads parameters.
        most_tokens: of a context that the UNet accepts; None for any number.
    """

    loads, most_tokens = False, None

    def __init__(self, config: Config):
        self.config = config

    def check(self, component):
        """Raises a ValueError if the checkpoint lacks a component. Builds and downloads nothing."""

    def build(self, component, make):
        """Returns a component with its parameters.

        Args:
            component: a key of `COMPONENTS`.
            make: function that builds the component. Its arguments are `config` and
                `download_weights`.

        Raises:
            ValueError: Keras' dtype policy is bfloat16 and its backend is OpenVINO; or, in
                subclasses, the checkpoint does not have the component or does not fit it.
        """
        policy = keras.config.dtype_policy().name
        if keras.backend.backend() == "openvino" and "bfloat16" in policy:
            raise ValueError(
                f"The dtype policy on OpenVINO must be float32, not {policy}: Keras misreads "
                "OpenVINO's results in bfloat16. With float32 OpenVINO computes in bfloat16 where "
                "the processor can."
            )
        self.check(component)
        with uninitialized(self.loads):
            model = make(config=getattr(self.config, COMPONENTS[component]), download_weights=False)
        self.load(component, model)
        if self.loads:
            loaded_models.add(model)
        return model

    def load(self, component, model):
        """Loads the parameters of a component: all of them, or none and a ValueError."""

    def tokenizer(self):
        """Returns the checkpoint's tokenizer."""
        return SimpleTokenizer()


class OtherVAE(Reader):
    """A checkpoint with the VAE of another one.

    Args:
        main: the `Reader` of the checkpoint.
        vae: the `Reader` of the VAE. Its scaling factor counts if it has a config that says it.

    Raises:
        ValueError: the UNet predicts latents with another number of channels.
    """

    def __init__(self, main, vae):
        unet, config = main.config.unet, vae.config.vae
        tiny = isinstance(config, TinyVAEConfig)
        if config.latent_channels != unet.out_channels:
            other = " A TAESD of 16, such as taesd3 or taef1, is for Stable Diffusion 3 or Flux."
            raise ValueError(
                f"vae must have latents of {unet.out_channels} channels, as the diffusion model, "
                f"not of {config.latent_channels}.{other if tiny else ''}"
            )
        plain = type(config) is type(main.config.vae) is VAEConfig  # latents of TAESD are scaled
        said = getattr(vae, "files", {}).get("vae/config.json", {})
        if plain and "scaling_factor" not in said:
            config = replace(config, scaling_factor=main.config.vae.scaling_factor)
        size = main.config.size // unet.cell_size * config.cell_size
        unet = replace(unet, cell_size=config.cell_size)
        super().__init__(replace(main.config, unet=unet, vae=config, size=size))
        self.main, self.vae, self.loads = main, vae, main.loads
        if hasattr(main, "folder"):
            self.folder = main.folder

    def _find_source(self, component):
        """Returns the reader of a component, with the config of both."""
        source = copy(self.vae if COMPONENTS[component] == "vae" else self.main)
        source.config = self.config
        return source

    def check(self, component):
        """See `Reader.check`."""
        self._find_source(component).check(component)

    def build(self, component, make):
        """See `Reader.build`."""
        return self._find_source(component).build(component, make)

    def tokenizer(self):
        """Returns the tokenizer of the main checkpoint."""
        return self.main.tokenizer()


def make_missing_error(component, reason):
    """Returns the error of a checkpoint that lacks a component, with what to do."""
    advice = f"a checkpoint that has a {component}"
    if COMPONENTS[component] == "vae":
        advice = "the path of a VAE as vae= (in commands --vae)"
    return ValueError(f"{reason} Pass {advice}.")


def check_components(models):
    """Raises a ValueError unless the keys of a dict are keys of `COMPONENTS`."""
    if unknown := models.keys() - COMPONENTS.keys():
        raise ValueError(
            f"The components are {', '.join(COMPONENTS)}, not {', '.join(sorted(unknown))}."
        )


def release(pipeline, component: str):
    """Frees the memory of a component. The pipeline loads it again when it needs it.

    For example, the text encoder is not needed after the prompts are encoded:

        context, negative = model.encode_text("a cat"), model.encode_text("")
        release(model, "text_encoder")
        images = model.generate_image(context, negative)

    Args:
        pipeline: a `StableDiffusion`. If it has not built the component yet, nothing happens.
        component: a key of `COMPONENTS`.

    Raises:
        ValueError: there is no such component, or no checkpoint has its parameters: they are
            random, the model was assigned by the user, or a LoRA or an embedding changed it.
            Nothing is changed then.
    """
    if component not in COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(COMPONENTS)}, not {component!r}.")
    model = getattr(pipeline, f"_{component}")
    if model is None:
        return
    if model not in loaded_models or model in pipeline.changes:
        raise ValueError(
            f"The {component} can't be released: its parameters are not those of its checkpoint, "
            f"and couldn't be loaded again."
        )
    setattr(pipeline, f"_{component}", None)
    del model
    gc.collect()
