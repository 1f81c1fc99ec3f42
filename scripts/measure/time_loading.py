"""Times loading a whole Stable Diffusion from safetensors, and its memory, against diffusers.

    pip install torch diffusers transformers accelerate
    python scripts/time_loading.py FOLDER [--make] [--runs 3] [--policy float32]

FOLDER is in diffusers' layout; --make writes a Stable Diffusion 1 of random parameters there first
(4 GB). Each run is a process of its own, in turns. Counted are construction and loading of all
parts, not the imports; "and read" until each parameter has been read once, because diffusers maps
the file and reads it at first use. Memory is the growth of the process's peak over what it was
after the imports, as a multiple of the parameters' size.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

LOADERS = ("ours", "diffusers")
UNET = "diffusion_model"
COMPONENTS = ("text_encoder", "diffusion_model", "decoder", "image_encoder")


def peak():
    """Returns the largest resident memory of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def ours(folder, policy, parts):
    """Loads with this package; returns the variables."""
    from stable_diffusion import StableDiffusion

    model = StableDiffusion(jit_compile=False, weights=folder)
    return [variable for part in parts for variable in getattr(model, part).weights]


def diffusers(folder, policy, parts):
    """Loads with diffusers; returns the parameters, which it may only have mapped from the file."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    dtype = getattr(torch, policy)
    if parts == [UNET]:
        models = [UNet2DConditionModel.from_pretrained(Path(folder) / "unet", torch_dtype=dtype)]
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        models = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    return [parameter for model in models for parameter in model.parameters()]


def run(loader, folder, policy, parts):
    """Prints what one process measures, as JSON."""
    if loader == "ours":
        import keras

        from stable_diffusion import checkpoints, stable_diffusion  # noqa: F401

        keras.config.set_dtype_policy(policy)
        keras.ops.zeros(1)  # starts the backend
        load = ours
    else:
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

        load = diffusers
    before, start = peak(), time.perf_counter()
    parameters = load(folder, policy, parts)
    loaded = time.perf_counter() - start
    item = 4 if policy == "float32" else 2  # bytes of a parameter
    size = item * sum(math.prod(parameter.shape) for parameter in parameters)
    for parameter in parameters:  # as the first use would
        float(parameter[(0,) * len(parameter.shape)])
        if loader != "ours":
            parameter.sum()
    used = time.perf_counter() - start
    print(json.dumps({"loaded": loaded, "used": used, "memory": (peak() - before) / size}))


def make(folder):
    """Writes a Stable Diffusion 1 of random parameters, by this package."""
    from stable_diffusion import StableDiffusion
    from stable_diffusion.config import SD1, undo_departures

    StableDiffusion(jit_compile=False, weights=None, config=undo_departures(SD1)).save(folder)


def main():
    """Runs each loader in turn and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--make", action="store_true", help="write random parameters there first")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--policy", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--unet", action="store_true", help="only the UNet")
    parser.add_argument("--one", choices=LOADERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = [UNET] if args.unet else COMPONENTS
    if args.one:
        return run(args.one, args.folder, args.policy, parts)
    if args.make:
        make(args.folder)
    for file in Path(args.folder).rglob("*.safetensors"):  # into the page cache
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass
    loaders = [name for name in LOADERS if name == "ours" or importlib.util.find_spec(name)]
    results = {name: [] for name in loaders}
    command = [sys.executable, __file__, args.folder, "--policy", args.policy]
    command += ["--unet"] if args.unet else []
    for _ in range(args.runs):
        for name in loaders:
            done = subprocess.run([*command, "--one", name], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed: {done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{args.policy}, medians of {args.runs}")
    print(f"{'':12}{'loaded':>10}{'and read':>10}{'memory':>10}")
    for name in LOADERS:
        if name not in results:
            print(f"{name:12}not installed")
            continue
        medians = [
            statistics.median(r[key] for r in results[name]) for key in ("loaded", "used", "memory")
        ]
        print("{:12}{:>9.1f}s{:>9.1f}s{:>9.2f}x".format(name, *medians))


if __name__ == "__main__":
    main()
