"""The UNet that predicts the noise in a latent."""

from functools import partial

import keras
from keras import ops
from keras.layers import Activation, Concatenate, Dense, LayerNormalization, UpSampling2D
from keras.layers import GroupNormalization as GroupNorm

from stable_diffusion.attention_block import Attention
from stable_diffusion.config import SD1, SD2
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Block, Pretrained
from stable_diffusion.resnet_block import ResnetBlock


class GEGLU(Block):
    """A linear layer gated by the GELU of another: `(B, T, D)` to `(B, T, width)`.

    Reference: Shazeer 2020, https://arxiv.org/abs/2002.05202. Both layers are one matrix, values
    first. KerasCV takes GELU's tanh approximation, the original the exact one.
    """

    def __init__(self, width, approximate=True, **kwargs):
        super().__init__(**kwargs)
        self.approximate = approximate
        self.proj = Dense(2 * width, name="proj")

    def call(self, inputs):
        x, gate = ops.split(self.proj(inputs), 2, axis=-1)
        return x * ops.gelu(gate, approximate=self.approximate)


class TransformerBlock(Block):
    """Self-attention, attention to the context and GEGLU, each after LayerNorm around a shortcut.

    Called on `[x, context]` of shapes `(B, T, width)` and `(B, S, any)`; returns `(B, T, width)`.
    """

    def __init__(self, width, heads, approximate_gelu=True, **kwargs):
        super().__init__(**kwargs)
        self.norm1 = LayerNormalization(epsilon=1e-5, name="norm1")
        self.attn1 = Attention(width, heads, name="attn1")
        self.norm2 = LayerNormalization(epsilon=1e-5, name="norm2")
        self.attn2 = Attention(width, heads, name="attn2")
        self.norm3 = LayerNormalization(epsilon=1e-5, name="norm3")
        self.geglu = GEGLU(4 * width, approximate_gelu, name="geglu")
        self.ff_out = Dense(width, name="ff_out")

    def call(self, inputs):
        x, context = inputs
        normed = self.norm1(x)
        x = x + self.attn1([normed, normed])
        x = x + self.attn2([self.norm2(x), context])
        return x + self.ff_out(self.geglu(self.norm3(x)))


class SpatialTransformer(Block):
    """A transformer block over all positions of a feature map, between two projections.

    Args:
        width: number of channels, of input and output alike.
        heads: number of attention heads.
        config: the `UNetConfig` with the kind of projection, normalisation and GELU.

    Called on `[x, context]` of shapes `(B, h, w, width)` and `(B, T, any)`; returns x's shape.
    """

    def __init__(self, width, heads, config, **kwargs):
        super().__init__(**kwargs)
        project = Dense if config.linear_projection else partial(PaddedConv2D, kernel_size=1)
        self.norm = GroupNorm(config.groups, epsilon=config.norm_epsilon, name="norm")
        self.proj_in = project(width, name="proj_in")
        self.block = TransformerBlock(width, heads, config.approximate_gelu, name="block")
        self.proj_out = project(width, name="proj_out")

    def call(self, inputs):
        inputs, context = inputs
        _, h, w, width = inputs.shape
        x = self.proj_in(self.norm(inputs))
        x = ops.reshape(x, (-1, h * w, width))  # (B, h, w, D) to (B, h * w, D)
        x = self.block([x, context])
        return inputs + self.proj_out(ops.reshape(x, (-1, h, w, width)))


class Upsample(Block):
    """Doubles height and width by repeating pixels, then convolves: `(B, h, w, D)`."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.repeat = UpSampling2D(2, data_format="channels_last")
        self.conv = PaddedConv2D(width, 3, padding=1, name="conv")

    def call(self, inputs):
        return self.conv(self.repeat(inputs))


class DiffusionModel(Pretrained, keras.Model):
    """Stable Diffusion 1's UNet.

    Args:
        img_height, img_width: size of the picture in pixels, multiples of 64.
        max_text_length: T, number of tokens of the context.
        name: name of the model.
        download_weights: whether to load the published parameters (CreativeML Open RAIL-M).
        config: a `UNetConfig`; None is the published one.

    Inputs `latent` `(B, h, w, in_channels)`, `timestep_embedding` `(B, widths[0])` and `context`
    `(B, T, context_width)`; output `(B, h, w, out_channels)`. All float.

    Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752; the layers are in the order
    of KerasCV's class of the same name.
    """

    config, published = SD1.unet, "kcv_diffusion_model.h5"

    def __init__(
        self,
        img_height,
        img_width,
        max_text_length,
        name=None,
        download_weights=True,
        config=None,
    ):
        def graph(c):
            h, w = img_height // c.latent_scale, img_width // c.latent_scale
            context = keras.Input((max_text_length, c.context_width), name="context")
            time = keras.Input((c.widths[0],), name="timestep_embedding")
            latent = keras.Input((h, w, c.in_channels), name="latent")
            return [latent, time, context], _unet(c, latent, time, context)

        super().__init__(graph, name, download_weights, config)


class DiffusionModelV2(DiffusionModel):
    """Stable Diffusion 2's UNet: heads of width 64, linear projections, a wider context."""

    config, published = SD2.unet, "diffusion_model_v2_1.h5"


def _unet(c, latent, time, context):
    """Down through the levels keeping each feature map, and up again taking them back."""

    def res(x, width, name):
        return ResnetBlock(width, c.groups, conditioned=True, name=name)([x, time])

    def attend(x, level, name):
        return SpatialTransformer(c.widths[level], c.heads[level], c, name=name)([x, context])

    time = Dense(4 * c.widths[0], name="time_embedding_1")(time)
    time = Activation("silu", name="time_embedding_act")(time)
    time = Dense(4 * c.widths[0], name="time_embedding_2")(time)

    levels = list(enumerate(c.widths))
    last = len(levels) - 1
    x = PaddedConv2D(c.widths[0], 3, padding=1, name="conv_in")(latent)
    skips = [x]
    for level, width in levels:
        for j in range(c.res_blocks):
            x = res(x, width, f"down_{level}_res_{j}")
            if c.attention[level]:
                x = attend(x, level, f"down_{level}_attn_{j}")
            skips.append(x)
        if level < last:
            name = f"down_{level}_downsample"
            x = PaddedConv2D(width, 3, padding=1, strides=2, name=name)(x)
            skips.append(x)

    x = res(x, c.widths[-1], "mid_res_0")
    x = attend(x, last, "mid_attn")
    x = res(x, c.widths[-1], "mid_res_1")

    for i, (level, width) in enumerate(reversed(levels)):
        for j in range(c.res_blocks + 1):
            x = Concatenate(name=f"up_{i}_concat_{j}")([x, skips.pop()])
            x = res(x, width, f"up_{i}_res_{j}")
            if c.attention[level]:
                x = attend(x, level, f"up_{i}_attn_{j}")
        if level:
            x = Upsample(width, name=f"up_{i}_upsample")(x)

    x = GroupNorm(c.groups, epsilon=1e-5, name="conv_norm_out")(x)
    x = Activation("silu", name="conv_act")(x)
    return PaddedConv2D(c.out_channels, 3, padding=1, name="conv_out")(x)
