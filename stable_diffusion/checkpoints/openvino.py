"""A folder of models that OpenVINO runs without Keras: the fastest way to generate on a CPU.

    model.save("folder", format="openvino")       # once, with KERAS_BACKEND=openvino
    StableDiffusion(weights="folder")             # then, with any backend of Keras

The files are in OpenVINO's own format (.xml and .bin). Keras on OpenVINO keeps a copy of all
parameters beside those that OpenVINO compiled. OpenVINO itself maps the parameters into memory, and
knows all shapes when it compiles. It computes in bfloat16 where the processor can.

Such models only generate images, and only in the size for which they were written. They can't be
trained, they accept no LoRA, and they have no image encoder.
"""

from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from keras import ops

from stable_diffusion.checkpoints.contents import quote
from stable_diffusion.checkpoints.diffusers_config import (
    CONFIG_FOLDER,
    drop_index,
    make_config_files,
    make_folder_kind,
    read_config,
    read_config_files,
    read_tokenizer,
    write_config_files,
)
from stable_diffusion.checkpoints.reader import Reader, loaded_models, make_missing_error
from stable_diffusion.checkpoints.tensors import cast_stored, check_dtype
from stable_diffusion.files import find_file
from stable_diffusion.replacing import replace_folder

TOKENS = 77  # of a context
NEEDED = ("text_encoder", "diffusion_model", "decoder")  # the components that generate images


class CompiledModel:
    """A model in OpenVINO's format, with those methods of a Keras model that the pipeline calls.

    Args:
        path: path of the .xml file.
        parameters: path of the .bin file.

    Raises:
        ValueError: OpenVINO cannot read the file, or it is not installed.
    """

    def __init__(self, path: str | Path, parameters: str | Path):
        try:
            import openvino
        except ImportError as error:
            raise ValueError(
                f"{path} needs OpenVINO, which isn't installed: pip install openvino"
            ) from error
        self.path, self.name, self.core = path, path.stem, openvino.Core()
        self.shapes = self.compiled = None
        try:
            self.graph = self.core.read_model(path, parameters)
        except RuntimeError as error:
            raise ValueError(f"{path} can't be read by OpenVINO: {quote(str(error))}") from error

    def compile(self, jit_compile=None):
        """Does nothing: OpenVINO compiles when it knows the shapes of the first inputs."""

    @property
    def weights(self):
        """Raises a ValueError: a compiled model has no parameters that can be read or changed."""
        raise ValueError(f"{self.path} is compiled: its parameters can't be read or changed.")

    def predict_on_batch(self, inputs):
        """Runs the model. If the shapes differ from those of the last run, compiles it first.

        Args:
            inputs: array, or a list or dict of arrays in the order of the model's inputs.

        Returns:
            float32 array.

        Raises:
            ValueError: the model does not accept inputs of these shapes.
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
                raise ValueError(f"{self.path} accepts inputs of shapes {accepted}, not {shapes}.")
            graph = self.graph.clone()
            graph.reshape({n: list(shape) for n, shape in enumerate(shapes)})
            self.compiled, self.shapes = self.core.compile_model(graph, "CPU"), shapes
        return self.compiled(inputs)[0]


class OpenVINOFolder(Reader):
    """Loads a folder that `save_openvino` wrote.

    Args:
        folder: path of the folder.

    Raises:
        ValueError: the folder has no config. Method `build`: the folder has no such component.
    """

    loads, most_tokens = True, TOKENS

    @staticmethod
    def recognize(path):
        """Returns whether a path is a folder in this format."""
        return find_file(path, "diffusion_model.xml") is not None

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = read_config_files(self.folder, CONFIG_FOLDER)
        super().__init__(read_config(self.folder / CONFIG_FOLDER, self.files))

    def tokenizer(self):
        """Returns the tokenizer in the subfolder `config`, or CLIP's if there is none."""
        return read_tokenizer(self.folder / CONFIG_FOLDER, self.files, self.config.text)

    def find_files(self, component):
        """Returns the paths of the two files of a component, None for one that is missing."""
        return [find_file(self.folder, f"{component}.{suffix}") for suffix in ("xml", "bin")]

    def check(self, component):
        """See `Reader.check`."""
        if None in self.find_files(component):
            raise make_missing_error(
                component,
                f"{self.folder} has no {component}.xml and .bin. Folders for OpenVINO have only "
                f"{', '.join(NEEDED)}, which generate images.",
            )

    def build(self, component, make):
        """Returns the `CompiledModel` of a component."""
        self.check(component)
        model = CompiledModel(*self.find_files(component))
        loaded_models.add(model)
        return model


