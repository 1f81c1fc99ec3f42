"""The VAE's decoder: latents to pictures."""

from keras import Sequential, layers

from stable_diffusion.attention_block import AttentionBlock
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Pretrained
from stable_diffusion.resnet_block import ResnetBlock


def middle(c):
    """Returns the layers at the coarsest level, which decoder and encoder have alike."""
    kinds = {"mid_res_0": ResnetBlock, "mid_attn": AttentionBlock, "mid_res_1": ResnetBlock}
    return [kind(c.widths[-1], c.groups, c.norm_epsilon, name=n) for n, kind in kinds.items()]


def head(c, channels):
    """Yields the layers that end decoder and encoder alike, with `channels` of output."""
    yield layers.GroupNormalization(c.groups, epsilon=c.norm_epsilon, name="conv_norm_out")
    yield layers.Activation("silu", name="conv_act")
    yield PaddedConv2D(channels, 3, padding=1, name="conv_out")


class Decoder(Pretrained, Sequential):
    """Decodes latents; Stable Diffusion 1 and 2 share it.

    Args:
        img_height, img_width: size of the picture in pixels, multiples of 8.
        name: name of the model.
        download_weights: whether to load the published parameters (CreativeML Open RAIL-M).
        config: a `VAEConfig`; None is the published one.

    Input `(B, h, w, 4)`, scaled to unit variance; output `(B, H, W, 3)`, nominally in [-1, 1].

    Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G.
    """

    part, preset, published = "vae", "SD1", "kcv_decoder.h5"

    def __init__(self, img_height, img_width, name=None, download_weights=True, config=None):
        def graph(c):
            last = len(c.widths) - 1
            yield layers.Input((img_height >> last, img_width >> last, c.latent_channels))
            yield layers.Rescaling(1.0 / c.scaling_factor, name="unscale")
            yield PaddedConv2D(c.latent_channels, 1, name="post_quant_conv")
            yield PaddedConv2D(c.widths[-1], 3, padding=1, name="conv_in")
            yield from middle(c)
            for i, width in enumerate(reversed(c.widths)):
                for j in range(c.res_blocks + 1):
                    yield ResnetBlock(width, c.groups, c.norm_epsilon, name=f"up_{i}_res_{j}")
                if i < last:
                    yield layers.UpSampling2D(2, data_format="channels_last", name=f"up_{i}_repeat")
                    yield PaddedConv2D(width, 3, padding=1, name=f"up_{i}_upsample")
            yield from head(c, channels=3)

        super().__init__(lambda c: [list(graph(c))], name, download_weights, config)
