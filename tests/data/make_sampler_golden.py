"""Makes what tests/test_samplers.py compares with: the steps of diffusers' own schedulers.

    pip install torch diffusers
    python tests/data/make_sampler_golden.py

Each scheduler follows a "model" that is a formula, so that the tests need neither torch nor
parameters. The steps go to tests/data/sampler_golden.npz.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

FILE = Path(__file__).parent / "sampler_golden.npz"
SAMPLERS = {
    "ddim": DDIMScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "dpmpp-2m-quadratic": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
SPACINGS = {"linspace": 0, "leading": 1, "trailing": 0}  # and their offset of timesteps
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 3, 7, 20)


def predict(latent, timestep):
    """The formula: bounded, not linear, and different at each timestep."""
    return torch.tanh(latent * (1 + timestep / 1000)) - 0.3 * torch.cos(2 * latent)


def follow(sampler, betas, spacing, prediction, noise, steps):
    """Returns the timesteps, and the latent after each step."""
    start, end = BETAS[betas]
    options = {"clip_sample": False, "set_alpha_to_one": True} if sampler == "ddim" else {}
    scheduler = SAMPLERS[sampler](
        beta_schedule=betas,
        beta_start=start,
        beta_end=end,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=SPACINGS[spacing],
        **options,
    )
    if sampler == "dpmpp-2m-quadratic":
        squares = [round(999 * (n / max(steps - 1, 1)) ** 2) for n in range(steps)]
        scheduler.set_timesteps(timesteps=squares[::-1] if steps > 1 else [999])
    else:
        scheduler.set_timesteps(steps)
    latent, latents = noise, []
    for timestep in scheduler.timesteps:
        latent = scheduler.step(predict(latent, int(timestep)), timestep, latent).prev_sample
        latents.append(latent)
    return scheduler.timesteps.numpy(), torch.stack(latents).numpy()


def main():
    """Writes all combinations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    path = parser.parse_args().out
    noise = torch.randn(1, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    arrays = {"noise": noise.numpy()}
    # DDIM's steps don't end where the next ones start with other spacings; the quadratic ones
    # replace them all.
    only = {"ddim": "leading", "dpmpp-2m-quadratic": "linspace"}
    for names in itertools.product(SAMPLERS, BETAS, SPACINGS, PREDICTIONS):
        if names[2] != only.get(names[0], names[2]):
            continue
        runs = [follow(*names, noise, steps) for steps in STEPS]  # one after the other
        timesteps, latents = (np.concatenate(arrays) for arrays in zip(*runs, strict=True))
        arrays["/".join(names) + "/timesteps"] = timesteps.astype("int16")
        arrays["/".join(names) + "/latents"] = latents.astype("float32")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