OPENVINO_FOLDER = make_folder_kind(
    "folder for OpenVINO",
    [f"{component}.{suffix}" for component in NEEDED for suffix in ("xml", "bin")],
    OpenVINOFolder.recognize,
)


def save_openvino(folder, config, models, tokenizer, dtype=None):
    """Writes a folder of models for OpenVINO.

    Args:
        folder: path of a folder that does not exist, is empty, or is a checkpoint to replace.
        config: the `Config` that the models were built from.
        models: dict from each of `NEEDED` to its Keras model.
        tokenizer: the `SimpleTokenizer`.
        dtype: dtype of the parameters in the files, one of `tensors.DTYPES`. None is "bfloat16" if
            the processor computes in it, and "float16" otherwise.

    Raises:
        ValueError: Keras' backend is not OpenVINO, the dtype is unknown or can't hold a value, or
            the folder contains something else.
    """
    if keras.backend.backend() != "openvino":
        raise ValueError(
            "The openvino format is written with KERAS_BACKEND=openvino, not "
            f"{keras.backend.backend()}; every backend reads it."
        )
    check_dtype(dtype)
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    dtype = dtype or ("bfloat16" if "BF16" in can else "float16")
    for variable in (each for component in NEEDED for each in models[component].weights):
        cast_stored(variable.path, ops.convert_to_numpy(variable), dtype)

    with replace_folder(folder, OPENVINO_FOLDER) as written:
        size = models["decoder"].output_shape[1]
        files = make_config_files(replace(config, size=size), models, tokenizer)
        write_config_files(written / CONFIG_FOLDER, drop_index(files))
        for component in NEEDED:
            graph, path = _trace_graph(models[component]), written / f"{component}.xml"
            if dtype == "bfloat16":
                _convert_to_bfloat16(graph)
            _replace_convolutions(graph)
            _fold_constants(graph)
            openvino.save_model(graph, path, compress_to_fp16=dtype == "float16")


def _trace_graph(model):
    """Returns a Keras model as a model of OpenVINO, for any batch size.

    Keras' own `export` fixes the batch size, and cannot call a model with several inputs.
    """
    import openvino

    tensor = type(ops.convert_to_tensor(0.0))  # Keras has no public name for it
    types = {"float32": openvino.Type.f32, "int32": openvino.Type.i32}
    parameters = [
        openvino.opset13.parameter(
            [-1, *(n or TOKENS for n in x.shape[1:])], types[x.dtype], x.name
        )
        for x in model.inputs
    ]
    inputs = [tensor(parameter.output(0)) for parameter in parameters]
    output = model(inputs if len(inputs) > 1 else inputs[0])
    # A variable that was assigned a result of operations is part of the graph. Only a copy of the
    # graph can be changed without changing the variable.
    return openvino.Model([output.output], parameters, model.name).clone()


def _convert_to_bfloat16(graph):
    """Converts a graph from float32 to bfloat16, except its inputs and outputs.

    OpenVINO computes graphs of all dtypes in bfloat16 where the processor can. But parameters of
    other dtypes it converts to float32 first, which needs time and memory.
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
            _replace_input(users, openvino.op.Constant(tensor, shared_memory=False))
        elif kind == "Parameter":
            _replace_input(users, opset13.convert(node, "bf16"))
        elif kind == "Convert":
            node.set_attribute("destination_type", "bf16")
    for result in graph.get_results():
        _replace_input([result.input(0)], opset13.convert(result.input_value(0), "f32"))
    graph.validate_nodes_and_infer_types()


def _replace_input(users, node):
    """Lets inputs of other nodes read the output of a node."""
    for user in users:
        user.replace_source_output(node.output(0))


def _replace_convolutions(graph):
    """Replaces 1x1 convolutions by matrix products.

    OpenVINO's convolutions have the channels first, but our models have them last. So each
    convolution stands between two transposes, which a matrix product does not need.
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
                _replace_input(user.output(0).get_target_inputs(), product)


def _fold_constants(graph):
    """Computes everything that depends only on parameters, mostly kernels in OpenVINO's layout.

    Otherwise OpenVINO does so whenever it compiles, and keeps the results beside the parameters.
    """
    from openvino import passes

    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(graph)
