"""Times the loop over the steps with a probe of attention, after one, and where none ever was.

    python scripts/measure/time_probe.py [--runs 15] [--steps 50]

Two pipelines of the embedded checkpoint take turns: "never" has had no probe, "after" has had one
around an image. Their compiled UNets should be equally fast. "inside" is the second one with a
probe that only looks, of all layers; "cross" of cross-attention only. Printed are the medians of
one image's latents, and the median of the ratio of each run to that of "never" beside it.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

from stable_diffusion import StableDiffusion
from stable_diffusion.explain import attention_probe

PROMPT = "a red apple on a blue background"


def look(probabilities, place):
    """Sees, and changes nothing."""


def time_latents(model, context, steps, probe):
    """Returns the seconds of all steps of an image."""
    start = time.perf_counter()
    with probe:
        for _ in model.generate_latents(context, num_steps=steps, seed=0):
            pass
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    never, after = (StableDiffusion(weights="emoji", jit_compile=False) for _ in range(2))
    context = never.encode_text(PROMPT)
    for model in (never, after):  # traces the graphs, the negative prompt's too
        time_latents(model, context, 2, nullcontext())
    time_latents(after, context, 2, attention_probe(after, look))
    seconds = {name: [] for name in ("never", "after", "inside", "cross")}
    for _ in range(args.runs):
        probes = attention_probe(after, look), attention_probe(after, look, kinds="cross")
        routes = [(never, nullcontext()), (after, nullcontext()), *((after, one) for one in probes)]
        for name, (model, probe) in zip(seconds, routes, strict=True):
            seconds[name].append(time_latents(model, context, args.steps, probe))
    print(f"{args.runs} runs of {args.steps} steps")
    for name, some in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(some, seconds["never"], strict=True))
        print(f"{name:8} {statistics.median(some):6.3f} s   {ratio:5.2f} times never")


if __name__ == "__main__":
    main()
