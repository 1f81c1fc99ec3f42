"""Noise schedules, against the papers' formulas written out in float64.

Tolerances: 1e-12 for the schedules, which are float64; 1e-5 for float32 tensors.
"""

import math

import keras
import numpy as np
import pytest
from keras import ops

from stable_diffusion import NoiseScheduler
from stable_diffusion.noise_scheduler import (
    ddim,
    diffuse,
    join_prediction,
    split_prediction,
    timestep_embedding,
)

pytestmark = pytest.mark.quick

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def levels(total=1000, start=0.00085, end=0.012, scaled=True):
    """Returns alphas_cumprod, one multiplication after the other."""
    product, found = 1.0, []
    for t in range(total):
        share = t / (total - 1)
        if scaled:
            beta = (math.sqrt(start) + share * (math.sqrt(end) - math.sqrt(start))) ** 2
        else:
            beta = start + share * (end - start)
        product *= 1 - beta
        found.append(product)
    return np.array(found)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


# The schedule


def test_schedules():
    scheduler = NoiseScheduler(**SD)
    np.testing.assert_allclose(scheduler.alphas_cumprod, levels(), rtol=1e-12)
    np.testing.assert_allclose(scheduler.alphas, 1 - scheduler.betas, rtol=1e-15)
    assert scheduler.betas[0] == pytest.approx(0.00085) and scheduler.betas[-1] == pytest.approx(
        0.012
    )
    linear = NoiseScheduler()
    np.testing.assert_allclose(linear.alphas_cumprod, levels(1000, 1e-4, 0.02, False), rtol=1e-12)
    assert linear.alphas_cumprod.dtype == "float64"
    assert len(linear) == linear.train_timesteps == 1000
    assert len(NoiseScheduler(10)) == len(NoiseScheduler(10).betas) == 10


def test_known_values():
    """The first and last numbers of KerasCV's list for Stable Diffusion."""
    alphas = NoiseScheduler(**SD).alphas_cumprod
    np.testing.assert_allclose(alphas[[0, -1]], [0.99915, 0.00466009], rtol=1e-5)


def test_arguments_are_in_kerascvs_order():
    scheduler = NoiseScheduler(100, 0.1, 0.2, "scaled_linear", "learned", False)
    assert scheduler.betas[0] == pytest.approx(0.1) and scheduler.betas[-1] == pytest.approx(0.2)
    assert scheduler.variance_type == "learned" and scheduler.clip_sample is False
    defaults = NoiseScheduler()
    assert defaults.variance_type == "fixed_small" and defaults.clip_sample is True


@pytest.mark.parametrize(
    ("argument", "value"),
    [("beta_schedule", "cosine"), ("prediction_type", "eps"), ("spacing", "quadratic")],
)
def test_unknown_names(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be one of .*, not '{value}'"):
        NoiseScheduler(**{argument: value})


def test_zero_snr_is_the_papers():
    """Lin et al. 2024, https://arxiv.org/abs/2305.08891, algorithm 1: √alphas, shifted, scaled."""
    scheduler = NoiseScheduler(**SD, zero_snr=True)
    root = np.sqrt(levels())
    expected = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.square(expected), rtol=1e-9)
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.betas[-1] == 1
    assert scheduler.alphas_cumprod[0] == pytest.approx(levels()[0], rel=1e-12)
    np.testing.assert_allclose(np.cumprod(1 - scheduler.betas), np.square(expected), rtol=1e-9)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_epsilon_cannot_begin_where_there_is_no_signal(spacing):
    scheduler = NoiseScheduler(**SD, zero_snr=True, spacing=spacing)
    with pytest.raises(ValueError, match="epsilon can't begin where alpha is 0"):
        scheduler.levels(20)
    assert scheduler.levels(20, "leading")[0].alpha > 0  # which leaves the last timestep out
    sample = normal(1, 2, 2, 4)
    with pytest.raises(ValueError, match="epsilon can't begin where alpha is 0"):
        scheduler.step(sample, 999, sample)
    for kind in ("v_prediction", "sample"):
        other = NoiseScheduler(**SD, zero_snr=True, spacing=spacing, prediction_type=kind)
        assert other.levels(20)[0] == (999, 0.0)
        assert np.isfinite(ops.convert_to_numpy(other.step(sample, 999, sample))).all()


# DDIM


@pytest.mark.parametrize(
    ("spacing", "offset", "n", "timesteps"),
    [
        ("linspace", 0, 1, [999]),
        ("linspace", 0, 2, [999, 0]),
        ("linspace", 0, 4, [999, 666, 333, 0]),
        ("linspace", 0, 5, [999, 749, 500, 250, 0]),
        ("leading", 1, 1, [1]),
        ("leading", 1, 4, [751, 501, 251, 1]),
        ("leading", 0, 3, [666, 333, 0]),
        ("trailing", 0, 1, [999]),
        ("trailing", 0, 4, [999, 749, 499, 249]),
        ("trailing", 0, 3, [999, 666, 332]),
    ],
)
def test_timesteps(spacing, offset, n, timesteps):
    scheduler = NoiseScheduler(**SD, spacing=spacing, steps_offset=offset)
    assert [t for t, _ in scheduler.levels(n)] == [*timesteps, None]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 25, 50, 333, 999, 1000])
