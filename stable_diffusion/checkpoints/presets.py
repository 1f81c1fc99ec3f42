"""The architectures that have a name, and KerasCV's departures undone."""

from dataclasses import replace

from stable_diffusion.checkpoints.config import SD1, SD2, Config, TextConfig, UNetConfig, VAEConfig

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


def original(config: Config) -> Config:
    """Returns `config` with KerasCV's departures from the original implementation undone.

    They are listed in `stable_diffusion.config`.
    """
    text = config.text
    if text.activation == "gelu_tanh":
        text = replace(text, activation="gelu", pad_token=0)
    return replace(
        config,
        text=text,
        unet=replace(config.unet, norm_epsilon=1e-6, approximate_gelu=False),
        vae=replace(config.vae, norm_epsilon=1e-6),
        schedule=replace(config.schedule, spacing="leading", steps_offset=1, final_alpha=None),
    )


__all__ = ["SD1", "SD1_INPAINTING", "SD2", "TINY", "TINY_V2", "original"]
