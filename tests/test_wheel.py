"""The wheel: what is in it, and its three commands in another folder, without the checkout.

The environment is new and has only this wheel; what the package needs is seen from the environment
that runs the tests (`--system-site-packages` does not see a virtual environment, so a .pth file
names its folder). That saves minutes. `PYTHONSAFEPATH` and `-I` keep the checkout away.
"""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from stable_diffusion import __version__
from stable_diffusion.command import png

pytestmark = pytest.mark.large
ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "stable-diffusion",
    "stable-diffusion-convert",
    "stable-diffusion-finetune",
    "stable-diffusion-explain",
)


def run(command, folder, **options):
    """Runs a command in a folder; returns what it printed to standard output."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=clean | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of a new wheel."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """The folder of the commands, in a new environment with the wheel."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", venv], venv.parent)
    python = venv / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], venv.parent)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run([python, "-c", asked], venv).strip())
    # Its packages come after the wheel's. A .pth in it, such as that of an editable installation,
    # is not followed.
    (own / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_the_wheel_has_what_is_needed_and_no_more(wheel):
    assert wheel.name == f"stable_diffusion-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    folder = ROOT / "stable_diffusion"
    sources = [path for end in ("py", "css", "js") for path in folder.rglob(f"*.{end}")]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= set(names)
    assert "stable_diffusion/py.typed" in names
    folder = "stable_diffusion/weights/"
    weights = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    emoji = (path for path in (ROOT / "weights" / "emoji").rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT / "weights").as_posix() for path in emoji}
    assert weights == expected | {"bpe_simple_vocab_16e6.txt.gz"}
    assert not [n for n in names if n.endswith((".png", ".jpg", ".webp", ".pyc", ".npz"))]
    assert {name.split("/")[0] for name in names} == {
        "stable_diffusion",
        f"stable_diffusion-{__version__}.dist-info",
    }


def test_the_commands_are_those_of_the_wheel(bin_folder, tmp_path):
    for command in COMMANDS:
        assert run([bin_folder / command, "--version"], tmp_path) == f"{command} {__version__}\n"
        assert f"usage: {command} " in run([bin_folder / command, "--help"], tmp_path)
    python = bin_folder / "python"
    version = run([python, "-m", "stable_diffusion", "--version"], tmp_path)
    assert version == f"stable-diffusion {__version__}\n"
    asked = "import stable_diffusion as s; print(s.__file__)"
    assert Path(run([python, "-c", asked], tmp_path).strip()).is_relative_to(bin_folder.parent)


def test_generate(bin_folder, tmp_path):
    prompt = "a red apple on a blue background"
    given = [prompt, "--seed", "0", "--steps", "2", "--out", "a.png"]
    assert run([bin_folder / COMMANDS[0], *given], tmp_path) == "a.png\n"
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (128, 128)
        corner, centre = image.getpixel((4, 4)), image.getpixel((64, 64))
    assert corner[2] > 2 * corner[0] and centre[0] > 2 * centre[2], "red on blue"
    assert png.read_text(tmp_path / "a.png")["prompt"] == prompt


def test_convert(bin_folder, tmp_path):
    given = ["emoji", "converted", "--dtype", "float16"]
    assert run([bin_folder / COMMANDS[1], *given], tmp_path) == "converted\n"
    assert (tmp_path / "converted" / "model_index.json").is_file()
    given = ["a cat", "--weights", "converted", "--steps", "1", "--out", "a.png"]
    assert run([bin_folder / COMMANDS[0], *given], tmp_path) == "a.png\n"


def test_finetune(bin_folder, tmp_path):
    (tmp_path / "images").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "images" / f"{colour}.png")
        (tmp_path / "images" / f"{colour}.txt").write_text(f"a {colour} square")
    given = ["images", "--method", "lora", "--out", "a.safetensors", "--steps", "1"]
    said = run([bin_folder / COMMANDS[2], *given, "--batch", "2"], tmp_path)
    assert "2 images, 0 skipped" in said and said.endswith("wrote a.safetensors\n")
    assert (tmp_path / "a.safetensors").stat().st_size > 1000
    settings = json.loads((tmp_path / "a.safetensors.work" / "settings.json").read_text())
    assert settings["method"] == "lora"


def test_explain(bin_folder, tmp_path):
    given = ["a red apple on a blue background", "--steps", "2", "--out", "apple"]
    assert run([bin_folder / COMMANDS[3], *given], tmp_path) == "apple/index.html\n"
    page = (tmp_path / "apple" / "index.html").read_text("utf-8")
    assert "<style" in page and "<script" in page and "decoder.py:" in page
