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
        padding: zeros around the picture: an int for all sides, or
            `((top, bottom), (left, right))`.
        strides: step of the kernel, in pixels.

    Input shape `(B, H, W, channels)`, output shape `(B, H', W', filters)`.
    """

    def __init__(self, filters, kernel_size, padding=0, strides=1, **kwargs):
        same = strides == 1 and padding == kernel_size // 2
        super().__init__(
            filters,
            kernel_size,
            strides=strides,
            padding="same" if same else "valid",
            data_format="channels_last",
            **kwargs,
        )
        sides = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        self.zero_padding = None if same else ((0, 0), *sides, (0, 0))

    def call(self, inputs):
        return super().call(ops.pad(inputs, self.zero_padding) if self.zero_padding else inputs)

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        if self.zero_padding:
            (_, (top, bottom), (left, right), _) = self.zero_padding
            height = height and height + top + bottom
            width = width and width + left + right
        return super().compute_output_shape((batch, height, width, channels))
