"""Folders of pictures with captions, and what becomes of a picture before it is encoded."""

import json

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.training.folder import (
    Example,
    View,
    crop,
    list_views,
    open_picture,
    read_folder,
)

WHITE, GREEN = (255, 255, 255), (0, 255, 0)
CENTRE = View(0.5, 0.5, False)


def save(path, mode="RGB", size=(4, 4), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def write_captions(folder, kind):
    captions = {"a.png": "a cat, asleep", "b/c.jpg": 'a "dog"'}
    if kind == "jsonl":
        rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n\n")
    elif kind == "csv":
        lines = ["file_name,text,more", 'a.png,"a cat, asleep",1', 'b/c.jpg,"a ""dog""",2']
        (folder / "metadata.csv").write_text("\n".join(lines))
    else:
        for name, text in captions.items():
            (folder / name).with_suffix(".txt").write_text(f"\ufeff{text}\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_captions_are_found_where_other_tools_put_them(kind, tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b" / "c.jpg")
    (tmp_path / "notes.md").write_text("no picture")
    write_captions(tmp_path, kind)
    assert read_folder(tmp_path) == [
        Example(tmp_path / "a.png", ("a cat, asleep",)),
        Example(tmp_path / "b" / "c.jpg", ('a "dog"',)),
    ]
    assert {e.captions for e in read_folder(tmp_path, ["a", "b"])} == {("a", "b")}


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    def fails(match):
        with pytest.raises(ValueError, match=match):
            read_folder(tmp_path)

    with pytest.raises(ValueError, match="no folder"):
        read_folder(tmp_path / "missing")
    fails("has no pictures")
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a cat")
    fails(r"1 of 2 pictures have no caption in a .txt beside it: b.png\.")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "text": "a cat"}')
    fails(r"no caption in metadata.jsonl: b.png\.")
    metadata.write_text('{"file_name": "c.png", "text": "a cat"}')
    fails("entry 1 names 'c.png', which isn't there")
    metadata.write_text('{"file_name": "../c.png", "text": "a cat"}')
    fails("leads out of it")
    metadata.write_text('{"file_name": "a.png"}')
    fails("entry 1 needs file_name and text")
    metadata.write_text("{")
    fails("metadata.jsonl can't be read")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    fails("has both metadata.jsonl and metadata.csv")


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    path = save(tmp_path / "a.jpg", size=(30, 10), exif=exif)
    assert open_picture(path, WHITE).size == (10, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_on_the_colour(mode, tmp_path):
    options = {"transparency": 0} if mode == "P" else {}
    colour = {"RGBA": (10, 10, 10, 0), "LA": (10, 0), "P": 0}[mode]
    opened = open_picture(save(tmp_path / "a.png", mode, colour=colour, **options), GREEN)
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == GREEN


def test_grey_of_16_bits_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 32896, "uint16")).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png", WHITE).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_broken_picture_is_an_error_that_names_it(content, tmp_path):
    path = save(tmp_path / "a.png", size=(99, 99))
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(ValueError, match="a.png can't be opened"):
        open_picture(path, WHITE)


def test_crops_cover_the_size_at_their_place():
    picture = np.zeros((8, 16, 3), "uint8")
    picture[:, 8:] = 255  # black on the left, white on the right
    picture = Image.fromarray(picture)
    assert (crop(picture, View(0, 0.5, False), 8, 8) == 0).all()
    assert (crop(picture, View(1, 0.5, False), 8, 8) == 255).all()
    middle = crop(picture, CENTRE, 8, 8)
    assert (middle[:, :4] == 0).all() and (middle[:, 4:] == 255).all()
    np.testing.assert_array_equal(crop(picture, View(0.5, 0.5, True), 8, 8), middle[:, ::-1])
    for size in ((64, 64), (24, 8), (8, 24)):
        assert crop(picture, CENTRE, *size).shape == (*size, 3)


def test_views_are_the_same_for_the_same_picture(tmp_path):
    one = Example(save(tmp_path / "a.png"), ("a",)).with_digest()
    same = Example(save(tmp_path / "b.png"), ("b",)).with_digest()
    other = Example(save(tmp_path / "c.png", colour="blue"), ("c",)).with_digest()
    assert list_views(one) == [CENTRE]
    assert list_views(one, flip=True) == [CENTRE, View(0.5, 0.5, True)]
    views = list_views(one, crops=3, flip=True)
    assert len(set(views)) == 6 and views == list_views(same, crops=3, flip=True)
    assert views != list_views(other, crops=3, flip=True)
