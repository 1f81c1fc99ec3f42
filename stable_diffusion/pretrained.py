"""A model whose parameters KerasCV published."""

from stable_diffusion.block import forget_compiled
from stable_diffusion.checkpoints.hub import download_published
from stable_diffusion.checkpoints.kerascv import load_h5


class Pretrained:
    """What the models have in common: they load the files that KerasCV published.

    Attributes:
        default_config: the config that a model is built from where it gets no other.
        published: name of the published file.
    """

    default_config = published = None

    def finish(self, config, download_weights):
        """Ends a constructor: keeps the config, and loads the published parameters if asked to.

        Args:
            config: what the model was built from.
            download_weights: whether to load the parameters; they are downloaded on first use.
        """
        self.config = config
        if download_weights:
            self.load_weights(download_published(self.published))

    def load_weights(self, filepath, **kwargs):
        """Loads parameters from KerasCV's .h5 (Keras 2 legacy) or Keras 3's .weights.h5.

        For the former all layers and shapes are compared before the first parameter is assigned.

        Args:
            filepath: path of the file.
            **kwargs: passed to `keras.Model.load_weights` for Keras 3's format.

        Raises:
            ValueError: the file is truncated, corrupt or of another model; the message names the
                file and what differs.
        """
        forget_compiled(self)
        load_h5(self, filepath, super().load_weights, **kwargs)
