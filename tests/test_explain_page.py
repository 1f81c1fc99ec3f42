"""The page that explains an image: its HTML, its pictures, its size, and that texts stay texts."""

import base64
import io
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from traces import make_trace

from stable_diffusion.command import explain
from stable_diffusion.explain import charts, pictures, sections
from stable_diffusion.explain.page import CONTENTS, MOST_BYTES, make_page, write_page
from stable_diffusion.explain.trace import Token

VOID = {"meta", "img", "input", "br", "wbr", "link", "hr"}
SVG_VOID = {"path", "polyline", "circle", "rect", "use", "line"}
LOADING = {"src", "srcset", "poster", "data", "action", "background", "xlink:href"}
EVIL = '<script>alert("1")</script>'


class Reader(HTMLParser):
    """Reads a page: every tag with its attributes, and whether tags are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text, self.scripts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in SVG_VOID
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text.append(data)

    def find(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def open_uri(uri):
    """Opens the picture of a data URI."""
    found = re.fullmatch(r"data:image/(png|webp);base64,([A-Za-z0-9+/=]+)", uri)
    assert found, uri[:60]
    image = Image.open(io.BytesIO(base64.b64decode(found[2])))
    image.load()
    assert image.format.lower() == found[1]
    return image


KINDS = {
    "text to image": {},
    "from an image": {"from_image": True},
    "without guidance": {"guided": False},
    "two chunks": {"context": (154, 16)},
    "one step": {"num_steps": 1},
    "no words": {"words": ()},
    "negative": {"negative_prompt": "blurry & <dark>"},
}


@pytest.fixture(scope="module", params=[*KINDS, "little"])
def page(request):
    if request.param == "little":  # of a checkpoint that can't be looked into, without more images
        return make_page(replace(make_trace(), stages={}, guidance={}, boxes=[]))
    return make_page(make_trace(**KINDS[request.param]))


def test_the_page_is_whole_and_loads_nothing(page):
    reader = Reader(page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for image in reader.find("img"):
        assert image["alt"].strip() and min(open_uri(image["src"]).size) > 0
    for name, attributes in reader.tags:
        assert name not in ("link", "iframe", "object", "embed", "base", "form")
        assert not (LOADING & {*attributes}) or name == "img"
        assert not [key for key in attributes if key.startswith("on")]
        href = attributes.get("href", "#")
        assert href[1:] in {*ids, ""} if href.startswith("#") else "://arxiv.org/" in href
        for uri in re.findall(r"url\(([^)]*)\)", attributes.get("style", "")):
            open_uri(uri)
    assert "url(" not in re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "@import" not in page
    assert {*CONTENTS} <= {*ids}


def test_what_the_page_tells():
    trace = make_trace(words=("red", "apple"), num_steps=3)
    reader = Reader(make_page(trace))
    assert "red 300" in " ".join(reader.text) and "73 × padding" in reader.words
    assert [a["id"] for a in reader.find("article")] == ["step-1", "step-2", "step-3"]
    for step in trace.steps:
        assert f"timestep {step.timestep}" in reader.words
        assert f"latent = {step.alpha**0.5:.3f} · image" in reader.words
    assert "a/c.py:3" in reader.words and "(8, 8, 16) → (4, 4, 32)" in reader.words
    assert "In the source: encode in a/b.py:12." in reader.words
    assert "mid_res_1 (8, 8, 6)" in reader.words, "a stage that the trace has in full size"
    assert "up_0_res_1 (512, 512, 5), shown as (64, 64, 5)" in reader.words
    assert "x_t = √ᾱ · x0 + √(1−ᾱ) · noise" in reader.words
    assert "The given image" not in reader.words and "shown, evenly" not in reader.words
    given = Reader(make_page(make_trace(from_image=True)))
    assert "The given image" in given.words and "2 of 3" in given.words


def test_pieces_of_a_word_stand_together():
    """Punctuation is no piece of a word, and a word that is repeated is no longer one."""
    words = "storybooks", "storybooks", ",", "a", "a"
    texts = [("story", 0), ("books", 0), ("story", 1), ("books", 1), (",", 2), ("a", 3), ("a", 4)]
    tokens = [Token(9, "", "start")]
    for (text, place), following in zip(texts, [*texts[1:], ("", 5)], strict=True):
        word = None if text == "," else words[place]
        last = word is not None and following[1] != place
        tokens.append(Token(len(text), text, "text", last, word))
    trace = replace(make_trace(context=(len(tokens), 16)), tokens=tokens)
    page = make_page(trace)
    reader = Reader(page)
    (listed,) = re.findall(r'<ol class="tokens">(.*?)</ol>', page)
    pieces = [found.count("<code>") for found in listed.split("</li>")[:-1]]
    assert pieces == [1, 2, 2, 1, 1, 1]
    assert "storybooks is cut into 2 pieces" in reader.words


def test_bytes_of_a_character():
    tokens = [Token(1, "", "start"), Token(172, "\ufffd", "text"), Token(2, "", "end")]
    reader = Reader(make_page(replace(make_trace(context=(3, 16)), tokens=tokens)))
    assert "byte 172" in " ".join(reader.text) and "cut into its bytes" in reader.words


def test_steps_with_and_without_guidance():
    trace = make_trace()
    first = replace(trace.steps[0], without_prompt=None)
    reader = Reader(make_page(replace(trace, steps=[first, *trace.steps[1:]])))
    assert "In some steps of this run it does so once" in reader.words
    assert reader.words.count("Their difference") == 2


def test_texts_of_the_user_stay_texts():
    trace = make_trace(
        words=(EVIL, '"><img src=x onerror=alert(1)>', "&amp;", "\ud800", "'"),
        checkpoint=f"/tmp/{EVIL}",
        negative_prompt=EVIL,
    )
    page = make_page(trace)
    reader = Reader(page)
    plain = Reader(make_page(make_trace(words="abcde", negative_prompt="f")))
    assert len(reader.scripts) == 1 and EVIL not in page
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in plain.tags]
    assert EVIL in reader.words and f"/tmp/{EVIL}" in reader.words and "&amp;" in reader.words
    assert [a["alt"] for a in reader.find("img") if EVIL in a["alt"]]


def test_no_page_is_too_large():
    """Latents of 64x64 cells are noise, which no format makes smaller: not all steps fit."""
    words = [f"word{n}" for n in range(75)]
    trace = make_trace(words, 50, 128, (64, 64, 4), (77, 768))
    page = make_page(trace)
    assert 0.8 * MOST_BYTES < len(page.encode()) <= MOST_BYTES < 5_000_000
    shown = [a["id"] for a in Reader(page).find("article")]
    assert shown[0] == "step-1" and shown[-1] == "step-50" and 5 < len(shown) < 50
    assert f"{len(shown)} of them are shown" in Reader(page).words
    gaps = np.diff([int(name.split("-")[1]) for name in shown])
    assert gaps.max() - gaps.min() <= 1


def test_write_page(tmp_path):
    path = tmp_path / "index.html"
    trace = make_trace(num_steps=1)
    write_page(trace, path)
    assert path.read_text("utf-8") == make_page(trace)
    assert [each.name for each in tmp_path.iterdir()] == ["index.html"]
    with pytest.raises(ValueError):
        write_page(trace, tmp_path)


def test_tiles_and_their_colours():
    values = np.zeros((2, 3, 3), "float32")
    values[..., 1], values[..., 2] = 9, -9
    sheet = pictures.arrange_tiles(values)
    assert sheet.shape == (5, 7) and np.isnan(sheet[2]).all() and np.isnan(sheet[:, 3]).all()
    image = np.array(open_uri(pictures.encode_channels(values, 2.0)).convert("RGBA"))
    ends = [tuple(colour) for colour in pictures.DIVERGING]
    assert tuple(image[0, 0]) == (*ends[2], 255), "0 is the middle"
    assert tuple(image[0, 4]) == (*ends[-1], 255), "more than the limit is the last colour"
    assert tuple(image[3, 0]) == (*ends[0], 255)
    assert image[2, :, 3].max() == 0 and image[3, 4:, 3].max() == 0, "gaps and a missing tile"
    assert [pictures.count_columns(count) for count in (1, 4, 8, 16)] == [1, 2, 4, 4]


def test_components_are_the_directions_in_which_channels_vary_most():
    random = np.random.default_rng(0)
    wide, narrow = random.uniform(-9, 9, (8, 8)), random.uniform(-1, 1, (8, 8))
    features = np.stack([narrow, wide, 0 * wide, 0 * wide], axis=-1)
    found = pictures.find_components(features).astype("float64")
    assert np.corrcoef(found[..., 0].ravel(), wide.ravel())[0, 1] > 0.99
    assert abs(np.corrcoef(found[..., 1].ravel(), narrow.ravel())[0, 1]) > 0.99
    assert pictures.find_components(features[..., :2]).shape == (8, 8, 3)


def test_photos_are_scaled_down_but_never_up():
    image = np.full((40, 80, 3), 200, "uint8")
    assert open_uri(pictures.encode_photo(image, 20)).size == (20, 10)
    assert open_uri(pictures.encode_photo(image, 100)).size == (80, 40)


def test_the_schedule_marks_the_step():
    alphas = np.linspace(1, 0, 101)
    svg = charts.mark_schedule(alphas, 50, alphas[50])
    height = re.findall(r'cy="([\d.]+)"', svg)
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert [float(y) for y in height] == [
        pytest.approx(bottom - 0.5**0.5 * (bottom - top), abs=0.1)
    ] * 2
    assert charts.draw_boxes([]) == ""


def test_the_examples_work(tmp_path, monkeypatch):
    command, *arguments = shlex.split(sections.COMMAND)
    assert (
        command == explain.NAME and explain.get_parser().parse_args(arguments).out == "green_apple"
    )
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "stable_diffusion.explain.trace",
        lambda model, *given, **options: asked.append((given, options)) or make_trace(),
    )
    exec(sections.EXAMPLE, {})
    assert asked == [(("a green apple on a yellow background",), {"seed": 1})]
    assert (tmp_path / "index.html").is_file()


def test_choose_evenly():
    assert sections.choose_evenly([1, 2, 3], 9) == [1, 2, 3]
    assert sections.choose_evenly(list(range(11)), 3) == [0, 5, 10]
