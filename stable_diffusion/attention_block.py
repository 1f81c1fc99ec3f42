"""Attention: one pure function, and the two layers made of it."""

import math
from functools import partial

from keras import KerasTensor, backend, layers, ops

from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.pretrained import Block

MOST_SCORES = 2**24  # held at once for each picture, 64 MB in float32


def attention(query, key, value, heads, causal=False):
    """Computes softmax(q kᵀ / √d) v in each of `heads` heads of width d = D / heads.

    Args:
        query: tokens `(B, T, D)`, or a feature map `(B, h, w, D)`, whose cells are the tokens.
        key, value: `(B, S, D)`, or `(B, h, w, D)`.
        heads: number of heads, a divisor of D.
        causal: whether token t sees only tokens up to t.

    Returns:
        The query's shape.

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1.
    """

    def split(x):  # (B, ..., D) to (B, T, heads, D / heads)
        return ops.reshape(x, (-1, math.prod(ops.shape(x)[1:-1]), heads, x.shape[-1] // heads))

    # Stable Diffusion 2's scores overflow float16, and JAX has no such product on CPUs; PyTorch's
    # kernels hold scores in float32 by themselves.
    half = backend.standardize_dtype(query.dtype) == "float16" and backend.backend() != "torch"
    q, k, v = (ops.cast(split(x), "float32" if half else x.dtype) for x in (query, key, value))

    def attend(q):
        if causal or k.shape[1] == 1 or backend.backend() != "tensorflow":
            return ops.dot_product_attention(q, k, v, is_causal=causal)
        # Keras' own is slower: it scales scores, not queries, and holds bfloat16's in float32.
        weights = ops.softmax(ops.einsum("btnh,bsnh->bnts", q * q.shape[-1] ** -0.5, k))
        return ops.einsum("bnts,bsnh->btnh", weights, v)

    # Some queries at a time take less memory; kernels of PyTorch and OpenVINO do so by themselves.
    count, some = q.shape[1], max(1, MOST_SCORES // (heads * (k.shape[1] or 1)))
    whole = causal or not count or count <= some or backend.backend() in ("torch", "openvino")
    parts = [q] if whole else ops.split(q, list(range(some, count, some)), axis=1)
    out = ops.cast(ops.concatenate([attend(x) for x in parts], axis=1), query.dtype)
    return ops.reshape(out, (-1, *ops.shape(query)[1:]))


class Attention(Block):
    """Multi-head attention of tokens to themselves, or to a context.

    Used with biases and causal mask by the text encoder, without either by the UNet.

    Args:
        width: D, number of features of a token.
        heads: number of heads.
        use_bias: whether queries, keys and values have a bias; the output always has one.
        causal: whether a token sees only itself and those before it.
        project: class of the four projections.

    Called on `[x, context]`, the same tensor twice for self-attention: tokens `(B, T, any)` or a
    feature map `(B, h, w, any)` each. Returns x's shape, with D features.
    """

    def __init__(self, width, heads, use_bias=False, causal=False, project=layers.Dense, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.causal = heads, causal
        self.to_q = project(width, use_bias=use_bias, name="to_q")
        self.to_k = project(width, use_bias=use_bias, name="to_k")
        self.to_v = project(width, use_bias=use_bias, name="to_v")
        self.to_out = project(width, name="to_out")

    def call(self, inputs):
        x, context = inputs
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attention(q, k, v, self.heads, self.causal))


class AttentionBlock(Block):
    """One-head attention between all cells of a feature map, around a shortcut (VAE).

    Args:
        width: number of channels, of input and output alike.
        groups: groups of the GroupNorm.
        norm_epsilon: added to the variance of each group.

    Input and output shape `(B, h, w, width)`.
    """

    def __init__(self, width, groups=32, norm_epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        project = partial(PaddedConv2D, kernel_size=1)
        self.norm = layers.GroupNormalization(groups, epsilon=norm_epsilon, name="norm")
        self.attn = Attention(width, heads=1, use_bias=True, project=project, name="attn")

    def compute_output_spec(self, inputs):  # where h and w are not known, `call` can't tell it
        return KerasTensor(inputs.shape, self.compute_dtype)

    def call(self, inputs):
        x = self.norm(inputs)
        return inputs + self.attn([x, x])
