"""CLIP's text encoder, of Stable Diffusion 1 and 2."""

import keras
from keras import layers, ops

from stable_diffusion.attention_block import Attention
from stable_diffusion.block import Block
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.config import SD1, SD2
from stable_diffusion.pretrained import Pretrained

ACTIVATIONS = {
    # x sigmoid(1.702 x) and x Φ(x), where Φ is the normal distribution's cumulative function
    # (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2)
    "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x),  # OpenAI's CLIP, model.py, QuickGELU
    "gelu": lambda x: ops.gelu(x, approximate=False),  # OpenCLIP, the original of V2
    "gelu_tanh": lambda x: ops.gelu(x, approximate=True),  # KerasCV's V2
}


class CLIPEmbedding(Block):
    """Adds an embedding of each token's id to one of its position: `2 x (B, T)` to `(B, T, D)`."""

    def __init__(self, vocab_size, width, max_length, **kwargs):
        super().__init__(**kwargs)
        self.token_embedding = layers.Embedding(vocab_size, width, name="token_embedding")
        self.position_embedding = layers.Embedding(max_length, width, name="position_embedding")

    def call(self, inputs):
        tokens, positions = inputs
        return self.token_embedding(tokens) + self.position_embedding(positions)


class CLIPEncoderLayer(Block):
    """One transformer layer with causal attention: `(B, T, D)` to `(B, T, D)`.

    Args:
        width: D, number of features of a token.
        heads: number of attention heads.
        hidden: width of the feed-forward network between its two layers.
        activation: key of `ACTIVATIONS`.
    """

    def __init__(self, width, heads, hidden, activation, **kwargs):
        super().__init__(**kwargs)
        self.layer_norm1 = layers.LayerNormalization(epsilon=1e-5, name="layer_norm1")
        self.self_attn = Attention(width, heads, use_bias=True, causal=True, name="self_attn")
        self.layer_norm2 = layers.LayerNormalization(epsilon=1e-5, name="layer_norm2")
        self.fc1 = layers.Dense(hidden, ACTIVATIONS[activation], name="fc1")
        self.fc2 = layers.Dense(width, name="fc2")

    def call(self, inputs):
        x = self.layer_norm1(inputs)
        x = inputs + self.self_attn([x, x])
        return x + self.fc2(self.fc1(self.layer_norm2(x)))


class TextEncoder(Pretrained, keras.Model):
    """Stable Diffusion 1's text encoder: the context that the diffusion model attends to.

    Args:
        max_length: T, number of tokens of a prompt, 77 in all published checkpoints.
        vocab_size: number of token ids; None is the config's, 49408. Textual inversion adds to it.
        name: name of the model.
        download_weights: whether to load the published parameters (CreativeML Open RAIL-M).
        config: a `TextConfig`; None is the published one.

    Inputs `tokens` and `positions`, int32 `(B, T)`; output float `(B, T, D)`. `layers[2]` is the
    embedding, `layers[-2]` the last transformer layer.
    """

    default_config, published = SD1.text, "kcv_encoder.h5"

    def __init__(self, max_length, vocab_size=None, name=None, download_weights=True, config=None):
        c = config or self.default_config
        with uninitialized(download_weights):
            tokens = keras.Input((max_length,), dtype="int32", name="tokens")
            positions = keras.Input((max_length,), dtype="int32", name="positions")
            embed = CLIPEmbedding(
                vocab_size or c.vocab_size, c.width, max_length, name="clip_embedding"
            )
            x = embed([tokens, positions])
            for i in range(c.depth):
                x = CLIPEncoderLayer(c.width, c.heads, c.hidden, c.activation, name=f"layer_{i}")(x)
            x = layers.LayerNormalization(epsilon=1e-5, name="final_layer_norm")(x)
            super().__init__([tokens, positions], x, name=name)
        self.finish(c, download_weights)


class TextEncoderV2(TextEncoder):
    """Stable Diffusion 2's text encoder (OpenCLIP ViT-H, its last layer left out)."""

    default_config, published = SD2.text, "text_encoder_v2_1.h5"
