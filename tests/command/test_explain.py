"""`stable-diffusion-explain`: the page is written, and bad input is refused before the work."""

import keras
import numpy as np
import pytest
from helpers import FEW
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.command import explain

pytestmark = pytest.mark.usefixtures("reused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random parameters."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("few") / "few"
    StableDiffusion(jit_compile=False, weights=None, config=FEW).save(path)
    return path


def run(capsys, *argv):
    try:
        status = explain.main([str(argument) for argument in argv])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


def test_a_page_is_written(folder, tmp_path, capsys):
    out = tmp_path / "new" / "apple"
    given = ["a <b>red</b> apple", "--weights", folder, "--steps", "2", "--out", out]
    assert run(capsys, *given) == (0, f"{out / 'index.html'}\n", [])
    page = (out / "index.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "<b>red" not in page and "&lt;b&gt;red" in page
    assert [path.name for path in out.iterdir()] == ["index.html"]
    (out / "notes.txt").touch()
    assert run(capsys, *given, "--seed", "5")[0] == 0  # replaces the page, and nothing else
    assert {path.name for path in out.iterdir()} == {"index.html", "notes.txt"}
    assert (out / "index.html").read_text("utf-8") != page


def test_a_page_of_image_to_image(folder, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")
    Image.fromarray(pixels).save(tmp_path / "x.png")
    options = ["--image", tmp_path / "x.png", "--steps", "4", "--strength", "0.5"]
    options += ["--weights", folder, "--negative", "blurry", "--guidance", "2", "--sampler", "heun"]
    assert run(capsys, "a (dog:1.2)", "--syntax", "webui", *options, "--out", tmp_path)[0] == 0
    assert "dog" in (tmp_path / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a"], "the following arguments are required: --out"),
        (["a", "--out", "x", "--steps", "0"], "argument --steps: '0' is not an integer from 1"),
        (["a", "--out", "x", "--sampler", "dimm"], "did you mean 'ddim'?"),
        (["a", "--out", "x", "--weights", "none"], "'none'"),
        (["a", "--out", "file"], "argument --out: it is a folder, not the file 'file'"),
        (["a", "--out", "x", "--image", "none.png"], "argument --image: "),
        (["a", "--out", "x", "--strength", "0.5"], "argument --strength: it needs --image"),
        (["a " * 80, "--out", "x", "--weights", "FEW"], "at most 77 tokens"),
        (["a", "--out", "x", "--weights", "FEW", "--height", "65"], "multiple"),
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    status, out, err = run(capsys, *(folder if one == "FEW" else one for one in argv))
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith("stable-diffusion-explain: ") and message in err[0], err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_left_after_an_interruption(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain.Clock, "show", interrupt)
    given = ["a", "--weights", folder, "--steps", "2", "--out", tmp_path / "x"]
    assert run(capsys, *given) == (130, "", ["stable-diffusion-explain: interrupted"])
    assert not list(tmp_path.iterdir())


def test_how_long_it_takes_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr(explain.time, "monotonic", iter(range(0, 1000, 5)).__next__)
    clock = explain.Clock()
    for done in range(1, 6):
        clock.show(done, 103)
    said = "stable-diffusion-explain: it will take about 9 minutes more\n"
    assert capsys.readouterr().err == said
    clock = explain.Clock()
    for done in range(1, 6):
        clock.show(done, 12)  # 45 seconds
    assert capsys.readouterr().err == ""