def test_levels(spacing, n):
    scheduler = NoiseScheduler(**SD, spacing=spacing)
    found, alphas = scheduler.levels(n), levels()
    timesteps = [t for t, _ in found[:-1]]
    assert len(set(timesteps)) == n and timesteps == sorted(timesteps, reverse=True)
    assert all(type(t) is int and 0 <= t <= 999 for t in timesteps)
    assert all(type(level.alpha) is float for level in found)
    np.testing.assert_allclose([a for _, a in found[:-1]], alphas[timesteps], rtol=1e-12)
    assert found[-1] == (None, 1.0)


def test_last_alpha():
    scheduler = NoiseScheduler(**SD, spacing="leading", steps_offset=1, final_alpha=None)
    assert scheduler.levels(50)[-2:] == [
        (1, scheduler.alphas_cumprod[1]),
        (None, scheduler.alphas_cumprod[0]),
    ]


@pytest.mark.parametrize("n", [0, -1, 1001, 2.0, "5", None])
def test_wrong_num_steps(n):
    with pytest.raises(ValueError, match="num_steps must be an int from 1 to 1000, not "):
        NoiseScheduler().levels(n)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_any_number_of_steps(spacing):
    """Rounding neither adds a step, nor doubles one, nor leaves the schedule."""
    scheduler = NoiseScheduler(**SD, spacing=spacing, steps_offset=1)
    most = 999 if spacing == "leading" else 1000
    for n in range(1, most + 1):
        timesteps = [t for t, _ in scheduler.levels(n)[:-1]]
        assert len(set(timesteps)) == n and timesteps == sorted(timesteps, reverse=True)
        assert 0 <= timesteps[-1] and timesteps[0] <= 999
    with pytest.raises(ValueError, match=f"num_steps must be an int from 1 to {most}, not "):
        scheduler.levels(most + 1)


def test_numpy_num_steps():
    assert NoiseScheduler().levels(np.int64(3)) == NoiseScheduler().levels(3)


@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.01])
def test_split_prediction(alpha):
    x0, noise = normal(2, 3).astype("float64"), normal(2, 3, seed=1).astype("float64")
    sample = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * noise
    v = math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * x0
    for prediction_type, output in {"epsilon": noise, "v_prediction": v, "sample": x0}.items():
        found = split_prediction(output, sample, alpha, prediction_type)
        np.testing.assert_allclose(found, [x0, noise], atol=1e-12)
        np.testing.assert_allclose(diffuse(x0, noise, alpha), sample, atol=1e-12)
        target = join_prediction(x0, noise, alpha, prediction_type)
        np.testing.assert_allclose(target, output, atol=1e-12)


def test_ddim_step_goes_from_level_to_level():
    """Equation 12 of Song et al., without noise: written out here."""
    x0, noise = normal(2, 3).astype("float64"), normal(2, 3, seed=1).astype("float64")
    a, b = 0.3, 0.8
    latent = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    steps = ddim(lambda *_: (x0, noise), latent, [(600, a), (200, b), (None, 1.0)], None)
    (first, second, predicted), (third, last, _) = steps
    assert (first, third) == (600, 200) and predicted is x0
    expected = math.sqrt(b) * x0 + math.sqrt(1 - b) * noise
    np.testing.assert_allclose(second, expected, atol=1e-12)
    np.testing.assert_allclose(last, x0, atol=1e-12)


def test_ddim_with_a_perfect_model_finds_the_sample():
    scheduler = NoiseScheduler(**SD)
    x0, latent = normal(2, 3).astype("float64"), normal(2, 3, seed=1).astype("float64")

    def denoise(latent, alpha, timestep):
        return x0, (latent - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)

    *_, (_, found, _) = ddim(denoise, latent, scheduler.levels(20), None)
    np.testing.assert_allclose(found, x0, atol=1e-9)


# Timestep embedding


