"""Every command and snippet of every README works, and whatever a README points at exists.

Blocks of Python run, each in a folder of its own. Blocks of commands (```sh) are parsed by the
commands' own parsers, and the commands in `RUN` also run. To be quick, both run on the embedded
checkpoint with at most `FEW_STEPS` steps. A block after the comment
`<!-- parse only -->` is only parsed: it needs hours, a network, another backend or a file that is
not there. Commands in the text, and behind `$` in blocks of output, are parsed, too.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.command import convert, explain, finetune, generate
from stable_diffusion.files import WEIGHTS_DIR

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this along
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = ("stable_diffusion", "weights", "scripts", "tests")
READMES = [
    ROOT / "README.md",
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PARSE_ONLY = "<!-- parse only -->"
FEW_STEPS = 2
COMMANDS = {
    "stable-diffusion": generate,
    "stable-diffusion-convert": convert,
    "stable-diffusion-finetune": finetune,
    "stable-diffusion-explain": explain,
}
RUN = {  # commands that run: what is added to their arguments, where the last value counts
    "stable-diffusion": ["--steps", str(FEW_STEPS)],
    "stable-diffusion-convert": [],
    "stable-diffusion-explain": ["--steps", str(FEW_STEPS)],
    "stable-diffusion-finetune": ["--steps", str(FEW_STEPS), "--preview-steps", str(FEW_STEPS)],
    "scripts/character/draw_character.py": [],
}
SLOW = ("stable-diffusion-finetune", ".fit(")  # blocks with one of these are large
BACKENDS = ("tensorflow", "jax", "torch", "openvino")
VARIABLES = {  # of the environment
    "KERAS_BACKEND",
    "KERAS_DISTRIBUTION_JOB_ADDRESSES",
    "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "KERAS_DISTRIBUTION_PROCESS_ID",
}
FOREIGN = {"train_text_to_image_lora.py"}  # files of other projects


@dataclass
class Block:
    """A block of a README between two lines of ```."""

    readme: Path
    line: int
    language: str
    text: str
    parse_only: bool

    def __str__(self):
        return f"{name_readme(self.readme)}:{self.line}"


def name_readme(readme):
    return readme.relative_to(ROOT).as_posix()


def read_blocks(readme):
    """Returns the blocks of a README, and its text without them."""
    blocks, outside, before, opened = [], [], "", None
    for number, line in enumerate(readme.read_text("utf-8").splitlines(), 1):
        if line.startswith("```") and opened is None:
            opened = Block(readme, number, line[3:].strip(), "", before == PARSE_ONLY)
        elif line.startswith("```"):
            blocks.append(opened)
            opened = None
        elif opened:
            opened.text += line + "\n"
        else:
            outside.append(line)
        before = line.strip() or before
    assert opened is None, f"{readme}: a block has no end"
    return blocks, "\n".join(outside)


ALL_BLOCKS = [block for readme in READMES for block in read_blocks(readme)[0]]
PYTHON = [block for block in ALL_BLOCKS if block.language == "python"]
SHELL = [block for block in ALL_BLOCKS if block.language == "sh"]


# Commands


def split_commands(text):
    """Yields the commands of a shell block as lists of words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def list_commands(readme):
    """Yields all commands of a README: in blocks, behind `$` in output, and in the text."""
    blocks, outside = read_blocks(readme)
    for block in blocks:
        if block.language == "sh":
            yield from split_commands(block.text)
        elif not block.language:
            lines = re.findall(r"^\$ ((?:.*\\\n)*.*)$", block.text, re.MULTILINE)
            yield from split_commands("\n".join(lines))
    for span in re.findall(r"`([^`]+)`", outside):
        first, *others = span.split() or [""]
        if others and (first in COMMANDS or first in ("python", "pip", "pytest")):
            yield from split_commands(" ".join(span.split()))


class Parsed(Exception):
    """The arguments of a script were parsed; nothing else is to be done."""


def parse_script(path, arguments, monkeypatch):
    """Parses arguments with the parser of a script."""
    assert path.is_file(), f"there is no {path}"
    tree = ast.parse(path.read_text("utf-8"))
    imported = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else _names(node))
    }
    if "torch" in imported and not importlib.util.find_spec("torch"):  # then only its options
        known = {
            argument.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for argument in node.args
            if isinstance(argument, ast.Constant)
        }
        options = {word for word in arguments if word.startswith("--")}
        assert options <= known, f"{path} has no {options - known}"
        return
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(path.parent))
    with monkeypatch.context() as patch:
        stop_when_parsed(patch, [str(path), *arguments])
        try:
            spec.loader.exec_module(module)
        except Parsed:  # a lesson, which has no `main`
            return
    parse_module(module, [str(path), *arguments], monkeypatch)


def _names(node):
    return [alias.name for alias in node.names]


def parse_module(module, argv, monkeypatch):
    """Parses arguments with the parser of a module, which `get_parser` returns or `main` makes."""
    if hasattr(module, "get_parser"):
        module.get_parser().parse_intermixed_args(argv[1:])
        return
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        stop_when_parsed(patch, argv)
        module.main()


def stop_when_parsed(patch, argv):
    """Makes `parse_args` raise `Parsed` after it has parsed `argv`."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *arguments, **options):
        parse(parser, *arguments, **options)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(sys, "argv", argv)


