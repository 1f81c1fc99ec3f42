"""The samplers, against diffusers' schedulers step by step, and against the ODE's solution.

The reference is tests/data/sampler_golden.npz, which tests/data/make_sampler_golden.py makes with
diffusers; needs neither diffusers nor torch. Errors are relative to the largest latent; diffusers
computes coefficients in float32, where UniPC's lose digits to cancellation.
"""

from dataclasses import FrozenInstanceError
from functools import partial

import numpy as np
import pytest
from helpers import DATA, SPACINGS, make_schedule

from stable_diffusion.config import Config, SamplerConfig, UNetConfig
from stable_diffusion.noise_scheduler import NoiseLevel, diffuse, split_prediction
from stable_diffusion.samplers import (
    SAMPLERS,
    bind_options,
    choose_sampler,
    find_sampler,
    is_for_few_steps,
    name_sampler,
)
from stable_diffusion.samplers.sampler import Sampler

pytestmark = pytest.mark.quick

TOLERANCE = 2e-5
# Without signal diffusers' Euler adds x0 to 4,096 times the noise in float32, and loses 12 bits.
EULER_TOLERANCE = 5e-4
TIMESTEP_TOLERANCE = 2e-3  # of floats; diffusers finds them of logarithms in float32
PREDICTIONS = ("epsilon", "v_prediction", "sample")
NAMES = {"ddim-eta": "ddim", "dpmpp-2m-quadratic": "dpmpp-2m"}  # of cases, see the script
ETA = 0.6
RUNS = ((2, 0), (3, 0), (7, 0), (20, 0), (7, 3))  # steps, and the first that is taken
DIVISORS = ((2, 0), (4, 0), (20, 0), (20, 14))


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "sampler_golden.npz") as file:
        return dict(file)


def predict(latent, timestep):
    """The formula of tests/data/make_sampler_golden.py."""
    return np.tanh(latent * (1 + timestep / 1000)) - 0.3 * np.cos(2 * latent)


def sample(
    name, latent, schedule, num_steps, spacing=None, model=predict, first=0, noises=(), **options
):
    """Returns the steps of a sampler from step `first` on: an iterator of `(timestep, latent, x0)`.

    Each new noise is the next of `noises`, or a constant where they end.
    """
    sampler, noises = find_sampler(name), iter(noises)

    def denoise(latent, alpha, timestep=None):
        return split_prediction(model(latent, timestep), latent, alpha, schedule.prediction_type)

    levels = schedule.levels(num_steps, spacing, sampler)
    sampler = bind_options(sampler, options, schedule.prediction_type)
    next_noise = lambda: next(noises, 0.1 * np.ones((1, 1)))  # noqa: E731
    return sampler.sample(denoise, latent, levels[first:], next_noise)


# Against diffusers


def list_cases():
    with np.load(DATA / "sampler_golden.npz") as file:
        return [key.removesuffix("/latents") for key in file.files if key.endswith("/latents")]


def list_runs(case, spacing):
    """As in tests/data/make_sampler_golden.py."""
    by_ratio = case in ("ddim", "ddim-eta", "pndm") and spacing == "trailing"
    runs = [run for run in (DIVISORS if by_ratio else RUNS) if case != "pndm" or run[1] == 0]
    idle = case in ("ddpm", "euler", "euler-a", "heun") and spacing in ("linspace", "karras")
    return runs if idle else [(1, 0), *runs]


