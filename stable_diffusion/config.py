"""Every number that tells one Stable Diffusion from another.

Each model is built from one frozen dataclass. The defaults are Stable Diffusion 1 as KerasCV builds
it. KerasCV departs from the original implementation (CompVis, diffusers) in a few places;
each departure is one field, and `undo_departures` sets them all:

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

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal

from stable_diffusion.checks import check_fields
from stable_diffusion.noise_scheduler import NoiseScheduler

BOUNDS = {  # of the numbers below: the least and the largest, far above all that was published
    "width": (1, 8192),
    "widths": (1, 8192),
    "hidden": (1, 65536),
    "context_width": (1, 8192),
    "depth": (1, 100),
    "res_blocks": (1, 100),
    "encoder_blocks": (1, 100),
    "decoder_blocks": (1, 100),
    "heads": (1, 1024),
    "vocab_size": (1, 10_000_000),
    "pad_token": (0, 10_000_000),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "latent_channels": (1, 1024),
    "groups": (1, 8192),
    "guidance_width": (4, 8192),
    "norm_epsilon": (1e-12, 0.1),
    "cell_size": (1, 1024),
    "scaling_factor": (1e-6, 1e6),
    "size": (1, 65536),
    "guidance_scale": (0, 1e6),
}


class Checked:
    """A config whose numbers are checked before anything of their size is made.

    Raises:
        ValueError: a field of another type or outside its `BOUNDS`, or one that does not divide a
            width.
    """

    def __post_init__(self):
        check_fields(self, BOUNDS)

    def check_divisor(self, field, *pairs):
        """Raises a ValueError unless each divisor divides its width, in `(divisor, width)`."""
        if wrong := [pair for pair in pairs if pair[1] % pair[0]]:
            raise ValueError(
                f"{field} must divide each width, but {wrong[0][0]} not {wrong[0][1]}."
            )


@dataclass(frozen=True)
class TextConfig(Checked):
    """The CLIP text encoder. Reference: Radford et al. 2021, https://arxiv.org/abs/2103.00020."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    vocab_size: int = 49408
    pad_token: int | None = None  # None is the end-of-text token

    def __post_init__(self):
        super().__post_init__()
        self.check_divisor("heads", (self.heads, self.width))


@dataclass(frozen=True)
class UNetConfig(Checked):
    """The diffusion model. Reference: Rombach et al. 2022, https://arxiv.org/abs/2112.10752.

    `widths`, `heads` and `attention` have one entry for each stage, the finest first.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    attention: tuple[bool, ...] = (True, True, True, False)
    context_width: int = 768
    res_blocks: int = 2
    in_channels: int = 4  # 9 for inpainting: latent, mask, latent of the masked image
    out_channels: int = 4
    linear_projection: bool = False  # around each transformer: Dense, or 1x1 convolution
    groups: int = 32
    norm_epsilon: float = 1e-5
    approximate_gelu: bool = True
    cell_size: int = 8  # pixels a latent cell is wide, set by the VAE
    middle: bool = True  # whether there is a middle between the ways down and up
    guidance_width: int | None = None  # of an embedding of the guidance scale, if it sees one

    def __post_init__(self):
        super().__post_init__()
        if not len(self.widths) == len(self.heads) == len(self.attention):
            raise ValueError(
                f"widths, heads and attention must have an entry for each stage, not "
                f"{len(self.widths)}, {len(self.heads)} and {len(self.attention)}."
            )
        self.check_divisor("heads", *zip(self.heads, self.widths, strict=True))
        self.check_divisor("groups", *((self.groups, width) for width in self.widths))


@dataclass(frozen=True)
class VAEConfig(Checked):
    """The autoencoder. Reference: Esser et al. 2021, https://arxiv.org/abs/2012.09841."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    norm_epsilon: float = 1e-5
    scaling_factor: float = 0.18215  # brings the latents of SD's VAE to unit variance

    def __post_init__(self):
        super().__post_init__()
        self.check_divisor("groups", *((self.groups, width) for width in self.widths))

    @property
    def cell_size(self):
        """How many pixels wide a latent cell is: each stage but the last halves the image."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class TinyVAEConfig(Checked):
    """A tiny autoencoder, TAESD, whose latents have unit variance already.

    `encoder_blocks` and `decoder_blocks` have the number of residual blocks in each stage, in the
    order in which they are computed: the encoder's finest first, the decoder's coarsest first.

    Reference: Ollin Boer Bohan 2023, https://github.com/madebyollin/taesd.
    """

    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    scaling_factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(
                f"encoder_blocks and decoder_blocks must have an entry for each stage, not "
                f"{len(self.encoder_blocks)} and {len(self.decoder_blocks)}."
            )

    @property
    def widths(self):
        """The width of each stage."""
        return (self.width,) * len(self.encoder_blocks)

    @property
    def cell_size(self):
        """How many pixels wide a latent cell is, see `VAEConfig`."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class SamplerConfig(Checked):
    """The sampler that a checkpoint names, in the words of its scheduler config.

    `scheduler` is a class of diffusers, `algorithm` its algorithm_type. `spacing` is "karras", or
    the class' own one where the config names none; None is the spacing of the noise schedule.
    """

    scheduler: str = "DDIMScheduler"
    algorithm: str | None = None
    spacing: str | None = None


