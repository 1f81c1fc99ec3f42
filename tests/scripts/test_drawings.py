"""Tests of scripts/drawings/draw_models.py: the committed drawings are what it draws now."""

import re
import sys
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import draw_models
import pytest
from helpers import ROOT

from stable_diffusion.config import SD1, SD2, TINY
from stable_diffusion.diffusion_model import DiffusionModel

quick = pytest.mark.quick

PICTURES = ROOT / "weights" / "pictures"
NAMES = ("model.svg", "unet.svg")
DRAW = dict(zip(NAMES, (draw_models.draw_model, draw_models.draw_unet), strict=True))
SHAPE = re.compile(r"\(\d+(?:, \d+)*\)")
SVG = "{http://www.w3.org/2000/svg}"
WIDTHS = {"": 0.56, "bold": 0.62, "mono": 0.61}  # of wide fonts' characters, in parts of the size


def list_shapes(text):
    return set(SHAPE.findall(" ".join(ElementTree.fromstring(text).itertext())))


def list_texts(text):
    """Returns each text with the edges of its box: left, top, right and bottom."""
    found = []
    for node in ElementTree.fromstring(text).iter(f"{SVG}text"):
        x, y, size = (float(node.get(name)) for name in ("x", "y", "font-size"))
        kind = node.get("class").split()[1:] or [""]
        width = WIDTHS[kind[0]] * size * len(node.text)
        left = x - {"start": 0, "middle": width / 2, "end": width}[node.get("text-anchor")]
        found.append((node.text, (left, y - 0.8 * size, left + width, y + 0.25 * size)))
    return found


@quick
def test_the_committed_drawings_are_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_models.py", str(tmp_path / "new")])
    draw_models.main()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert (tmp_path / "new" / name).read_bytes() == (PICTURES / name).read_bytes(), name


@quick
def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["draw_models.py", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as error:
        draw_models.main()
    assert error.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err.splitlines()[-1]


@quick
@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_off_or_over_another(name):
    text = (PICTURES / name).read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}title").text and "prefers-color-scheme: dark" in text
    _, _, width, height = map(float, root.get("viewBox").split())
    page = root.find(f"{SVG}rect")  # its own background comes first
    assert page.get("class") == "page"
    assert float(page.get("width")) >= width - 1 and float(page.get("height")) >= height - 1
    texts = list_texts(text)
    assert len(texts) > 20
    for words, (left, top, right, bottom) in texts:
        assert left > 8 and top > 8 and right < width - 8 and bottom < height - 8, words
    for (words, a), (others, b) in combinations(texts, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{words!r} is over {others!r}"


@quick
def test_the_three_parts_show_the_shapes_of_the_config():
    expected = {"(77)", "(77, 768)", "(64, 64, 4)", "(512, 512, 3)"}
    assert list_shapes((PICTURES / "model.svg").read_text("utf-8")) == expected
    large = replace(SD2, size=768, vae=replace(SD2.vae, latent_channels=8))
    expected = {"(77)", "(77, 1024)", "(96, 96, 8)", "(768, 768, 3)"}
    assert list_shapes(draw_models.draw_model(large)) == expected


@quick
def test_the_unet_shows_the_shapes_that_its_docstring_has():
    expected = {*SHAPE.findall(DiffusionModel.__doc__), "(77, 768)", "(320)", "(1280)"}
    assert list_shapes((PICTURES / "unet.svg").read_text("utf-8")) == expected


@quick
def test_the_unet_shows_the_shapes_of_another_config():
    unet = replace(SD2.unet, widths=(160, 320, 640, 640), in_channels=9)
    shapes = list_shapes(draw_models.draw_unet(replace(SD2, unet=unet, size=768)))
    assert {"(96, 96, 9)", "(96, 96, 4)", "(96, 96, 160)", "(12, 12, 640)", "(640)"} <= shapes
    assert "(77, 1024)" in shapes and "(64, 64, 320)" not in shapes


def test_stages_are_those_of_the_model():
    """Compares what the drawing shows of a UNet with Keras' own shapes of its layers."""
    c = replace(TINY.unet, widths=(32, 64, 96), heads=(2, 2, 2), attention=(True, False, True))
    model = DiffusionModel(64, 96, 77, download_weights=False, config=c)
    stages = draw_models.list_stages(c, 64, 96)
    assert len(stages) == len(c.widths)
    for i, stage in enumerate(stages):
        up, kind = len(stages) - 1 - i, "attn" if stage["attention"] else "res"
        names = {layer.name for layer in model.layers}
        assert (f"down_{i}_attn_0" in names) == stage["attention"] == (f"up_{up}_attn_0" in names)
        first = f"down_{i - 1}_downsample" if i else "conv_in"
        layers = [first, *(f"down_{i}_{kind}_{j}" for j in range(c.res_blocks))]
        shapes = [model.get_layer(layer).output.shape[1:] for layer in layers]
        assert stage["down"] == shapes
        for j, joined in enumerate(stage["joined"]):
            inputs = model.get_layer(f"up_{up}_concat_{j}").input
            assert joined == tuple(each.shape[-1] for each in inputs)
        last = f"up_{up}_{kind}_{c.res_blocks}"
        assert stage["up"] == model.get_layer(last).output.shape[1:]
        out = model.get_layer(f"up_{up}_upsample").output.shape[1:] if i else None
        assert stage["out"] == out


@quick
def test_modules_that_are_named_exist():
    texts = [words for words, _ in list_texts((PICTURES / "model.svg").read_text("utf-8"))]
    modules = [words for words in texts if words.endswith(".py")]
    assert len(modules) == 6
    for module in modules:
        assert (ROOT / "stable_diffusion" / module).is_file(), module


@quick
def test_boxes_of_the_unet_are_as_many_as_its_layers():
    texts = [words for words, _ in list_texts((PICTURES / "unet.svg").read_text("utf-8"))]
    c = SD1.unet
    stages, attention = len(c.widths), sum(c.attention)
    assert texts.count("res") == stages * (2 * c.res_blocks + 1) + 2
    assert texts.count("attn") == attention * (2 * c.res_blocks + 1) + 1
    assert texts.count("downsample") == texts.count("upsample") == stages - 1
    assert sum(
        " + " in words and words[0].isdigit() and words[-1].isdigit() for words in texts
    ) == (stages * (c.res_blocks + 1))
