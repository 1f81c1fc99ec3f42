"""Training on several devices and in several processes, with `keras.distribution` on JAX.

Call `distribute_models` before a model is built. From then on Keras divides batches, and possibly
variables, among the devices. Several processes can run on one machine or on several. Start each of
them with these environment variables:

    KERAS_DISTRIBUTION_JOB_ADDRESSES="host:port"    address of the first process
    KERAS_DISTRIBUTION_NUM_PROCESSES="2"
    KERAS_DISTRIBUTION_PROCESS_ID="0"               "1" in the second process
"""

import os

import keras

PROCESSES = "KERAS_DISTRIBUTION_NUM_PROCESSES"
KINDS = ("data", "model")
TRAINING_BACKENDS = "tensorflow", "jax", "torch"
# How the UNet's variables are divided among the devices on the axis "model" of the mesh: a pattern
# of paths, and for each dimension of the variable the axis that divides it. Variables that match no
# pattern are on every device. The method is Megatron's (Shoeybi et al. 2019,
# https://arxiv.org/abs/1909.08053, section 3): of two matrices in a row, the first is divided by
# its outputs and the second by its inputs, so that devices exchange data only once for both.
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


def check_backend():
    """Raises a ValueError if the backend or TensorFlow's present strategy can't train.

    TensorFlow would run the batches of `NoisyLatents` on every replica, or fail far from here.
    """
    backend = keras.backend.backend()
    if backend not in TRAINING_BACKENDS:
        raise ValueError(
            f"Training needs KERAS_BACKEND={', '.join(TRAINING_BACKENDS[:-1])} or "
            f"{TRAINING_BACKENDS[-1]}. With {backend} models only generate images."
        )
    if backend == "tensorflow":
        import tensorflow as tf

        if (count := tf.distribute.get_strategy().num_replicas_in_sync) > 1:
            raise ValueError(
                f"On TensorFlow training uses one device, not a strategy of {count} replicas. For "
                f"several devices use the JAX backend, KERAS_BACKEND=jax, see `distribute_models`."
            )


def join_processes() -> tuple[int, int]:
    """Connects this process with the others, if the environment variables name any.

    Call it before anything is computed.

    Returns:
        The index of this process, and the number of processes.

    Raises:
        ValueError: there are several processes, and the backend is not JAX.
    """
    if int(os.environ.get(PROCESSES, 1)) == 1:
        return 0, 1
    _need_jax()
    import jax

    keras.distribution.initialize()
    return jax.process_index(), jax.process_count()


def distribute_models(kind: str, model_devices: int | None = None):
    """Distributes models that are built from now on, and their batches, among all devices.

    Args:
        kind: "data": each device has all parameters, and gets a part of each batch. "model":
            `UNET_LAYOUT` divides the parameters of the UNet, for models that are too large for one
            device.
        model_devices: for "model", the number of devices in a group that shares the parameters.
            Batches are divided among the groups. None is one group of all devices.

    Returns:
        The `keras.distribution.Distribution`. Keras uses it from now on.

    Raises:
        ValueError: the kind is unknown, the backend is not JAX, the devices cannot be divided into
            such groups, or the kind is "model" and there are several processes.
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
            raise ValueError(
                f"distribute='model' needs one process, not {jax.process_count()}: parameters can "
                f"only be divided among the devices of one process."
            )
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
