"""The UNet that predicts the noise in a latent."""

from functools import partial

import keras
from keras import layers, ops

from stable_diffusion.attention_block import Attention
from stable_diffusion.block import Block
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.config import SD1, SD2
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Pretrained
from stable_diffusion.resnet_block import ResnetBlock


class GEGLU(Block):
    """A linear layer gated by the GELU of another: `(B, T, D)` to `(B, T, width)`.

    Reference: Shazeer 2020, https://arxiv.org/abs/2002.05202. Both layers are one matrix, values
    first. KerasCV computes GELU's tanh approximation, the original the exact one.
    """

    def __init__(self, width, approximate=True, **kwargs):
        super().__init__(**kwargs)
        self.approximate = approximate
        self.proj = layers.Dense(2 * width, name="proj")

    def call(self, inputs):
        # (x V + c) GELU(x W + b), element by element (section 2)
        x, gate = ops.split(self.proj(inputs), 2, axis=-1)
        return x * ops.gelu(gate, approximate=self.approximate)


class SpatialTransformer(Block):
    """A transformer block over all cells of a feature map, between two projections.

    Self-attention, attention to the context and GEGLU: each after LayerNorm, and each beside a
    residual connection.

    Args:
        width: number of channels, of input and output alike.
        heads: number of attention heads.
        c: the `UNetConfig` with the kind of projection, normalisation and GELU.

    Called on `[x, context]` of shapes `(B, h, w, width)` and `(B, T, any)`; returns x's shape.
    """

    def __init__(self, width, heads, c, **kwargs):
        super().__init__(**kwargs)
        project = layers.Dense if c.linear_projection else partial(PaddedConv2D, kernel_size=1)
        self.norm = layers.GroupNormalization(c.groups, epsilon=c.norm_epsilon, name="norm")
        self.proj_in = project(width, name="proj_in")
        self.norm1 = layers.LayerNormalization(epsilon=1e-5, name="norm1")
        self.attn1 = Attention(width, heads, name="attn1")
        self.norm2 = layers.LayerNormalization(epsilon=1e-5, name="norm2")
        self.attn2 = Attention(width, heads, name="attn2")
        self.norm3 = layers.LayerNormalization(epsilon=1e-5, name="norm3")
        self.geglu = GEGLU(4 * width, c.approximate_gelu, name="geglu")
        self.ff_out = layers.Dense(width, name="ff_out")
        self.proj_out = project(width, name="proj_out")

    def call(self, inputs):
        inputs, context = inputs
        x = self.proj_in(self.norm(inputs))
        tokens = self.norm1(x)
        x = x + self.attn1([tokens, tokens])
        x = x + self.attn2([self.norm2(x), context])
        x = x + self.ff_out(self.geglu(self.norm3(x)))
        return inputs + self.proj_out(x)


class DiffusionModel(Pretrained, keras.Model):
    """Stable Diffusion 1's UNet: predicts the noise in a latent, from its timestep and a prompt.

    It goes down through the stages, from the finest to the coarsest, and up again. Each feature map
    of the way down comes back on the way up, beside the one from below (`concat`). For an image of
    512x512 pixels, with shapes (h, w, channels):

        latent (64, 64, 4)                                               noise (64, 64, 4)
        conv_in (64, 64, 320)                                            conv_out
        stage 0   2 x (res, attn)  (64, 64, 320)  --- 3 maps ->  3 x (concat, res, attn)
                  downsample       (32, 32, 320)                 upsample  (64, 64, 640)
        stage 1   2 x (res, attn)  (32, 32, 640)  --- 3 maps ->  3 x (concat, res, attn)
                  downsample       (16, 16, 640)                 upsample  (32, 32, 1280)
        stage 2   2 x (res, attn)  (16, 16, 1280) --- 3 maps ->  3 x (concat, res, attn)
                  downsample       (8, 8, 1280)                  upsample  (16, 16, 1280)
        stage 3   2 x (res)        (8, 8, 1280)   --- 3 maps ->  3 x (concat, res)
        middle    res, attn, res   (8, 8, 1280)   ------------>  upwards

    `res` is a `ResnetBlock`, which sees the timestep; `attn` is a `SpatialTransformer`, which sees
    the context. Layers are called down_0_res_0, down_0_attn_0, ..., mid_res_0, ..., up_0_res_0,
    where up_0 is the coarsest stage.

    Args:
        img_height, img_width: size of the image in pixels, multiples of 64.
        max_text_length: T, number of tokens of the context; None for any number.
        name: name of the model.
        download_weights: whether to load the published parameters (CreativeML Open RAIL-M).
        config: a `UNetConfig`; None is the published one.

    Inputs `latent` `(B, h, w, in_channels)`, `timestep_embedding` `(B, widths[0])`, `context`
    `(B, T, context_width)` and, where the config has a guidance_width, `guidance_embedding`
    `(B, guidance_width)`; output `(B, h, w, out_channels)`. All float.

    Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752; the layers are in the order
    of KerasCV's class of the same name.
    """

    default_config, published = SD1.unet, "kcv_diffusion_model.h5"

    def __init__(
        self, img_height, img_width, max_text_length, name=None, download_weights=True, config=None
    ):
        c = config or self.default_config
        h, w = img_height // c.cell_size, img_width // c.cell_size
        with uninitialized(download_weights):
            context = keras.Input((max_text_length, c.context_width), name="context")
            time = keras.Input((c.widths[0],), name="timestep_embedding")
            latent = keras.Input((h, w, c.in_channels), name="latent")
            inputs = [latent, time, context]
            if c.guidance_width:
                inputs.append(keras.Input((c.guidance_width,), name="guidance_embedding"))
            super().__init__(inputs, _unet(c, *inputs), name=name)
        self.finish(c, download_weights)


