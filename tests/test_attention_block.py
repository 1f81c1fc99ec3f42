"""Attention against a few lines of numpy, in float64; errors are relative to the largest value."""

import numpy as np
import pytest
from keras import backend, ops

from stable_diffusion import attention_block
from stable_diffusion.attention_block import attend, attention

pytestmark = pytest.mark.quick

B, T, S, D, HEADS = 2, 5, 7, 24, 3
# In half precision only inputs and output are rounded, to 11 and 8 bits.
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def reference(query, key, value, heads, causal):
    """Computes softmax(q kᵀ / √d) v, head by head."""
    outputs = []
    for q, k, v in zip(*(np.split(x, heads, axis=-1) for x in (query, key, value)), strict=True):
        scores = q @ np.moveaxis(k, -1, -2) / np.sqrt(q.shape[-1])
        if causal:
            scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        outputs.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    return np.concatenate(outputs, axis=-1)


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("causal", [False, True])
def test_the_equation(causal):
    tokens = T if causal else S
    arrays = draw(B, T, D, seed=0), draw(B, tokens, D, seed=1), draw(B, tokens, D, seed=2)
    expected = reference(*arrays, HEADS, causal)
    heads = (x.astype("float32").reshape(B, -1, HEADS, D // HEADS) for x in arrays)
    output = ops.convert_to_numpy(attention(*map(ops.convert_to_tensor, heads), causal))
    assert output.shape == (B, T, HEADS, D // HEADS)
    error = np.abs(output.reshape(B, T, D) - expected).max()
    assert error / np.abs(expected).max() < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_heads(dtype, causal):
    if dtype != "float32" and backend.backend() == "openvino":
        pytest.skip("OpenVINO computes in the precision it is asked for, see README")
    tokens = T if causal else S
    arrays = draw(B, T, D, seed=0), draw(B, tokens, D, seed=1), draw(B, tokens, D, seed=2)
    tensors = [ops.cast(ops.convert_to_tensor(x.astype("float32")), dtype) for x in arrays]
    rounded = [ops.convert_to_numpy(ops.cast(x, "float32")).astype("float64") for x in tensors]
    output = attend(*tensors, HEADS, causal)
    assert backend.standardize_dtype(output.dtype) == dtype
    expected = reference(*rounded, HEADS, causal)
    error = np.abs(ops.convert_to_numpy(ops.cast(output, "float32")) - expected).max()
    assert error / np.abs(expected).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("most", [1, 50, 63, 10**6])
def test_some_queries_at_a_time(monkeypatch, most):
    """The same numbers, of one query at a time, of 2 (not a divisor), of 3 and of all."""
    monkeypatch.setattr(attention_block, "MOST_SCORES", most)
    arrays = draw(B, T, D, seed=0), draw(B, S, D, seed=1), draw(B, S, D, seed=2)
    output = attend(*(ops.convert_to_tensor(x.astype("float32")) for x in arrays), HEADS)
    expected = reference(*arrays, HEADS, causal=False)
    np.testing.assert_allclose(ops.convert_to_numpy(output), expected, atol=1e-5)


def test_feature_maps_are_tokens_row_by_row():
    cells, context = draw(B, 2, 3, D, seed=0), draw(B, S, D, seed=1)
    tensors = [ops.convert_to_tensor(x.astype("float32")) for x in (cells, context, context)]
    output = ops.convert_to_numpy(attend(*tensors, HEADS))
    expected = reference(cells.reshape(B, 6, D), context, context, HEADS, causal=False)
    np.testing.assert_allclose(output, expected.reshape(cells.shape), atol=1e-5)


def test_scores_beyond_float16():
    """As in Stable Diffusion 2: products of queries and keys over 65504, the largest float16."""
    large = 200 * np.sign(draw(1, T, 64, seed=0))
    value = draw(1, T, 64, seed=1).astype("float16")
    tensors = [ops.convert_to_tensor(x.astype("float16")) for x in (large, large, value)]
    output = ops.convert_to_numpy(attend(*tensors, heads=1))
    np.testing.assert_array_equal(output, value)  # each token sees only itself
