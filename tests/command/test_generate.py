"""The command `stable-diffusion`: what it writes, and how it fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from stable_diffusion import __version__
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.command import arguments, generate, png
from stable_diffusion.config import TINY
from stable_diffusion.stable_diffusion import StableDiffusion

ROOT = Path(__file__).parents[2]
PIPELINE = "stable_diffusion.stable_diffusion.StableDiffusion"
FAST = ["--steps", "2", "--seed", "7"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def parts():
    keras.utils.set_random_seed(0)
    jit = keras.backend.backend() == "jax"  # which is slow without
    model = StableDiffusion(weights=None, jit_compile=jit, config=TINY)
    return {name: getattr(model, name) for name in ("text_encoder", "diffusion_model", "decoder")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Paths of a checkpoint of tiny models, and of an image that was generated in float32."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    model = StableDiffusion(weights=None, jit_compile=False, config=TINY)
    model.save(folder / "tiny", dtype="float32")
    image = folder / "a.png"
    assert generate.main(["a", *FAST, "--weights", f"{folder}/tiny", "--out", str(image)]) == 0
    return str(folder / "tiny"), image


@pytest.fixture
def tiny(monkeypatch, parts, tmp_path):
    """Makes the command use tiny models of random parameters, in an empty folder."""
    asked = []

    def make_pipeline(height, width, jit, weights):
        asked.append((height, width, jit, weights))
        if weights != "emoji":
            return StableDiffusion(height, width, jit, weights=weights)
        model = StableDiffusion(height, width, jit, weights=None, config=TINY)
        if (model.img_height, model.img_width) == (64, 64):
            for name, part in parts.items():
                setattr(model, f"_{name}", part)
        return model

    monkeypatch.setattr(PIPELINE, make_pipeline)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.fixture
def run(capfd):
    """Returns a function that runs the command: its status, lines of output and errors."""

    def run(*argv):
        capfd.readouterr()
        try:
            status = generate.main(list(argv))
        except SystemExit as error:
            status = error.code
        out, err = capfd.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


# Images


def test_one_image(tiny, run):
    assert run("A red apple, on blue!", *FAST) == (0, ["a-red-apple-on-blue-7.png"], [])
    path = Path("a-red-apple-on-blue-7.png")
    assert path.read_bytes().startswith(PNG)
    with Image.open(path) as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        assert image.text == {
            "prompt": "A red apple, on blue!",
            "negative": "",
            "seed": "7",
            "steps": "2",
            "guidance": "7.5",
            "sampler": "ddim",
            "dtype": "float32",
            "size": "64x64",
            "weights": "emoji",
            "version": __version__,
        }
    assert os.listdir() == [path.name]
    assert tiny == [(None, None, False, "emoji")]


def test_generated_again_from_its_text_it_is_the_same(tiny, run):
    status, [path], _ = run("a cat", "--negative", "blué", "--guidance", "3", "--steps", "2")
    assert status == 0
    with Image.open(path) as image:
        text, pixels = image.text, np.array(image)
    width, height = text["size"].split("x")
    options = ("negative", "seed", "steps", "guidance", "sampler", "weights")
    given = [argument for name in options for argument in (f"--{name}", text[name])]
    assert text["guidance"] == "3.0"
    again = run(text["prompt"], *given, "--height", height, "--width", width, "--out", "b.png")
    assert again == (0, ["b.png"], [])
    with Image.open("b.png") as image:
        np.testing.assert_array_equal(np.array(image), pixels)
        assert image.text == text


def test_several_prompts_each_with_a_batch(tiny, run):
    status, paths, err = run("a cat", "a dog", "--batch", "2", *FAST)
    assert (status, err) == (0, [])
    assert paths == ["a-cat-7.png", "a-cat-8.png", "a-dog-9.png", "a-dog-10.png"]
    images = {path: np.array(Image.open(path)) for path in paths}
    assert Image.open("a-dog-10.png").text["seed"] == "10"
    run("a dog", "--steps", "2", "--seed", "10", "--out", "alone.png")
    difference = images["a-dog-10.png"].astype(int) - np.array(Image.open("alone.png"))
    assert np.abs(difference).max() <= 1


def test_options_between_prompts(tiny, run):
    assert run("a cat", *FAST, "a dog")[1] == ["a-cat-7.png", "a-dog-8.png"]


def test_out_of_several_is_numbered(tiny, run):
    assert run("a", "b", "--out", "x/y.png", *FAST) == (0, ["x/y-1.png", "x/y-2.png"], [])
    assert sorted(os.listdir("x")) == ["y-1.png", "y-2.png"]


def test_out_can_be_a_folder(tiny, run):
    Path("here").mkdir()
    assert run("a", "--out", "here", *FAST)[1] == ["here/a-7.png"]
    assert run("a", "--out", "new/er/", *FAST)[1] == ["new/er/a-7.png"]
    assert Path("here/a-7.png").is_file() and Path("new/er/a-7.png").is_file()


def test_a_file_of_the_same_name_is_overwritten(tiny, run):
    Path("x.PNG").write_text("old")
    assert run("a", "--out", "x.PNG", *FAST)[0] == 0
    assert Path("x.PNG").read_bytes().startswith(PNG)


def test_without_a_seed_one_is_chosen_and_stored(tiny, run):
    seeds = [re.fullmatch(r"a-(\d+).png", run("a", "--steps", "1")[1][0])[1] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert Image.open(f"a-{seeds[0]}.png").text["seed"] == seeds[0]


def test_the_greatest_seed(tiny, run):
    status, paths, _ = run("a", "--batch", "2", "--steps", "1", "--seed", str(2**32 - 1))
    assert (status, paths) == (0, ["a-4294967295.png", "a-0.png"])


def test_size(tiny, run):
    _, [path], _ = run("a", "--height", "32", "--width", "48", *FAST)
    with Image.open(path) as image:
        assert image.size == (48, 32) and image.text["size"] == "48x32"


def test_jit_is_passed_on(tiny, run):
    run("a", "--jit", *FAST)
    assert tiny == [(None, None, True, "emoji")]


@pytest.mark.parametrize("sampler", arguments.SAMPLERS[1:])
def test_samplers(tiny, run, sampler):
    steps = [*FAST, "--steps", "4"]  # with 2 some are equal
    run("a", *steps)
    assert run("a", "--sampler", sampler, "--out", "b.png", *steps) == (0, ["b.png"], [])
    with Image.open("a-7.png") as one, Image.open("b.png") as other:
        assert other.text["sampler"] == sampler
        assert (np.array(one) != np.array(other)).any()


@pytest.mark.parametrize("spacing", arguments.SPACINGS)
def test_spacings(tiny, run, spacing):
    steps = [*FAST, "--steps", "4"]  # with 2 some are equal
    run("a", *steps)
    assert run("a", "--spacing", spacing, "--out", "b.png", *steps) == (0, ["b.png"], [])
    with Image.open("a-7.png") as one, Image.open("b.png") as other:
        assert "spacing" not in one.text and other.text["spacing"] == spacing
        assert (np.array(one) == np.array(other)).all() == (spacing == TINY.schedule.spacing)


@pytest.mark.parametrize("own", [3, 1.5])
def test_the_guidance_scale_is_the_checkpoints_own(tiny, run, monkeypatch, own):
    """Unless another is given; the PNG has the number that was used."""
    monkeypatch.setitem(globals(), "TINY", replace(TINY, guidance_scale=own))
    run("a", "--out", "own.png", *FAST)
    run("a", "--out", "given.png", "--guidance", str(own), *FAST)
    run("a", "--out", "other.png", "--guidance", "8", *FAST)
    text = png.read_text("own.png")
    assert text == png.read_text("given.png") and text["guidance"] == str(float(own))
    assert png.read_text("other.png")["guidance"] == "8.0"
    assert (pixels("own.png") == pixels("given.png")).all()
    assert (pixels("own.png") != pixels("other.png")).any()


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("float32", 0, 0), ("float16", 0.001, 1), ("bfloat16", 0.001, 8)]
)
def test_dtypes(tiny, saved, run, dtype, low, high, monkeypatch):
    """The PNG states each, and each is used: the images differ from float32's, but not much."""
    models, original, before = [], StableDiffusion.generate_image, keras.config.dtype_policy()

    def spy(self, *args, **options):
        models.append(self.diffusion_model)
        return original(self, *args, **options)

    monkeypatch.setattr(StableDiffusion, "generate_image", spy)
    given = ["a", *FAST, "--weights", saved[0], "--dtype", dtype]
    try:
        assert run(*given, "--out", "b.png")[:2] == (0, ["b.png"])
    finally:
        keras.config.set_dtype_policy(before)
    assert png.read_text("b.png")["dtype"] == dtype
    assert low <= np.abs(pixels(saved[1]) - pixels("b.png")).mean() <= high
    assert {weight.dtype for weight in models[0].weights} == {dtype}