class DiffusionModelV2(DiffusionModel):
    """Stable Diffusion 2's UNet: heads of width 64, linear projections, a wider context."""

    default_config, published = SD2.unet, "diffusion_model_v2_1.h5"


def _unet(c, latent, time, context, guidance=None):
    """Returns the output of the UNet: down through the stages, and up again."""
    if guidance is not None:
        project = layers.Dense(c.widths[0], use_bias=False, name="time_embedding_guidance")
        time = layers.Add(name="time_embedding_add")([time, project(guidance)])
    time = layers.Dense(4 * c.widths[0], name="time_embedding_1")(time)
    time = layers.Activation("silu", name="time_embedding_act")(time)
    time = layers.Dense(4 * c.widths[0], name="time_embedding_2")(time)

    last = len(c.widths) - 1
    x = PaddedConv2D(c.widths[0], 3, padding=1, name="conv_in")(latent)
    skips = [x]
    for i, width in enumerate(c.widths):
        for j in range(c.res_blocks):
            x = ResnetBlock(width, c.groups, conditioned=True, name=f"down_{i}_res_{j}")([x, time])
            if c.attention[i]:
                attend = SpatialTransformer(width, c.heads[i], c, name=f"down_{i}_attn_{j}")
                x = attend([x, context])
            skips.append(x)
        if i < last:
            x = PaddedConv2D(width, 3, padding=1, strides=2, name=f"down_{i}_downsample")(x)
            skips.append(x)

    if c.middle:
        x = ResnetBlock(width, c.groups, conditioned=True, name="mid_res_0")([x, time])
        x = SpatialTransformer(width, c.heads[last], c, name="mid_attn_0")([x, context])
        x = ResnetBlock(width, c.groups, conditioned=True, name="mid_res_1")([x, time])

    for i, width in enumerate(reversed(c.widths)):
        stage = last - i
        for j in range(c.res_blocks + 1):
            x = layers.Concatenate(name=f"up_{i}_concat_{j}")([x, skips.pop()])
            x = ResnetBlock(width, c.groups, conditioned=True, name=f"up_{i}_res_{j}")([x, time])
            if c.attention[stage]:
                attend = SpatialTransformer(width, c.heads[stage], c, name=f"up_{i}_attn_{j}")
                x = attend([x, context])
        if stage:
            repeat = layers.UpSampling2D(2, data_format="channels_last")
            conv = PaddedConv2D(width, 3, padding=1, name="conv")
            x = keras.Sequential([repeat, conv], name=f"up_{i}_upsample")(x)

    x = layers.GroupNormalization(c.groups, epsilon=1e-5, name="conv_norm_out")(x)
    x = layers.Activation("silu", name="conv_act")(x)
    return PaddedConv2D(c.out_channels, 3, padding=1, name="conv_out")(x)
