"""The VAE's encoder: pictures to latents."""

from keras import Sequential, layers

from stable_diffusion.decoder import head, middle
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Pretrained
from stable_diffusion.resnet_block import ResnetBlock

HALVE = ((0, 1), (0, 1))  # padding before a stride of 2: bottom and right only, unlike the UNet


class ImageEncoder(Pretrained, Sequential):
    """Encodes pictures of any size; Stable Diffusion 1 and 2 share it.

    Args:
        download_weights: whether to load the published parameters (CreativeML Open RAIL-M).
        name: name of the model.
        config: a `VAEConfig`; None is the published one.

    Input `(B, H, W, 3)` in [-1, 1]; output `(B, h, w, 4)`, the posterior's mean scaled to unit
    variance. `layers[-2].output` are the unscaled moments `(B, h, w, 8)`: mean, then log variance.

    Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G.
    """

    part, preset, published = "vae", "SD1", "vae_encoder.h5"

    def __init__(self, download_weights=True, name=None, config=None):
        def graph(c):
            yield layers.Input((None, None, 3))
            yield PaddedConv2D(c.widths[0], 3, padding=1, name="conv_in")
            for i, width in enumerate(c.widths):
                for j in range(c.res_blocks):
                    yield ResnetBlock(width, c.groups, c.norm_epsilon, name=f"down_{i}_res_{j}")
                if i < len(c.widths) - 1:
                    yield PaddedConv2D(width, 3, HALVE, strides=2, name=f"down_{i}_downsample")
            yield from middle(c)
            yield from head(c, channels=2 * c.latent_channels)
            yield PaddedConv2D(2 * c.latent_channels, 1, name="quant_conv")
            n, scale = c.latent_channels, c.scaling_factor
            yield layers.Lambda(lambda x: x[..., :n] * scale, name="scaled_mean")

        super().__init__(lambda c: [list(graph(c))], name, download_weights, config)
