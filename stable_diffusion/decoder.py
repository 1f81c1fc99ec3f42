"""The VAE's decoder: latents to images."""

from keras import Sequential, layers

from stable_diffusion.attention_block import AttentionBlock
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.config import SD1
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Pretrained
from stable_diffusion.resnet_block import ResnetBlock


class Decoder(Pretrained, Sequential):
    """Decodes latents to images; Stable Diffusion 1 and 2 share it.

    Args:
        img_height, img_width: size of the image in pixels, multiples of 8.
        name: name of the model.
        download_weights: whether to load the published parameters (CreativeML Open RAIL-M).
        config: a `VAEConfig`; None is the published one.

    Input `(B, h, w, 4)`, scaled to unit variance; output `(B, H, W, 3)`, nominally in [-1, 1].

    Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G.
    """

    default_config, published = SD1.vae, "kcv_decoder.h5"

    def __init__(self, img_height, img_width, name=None, download_weights=True, config=None):
        c = config or self.default_config
        h, w = img_height // c.cell_size, img_width // c.cell_size
        with uninitialized(download_weights):
            super().__init__(
                [
                    layers.Input((h, w, c.latent_channels)),
                    layers.Rescaling(1.0 / c.scaling_factor, name="unscale"),
                    PaddedConv2D(c.latent_channels, 1, name="post_quant_conv"),
                    PaddedConv2D(c.widths[-1], 3, padding=1, name="conv_in"),
                    *middle_layers(c),
                    *(layer for i in range(len(c.widths)) for layer in _up_stage(c, i)),
                    *output_layers(c, channels=3),
                ],
                name=name,
            )
        self.finish(c, download_weights)


def middle_layers(c):
    """Returns the layers of the coarsest stage, which the decoder and the encoder have alike."""
    width, groups, epsilon = c.widths[-1], c.groups, c.norm_epsilon
    return [
        ResnetBlock(width, groups, epsilon, name="mid_res_0"),
        AttentionBlock(width, groups, epsilon, name="mid_attn"),
        ResnetBlock(width, groups, epsilon, name="mid_res_1"),
    ]


def output_layers(c, channels):
    """Returns the last layers, which the decoder and the encoder have alike."""
    return [
        layers.GroupNormalization(c.groups, epsilon=c.norm_epsilon, name="conv_norm_out"),
        layers.Activation("silu", name="conv_act"),
        PaddedConv2D(channels, 3, padding=1, name="conv_out"),
    ]


def _up_stage(c, i):
    """Returns the layers of stage i, the coarsest first; all but the last double the size."""
    width = c.widths[-1 - i]
    stage = [
        ResnetBlock(width, c.groups, c.norm_epsilon, name=f"up_{i}_res_{j}")
        for j in range(c.res_blocks + 1)
    ]
    if i < len(c.widths) - 1:
        stage += [
            layers.UpSampling2D(2, data_format="channels_last", name=f"up_{i}_repeat"),
            PaddedConv2D(width, 3, padding=1, name=f"up_{i}_upsample"),
        ]
    return stage
