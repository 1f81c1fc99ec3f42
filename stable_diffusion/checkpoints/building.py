"""Building models whose parameters are about to be loaded: neither random numbers nor copies."""

import math
import threading
from contextlib import contextmanager

import keras
import ml_dtypes  # noqa: F401  teaches numpy what bfloat16 is
import numpy as np
from keras.layers import Layer

ALIGNMENT = 64  # bytes; at such addresses the backends take memory over as it is
_lock = threading.RLock()


def empty(shape, dtype, zeros=False):
    """Returns a numpy array that `to_tensor` needn't copy.

    Args:
        shape, dtype: of the array.
        zeros: whether it is filled with zeros. The system gives such memory when it is first
            written to, so that zeros that are replaced as a whole cost nothing.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (np.zeros if zeros else np.empty)(size + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def to_tensor(array):
    """Returns an array as the backend assigns it best; the array must not be changed any more.

    TensorFlow copies every numpy array, but takes memory over by DLPack, which has no bfloat16.
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
    """Makes layers that are built inside start from zeros, because a checkpoint is loaded next.

    Drawing 860 million random parameters takes longer than reading them from a disk, and Keras has
    no switch for it. Only layers built by the calling thread are affected.
    """
    if not enabled:
        yield
        return
    with _lock:
        add_weight, thread = Layer.add_weight, threading.get_ident()

        def add_zeros(self, *args, **kwargs):
            if threading.get_ident() == thread:
                kwargs["initializer"] = _zeros
            return add_weight(self, *args, **kwargs)

        Layer.add_weight = add_zeros
        try:
            yield
        finally:
            Layer.add_weight = add_weight


def _zeros(shape, dtype=None):
    return to_tensor(empty(shape, keras.backend.standardize_dtype(dtype), zeros=True))