def test_the_text_encoder_is_released(run, monkeypatch, tmp_path):
    """Once all prompts are encoded; the embedded checkpoint, of which it can be loaded again."""
    seen, original = [], StableDiffusion.generate_image

    def spy(self, *args, **options):
        seen.append((self._text_encoder, self))
        return original(self, *args, **options)

    monkeypatch.setattr(StableDiffusion, "generate_image", spy)
    monkeypatch.chdir(tmp_path)
    assert run("a cat", "--steps", "1", "--seed", "0")[0] == 0
    assert seen[0][0] is None
    assert seen[0][1].text_encoder is not None


# Files of prompts


def write_jsonl(path, *lines):
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def pixels(path):
    with Image.open(path) as image:
        return np.array(image).astype(int)


def test_a_file_of_prompts(tiny, run):
    Path("prompts.txt").write_text("a cat\n\n  a dög \r\n# a cat\n", "utf-8")
    status, paths, err = run(
        "--prompts", "prompts.txt", "--out", "x", "--steps", "2", "--batch", "2"
    )
    names = ["x/00001-a-cat-0.png", "x/00003-a-dög-1.png", "x/00004-a-cat-2.png"]
    assert (status, paths, err) == (0, names, [])
    with Image.open(names[1]) as image:
        assert image.text["prompt"] == "a dög" and image.text["seed"] == "1"
    run("a dög", "--steps", "2", "--seed", "1", "--out", "alone.png")
    assert np.abs(pixels(names[1]) - pixels("alone.png")).max() <= 1


