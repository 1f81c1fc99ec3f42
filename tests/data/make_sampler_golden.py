"""Makes what tests/test_samplers.py compares with: the steps of diffusers' own schedulers.

    pip install torch diffusers
    python tests/data/make_sampler_golden.py

Each scheduler follows a "model" that is a formula, so that the tests need neither torch nor
parameters. New noise is given. The steps go to tests/data/sampler_golden.npz.
"""

import argparse
import itertools
import sys
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch

FILE = Path(__file__).parent / "sampler_golden.npz"
SOLVER = "DPMSolverMultistepScheduler"
SAMPLERS = {  # case: diffusers' class, and its arguments
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddim-eta": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp-2m": (SOLVER, {}),
    "dpmpp-2m-quadratic": (SOLVER, {}),
    "dpmpp-2m-sde": (SOLVER, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
ETA = 0.6  # of ddim-eta
IN_SIGMAS = ("euler", "euler-a", "heun")  # their samples are x0 + σ noise
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
SPACINGS = {"linspace": 0, "leading": 1, "trailing": 0}  # and their offset of timesteps
KARRAS = ("euler", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc")
SCHEDULES = (*BETAS, "zero_snr")  # the latter is scaled_linear
LINEAR = ("ddim", "dpmpp-2m", "dpmpp-2m-quadratic", "unipc")  # also followed with these betas
NO_SNR = ("pndm", "heun")  # for these diffusers has no zero_snr
PREDICTIONS = ("epsilon", "v_prediction", "sample")
RUNS = ((2, 0), (3, 0), (7, 0), (20, 0), (7, 3))  # steps, and the first that is taken
# In diffusers the steps of these end at t - 1000 // n, which is the next timestep with leading, and
# with trailing if n divides 1,000.
BY_RATIO = ("ddim", "ddim-eta", "pndm")
DIVISORS = ((2, 0), (4, 0), (20, 0), (20, 14))
SINGLE = (1, 0)  # a run of one step
# With these spacings their only step is from timestep 0, where there is no noise to remove.
IDLE = ("ddpm", *IN_SIGMAS)


def list_runs(sampler, spacing):
    """Returns the runs of a sampler with a spacing."""
    runs = DIVISORS if sampler in BY_RATIO and spacing == "trailing" else RUNS
    if sampler == "pndm":  # whose steps from the middle mistake one value in diffusers
        runs = tuple(run for run in runs if run[1] == 0)
    return runs if sampler in IDLE and spacing in ("linspace", "karras") else (SINGLE, *runs)


def list_cases():
    """Yields the names of each combination that diffusers has."""
    for names in itertools.product(SAMPLERS, SCHEDULES, (*SPACINGS, "karras"), PREDICTIONS):
        sampler, schedule, spacing, prediction = names
        left_out = (
            (sampler in BY_RATIO and spacing == "linspace")
            or (sampler == "dpmpp-2m-quadratic" and spacing != "linspace")
            or (sampler == "lcm" and spacing != "leading")  # it has a grid of its own
            or (spacing == "karras" and sampler not in KARRAS)
            or (schedule == "zero_snr" and (sampler in NO_SNR or prediction == "epsilon"))
            or (schedule == "linear" and sampler not in LINEAR)
            # where diffusers' float32 loses digits at σ of 157
            or (schedule == "linear" and spacing == "karras")
            or (sampler in ("pndm", "euler-a") and prediction == "sample")
        )
        if not left_out:
            yield names


def predict(latent, timestep):
    """The formula: bounded, not linear, and different at each timestep."""
    return torch.tanh(latent * (1 + timestep / 1000)) - 0.3 * torch.cos(2 * latent)


def make_scheduler(sampler, schedule, spacing, prediction):
    """Returns diffusers' scheduler of a case; its schedule may also be "zero_snr_linear"."""
    name, options = SAMPLERS[sampler]
    zero_snr = schedule not in BETAS
    betas = {"zero_snr": "scaled_linear", "zero_snr_linear": "linear"}.get(schedule, schedule)
    karras = spacing == "karras"
    options = options | ({"use_karras_sigmas": True} if karras else {})
    options |= {"rescale_betas_zero_snr": True} if zero_snr else {}
    return getattr(diffusers, name)(
        beta_schedule=betas,
        beta_start=BETAS[betas][0],
        beta_end=BETAS[betas][1],
        prediction_type=prediction,
        timestep_spacing="linspace" if karras else spacing,
        steps_offset=SPACINGS.get(spacing, 0),
        **options,
    )


def set_timesteps(scheduler, sampler, steps, first):
    """Sets them on the scheduler, and returns those from step `first` on."""
    if sampler == "dpmpp-2m-quadratic":
        squares = [round(999 * (n / max(steps - 1, 1)) ** 2) for n in range(steps)]
        scheduler.set_timesteps(timesteps=squares[::-1] if steps > 1 else [999])
    else:
        scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * scheduler.order)
    return scheduler.timesteps[first * scheduler.order :]


@torch.no_grad()
def follow(sampler, schedule, spacing, prediction, noise, noises, steps, first=0):
    """Returns the timesteps, and the latent after each step: √alpha x0 + √(1 - alpha) noise.

    Args:
        sampler, schedule, spacing, prediction: names of the case.
        noise: the latent where it begins; at step 0 the noise.
        noises: new noise for each step.
        steps: number of steps of the whole run.
        first: number of the first step that is taken.
    """
    scheduler = make_scheduler(sampler, schedule, spacing, prediction)
    timesteps = set_timesteps(scheduler, sampler, steps, first)
    in_sigmas = sampler in IN_SIGMAS

    def scale(place):
        return (scheduler.sigmas[place] ** 2 + 1) ** 0.5 if in_sigmas else 1.0

    sample = noise * (scale(first * scheduler.order) if first else scheduler.init_noise_sigma)
    latents, starts = [], []
    module = sys.modules[type(scheduler).__module__]
    options = {"eta": ETA} if sampler == "ddim-eta" else {}
    for left, timestep in zip(range(len(timesteps))[::-1], timesteps, strict=True):
        output = predict(scheduler.scale_model_input(sample, timestep), float(timestep))
        new = noises[len(latents)]
        with mock.patch.object(module, "randn_tensor", return_value=new, create=True):
            sample = scheduler.step(output, timestep, sample, **options).prev_sample
        if len(starts) == len(latents):
            starts.append(float(timestep))
        # Heun's first half of a step; the last step has no other
        half_done = left and getattr(scheduler, "dt", None) is not None
        if not half_done and not (sampler == "pndm" and scheduler.counter == 1 < steps):
            latents.append(sample / scale(scheduler.step_index if in_sigmas else 0))
    return np.array(starts), torch.stack(latents).numpy()


def draw():
    """Returns the first noise, and new noise for each of 20 steps."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 2, 3, 2, generator=generator), torch.randn(
        20, 1, 2, 3, 2, generator=generator
    )


def main():
    """Writes all combinations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    path = parser.parse_args().out
    noise, noises = draw()
    arrays = {"noise": noise.numpy(), "noises": noises.numpy()}
    for names in list_cases():
        runs = list_runs(names[0], names[2])
        found = [follow(*names, noise, noises, *run) for run in runs]  # one after the other
        timesteps, latents = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        arrays["/".join(names) + "/timesteps"] = timesteps.astype("float32")
        arrays["/".join(names) + "/latents"] = latents.astype("float32")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