@dataclass(frozen=True)
class Config(Checked):
    """A whole Stable Diffusion.

    `size` is the side in pixels of its training images, `guidance_scale` the default of the
    pipeline's `unconditional_guidance_scale`, `sampler` what `sampler="auto"` means.
    """

    text: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig | TinyVAEConfig = VAEConfig()
    schedule: NoiseScheduler = NoiseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    size: int = 512
    guidance_scale: float = 7.5  # KerasCV's default
    sampler: SamplerConfig = SamplerConfig()

    def resolve_size(self, height=None, width=None):
        """Returns the height and width of an image: `size` for those that are None.

        Raises:
            ValueError: a size that the UNet cannot halve at each stage but the last.
        """
        multiple = self.unet.cell_size * 2 ** (len(self.unet.widths) - 1)
        sizes = [self.size if size is None else size for size in (height, width)]
        for size in sizes:
            if not isinstance(size, Integral) or size < multiple or size % multiple:
                raise ValueError(f"Image sizes are multiples of {multiple} pixels, not {size!r}.")
        return tuple(map(int, sizes))


COMPONENTS = {  # the four models of a pipeline, and the field of `Config` that each is built from
    "text_encoder": "text",
    "diffusion_model": "unet",
    "decoder": "vae",
    "image_encoder": "vae",
}

SD1 = Config()
SD2 = Config(
    TextConfig(1024, 23, 16, 4096, "gelu_tanh"),
    UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
)
SD1_INPAINTING = replace(SD1, unet=UNetConfig(in_channels=9))
TINY = Config(  # for tests and demonstrations: every kind of layer, few parameters
    TextConfig(32, 2, 4, 64),
    UNetConfig((32, 64), (2, 4), (True, False), 32, res_blocks=1, groups=16),
    VAEConfig((16, 16, 32, 32), res_blocks=1, groups=8),
    size=64,
)
TINY_V2 = replace(
    TINY,
    text=TextConfig(32, 2, 4, 64, "gelu_tanh"),
    unet=replace(TINY.unet, heads=(4, 8), linear_projection=True),
)


def undo_departures(config: Config) -> Config:
    """Returns `config` with KerasCV's departures from the original implementation undone."""
    text, vae = config.text, config.vae
    if text.activation == "gelu_tanh":
        text = replace(text, activation="gelu", pad_token=0)
    return replace(
        config,
        text=text,
        unet=replace(config.unet, norm_epsilon=1e-6, approximate_gelu=False),
        vae=replace(vae, norm_epsilon=1e-6) if isinstance(vae, VAEConfig) else vae,
        schedule=replace(config.schedule, spacing="leading", steps_offset=1, final_alpha=None),
    )
