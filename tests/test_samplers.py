"""The samplers, against diffusers' schedulers step by step, and against the ODE's solution.

The reference is tests/data/sampler_golden.npz, which tests/data/make_sampler_golden.py makes with
diffusers; needs neither diffusers nor torch. Errors are relative to the largest latent; diffusers
computes coefficients in float32, where UniPC's lose digits to cancellation.
"""

import itertools
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from helpers import DATA

from stable_diffusion import NoiseScheduler
from stable_diffusion.noise_scheduler import NoiseLevel, Sampler, split_prediction
from stable_diffusion.samplers import SAMPLERS, find_sampler

pytestmark = pytest.mark.quick

TOLERANCE = 2e-5
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
SPACINGS = {"linspace": 0, "leading": 1, "trailing": 0}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 3, 7, 20)


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "sampler_golden.npz") as file:
        return dict(file)


def predict(latent, timestep):
    """The formula of tests/data/make_sampler_golden.py."""
    return np.tanh(latent * (1 + timestep / 1000)) - 0.3 * np.cos(2 * latent)


def make_schedule(betas="scaled_linear", spacing="linspace", prediction="epsilon", **options):
    start, end = BETAS[betas]
    return NoiseScheduler(
        beta_start=start,
        beta_end=end,
        beta_schedule=betas,
        prediction_type=prediction,
        spacing=spacing,
        steps_offset=SPACINGS[spacing],
        **options,
    )


def sample(name, latent, schedule, num_steps, spacing=None, model=predict):
    """Yields the steps of a sampler, `(timestep, latent, x0)`."""
    sampler = find_sampler(name)

    def denoise(latent, alpha, timestep=None):
        return split_prediction(model(latent, timestep), latent, alpha, schedule.prediction_type)

    levels = schedule.levels(num_steps, spacing, sampler)
    return sampler.sample(denoise, latent, levels, None)


GOLDEN = [*SAMPLERS, "dpmpp-2m-quadratic"]


@pytest.mark.parametrize(
    ("name", "betas", "spacing", "prediction"),
    [
        names
        for names in itertools.product(GOLDEN, BETAS, SPACINGS, PREDICTIONS)
        # diffusers' DDIM steps end where the next ones start only with this spacing; the quadratic
        # timesteps replace all others.
        if names[2] == {"ddim": "leading", "dpmpp-2m-quadratic": "linspace"}.get(names[0], names[2])
    ],
)
def test_each_step_is_diffusers(golden, name, betas, spacing, prediction):
    schedule = make_schedule(betas, spacing, prediction)
    key = f"{name}/{betas}/{spacing}/{prediction}"
    timesteps, expected = golden[f"{key}/timesteps"], golden[f"{key}/latents"]
    steps, quadratic = [], "quadratic" if name.endswith("quadratic") else None
    for num_steps in STEPS:
        noise = golden["noise"]
        steps += sample(name.removesuffix("-quadratic"), noise, schedule, num_steps, quadratic)
    assert [timestep for timestep, *_ in steps] == timesteps.tolist()
    latents = np.stack([latent for _, latent, _ in steps])
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


# The ODE


