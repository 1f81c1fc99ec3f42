"""Times loading a whole Stable Diffusion from safetensors, and its memory, against diffusers.

    pip install torch diffusers transformers accelerate
    python scripts/measure/time_loading.py FOLDER [--make] [--runs 3] [--policy float32]

FOLDER is in diffusers' layout. --make first writes a Stable Diffusion 1 with random parameters
there (4 GB). Each run is a process of its own; the libraries take turns. "loaded" is the time to
construct and load all components, without the imports. "and read" is the time until each parameter
has been read once, because diffusers maps the file and reads it at first use. "memory" is the
growth of the process's peak since the imports, as a multiple of the parameters' size.
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


def read_peak():
    """Returns the largest resident memory of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load_ours(folder, policy, components):
    """Loads with this package; returns the variables."""
    from stable_diffusion import StableDiffusion

    model = StableDiffusion(jit_compile=False, weights=folder)
    return [variable for name in components for variable in getattr(model, name).weights]


def load_diffusers(folder, policy, components):
    """Loads with diffusers; returns the parameters, which may still be only in the file."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    dtype = getattr(torch, policy)
    if components == [UNET]:
        models = [UNet2DConditionModel.from_pretrained(Path(folder) / "unet", torch_dtype=dtype)]
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        models = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    return [parameter for model in models for parameter in model.parameters()]


def measure_loader(loader, folder, policy, components):
    """Measures one library in this process and prints the result as JSON."""
    if loader == "ours":
        import keras

        from stable_diffusion import checkpoints, stable_diffusion  # noqa: F401

        keras.config.set_dtype_policy(policy)
        keras.ops.zeros(1)  # starts the backend
        load = load_ours
    else:
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

        load = load_diffusers
    before, start = read_peak(), time.perf_counter()
    parameters = load(folder, policy, components)
    loaded = time.perf_counter() - start
    item = 4 if policy == "float32" else 2  # bytes of a parameter
    size = item * sum(math.prod(parameter.shape) for parameter in parameters)
    for parameter in parameters:  # as the first use would
        float(parameter[(0,) * len(parameter.shape)])
        if loader != "ours":
            parameter.sum()
    used = time.perf_counter() - start
    print(json.dumps({"loaded": loaded, "used": used, "memory": (read_peak() - before) / size}))


def make_files(folder):
    """Writes a Stable Diffusion 1 with random parameters, by this package."""
    from stable_diffusion import StableDiffusion
    from stable_diffusion.config import SD1, undo_departures

    StableDiffusion(jit_compile=False, weights=None, config=undo_departures(SD1)).save(folder)


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", help="of a checkpoint in diffusers' layout")
    add("--make", action="store_true", help="write random parameters there first")
    add("--runs", type=int, default=3, help="processes of each library (default: 3)")
    add("--policy", default="float32", choices=["float32", "bfloat16"])
    add("--unet", action="store_true", help="only the UNet")
    add("--one", choices=LOADERS, help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    args = get_parser().parse_args(argv)
    components = [UNET] if args.unet else COMPONENTS
    if args.one:
        measure_loader(args.one, args.folder, args.policy, components)
        return 0
    if args.make:
        make_files(args.folder)
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
                print(f"{name} failed: {done.stderr[-2000:]}", file=sys.stderr)
                return 1
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
