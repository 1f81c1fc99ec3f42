"""The core stays small enough to be read in an evening; README states how small it is."""

import ast
import tokenize
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

README = Path(__file__).parent.parent / "README.md"
PACKAGE = README.parent / "stable_diffusion"
CORE = (  # what one reads to understand how an image is made
    "clip_tokenizer",
    "text_encoder",
    "diffusion_model",
    "decoder",
    "image_encoder",
    "attention_block",
    "resnet_block",
    "padded_conv2d",
    "noise_scheduler",
    "stable_diffusion",
)
AROUND = (
    "config",
    "block",
    "pretrained",
    "cleaning",
    "added_tokens",
    "clip_skip",
    "spacing",
    "components",
    "__init__",
)
LEFT_OUT = ("image_to_image", "inpaint", "step")  # functions: two tasks, and DDPM's step
MOST = 752
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(path, left_out=()):
    """Counts the lines that hold code: no blank lines, comments and docstrings.

    Args:
        path: of the module.
        left_out: names of functions that are not counted.
    """
    skipped = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and node.name in left_out:
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = set()
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in SILENT:
                lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - skipped)


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


def test_the_core_is_what_the_readme_says(capsys):
    counts = {name: code_lines(PACKAGE / f"{name}.py", LEFT_OUT) for name in CORE}
    around = {name: code_lines(PACKAGE / f"{name}.py") for name in AROUND}
    core, both = sum(counts.values()), sum(counts.values()) + sum(around.values())
    with capsys.disabled():
        print(f"\n{core} lines of code make an image: {counts}")
        print(f"{both} with {around}; left out: {', '.join(LEFT_OUT)}")
    assert core <= MOST
    said = README.read_text("utf-8")
    assert f"{core} lines" in said and f"{both} lines" in said


def test_what_is_left_out_is_there():
    """Names that are left out of the count exist, or come with the tasks that are named."""
    assert "def step(self" in (PACKAGE / "noise_scheduler.py").read_text()
    whole = code_lines(PACKAGE / "noise_scheduler.py")
    assert code_lines(PACKAGE / "noise_scheduler.py", LEFT_OUT) < whole