def solve(name, num_steps, spacing=None, **options):
    """Returns where a sampler arrives from fixed noise."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))  # float64
    *_, (_, latent, _) = sample(name, noise, make_schedule(**options), num_steps, spacing)
    return latent


SOLVERS = [name for name in SAMPLERS if name != "ddim"]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_all_solve_the_same_equation(name, prediction):
    """In 250 steps they arrive where DDIM arrives in 1000; and in 25 steps closer than DDIM."""
    options = {"spacing": "trailing", "prediction": prediction}
    right = solve("ddim", 1000, **options)
    assert np.abs(solve(name, 250, **options) - right).max() < 0.01
    errors = [np.abs(solve(kind, 25, **options) - right).mean() for kind in (name, "ddim")]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_quadratic_steps_solve_it_too(prediction):
    right = solve("ddim", 1000, "trailing", prediction=prediction)
    assert np.abs(solve("dpmpp-2m", 250, "quadratic", prediction=prediction) - right).max() < 0.01


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_evaluation_a_step(name):
    seen = []

    def counted(latent, timestep):
        seen.append(timestep)
        return predict(latent, timestep)

    noise = np.zeros((1, 2, 3, 2), "float32")
    steps = list(sample(name, noise, make_schedule(), 7, model=counted))
    assert len(seen) == len(steps) == 7 and [t for t, *_ in steps] == seen


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_is_right_needs_one_step(name):
    """If every prediction is the same x0, any number of steps ends there."""
    x0 = np.random.default_rng(1).standard_normal((1, 2, 3, 2))
    schedule = make_schedule(prediction="sample")
    for num_steps in (1, 2, 5, 50):
        noise = np.random.default_rng(0).standard_normal(x0.shape)
        *_, (_, found, _) = sample(name, noise, schedule, num_steps, model=lambda *_: x0)
        np.testing.assert_allclose(found, x0, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_yield_what_the_model_predicts(name):
    """x0 is what `denoise` returned, and no array that was yielded is changed later."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))
    schedule, predicted = make_schedule(prediction="sample"), []

    def model(latent, timestep):
        predicted.append(predict(latent, timestep))
        return predicted[-1]

    steps, copies = [], []
    for step in sample(name, noise, schedule, 5, model=model):
        steps.append(step)
        copies.append([array.copy() for array in step[1:]])
    for (_, latent, x0), (latent_then, x0_then), right in zip(
        steps, copies, predicted, strict=True
    ):
        np.testing.assert_array_equal(x0, right)
        np.testing.assert_array_equal(x0, x0_then)
        np.testing.assert_array_equal(latent, latent_then)
    assert (noise == np.random.default_rng(0).standard_normal((1, 2, 3, 2))).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sent_latent_is_what_the_next_step_sees(name):
    seen = []

    def model(latent, timestep):
        seen.append(latent)
        return predict(latent, timestep)

    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))
    steps = sample(name, noise, make_schedule(), 4, model=model)
    _, latent, _ = next(steps)
    other = latent + 1
    steps.send(other)
    next(steps)
    np.testing.assert_array_equal(seen[1], other)
    assert not np.array_equal(seen[2], other)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_middle_of_the_levels_is_a_start(name):
    """One-step samplers go on from the middle as from the start; solvers begin anew there."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))
    schedule, sampler = make_schedule(), find_sampler(name)
    whole = list(sample(name, noise, schedule, 6))

    def denoise(latent, alpha, timestep=None):
        return split_prediction(predict(latent, timestep), latent, alpha)

    levels = schedule.levels(6, None, sampler)
    rest = list(sampler.sample(denoise, whole[1][1], levels[2:], None))
    assert [t for t, *_ in rest] == [t for t, *_ in whole[2:]]
    if name == "ddim":
        np.testing.assert_array_equal(rest[-1][1], whole[-1][1])
    assert np.abs(rest[-1][1] - whole[-1][1]).max() < 0.5


# Levels and names


@pytest.mark.parametrize(("spacing", "most"), [("linspace", 999), ("trailing", 1000)])
def test_numbers_of_steps(spacing, most):
    schedule, solver = make_schedule(spacing=spacing), SAMPLERS["unipc"]
    assert len(schedule.levels(most, sampler=solver)) == most + 1
    for wrong in (0, -1, most + 1, 2.5, None, "5"):
        with pytest.raises(ValueError, match=f"num_steps must be an int from 1 to {most}, not"):
            schedule.levels(wrong, sampler=solver)


def find_timesteps(*arguments):
    *timesteps, end = [timestep for timestep, _ in make_schedule().levels(*arguments)]
    assert end is None
    return timesteps


def test_quadratic_levels():
    schedule = make_schedule(spacing="leading")
    assert find_timesteps(5, "quadratic") == [999, 562, 250, 62, 0]
    for num_steps in range(2, 1001):
        timesteps = find_timesteps(num_steps, "quadratic")
        assert timesteps[0] == 999 and timesteps[-1] == 0
        assert (np.diff(timesteps) < 0).all() and len(timesteps) == num_steps
    assert schedule.levels(1, "quadratic")[0] == (999, schedule.alphas_cumprod[999])
    with pytest.raises(ValueError, match="from 1 to 1000, not 1001"):
        schedule.levels(1001, "quadratic")
    with pytest.raises(ValueError, match="one of linspace, leading, trailing, quadratic, not 'x'"):
        schedule.levels(5, "x")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_of_solvers_for_any_number_of_steps(spacing):
    for num_steps in range(1, 999):
        timesteps = find_timesteps(num_steps, spacing, SAMPLERS["dpmpp-2m"])
        assert len(set(timesteps)) == num_steps
        assert timesteps == sorted(timesteps, reverse=True) and timesteps[-1] >= 0


def test_each_row_says_its_levels():
    """An extra point leaves the least noisy timestep out; the last alpha is the row's own."""
    schedule = make_schedule(spacing="linspace", final_alpha=None)
    ddim, solver = (schedule.levels(4, sampler=SAMPLERS[name]) for name in ("ddim", "unipc"))
    assert [t for t, _ in ddim] == [999, 666, 333, 0, None]
    assert [t for t, _ in solver] == [999, 749, 500, 250, None]
    assert ddim[-1] == (None, schedule.alphas_cumprod[0]) and solver[-1] == (None, 1.0)


def test_timesteps_that_are_not_rounded():
    schedule = make_schedule()
    levels = schedule.levels(5, sampler=Sampler(None, rounded=False))
    assert [t for t, _ in levels] == [999.0, 749.25, 499.5, 249.75, 0.0, None]
    assert all(isinstance(level, NoiseLevel) for level in levels)
    alphas = schedule.alphas_cumprod
    assert levels[0].alpha == pytest.approx(alphas[999], rel=1e-12)
    assert alphas[500] < levels[2].alpha < alphas[499]
    log_sigma = 0.5 * np.log((1 - alphas) / alphas)
    middle = 0.5 * np.log((1 - levels[2].alpha) / levels[2].alpha)
    assert middle == pytest.approx((log_sigma[499] + log_sigma[500]) / 2, rel=1e-12)


def test_the_timestep_of_an_alpha():
    schedule = make_schedule()
    for timestep in (0, 1, 500, 999):
        assert schedule.find_timestep(schedule.alphas_cumprod[timestep]) == pytest.approx(timestep)
    for timestep, alpha in schedule.levels(7, sampler=Sampler(None, rounded=False))[:-1]:
        assert schedule.find_timestep(alpha) == pytest.approx(timestep, abs=1e-9)


def test_rows_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        SAMPLERS["ddim"].rounded = False


def test_names():
    assert find_sampler("unipc") is SAMPLERS["unipc"] is find_sampler(SAMPLERS["unipc"])
    assert find_sampler(predict) == Sampler(predict)
    for wrong in ("euler", None, 3):
        message = f"one of ddim, dpmpp-2m, unipc, or a function, not {wrong!r}"
        with pytest.raises(ValueError, match=message):
            find_sampler(wrong)
