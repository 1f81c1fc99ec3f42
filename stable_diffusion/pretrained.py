"""What the blocks share, building by a symbolic call; and the models, parameters from a file."""

import keras
from keras.layers import Layer


class Block(Layer):
    """A layer made of layers. One symbolic call builds them all and gives the output's shape.

    Keras would trace `call` with the backend instead, once for each level of nesting: ten times
    slower for Stable Diffusion's UNet.
    """

    def build(self, input_shape):
        self.compute_output_spec(keras.tree.map_shape_structure(keras.KerasTensor, input_shape))

    def compute_output_spec(self, inputs):
        output = self.call(inputs)
        return keras.KerasTensor(output.shape, self.compute_dtype)


class Pretrained:
    """A Keras model built from a config, whose parameters KerasCV published.

    Subclasses name the `config` they build unless told otherwise, and the `published` file.

    Args:
        graph: function of the config that returns the arguments of the Keras model's constructor.
        name: name of the model.
        download_weights: whether to load the published parameters, downloaded on first use.
        config: the dataclass to build from; None is the class's.
    """

    config = published = None

    def __init__(self, graph, name=None, download_weights=True, config=None):
        from stable_diffusion.checkpoints.building import uninitialized
        from stable_diffusion.checkpoints.hub import download

        config = config or self.config
        with uninitialized(download_weights):
            super().__init__(*graph(config), name=name)
        self.config = config
        if download_weights:
            self.load_weights(download(self.published))

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
        from stable_diffusion.checkpoints.kerascv import is_legacy, load_legacy

        if is_legacy(filepath):
            load_legacy(self, filepath)
        else:
            super().load_weights(filepath, **kwargs)
