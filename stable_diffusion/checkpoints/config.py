"""Every number that tells one Stable Diffusion from another.

Each model is built from one frozen dataclass, whose defaults are Stable Diffusion 1 as KerasCV
builds it. KerasCV departs from the original implementation (CompVis, diffusers) in a few places;
each departure is one field, and `presets.original` sets them all:

| field                         | KerasCV     | original  | what it changes                     |
|-------------------------------|-------------|-----------|-------------------------------------|
| `VAEConfig.norm_epsilon`      | 1e-5        | 1e-6      | GroupNorm of the VAE                |
| `UNetConfig.norm_epsilon`     | 1e-5        | 1e-6      | GroupNorm before each transformer   |
| `UNetConfig.approximate_gelu` | True        | False     | GELU of GEGLU: tanh or exact        |
| `TextConfig.activation` (V2)  | "gelu_tanh" | "gelu"    | GELU of the text encoder            |
| `TextConfig.pad_token` (V2)   | end of text | 0         | what fills a prompt up to 77 tokens |
| `NoiseScheduler.spacing`      | "linspace"  | "leading" | which timesteps DDIM visits         |
| `NoiseScheduler.steps_offset` | 0           | 1         | added to "leading" timesteps        |
| `NoiseScheduler.final_alpha`  | 1.0         | None      | alpha_prev of the last step         |
"""

from dataclasses import dataclass

from stable_diffusion.noise_scheduler import NoiseScheduler


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text encoder. Reference: Radford et al. 2021, https://arxiv.org/abs/2103.00020."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "quick_gelu"  # or "gelu", "gelu_tanh"
    vocab_size: int = 49408
    pad_token: int | None = None  # None is the end-of-text token


@dataclass(frozen=True)
class UNetConfig:
    """The diffusion model. Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752.

    `widths`, `heads` and `attention` have one entry a resolution level, the finest first.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    attention: tuple[bool, ...] = (True, True, True, False)
    context_width: int = 768
    res_blocks: int = 2
    in_channels: int = 4  # 9 for inpainting: latent, mask, latent of the masked picture
    out_channels: int = 4
    linear_projection: bool = False  # around each transformer: Dense, or 1x1 convolution
    groups: int = 32
    norm_epsilon: float = 1e-5
    approximate_gelu: bool = True
    latent_scale: int = 8  # pixels a latent cell is wide, set by the VAE


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder. Reference: Esser et al. 2021, https://arxiv.org/abs/2012.09841."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    norm_epsilon: float = 1e-5
    scaling_factor: float = 0.18215  # brings the latents of SD's VAE to unit variance


@dataclass(frozen=True)
class Config:
    """A whole Stable Diffusion; `size` is the side in pixels it was trained at."""

    text: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    schedule: NoiseScheduler = NoiseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    size: int = 512

    def picture_size(self, height=None, width=None):
        """Returns height and width of a picture, `size` where they are None.

        Raises:
            ValueError: the UNet, which halves a latent at each level but the first, can't have it.
        """
        multiple = self.unet.latent_scale * 2 ** (len(self.unet.widths) - 1)
        height, width = height or self.size, width or self.size
        for size in (height, width):
            if not isinstance(size, int) or size < multiple or size % multiple:
                raise ValueError(f"Picture sizes are multiples of {multiple} pixels, not {size!r}.")
        return height, width


SD1 = Config()
SD2 = Config(
    TextConfig(1024, 23, 16, 4096, "gelu_tanh"),
    UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
)
