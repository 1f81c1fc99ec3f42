"""The samplers, against diffusers' schedulers step by step, and against the ODE's solution.

The reference is tests/data/sampler_golden.npz, which scripts/make_sampler_golden.py makes with
diffusers; needs neither diffusers nor torch. Errors are relative to the largest latent; diffusers
computes coefficients in float32, where UniPC's lose digits to cancellation.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import compare_samplers as script
from stable_diffusion import NoiseScheduler
from stable_diffusion.clip_tokenizer import WEIGHTS_DIR
from stable_diffusion.samplers import SAMPLERS, find
from stable_diffusion.samplers.multistep import get_levels

TOLERANCE = 2e-5
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
SPACINGS = {"linspace": 0, "leading": 1, "trailing": 0}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 3, 7, 20)


@pytest.fixture(scope="module")
def golden():
    path = Path(__file__).parent / "data" / "sampler_golden.npz"
    with np.load(path) as file:
        return dict(file)


def predict(latent, timestep):
    """The formula of scripts/make_sampler_golden.py."""
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


@pytest.mark.parametrize(
    ("name", "betas", "spacing", "prediction"),
    [
        names
        for names in itertools.product(SAMPLERS, BETAS, SPACINGS, PREDICTIONS)
        # diffusers' DDIM steps don't end where the next ones start, but with this spacing; the
        # quadratic ones replace them all.
        if names[2] == {"ddim": "leading", "dpmpp-2m-quadratic": "linspace"}.get(names[0], names[2])
    ],
)
def test_each_step_is_diffusers(golden, name, betas, spacing, prediction):
    schedule, key = (
        make_schedule(betas, spacing, prediction),
        f"{name}/{betas}/{spacing}/{prediction}",
    )
    timesteps, expected = golden[f"{key}/timesteps"], golden[f"{key}/latents"]
    steps = []
    for num_steps in STEPS:
        steps += find(name)(predict, golden["noise"], schedule, num_steps)
    assert [timestep for timestep, _ in steps] == timesteps.tolist()
    latents = np.stack([latent for _, latent in steps])
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


# The ODE


def solve(name, num_steps, **options):
    """Returns where a sampler arrives from fixed noise."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))  # float64
    *_, (_, latent) = find(name)(predict, noise, make_schedule(**options), num_steps)
    return latent


@pytest.mark.parametrize("name", list(SAMPLERS)[1:])
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_all_solve_the_same_equation(name, prediction):
    """In 250 steps they arrive where DDIM arrives in 999; and in 25 steps nearer than DDIM."""
    options = {"spacing": "trailing", "prediction": prediction}
    right = solve("ddim", 1000, **options)
    assert np.abs(solve(name, 250, **options) - right).max() < 0.01
    errors = [np.abs(solve(kind, 25, **options) - right).mean() for kind in (name, "ddim")]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("name", list(SAMPLERS)[1:])
def test_one_evaluation_a_step(name):
    seen = []

    def counted(latent, timestep):
        seen.append(timestep)
        return predict(latent, timestep)

    noise = np.zeros((1, 2, 3, 2), "float32")
    steps = list(find(name)(counted, noise, make_schedule(), 7))
    assert len(seen) == len(steps) == 7 and [t for t, _ in steps] == seen


@pytest.mark.parametrize("name", list(SAMPLERS)[1:])
def test_a_model_that_is_right_takes_one_step(name):
    """If every prediction is the same x0, any number of steps ends there."""
    x0 = np.random.default_rng(1).standard_normal((1, 2, 3, 2))
    schedule = make_schedule(prediction="sample")
    for num_steps in (1, 2, 5, 50):
        noise = np.random.default_rng(0).standard_normal(x0.shape)
        *_, (_, found) = find(name)(lambda *_: x0, noise, schedule, num_steps)
        np.testing.assert_allclose(found, x0, rtol=1e-12)


# Steps and names


@pytest.mark.parametrize(("spacing", "most"), [("linspace", 999), ("trailing", 1000)])
def test_numbers_of_steps(spacing, most):
    schedule = make_schedule(spacing=spacing)
    assert len(get_levels(schedule, most)) == most
    for wrong in (0, -1, most + 1, 2.5, None, "5"):
        with pytest.raises(ValueError, match=f"num_steps must be an int from 1 to {most}, not"):
            get_levels(schedule, wrong)


def test_quadratic_levels():
    schedule = make_schedule(spacing="leading")
    assert [timestep for timestep, _ in get_levels(schedule, 5, True)] == [999, 562, 250, 62, 0]
    for num_steps in range(2, 1001):
        timesteps = [timestep for timestep, _ in get_levels(schedule, num_steps, quadratic=True)]
        assert timesteps[0] == 999 and timesteps[-1] == 0
        assert (np.diff(timesteps) < 0).all() and len(timesteps) == num_steps
    assert get_levels(schedule, 1, True) == [(999, schedule.alphas_cumprod[999])]
    with pytest.raises(ValueError, match="from 1 to 1000, not 1001"):
        get_levels(schedule, 1001, quadratic=True)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_for_any_number_of_steps(spacing):
    schedule = make_schedule(spacing=spacing)
    for num_steps in range(1, 999):
        timesteps = [timestep for timestep, _ in get_levels(schedule, num_steps)]
        assert len(set(timesteps)) == num_steps
        assert timesteps == sorted(timesteps, reverse=True) and timesteps[-1] >= 0


def test_names():
    assert find(predict) is predict
    for wrong in ("euler", None, 3):
        message = f"one of ddim, dpmpp-2m, dpmpp-2m-quadratic, unipc, or a function, not {wrong!r}"
        with pytest.raises(ValueError, match=message):
            find(wrong)


@pytest.mark.large
def test_the_script_compares(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "REFERENCE", {"sampler": "ddim", "num_steps": 3})
    monkeypatch.setattr(script, "INTERVALS", [(0, 600)])
    monkeypatch.setattr(script, "CACHES", [2])
    names = (WEIGHTS_DIR / "emoji" / "subjects.txt").read_text("utf-8").splitlines()
    pictures = np.random.default_rng(0).integers(0, 256, (len(names), 128, 128, 4), "uint8")
    np.savez(tmp_path / "emoji.npz", names=names, pictures=pictures)
    arguments = ["--data", tmp_path / "emoji.npz", "--pictures", 2, "--steps", 3, "--json"]
    assert script.main([str(argument) for argument in arguments]) == 0
    reference, *rows = json.loads(capsys.readouterr().out)
    assert reference["error"] == 0 and reference["passes"] == 6
    errors = {row["name"]: row["error"] for row in rows if row["steps"] == 3}
    assert errors["ddim"] == 0 < errors["unipc"] != errors["dpmpp-2m"] > 0
    assert all(0 <= row["colour"] <= 100 and row["passes"] > 0 for row in rows)
