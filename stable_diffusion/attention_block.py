"""Attention: its equation, a function that applies it in heads, and the two layers made of it."""

import math
from functools import partial

from keras import KerasTensor, backend, layers, ops

from stable_diffusion.block import Block
from stable_diffusion.padded_conv2d import PaddedConv2D

MOST_SCORES = 2**24  # held at once for each image, 64 MB in float32


def attention(q, k, v, causal=False):
    """Computes softmax(q kᵀ / √d) v in each head.

    Args:
        q: queries `(B, T, N, d)`: T tokens, N heads, d features a head.
        k, v: keys and values `(B, S, N, d)`.
        causal: whether token t sees only tokens up to t.

    Returns:
        Tensor `(B, T, N, d)`.

    Reference: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1.
    """
    # softmax(q kᵀ / √d) v (equation 1)
    return ops.einsum("bnts,bsnd->btnd", attention_probabilities(q, k, causal), v)


def attention_probabilities(q, k, causal=False):
    """Computes softmax(q kᵀ / √d): how much of each of S tokens each of T gets, `(B, N, T, S)`."""
    scores = ops.einsum("btnd,bsnd->bnts", q * q.shape[-1] ** -0.5, k)
    if causal:
        seen = ops.arange(q.shape[1])[:, None] >= ops.arange(k.shape[1])
        scores = ops.where(seen, scores, float("-inf"))
    return ops.softmax(scores)


def attend(query, key, value, heads, causal=False):
    """Applies `attention` in heads, within bounded memory and with the backend's own kernels.

    Args:
        query: tokens `(B, T, D)`, or a feature map `(B, h, w, D)`, whose cells are the tokens.
        key, value: `(B, S, D)`, or `(B, h, w, D)`.
        heads: number of heads, a divisor of D.
        causal: whether token t sees only tokens up to t.

    Returns:
        Tensor of the query's shape.
    """
    # Stable Diffusion 2's scores overflow float16, and JAX has no such product on CPUs. PyTorch's
    # kernels hold scores in float32 by themselves.
    name, dtype = backend.backend(), backend.standardize_dtype(query.dtype)
    wide = "float32" if dtype == "float16" and name != "torch" else dtype
    q, k, v = (ops.cast(split_heads(x, heads), wide) for x in (query, key, value))
    # Keras' function calls the kernels of JAX, PyTorch and OpenVINO. On TensorFlow it has none, and
    # is slower than the equation: it scales scores, not queries, and holds bfloat16's in float32.
    # It also takes a single key, because Keras warns of a softmax of one score.
    compute = attention if name == "tensorflow" and k.shape[1] != 1 else _call_keras
    # A part of the queries at a time needs less memory. PyTorch's and OpenVINO's kernels do it too.
    count, some = q.shape[1], max(1, MOST_SCORES // (heads * (k.shape[1] or 1)))
    whole = causal or not count or count <= some or name in ("torch", "openvino")
    parts = [q] if whole else ops.split(q, list(range(some, count, some)), axis=1)
    out = ops.concatenate([compute(part, k, v, causal) for part in parts], axis=1)
    return ops.reshape(ops.cast(out, query.dtype), (-1, *ops.shape(query)[1:]))


def split_heads(x, heads):
    """Reshapes tokens `(B, T, D)`, or a feature map `(B, h, w, D)`, to `(B, T, N, d)`."""
    return ops.reshape(x, (-1, math.prod(ops.shape(x)[1:-1]), heads, x.shape[-1] // heads))


def _call_keras(q, k, v, causal):
    return ops.dot_product_attention(q, k, v, is_causal=causal)


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

    Attributes:
        probe: None, or a function that is called in place of `attend`, see `explain.probe`.
    """

    probe = None

    def __init__(self, width, heads, use_bias=False, causal=False, project=layers.Dense, **kwargs):
        super().__init__(**kwargs)
        self.width, self.heads, self.causal = width, heads, causal
        self.to_q = project(width, use_bias=use_bias, name="to_q")
        self.to_k = project(width, use_bias=use_bias, name="to_k")
        self.to_v = project(width, use_bias=use_bias, name="to_v")
        self.to_out = project(width, name="to_out")

    def compute_output_spec(self, inputs):  # `call` can't tell it where T, h or w are unknown
        return KerasTensor((*inputs[0].shape[:-1], self.width), self.compute_dtype)

    def call(self, inputs):
        x, context = inputs
        # concat(head_1 ... head_N) W_out (Vaswani et al. 2017, section 3.2.2)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        compute = self.probe or attend
        return self.to_out(compute(q, k, v, self.heads, self.causal))


class AttentionBlock(Block):
    """One-head attention between all cells of a feature map, with a residual connection (VAE).

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

    def call(self, inputs):
        x = self.norm(inputs)
        return inputs + self.attn([x, x])
