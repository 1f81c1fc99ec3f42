"""PyTorch's files (.ckpt, .pt, .pth, .bin): reads their tensors, and runs nothing of them.

Such a file contains a pickle, which is a program: it names functions and classes, its "globals",
and calls them. Two walls stand before them. First, all names are listed without running anything
(`list_globals`), and a file with a name that is not known to be harmless is refused. Then PyTorch
opens the file with `weights_only=True`: it only knows tensors and plain containers.

Many files of 2022 and 2023 also have harmless things beside the tensors, such as the callbacks of
PyTorch Lightning. PyTorch gets a `StandIn` in place of each of these names, a class that does
nothing. The class or function that the file names is never imported.
"""

import io
import pickletools
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from stable_diffusion.checkpoints.contents import quote

LOWEST = (2, 6)  # PyTorch's version; older ones could be made to run programs of a file
PLAIN = (  # globals that PyTorch itself has for plain values
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "__builtin__.bytearray",
    "__builtin__.complex",
    "__builtin__.set",
)
HARMLESS = (  # globals, or beginnings of them, that are found beside tensors
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "lightning_utilities.",
    "omegaconf.",
    "numpy.",
    "argparse.Namespace",
    "collections.defaultdict",
    "datetime.",
    "pathlib.",
    "typing.Any",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
    "__builtin__.dict",
    "__builtin__.list",
    "__builtin__.int",
    "__builtin__.float",
    "torch.nn.modules.container.ParameterDict",
    "torch.optim.",
)
MAPPINGS = ("collections.defaultdict", "AttributeDict")  # ends of names: PyTorch fills such a dict
CONTAINERS = ("state_dict", "model", "model_state_dict", "module")  # keys above the tensors
PARAMETERS = "string_to_param"  # key above the vectors of an embedding
MAX_DEPTH = 5  # containers in containers
ZIP = b"PK\x03\x04"  # the beginning of a zip file
MAX_PICKLE = 100_000_000  # bytes; a Stable Diffusion has less than 1 MB
LEGACY_PICKLES = 4  # at the beginning of an older file: mark, version, system, and the tensors
_lock = threading.Lock()


