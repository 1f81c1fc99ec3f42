"""How a format names the parameters of a model: tables from our names of layers to theirs."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import keras

LEAVES = {  # our names of variables, and PyTorch's
    "kernel": "weight",  # Dense (in, out) is Linear (out, in); (h, w, in, out) is (out, in, h, w)
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "embeddings": "weight",
}


class Slot(NamedTuple):
    """The place of a variable in a file: slice number `row` of `rows` equal slices of a tensor.

    Attributes:
        variable: the Keras variable.
        name: name of the tensor in the file.
        row: index of the slice, from 0.
        rows: number of variables that the tensor holds, one below the other.
        matrix: whether the file has the kernel of a 1x1 convolution as a matrix.
    """

    variable: keras.Variable
    name: str
    row: int = 0
    rows: int = 1
    matrix: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice in the file, where the outputs are the first axis of a kernel."""
        shape = tuple(self.variable.shape)
        if self.variable.path.endswith("/kernel"):
            shape = (shape[-1], shape[-2], *shape[:-2])
        return shape[:2] if self.matrix else shape


@dataclass(frozen=True)
class Layout:
    """The names that a format gives to the tensors of one component.

    A path such as "down_0_attn_1/attn1/to_q/kernel" is translated piece by piece: the first piece
    by `names`, the last one by `LEAVES`, and those between by `within`, or by `residual` if they
    are in a residual block. A piece that is not in the table keeps its name. A piece that the table
    translates to None is left out.

    In our names, {i} is the number of a stage, and {j} the number of a block in it. Formats that
    count in another way use these in their names:

        {r}  the number of the stage, counted from the other end
        {n}  the number of the block over all stages, where halving or doubling the size counts as
             a block
        {u}  the index of the layer that doubles the size, in its block

    Args:
        names, within, residual: dicts from our names to theirs.
        prefix: text before every name in the file.
        special: exceptions that the tables cannot express: pairs of a pattern, which is searched in
            the translated name, and a replacement for the rest of the name from the match on. If
            the pattern has a group "qkv", the tensor holds three of our variables, one below the
            other, and the group tells which of them: q, k or v.
        matrices: pattern of paths. Kernels of 1x1 with such a path are stored as matrices.
        ignored: pattern of names that a file may have besides those of the component.
        older: other names in older or newer versions of the format: pairs of a text in names, and
            the text that stands there instead.
    """

    names: dict[str, str | None]
    within: dict[str, str | None] = field(default_factory=dict)
    residual: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    special: tuple[tuple[str, str], ...] = ()
    matrices: str = r"(?!)"
    ignored: str = r"(?!)"
    older: tuple[tuple[str, str], ...] = ()

    def find_slots(self, model, attention=(), res_blocks=0) -> list[Slot]:
        """Returns the slot of each variable of a model, in the order of `model.weights`.

        Args:
            model: the Keras model of the component.
            attention, res_blocks: these fields of its config, needed where `names` count blocks
                over all stages.

        Raises:
            ValueError: the layout has no name for a variable.
        """
        prefix = f"{model.name}/"  # keras.Sequential puts its name before the names of its layers
        if not all(variable.path.startswith(prefix) for variable in model.weights):
            prefix = ""
        patterns = {
            re.compile(ours.replace("{i}", r"(\d+)").replace("{j}", r"(\d+)")): ours
            for ours in self.names
        }
        slots = []
        for variable in model.weights:
            path = variable.path.removeprefix(prefix)
            name = self._translate(path, patterns, attention, res_blocks)
            if name is None:
                raise ValueError(f"The layout has no name for the variable {variable.path}.")
            row, rows = 0, 1
            for pattern, replacement in self.special:
                if match := re.search(pattern, name):
                    name = name[: match.start()] + match.expand(replacement)
                    if "qkv" in match.groupdict():
                        row, rows = "qkv".index(match["qkv"]), 3
            matrix = path.endswith("kernel") and re.search(self.matrices, path) is not None
            slots.append(Slot(variable, self.prefix + name, row, rows, matrix))
        return slots

    def _translate(self, path, patterns, attention, res_blocks):
        first, *within, leaf = path.split("/")
        for pattern, ours in patterns.items():
            if (match := pattern.fullmatch(first)) and leaf in LEAVES:
                i, j = (*map(int, match.groups()), res_blocks, res_blocks)[:2]
                numbers = {"i": i, "j": j, "r": len(attention) - 1 - i}
                numbers["n"] = i * (res_blocks + 1) + j + first.startswith("down")
                numbers["u"] = 1 + any(attention[numbers["r"] : numbers["r"] + 1])
                table = self.residual if "_res_" in first else self.within
                within = (table.get(name, name) for name in within)
                parts = [self.names[ours], *within, LEAVES[leaf]]
                return ".".join(filter(None, parts)).format(**numbers)
        return None
