"""Training on several devices and in several processes, by `keras.distribution` on JAX.

Call `distribute` before a model is built: from then on Keras gives variables their layout, and
divides batches among the devices. Several processes, on one machine or many, are started each with

    KERAS_DISTRIBUTION_JOB_ADDRESSES="host:port"    of the first process
    KERAS_DISTRIBUTION_NUM_PROCESSES="2"
    KERAS_DISTRIBUTION_PROCESS_ID="0"               or "1"
"""

import os

import keras

PROCESSES = "KERAS_DISTRIBUTION_NUM_PROCESSES"
KINDS = ("data", "model")
# How the UNet's variables are divided among the devices of the mesh's axis "model": pattern of
# paths, and the axis that each dimension is divided among. It is Megatron's way (Shoeybi et al.
# 2019, https://arxiv.org/abs/1909.08053, section 3): the first matrix of a pair by its output, the
# second by its input, so that devices exchange data once a pair. What isn't here is on each device.
UNET_LAYOUT = {
    r".*/(attn1|attn2)/to_(q|k|v)/kernel": (None, "model"),
    r".*/(attn1|attn2)/to_out/kernel": ("model", None),
    r".*/geglu/proj/kernel": (None, "model"),
    r".*/geglu/proj/bias": ("model",),
    r".*/ff_out/kernel": ("model", None),
    r".*_res_\d+/conv1/kernel": (None, None, None, "model"),
    r".*_res_\d+/conv1/bias": ("model",),
    r".*_res_\d+/time_emb_proj/kernel": (None, "model"),
    r".*_res_\d+/time_emb_proj/bias": ("model",),
    r".*_res_\d+/norm2/(gamma|beta)": ("model",),
    r".*_res_\d+/conv2/kernel": (None, None, "model", None),
    r"time_embedding_1/kernel": (None, "model"),
    r"time_embedding_1/bias": ("model",),
    r"time_embedding_2/kernel": ("model", None),
}


def initialize() -> tuple[int, int]:
    """Joins the other processes, if the environment says that there are any.

    It has to be called before anything is computed.

    Returns:
        Index of this process, and number of processes.

    Raises:
        ValueError: several processes, and another backend than JAX.
    """
    if int(os.environ.get(PROCESSES, 1)) == 1:
        return 0, 1
    _need_jax()
    import jax

    keras.distribution.initialize()
    return jax.process_index(), jax.process_count()


def distribute(kind: str, model_devices: int | None = None):
    """Lets models that are built from now on be trained on all devices.

    Args:
        kind: "data": each device has all parameters, and a part of each batch. "model": the UNet's
            parameters are divided as `UNET_LAYOUT` says, for models too large for one device.
        model_devices: for "model", how many devices share the parameters; batches are divided among
            the groups of so many. None is all devices.

    Returns:
        The `keras.distribution.Distribution`, which is in effect.

    Raises:
        ValueError: an unknown kind, another backend than JAX, devices that can't be divided so, or
            "model" in several processes.
    """
    _need_jax()
    import jax

    if kind not in KINDS:
        raise ValueError(f"distribute must be one of {', '.join(KINDS)}, not {kind!r}.")
    devices = keras.distribution.list_devices()
    if kind == "data":
        distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    else:
        count = model_devices or len(devices)
        if len(devices) % count:
            raise ValueError(f"{len(devices)} devices can't be divided into groups of {count}.")
        if jax.process_count() > 1:
            raise ValueError("Parameters can be divided among the devices of one process only.")
        mesh = keras.distribution.DeviceMesh(
            (len(devices) // count, count), ["batch", "model"], devices
        )
        layout = keras.distribution.LayoutMap(mesh)
        for pattern, axes in UNET_LAYOUT.items():
            layout[pattern] = axes
        distribution = keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
        )
    keras.distribution.set_distribution(distribution)
    return distribution


def _need_jax():
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Several devices need the JAX backend, KERAS_BACKEND=jax, not "
            f"{keras.backend.backend()}."
        )
