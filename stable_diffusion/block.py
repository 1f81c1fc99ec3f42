"""A layer made of layers; and the registry of models that were compiled from parts of a model."""

from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

from keras import KerasTensor, backend, layers, tree

_cut_models = WeakKeyDictionary()  # model to what `cut_model` made of it, so that it is made once


class Block(layers.Layer):
    """A layer made of layers. One symbolic call builds them all and gives the output's shape.

    Keras would trace `call` with the backend instead, once for each level of nesting: ten times
    slower for Stable Diffusion's UNet.
    """

    def build(self, input_shape):
        some = tree.map_shape_structure(lambda shape: [n or 1 for n in shape], input_shape)
        self.call(tree.map_shape_structure(KerasTensor, some))

    def compute_output_spec(self, inputs):
        return KerasTensor(self.call(inputs).shape, self.compute_dtype)


def cut_model(model, cut, *arguments):
    """Returns `cut(model, *arguments)`: models that share its parameters, made only once."""
    made, key = _cut_models.setdefault(model, {}), (cut, *arguments)
    if key not in made:
        made[key] = cut(model, *arguments)
    return made[key]


def compile_like(cut, model):
    """Compiles what was cut from a model as the model is."""
    jit = model.jit_compile and not model.run_eagerly
    cut.compile(jit_compile=jit, run_eagerly=model.run_eagerly)


@contextmanager
def uncompiled(model):
    """Runs a model, and what is cut from it, layer by layer; then the compiled ones come back."""
    before = model.run_eagerly, model.jit_compile, model.predict_function
    cut = _cut_models.pop(model, {})
    model.run_eagerly, model.jit_compile, model.predict_function = True, False, None
    try:
        yield
    finally:
        model.run_eagerly, model.jit_compile, model.predict_function = before
        _cut_models[model] = cut


def without_gradients():
    """Returns a context in which layers that are called remember nothing for gradients."""
    if backend.backend() != "torch":  # TensorFlow and JAX remember only where they are told to
        return nullcontext()
    import torch

    return torch.no_grad()


def forget_compiled(model):
    """Makes a model be compiled again after its parameters have changed.

    Only OpenVINO needs this: Keras compiles the parameters in, as they were.
    """
    if backend.backend() == "openvino":
        model.ov_compiled_model = None
        _cut_models.pop(model, None)
