"""The VAE's encoder: images to latents."""

import keras
from keras import Sequential, layers

from stable_diffusion.block import compile_like, cut_model
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.config import SD1
from stable_diffusion.decoder import middle_layers, output_layers
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Pretrained
from stable_diffusion.resnet_block import ResnetBlock

HALVE = ((0, 1), (0, 1))  # padding before a stride of 2: bottom and right only, unlike the UNet


class ImageEncoder(Pretrained, Sequential):
    """Encodes images of any size; Stable Diffusion 1 and 2 share it.

    Args:
        download_weights: whether to load the published parameters (CreativeML Open RAIL-M).
        name: name of the model.
        config: a `VAEConfig`; None is the published one.

    Input `(B, H, W, 3)` in [-1, 1]; output `(B, h, w, 4)`, the posterior's mean scaled to unit
    variance. `layers[-2].output` are the unscaled moments `(B, h, w, 8)`: mean, then log variance.

    Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G.
    """

    default_config, published = SD1.vae, "vae_encoder.h5"

    def __init__(self, download_weights=True, name=None, config=None):
        c = config or self.default_config
        n, scale = c.latent_channels, c.scaling_factor
        with uninitialized(download_weights):
            super().__init__(
                [
                    layers.Input((None, None, 3)),
                    PaddedConv2D(c.widths[0], 3, padding=1, name="conv_in"),
                    *(layer for i in range(len(c.widths)) for layer in _down_stage(c, i)),
                    *middle_layers(c),
                    *output_layers(c, channels=2 * n),
                    PaddedConv2D(2 * n, 1, name="quant_conv"),
                    layers.Lambda(lambda x: x[..., :n] * scale, name="scaled_mean"),
                ],
                name=name,
            )
        self.finish(c, download_weights)


def encode_moments(encoder, images):
    """Returns what an `ImageEncoder` says of images: mean and log variance of the posterior.

    Args:
        encoder: the model.
        images: float array `(B, H, W, 3)` in [-1, 1].

    Returns:
        float array `(B, h, w, 8)`, not scaled to unit variance.
    """
    return cut_model(encoder, _cut_moments).predict_on_batch(images)


def _cut_moments(encoder):
    model = keras.Model(encoder.inputs[0], encoder.layers[-2].output)
    compile_like(model, encoder)
    return model


def _down_stage(c, i):
    """Returns the layers of stage i, the finest first; all but the last halve the size."""
    width = c.widths[i]
    stage = [
        ResnetBlock(width, c.groups, c.norm_epsilon, name=f"down_{i}_res_{j}")
        for j in range(c.res_blocks)
    ]
    if i < len(c.widths) - 1:
        stage += [PaddedConv2D(width, 3, HALVE, strides=2, name=f"down_{i}_downsample")]
    return stage