def test_a_file_of_json(tiny, run):
    write_jsonl(
        "prompts.jsonl",
        {"prompt": "a cat"},
        {"prompt": "a cat", "seed": 5, "negative": "a dog"},
        {"negative": "", "prompt": "a\ncat"},
    )
    given = ["--prompts", "prompts.jsonl", "--negative", "blurry", *FAST, "--batch", "3"]
    status, paths, err = run(*given)
    assert (status, err) == (0, [])
    assert paths == ["00001-a-cat-7.png", "00002-a-cat-5.png", "00003-a-cat-9.png"]
    texts = [Image.open(path).text for path in paths]
    assert [text["negative"] for text in texts] == ["blurry", "a dog", ""]
    assert [text["seed"] for text in texts] == ["7", "5", "9"]
    run("a cat", "--negative", "a dog", "--steps", "2", "--seed", "5", "--out", "alone.png")
    assert np.abs(pixels(paths[1]) - pixels("alone.png")).max() <= 1


def test_what_is_there_is_not_generated_again(tiny, run, monkeypatch):
    write_jsonl("p.jsonl", *({"prompt": f"cat {n}"} for n in range(5)))
    given = ["--prompts", "p.jsonl", "--out", "x/", "--steps", "1", "--batch", "2"]
    write_png, written = generate.write_png, []

    def stop(path, *args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(str(path))
        write_png(path, *args)

    monkeypatch.setattr(generate, "write_png", stop)
    assert run(*given) == (130, written, ["stable-diffusion: interrupted"])
    assert len(os.listdir("x")) == 3
    monkeypatch.setattr(generate, "write_png", write_png)
    before = {path: (path.stat().st_mtime_ns, pixels(path)) for path in Path("x").iterdir()}
    status, paths, err = run(*given)
    assert status == 0 and err == [
        "stable-diffusion: 3 of 5 images are there already, generated with these options"
    ]
    assert paths == ["x/00004-cat-3-3.png", "x/00005-cat-4-4.png"]
    assert all(path.stat().st_mtime_ns == time for path, (time, _) in before.items())
    assert run(*given)[:2] == (0, [])

    for path in sorted(before)[:1]:  # a damaged file is generated again
        path.write_bytes(path.read_bytes()[:-100])
    assert run(*given)[1] == ["x/00001-cat-0-0.png"]
    assert len(run(*given, "--guidance", "3")[1]) == 5, "other options, other images"
    assert len(run(*given, "--spacing", "trailing")[1]) == 5


def test_prompts_of_a_file_are_generated_in_batches(tiny, run, monkeypatch):
    Path("p.txt").write_text("".join(f"cat {n}\n" for n in range(5)))
    original, sizes = StableDiffusion.generate_image, []

    def spy(self, context, negative, batch_size, *args, **options):
        sizes.append((batch_size, len(context), len(negative)))
        return original(self, context, negative, batch_size, *args, **options)

    monkeypatch.setattr(StableDiffusion, "generate_image", spy)
    assert len(run("--prompts", "p.txt", "--batch", "2", "--steps", "1")[1]) == 5
    assert sizes == [(2, 2, 2), (2, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", "line 2: Expecting value"),
        ('["a cat"]', 'line 2: it must be an object with a "prompt"'),
        ('{"negative": "a"}', 'line 2: it must be an object with a "prompt"'),
        ('{"prompt": 3}', "line 2: it can't have 'prompt': 3"),
        ('{"prompt": "a", "seed": "1"}', "line 2: it can't have 'seed': '1'"),
        ('{"prompt": "a", "seed": true}', "line 2: it can't have 'seed': True"),
        ('{"prompt": "a", "seed": -1}', "line 2: the seed must be from 0 to 4294967295, not -1"),
        ('{"prompt": "a", "steps": 3}', "line 2: it can't have 'steps': 3"),
        ('{"prompt": "\\udcff"}', "line 2: '\\udcff' is not in UTF-8"),
        ('{"prompt": ' + "[" * 100_000, "line 2: "),
        (json.dumps({"prompt": "cat " * 99}), "at most 77 tokens, not 101"),
    ],
)
def test_wrong_lines_generate_nothing(tiny, run, line, message):
    Path("p.jsonl").write_text(f'{{"prompt": "a cat"}}\n{line}\n')
    status, out, err = run("--prompts", "p.jsonl", *FAST)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert os.listdir() == ["p.jsonl"]


def test_a_file_in_another_encoding(tiny, run):
    Path("p.txt").write_bytes(b"\xff\xfea")
    assert run("--prompts", "p.txt")[2] == [
        "stable-diffusion: argument --prompts: p.txt: it is not in UTF-8"
    ]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a cat", "a-cat"),
        ("  A  Cat!? ", "a-cat"),
        ("../../etc/passwd", "etc-passwd"),
        ("猫 and é", "猫-and-é"),
        ("", "image"),
        ("...", "image"),
        ("🐱", "image"),
        ("snake_case", "snake-case"),
        ("word " * 60, "-".join(["word"] * 16)),
    ],
)
def test_make_slug(prompt, name):
    assert generate.make_slug(prompt) == name


