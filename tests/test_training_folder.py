"""Folders of pictures with captions, and what becomes of a picture before it is encoded."""

import json

import pytest
from PIL import Image

from stable_diffusion.training.folder import Example, View, list_views, read_folder

pytestmark = pytest.mark.quick

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
    fails("has no images")
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a cat")
    fails(r"1 of 2 images have no caption in a .txt file beside them: b.png\.")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "text": "a cat"}')
    fails(r"no caption in metadata.jsonl: b.png\.")
    metadata.write_text('{"file_name": "c.png", "text": "a cat"}')
    fails("entry 1 names 'c.png', which doesn't exist")
    metadata.write_text('{"file_name": "../c.png", "text": "a cat"}')
    fails("leads out of it")
    metadata.write_text('{"file_name": "a.png"}')
    fails("entry 1 needs file_name and text")
    metadata.write_text("{")
    fails("metadata.jsonl can't be read")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    fails("has both metadata.jsonl and metadata.csv")


def test_views_are_the_same_for_the_same_picture(tmp_path):
    one = Example(save(tmp_path / "a.png"), ("a",)).with_digest()
    same = Example(save(tmp_path / "b.png"), ("b",)).with_digest()
    other = Example(save(tmp_path / "c.png", colour="blue"), ("c",)).with_digest()
    assert list_views(one) == [CENTRE]
    assert list_views(one, flip=True) == [CENTRE, View(0.5, 0.5, True)]
    views = list_views(one, crops=3, flip=True)
    assert len(set(views)) == 6 and views == list_views(same, crops=3, flip=True)
    assert views != list_views(other, crops=3, flip=True)
