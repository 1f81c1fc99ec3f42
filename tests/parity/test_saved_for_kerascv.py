"""KerasCV loads the .h5 files that are written here, bit for bit, in full size."""

import numpy as np
import pytest
from keras import ops

from stable_diffusion.checkpoints.kerascv import save_legacy
from stable_diffusion.parity import keras_cv as compare_keras_cv
from stable_diffusion.parity.keras_cv import build_pair, free_memory, randomize

SIZE = 64


def mark(model):  # one small and quick model is enough for every day
    return pytest.param(model, marks=[pytest.mark.large] * (model != "image_encoder"))


@pytest.mark.parametrize("model", [mark(model) for model in compare_keras_cv.MODELS])
def test_kerascv_loads_what_is_written(model, tmp_path):
    ours, theirs = build_pair(model, SIZE, 2 * SIZE)
    randomize(ours, np.random.default_rng(0))
    path = tmp_path / "x.h5"
    save_legacy(ours, path)
    theirs.load_weights(str(path))
    path.unlink()
    pairs = list(zip(ours.weights, theirs.weights, strict=True))
    assert all(np.array_equal(*map(ops.convert_to_numpy, pair)) for pair in pairs)
    del ours, theirs, pairs
    free_memory()
