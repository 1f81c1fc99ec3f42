"""Links to lines of the source lead to the definition that they name.

A link [`name`](path.py#L12) leads to the line of `def name`, `class name` or `name =` in path.py,
[`Class.method`](path.py#L12) to that of the method. Paths are relative to the file with the link.
Whoever moved the lines mends all links:

    python tests/test_links.py --fix
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("stable_diffusion", "weights", "scripts", "tests")
FILES = [
    ROOT / "README.md",
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
    *sorted((ROOT / "scripts" / "lessons").rglob("*.py")),
]
LINK = re.compile(r"\[`([\w.]+)`\](\s*)\(([^)\s#]+\.py)#L(\w+)\)")
ANY_LINK = re.compile(r"\]\(([^)\s]+\.py#[^)\s]*)\)")


def find_lines(path):
    """Returns a dict from each name that a module defines, and `Class.name`, to its line."""
    lines = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        lines |= _find_names(node)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            lines |= {f"{node.name}.{name}": line for name, line in _find_names(inner).items()}
    return lines


def _find_names(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name: node.lineno}
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return {name.id: node.lineno for name in names}


def find_line(file, name, path):
    """Returns the line that a link of `file` should lead to, and what is wrong with it if none."""
    target = file.parent / path
    if not target.is_file():
        return None, f"there is no {path}"
    line = find_lines(target).get(name)
    return line, None if line else f"{path} defines no {name}"


def list_faults(file, text):
    """Yields what is wrong with each wrong link of a file's text."""
    for name, _, path, line in LINK.findall(text):
        right, fault = find_line(file, name, path)
        if fault:
            yield fault
        elif line != str(right):
            yield f"{name} is at {path}#L{right}, not #L{line}: python tests/test_links.py --fix"
    for link in ANY_LINK.findall(LINK.sub("", text)):
        yield f"{link} does not say a name: write [`name`]({link})"


def fix_links(file, text):
    """Returns a file's text with the right lines in its links; unknown names stay as they are."""

    def fix(link):
        line, _ = find_line(file, link[1], link[3])
        return f"[`{link[1]}`]{link[2]}({link[3]}#L{line or link[4]})"

    return LINK.sub(fix, text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links_lead_to_the_definition(file):
    assert not list(list_faults(file, file.read_text("utf-8")))


def test_the_reading_path_leads_to_lines():
    assert len(LINK.findall((ROOT / "README.md").read_text("utf-8"))) >= 9


@pytest.fixture
def module(tmp_path):
    text = "import os\n\nSIZE: int = 3\nA, B = 1, 2\n\n\n@cache\ndef run():\n    inner = 1\n\n\n"
    (tmp_path / "a.py").write_text(text + "class C:\n    def run(self):\n        pass\n")
    return tmp_path / "README.md"


def test_definitions_are_found(module):
    lines = {"SIZE": 3, "A": 4, "B": 4, "run": 8, "C": 12, "C.run": 13}
    assert find_lines(module.parent / "a.py") == lines


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("[`C.run`](a.py#L12)", "C.run is at a.py#L13, not #L12"),
        ("[`run`](a.py#Lx)", "run is at a.py#L8, not #Lx"),
        ("[`inner`](a.py#L9)", "a.py defines no inner"),
        ("[`run`](b.py#L8)", "there is no b.py"),
        ("[the function](a.py#L8)", "a.py#L8 does not say a name"),
        ("[`run`](a.py#8)", "a.py#8 does not say a name"),
    ],
)
def test_wrong_links_are_found(module, link, fault):
    faults = list(list_faults(module, f"See {link} and [`run`](a.py#L8)."))
    assert len(faults) == 1 and faults[0].startswith(fault)


def test_wrong_links_are_fixed(module):
    wrong = "[`C.run`](a.py#L1), [`B`](a.py#L99), [`nothing`](a.py#L5), [a](a.py)"
    right = "[`C.run`](a.py#L13), [`B`](a.py#L4), [`nothing`](a.py#L5), [a](a.py)"
    assert fix_links(module, wrong) == right


def main():
    parser = argparse.ArgumentParser(description="Lists wrong links to lines of the source.")
    parser.add_argument("--fix", action="store_true", help="write the right lines into the links")
    args, faults = parser.parse_args(), []
    for file in FILES:
        text = file.read_text("utf-8")
        if args.fix and (fixed := fix_links(file, text)) != text:
            file.write_text(fixed, "utf-8")
            print(f"fixed {file.relative_to(ROOT)}")
            text = fixed
        faults += [f"{file.relative_to(ROOT)}: {fault}" for fault in list_faults(file, text)]
    print("\n".join(faults) or "All links to lines are right.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
