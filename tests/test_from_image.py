"""Samplers that begin with an image, or keep parts of it."""

import numpy as np
import pytest
from helpers import make_schedule

from stable_diffusion.noise_scheduler import diffuse, split_prediction
from stable_diffusion.samplers import SAMPLERS, find_sampler
from stable_diffusion.samplers.from_image import keep, start_from

pytestmark = pytest.mark.quick

STEPS = 6
SCHEDULE = make_schedule()
RNG = np.random.default_rng(0)
IMAGE, NOISE = RNG.standard_normal((2, 2, 4, 4, 4)).astype("float32")
PAINTED = np.zeros((2, 4, 4, 1), bool)
PAINTED[0, 1:3, 1:] = PAINTED[1, :, 2:] = True
KEPT = np.broadcast_to(~PAINTED, IMAGE.shape)


def predict(latent, timestep):
    """A model that is not linear, and different at each timestep."""
    return np.tanh(latent * (1 + timestep / 1000)) - 0.3 * np.cos(2 * latent)


def make_denoise(seen):
    def denoise(latent, alpha, timestep=None):
        timestep = SCHEDULE.find_timestep(alpha) if timestep is None else timestep
        seen.append((timestep, latent))
        return split_prediction(predict(latent, timestep), latent, alpha)

    return denoise


def make_next_noise():
    rng = np.random.default_rng(1)
    return lambda: rng.standard_normal(NOISE.shape).astype("float32")


def sample(row, first_step=0, seen=None):
    levels = SCHEDULE.levels(STEPS, None, row)[first_step:]
    denoise = make_denoise([] if seen is None else seen)
    return levels, list(row.sample(denoise, NOISE, levels, make_next_noise()))


@pytest.mark.parametrize("first_step", [0, 2, STEPS - 1])
@pytest.mark.parametrize("name", SAMPLERS)
def test_it_starts_from_the_image_with_noise(name, first_step):
    """What follows are the sampler's own steps from there."""
    row, seen = find_sampler(name), []
    levels, steps = sample(start_from(row, lambda: IMAGE), first_step, seen)
    start = diffuse(IMAGE, NOISE, levels[0].alpha)
    np.testing.assert_array_equal(seen[0][1], start)
    expected = list(row.sample(make_denoise([]), start, levels, make_next_noise()))
    assert len(steps) == len(expected) == STEPS - first_step
    for (timestep, *arrays), (other, *others) in zip(steps, expected, strict=True):
        assert timestep == other
        np.testing.assert_array_equal(arrays, others)
        assert arrays[0].dtype == np.float32


@pytest.mark.parametrize("from_noise", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("resamples", [1, 3])
def test_the_kept_part_is_put_back(name, from_noise, resamples):
    """With the image's own noise after each step, and with none at the end."""
    row, seen = find_sampler(name), []
    levels, steps = sample(keep(row, lambda: IMAGE, PAINTED, resamples, from_noise), 1, seen)
    expected = row.start(NOISE, levels[0].alpha)
    expected = expected if from_noise else diffuse(IMAGE, NOISE, levels[0].alpha)
    np.testing.assert_array_equal(seen[0][1], expected)
    for (_, latent, _), (timestep, alpha) in zip(steps, levels[1:], strict=True):
        known = IMAGE if timestep is None else diffuse(IMAGE, NOISE, alpha)
        np.testing.assert_array_equal(latent[KEPT], known[KEPT])
        assert np.abs(latent - known)[~KEPT].min() > 0
        assert latent.dtype == np.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_painted_part_is_the_samplers(name):
    """With everything painted nothing is put back: the steps are the sampler's."""
    row = find_sampler(name)
    levels, steps = sample(keep(row, lambda: IMAGE, np.ones_like(PAINTED)))
    start = row.start(NOISE, levels[0].alpha)
    expected = list(row.sample(make_denoise([]), start, levels, make_next_noise()))
    np.testing.assert_array_equal([s[1] for s in steps], [s[1] for s in expected])


def test_repainting_runs_each_step_again_from_more_noise():
    """All steps but the last: from the step's end, with what it removed added as fresh noise."""
    row, seen = find_sampler("ddim"), []
    levels, steps = sample(keep(row, lambda: IMAGE, PAINTED, num_resamples=3), 0, seen)
    timesteps = [timestep for timestep, _ in levels[:-1]]
    assert [t for t, _ in seen] == [t for t in timesteps[:-1] for _ in range(3)] + timesteps[-1:]
    assert [t for t, *_ in steps] == timesteps
    fresh, (here, there) = make_next_noise()(), levels[:2]
    x0, noise = split_prediction(predict(NOISE, here.timestep), NOISE, here.alpha)
    once = np.where(PAINTED, diffuse(x0, noise, there.alpha), diffuse(IMAGE, NOISE, there.alpha))
    again = diffuse(once, fresh, here.alpha / there.alpha)
    np.testing.assert_allclose(seen[1][1], again, rtol=1e-6)


def test_a_sent_latent_is_what_the_next_step_sees():
    row = find_sampler("ddim")
    for resamples in (1, 2):
        seen, other = [], np.full_like(NOISE, 0.5)
        repainted = keep(row, lambda: IMAGE, PAINTED, resamples)
        levels = SCHEDULE.levels(STEPS, None, row)
        steps = repainted.sample(make_denoise(seen), NOISE, levels, make_next_noise())
        next(steps)
        steps.send(other)
        np.testing.assert_array_equal(seen[resamples][1], other)


def test_an_image_is_encoded_when_sampling_begins():
    """So that all arguments are checked before."""
    calls = []
    row = start_from(find_sampler("ddim"), lambda: calls.append(1) or IMAGE)
    assert not calls
    sample(row)
    assert calls == [1]


@pytest.mark.parametrize("count", [0, 1.5, "2", True])
def test_numbers_of_repetitions_that_are_refused(count):
    with pytest.raises(ValueError, match="num_resamples must be an int from 1"):
        keep(find_sampler("ddim"), lambda: IMAGE, PAINTED, count)