def check_command(words, monkeypatch):
    """Checks that a command of this project exists and has these arguments."""
    words = words[1:] if words[0] == "export" else words
    while words and (variable := re.fullmatch(r"([A-Z_]+)=(.+)", words[0])):
        assert variable[1] in VARIABLES, f"unknown variable: {variable[1]}"
        assert variable[1] != "KERAS_BACKEND" or variable[2] in BACKENDS, words[0]
        words = words[1:]
    if not words:
        return
    first, *arguments = words
    if first in COMMANDS:
        assert first in PROJECT["project"]["scripts"]
        args = COMMANDS[first].get_parser().parse_intermixed_args(arguments)
        if first == "stable-diffusion-finetune":
            finetune.check_arguments(args)
    elif first == "python" and arguments[0] == "-m":
        module = importlib.import_module(arguments[1])
        module = generate if module.__name__ == "stable_diffusion" else module
        parse_module(module, arguments[1:], monkeypatch)
    elif first == "python":
        parse_script(ROOT / arguments[0], arguments[1:], monkeypatch)
    elif first == "pip":
        check_pip(arguments)
    elif first == "pytest":
        check_pytest(arguments)
    elif first == "lint-imports":
        assert "importlinter" in PROJECT["tool"]
    else:
        assert first in ("ruff", ".ci/run"), f"unknown command: {' '.join(words)}"


def check_pip(arguments):
    """Checks that the extras of `pip install` exist."""
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        if extras := re.search(r"^(?:\.|stable-diffusion)\[(.+)\]$", argument):
            unknown = {*extras[1].split(",")} - {*PROJECT["project"]["optional-dependencies"]}
            assert not unknown, f"pyproject.toml has no extra {unknown}"
        else:
            assert argument in ("-e", "--no-deps", ".") or re.fullmatch(
                r"(dist/\*\.whl|[\w.-]+(==[\d.]+)?)", argument
            )


