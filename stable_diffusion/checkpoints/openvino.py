"""A folder of models that OpenVINO runs by itself: the fastest way to draw on a CPU.

    model.save("folder", format="openvino")       # once, with KERAS_BACKEND=openvino
    StableDiffusion(weights="folder")             # then, with any backend of Keras

The files are OpenVINO's own (.xml and .bin). It maps parameters into memory, where Keras on
OpenVINO holds a copy beside those that are compiled, and knows all shapes when it compiles. It
computes in bfloat16 where the processor can. Such models have the size of picture they were written
for, draw, and do nothing else: no training, no LoRA, no encoding of pictures.
"""

from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from keras import ops

from stable_diffusion.checkpoints.diffusers_config import (
    config_files,
    read_config,
    read_files,
    read_tokenizer,
    without_index,
    write_files,
)
from stable_diffusion.checkpoints.reader import Reader, loaded
from stable_diffusion.files import new_folder

CONFIG = "config"  # subfolder
NEEDED = ("text_encoder", "diffusion_model", "decoder")
DTYPES = ("float32", "float16", "bfloat16")


class CompiledModel:
    """A model in OpenVINO's format, with as much of a Keras model as drawing needs.

    Args:
        path: path of the .xml file.

    Raises:
        ValueError: OpenVINO can't read it, or isn't installed.
    """

    def __init__(self, path: str | Path):
        try:
            import openvino
        except ImportError as error:
            raise ValueError(f"{path} needs the package openvino: pip install openvino") from error
        self.path, self.name, self.core = path, path.stem, openvino.Core()
        self.shapes = self.compiled = None
        try:
            self.graph = self.core.read_model(path)
        except RuntimeError as error:
            raise ValueError(f"{path} can't be read by OpenVINO: {error}") from error

    def compile(self, jit_compile=None):
        """Does nothing: what it is compiled for is known with the first inputs."""

    @property
    def weights(self):
        """Not there.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.path} is compiled: its parameters can't be read or changed.")

    def predict_on_batch(self, inputs):
        """Runs the model; the first run with a batch of another size compiles it.

        Args:
            inputs: array, or list or dict of arrays in the order of the model's inputs.

        Returns:
            float32 array.

        Raises:
            ValueError: inputs of other shapes than the model has.
        """
        inputs = inputs.values() if isinstance(inputs, dict) else inputs
        inputs = [inputs] if hasattr(inputs, "shape") else list(inputs)
        inputs = [np.asarray(x) for x in inputs]
        shapes = [x.shape for x in inputs]
        if shapes != self.shapes:
            accepted = [port.get_partial_shape() for port in self.graph.inputs]
            if len(shapes) != len(accepted) or not all(
                shape.compatible(type(shape)(list(given)))
                for shape, given in zip(accepted, shapes, strict=True)
            ):
                accepted = ", ".join(map(str, accepted))
                raise ValueError(f"{self.path} takes inputs of shapes {accepted}, not {shapes}.")
            graph = self.graph.clone()
            graph.reshape({n: list(shape) for n, shape in enumerate(shapes)})
            self.compiled, self.shapes = self.core.compile_model(graph, "CPU"), shapes
        return self.compiled(inputs)[0]


class OpenVINOFolder(Reader):
    """Loads what `save_openvino` wrote.

    Args:
        folder: path of the folder.

    Raises:
        ValueError: there is no config in it; `build`: no such file.
    """

    loads = True

    @staticmethod
    def recognize(path):
        """Tells whether a path is such a folder."""
        return (path / "diffusion_model.xml").is_file()

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = read_files(self.folder / CONFIG)
        super().__init__(read_config(self.folder / CONFIG, self.files))

    def tokenizer(self):
        """Returns the tokenizer in the folder's `config`; CLIP's where there is none."""
        return read_tokenizer(self.folder / CONFIG, self.files, self.config.text)

    def build(self, component, make):
        """Returns the `CompiledModel` of a component."""
        path = self.folder / f"{component}.xml"
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {path.name}: it draws, and does nothing else.")
        model = CompiledModel(path)
        loaded.add(model)
        return model


def save_openvino(folder, config, models, tokenizer, dtype=None):
    """Writes a folder of models for OpenVINO.

    Args:
        folder: path, of a folder that doesn't exist, is empty, or is a checkpoint to replace.
        config: the `Config` the models were built from.
        models: dict from each of `NEEDED` to its Keras model.
        tokenizer: the `SimpleTokenizer`.
        dtype: of the parameters in the file, one of `DTYPES`. None is "bfloat16" where the
            processor computes in it, else "float16".

    Raises:
        ValueError: models or a dtype that can't be written, or a folder of something else.
    """
    if keras.backend.backend() != "openvino":
        raise ValueError(
            "The openvino format is written with KERAS_BACKEND=openvino (and read with any), not "
            f"{keras.backend.backend()}."
        )
    if dtype not in (None, *DTYPES):
        raise ValueError(f"The openvino format has {', '.join(DTYPES)}, not {dtype}.")
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    dtype = dtype or ("bfloat16" if "BF16" in can else "float16")

    with new_folder(folder, CONFIG) as written:
        size = models["decoder"].output_shape[1]
        files = config_files(replace(config, size=size), models, tokenizer)
        write_files(written / CONFIG, without_index(files))
        for component in NEEDED:
            graph, path = _graph(models[component]), written / f"{component}.xml"
            if dtype == "bfloat16":
                _narrow(graph)
            _multiply(graph)
            _fold(graph)
            openvino.save_model(graph, path, compress_to_fp16=dtype == "float16")


def _graph(model):
    """Returns a Keras model as OpenVINO's, for any number of pictures.

    Keras' own `export` fixes that number, and can't call a model with several inputs.
    """
    import openvino

    tensor = type(ops.convert_to_tensor(0.0))  # Keras has no public name for it
    types = {"float32": openvino.Type.f32, "int32": openvino.Type.i32}
    parameters = [
        openvino.opset13.parameter([-1, *x.shape[1:]], types[x.dtype], name=x.name)
        for x in model.inputs
    ]
    inputs = [tensor(parameter.output(0)) for parameter in parameters]
    output = model(inputs if len(inputs) > 1 else inputs[0])
    return openvino.Model([output.output], parameters, model.name)


def _narrow(graph):
    """Turns a graph in float32 into one in bfloat16, with the same inputs and outputs.

    OpenVINO computes graphs of all dtypes in bfloat16 where the processor can. But it takes the
    time and the memory to make float32 of other parameters first.
    """
    import openvino
    from openvino import opset13

    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if node.get_output_size() != 1 or node.get_element_type() != openvino.Type.f32:
            continue
        users = node.output(0).get_target_inputs()
        if kind == "Constant":
            tensor = openvino.Tensor(openvino.Type.bf16, node.shape)
            tensor.data.view("uint16")[...] = node.data.astype("bfloat16").view("uint16")
            _feed(users, openvino.op.Constant(tensor, shared_memory=False))
        elif kind == "Parameter":
            _feed(users, opset13.convert(node, "bf16"))
        elif kind == "Convert":
            node.set_attribute("destination_type", "bf16")
    for result in graph.get_results():
        _feed([result.input(0)], opset13.convert(result.input_value(0), "f32"))
    graph.validate_nodes_and_infer_types()


def _feed(users, node):
    for user in users:
        user.replace_source_output(node.output(0))


def _multiply(graph):
    """Turns 1x1 convolutions into matrix products.

    OpenVINO convolves with channels first, Keras here with channels last: a product spares the
    transposes before and after.
    """
    from openvino import opset13

    def transposes(node):
        return node.get_type_name() == "Transpose"

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Convolution" or list(node.input(1).get_shape())[2:] != [1, 1]:
            continue
        before, kernel = (node.input_value(n) for n in (0, 1))
        users = [user.get_node() for user in node.output(0).get_target_inputs()]
        if transposes(before.get_node()) and all(map(transposes, users)):
            matrix = opset13.reshape(kernel, list(kernel.get_shape())[:2], special_zero=False)
            product = opset13.matmul(before.get_node().input_value(0), matrix, False, True)
            for user in users:
                _feed(user.output(0).get_target_inputs(), product)


def _fold(graph):
    """Computes all that depends on parameters alone, above all kernels in OpenVINO's layout.

    OpenVINO would do so each time it compiles, and hold the results beside the parameters.
    """
    from openvino import passes

    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(graph)
