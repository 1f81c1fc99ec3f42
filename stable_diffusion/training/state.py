"""The state of a run, from which a stopped run goes on: trained parameters, optimizer and step.

Keras' `save_weights` does not fit: it also writes the frozen parameters, and it merges a LoRA into
the kernels. Such a LoRA would be loaded with A = B = 0 and would never learn.
"""

from pathlib import Path

import keras
import numpy as np
from keras import ops

from stable_diffusion.checkpoints.tensors import read_safetensors, save_safetensors


def save_state(path: str | Path, model: keras.Model, step: int):
    """Writes the state of a run, as a whole or not at all.

    Args:
        path: path of a .safetensors file.
        model: a compiled model whose optimizer is built.
        step: number of batches that the model was trained on.
    """
    tensors = {
        name: np.ascontiguousarray(ops.convert_to_numpy(variable.value)).reshape(variable.shape)
        for name, variable in _name_variables(model).items()
    }
    save_safetensors(path, tensors, {"step": str(step)})


def load_state(path: str | Path, model: keras.Model) -> int:
    """Assigns a state that `save_state` wrote to a model and its optimizer: all of it, or none.

    Args:
        path: path of the file.
        model: a model that was built and compiled like the saved one.

    Returns:
        The step.

    Raises:
        ValueError: the file is damaged, or it is the state of another model or optimizer.
    """
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
    for name, variable in variables.items():
        variable.assign(tensors[name])
    return step


def _name_variables(model):
    """Returns the variables of a state: dict from a unique name to each variable."""
    return {f"model/{n}/{v.path}": v for n, v in enumerate(model.trainable_variables)} | {
        f"optimizer/{n}/{v.name}": v for n, v in enumerate(model.optimizer.variables)
    }
