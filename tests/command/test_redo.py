"""Generating an image again from its PNG, and the web interface's text in it."""

import shlex
from argparse import Namespace
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from stable_diffusion.command import generate, parameters, png, redo
from stable_diffusion.command.parameters import find_nearest, make_parameters, read_parameters
from stable_diffusion.config import TINY
from stable_diffusion.stable_diffusion import StableDiffusion

STEPS = ["--steps", "2"]
TEXT = {
    "prompt": "a cat",
    "negative": "",
    "seed": "3",
    "steps": "20",
    "guidance": "7.5",
    "sampler": "dpmpp-2m",
    "dtype": "float32",
    "size": "512x768",
    "weights": "models/real.safetensors",
    "version": "0.1.0",
}
THEIRS = """\
a (cat:1.2), 16:9 <lora:blip:0.7>
second line
Negative prompt: blurry, (bad)
ugly
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, \
Model hash: 45dee52b, Model: real, Clip skip: 2, Lora hashes: "blip: 0123, x: \\"y\\"", RNG: CPU"""


@pytest.fixture
def run(command, tmp_path, monkeypatch, reused):
    """Returns a function that runs the command in an empty folder: status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    return command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Path of a checkpoint of tiny models."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("saved") / "tiny"
    StableDiffusion(weights=None, jit_compile=False, config=TINY).save(path, dtype="float32")
    return str(path)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def check_redone(run, path, *argv):
    """Generates an image again: it has the same pixels and text."""
    status, [again], err = run("--redo", str(path), *argv)
    assert (status, again, err) == (0, f"{Path(path).stem}-redo.png", [])
    np.testing.assert_array_equal(pixels(again), pixels(path))
    assert png.read_text(again) == png.read_text(path)


# Again


@pytest.mark.parametrize(
    "argv",
    [
        ["-a (cat:1.3) BREAK a dog", "--syntax", "webui", "--negative", "-blué, (x)"],
        ["a", "--noise-source", "torch", "--sampler", "dpmpp-2m", "--spacing", "karras"],
        ["a", "--guidance", "1.5", "--guidance-rescale", "0.5", "--eta", "0.7", "--clip-skip", "1"],
        ["a", "--image", "in.png", "--mask", "mask.png", "--crop", "8", "--strength", "0.6"],
    ],
)
def test_an_image_is_generated_again_bit_for_bit(run, weights, argv):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), "uint8")).save("in.png")
    mask = np.zeros((64, 64), "uint8")
    mask[30:50, 30:50] = 255
    Image.fromarray(mask).save("mask.png")
    prompt, *options = argv
    status, [path], _ = run("--weights", weights, *STEPS, *options, "--", prompt)
    assert status == 0
    check_redone(run, path)


def test_images_of_batches_too(run, weights):
    """Each with as many images as it was generated with, at its place."""
    options = ["--weights", weights, *STEPS, "--seed", "5"]
    _, paths, _ = run("a", "b", "--batch", "3", *options)
    Path("p.txt").write_text("a cat\na dog\na bird\n")
    _, others, _ = run("--prompts", "p.txt", "--batch", "2", "--out", "x", *options)
    texts = [png.read_text(path).get("batch") for path in [*paths, *others]]
    places = ["1 of 3", "2 of 3", "3 of 3"]
    assert texts == [*places, *places, "1 of 2", "2 of 2", None]
    for path in (paths[1], paths[5], others[1]):
        check_redone(run, path)
    assert run("--prompts", "p.txt", "--batch", "3", "--out", "x", *options)[1] == [], (
        "in any batch"
    )


def test_options_replace_those_of_the_png(run, weights):
    run("a cat", "--weights", weights, *STEPS, "--seed", "5", "--out", "a.png", "--guidance", "4")
    status, [path], _ = run("--redo", "a.png", "--seed", "6", "--out", "b.png")
    assert (status, path) == (0, "b.png")
    expected = {**png.read_text("a.png"), "seed": "6"}
    expected["parameters"] = expected["parameters"].replace("Seed: 5", "Seed: 6")
    assert png.read_text("b.png") == expected
    run("a cat", "--weights", weights, *STEPS, "--seed", "6", "--guidance", "4", "--out", "c.png")
    np.testing.assert_array_equal(pixels("b.png"), pixels("c.png"))
    assert run("--redo", "a.png", "--batch", "2")[1] == ["a-redo-1.png", "a-redo-2.png"]


def test_every_option_that_changes_an_image_is_recorded_and_read():
    """The text of an image with all of them has a key for each, and each key is known."""
    parser = generate.get_parser()
    args = {action.dest: "1" for action in parser._actions} | {"seed": 3, "place": None}
    Path_ = Path(__file__)
    job = generate.Job("a", "b", 3, Path("x"), str(Path_), 0.5, str(Path_), loras=(("x", 1.0),))
    model = Namespace(config=TINY, img_width=64, img_height=64)
    text = generate.describe_job(Namespace(**args), job, model)
    known = {*redo.OPTIONS, *redo.OTHERS}
    assert {*text} | {"backend", "batch", "parameters"} == known
    recorded = {word.split("=")[0] for word in redo.list_options(text)}
    no_part_of_it = {"--help", "--version", "--prompts", "--out", "--batch", "--redo", "--info"}
    no_part_of_it |= {"--walk", "--frames", "--animate", "--preview-vae"}
    options = {option for action in parser._actions for option in action.option_strings}
    assert recorded == options - no_part_of_it - {"-h"}
    assert {*text} - {"jit"} <= {*make_keys(parser)} | {*redo.OTHERS}


def make_keys(parser):
    """Yields the keys that texts have for options: their names with spaces."""
    for action in parser._actions:
        yield action.dest.replace("_", " ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--redo", "a.png"], "argument --redo: the PNG has the prompt, and no other"),
        (["--prompts", "p", "--redo", "a.png"], "the PNG has the prompt, and no other"),
        (["--redo", "none.png"], "none.png is not an intact PNG"),
        (["--redo", "plain.png"], "plain.png: it has no text of stable-diffusion"),
        (["--redo", "theirs.png"], "theirs.png: it has no text of stable-diffusion"),
        (["--redo", "newer.png"], "newer.png: version 0.1.0 does not know its text 'mood'"),
        (["--redo", "wrong.png"], "argument --steps: 'many' is not an integer"),
        (["--redo", "from.png"], "in.png has changed since the image was generated"),
        (["--redo", "lost.png"], "argument --image: lost-in.png: No such file or directory"),
        (["--info", "plain.png"], "plain.png: it has no text of stable-diffusion"),
        (["--info", "none.png"], "none.png is not an intact PNG"),
        (["--info", "a.png", "--seed", "1"], "argument --info: no other arguments are allowed"),
    ],
)
def test_what_cannot_be_generated_again(run, monkeypatch, argv, message):
    monkeypatch.setattr("stable_diffusion.command.redo.__version__", "0.1.0")
    image = np.zeros((8, 8, 3), "uint8")
    for name, text in {
        "a": TEXT,
        "plain": {},
        "theirs": {"parameters": THEIRS},
        "newer": TEXT | {"mood": "good"},
        "wrong": TEXT | {"steps": "many"},
        "from": TEXT | {"image": "in.png", "image sha256": "0", "strength": "0.5"},
        "lost": TEXT | {"image": "lost-in.png", "image sha256": "0", "strength": "0.5"},
        "in": {},
    }.items():
        png.write_png(f"{name}.png", image, text)
    status, out, err = run(*argv)
    assert (status, out, len(err)) == (2, [], 1) and message in err[0]


def test_what_may_differ_is_told(run, weights):
    run("a", "--weights", weights, *STEPS, "--seed", "1", "--out", "a.png")
    text = png.read_text("a.png") | {"version": "0.0.1", "backend": "jax"}
    png.write_png("old.png", pixels("a.png"), text)
    _, _, err = run("--redo", "old.png")
    told = [line.removeprefix("stable-diffusion: ") for line in err]
    assert told[0].startswith("version 0.0.1 generated the image, and this is ")
    assert len(told) == (1 if keras.backend.backend() == "jax" else 2)
    assert all("may come out differently" in line for line in told)


# The web interface's text


def test_parameters_of_an_image():
    assert make_parameters(TEXT) == (
        "a cat\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 3, Size: 512x768, Model: real, "
        "RNG: Keras"
    )
    text = TEXT | {
        "prompt": "a (cat) [x]",
        "negative": "b\nc",
        "spacing": "karras",
        "clip skip": "1",
        "noise source": "philox",
        "strength": "0.6",
        "eta": "0.5",
        "weights": "a, b.safetensors",
    }
    assert make_parameters(text) == (
        "a \\(cat\\) \\[x\\]\nNegative prompt: b\nc\nSteps: 20, Sampler: DPM++ 2M, "
        'Schedule type: Karras, CFG scale: 7.5, Seed: 3, Size: 512x768, Model: "a, b", '
        "Denoising strength: 0.6, Clip skip: 2, RNG: NV, Eta DDIM: 0.5"
    )
    assert make_parameters(text | {"syntax": "webui"}).startswith("a (cat) [x]\n")
    assert "RNG: CPU" in make_parameters(TEXT | {"noise source": "torch"})


def test_parameters_are_read():
    prompt, negative, values = read_parameters(THEIRS)
    assert prompt == "a (cat:1.2), 16:9 <lora:blip:0.7>\nsecond line"
    assert negative == "blurry, (bad)\nugly"
    assert values["Sampler"] == "DPM++ 2M" and values["Seed"] == "965400086"
    assert values["Lora hashes"] == 'blip: 0123, x: "y"' and values["RNG"] == "CPU"
    assert read_parameters("a cat, b: 3") == ("a cat, b: 3", "", {})
    assert read_parameters("") == ("", "", {})
    back = read_parameters(make_parameters(TEXT | {"negative": "dull", "weights": 'x", y: z'}))
    assert back[:2] == ("a cat", "dull") and back[2]["Model"] == 'x", y: z'


def test_the_nearest_options():
    options, notes = find_nearest(THEIRS)
    assert options == {
        "": "a (cat:1.2), 16:9 <lora:blip:0.7>\nsecond line",
        "--syntax": "webui",
        "--negative": "blurry, (bad)\nugly",
        "--weights": "real.safetensors",
        "--seed": "965400086",
        "--noise-source": "torch",
        "--steps": "20",
        "--guidance": "7",
        "--sampler": "dpmpp-2m",
        "--spacing": "karras",
        "--width": "512",
        "--height": "768",
        "--clip-skip": "1",
        "--lora-folder": "FOLDER",
    }
    assert notes == ["Model hash: 45dee52b", 'Lora hashes: blip: 0123, x: "y"']


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours"),
    [
        ("Euler a", None, ("euler-a", "linspace")),
        ("Euler", "Automatic", ("euler", "linspace")),
        ("Euler", "SGM Uniform", ("euler", "trailing")),
        ("DPM++ 2M Karras", None, ("dpmpp-2m", "karras")),
        ("DPM++ 2M", "Automatic", ("dpmpp-2m", "karras")),
        ("DPM++ 2M", "Uniform", ("dpmpp-2m", "linspace")),
        ("DDIM", "Automatic", ("ddim", "leading")),
        ("PLMS", None, ("pndm", "leading")),
        ("DPM fast", "Karras", (None, None)),
    ],
)
def test_the_nearest_sampler(sampler, schedule, ours):
    kind = f"Schedule type: {schedule}, " if schedule else ""
    text = f"a\nSteps: 20, Sampler: {sampler}, {kind}CFG scale: 7, Seed: 1, Size: 512x512"
    options, notes = find_nearest(text)
    assert (options.get("--sampler"), options.get("--spacing")) == ours
    assert ("Sampler: DPM fast" in notes) == (ours[0] is None)
    assert options["--noise-source"] == "philox", "the web interface's default is a GPU"


def test_samplers_and_noise_have_their_names():
    from stable_diffusion.command import arguments

    assert {*parameters.SAMPLERS} == {*arguments.SAMPLERS}
    assert {*parameters.NOISE} == {*arguments.NOISE_SOURCES}
    assert {*parameters.SCHEDULES} <= {*arguments.SPACINGS}


def test_info_of_our_own_image(run, weights):
    """Its command writes the same image."""
    _, [path], _ = run("a (cat)", "--weights", weights, *STEPS, "--seed", "4", "--negative", "x y")
    status, out, err = run("--info", path)
    assert (status, err) == (0, [])
    text = png.read_text(path)
    assert [f"{key}: {value}" for key, value in text.items() if key != "parameters"] == out[:10]
    assert out[10:-2] == ["", "parameters:", *text["parameters"].splitlines(), ""]
    assert out[-2] == "command:"
    first, *words = shlex.split(out[-1])
    assert first == "stable-diffusion"
    assert run(*words, "--out", "b.png") == (0, ["b.png"], [])
    np.testing.assert_array_equal(pixels("b.png"), pixels(path))


def test_info_of_the_web_interfaces_image(run):
    png.write_png("x.png", np.zeros((8, 8, 3), "uint8"), {"parameters": THEIRS})
    status, out, err = run("--info", "x.png")
    assert (status, err) == (0, [])
    said = "\n".join(out)
    assert THEIRS in said and "nearest command:\nstable-diffusion --syntax=webui" in said
    assert said.endswith('not taken over:\nModel hash: 45dee52b\nLora hashes: blip: 0123, x: "y"')
    start = said.index("stable-diffusion --syntax")
    words = shlex.split(said[start : said.index("\n\nnot taken over")])
    args = generate.get_parser().parse_intermixed_args(words[1:])
    assert args.seed == 965400086 and args.sampler == "dpmpp-2m" and args.spacing == "karras"
