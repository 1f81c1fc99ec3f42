"""Times what happens before the first step, against KerasCV, in one run.

    python scripts/measure/time_kerascv.py tokenizer
    python scripts/measure/time_kerascv.py unet      # full size: 10 GB of memory, 4 GB of disk

`tokenizer` makes a tokenizer, encodes words that it has not met before, and encodes them again; it
prints medians and ratios. `unet` writes a file in KerasCV's layout with random parameters. It then
times constructing Stable Diffusion 1's UNet and loading the file, and KerasCV's constructor.
"""

import argparse
import gc
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import h5py
import numpy as np

from stable_diffusion import DiffusionModel, SimpleTokenizer
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.files import WEIGHTS_DIR


def time_call(function):
    """Returns the seconds that a call needs, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def time_tokenizer(runs=9):
    """Prints medians over several runs, in which both libraries take turns."""
    from keras_cv.models.stable_diffusion import SimpleTokenizer as KerasCVTokenizer

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(3, 12))) for _ in range(5000)]
    prompts = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    path = WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz"
    classes = {"ours": SimpleTokenizer, "KerasCV": KerasCVTokenizer}
    times = {}
    for _ in range(runs):
        for name, make in classes.items():
            spent, tokenizer = time_call(lambda make=make: make(path))
            times.setdefault((name, "construct"), []).append(spent)
            for what in ("encode, new words", "encode, again"):
                spent, _ = time_call(lambda t=tokenizer: [t.encode(prompt) for prompt in prompts])
                times.setdefault((name, what), []).append(spent)
    print(f"{'':20}{'ours':>10}{'KerasCV':>10}{'ratio':>8}")
    for what in ("construct", "encode, new words", "encode, again"):
        ours, theirs = (median(times[name, what]) for name in classes)
        print(f"{what:20}{ours:9.3f}s{theirs:9.3f}s{ours / theirs:8.2f}")


def write_legacy(model, path):
    """Writes random values in a model's shapes as Keras 2 writes its legacy .h5."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        layers = [layer for layer in model.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        for layer in layers:
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [variable.path.encode() for variable in layer.weights]
            for variable in layer.weights:
                group[variable.path] = rng.standard_normal(variable.shape, dtype="float32")


def time_unet():
    """Prints the times of one run."""
    from keras_cv.src.models.stable_diffusion.diffusion_model import DiffusionModel as KerasCVModel

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kcv_diffusion_model.h5"
        with uninitialized():
            model = DiffusionModel(512, 512, 77, download_weights=False)
        write_legacy(model, path)
        del model
        gc.collect()

        def construct():
            with uninitialized():
                return DiffusionModel(512, 512, 77, download_weights=False)

        constructed, ours = time_call(construct)
        loaded, _ = time_call(partial(ours.load_weights, path))
        del ours
        gc.collect()
        theirs, _ = time_call(lambda: KerasCVModel(512, 512, 77, download_weights=False))
    print(f"ours: construct {constructed:.1f} s, load {loaded:.1f} s")
    print(f"KerasCV: construct {theirs:.1f} s")
    print(f"ours in all over KerasCV's constructor: {(constructed + loaded) / theirs:.2f}")


def get_parser():
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["tokenizer", "unet"])
    return parser


def main(argv=None):
    """Runs the command line; returns the exit status."""
    if get_parser().parse_args(argv).what == "tokenizer":
        time_tokenizer()
    else:
        time_unet()
    return 0


if __name__ == "__main__":
    sys.exit(main())
