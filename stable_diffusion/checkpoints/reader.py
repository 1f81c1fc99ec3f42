"""The base class of all readers of checkpoints, and `release`, which frees memory."""

import gc
from weakref import WeakSet

import keras

from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import COMPONENTS, Config

loaded_models = WeakSet()  # models whose parameters came from a checkpoint


class Reader:
    """Builds the components of a pipeline with random parameters. Subclasses load parameters.

    Attributes:
        config: the `Config` of the checkpoint.
        loads: whether `load` loads parameters.
    """

    loads = False

    def __init__(self, config: Config):
        self.config = config

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
