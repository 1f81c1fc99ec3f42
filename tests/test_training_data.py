"""Batches of noisy latents: what is in them, and that they are the same whenever they are drawn."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from keras import ops

from stable_diffusion.config import SD1
from stable_diffusion.noise_scheduler import NoiseScheduler, split_prediction
from stable_diffusion.training.data import (
    NoisyLatents,
    StepLoss,
    Stream,
    compute_snr_weights,
    denoising_loss,
    make_targets,
    sample_posterior,
)
from stable_diffusion.training.folder import Example

pytestmark = pytest.mark.quick

SCHEDULE = SD1.schedule
SCALE = SD1.vae.scaling_factor


class FakeCache:
    """Pictures are constant latents of the number that is their path."""

    pipeline = SimpleNamespace(config=SD1)
    log_variance = -30.0  # no variance to speak of

    def list_views(self, example):
        return [None]

    def read_moments(self, example, view):
        mean = np.full((2, 2, 4), float(example.path), "float32")
        return np.concatenate([mean, np.full_like(mean, self.log_variance)], axis=-1)

    def read_context(self, text):
        return np.full((77, 8), float(len(text)), "float32")


def examples(count, caption="a caption"):
    return [Example(str(n), (caption,)) for n in range(count)]


def make(count=5, streams=None, **options):
    streams = streams or [Stream(examples(count))]
    options = {"batch_size": 4, "steps": 6, "dropout": 0.0} | options
    return NoisyLatents(FakeCache(), streams, options.pop("schedule", SCHEDULE), **options)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noising_is_the_schedulers_and_targets_give_back_what_they_are_made_of(kind):
    schedule = NoiseScheduler(prediction_type=kind)
    rng, timesteps = np.random.default_rng(0), np.array([0, 500, 999])
    x0, noise = rng.standard_normal((2, 3, 2, 2, 4), dtype="float32")
    noisy, target = make_targets(schedule, x0, noise, timesteps)
    expected = schedule.add_noise(
        ops.convert_to_tensor(x0), ops.convert_to_tensor(noise), timesteps
    )
    np.testing.assert_allclose(noisy, ops.convert_to_numpy(expected), atol=1e-6)
    for n, timestep in enumerate(timesteps):
        alpha = schedule.alphas_cumprod[timestep]
        clean, added = split_prediction(target[n], noisy[n], alpha, kind)
        tolerance = 1e-4 / min(alpha, 1 - alpha)
        np.testing.assert_allclose(clean, x0[n], atol=tolerance)
        np.testing.assert_allclose(added, noise[n], atol=tolerance)


def test_min_snr_weighs_x0_by_the_lesser_of_snr_and_gamma():
    timesteps = np.arange(1000)
    alpha = SCHEDULE.alphas_cumprod
    snr = alpha / (1 - alpha)
    of_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": np.ones(1000)}
    for kind, own in of_x0.items():
        schedule = replace(SCHEDULE, prediction_type=kind)
        weight = compute_snr_weights(schedule, timesteps, 5.0)
        np.testing.assert_allclose(weight * own, np.minimum(snr, 5), rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)]
)
def test_min_snr_where_nothing_is_left_of_the_signal(kind, weight):
    """The limits of min(SNR, gamma) / SNR, min(SNR, gamma) / (SNR + 1) and min(SNR, gamma)."""
    schedule = replace(SCHEDULE, prediction_type=kind, zero_snr=True)
    assert schedule.alphas_cumprod[-1] == 0
    weights = compute_snr_weights(schedule, np.array([998, 999]), 5.0)
    np.testing.assert_allclose(weights, [weight, weight], atol=1e-4)


def test_the_posterior_is_sampled():
    moments = np.concatenate([np.full((64, 64, 4), 3.0), np.full((64, 64, 4), np.log(4.0))], -1)
    sampled = sample_posterior(moments.astype("float32"), np.random.default_rng(0))
    assert abs(sampled.mean() - 3) < 0.05 and abs(sampled.std() - 2) < 0.05


def test_latents_are_scaled_once():
    schedule = NoiseScheduler(prediction_type="sample")  # the target is the latent itself
    batches = make(count=24, schedule=schedule)
    targets = np.concatenate([batches[n][1] for n in range(6)])
    expected = np.arange(24) * SCALE
    np.testing.assert_allclose(np.sort(targets[:, 0, 0, 0]), expected, atol=1e-4)


def test_a_batch_has_what_the_model_takes():
    inputs, target, weights = make()[0]
    assert {name: x.shape for name, x in inputs.items()} == {
        "latent": (4, 2, 2, 4),
        "timestep_embedding": (4, 320),
        "context": (4, 77, 8),
    }
    assert {x.dtype for x in (*inputs.values(), target, weights)} == {np.dtype("float32")}
    assert target.shape == (4, 2, 2, 4) and (weights == 1).all()


def test_every_picture_comes_equally_often_in_another_order():
    schedule = NoiseScheduler(prediction_type="sample")
    batches = make(count=4, schedule=schedule)
    turns = [np.rint(batches[n][1][:, 0, 0, 0] / SCALE).astype(int).tolist() for n in range(6)]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_repeated_pictures_come_as_often_as_they_say():
    schedule = NoiseScheduler(prediction_type="sample")
    one, two = examples(2)
    batches = make(streams=[Stream([one, replace(two, repeats=3)])], schedule=schedule, steps=None)
    assert len(batches) == 1
    assert np.rint(np.sort(batches[0][1][:, 0, 0, 0]) / SCALE).tolist() == [0, 1, 1, 1]


def test_captions_are_tokenized_before_the_first_step():
    def tokenize(text):
        raise ValueError(f"{text} is too long")

    with pytest.raises(ValueError, match="a caption is too long"):
        make(tokenize=tokenize)


def flat(batch):
    inputs, target, weights = batch
    return [*inputs.values(), target, weights]


def test_a_batch_follows_from_the_seed_and_the_step():
    for one, other in zip(flat(make()[3]), flat(make(first_step=2)[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    later = make()
    later.set_epoch(1)
    for one, other in zip(flat(make(first_step=6)[0]), flat(later[0]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(make()[0][1], make()[1][1])
    assert not np.array_equal(make()[0][1], make(seed=1)[0][1])


def test_processes_get_the_parts_of_one_batch():
    streams = [Stream(examples(5)), Stream(examples(3), 0.5)]
    whole = make(streams=streams)[1]
    parts = [make(streams=streams, process=(n, 4))[1] for n in range(4)]
    for expected, *some in zip(flat(whole), *map(flat, parts), strict=True):
        np.testing.assert_array_equal(expected, np.concatenate(some))
    with pytest.raises(ValueError, match="8 can't be divided among 3 processes"):
        make(streams=streams, process=(0, 3))


def test_the_loss_of_streams_is_the_weighted_sum_of_their_means():
    streams = [Stream(examples(5)), Stream(examples(3, "class"), 0.25)]
    inputs, _, weights = make(streams=streams)[0]
    assert inputs["context"][:, 0, 0].tolist() == [9.0] * 4 + [5.0] * 4
    losses = np.arange(8.0)
    expected = losses[:4].mean() + 0.25 * losses[4:].mean()
    assert np.mean(losses * weights) == pytest.approx(expected)


def test_captions_are_dropped_by_their_share():
    batches = make(dropout=0.5, steps=50, batch_size=8)
    texts = np.concatenate([batches[n][0]["context"][:, 0, 0] for n in range(50)])
    assert 0.4 < np.mean(texts == 0) < 0.6
    assert (make(dropout=1.0)[0][0]["context"] == 0).all()


def test_offset_noise_is_the_same_in_all_cells_of_a_channel():
    plain, offset = make()[0][1], make(offset=0.5)[0][1]  # epsilon: the target is the noise
    shift = (offset - plain).reshape(4, 4, 4)
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-6)
    assert 0.1 < shift[:, 0].std() < 1 and len(np.unique(shift[:, 0].round(4))) == 16


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"dropout": 1.5}, {"offset": -1}, {"snr_gamma": 0}]
)
def test_numbers_that_cannot_be_are_errors(options):
    with pytest.raises(ValueError, match="must be"):
        make(**options)


def test_loss_and_its_metric():
    rng = np.random.default_rng(0)
    true, predicted = rng.standard_normal((2, 3, 2, 2, 4), dtype="float32")
    loss = ops.convert_to_numpy(denoising_loss(true, predicted))
    np.testing.assert_allclose(loss, np.mean((true - predicted) ** 2, (1, 2, 3)), rtol=1e-6)
    metric, weights = StepLoss(), np.array([1.0, 0.0, 2.0], "float32")
    metric.update_state(true * 0, predicted)
    metric.update_state(true, predicted, weights)  # the last one counts alone
    assert float(metric.result()) == pytest.approx(np.mean(loss * weights), rel=1e-6)
