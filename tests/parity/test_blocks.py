"""Compares every block with KerasCV's class: outputs, and gradients of all parameters.

The reference is keras_cv 0.9.0, on TensorFlow in float32. Outputs agree within 2e-6 of their
largest value and gradients within 5e-6 of theirs, some dozens of roundings.
"""

import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from keras_cv.src.models.stable_diffusion import (
    attention_block,
    diffusion_model,
    padded_conv2d,
    resnet_block,
    text_encoder,
)

from stable_diffusion.attention_block import Attention, AttentionBlock
from stable_diffusion.config import SD1, SD2, TINY
from stable_diffusion.diffusion_model import GEGLU, DiffusionModel, SpatialTransformer
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.parity.keras_cv import randomize, relative_error
from stable_diffusion.resnet_block import ResnetBlock
from stable_diffusion.text_encoder import CLIPEmbedding, CLIPEncoderLayer

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 5e-6
MAP, TOKENS, CONTEXT, TIME = (2, 6, 4, 64), (2, 9, 64), (2, 7, 48), (2, 80)


def assert_equal(ours, theirs, inputs, call_ours=None, call_theirs=None):
    """Compares two layers with the same random parameters on the same inputs."""
    rng = np.random.default_rng(1)
    layers, calls = (theirs, ours), (call_theirs or theirs, call_ours or ours)
    for call in calls:
        call(inputs)  # builds
    randomize(theirs, rng)
    ours.set_weights(theirs.get_weights())

    (expected, expected_gradients), (output, gradients) = (
        output_and_gradients(layer, call, inputs) for layer, call in zip(layers, calls, strict=True)
    )
    assert relative_error(output, expected) <= OUTPUT_TOLERANCE
    assert relative_error(gradients, expected_gradients) <= GRADIENT_TOLERANCE


def output_and_gradients(layer, call, inputs):
    """Returns the output, and the gradients of a weighted sum of it as one vector."""
    with tf.GradientTape() as tape:
        output = call(inputs)
        weights = np.random.default_rng(2).standard_normal(output.shape, dtype="float32")
        loss = ops.sum(output * weights)
    gradients = tape.gradient(loss, [weight.value for weight in layer.weights])
    dense = [np.reshape(tf.convert_to_tensor(gradient), -1) for gradient in gradients]
    return output, np.concatenate(dense)


def tensors(*shapes):
    rng = np.random.default_rng(0)
    return [ops.convert_to_tensor(rng.standard_normal(shape, dtype="float32")) for shape in shapes]


@pytest.mark.parametrize(
    "kernel_size, padding, strides",
    [
        (1, 0, 1),
        (3, 1, 1),
        (5, 2, 1),
        (3, 0, 1),
        (3, 2, 1),
        (3, 1, 2),
        (1, 0, 2),
        (3, ((0, 1), (0, 1)), 2),
        (3, ((2, 0), (1, 3)), 1),
    ],
)
@pytest.mark.parametrize("height, width", [(8, 8), (7, 10)])
def test_padded_convolution(kernel_size, padding, strides, height, width):
    ours, theirs = (
        layer(6, kernel_size, padding=padding, strides=strides)
        for layer in (PaddedConv2D, padded_conv2d.PaddedConv2D)
    )
    assert_equal(ours, theirs, *tensors((2, height, width, 5)))


@pytest.mark.parametrize("width", [64, 96])
def test_residual_block(width):
    assert_equal(ResnetBlock(width), resnet_block.ResnetBlock(width), *tensors(MAP))


@pytest.mark.parametrize("width", [64, 96])
def test_residual_block_conditioned_on_time(width):
    ours, theirs = ResnetBlock(width, conditioned=True), diffusion_model.ResBlock(width)
    assert_equal(ours, theirs, tensors(MAP, TIME))


def test_attention_block():
    assert_equal(AttentionBlock(64), attention_block.AttentionBlock(64), *tensors(MAP))


@pytest.mark.parametrize("heads", [1, 4])
def test_self_attention(heads):
    ours, theirs = Attention(64, heads), diffusion_model.CrossAttention(heads, 64 // heads)
    assert_equal(ours, theirs, *tensors(TOKENS), call_ours=lambda x: ours([x, x]))


@pytest.mark.parametrize("heads", [1, 4])
def test_cross_attention(heads):
    ours, theirs = Attention(64, heads), diffusion_model.CrossAttention(heads, 64 // heads)
    inputs = tensors(TOKENS, CONTEXT)
    assert_equal(ours, theirs, inputs, call_theirs=lambda x: theirs(x[0], context=x[1]))


def test_clip_attention():  # only causal: without a mask theirs fails
    ours, theirs = Attention(64, 4, use_bias=True, causal=True), text_encoder.CLIPAttention(64, 4)
    assert_equal(ours, theirs, *tensors(TOKENS), call_ours=lambda x: ours([x, x]))


@pytest.mark.parametrize("config", [SD1.unet, SD2.unet], ids=["convolution", "dense"])
def test_spatial_transformer(config):  # theirs has a BasicTransformerBlock inside
    ours = SpatialTransformer(64, 4, config)
    theirs = diffusion_model.SpatialTransformer(4, 16, fully_connected=config.linear_projection)
    assert_equal(ours, theirs, tensors(MAP, CONTEXT))


def test_geglu():
    assert_equal(GEGLU(32), diffusion_model.GEGLU(32), *tensors(TOKENS))


def test_upsample():
    unet = DiffusionModel(64, 64, 9, download_weights=False, config=TINY.unet)
    ours, theirs = unet.get_layer("up_0_upsample"), diffusion_model.Upsample(TINY.unet.widths[-1])
    assert_equal(ours, theirs, *tensors((2, 4, 4, TINY.unet.widths[-1])))


@pytest.mark.parametrize(
    "name, activation",
    [("quick_gelu", text_encoder.quick_gelu), ("gelu_tanh", ops.gelu)],
    ids=["V1", "V2"],
)
def test_clip_encoder_layer(name, activation):
    theirs = text_encoder.CLIPEncoderLayer(64, 4, activation=activation)
    assert_equal(CLIPEncoderLayer(64, 4, 256, name), theirs, *tensors(TOKENS))


def test_clip_embedding():
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 50, (2, 9)), np.tile(np.arange(9), (2, 1))]
    ours, theirs = CLIPEmbedding(50, 64, 9), text_encoder.CLIPEmbedding(50, 64, 9)
    assert_equal(ours, theirs, [ops.convert_to_tensor(x, "int32") for x in inputs])