# Words never seen


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red apple, on blue!", "a red apple on blue"),
        ("T-Rex (the woman’s hat)", "t rex the woman's hat"),
        ("x2 snake_case 'quoted' don't", "x2 snake case quoted don't"),
        ("un cafe\u0301 猫 🐱\ufe0f…", "un café 猫 🐱"),
        ("", ""),
        (" \n-- ", ""),
    ],
)
def test_split_words(text, words):
    assert generate.split_words(text) == words.split()


@pytest.fixture
def taught(tiny, monkeypatch, tmp_path):
    """The tiny models, from a folder that lists the words they were trained on."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "words.txt").write_text("a\ncat\non\nred\n", "utf-8")
    monkeypatch.setattr("stable_diffusion.checkpoints.reader.Reader.folder", folder, raising=False)
    return folder


def test_words_never_seen_are_told(taught, run):
    status, out, err = run("An astronaut, a RED horse", "a horse on a cat", "--out", "x/", *FAST)
    assert (status, len(out)) == (0, 2)
    assert err == ["stable-diffusion: the weights never saw these words: an, astronaut, horse"]


def test_words_of_negative_are_told_too(taught, run):
    _, _, err = run("a cat", "--negative", "blurry", "--out", "x/", *FAST)
    assert err == ["stable-diffusion: the weights never saw these words: blurry"]


def test_words_that_were_seen_are_not_told(taught, run):
    assert run("a cat, on red", "--out", "x.png", *FAST) == (0, ["x.png"], [])


def test_without_a_list_no_words_are_told(taught, run):
    (taught / "words.txt").unlink()
    assert run("an astronaut", "--out", "x.png", *FAST) == (0, ["x.png"], [])


def test_the_embedded_checkpoint_lists_its_words():
    checkpoint = open_checkpoint("emoji")
    assert generate.find_unseen_words(checkpoint, ["A small red apple on a blue background"]) == []
    prompt = "an astronaut riding a horse"
    assert set(generate.find_unseen_words(checkpoint, [prompt])) >= {"astronaut", "riding"}
    words = (checkpoint.folder / "words.txt").read_text("utf-8")
    assert words == "".join(f"{word}\n" for word in sorted(set(words.split())))


def test_nothing_half_written(tiny, run, monkeypatch):
    Path("x.png").write_text("old")

    def broken(self, path, *args, **kwargs):
        Path(path).write_bytes(PNG)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    status, out, err = run("a", "--out", "x.png", *FAST)
    assert (status, out) == (1, [])
    assert err == ["stable-diffusion: OSError: [Errno 28] No space left on device"]
    assert os.listdir() == ["x.png"] and Path("x.png").read_text() == "old"


def test_progress_is_shown_on_a_terminal_only(tiny, run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, out, err = run("a", *FAST)
    assert (status, out) == (0, ["a-7.png"])
    assert "0 of 1 images generated, step 2 of 2" in "".join(err)


# Errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "it needs either a PROMPT or --prompts FILE"),
        (["a", "--prompts", "file"], "it needs either a PROMPT or --prompts FILE"),
        (["--prompts", "file"], "--prompts: file has no prompts"),
        (["--prompts", "none.txt"], "--prompts: none.txt: No such file or directory"),
        (["--prompts", "."], "--prompts: .: Is a directory"),
        (["--prompts", "file", "--out", "a.png"], "--out: with --prompts it is a folder"),
        (["a", "--steps", "0"], "--steps: '0' is not an integer from 1 to 1000"),
        (["a", "--steps", "1.5"], "--steps: '1.5' is not an integer from 1 to 1000"),
        (["a", "--guidance", "nan"], "--guidance: 'nan' is not a number from 0 to 1000"),
        (["a", "--guidance", "x"], "--guidance: 'x' is not a number from 0 to 1000"),
        (["a", "--seed", "-1"], "--seed: '-1' is not an integer from 0 to 4294967295"),
        (["a", "--seed", "4294967296"], "is not an integer from 0 to 4294967295"),
        (["a", "--batch", "0"], "--batch: '0' is not an integer from 1 to 1024"),
        (["a", "--sampler", "euler"], "--sampler: invalid choice: 'euler' (choose from"),
        (["a", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["a", "--step", "3"], "unrecognized arguments: --step"),
        (["a", "--steps"], "--steps: expected one argument"),
        (["\udcff"], "'\\udcff' is not in UTF-8"),
        (["a", "--out", "a.jpg"], "--out: 'a.jpg' is neither a .png file nor a folder"),
        (["a", "--out", "apple"], "--out: 'apple' is neither a .png file nor a folder"),
        (["a", "--out", "file/a.png"], "--out: no folder file: File exists"),
        (["a", "--height", "100"], "multiples of 16 pixels, not 100"),
        (["a", "--width", "0"], "--width: '0' is not an integer from 1 to 65536"),
        (["a", "--weights", "sd3"], "preset (emoji, sd1.4, sd2.1-base), a folder in diffusers'"),
        (["a", "cat " * 99], "a prompt has at most 77 tokens, not 101"),
        (["a", "--negative", "cat " * 99], "at most 77 tokens"),
    ],
)
def test_wrong_arguments(tiny, run, argv, message):
    Path("file").touch()
    status, out, err = run(*argv)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("stable-diffusion: ") and message.lower() in err[0].lower()
    assert os.listdir() == ["file"]


def test_ctrl_c(tiny, run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "write_png", interrupted)
    assert run("a", *FAST) == (130, [], ["stable-diffusion: interrupted"])


def test_a_missing_library(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def missing(*args, **kwargs):
        raise ImportError("Downloading takes huggingface_hub,\nwhich isn't installed")

    monkeypatch.setattr(PIPELINE, missing)
    status, _, err = run("a", *FAST)
    assert status == 1
    assert err == [
        "stable-diffusion: ImportError: Downloading takes huggingface_hub, which isn't installed"
    ]


# The process


def process(*argv, **options):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120, **options
    )


def test_help_and_version():
    result = process("-m", "stable_diffusion", "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert 'stable-diffusion "a red apple on a blue background"' in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    result = process("-m", "stable_diffusion", "--version")
    assert result.stdout == f"stable-diffusion {__version__}\n"


def test_the_process_ends_with_the_status():
    result = process("-m", "stable_diffusion", "a", "--steps", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1


def test_tensorflow_is_silent(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    arguments = ["a", "--weights", str(tmp_path), "--out", str(tmp_path / "a.png")]
    result = process("-m", "stable_diffusion", *arguments, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1, result.stderr
