"""Any Keras optimizer by its name, with a schedule; and how much memory a run takes."""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable

import keras
import numpy as np

SCHEDULES = {"constant": 1.0, "cosine": 0.0}  # and what is left of the rate at the end
NAMES = sorted(
    name
    for name in dir(keras.optimizers)
    if inspect.isclass(kind := getattr(keras.optimizers, name))
    and issubclass(kind, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "Muon")  # the last is for matrices alone
)


def make_optimizer(
    name: str, rate: float, steps: int, schedule: str = "constant", warmup: int = 0, **options
) -> keras.optimizers.Optimizer:
    """Makes a Keras optimizer.

    Args:
        name: one of `NAMES`, in any case.
        rate: the learning rate's peak.
        steps: batches that the schedule is for.
        schedule: key of `SCHEDULES`.
        warmup: batches until the rate is at its peak, linearly from 0.
        **options: of every Keras optimizer, such as `weight_decay`, `clipnorm`,
            `gradient_accumulation_steps`, `use_ema` and `ema_momentum`, or of this one.

    Raises:
        ValueError: an unknown optimizer or schedule, or options that it doesn't take.
    """
    kinds = {known.lower(): getattr(keras.optimizers, known) for known in NAMES}
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


def count_memory(
    model: keras.Model, make: Callable[[], keras.optimizers.Optimizer]
) -> dict[str, int]:
    """Counts what a run keeps in memory beside the activations, in bytes.

    Args:
        model: what is trained; its variables may be without values (`keras.StatelessScope`).
        make: makes an optimizer. Each shape of variable is tried with one, which is how much is
            allocated at a time.

    Returns:
        dict of ints: the numbers of "trained" and of "all" parameters, and the bytes of
        "parameters", "gradients" and "optimizer".
    """
    trained = model.trainable_variables
    optimizer = 0
    for (shape, dtype), count in Counter((tuple(v.shape), v.dtype) for v in trained).items():
        one = make()
        one.build([keras.Variable(np.zeros(shape), dtype=dtype)])
        optimizer += count * sum(_bytes(v) for v in one.variables if len(v.shape))
    return {
        "trained": sum(math.prod(v.shape) for v in trained),
        "all": sum(math.prod(v.shape) for v in model.weights),
        "parameters": sum(map(_bytes, model.weights)),
        "gradients": sum(map(_bytes, trained)),
        "optimizer": optimizer,
    }


def _bytes(variable):
    bits = int(re.search(r"\d+", keras.backend.standardize_dtype(variable.dtype))[0])
    return math.prod(variable.shape) * bits // 8
