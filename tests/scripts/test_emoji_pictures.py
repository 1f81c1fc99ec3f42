"""Tests of scripts/emoji/pictures.py; nothing is downloaded."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "emoji"))

import pictures

CHECKPOINT = Path(__file__).parents[2] / "weights" / "emoji"


def test_the_subjects_are_those_of_the_checkpoint():
    subjects = (CHECKPOINT / "subjects.txt").read_text("utf-8").splitlines()
    assert list(pictures.read_subjects()) == subjects
    assert len(set(pictures.read_subjects().values())) == len(subjects) == 520


def test_center():
    image = Image.new("RGBA", (20, 10))
    image.paste((255, 0, 0, 255), (1, 2, 5, 4))  # 4 by 2
    centred = pictures.center(image, 8)
    assert centred.shape == (8, 8, 4)
    opaque = np.argwhere(centred[..., 3])
    assert opaque.min(0).tolist() == [3, 2] and opaque.max(0).tolist() == [4, 5]


def webp(colour):
    file = io.BytesIO()
    Image.new("RGBA", (256, 256), colour).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_read_fluent(tmp_path, monkeypatch):
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as package:
        for name, colour in (("1f34e", "red"), ("2600-fe0f", "yellow")):
            data = webp(colour)
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(data)
            package.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match="sha256"):
        pictures.read_fluent(path, ["1f34e"])
    monkeypatch.setattr(pictures, "check_hash", lambda *_: None)
    sun, apple = pictures.read_fluent(path, ["2600", "1f34e"])
    assert sun.shape == (256, 256, 4)
    assert sun[128, 128].tolist() == [255, 255, 0, 255]
    assert apple[128, 128].tolist() == [255, 0, 0, 255]


def test_save_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "read_subjects", lambda: {"cat": "1f408", "dog": "1f415"})
    rng = np.random.default_rng(0)
    sets = {
        style: rng.integers(0, 256, (2, side, side, 4)).astype("uint8")
        for style, side in pictures.SIDES.items()
    }
    path = tmp_path / "pictures.npz"
    pictures.save_pictures(path, sets)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = pictures.load_pictures(path)
    for style in sets:
        np.testing.assert_array_equal(loaded[style], sets[style])
    pictures.save_pictures(path, {**sets, "flat": sets["flat"][:1]})
    with pytest.raises(ValueError, match="shape"):
        pictures.load_pictures(path)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_load_says_what_is_no_data_set(tmp_path, content):
    path = tmp_path / "pictures.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pictures\.npz"):
        pictures.load_pictures(path)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(OSError, match=r"no-such-program isn't installed; some@1 comes from it"):
        pictures.run_command(["no-such-program", "some@1"], tmp_path)


def test_bad_input_is_one_line(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out.npz"), "--fluent", str(tmp_path / "missing.tgz")]
    arguments += ["--noto", str(tmp_path / "missing.ttf")]
    assert pictures.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "missing.tgz" in error
    assert not list(tmp_path.iterdir())