class StandIn:
    """Takes the place of a class or function that a file names: keeps its state, does nothing."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


class MappingStandIn:
    """Takes the place of a kind of dict: makes a plain dict."""

    def __new__(cls, *args, **kwargs):
        return {}


class TorchFile:
    """One or several files of PyTorch, seen as one collection of tensors.

    The tensors are those of the innermost of `CONTAINERS`, or those of a list, whose names are "0",
    "1" and so on. The vectors of an embedding, which are one level below, have names such as
    "string_to_param.*". Zip files, which PyTorch writes since version 1.6, are mapped into memory.

    Args:
        path: path that errors name.
        files: paths of the files. None is `path` only.

    Attributes:
        shapes: dict from the name of each tensor to its shape.
        odd: dict from the names of those tensors that are not float to their dtypes.
        metadata: dict of those entries beside the tensors that are str.

    Raises:
        ValueError: a file names something that is not known to be harmless, PyTorch is not
            installed, or it refuses a file. Nothing of the file was run then.
    """

    def __init__(self, path, files=None):
        self.path, self.shapes, self.odd, self.metadata, self._tensors = path, {}, {}, {}, {}
        for file in files or [path]:
            data, torch = _load_torch(Path(file))
            for name, tensor in _find_tensors(data, torch).items():
                self._tensors[name], self.shapes[name] = tensor, tuple(tensor.shape)
                if not _is_float(tensor, torch):
                    self.odd[name] = f"{tensor.dtype} {tensor.layout}"
            for key, value in data.items() if isinstance(data, dict) else ():
                if isinstance(key, str) and isinstance(value, str):
                    self.metadata[key] = value

    def read_tensor(self, name, row=0, rows=1):
        """Returns a tensor as a numpy array, or slice number `row` of `rows` equal slices of it."""
        tensor = self._tensors[name].detach()
        size = tensor.shape[0] // rows if rows > 1 else None
        tensor = tensor[row * size : (row + 1) * size] if rows > 1 else tensor
        return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()


def list_globals(path) -> Iterator[str]:
    """Yields the full name of each function and class that a file's pickle names.

    Runs nothing of it, and needs no PyTorch.

    Args:
        path: path of a file of PyTorch, a zip file or older.

    Raises:
        ValueError: the pickle is damaged, or it is compressed or too large.
    """
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ValueError("a part is compressed, which PyTorch never does")
                    if entry.filename.endswith("/data.pkl"):
                        if entry.file_size > MAX_PICKLE:
                            raise ValueError(f"its pickle has {entry.file_size:,} bytes")
                        yield from _read_globals(io.BytesIO(archive.read(entry)))
        else:
            # In memory, so that a length which is too large asks the system for nothing.
            size = min(Path(path).stat().st_size, MAX_PICKLE)
            with open(path, "rb") as file:
                start = io.BytesIO(file.read(size))
            for _ in range(LEGACY_PICKLES):
                yield from _read_globals(start)
    except (ValueError, OSError, LookupError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"{path} is a PyTorch file that is damaged, or was made to do harm: "
            f"{quote(str(error))}."
        ) from error


def _is_zip(path):
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def _read_globals(file):
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".", 1)
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield f"a name that it computes ({operation.name})"


def _load_torch(path):
    """Returns what a file contains, with stand-ins in place of harmless things, and PyTorch."""
    names = dict.fromkeys(list_globals(path))
    harmless = [name for name in names if name.startswith(HARMLESS)]
    others = names.keys() - {*harmless, *PLAIN}
    if strange := sorted(name for name in others if not name.startswith("torch.")):
        raise _make_error(path, quote(", ".join(strange)))
    torch = _import_torch(path)
    kinds = {name: MappingStandIn if name.endswith(MAPPINGS) else StandIn for name in harmless}
    stand_ins = [(kind, name.replace("__builtin__", "builtins")) for name, kind in kinds.items()]
    with _lock, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of older kinds of storage
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            return data, torch
        except Exception as error:  # of many types; the message can be pages long
            reason = str(error).partition("Unsupported global: GLOBAL ")[2].partition(" ")[0]
            reason = reason or str(error).strip().split("\n")[-1]
            raise _make_error(path, quote(reason or type(error).__name__)) from error


def _import_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file: opening it needs PyTorch, which isn't installed: "
            f"pip install torch"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < LOWEST:
        raise ValueError(
            f"{path} is a PyTorch file: opening it safely needs PyTorch "
            f"{'.'.join(map(str, LOWEST))} or newer, not {torch.__version__}."
        )
    return torch


def _make_error(path, found):
    return ValueError(
        f"{path} was refused, and nothing in it was run: it contains more than tensors and what is "
        f"known to be harmless. Found: {found}"
    )


def _find_tensors(data, torch):
    """Returns the tensors of what a file contains: dict from name to tensor."""
    for _ in range(MAX_DEPTH):
        if not isinstance(data, dict):
            break
        inner = (data[key] for key in CONTAINERS if isinstance(data.get(key), dict))
        data = next(inner, data)
    if isinstance(data, list | tuple):
        data = {str(number): value for number, value in enumerate(data)}
    data = data if isinstance(data, dict) else {}
    vectors = data.get(PARAMETERS)
    if isinstance(vectors, StandIn) and isinstance(vectors.state, dict):  # a ParameterDict
        vectors = vectors.state.get("_parameters")
    if isinstance(vectors, dict):
        data = {f"{PARAMETERS}.{key}": value for key, value in vectors.items()}
    return {
        name: value
        for name, value in data.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def _is_float(tensor, torch):
    """Returns whether a tensor is of a kind that numpy can have: not sparse, quantized or empty."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.device.type == "cpu" and tensor.is_floating_point()
