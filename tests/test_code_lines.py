"""The core stays small enough to be read in an evening."""

import ast
import tokenize
from pathlib import Path

import pytest

CORE = Path(__file__).parent.parent / "stable_diffusion"
MOST = 560  # lines of code in all files of the core together
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(path):
    """Counts the lines that hold code: no blank lines, comments and docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in SILENT:
                lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('"""Doc.\n\nMore."""\n\nx = 1  # one\n# no\n', 1),
        ('def f():\n    """Doc."""\n    return [\n        1,\n\n    ]\n', 4),
        ('x = """a\nb"""\n', 2),
    ],
)
def test_counting(text, count, tmp_path):
    (tmp_path / "x.py").write_text(text)
    assert code_lines(tmp_path / "x.py") == count


def test_the_core_is_small():
    counts = {p.name: code_lines(p) for p in CORE.glob("*.py") if p.name != "__main__.py"}
    assert sum(counts.values()) <= MOST, counts
