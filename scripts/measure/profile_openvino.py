"""Shows what OpenVINO spends the time of a UNet's pass on.

    pip install openvino scipy
    KERAS_BACKEND=openvino python scripts/profile_openvino.py
    python scripts/profile_openvino.py --weights exported/

The UNet is Stable Diffusion 1's with random parameters, or that of a checkpoint in the format
"openvino"; one picture. OpenVINO counts the time of each of its operations; they are summed by
kind, of which "attention" is all between queries, keys and values. What a kind takes at least is in
no column: scripts/benchmark.py tells how far the whole is from what the processor can do.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import keras
import numpy as np
import openvino

from stable_diffusion import DiffusionModel
from stable_diffusion.checkpoints.building import uninitialized

PASSES = 5  # of which the fastest is shown


def compile_counting(model, inputs):
    """Returns the model as Keras compiles it, but with counters."""
    compiled, original = [], openvino.compile_model

    def compile_model(graph, device):
        compiled.append(undo_departures(graph, device, {"PERF_COUNT": True}))
        return compiled[0]

    openvino.compile_model = compile_model
    try:
        model.predict_on_batch(inputs)
    finally:
        openvino.compile_model = original
    return compiled[0]


def compile_exported(folder):
    """Returns the UNet of a folder, compiled with counters, and its inputs."""
    graph = openvino.Core().read_model(folder / "diffusion_model.xml")
    graph.reshape({n: [1, *port.partial_shape[1:]] for n, port in enumerate(graph.inputs)})
    compiled = openvino.compile_model(graph, "CPU", {"PERF_COUNT": True})
    return compiled, draw_inputs([tuple(port.shape) for port in graph.inputs])


def draw_inputs(shapes):
    """Returns random inputs."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype="float32") for shape in shapes]


def measure(compiled, inputs):
    """Returns seconds and number of operations by kind, dict of lists."""
    request, fastest = compiled.create_infer_request(), None
    for _ in range(PASSES):
        request.infer(inputs)
        kinds = defaultdict(lambda: [0.0, 0])
        for operation in request.profiling_info:
            kind = operation.node_type
            if "ScaledDotProductAttention" in operation.node_name:
                kind = "attention"
            seconds = operation.real_time.total_seconds()
            kinds[kind][0] += seconds
            kinds[kind][1] += seconds > 0
        total = sum(seconds for seconds, _ in kinds.values())
        if fastest is None or total < fastest[0]:
            fastest = total, kinds
    return fastest[1]


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=512, help="in pixels")
    parser.add_argument("--weights", type=Path, help="a folder in the format openvino")
    args = parser.parse_args()
    if args.weights:
        kinds = measure(*compile_exported(args.weights))
    elif keras.backend.backend() != "openvino":
        parser.error(f"set KERAS_BACKEND=openvino; it is {keras.backend.backend()}")
    else:
        with uninitialized():
            model = DiffusionModel(args.size, args.size, 77, download_weights=False)
        rng = np.random.default_rng(0)
        for variable in model.weights:
            variable.assign(0.02 * rng.standard_normal(variable.shape, dtype="float32"))
        inputs = draw_inputs([(1, *x.shape[1:]) for x in model.inputs])
        kinds = measure(compile_counting(model, inputs), inputs)
    total = sum(seconds for seconds, _ in kinds.values())
    print(f"{'':20}{'ms':>8}{'share':>8}{'operations':>12}")
    for kind, (seconds, count) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        if seconds >= 0.005 * total:
            print(f"{kind:20}{1000 * seconds:8.0f}{100 * seconds / total:7.0f}%{count:12}")
    print(f"{'all':20}{1000 * total:8.0f}")


if __name__ == "__main__":
    main()
