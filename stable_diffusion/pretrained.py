"""What the blocks share, building by a symbolic call; and the models, parameters from a file."""

from keras import KerasTensor, layers, tree

import stable_diffusion as sd  # its subpackages are imported when they are first needed


class Block(layers.Layer):
    """A layer made of layers. One symbolic call builds them all and gives the output's shape.

    Keras would trace `call` with the backend instead, once for each level of nesting: ten times
    slower for Stable Diffusion's UNet.
    """

    def build(self, input_shape):
        some = tree.map_shape_structure(lambda shape: [n or 1 for n in shape], input_shape)
        self.call(tree.map_shape_structure(KerasTensor, some))

    def compute_output_spec(self, inputs):
        return KerasTensor(self.call(inputs).shape, self.compute_dtype)


class Pretrained:
    """A Keras model built from a config, whose parameters KerasCV published.

    Subclasses name the `part` and `preset` of `checkpoints.config` that they build unless told
    otherwise, and the `published` file.

    Args:
        graph: function of the config that returns the arguments of the Keras model's constructor.
        name: name of the model.
        download_weights: whether to load the published parameters, downloaded on first use.
        config: the dataclass to build from; None is the preset's.
    """

    part = preset = published = None

    def __init__(self, graph, name=None, download_weights=True, config=None):
        config = config or getattr(getattr(sd.checkpoints.config, self.preset), self.part)
        path = sd.checkpoints.hub.download(self.published) if download_weights else None
        with sd.checkpoints.building.uninitialized(download_weights):
            super().__init__(*graph(config), name=name)
        self.config = config
        if path:
            self.load_weights(path)

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
        sd.checkpoints.kerascv.load_h5(self, filepath, super().load_weights, **kwargs)
