"""Around classifier-free guidance: its scale as a model's input, the spread of what it predicts."""

import numpy as np

LONGEST_PERIOD = 10_000.0  # over 2π
FACTOR = 1000.0  # of the scale


def embed_guidance(scale, width, batch_size):
    """Encodes a guidance scale for a UNet that was trained to follow it in a single pass.

    Args:
        scale: the guidance scale; 1 is none.
        width: number of features.
        batch_size: B, number of images.

    Returns:
        float32 array `(B, width)`: sines, then cosines; 0 at the end if the width is odd.

    Reference: Meng et al. 2023, https://arxiv.org/abs/2210.03142, section 3.1, of w = scale - 1;
    as diffusers' `get_guidance_scale_embedding`.
    """
    half = width // 2
    angles = FACTOR * (scale - 1) * LONGEST_PERIOD ** (-np.arange(half) / (half - 1))
    row = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])
    return np.tile(row.astype("float32"), (batch_size, 1))


def rescale_guidance(guided, output, share):
    """Brings a guided prediction to the spread of the one that it was made of.

    Strong guidance predicts values that are too large, which overexposes images, above all where
    sampling begins without any signal.

    Args:
        guided: what guidance predicts, float array `(B, h, w, C)`.
        output: what the model predicts of the prompt, of the same shape.
        share: how much of the way, from 0 to 1.

    Returns:
        Float array `(B, h, w, C)`.

    Reference: Lin et al. 2024, https://arxiv.org/abs/2305.08891, equations 15 and 16.
    """
    # φ x_guided std(x_prompt) / std(x_guided) + (1-φ) x_guided (equations 15 and 16)
    spread = output.std((1, 2, 3), keepdims=True) / guided.std((1, 2, 3), keepdims=True)
    return guided * (share * spread + (1 - share))
