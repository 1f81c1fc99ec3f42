"""PyTorch's own operations in place of those that Keras composes, for training on a CPU.

With these, and bfloat16 where the processor computes in it, PyTorch trains these models about twice
as fast as XLA does in float32. Importing this changes Keras' layers and the package's attention for
the whole process.
"""

import keras
import torch
from torch.nn import functional as F

import stable_diffusion.attention_block as attention_block
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.resnet_block import ResnetBlock


def _is_real(x):
    """Tells a tensor with numbers from a symbolic one, by which Keras builds a model."""
    x = x[0] if isinstance(x, list | tuple) else x
    return isinstance(x, torch.Tensor) and x.device.type != "meta"


def attention(query, key, value, heads, causal=False):
    """Computes what the package's `attention` does, as three products.

    PyTorch's fused kernel, which never holds all scores, is slower here: there are few tokens.
    """

    def split(x):  # (B, ..., D) to (B, heads, T, D / heads)
        return x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)

    q, k, v = split(query), split(key), split(value)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -1e4)
    out = scores.softmax(-1) @ v
    return out.transpose(1, 2).reshape(query.shape)


def group_norm(layer, x):
    """Calls a Keras GroupNormalization of the last axis."""
    gamma, beta = layer.gamma.value.to(x.dtype), layer.beta.value.to(x.dtype)
    return F.group_norm(x.movedim(-1, 1), layer.groups, gamma, beta, layer.epsilon).movedim(1, -1)


def layer_norm(layer, x):
    """Calls a Keras LayerNormalization of the last axis."""
    gamma, beta = layer.gamma.value.to(x.dtype), layer.beta.value.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], gamma, beta, layer.epsilon)


def _norm_silu(x, gamma, beta, groups, epsilon):
    """Normalises groups of channels of `(B, N, C)`, then swish.

    Returns:
        The result, and what the gradient needs: each channel's factor and offset `(B, C)`, and each
        group's mean and inverse deviation `(B, groups)`.
    """
    batch, count, channels = x.shape
    count *= channels // groups
    y = x.float()
    mean = y.sum(1).view(batch, groups, -1).sum(-1) / count
    square = (y * y).sum(1).view(batch, groups, -1).sum(-1) / count
    inverse = ((square - mean * mean).clamp_min(0) + epsilon).rsqrt()
    factor = _spread(inverse, channels) * gamma
    offset = beta - _spread(mean, channels) * factor
    y = y * factor[:, None] + offset[:, None]
    return (y * torch.sigmoid(y)).to(x.dtype), factor, offset, mean, inverse


def _norm_silu_gradient(grad, x, factor, offset, mean, inverse, gamma, groups):
    """Returns the gradients of `_norm_silu` by x, gamma and beta."""
    batch, count, channels = x.shape
    count *= channels // groups
    x32 = x.float()
    y = x32 * factor[:, None] + offset[:, None]
    gate = torch.sigmoid(y)
    grad = grad.float() * gate * (1 + y * (1 - gate))  # swish's
    total, product = grad.sum(1), (grad * x32).sum(1)
    mean, inverse = _spread(mean, channels), _spread(inverse, channels)
    by_gamma = (product - mean * total) * inverse
    a = _spread((gamma * total).view(batch, groups, -1).sum(-1) / count, channels)
    b = _spread((gamma * by_gamma).view(batch, groups, -1).sum(-1) / count, channels)
    slope = inverse * inverse * b
    by_x = grad * factor[:, None] - x32 * slope[:, None] + (mean * slope - inverse * a)[:, None]
    return by_x.to(x.dtype), by_gamma.sum(0), total.sum(0)


def _spread(x, channels):
    """Gives each channel its group's value: `(B, groups)` to `(B, C)`."""
    batch, groups = x.shape
    return x[:, :, None].expand(batch, groups, channels // groups).reshape(batch, channels)


compiled = {}  # the two functions, see `install`


class NormSilu(torch.autograd.Function):
    """GroupNorm and swish in one pass over memory, where PyTorch's own are slow."""

    @staticmethod
    def forward(ctx, x, gamma, beta, groups, epsilon):
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        y, *saved = compiled["forward"](flat, gamma, beta, groups, epsilon)
        ctx.save_for_backward(flat, *saved, gamma)
        ctx.groups = groups
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        flat, *_ = ctx.saved_tensors
        by_x, by_gamma, by_beta = compiled["backward"](
            grad.reshape(flat.shape), *ctx.saved_tensors, ctx.groups
        )
        return by_x.view(grad.shape), by_gamma, by_beta, None, None


def resnet_block(block, inputs):
    """Calls a `ResnetBlock` of real tensors."""

    def norm(layer, x):
        if not torch.is_grad_enabled():  # nothing to compile for
            return F.silu(group_norm(layer, x))
        gamma, beta = layer.gamma.value, layer.beta.value
        return NormSilu.apply(x, gamma, beta, layer.groups, layer.epsilon)

    inputs, time = inputs if block.time_emb_proj else (inputs, None)
    x = block.conv1(norm(block.norm1, inputs))
    if block.time_emb_proj:
        x = x + block.time_emb_proj(F.silu(time))[:, None, None]
    x = block.conv2(norm(block.norm2, x))
    return x + (block.conv_shortcut(inputs) if block.conv_shortcut else inputs)


def conv(layer, x):
    """Calls a `PaddedConv2D` without its copies of padding and kernel."""
    kernel, bias = layer.kernel.value, layer.bias
    bias = None if bias is None else bias.value.to(x.dtype)
    kernel = kernel.permute(3, 2, 0, 1).to(x.dtype)  # a view, see `order_kernels`
    x = x.movedim(-1, 1)
    if layer.zeros:
        (top, bottom), (left, right) = layer.zeros[1:3]
        if (top, left) == (bottom, right):
            padding = top, left
        else:
            x, padding = F.pad(x, (left, right, top, bottom)), 0
    else:
        padding = kernel.shape[-1] // 2 if layer.padding == "same" else 0
    return F.conv2d(x, kernel, bias, layer.strides, padding).movedim(1, -1)


def order_kernels(model):
    """Lays the kernels of convolutions out in memory as PyTorch wants them; their shapes stay."""
    for layer in model._flatten_layers():
        if isinstance(layer, PaddedConv2D):
            value = layer.kernel.value
            ordered = value.data.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            value.data = ordered.permute(2, 3, 1, 0)


def _replace(cls, fast):
    """Makes a layer's class call `fast` on real tensors."""
    slow = cls.call
    cls.call = lambda self, x: fast(self, x) if _is_real(x) else slow(self, x)


def prepare_thread():
    """Allows one compilation a shape; the setting is each thread's own."""
    torch._dynamo.config.recompile_limit = 256


def install():
    """Replaces the operations."""
    prepare_thread()
    compiled["forward"] = torch.compile(_norm_silu, dynamic=False)
    compiled["backward"] = torch.compile(_norm_silu_gradient, dynamic=False)
    slow = attention_block.attend

    def either(query, *args, **kwargs):
        return (attention if _is_real(query) else slow)(query, *args, **kwargs)

    attention_block.attend = either
    _replace(keras.layers.GroupNormalization, group_norm)
    _replace(keras.layers.LayerNormalization, layer_norm)
    _replace(PaddedConv2D, conv)
    _replace(ResnetBlock, resnet_block)