def check_pytest(arguments):
    """Checks that the markers and files of a `pytest` command exist."""
    markers = {text.split(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", default="")
    parser.add_argument("-k")
    parser.add_argument("-n")
    for flag in ("-s", "-q", "-v"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("paths", nargs="*")
    args = parser.parse_intermixed_args(arguments)
    words = {*re.findall(r"\w+", args.m)} - {"not", "and", "or"}
    assert words <= markers, f"pyproject.toml has no marker {words - markers}"
    for path in args.paths:
        assert (ROOT / path.split("::")[0]).exists(), f"there is no {path}"


@pytest.mark.parametrize("readme", READMES, ids=name_readme)
def test_commands_are_parsed(readme, monkeypatch, capsys):
    for words in list_commands(readme):
        try:
            check_command(words, monkeypatch)
        except SystemExit as end:  # of status 0 after --help
            assert not end.code, f"{shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize(
    "command",
    [
        "stable-diffusion 'an apple' --stepps 3",
        "stable-diffusion-convert emoji",
        "stable-diffusion-finetune images --method lora --out blip/",
        "python scripts/measure/benchmark.py --what cake",
        "python scripts/nothing.py",
        "python -m stable_diffusion.parity.keras_cv --model vae",
        "pip install -e .[nothing]",
        "pytest -m nothing",
        "pytest tests/nothing.py",
        "apple",
        "KERAS_BACKEND=jaxx stable-diffusion apple",
        "export PYTHONPATH=.",
    ],
)
def test_wrong_commands_are_found(command, monkeypatch):
    """What the other tests rely on."""
    with pytest.raises((SystemExit, AssertionError, ValueError)):
        check_command(shlex.split(command), monkeypatch)


# Running


@pytest.fixture(scope="module")
def supplies(tmp_path_factory):
    """A folder with the files that the READMEs' examples read."""
    folder = tmp_path_factory.mktemp("supplies")
    model = StableDiffusion(weights="emoji", jit_compile=False)
    model.save(folder / "model.safetensors", format="original", dtype="float16")
    (folder / "prompts.txt").write_text("a red apple on a blue background\na cat face on green\n")
    Image.new("RGB", (400, 300), "green").save(folder / "photo.png")
    mask = Image.new("L", (400, 300))
    mask.paste(255, (100, 100, 200, 200))
    mask.save(folder / "mask.png")
    run_command(["python", "scripts/character/draw_character.py", str(folder / "images")])
    for path in sorted((folder / "images").glob("*.png"))[4:]:  # a few are enough
        path.unlink()
    metadata = folder / "images" / "metadata.jsonl"
    metadata.write_text("\n".join(metadata.read_text("utf-8").splitlines()[:4]) + "\n", "utf-8")
    return folder


@pytest.fixture
def workplace(supplies, tmp_path, monkeypatch, reused):
    """A copy of `supplies` as the current folder; the pipeline takes few steps, without XLA."""
    folder = tmp_path / "workplace"
    shutil.copytree(supplies, folder)
    monkeypatch.chdir(folder)
    whole = StableDiffusion.generate_latents
    signature = inspect.signature(whole)

    def generate_latents(self, *arguments, **options):
        bound = signature.bind(self, *arguments, **options)
        bound.apply_defaults()
        given = bound.arguments
        given["num_steps"] = min(given["num_steps"], FEW_STEPS)
        given["first_step"] = min(given["first_step"], given["num_steps"] - 1)
        return whole(*bound.args, **bound.kwargs)

    build = StableDiffusion._build

    def build_without_xla(self, component, make):
        self.jit_compile = False
        return build(self, component, make)

    monkeypatch.setattr(StableDiffusion, "generate_latents", generate_latents)
    monkeypatch.setattr(StableDiffusion, "_build", build_without_xla)
    return folder


def run_command(words):
    """Runs a command of `RUN`; returns whether it is one."""
    first, *arguments = words[1:] if words[0] == "python" else words
    if first not in RUN:
        return False
    if first in COMMANDS:
        status = COMMANDS[first].main([*arguments, *RUN[first]])
        assert status == 0, f"{shlex.join(words)} ended with status {status}"
    else:
        subprocess.run([sys.executable, ROOT / first, *arguments, *RUN[first]], check=True)
    return True


def mark_slow(block):
    slow = not block.parse_only and any(word in block.text for word in SLOW)
    return pytest.param(block, id=str(block), marks=[pytest.mark.large] * slow)


@pytest.mark.parametrize(
    "block",
    [
        mark_slow(block)
        for block in SHELL
        if not block.parse_only and any(set(words) & {*RUN} for words in split_commands(block.text))
    ],
)
def test_commands_run(block, workplace, capsys):
    commands = list(split_commands(block.text))
    if any("scripts/character/draw_character.py" in words for words in commands):
        shutil.rmtree("images")
    ran = [run_command(words) for words in commands]
    assert any(ran)


@pytest.mark.parametrize("block", [mark_slow(block) for block in PYTHON])
def test_python_runs(block, workplace, capsys):
    code = compile(block.text, str(block), "exec")
    if not block.parse_only:
        names = {"__name__": "__main__"}
        exec(code, names)
        check_shapes(block.text, names)


def check_shapes(text, names):
    """Compares shapes that comments state, as in `x = ...  # (2, 3)` and `# x is (2, 3)`."""
    assigned = {
        node.end_lineno: node.targets[0].id
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    count = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        stated = re.search(r"\((\d+(?:, \d+)*)\)$", token.string)
        if token.type != tokenize.COMMENT or not stated:
            continue
        shape = tuple(map(int, stated[1].split(", ")))
        named = re.search(r"# ((?:\w+ and )*\w+) (?:is|are) \(", token.string)
        for name in named[1].split(" and ") if named else [assigned[token.start[0]]]:
            assert np.shape(names[name]) == shape, f"{name} is {np.shape(names[name])}"
            count += 1
    return count


def test_shapes_in_comments_are_found():
    names = {"x": np.zeros((2, 3)), "y": [1, 2]}
    assert (
        check_shapes("x = 1  # zeros: (2, 3)\ny = 2\nfor z in y:\n    z  # y is (2)\n", names) == 2
    )
    with pytest.raises(AssertionError, match="x is "):
        check_shapes("x = 1  # (2, 4)\n", names)
    with pytest.raises(AssertionError, match="y is "):
        check_shapes("x = 1  # x and y are (2, 3)\n", names)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="every backend has its own random numbers"
)
def test_the_first_image_is_what_the_first_command_writes(tmp_path, monkeypatch, capsys, reused):
    monkeypatch.chdir(tmp_path)
    words = next(w for w in list_commands(ROOT / "README.md") if w[0] == "stable-diffusion")
    assert generate.main([*words[1:], "--seed", "0"]) == 0
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text("utf-8"))
    with (
        Image.open(capsys.readouterr().out.strip()) as written,
        Image.open(ROOT / pictures[0]) as shown,
    ):
        apart = np.abs(np.asarray(written, "float64") - np.asarray(shown))
        assert apart.mean() < 1, "the checkpoint or a default has changed: make the picture again"
        assert written.text["guidance"] == shown.text["guidance"]


# What a README points at


@pytest.mark.parametrize("readme", READMES, ids=name_readme)
def test_links_lead_somewhere(readme):
    _, outside = read_blocks(readme)
    for link in re.findall(r"\[[^\]]*\]\(([^)]+)\)", outside):
        target, _, heading = link.partition("#")
        if target.startswith("https://"):
            continue
        path = (readme.parent / target) if target else readme
        assert path.exists(), f"{name_readme(readme)}: there is no {link}"
        if heading and path.suffix == ".md":  # `test_links.py` checks those of lines
            assert heading in list_anchors(path), f"{name_readme(readme)}: there is no {link}"


def list_anchors(readme):
    """Returns the anchors of a README's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read_blocks(readme)[1], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def find_path(readme, name):
    """Returns the path of what a README names: beside it, in the project, or in the package."""
    places = (readme.parent, ROOT, ROOT / "stable_diffusion", WEIGHTS_DIR)
    return next((place / name for place in places if (place / name).exists()), None)


@pytest.mark.parametrize("readme", READMES, ids=name_readme)
def test_files_that_are_named_exist(readme):
    _, outside = read_blocks(readme)
    starts = "|".join(FOLDERS)
    for span in re.findall(r"`([^`\s]+)`", outside):
        if span not in FOREIGN and re.fullmatch(rf"(?:{starts})/[\w./-]*|[\w./-]+\.py", span):
            assert find_path(readme, span), f"{name_readme(readme)}: there is no {span}"


def list_definitions(path):
    """Returns the names that a module defines: functions, classes, their methods, constants."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        names |= _defined(node)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            names |= {f"{node.name}.{name}" for name in _defined(inner)}
    return names


def _defined(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {name.id for target in node.targets for name in ast.walk(target) if _is_name(name)}
    return {node.target.id} if isinstance(node, ast.AnnAssign) else set()


def _is_name(node):
    return isinstance(node, ast.Name)


def list_references(readme):
    """Yields `(file, name)` of "[`name`](x.py#L1)" and "`name` and `name` in `x.py`"."""
    _, outside = read_blocks(readme)
    names = r"`[A-Za-z_][\w.]*`(?:(?:,| and|, and) `[A-Za-z_][\w.]*`)*"
    files = r"`[\w./]+\.py`(?: and `[\w./]+\.py`)*"
    text = " ".join(outside.split())
    for name, file in re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L\d+\)", text):
        yield file, name
    for listed, inside in re.findall(rf"({names}) in ({files})", text):
        for name in re.findall(r"`([^`]+)`", listed):
            for file in re.findall(r"`([^`]+)`", inside):
                yield file, name


@pytest.mark.parametrize("readme", READMES, ids=name_readme)
def test_functions_that_are_named_exist(readme):
    for file, name in list_references(readme):
        path = find_path(readme, file)
        assert path and name in list_definitions(path), f"{file} has no {name}"


def test_the_reading_path_has_stops():
    assert len({file for file, _ in list_references(ROOT / "README.md")}) >= 7
    assert len(list(list_references(ROOT / "stable_diffusion" / "README.md"))) >= 15


# The project's README


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200
    assert max(map(len, text.splitlines())) <= 100


def test_the_readme_begins_with_the_two_commands():
    first_screen = (ROOT / "README.md").read_text("utf-8").splitlines()[:40]
    assert 'pip install -e . && stable-diffusion "a red apple on a blue background"' in first_screen
    assert 'pip install -e ".[test]" && pytest' in first_screen


def test_the_readme_has_python_and_commands():
    assert sum(block.readme == ROOT / "README.md" for block in PYTHON) >= 2
    assert sum(block.readme == ROOT / "README.md" for block in SHELL) >= 5
    assert sum(not block.parse_only for block in PYTHON) >= 2


def test_installing_without_tensorflow_names_all_other_dependencies():
    commands = [words for words in list_commands(ROOT / "README.md") if words[0] == "pip"]
    place = next(n for n, words in enumerate(commands) if "--no-deps" in words)
    needed = {re.match(r"[\w-]+", text)[0] for text in PROJECT["project"]["dependencies"]}
    assert {*commands[place + 1][2:]} == needed - {"tensorflow"} | {"jax"}
