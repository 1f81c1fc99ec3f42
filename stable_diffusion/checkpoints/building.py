"""Building models whose parameters are about to be loaded, without drawing random ones first."""

import threading
from contextlib import contextmanager

from keras.layers import Layer

from stable_diffusion.checkpoints.config import Config
from stable_diffusion.clip_tokenizer import SimpleTokenizer

PARTS = {
    "text_encoder": "text",
    "diffusion_model": "unet",
    "decoder": "vae",
    "image_encoder": "vae",
}
_lock = threading.RLock()


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
                kwargs["initializer"] = "zeros"
            return add_weight(self, *args, **kwargs)

        Layer.add_weight = add_zeros
        try:
            yield
        finally:
            Layer.add_weight = add_weight


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
        """
        with uninitialized(self.loads):
            model = make(config=getattr(self.config, PARTS[part]), download_weights=False)
        self.load(part, model)
        return model

    def load(self, part, model):
        """Loads a part's parameters: all of them, or none and a ValueError."""

    def tokenizer(self):
        """Returns the checkpoint's tokenizer."""
        return SimpleTokenizer()
