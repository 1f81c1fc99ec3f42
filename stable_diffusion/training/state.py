"""What a stopped run goes on from: the parameters that learn, the optimizer and the step.

Not `save_weights`: it would write the frozen parameters, too, and merges adapters into kernels, so
that a LoRA that was loaded again would start from A = B = 0 and never learn.
"""

from pathlib import Path

import keras
import ml_dtypes  # noqa: F401  teaches numpy and safetensors what bfloat16 is
import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stable_diffusion.files import new_file


def save_state(path: str | Path, model: keras.Model, step: int):
    """Writes the state of a run: the whole file, or none.

    Args:
        path: path of a .safetensors file.
        model: compiled, with an optimizer that is built.
        step: batches that were trained on.
    """
    tensors = {
        name: np.ascontiguousarray(ops.convert_to_numpy(variable.value)).reshape(variable.shape)
        for name, variable in _variables(model).items()
    }
    with new_file(path) as written:
        save_file(tensors, written, metadata={"step": str(step)})


def load_state(path: str | Path, model: keras.Model) -> int:
    """Gives a model and its optimizer the state that `save_state` wrote: all of it, or none.

    Args:
        path: path of the file.
        model: compiled as the one that was saved.

    Returns:
        The step.

    Raises:
        ValueError: the file is damaged, or of a run of something else.
    """
    model.optimizer.build(model.trainable_variables)
    variables = _variables(model)
    try:
        with safe_open(path, framework="numpy") as file:
            step = int((file.metadata() or {})["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no intact state of a run: {error}") from error
    wanted = {name: tuple(variable.shape) for name, variable in variables.items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"{path} is of a run with other parameters or another optimizer.")
    for name, variable in variables.items():
        variable.assign(tensors[name])
    return step


def _variables(model):
    """Returns what is saved, by names that are unique."""
    return {f"model/{n}/{v.path}": v for n, v in enumerate(model.trainable_variables)} | {
        f"optimizer/{n}/{v.name}": v for n, v in enumerate(model.optimizer.variables)
    }
