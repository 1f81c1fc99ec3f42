"""The base of all readers of checkpoints; and freeing the memory of what can be read again."""

import gc
from weakref import WeakSet

import keras

from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import COMPONENTS, Config

loaded = WeakSet()  # the models that hold a checkpoint's parameters, as far as is known


class Reader:
    """Builds the components of a pipeline with fresh random parameters; subclasses load them instead.

    Attributes:
        config: the `Config` of the checkpoint.
    """

    loads = False

    def __init__(self, config: Config):
        self.config = config

    def build(self, component, make):
        """Returns a component with its parameters.

        Args:
            component: a key of `COMPONENTS`.
            make: function that builds the component from `config` and `download_weights`.

        Raises:
            ValueError: Keras' dtype policy is bfloat16 and its backend OpenVINO.
        """
        if keras.backend.backend() == "openvino" and "bfloat16" in keras.config.dtype_policy().name:
            raise ValueError(
                "The dtype policy on OpenVINO must be float32, with which it computes in bfloat16 "
                f"where the processor can, not {keras.config.dtype_policy().name}: Keras misreads "
                "its results."
            )
        with uninitialized(self.loads):
            model = make(config=getattr(self.config, COMPONENTS[component]), download_weights=False)
        self.load(component, model)
        if self.loads:
            loaded.add(model)
        return model

    def load(self, component, model):
        """Loads a component's parameters: all of them, or none and a ValueError."""

    def tokenizer(self):
        """Returns the checkpoint's tokenizer."""
        return SimpleTokenizer()


def release(pipeline, component: str):
    """Frees the memory of a component, which is loaded again when it is next asked for.

    The text encoder, say, isn't needed any more once prompt and negative prompt are encoded:

        context, negative = model.encode_text("a cat"), model.encode_text("")
        release(model, "text_encoder")
        images = model.generate_image(context, negative)

    Args:
        pipeline: a `StableDiffusion`. A component that it hasn't built yet is left alone.
        component: a key of `COMPONENTS`.

    Raises:
        ValueError: no such component, or one whose parameters no checkpoint has: random ones, a model
            that was assigned, one with a LoRA or with an embedding. Nothing is changed then.
    """
    if component not in COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(COMPONENTS)}, not {component!r}.")
    model = getattr(pipeline, f"_{component}")
    if model is None:
        return
    if model not in loaded or model in pipeline.changes:
        raise ValueError(f"The {component} isn't its checkpoint's, and couldn't be loaded again.")
    setattr(pipeline, f"_{component}", None)
    del model
    gc.collect()
