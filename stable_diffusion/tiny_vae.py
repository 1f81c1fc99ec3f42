"""TAESD, a tiny VAE: the same latents as Stable Diffusion's VAE, nearly as good, far less work.

The decoder has 1.2 million parameters where Stable Diffusion's has 49. It is for previews of each
step, and for slow computers: `StableDiffusion(vae="folder-of-taesd")`. There is no attention and no
normalization, only convolutions of one width with ReLU.

Reference: Ollin Boer Bohan 2023, https://github.com/madebyollin/taesd.
"""

from functools import partial

from keras import Sequential, layers, ops

from stable_diffusion.block import Block
from stable_diffusion.checkpoints.formats import open_vae
from stable_diffusion.config import TinyVAEConfig
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Pretrained

LIMIT = 3.0  # of a latent's values, which the decoder presses softly into this range
LOG_VARIANCE = -30.0  # of the encoder's posterior, which has none: the least that diffusers knows


class TinyDecoder(Pretrained, Sequential):
    """Decodes latents to images, with the arguments of `Decoder`.

    Args:
        img_height, img_width: size of the image in pixels, multiples of 8; None is any.
        name: name of the model.
        download_weights: must be False: KerasCV published no such parameters. `load_decoder`
            returns a decoder with parameters.
        config: a `TinyVAEConfig`; None is the published one.

    Input `(B, h, w, 4)`, of unit variance; output `(B, H, W, 3)`, nominally in [-1, 1].
    """

    default_config = TinyVAEConfig()

    def __init__(self, img_height, img_width, name=None, download_weights=False, config=None):
        c = config or self.default_config
        _refuse_download(download_weights)
        sizes = [size and size // c.cell_size for size in (img_height, img_width)]
        super().__init__(
            [
                layers.Input((*sizes, c.latent_channels)),
                layers.Rescaling(1.0 / c.scaling_factor, name="unscale"),
                layers.Lambda(lambda x: LIMIT * ops.tanh(x / LIMIT), name="limit"),
                PaddedConv2D(c.width, 3, padding=1, name="conv_in"),
                layers.Activation("relu", name="conv_act"),
                *(layer for i in range(len(c.decoder_blocks)) for layer in _up_stage(c, i)),
                PaddedConv2D(3, 3, padding=1, name="conv_out"),
                layers.Rescaling(2.0, -1.0, name="normalize"),
            ],
            name=name,
        )
        self.finish(c, False)


class TinyEncoder(Pretrained, Sequential):
    """Encodes images of any size, with the arguments of `ImageEncoder`.

    Args:
        download_weights: must be False, see `TinyDecoder`.
        name: name of the model.
        config: a `TinyVAEConfig`; None is the published one.

    Input `(B, H, W, 3)` in [-1, 1]; output `(B, h, w, 4)`, of unit variance. As in `ImageEncoder`,
    `layers[-2].output` are mean and log variance `(B, h, w, 8)`. The variance is next to nothing.
    """

    default_config = TinyVAEConfig()

    def __init__(self, download_weights=False, name=None, config=None):
        c = config or self.default_config
        _refuse_download(download_weights)
        n, scale = c.latent_channels, c.scaling_factor
        super().__init__(
            [
                layers.Input((None, None, 3)),
                layers.Rescaling(0.5, 0.5, name="unnormalize"),
                PaddedConv2D(c.width, 3, padding=1, name="conv_in"),
                *(layer for i in range(len(c.encoder_blocks)) for layer in _down_stage(c, i)),
                PaddedConv2D(n, 3, padding=1, name="conv_out"),
                layers.Lambda(_add_variance, name="moments"),
                layers.Lambda(lambda x: x[..., :n] * scale, name="scaled_mean"),
            ],
            name=name,
        )
        self.finish(c, False)


class TinyBlock(Block):
    """Three convolutions beside a residual connection, each followed by ReLU.

    Args:
        width: number of channels of the input and the output, `(B, H, W, width)`.
    """

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.conv1 = PaddedConv2D(width, 3, padding=1, name="conv1")
        self.conv2 = PaddedConv2D(width, 3, padding=1, name="conv2")
        self.conv3 = PaddedConv2D(width, 3, padding=1, name="conv3")

    def call(self, inputs):
        x = ops.relu(self.conv1(inputs))
        x = ops.relu(self.conv2(x))
        return ops.relu(self.conv3(x) + inputs)


def load_decoder(path, img_height=None, img_width=None) -> TinyDecoder:
    """Returns the decoder of a tiny VAE on its own, for instance to look at each step's x0.

        decoder = load_decoder("taesd_decoder.safetensors")
        images = quantize_pixels(decoder.predict_on_batch(x0))

    Args:
        path: whatever `vae` may be of `checkpoints.open_checkpoint`.
        img_height, img_width: size of the images in pixels; None is any.

    Raises:
        ValueError: it is another VAE, or none.
    """
    reader = open_vae(path)
    if not isinstance(reader.config.vae, TinyVAEConfig):
        raise ValueError(f"{str(path)!r:.200} must be a tiny VAE (TAESD); it is an ordinary one.")
    return reader.build("decoder", partial(TinyDecoder, img_height, img_width))


def _refuse_download(download_weights):
    if download_weights:
        raise ValueError(
            "download_weights must be False for a tiny VAE; "
            'StableDiffusion(vae="hf://madebyollin/taesd") downloads it.'
        )


def _add_variance(mean):
    """Returns moments as an `ImageEncoder` has them, with a variance of next to nothing."""
    return ops.concatenate([mean, ops.full_like(mean, LOG_VARIANCE)], axis=-1)


def _up_stage(c, i):
    """Returns the layers of stage i, the coarsest first; all but the last double the size."""
    stage = [TinyBlock(c.width, name=f"up_{i}_res_{j}") for j in range(c.decoder_blocks[i])]
    if i < len(c.decoder_blocks) - 1:
        stage += [
            layers.UpSampling2D(2, data_format="channels_last", name=f"up_{i}_repeat"),
            PaddedConv2D(c.width, 3, padding=1, use_bias=False, name=f"up_{i}_upsample"),
        ]
    return stage


def _down_stage(c, i):
    """Returns the layers of stage i, the finest first; all but the last halve the size."""
    stage = [TinyBlock(c.width, name=f"down_{i}_res_{j}") for j in range(c.encoder_blocks[i])]
    if i < len(c.encoder_blocks) - 1:
        name = f"down_{i}_downsample"
        stage += [PaddedConv2D(c.width, 3, 1, strides=2, use_bias=False, name=name)]
    return stage
