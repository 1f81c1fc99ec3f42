"""Makes any Keras optimizer by its name, with a schedule; counts the memory of a run."""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

import keras
import numpy as np

SCHEDULES = {"constant": 1.0, "cosine": 0.0}  # last learning rate, as a share of its peak
OPTIMIZERS = sorted(
    name
    for name in dir(keras.optimizers)
    if inspect.isclass(kind := getattr(keras.optimizers, name))
    and issubclass(kind, keras.optimizers.Optimizer)
    # Muon accepts only matrices. The first three are no optimizers by themselves.
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer", "Muon")
)


def make_optimizer(
    name: str, rate: float, steps: int, schedule: str = "constant", warmup: int = 0, **options
) -> keras.optimizers.Optimizer:
    """Makes a Keras optimizer.

    Args:
        name: one of `OPTIMIZERS`, in upper or lower case.
        rate: the learning rate's peak.
        steps: number of batches of the whole run.
        schedule: a key of `SCHEDULES`.
        warmup: number of batches in which the rate rises linearly from 0 to its peak.
        **options: arguments of the optimizer, such as `weight_decay`, `clipnorm`,
            `gradient_accumulation_steps`, `use_ema` and `ema_momentum`.

    Raises:
        ValueError: the optimizer or schedule is unknown, or it does not accept the options.
    """
    kinds = {known.lower(): getattr(keras.optimizers, known) for known in OPTIMIZERS}
    if name.lower() not in kinds:
        raise ValueError(f"optimizer must be one of {', '.join(kinds)}, not {name!r}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}.")
    if warmup or schedule != "constant":
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else rate,
            max(1, steps - warmup),
            SCHEDULES[schedule],
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
        )
    try:
        return kinds[name.lower()](rate, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error


def check_precision(optimizer: keras.optimizers.Optimizer, dtypes: Iterable[str]):
    """Raises a ValueError if an optimizer would learn nothing in the dtype of the parameters.

    Adam's beta_2 of 0.999 is 1 in bfloat16. Then its step is 0 (or not a number).

    Args:
        optimizer: a Keras optimizer.
        dtypes: dtypes of the parameters that are trained.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    beta = getattr(optimizer, "beta_2", 0.0)
    for dtype in set(dtypes):
        if float(keras.ops.cast(beta, dtype)) == 1:
            raise ValueError(
                f"{type(optimizer).__name__} learns nothing in {dtype}, where its beta_2 of {beta} "
                f"is 1. Use mixed_{dtype}, or an optimizer such as Lion or Adafactor."
            )


def count_memory(
    model: keras.Model, make: Callable[[], keras.optimizers.Optimizer]
) -> dict[str, int]:
    """Counts the parameters of a run, and the memory that it needs besides the activations.

    Args:
        model: the model to train. Its variables may have no values (`keras.StatelessScope`).
        make: function that makes an optimizer. It is called once for each shape of a variable, so
            the count itself needs little memory.

    Returns:
        Dict of ints: the numbers of "trained" and of "all" parameters, and the bytes of
        "parameters", "gradients" and "optimizer".
    """
    trained = model.trainable_variables
    optimizer = 0
    for (shape, dtype), count in Counter((tuple(v.shape), v.dtype) for v in trained).items():
        one = make()
        one.build([keras.Variable(np.zeros(shape), dtype=dtype)])
        optimizer += count * sum(_count_bytes(v) for v in one.variables if len(v.shape))
    return {
        "trained": sum(math.prod(v.shape) for v in trained),
        "all": sum(math.prod(v.shape) for v in model.weights),
        "parameters": sum(map(_count_bytes, model.weights)),
        "gradients": sum(map(_count_bytes, trained)),
        "optimizer": optimizer,
    }


def _count_bytes(variable):
    bits = int(re.search(r"\d+", keras.backend.standardize_dtype(variable.dtype))[0])
    return math.prod(variable.shape) * bits // 8