@pytest.mark.parametrize("key", list_cases())
def test_each_step_is_diffusers(golden, key):
    case, schedule, spacing, prediction = key.split("/")
    zero_snr, karras = schedule == "zero_snr", spacing == "karras"
    final = {"final_alpha": None} if case in ("ddim-eta", "pndm") else {}
    betas = "scaled_linear" if zero_snr else schedule
    # The schedule's own spacing, but for those that are none of a schedule.
    schedule = make_schedule(
        betas, "linspace" if karras else spacing, prediction, zero_snr=zero_snr, **final
    )
    spacing = "quadratic" if case.endswith("quadratic") else "karras" if karras else None
    name, options = NAMES.get(case, case), {"eta": ETA} if case == "ddim-eta" else {}
    steps = []
    for num_steps, first in list_runs(case, schedule.spacing if not karras else spacing):
        latent, noises = golden["noise"], golden["noises"]
        if not first:
            sampler = find_sampler(name, spacing or schedule.spacing)
            latent = sampler.start(latent, schedule.levels(num_steps, spacing, sampler)[0].alpha)
        steps += sample(
            name, latent, schedule, num_steps, spacing, first=first, noises=noises, **options
        )
    timesteps, expected = golden[f"{key}/timesteps"], golden[f"{key}/latents"]
    found, latents = [timestep for timestep, *_ in steps], np.stack([step[1] for step in steps])
    if SAMPLERS[name].rounded or SAMPLERS[name].rounded_karras:
        assert found == timesteps.tolist()
    np.testing.assert_allclose(found, timesteps, atol=TIMESTEP_TOLERANCE, rtol=0)
    assert latents.dtype == np.float32
    tolerance = EULER_TOLERANCE if zero_snr and case.startswith("euler") else TOLERANCE
    np.testing.assert_allclose(latents, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_case_is_missing(name):
    """Each sampler has each spacing that diffusers has for it, with epsilon and v."""
    cases = {tuple(case.split("/")) for case in list_cases()}
    karras = ["karras"] if name not in ("ddim", "ddpm", "pndm", "euler-a", "lcm") else []
    spacings = {
        "ddim": ["leading", "trailing"],
        "pndm": ["leading", "trailing"],
        "lcm": ["leading"],
    }.get(name, [*SPACINGS, *karras])
    for prediction in ("epsilon", "v_prediction"):
        assert {(name, "scaled_linear", spacing, prediction) for spacing in spacings} <= cases
    if name not in ("pndm", "heun"):
        assert {(name, "zero_snr", spacing, "v_prediction") for spacing in spacings} <= cases


# The ODE


def solve(name, num_steps, spacing=None, **options):
    """Returns where a sampler arrives from fixed noise."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))  # float64
    *_, (_, latent, _) = sample(name, noise, make_schedule(**options), num_steps, spacing)
    return latent


SOLVERS = {"pndm": 1.5, "heun": 2, "dpmpp-2m": 2, "unipc": 2}  # of higher order: how much better


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_all_solve_the_same_equation(name, prediction):
    """In 250 steps they arrive where DDIM arrives in 1000; and in 25 steps closer than DDIM."""
    options = {"spacing": "trailing", "prediction": prediction}
    right = solve("ddim", 1000, **options)
    assert np.abs(solve(name, 250, **options) - right).max() < 0.01
    errors = [np.abs(solve(kind, 25, **options) - right).mean() for kind in (name, "ddim")]
    assert errors[0] < errors[1] / SOLVERS[name]


@pytest.mark.parametrize("name", ["dpmpp-2m", "euler", "heun", "ddim"])
@pytest.mark.parametrize("spacing", ["quadratic", "karras"])
@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_with_other_steps_they_solve_it_too(prediction, spacing, name):
    right = solve("ddim", 1000, "trailing", prediction=prediction)
    assert np.abs(solve(name, 250, spacing, prediction=prediction) - right).max() < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_of_each_step(name):
    """One, but for Heun's two, of which the last step has one, and PNDM's two in its first step."""
    seen = []

    def counted(latent, timestep):
        seen.append(timestep)
        return predict(latent, timestep)

    noise = np.zeros((1, 2, 3, 2), "float32")
    steps = list(sample(name, noise, make_schedule(), 7, model=counted))
    starts = [t for t, *_ in steps]
    assert len(steps) == 7
    if name == "heun":
        assert seen == [starts[0], *(t for t in starts[1:] for _ in range(2))]
    elif name == "pndm":
        assert seen == [*starts[:2], *starts[1:]]
    else:
        assert seen == starts


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_is_right_needs_one_step(name):
    """If every prediction is the same x0, any number of steps ends there.

    LCM keeps a small part of the last latent: one of 145,000 where 50 steps end.
    """
    x0 = np.random.default_rng(1).standard_normal((1, 2, 3, 2))
    schedule = make_schedule(prediction="sample")
    for num_steps in (1, 2, 5, 50):
        noise = np.random.default_rng(0).standard_normal(x0.shape)
        *_, (_, found, _) = sample(name, noise, schedule, num_steps, model=lambda *_: x0)
        atol = 2e-5 if name == "lcm" else 1e-14
        np.testing.assert_allclose(found, x0, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_yield_what_the_model_predicts(name):
    """x0 is what `denoise` returned first, and no array that was yielded is changed later."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))
    schedule, predicted = make_schedule(prediction="sample"), []

    def model(latent, timestep):
        predicted.append(predict(latent, timestep))
        return predicted[-1]

    steps, copies, begun = [], [], []
    iterator = sample(name, noise, schedule, 5, model=model)
    for _ in range(5):
        begun.append(len(predicted))
        steps.append(next(iterator))
        copies.append([array.copy() for array in steps[-1][1:]])
    for (_, latent, x0), (latent_then, x0_then), n in zip(steps, copies, begun, strict=True):
        np.testing.assert_array_equal(x0, predicted[n])
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
    other, begun = latent + 1, len(seen)
    steps.send(other)
    after = len(seen)
    next(steps)
    np.testing.assert_array_equal(seen[begun], other)
    assert not np.array_equal(seen[after], other)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_middle_of_the_levels_is_a_start(name):
    """One-step samplers go on from the middle as from the start; solvers begin anew there."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 2))
    schedule = make_schedule()
    whole = list(sample(name, noise, schedule, 6))
    rest = list(sample(name, whole[1][1], schedule, 6, first=2))
    assert [t for t, *_ in rest] == [t for t, *_ in whole[2:]]
    if name not in ("pndm", "dpmpp-2m", "dpmpp-2m-sde", "unipc"):
        np.testing.assert_array_equal(rest[-1][1], whole[-1][1])
    bound = 2 if name in ("pndm", "dpmpp-2m-sde") else 0.5
    assert np.abs(rest[-1][1] - whole[-1][1]).max() < bound


# New noise

STOCHASTIC = ("ddpm", "euler-a", "dpmpp-2m-sde", "lcm")


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_stochastic_samplers_take_noise(name):
    """None of them in the last step, which ends without noise."""
    taken = []

    def next_noise():
        taken.append(len(taken))
        return np.ones((1, 2, 3, 2))

    def denoise(latent, alpha, timestep=None):
        return split_prediction(predict(latent, timestep), latent, alpha)

    sampler, noise = find_sampler(name), np.zeros((1, 2, 3, 2))
    list(sampler.sample(denoise, noise, make_schedule().levels(5, None, sampler), next_noise))
    assert len(taken) == (4 if name in STOCHASTIC else 0)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler-a", "dpmpp-2m-sde"])
def test_variance_is_kept(name):
    """If the model knows x0, latents have the variance of each level, with eta 0.3 and with 1."""
    rng, options = np.random.default_rng(0), {"eta": 0.3} if name == "ddim" else {}
    schedule = make_schedule(prediction="sample")
    levels = schedule.levels(5, None, find_sampler(name))
    noises = rng.standard_normal((5, 1, 200, 200, 1))
    steps = sample(
        name, rng.standard_normal((1, 200, 200, 1)), schedule, 5, model=lambda *_: np.zeros(1),
        noises=noises, **options,
    )  # fmt: skip
    for (_, latent, _), (_, alpha) in zip(steps, levels[1:], strict=True):
        assert latent.std() == pytest.approx((1 - alpha) ** 0.5, rel=0.02)


# Levels and names


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("function", [False, True], ids=["name", "function"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_v_prediction_from_no_signal_at_all(name, function, spacing):
    """A model that knows x0 finds it, from alpha 0 on."""
    schedule = make_schedule(spacing=spacing, prediction="v_prediction", zero_snr=True)
    x0, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 4))

    def know(latent, alpha, timestep=None):
        v = (alpha**0.5 * latent - x0) / (1 - alpha) ** 0.5
        return split_prediction(v, latent, alpha, "v_prediction")

    sampler = find_sampler(SAMPLERS[name].sample if function else name)
    levels = schedule.levels(8, None, sampler)
    sampler = bind_options(sampler, {}, "v_prediction")
    steps = list(sampler.sample(know, noise, levels, lambda: noise))
    assert (spacing == "leading" and name != "lcm") or steps[0][0] == 999
    np.testing.assert_allclose(steps[-1][2], x0, rtol=1e-6)
    assert all(np.isfinite(latent).all() for _, latent, _ in steps)


@pytest.mark.parametrize(("spacing", "most"), [("linspace", 999), ("trailing", 1000)])
def test_numbers_of_steps(spacing, most):
    schedule, solver = make_schedule(spacing=spacing), SAMPLERS["unipc"]
    assert len(schedule.levels(most, grid=solver)) == most + 1
    for wrong in (0, -1, most + 1, 2.5, None, "5"):
        with pytest.raises(ValueError, match=f"num_steps must be an int from 1 to {most}, not"):
            schedule.levels(wrong, grid=solver)


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
    with pytest.raises(ValueError, match="one of linspace, .*, quadratic, karras, not 'x'"):
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
    ddim, solver = (schedule.levels(4, grid=SAMPLERS[name]) for name in ("ddim", "unipc"))
    assert [t for t, _ in ddim] == [999, 666, 333, 0, None]
    assert [t for t, _ in solver] == [999, 749, 500, 250, None]
    assert ddim[-1] == (None, schedule.alphas_cumprod[0]) and solver[-1] == (None, 1.0)


def test_timesteps_that_are_not_rounded():
    schedule = make_schedule()
    levels = schedule.levels(5, grid=Sampler(sample=None, rounded=False))
    assert [t for t, _ in levels] == [999.0, 749.25, 499.5, 249.75, 0.0, None]
    assert all(isinstance(level, NoiseLevel) for level in levels)
    alphas = schedule.alphas_cumprod
    assert levels[0].alpha == pytest.approx(alphas[999], rel=1e-12)
    assert alphas[500] < levels[2].alpha < alphas[499]
    sigma = ((1 - alphas) / alphas) ** 0.5
    middle = ((1 - levels[2].alpha) / levels[2].alpha) ** 0.5
    assert middle == pytest.approx((sigma[499] + sigma[500]) / 2, rel=1e-12)


def test_the_timestep_of_an_alpha():
    schedule = make_schedule()
    for timestep in (0, 1, 500, 999):
        assert schedule.find_timestep(schedule.alphas_cumprod[timestep]) == pytest.approx(timestep)
    for timestep, alpha in schedule.levels(7, "karras", Sampler(sample=None, rounded=False))[:-1]:
        assert schedule.find_timestep(alpha) == pytest.approx(timestep, abs=1e-9)
    log_sigma = 0.5 * np.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    alpha = 1 / (1 + np.exp(log_sigma[499] + log_sigma[500]))  # log σ is linear between timesteps
    assert schedule.find_timestep(alpha) == pytest.approx(499.5, abs=1e-9)


def test_karras_levels():
    """Karras et al. 2022, equation 5, between the schedule's first σ and its last."""
    schedule = make_schedule()
    first, last = (((1 - a) / a) ** (1 / 14) for a in schedule.alphas_cumprod[[-1, 0]])
    expected = [(first + k / 9 * (last - first)) ** 7 for k in range(10)]
    for name in ("ddim", "euler", "dpmpp-2m"):
        *levels, end = schedule.levels(10, "karras", SAMPLERS[name])
        found = [((1 - alpha) / alpha) ** 0.5 for _, alpha in levels]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert end == (None, 1.0)
    timesteps = [timestep for timestep, _ in levels]
    assert timesteps == sorted({round(t) for t in timesteps}, reverse=True)
    floats = [t for t, _ in schedule.levels(10, "karras")[:-1]]
    assert [round(t) for t in floats] == timesteps != floats
    assert schedule.levels(1, "karras")[0].timestep == pytest.approx(999)


@pytest.mark.parametrize("spacing", ["quadratic", "karras"])
@pytest.mark.parametrize("name", ["pndm", "lcm"])
def test_spacings_that_samplers_refuse(name, spacing):
    message = f"one of linspace, leading, trailing with this sampler, not '{spacing}'"
    with pytest.raises(ValueError, match=message):
        make_schedule().levels(5, spacing, SAMPLERS[name])


def test_lcm_has_a_grid_of_its_own():
    """The first timesteps of the 50 that it was trained at, whatever the spacing."""
    for spacing in ("linspace", "leading", "trailing"):
        schedule = make_schedule(spacing=spacing)
        levels = schedule.levels(4, None, SAMPLERS["lcm"])
        assert [t for t, _ in levels] == [999, 759, 499, 259, None]
        assert [a for _, a in levels] == [*schedule.alphas_cumprod[[999, 759, 499, 259]], 1.0]
        assert len(schedule.levels(50, None, SAMPLERS["lcm"])) == 51
        with pytest.raises(ValueError, match="num_steps must be an int from 1 to 50, not 51"):
            schedule.levels(51, None, SAMPLERS["lcm"])


def test_lcm_keeps_a_part_of_the_latent():
    """c_skip and c_out of its code, at a timestep where they differ from 0 and 1."""
    x0, latent, new = np.random.default_rng(0).standard_normal((3, 2, 3))
    for end, noise in ((1.0, 0 * new), (0.95, new)):
        levels = [(1, 0.9), (None, end)]
        ((_, found, _),) = SAMPLERS["lcm"].sample(
            lambda *_: (x0, None), latent, levels, lambda: new
        )
        denoised = 10 / (100 + 0.25) ** 0.5 * x0 + 0.25 / (100 + 0.25) * latent
        expected = end**0.5 * denoised + (1 - end) ** 0.5 * noise
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_first_noise():
    """diffusers' init_noise_sigma: less noise, unless it is told to lead."""
    for name, row in SAMPLERS.items():
        for spacing in ("leading", "linspace", "trailing", "karras"):
            less = name in ("euler", "euler-a", "heun") and spacing != "leading"
            found = find_sampler(row, spacing).start(2.0, 0.19)
            assert found == pytest.approx(1.8 if less else 2.0)


def test_rows_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        SAMPLERS["ddim"].rounded = False


def test_names():
    assert find_sampler("unipc") is SAMPLERS["unipc"] is find_sampler(SAMPLERS["unipc"])
    assert find_sampler(predict) == Sampler(sample=predict)
    for name, row in SAMPLERS.items():  # a solver has its own levels, however it is named
        if name != "euler":  # Euler's function is DDIM's
            assert find_sampler(row.sample) is SAMPLERS[name]
    for wrong in ("best", None, 3):
        message = f"one of ddim, ddpm, .*, lcm, or a function, not {wrong!r}"
        with pytest.raises(ValueError, match=message):
            find_sampler(wrong)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("eular", "euler"), ("dpm++2m", "dpmpp-2m"), ("DDIM", None), ("euler_a", "euler-a")],
)
def test_a_misspelt_name_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match="Did you mean '" + near if near else "not 'DDIM'"):
        find_sampler(wrong)


