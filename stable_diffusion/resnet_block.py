"""The residual block of the VAE and, with a timestep embedding, of the UNet."""

from keras import layers, ops

from stable_diffusion.block import Block
from stable_diffusion.padded_conv2d import PaddedConv2D


class ResnetBlock(Block):
    """Two convolutions, each after GroupNorm and swish, beside a residual connection.

    The VAE uses it as it is. With `conditioned` it is the UNet's: it is called on `[x, time]`, and
    adds a projection of the timestep embedding between the convolutions. The residual connection is
    a 1x1 convolution where the number of channels changes. KerasCV has a class for each kind:
    `ResnetBlock` and `ResBlock`.

    Args:
        width: number of output channels.
        groups: groups of each GroupNorm.
        norm_epsilon: added to the variance of each group.
        conditioned: whether a timestep embedding comes in beside the feature map.

    Input shape `(B, H, W, channels)` or `[(B, H, W, channels), (B, time_width)]`, output shape
    `(B, H, W, width)`.

    Reference: He et al. 2016, https://arxiv.org/abs/1603.05027; conditioned as by Ho et al. 2020,
    https://arxiv.org/abs/2006.11239.
    """

    def __init__(self, width, groups=32, norm_epsilon=1e-5, conditioned=False, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.norm1 = layers.GroupNormalization(groups, epsilon=norm_epsilon, name="norm1")
        self.conv1 = PaddedConv2D(width, 3, padding=1, name="conv1")
        self.time_emb_proj = layers.Dense(width, name="time_emb_proj") if conditioned else None
        self.norm2 = layers.GroupNormalization(groups, epsilon=norm_epsilon, name="norm2")
        self.conv2 = PaddedConv2D(width, 3, padding=1, name="conv2")

    def build(self, input_shape):
        channels = input_shape[0][-1] if self.time_emb_proj else input_shape[-1]
        changes = channels != self.width
        self.conv_shortcut = PaddedConv2D(self.width, 1, name="conv_shortcut") if changes else None
        super().build(input_shape)

    def call(self, inputs):
        inputs, time = inputs if self.time_emb_proj else (inputs, None)
        x = self.conv1(ops.silu(self.norm1(inputs)))
        if self.time_emb_proj:
            x = x + self.time_emb_proj(ops.silu(time))[:, None, None]  # (B, D) to (B, 1, 1, D)
        x = self.conv2(ops.silu(self.norm2(x)))
        return x + (self.conv_shortcut(inputs) if self.conv_shortcut else inputs)
