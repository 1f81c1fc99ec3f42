"""Building models whose parameters are about to be loaded: neither random numbers nor copies."""

import gc
import math
import threading
from contextlib import contextmanager
from weakref import WeakSet

import keras
import ml_dtypes  # noqa: F401  teaches numpy what bfloat16 is
import numpy as np
from keras.layers import Layer

from stable_diffusion.checkpoints.config import Config
from stable_diffusion.clip_tokenizer import SimpleTokenizer

PARTS = {
    "text_encoder": "text",
    "diffusion_model": "unet",
    "decoder": "vae",
    "image_encoder": "vae",
}
ALIGNMENT = 64  # bytes; at such addresses the backends take memory over as it is
_lock = threading.RLock()
loaded = WeakSet()  # the models that hold a checkpoint's parameters, as far as is known


def empty(shape, dtype, zeros=False):
    """Returns a numpy array that `to_tensor` needn't copy.

    Args:
        shape, dtype: of the array.
        zeros: whether it is filled with zeros. The system gives such memory when it is first
            written to, so that zeros that are replaced as a whole cost nothing.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (np.zeros if zeros else np.empty)(size + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def to_tensor(array):
    """Returns an array as the backend assigns it best; the array must not be changed any more.

    TensorFlow copies every numpy array, but takes memory over by DLPack, which has no bfloat16.
    """
    if keras.backend.backend() != "tensorflow" or not array.size:
        return array
    import tensorflow as tf

    if array.dtype == "bfloat16":
        bits = tf.experimental.dlpack.from_dlpack(array.view("uint16").__dlpack__())
        return tf.bitcast(bits, tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


@contextmanager
def uninitialized(enabled=True):
    """Makes layers that are built inside start from zeros, because a checkpoint is loaded next.

    Drawing 860 million random parameters takes longer than reading them from a disk, and Keras has
    no switch for it. Only layers built by the calling thread are affected.
    """
    if not enabled:
        yield
        return
    with _lock:
        add_weight, thread = Layer.add_weight, threading.get_ident()

        def add_zeros(self, *args, **kwargs):
            if threading.get_ident() == thread:
                kwargs["initializer"] = _zeros
            return add_weight(self, *args, **kwargs)

        Layer.add_weight = add_zeros
        try:
            yield
        finally:
            Layer.add_weight = add_weight


def _zeros(shape, dtype=None):
    return to_tensor(empty(shape, keras.backend.standardize_dtype(dtype), zeros=True))


def forget_compiled(model):
    """Lets a model be compiled again: on OpenVINO Keras compiles parameters in, as they were."""
    if keras.backend.backend() == "openvino":
        from stable_diffusion.samplers import deep_cache

        model.ov_compiled_model = None
        deep_cache.forget(model)


class Reader:
    """Builds the parts of a pipeline with fresh random parameters; subclasses load them instead.

    Attributes:
        config: the `Config` of the checkpoint.
    """

    loads = False

    def __init__(self, config: Config):
        self.config = config

    def build(self, part, make):
        """Returns a part with its parameters.

        Args:
            part: a key of `PARTS`.
            make: function that builds the part from `config` and `download_weights`.

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
            model = make(config=getattr(self.config, PARTS[part]), download_weights=False)
        self.load(part, model)
        if self.loads:
            loaded.add(model)
        return model

    def load(self, part, model):
        """Loads a part's parameters: all of them, or none and a ValueError."""

    def tokenizer(self):
        """Returns the checkpoint's tokenizer."""
        return SimpleTokenizer()


def release(pipeline, part: str):
    """Frees the memory of a part, which is loaded again when it is next asked for.

    The text encoder, say, isn't needed any more once prompt and negative prompt are encoded:

        context, negative = model.encode_text("a cat"), model.encode_text("")
        release(model, "text_encoder")
        images = model.generate_image(context, negative)

    Args:
        pipeline: a `StableDiffusion`. A part that it hasn't built yet is left alone.
        part: a key of `PARTS`.

    Raises:
        ValueError: no such part, or one whose parameters no checkpoint has: random ones, a model
            that was assigned, one with a LoRA or with an embedding. Nothing is changed then.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}.")
    model = getattr(pipeline, f"_{part}")
    if model is None:
        return
    if model not in loaded or model in getattr(pipeline, "_lora_originals", {}):
        raise ValueError(f"The {part} isn't its checkpoint's, and couldn't be loaded again.")
    setattr(pipeline, f"_{part}", None)
    del model
    gc.collect()
