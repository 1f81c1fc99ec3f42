"""Loads files that KerasCV on Keras 2 wrote, as the published ones were, of all six models.

The reference are the outputs of KerasCV 0.9.0 on Keras 2.15, in another environment, and of KerasCV
on Keras 3 with the same file, on TensorFlow in float32: within 2e-5 of the largest value.
"""

import os
import subprocess

import numpy as np
import pytest

from stable_diffusion.checkpoints.kerascv import is_legacy
from stable_diffusion.parity import keras_cv as compare_keras_cv
from stable_diffusion.parity.keras_cv import build_pair, free_memory, make_inputs, relative_error

PYTHON = os.environ.get("KERASCV2_PYTHON")
SIZE, TOLERANCE = 64, 2e-5
BYTES = {  # of KerasCV's published files, to which HDF5 adds about 1 MB
    "text_encoder": 123_060_480 * 4,
    "text_encoder_v2": 340_387_840 * 4,
    "diffusion_model": 859_520_964 * 4,
    "diffusion_model_v2": 865_910_724 * 4,
    "decoder": 49_490_199 * 4,
    "image_encoder": 34_163_664 * 4,
}
WRITER = """
import sys
import numpy as np
from keras_cv.src.models import stable_diffusion

name, inputs, output, file, *sizes = sys.argv[1:]
model = getattr(stable_diffusion, name)(*map(int, sizes), download_weights=False)
rng = np.random.default_rng(0)
for weight in model.weights:
    kind, shape = weight.name.removesuffix(":0").split("/")[-1], tuple(weight.shape)
    scale = {"kernel": np.prod(shape[:-1]) ** -0.5, "embeddings": 1.0}.get(kind, 0.3)
    value = rng.standard_normal(shape, dtype="float32") * np.float32(scale)
    weight.assign(value + 1 if kind == "gamma" else value)
inputs = np.load(inputs)
inputs = [inputs[key] for key in inputs]
by_name = dict(zip(sorted(model.input_names), inputs)) if len(inputs) > 1 else inputs[0]
np.save(output, model(by_name).numpy())
model.save_weights(file)
"""

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(
        not PYTHON,
        reason="KERASCV2_PYTHON isn't set: the path of a Python 3.9 to 3.11 with "
        "`pip install keras-cv==0.9.0 tensorflow==2.15.1 keras==2.15.0`",
    ),
]


@pytest.mark.parametrize("model", compare_keras_cv.MODELS)
def test_file_written_by_keras_2(model, tmp_path):
    name, arguments = compare_keras_cv.MODELS[model]
    sizes = {"height": SIZE, "width": 2 * SIZE, "tokens": compare_keras_cv.TOKENS}
    ours, theirs = build_pair(model, SIZE, 2 * SIZE)
    values = make_inputs(ours, SIZE, np.random.default_rng(1))
    by_name = {spec.name: value for spec, value in zip(ours.inputs, values, strict=True)}
    values = values if len(values) > 1 else values[0]
    inputs, output, file = (tmp_path / name for name in ("inputs.npz", "output.npy", "x.h5"))
    np.savez(inputs, **dict(sorted(by_name.items())))
    command = [PYTHON, "-I", "-c", WRITER, name, inputs, output, file]
    command += [str(sizes[key]) for key in arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert BYTES[model] < file.stat().st_size < BYTES[model] + 2e6
        assert is_legacy(file)
        ours.load_weights(file)
        theirs.load_weights(str(file))
    finally:
        file.unlink(missing_ok=True)
    result, reference = ours(values), np.load(output)
    errors = relative_error(result, reference), relative_error(result, theirs(values))
    del ours, theirs
    free_memory()
    print(model, errors)
    assert max(errors) <= TOLERANCE
