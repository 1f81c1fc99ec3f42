"""How formats name the parameters of a model: tables from our layers' names to theirs."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import keras

LEAVES = {  # ours, and PyTorch's
    "kernel": "weight",  # Dense (in, out) is Linear (out, in); (h, w, in, out) is (out, in, h, w)
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "embeddings": "weight",
}


class Slot(NamedTuple):
    """Where a variable is stored: in the tensor `name`, as the `row`-th of `rows` equal slices."""

    variable: keras.Variable
    name: str
    row: int = 0
    rows: int = 1
    matrix: bool = False  # a kernel of 1x1 that is a matrix there

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice there: kernels have the output first."""
        shape = tuple(self.variable.shape)
        if self.variable.path.endswith("/kernel"):
            shape = (shape[-1], shape[-2], *shape[:-2])
        return shape[:2] if self.matrix else shape


@dataclass(frozen=True)
class Layout:
    """What a format calls the tensors of one component.

    A path such as "down_0_attn_1/attn1/to_q/kernel" is translated component by component: the first
    by `names`, the last by `LEAVES`, and those between by `within`, or by `residual` in a residual
    block. None stands for no component at all.

    In `names`, {i} is the number of a level, {j} that of a block in it. For formats that count
    otherwise there are {r}, the level counted from the other end; {n}, the block counted over all
    levels, with what halves or doubles the size; and {u}, the place of a doubling in its block.

    Args:
        names, within, residual: dicts from our components to theirs.
        prefix: before each name.
        special: what the above can't say: pairs of a pattern of translated names and what the
            matching part is replaced by. If the pattern has a group "qkv", the tensor holds three
            of our variables, one below the other, and the group tells which.
        matrices: pattern of paths whose 1x1 kernels are stored as matrices.
        ignored: pattern of names that a file may have beside the component's.
        older: what versions of the format name otherwise: pairs of a text in names, and the other.
    """

    names: dict[str, str | None]
    within: dict[str, str | None] = field(default_factory=dict)
    residual: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    special: tuple[tuple[str, str], ...] = ()
    matrices: str = r"(?!)"
    ignored: str = r"(?!)"
    older: tuple[tuple[str, str], ...] = ()

    def slots(self, model, attention=(), res_blocks=0) -> list[Slot]:
        """Returns the slot of each of a model's variables, in their order.

        Args:
            model: the Keras model of the component.
            attention, res_blocks: of its config, where `names` count over all levels.

        Raises:
            ValueError: a variable that the layout has no place for.
        """
        prefix = f"{model.name}/"  # a keras.Sequential puts its own name before those of its layers
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
                raise ValueError(f"The layout has no place for the variable {variable.path}.")
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
