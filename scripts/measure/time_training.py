"""Measures a training step of Stable Diffusion 1's UNet: its seconds, and the peak of memory.

    KERAS_BACKEND=torch python scripts/measure/time_training.py

The parameters are random, the batch is one image of 256x256 pixels. Each kind is a process of its
own:

    lora       LoRA of rank 4 on the attention, rematerialisation, float32, AdamW
    full       all parameters, rematerialisation, parameters and AdamW in bfloat16
    diffusers  the LoRA as in diffusers' train_text_to_image_lora.py: peft on its UNet, gradient
               checkpointing, float32, torch's AdamW (pip install torch diffusers peft)

The first step, in which a backend compiles, is shown beside the median of the other steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

KINDS = ("lora", "full", "diffusers")
SIZE, RANK, TOKENS, WIDTH = 256, 4, 77, 768
GIB = 2**30


def make_batch(seed):
    """Returns a noisy latent `(1, h, w, 4)`, a context `(1, 77, 768)`, a timestep and a target."""
    import numpy as np

    rng = np.random.default_rng(seed)
    latent, target = rng.standard_normal((2, 1, SIZE // 8, SIZE // 8, 4), dtype="float32")
    return latent, rng.standard_normal((1, TOKENS, WIDTH), dtype="float32"), 300, target


def run_keras_steps(kind, steps):
    """Takes steps with this package; yields the loss of each."""
    import keras

    from stable_diffusion import StableDiffusion
    from stable_diffusion.noise_scheduler import timestep_embedding
    from stable_diffusion.training import Full, LoRA, remat_scope

    if kind == "full":
        keras.config.set_dtype_policy("bfloat16")
    pipeline = StableDiffusion(SIZE, SIZE, jit_compile=False, weights=None)
    with remat_scope(pipeline.config.unet):
        pipeline.diffusion_model  # noqa: B018  builds it
    method = LoRA(pipeline, RANK) if kind == "lora" else Full(pipeline)
    model = method.compile(
        keras.optimizers.AdamW(1e-4), jit_compile=keras.backend.backend() == "jax"
    )
    for step in range(steps):
        latent, context, timestep, target = make_batch(step)
        time = timestep_embedding([timestep], pipeline.config.unet.widths[0])
        inputs = {"latent": latent, "timestep_embedding": time, "context": context}
        yield float(model.train_on_batch(inputs, target)[0])


def run_diffusers_steps(steps):
    """Takes steps with diffusers; yields the loss of each."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel(cross_attention_dim=WIDTH)
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    unet.enable_gradient_checkpointing()
    unet.train()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    for step in range(steps):
        latent, context, timestep, target = make_batch(step)
        latent, target = (torch.tensor(x).movedim(-1, 1) for x in (latent, target))
        predicted = unet(latent, timestep, torch.tensor(context)).sample
        loss = torch.nn.functional.mse_loss(predicted, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def measure_kind(kind, steps):
    """Measures one kind in this process; prints the seconds of each step as JSON."""
    seconds = []
    iterator = run_diffusers_steps(steps) if kind == "diffusers" else run_keras_steps(kind, steps)
    begun = time.perf_counter()
    for _ in iterator:
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    print(json.dumps(seconds))


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    add("--steps", type=int, default=4, help="the first one included (default: 4)")
    add("--only", choices=KINDS, help=argparse.SUPPRESS)  # in the process of a kind
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    if args.only:
        measure_kind(args.only, args.steps)
        return 0
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    print(f"{'':10} {'first step':>10} {'step':>8} {'peak memory':>12}   (Keras on {backend})")
    for kind in args.kinds:
        command = [sys.executable, __file__, "--only", kind, "--steps", str(args.steps)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            print(f"time_training: {kind} ended with {process.returncode}", file=sys.stderr)
            return 1
        first, *others = json.loads(said.splitlines()[-1])
        median, memory = statistics.median(others), usage.ru_maxrss * 1024 / GIB
        print(f"{kind:10} {first:9.1f}s {median:7.1f}s {memory:8.1f} GiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
