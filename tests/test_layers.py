"""The shape of the package: imports point downwards, and its public names are there.

The contract is in pyproject.toml. What the linter cannot see is read from the syntax tree: imports
of the package itself, which would reach any module, and circles among siblings.
"""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import stable_diffusion

ROOT = Path(__file__).parent.parent
PACKAGE = "stable_diffusion"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))


def name_of(path, root=ROOT):
    """Returns the dotted name of a module."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_imports(path, names):
    """Returns the modules of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in names else node.module)
    return {name for name in found if name.split(".")[0] == PACKAGE}


def lint(folder):
    """Runs the contract in a folder; returns the exit status and what it says."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main"]
    command[-1] += "; main()"
    done = subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_contract_is_kept():
    status, said = lint(ROOT)
    assert status == 0 and "0 broken" in said, said


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("config.py", "from stable_diffusion.pretrained import Pretrained"),  # upwards
        ("noise_scheduler.py", "def f():\n    from stable_diffusion import config"),  # late
        ("checkpoints/layout.py", "from stable_diffusion.checkpoints import tensors"),
        ("new_module.py", ""),  # the contract is exhaustive
    ],
)
def test_an_import_upwards_breaks_it(tmp_path, file, line):
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / PACKAGE / file, "a") as module:
        module.write(f"\n{line}\n")
    status, said = lint(tmp_path)
    assert status == 1 and ("BROKEN" in said or "new_module" in said), said


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_the_package_itself(path):
    """Neither the whole package, nor the folder that the module is in."""
    names = set(map(name_of, MODULES))
    forbidden = {PACKAGE} if path.name == "__init__.py" else {PACKAGE, name_of(path.parent)}
    assert not find_imports(path, names) & forbidden


def test_there_is_no_circle():
    names = set(map(name_of, MODULES))
    graph = {name_of(path): find_imports(path, names) for path in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises a CycleError
    graph["stable_diffusion.files"].add("stable_diffusion.clip_tokenizer")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


# Public names


def read_table():
    """Returns the dotted names in the table of the package's docstring."""
    names = []
    for line in stable_diffusion.__doc__.split("---\n")[-1].splitlines():
        first, *others = re.split(r"\s{2,}", line.strip())[0].split()
        holder = first.rsplit(".", 1)[0]
        names += [first.split("(")[0], *(holder + name.split("(")[0] for name in others)]
    return names


@pytest.mark.parametrize("name", read_table())
def test_public_names_are_there(name):
    found, holder = stable_diffusion, PACKAGE
    for attribute in name.split("."):
        holder = f"{holder}.{attribute}"
        if holder in map(name_of, MODULES) and not hasattr(found, attribute):
            importlib.import_module(holder)
        if isinstance(found, type) and attribute in ("config", "checkpoint"):  # of an instance
            found = found(weights=None, jit_compile=False)
        found = getattr(found, attribute)
    assert found is not None


def test_the_table_has_what_people_use():
    table = " ".join(read_table())
    for name in ("generate_latents", "open_checkpoint", "load_lora", "Config", "SAMPLERS", "LoRA"):
        assert name in table


def test_completion_shows_the_lazy_names():
    code = (
        "import sys, stable_diffusion as sd; assert 'keras' not in sys.modules;"
        "assert set(sd.__all__) <= set(dir(sd)); assert 'StableDiffusion' in dir(sd);"
        "from stable_diffusion import *; assert StableDiffusion.__module__.startswith('stable')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = stable_diffusion.Nothing
