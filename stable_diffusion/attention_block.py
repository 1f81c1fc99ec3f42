"""Attention: one pure function, and the two layers made of it."""

from keras import ops
from keras.layers import Dense, GroupNormalization, Layer

from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Block


def attention(query, key, value, heads, causal=False):
    """Computes softmax(q kᵀ / √d) v in each of `heads` heads of width d = D / heads.

    Args:
        query: `(B, T, D)`.
        key, value: `(B, S, D)`.
        heads: number of heads, a divisor of D.
        causal: whether token t sees only tokens up to t.

    Returns:
        `(B, T, D)`.

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1.
    """

    width = query.shape[-1]

    def split(x):  # (B, T, D) to (B, T, heads, D / heads)
        return ops.reshape(x, (-1, ops.shape(x)[1], heads, width // heads))

    out = ops.dot_product_attention(split(query), split(key), split(value), is_causal=causal)
    return ops.reshape(out, (-1, ops.shape(query)[1], width))


class Attention(Block):
    """Multi-head attention of tokens to themselves, or to a context.

    Used with biases and causal mask by the text encoder, without either by the UNet.

    Args:
        width: D, number of features of a token.
        heads: number of heads.
        use_bias: whether queries, keys and values have a bias; the output always has one.
        causal: whether a token sees only itself and those before it.

    Called on `[x, context]` of shapes `(B, T, any)` and `(B, S, any)`, the same tensor twice for
    self-attention; returns `(B, T, D)`.
    """

    def __init__(self, width, heads, use_bias=False, causal=False, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.causal = heads, causal
        self.to_q = Dense(width, use_bias=use_bias, name="to_q")
        self.to_k = Dense(width, use_bias=use_bias, name="to_k")
        self.to_v = Dense(width, use_bias=use_bias, name="to_v")
        self.to_out = Dense(width, name="to_out")

    def call(self, inputs):
        x, context = inputs
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attention(q, k, v, self.heads, self.causal))


class AttentionBlock(Layer):
    """One-head attention between all positions of a feature map, around a shortcut (VAE).

    Args:
        width: number of channels, of input and output alike.
        groups: groups of the GroupNorm.
        norm_epsilon: added to the variance of each group.

    Input and output shape `(B, H, W, width)`.
    """

    def __init__(self, width, groups=32, norm_epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.norm = GroupNormalization(groups, epsilon=norm_epsilon, name="norm")
        self.to_q = PaddedConv2D(width, 1, name="to_q")
        self.to_k = PaddedConv2D(width, 1, name="to_k")
        self.to_v = PaddedConv2D(width, 1, name="to_v")
        self.to_out = PaddedConv2D(width, 1, name="to_out")

    def build(self, input_shape):
        for layer in (self.norm, self.to_q, self.to_k, self.to_v, self.to_out):
            layer.build(input_shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, inputs):
        x, shape = self.norm(inputs), ops.shape(inputs)
        # (B, H, W, D) to (B, H * W, D) and back
        q, k, v = (
            ops.reshape(project(x), (-1, shape[1] * shape[2], shape[3]))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return inputs + self.to_out(ops.reshape(attention(q, k, v, heads=1), shape))
