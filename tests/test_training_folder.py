"""Folders of pictures with captions, and what becomes of a picture before it is encoded."""

import json
import os
import unicodedata

import pytest
from PIL import Image

from stable_diffusion import SimpleTokenizer
from stable_diffusion.training.captions import find_long_captions, truncate_captions
from stable_diffusion.training.folder import (
    Example,
    View,
    count_repeats,
    list_views,
    read_folder,
)

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
    fails(r"1 of 2 images have no caption in a .txt or .caption file beside them: b.png\.")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "text": "a cat"}')
    fails(r"no caption in metadata.jsonl: b.png\.")
    metadata.write_text('{"file_name": "c.png", "text": "a cat"}')
    fails("entry 1 names 'c.png', which doesn't exist")
    metadata.write_text('{"file_name": "../c.png", "text": "a cat"}')
    fails("entry 1 has a name that leads out of")
    metadata.write_text('{"file_name": "a.png"}')
    fails("entry 1 needs file_name and text")
    metadata.write_text("{")
    fails("metadata.jsonl can't be read")
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    fails("has both metadata.jsonl and metadata.csv")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_rows(folder, *rows):
    lines = [
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in rows
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


def listed(folder, *arguments, **options):
    """Returns the names of the images with their captions."""
    examples = read_folder(folder, *arguments, **options)
    return {e.path.relative_to(folder).as_posix(): e.captions for e in examples}


def test_files_that_metadata_names_are_images_whatever_their_suffix(tmp_path):
    names = ["a.png", "b.jfif", "c", "d.avif", "e.jpe", "f.heic", "g.xyz"]
    touch(tmp_path, *names, "notes")
    write_rows(tmp_path, *((name, f"picture {name}") for name in names))
    assert listed(tmp_path) == {name: (f"picture {name}",) for name in names}
    (tmp_path / "metadata.jsonl").unlink()
    assert list(listed(tmp_path, ["a"])) == ["a.png", "b.jfif", "d.avif", "e.jpe", "f.heic"]


def test_the_same_image_may_be_named_several_times(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    write_rows(tmp_path, ("a.png", "x"), ("./a.png", "y"), ("b.png", "x"), ("b.png", ""))
    assert listed(tmp_path) == {"a.png": ("x", "y"), "b.png": ("x",)}


def test_hidden_and_system_files_are_no_data(tmp_path):
    touch(tmp_path, "a.jpg", "._a.jpg", "@eaDir/a.jpg/THUMB_M.jpg", "__MACOSX/._a.jpg", "Thumbs.db")
    touch(tmp_path, "sub/.hidden/b.jpg", "sub/b.JPG", ".ipynb_checkpoints/a-checkpoint.jpg")
    assert list(listed(tmp_path, ["a"])) == ["a.jpg", "sub/b.JPG"]
    write_rows(tmp_path, ("a.jpg", "x"), ("sub/b.JPG", "x"), ("._a.jpg", "x"))
    with pytest.raises(ValueError, match=r"entry 3 names '\._a.jpg', which is no data"):
        read_folder(tmp_path)


def test_what_runs_write_is_no_data(tmp_path):
    touch(tmp_path, "a.png", "out.safetensors.work/previews/0.png", "out/sample.png", "new.png")
    touch(tmp_path, *(f"older.work/{name}" for name in ("settings.json", "loss.csv", "loss.png")))
    own = [tmp_path / name for name in ("out.safetensors.work", "out", "new.png")]
    assert list(listed(tmp_path, ["a"], exclude=own)) == ["a.png"]
    (tmp_path / "link").symlink_to("out.safetensors.work", target_is_directory=True)
    assert list(listed(tmp_path, ["a"], exclude=own)) == ["a.png"]
    # The folder itself, or one that it is in, may be the folder of the run.
    assert "a.png" in listed(tmp_path, ["a"], exclude=[tmp_path, tmp_path.parent])


def test_links_are_followed_and_each_folder_counts_once(tmp_path):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    touch(elsewhere, "blob", "more/b.png", "more/c.png")
    touch(folder, "real/d.png")
    (folder / "a.png").symlink_to(elsewhere / "blob")
    (folder / "again.png").symlink_to(elsewhere / "blob")
    (folder / "more").symlink_to(elsewhere / "more", target_is_directory=True)
    (elsewhere / "more" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "a_link").symlink_to(folder / "real", target_is_directory=True)
    (folder / "circle").symlink_to("circle")
    (folder / "lost.png").symlink_to("missing.png")  # is named as unreadable when it is opened
    found = ["a.png", "again.png", "lost.png", "more/b.png", "more/c.png", "real/d.png"]
    assert list(listed(folder, ["a"])) == found
    write_rows(folder, *((name.replace("real", "a_link"), name) for name in found))
    assert listed(folder) == {name: (name,) for name in found}
    for name in ("../elsewhere/blob", str(elsewhere / "blob"), "", "more/../../elsewhere/blob"):
        write_rows(folder, (name, "x"))
        with pytest.raises(ValueError, match="leads out of"):
            read_folder(folder)


def test_a_snapshot_of_the_hub_is_a_folder_of_images(tmp_path):
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b/snapshots/1"
    touch(blobs, "0123")
    snapshot.mkdir(parents=True)
    (snapshot / "cat.png").symlink_to("../../blobs/0123")
    write_rows(blobs, ("cat.png", "a cat"))
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/metadata.jsonl")
    assert listed(snapshot) == {"cat.png": ("a cat",)}


@pytest.mark.parametrize("stored, named", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_both_forms_of_unicode_are_the_same(stored, named, tmp_path):
    stored, named = (unicodedata.normalize(form, "caf\u00e9") for form in (stored, named))
    touch(tmp_path, f"{stored}/{stored}.png")
    write_rows(tmp_path, (f"{named}/{named}.png", "x"))
    assert list(listed(tmp_path).values()) == [("x",)]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / stored / f"{named}.txt").write_text("y")
    assert list(listed(tmp_path).values()) == [("y",)]


def test_text_files_of_all_kinds_in_their_order(tmp_path):
    touch(tmp_path, *(f"{n}.png" for n in range(5)), "3.jpg")
    for name in ("0.caption", "1.TXT", "1.caption", "2.png.txt", "2.txt", "3.jpg.caption", "3.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "4.txt").touch()
    (tmp_path / "4.CAPTION").write_text("4.CAPTION")
    assert {name: texts[0] for name, texts in listed(tmp_path).items()} == {
        "0.png": "0.caption",
        "1.png": "1.TXT",
        "2.png": "2.png.txt",
        "3.jpg": "3.jpg.caption",
        "3.png": "3.txt",
        "4.png": "4.CAPTION",
    }


def write_table(folder, content):
    (folder / "metadata.csv").write_bytes(content.encode())


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\u2028", "\x85", "\x0b"])
def test_line_breaks_in_captions_stay(end, tmp_path):
    touch(tmp_path, "a.png", "b.png")
    text = f"a cat{end}on a mat"
    last = "\r\n" if end in ("\u2028", "\x85", "\x0b") else end
    rows = ["file_name,text", f'a.png,"{text}"', 'b.png,"x"', ""]
    write_table(tmp_path, last.join(rows))
    assert listed(tmp_path) == {"a.png": (text,), "b.png": ("x",)}
    (tmp_path / "metadata.csv").unlink()
    write_rows(tmp_path, ("a.png", text), ("b.png", "x"))
    assert listed(tmp_path) == {"a.png": (text,), "b.png": ("x",)}


@pytest.mark.parametrize(
    "content, message",
    [
        ("file_name,text\nb.png,y\na.png,a cat, on a mat\n", r"entry 2 \(line 3\) has 3 fields, n"),
        ('file_name,text\na.png,"a cat\nb.png,y\n', "unexpected end of data"),
        ("file_name;text\na.png;a cat\n", "separated by commas, not 'file_name;text'"),
        ("file_name,text,text\na.png,x,y\n", "must have the columns file_name and text"),
        ("file_name,text\na.png\n", "entry 1 needs file_name and text"),
        ("", "must have the columns"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(content, message, tmp_path):
    touch(tmp_path, "a.png", "b.png")
    write_table(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_in_pipes_devices_and_folders_are_refused(name, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    for make, what in [
        (os.mkfifo, "a pipe"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
        (lambda path: os.symlink("absent", path), "a link to absent, which doesn't exist"),
        (os.mkdir, "a folder"),
    ]:
        make(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} .*{what}"):
            read_folder(tmp_path)
        (os.rmdir if what == "a folder" else os.unlink)(tmp_path / name)
    assert read_folder(tmp_path)[0].captions == ("a cat",)
    os.unlink(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="1 of 1 images have no caption"):
        read_folder(tmp_path)


def test_folders_with_kohyas_names_repeat_their_images(tmp_path):
    touch(tmp_path, "10_cat/a.png", "10_cat/sub/b.png", "2023_holiday/c.png", "d.png")
    assert {example.repeats for example in read_folder(tmp_path, ["a"])} == {1}
    repeats = [example.repeats for example in read_folder(tmp_path, ["a"], repeats=True)]
    assert repeats == [10, 10, 2023, 1]
    assert count_repeats(tmp_path, tmp_path / "10 cats" / "a.png") == 1
    touch(tmp_path, "0_x/a.png")
    with pytest.raises(ValueError, match="0_x must begin with a number from 1 to 9999"):
        read_folder(tmp_path, ["a"], repeats=True)


def test_captions_that_are_too_long_are_all_found_and_cut(tmp_path):
    tokenizer = SimpleTokenizer()
    words, letters = ("masterpiece, best quality " * 40).strip(), "\u4e00\u53ea\u732b" * 60
    texts = [words, letters, "a cat", "x" * 2000]
    examples = [Example(tmp_path / f"{n}.png", (text, "a cat")) for n, text in enumerate(texts)]
    examples.append(Example(tmp_path / "again.png", (words,)))
    long = find_long_captions(tokenizer, examples, 77)
    assert {text: [path.name for path in paths] for text, (_, paths) in long.items()} == {
        words: ["0.png", "again.png"],
        letters: ["1.png"],
        texts[3]: ["3.png"],
    }
    assert long[words][0] == len(tokenizer.encode(words)) > 77
    short = truncate_captions(tokenizer, examples, 77)
    assert not find_long_captions(tokenizer, short, 77)
    assert short[2] == examples[2]
    for before, after in zip(examples, short, strict=True):
        assert before.path == after.path
        for whole, cut in zip(before.captions, after.captions, strict=True):
            assert whole.startswith(cut) and cut
    cut = [example.captions[0] for example in short]
    assert len(tokenizer.encode(cut[0])) == 77 and len(tokenizer.encode(cut[1])) > 74
    assert cut[0].endswith(("masterpiece", ",", "best", "quality")) and cut[4] == cut[0]
    assert len(cut[3]) > 70


def test_a_digest_needs_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png can't be opened: there is no such file"):
        Example(tmp_path / "a.png", ("a",)).with_digest()


def test_views_are_the_same_for_the_same_picture(tmp_path):
    one = Example(save(tmp_path / "a.png"), ("a",)).with_digest()
    same = Example(save(tmp_path / "b.png"), ("b",)).with_digest()
    other = Example(save(tmp_path / "c.png", colour="blue"), ("c",)).with_digest()
    assert list_views(one) == [CENTRE]
    assert list_views(one, flip=True) == [CENTRE, View(0.5, 0.5, True)]
    views = list_views(one, crops=3, flip=True)
    assert len(set(views)) == 6 and views == list_views(same, crops=3, flip=True)
    assert views != list_views(other, crops=3, flip=True)