# What checkpoints name

NAMED = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}


@pytest.mark.parametrize(("scheduler", "name"), NAMED.items())
def test_auto_is_what_the_checkpoint_names(scheduler, name):
    assert name_sampler(SamplerConfig(scheduler)) == (name, None)
    spacing = None if name in ("pndm", "lcm") else "karras"
    assert name_sampler(SamplerConfig(scheduler, spacing="karras")) == (name, spacing)
    config = Config(sampler=SamplerConfig(scheduler, spacing="linspace"))
    row, spacing = choose_sampler("auto", None, config)
    assert row is SAMPLERS[name] and spacing == "linspace"
    assert choose_sampler("auto", "trailing", config) == (row, "trailing")
    assert choose_sampler("ddim", None, config) == (SAMPLERS["ddim"], config.schedule.spacing)


def test_algorithms_of_dpm_solver():
    kind = partial(SamplerConfig, "DPMSolverMultistepScheduler")
    assert name_sampler(kind("dpmsolver++", "karras")) == ("dpmpp-2m", "karras")
    assert name_sampler(kind("sde-dpmsolver++")) == ("dpmpp-2m-sde", None)
    with pytest.warns(UserWarning, match="DPMSolverMultistepScheduler with dpmsolver'. DDIM"):
        assert name_sampler(kind("dpmsolver")) == ("ddim", None)


