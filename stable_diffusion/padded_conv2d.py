"""Convolution with explicit zero padding, the leaf of every image model here."""

import keras
from keras import ops


class PaddedConv2D(keras.layers.Conv2D):
    """Pads with zeros as PyTorch does, then convolves.

    Keras' own `padding="same"` pads a strided convolution at the bottom and right only, where the
    published checkpoints were trained with padding on all sides. Where both agree (stride 1),
    "same" is used, because it spares a copy of the feature map.

    Args:
        filters: number of output channels.
        kernel_size: side of the kernel, in pixels.
        padding: zeros around the feature map: an int for all sides, or
            `((top, bottom), (left, right))`.
        strides: step of the kernel, in pixels.

    Input shape `(B, H, W, channels)`, output shape `(B, H', W', filters)`.
    """

    def __init__(self, filters, kernel_size, padding=0, strides=1, **kwargs):
        same = strides == 1 and padding == kernel_size // 2
        kwargs |= {"strides": strides, "padding": "same" if same else "valid"}
        super().__init__(filters, kernel_size, data_format="channels_last", **kwargs)
        sides = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        self.zeros = None if same else ((0, 0), *sides, (0, 0))

    def _pad(self, x):
        return ops.pad(x, self.zeros) if self.zeros else x

    def call(self, inputs):
        return super().call(self._pad(inputs))

    def compute_output_shape(self, input_shape):
        return super().compute_output_shape(self._pad(keras.KerasTensor(input_shape)).shape)
