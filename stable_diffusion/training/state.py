"""The state of a run, from which a stopped run goes on: trained parameters, optimizer and step.

Keras' `save_weights` does not fit: it also writes the frozen parameters, and does not check them.
"""

import re
from pathlib import Path

import keras
import numpy as np
from keras import ops

from stable_diffusion.checkpoints.tensors import read_safetensors, save_safetensors

ADVICE = "Try a smaller learning rate, a longer warm-up, clipped gradients, or float32."


def save_state(path: str | Path, model: keras.Model, step: int, data: str = ""):
    """Writes the state of a run, as a whole or not at all.

    Call it during `fit`, from a callback: at the end of `fit` an optimizer with moving averages
    replaces the parameters by them.

    Args:
        path: path of a .safetensors file.
        model: a compiled model whose optimizer is built.
        step: number of batches that the model was trained on.
        data: a hash of the data, see `data.hash_streams`.

    Raises:
        ValueError: a value is not finite. A state that `path` has already is kept.
    """
    tensors = {
        name: np.ascontiguousarray(ops.convert_to_numpy(variable.value)).reshape(variable.shape)
        for name, variable in _name_variables(model).items()
    }
    check_finite(tensors, step)
    save_safetensors(path, tensors, {"step": str(step), "data": data})


def load_state(path: str | Path, model: keras.Model, data: str = "") -> int:
    """Assigns a state that `save_state` wrote to a model and its optimizer: all of it, or none.

    Args:
        path: path of the file.
        model: a model that was built and compiled like the saved one.
        data: a hash of the data. If the state has one, too, they must be the same.

    Returns:
        The step.

    Raises:
        ValueError: the file is damaged or has values that are not finite, or it is the state of
            another model or optimizer, or of other data.
    """
    if not model.optimizer.built:  # a LossScaleOptimizer would get some variables twice
        model.optimizer.build(model.trainable_variables)
    variables = _name_variables(model)
    try:
        tensors, metadata = read_safetensors(path)
        step = int(metadata["step"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no intact state of a run: {error}") from error
    wanted = {name: tuple(variable.shape) for name, variable in variables.items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"{path} is of a run with other parameters or another optimizer.")
    if data and metadata.get("data", "") not in ("", data):
        raise ValueError(f"{path} is of a run with other images or captions: they have changed.")
    try:
        check_finite(tensors, step)
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    for name, variable in variables.items():
        variable.assign(tensors[name])
    return step


def check_finite(arrays: dict[str, np.ndarray], step: int):
    """Raises a ValueError if an array has a value that is not finite.

    Args:
        arrays: dict from a name to each array.
        step: number of the step, for the error.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"After step {step} {name} is not finite. {ADVICE}")


def _name_variables(model):
    """Returns the variables of a state: dict from a unique name to each variable."""
    return {f"model/{n}/{v.path}": v for n, v in enumerate(model.trainable_variables)} | {
        # Keras counts variables without a name, such as Nadam's: "variable_5" is not unique.
        f"optimizer/{n}/{re.sub('^variable(_[0-9]+)?$', 'variable', v.name)}": v
        for n, v in enumerate(model.optimizer.variables)
    }