@pytest.mark.parametrize("dim", [8, 32, 320])
def test_timestep_embedding(dim):
    embedding = timestep_embedding([0, 1, 500, 999], dim)
    assert embedding.shape == (4, dim) and embedding.dtype == "float32"
    for row, t in enumerate([0, 1, 500, 999]):
        for k in range(dim // 2):
            angle = t * math.exp(-math.log(10000) * k / (dim // 2))
            assert embedding[row, k] == pytest.approx(math.cos(angle), abs=1e-6)
            assert embedding[row, k + dim // 2] == pytest.approx(math.sin(angle), abs=1e-6)


def test_timestep_embedding_with_another_period():
    np.testing.assert_allclose(
        timestep_embedding([3], 4, 100)[0],
        [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)],
        atol=1e-6,
    )


# add_noise


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_add_noise(dtype):
    scheduler, timesteps = NoiseScheduler(**SD), np.array([0, 500, 999])
    x0, noise = normal(3, 4, 4, 2), normal(3, 4, 4, 2, seed=1)
    alphas = levels()[timesteps][:, None, None, None]
    expected = np.sqrt(alphas) * x0 + np.sqrt(1 - alphas) * noise
    noisy = scheduler.add_noise(
        ops.convert_to_tensor(x0, dtype),
        ops.convert_to_tensor(noise, dtype),
        ops.convert_to_tensor(timesteps),
    )
    assert keras.backend.standardize_dtype(noisy.dtype) == dtype
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    found = ops.convert_to_numpy(ops.cast(noisy, "float32"))
    np.testing.assert_allclose(found, expected, atol=tolerance)


def traced(function):
    """Compiles `function` with the backend's own means; on PyTorch there is no graph to trace."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


def test_add_noise_in_a_traced_function():
    scheduler = NoiseScheduler(**SD)
    x0, noise = normal(3, 4, 4, 2), normal(3, 4, 4, 2, seed=1)
    for timesteps in ([0, 500, 999], [7, 8, 9]):
        arguments = [ops.convert_to_tensor(x) for x in (x0, noise, np.array(timesteps, "int32"))]
        np.testing.assert_allclose(
            ops.convert_to_numpy(traced(scheduler.add_noise)(*arguments)),
            ops.convert_to_numpy(scheduler.add_noise(*arguments)),
            atol=1e-6,
        )


# step


def expected_mean(alphas, t, x0, sample):
    """Equation 7 of Ho et al. 2020."""
    level, previous = alphas[t], alphas[t - 1] if t else 1.0
    alpha = level / previous
    return (
        math.sqrt(previous) * (1 - alpha) / (1 - level) * x0
        + math.sqrt(alpha) * (1 - previous) / (1 - level) * sample
    )


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("predict_epsilon", [True, False])
def test_step_zero_is_the_mean(clip, predict_epsilon):
    scheduler = NoiseScheduler(**SD, clip_sample=clip)
    output, sample = normal(2, 4, 4, 3), normal(2, 4, 4, 3, seed=1)
    alphas = levels()
    x0 = output
    if predict_epsilon:
        x0 = (sample - math.sqrt(1 - alphas[0]) * output) / math.sqrt(alphas[0])
    if clip:
        x0 = np.clip(x0, -1, 1)
    found = scheduler.step(ops.array(output), 0, ops.array(sample), predict_epsilon)
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), expected_mean(alphas, 0, x0, sample), atol=1e-5
    )


@pytest.mark.parametrize(
    "kind", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
)
@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_step_has_the_mean_and_the_deviation(kind, timestep):
    scheduler = NoiseScheduler(**SD, variance_type=kind)
    alphas, shape = levels(), (2, 64, 64, 2)
    sample = np.full(shape, 0.5, "float32")
    output = np.full(shape, 0.25, "float32")  # x0
    beta = 1 - alphas[timestep] / alphas[timestep - 1]
    small = (1 - alphas[timestep - 1]) / (1 - alphas[timestep]) * beta
    deviation = math.sqrt(small if "small" in kind else beta)
    given = output
    if kind == "learned":
        given, deviation = np.concatenate([output, np.full(shape, 0.01, "float32")], -1), 0.1
    if kind == "learned_range":  # a share of 3/4 of beta's logarithm
        given = np.concatenate([output, np.full(shape, 0.5, "float32")], -1)
        deviation = math.exp(0.5 * (0.75 * math.log(beta) + 0.25 * math.log(small)))
    found = ops.convert_to_numpy(
        scheduler.step(ops.array(given), timestep, ops.array(sample), predict_epsilon=False)
    )
    assert found.shape == shape
    noise = found - expected_mean(alphas, timestep, 0.25, 0.5)
    assert noise.mean() == pytest.approx(0, abs=0.05 * deviation)
    assert noise.std() == pytest.approx(deviation, rel=0.05)


def test_step_draws_new_noise_each_time_and_the_same_for_each_scheduler():
    x = ops.zeros((1, 4, 4, 2))
    first, other = NoiseScheduler(), NoiseScheduler()
    a, b, c = (ops.convert_to_numpy(s.step(x, 500, x)) for s in (first, first, other))
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(a, c)


def test_step_with_v_prediction():
    alphas, t = levels(), 0
    x0, noise = normal(1, 4, 4, 2) / 10, normal(1, 4, 4, 2, seed=1)
    sample = np.sqrt(alphas[t]) * x0 + np.sqrt(1 - alphas[t]) * noise
    v = np.sqrt(alphas[t]) * noise - np.sqrt(1 - alphas[t]) * x0
    scheduler = NoiseScheduler(**SD, prediction_type="v_prediction")
    found = scheduler.step(ops.array(v, "float32"), t, ops.array(sample, "float32"))
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), expected_mean(alphas, t, x0, sample), atol=1e-5
    )


def test_step_errors():
    x = ops.zeros((1, 4, 4, 2))
    with pytest.raises(ValueError, match="variance_type must be one of .*, not 'huge'"):
        NoiseScheduler(variance_type="huge").step(x, 5, x)
    for timestep in (-1, 1000):
        with pytest.raises(ValueError, match=f"from 0 to 999, not {timestep}"):
            NoiseScheduler().step(x, timestep, x)
