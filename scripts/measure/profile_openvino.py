"""Shows what OpenVINO needs the time of one pass of the UNet for.

    pip install -e ".[openvino]"
    KERAS_BACKEND=openvino python scripts/measure/profile_openvino.py
    python scripts/measure/profile_openvino.py --weights exported/

The UNet is Stable Diffusion 1's with random parameters, or that of a checkpoint in the format
"openvino". The batch is one image. OpenVINO measures the time of each of its operations; this
script sums them by kind. "attention" is everything between queries, keys and values. How near the
whole comes to the processor's peak is what scripts/measure/benchmark.py tells.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import keras
import numpy as np

from stable_diffusion import DiffusionModel
from stable_diffusion.checkpoints.building import uninitialized

PASSES = 5  # the fastest is shown


def compile_counting(model, inputs):
    """Compiles the model as Keras does it, but with counters of time."""
    import openvino

    compiled, original = [], openvino.compile_model

    def compile_model(graph, device):
        compiled.append(original(graph, device, {"PERF_COUNT": True}))
        return compiled[0]

    openvino.compile_model = compile_model
    try:
        model.predict_on_batch(inputs)
    finally:
        openvino.compile_model = original
    return compiled[0]


def compile_exported(folder):
    """Compiles the UNet of a folder with counters of time; returns it and random inputs."""
    import openvino

    graph = openvino.Core().read_model(folder / "diffusion_model.xml")
    graph.reshape({n: [1, *port.partial_shape[1:]] for n, port in enumerate(graph.inputs)})
    compiled = openvino.compile_model(graph, "CPU", {"PERF_COUNT": True})
    return compiled, make_inputs([tuple(port.shape) for port in graph.inputs])


def make_inputs(shapes):
    """Returns random inputs of these shapes."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype="float32") for shape in shapes]


def measure_kinds(compiled, inputs):
    """Returns the seconds and the number of operations of each kind: a dict of lists."""
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


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=512, help="of the image (default: 512)")
    parser.add_argument("--weights", type=Path, help="a folder in the format openvino")
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.weights:
        kinds = measure_kinds(*compile_exported(args.weights))
    elif keras.backend.backend() != "openvino":
        parser.error(f"set KERAS_BACKEND=openvino; it is {keras.backend.backend()}")
    else:
        with uninitialized():
            model = DiffusionModel(args.size, args.size, 77, download_weights=False)
        rng = np.random.default_rng(0)
        for variable in model.weights:
            variable.assign(0.02 * rng.standard_normal(variable.shape, dtype="float32"))
        inputs = make_inputs([(1, *x.shape[1:]) for x in model.inputs])
        kinds = measure_kinds(compile_counting(model, inputs), inputs)
    total = sum(seconds for seconds, _ in kinds.values())
    print(f"{'':20}{'ms':>8}{'share':>8}{'operations':>12}")
    for kind, (seconds, count) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        if seconds >= 0.005 * total:
            print(f"{kind:20}{1000 * seconds:8.0f}{100 * seconds / total:7.0f}%{count:12}")
    print(f"{'all':20}{1000 * total:8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