def test_an_unknown_scheduler_is_told():
    with pytest.warns(UserWarning, match="not here, 'LMSDiscreteScheduler'. DDIM is taken"):
        row, spacing = choose_sampler(
            "auto", None, Config(sampler=SamplerConfig("LMSDiscreteScheduler"))
        )
    assert row is SAMPLERS["ddim"]


def test_checkpoints_for_few_steps():
    assert is_for_few_steps(Config(sampler=SamplerConfig("LCMScheduler")))
    assert is_for_few_steps(Config(unet=UNetConfig(guidance_width=256)))
    assert not is_for_few_steps(Config(sampler=SamplerConfig("PNDMScheduler")))


# Options of its own


def test_options_are_checked():
    def steer(denoise, latent, levels, next_noise, strength=1):
        return strength

    def steer_freely(denoise, latent, levels, next_noise, **options):
        return options

    assert bind_options(Sampler(sample=steer), {"strength": 3}).sample(1, 2, 3, 4) == 3
    assert bind_options(Sampler(sample=steer_freely), {"x": 3}).sample(1, 2, 3, 4) == {"x": 3}
    assert bind_options(SAMPLERS["euler"], {}, "sample") is SAMPLERS["euler"]
    bound = bind_options(SAMPLERS["ddim"], {"eta": np.float32(1)}).sample
    assert isinstance(bound, partial) and bound.keywords == {"eta": 1.0}
    bound = bind_options(SAMPLERS["pndm"], {}, "v_prediction").sample
    assert bound.keywords == {"prediction_type": "v_prediction"}
    for sampler, options, message in [
        ("ddim", {"etta": 1}, "sampler ddim has no option 'etta': it accepts eta"),
        ("euler", {"eta": 1}, "sampler euler has no option 'eta': it accepts none"),
        ("pndm", {"prediction_type": "sample"}, "sampler pndm has no option 'prediction_type'"),
        (steer, {"x": 1}, "sampler steer has no option 'x': it accepts strength"),
        ("ddim", {"eta": 1.5}, "eta must be a number from 0 to 1, not 1.5"),
        ("ddim", {"eta": float("nan")}, "eta must be a number from 0 to 1, not nan"),
        ("ddim", {"eta": "1"}, "eta must be a number from 0 to 1, not '1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            bind_options(find_sampler(sampler), options)


def test_eta_1_is_ddpm():
    """Song et al. 2021, section 4.1; here of DDPM's own formulas, written out."""
    x0, noise, new = np.random.default_rng(0).standard_normal((3, 2, 3))
    a, b = 0.3, 0.8
    latent = diffuse(x0, noise, a)
    beta = 1 - a / b
    mean = b**0.5 * beta / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * latent
    expected = mean + (beta * (1 - b) / (1 - a)) ** 0.5 * new
    levels = [(600, a), (200, b)]
    for sampler, options in (("ddim", {"eta": 1}), ("ddpm", {}), ("euler-a", {})):
        sample = bind_options(find_sampler(sampler), options).sample
        ((_, found, _),) = sample(lambda *_: (x0, noise), latent, levels, lambda: new)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
