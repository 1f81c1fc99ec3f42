"""Builds models whose parameters are loaded next: without random numbers and without copies."""

import math
import threading
from contextlib import contextmanager

import keras
import ml_dtypes  # noqa: F401  teaches numpy the dtype bfloat16
import numpy as np
from keras.layers import Layer

ALIGNMENT = 64  # bytes; backends use memory at such addresses without a copy
_lock = threading.RLock()


def allocate_array(shape, dtype, zeros=False):
    """Returns a new numpy array that `share_array` does not need to copy.

    Args:
        shape, dtype: shape and dtype of the array.
        zeros: whether to fill it with zeros. The system provides such memory only when it is
            written to. So zeros that are soon replaced as a whole cost nothing.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (np.zeros if zeros else np.empty)(size + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def share_array(array):
    """Returns an array in the form that the backend can assign without a copy.

    TensorFlow copies every numpy array, but it shares memory that it receives by DLPack. DLPack has
    no bfloat16, so such arrays pass as uint16. The caller must not change the array afterwards.
    """
    if keras.backend.backend() != "tensorflow" or not array.size:
        return array
    import tensorflow as tf

    if array.dtype == "bfloat16":
        bits = tf.experimental.dlpack.from_dlpack(array.view("uint16").__dlpack__())
        return tf.bitcast(bits, tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


@contextmanager
def uninitialized(enabled=True):
    """Lets layers that are built in this context start with zeros instead of random numbers.

    Use it when a checkpoint is loaded next. Generating 860 million random parameters takes longer
    than reading them from a disk, and Keras has no option to leave it out. Only layers that the
    calling thread builds are affected.

    Args:
        enabled: False lets layers start as usual.
    """
    if not enabled:
        yield
        return
    with _lock:
        add_weight, thread = Layer.add_weight, threading.get_ident()

        def add_zeros(self, *args, **kwargs):
            if threading.get_ident() == thread:
                kwargs["initializer"] = _make_zeros
            return add_weight(self, *args, **kwargs)

        Layer.add_weight = add_zeros
        try:
            yield
        finally:
            Layer.add_weight = add_weight


def _make_zeros(shape, dtype=None):
    return share_array(allocate_array(shape, keras.backend.standardize_dtype(dtype), zeros=True))
