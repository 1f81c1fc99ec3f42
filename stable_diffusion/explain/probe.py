"""A look inside attention: the probabilities of every layer, to see or to change them."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import keras
import numpy as np
from keras import backend, ops

from stable_diffusion.attention_block import Attention, attention_probabilities, split_heads
from stable_diffusion.block import uncompiled
from stable_diffusion.config import COMPONENTS
from stable_diffusion.explain.passes import watch_passes

KINDS = ("self", "cross")


@dataclass(frozen=True)
class Place:
    """Where probabilities come from.

    Attributes:
        layer: name of the layer in its model: "down_1_attn_0"; "layer_3" in a text encoder.
        kind: "self" for attention of tokens or cells to each other, "cross" for that to the prompt.
        size: of the queries, `(h, w)` cells with h w = T; `(T,)` in a text encoder.
        step: number of the sampler's step, from 0; None outside of the loop.
        timestep: place in the noise schedule; None outside of the loop.
        prompt, negative: which entries of the batch see the prompt, and which the negative prompt:
            slices, such as slice(1, 2) and slice(0, 1) for an image with guidance. A pass without
            the one or the other has an empty slice.
    """

    layer: str
    kind: str
    size: tuple[int, ...]
    step: int | None
    timestep: int | float | None
    prompt: slice
    negative: slice


@contextmanager
def attention_probe(model, function, component="diffusion_model", kinds=KINDS):
    """Shows a component's attention probabilities to a function, which may change them.

        def see(probabilities, place):
            print(place.step, place.layer, place.kind, probabilities.shape)

        with attention_probe(model, see):
            model.text_to_image("a red apple on a blue background")

    The component runs uncompiled inside: layer by layer, with all scores of a layer in memory at
    once. Afterwards it is as it was, also after an exception. Probes may be nested: each sees what
    those around it left. The probabilities are computed and applied in float32.

    Args:
        model: the `StableDiffusion`.
        function: function of `(probabilities, place)`: a float32 array `(B, N, T, S)`, how much of
            each of S tokens each of T gets, a sum of 1 over S; and a `Place`. It returns None, or
            other probabilities of the same shape, or of one that can be broadcast to it.
        component: "diffusion_model", "text_encoder", "decoder" or "image_encoder".
        kinds: which kinds of attention it sees, of "self" and "cross". The layers of other kinds
            compute as always.

    Raises:
        ValueError: a backend, component or model that can't be probed, and probabilities of another
            shape.
    """
    if not callable(function):
        raise ValueError(f"function must be a function, not {function!r:.200}.")
    layers = find_attention(model, component, kinds)
    with ExitStack() as stack:
        current = stack.enter_context(watch_passes(model))
        stack.enter_context(uncompiled(getattr(model, component)))
        for name, kind, layer in layers:
            stack.enter_context(_probed(layer, name, kind, function, current))
        yield


def find_attention(model, component="diffusion_model", kinds=KINDS):
    """Returns the attention layers that `attention_probe` watches, as `list_attention` does.

    Args:
        model, component, kinds: see `attention_probe`.

    Raises:
        ValueError: a backend, component or model that can't be probed.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if component not in COMPONENTS:
        known = ", ".join(COMPONENTS)
        raise ValueError(f"component must be one of {known}, not {component!r:.200}.")
    if not kinds or not {*kinds} <= {*KINDS}:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, not {kinds!r:.200}.")
    if backend.backend() == "openvino":
        raise ValueError("Attention can't be probed on OpenVINO, which runs whole models only.")
    watched = getattr(model, component)
    layers = [one for one in list_attention(watched) if one[1] in kinds]
    if not layers:
        raise ValueError(
            f"The {component} can't be probed: a {type(watched).__name__} has no attention layers "
            f"of this package and of kind {' or '.join(kinds)}. Exported models have none."
        )
    return layers


def list_attention(model):
    """Returns the attention layers of a model: a list of `(name, kind, layer)`, in order."""
    if not isinstance(model, keras.Model):
        return []
    found = []
    for outer in model.layers:
        for layer in outer._flatten_layers():
            if isinstance(layer, Attention):
                found.append((outer.name, "cross" if layer.name == "attn2" else "self", layer))
    return found


@contextmanager
def _probed(layer, name, kind, function, current):
    """Lets a layer call a function within; those of other probes come before."""
    outermost = layer.probe is None
    if outermost:
        layer.probe = _Probe(name, kind)
    layer.probe.functions.append((function, current))
    try:
        yield
    finally:
        layer.probe.functions.pop()
        if outermost:
            del layer.probe


class _Probe:
    """What an `Attention` calls in place of `attend` while it is watched."""

    def __init__(self, name, kind):
        self.name, self.kind, self.functions = name, kind, []

    def __call__(self, query, key, value, heads, causal):
        size = tuple(query.shape[1:-1])
        q, k, v = (ops.cast(split_heads(x, heads), "float32") for x in (query, key, value))
        probabilities = attention_probabilities(q, k, causal)
        for function, current in self.functions:
            run = current()
            place = Place(
                self.name, self.kind, size, run.step, run.timestep, run.prompt, run.negative
            )
            changed = function(np.array(ops.convert_to_numpy(probabilities)), place)
            if changed is not None:
                probabilities = _fit(changed, probabilities)
        out = ops.einsum("bnts,bsnd->btnd", probabilities, v)
        return ops.reshape(ops.cast(out, query.dtype), (-1, *size, query.shape[-1]))


def _fit(changed, probabilities):
    """Returns other probabilities as a tensor of the same shape."""
    try:
        changed = np.asarray(ops.convert_to_numpy(changed), "float32")
        changed = np.broadcast_to(changed, probabilities.shape)
    except (TypeError, ValueError) as error:
        shape = tuple(probabilities.shape)
        raise ValueError(
            f"The function must return None or probabilities of shape {shape}, not "
            f"{getattr(changed, 'shape', type(changed).__name__)}."
        ) from error
    return ops.convert_to_tensor(changed)
