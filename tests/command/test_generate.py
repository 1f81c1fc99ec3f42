"""The command `stable-diffusion`: what it writes, and how it fails."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import FEW
from PIL import Image

from stable_diffusion import __version__
from stable_diffusion.adapters import lora
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.checkpoints.formats import EMBEDDED
from stable_diffusion.command import arguments, generate, png
from stable_diffusion.config import COMPONENTS, TINY, SamplerConfig
from stable_diffusion.stable_diffusion import StableDiffusion

ROOT = Path(__file__).parents[2]
PIPELINE = "stable_diffusion.stable_diffusion.StableDiffusion"
BACKEND = keras.backend.backend()
FAST = ["--steps", "2", "--seed", "7"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def parts(tiny_pipeline):
    return {name: getattr(tiny_pipeline, name) for name in COMPONENTS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Paths of a checkpoint of tiny models, and of an image that was generated in float32."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    model = StableDiffusion(weights=None, jit_compile=False, config=TINY)
    model.save(folder / "tiny", dtype="float32")
    image = folder / "a.png"
    for part in COMPONENTS:
        getattr(model, part).run_eagerly = True
    pixels = model.text_to_image("a", num_steps=2, seed=[7], verbose=0)[0]
    Image.fromarray(pixels).save(image)
    return str(folder / "tiny"), image


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory):
    """Folders of checkpoints for few steps: one whose scheduler says so, one whose UNet does."""
    folder = tmp_path_factory.mktemp("few_steps")
    configs = {
        "scheduler": replace(FEW, sampler=SamplerConfig("LCMScheduler")),
        "UNet": replace(FEW, unet=replace(FEW.unet, guidance_width=8)),
    }
    for sign, config in configs.items():
        keras.utils.set_random_seed(0)
        StableDiffusion(weights=None, jit_compile=False, config=config).save(folder / sign)
    return {sign: folder / sign for sign in configs}


@pytest.fixture
def tiny(monkeypatch, parts, tmp_path, reused):
    """Makes the command use tiny models of random parameters, in an empty folder."""
    asked = []

    def make_pipeline(height, width, jit, weights, **options):
        embedded = getattr(weights, "folder", None) == EMBEDDED["emoji"]
        asked.append((height, width, jit, "emoji" if embedded else weights))
        if not embedded:
            return StableDiffusion(height, width, jit, weights=weights, **options)
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
def run(command, reused):
    """The fixture `command`, with models that were built before."""
    return command


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
            "parameters": (
                "A red apple, on blue!\nSteps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 7, "
                "Size: 64x64, Model: emoji, RNG: Keras"
            ),
            **({} if BACKEND == "tensorflow" else {"backend": BACKEND}),
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


def test_size(tiny, run, eagerly):
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


@pytest.mark.parametrize(
    ("changes", "options", "sampler", "spacing"),
    [
        ({"_class_name": "HeunDiscreteScheduler"}, [], "heun", "linspace"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            [],
            "dpmpp-2m",
            "karras",
        ),
        ({"_class_name": "HeunDiscreteScheduler"}, ["--sampler", "ddim"], "ddim", None),
        ({"_class_name": "LMSDiscreteScheduler"}, [], "ddim", None),
    ],
)
@pytest.mark.filterwarnings("always:The checkpoint names a sampler")
def test_the_sampler_is_what_the_weights_name(
    saved, tmp_path, monkeypatch, run, changes, options, sampler, spacing
):
    """The image says which one it was."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[0], "w")
    path = Path("w/scheduler/scheduler_config.json")
    data = json.loads(path.read_text())
    del data["timestep_spacing"]
    path.write_text(json.dumps(data | changes))
    status, [file], err = run("a", "--weights", "w", *FAST, *options)
    assert status == 0
    with Image.open(file) as image:
        assert image.text["sampler"] == sampler and image.text.get("spacing") == spacing
    if "LMS" in changes["_class_name"]:
        [message] = err
        assert message.startswith("stable-diffusion: The checkpoint names a sampler that is not")
    else:
        assert err == []


@pytest.mark.parametrize(
    ("sign", "options", "steps", "sampler"),
    [
        ("scheduler", [], "4", "lcm"),
        ("scheduler", ["--sampler", "heun"], "4", "heun"),
        ("UNet", [], "4", "lcm"),
        ("UNet", ["--sampler", "ddim", "--steps", "3"], "3", "ddim"),
    ],
)
def test_weights_for_few_steps_change_the_defaults(
    tmp_path, monkeypatch, run, few_steps, eagerly, sign, options, steps, sampler
):
    """One step is taken in place of them."""
    asked, generate_all = [], StableDiffusion.text_to_image

    def generate_one_step(self, prompt, num_steps, **given):
        asked.append((str(num_steps), given["sampler"]))
        return generate_all(self, prompt, num_steps=1, **given)

    monkeypatch.setattr(StableDiffusion, "text_to_image", generate_one_step)
    monkeypatch.chdir(tmp_path)
    status, [file], err = run("a", "--weights", str(few_steps[sign]), "--seed", "7", *options)
    assert (status, err) == (0, [])
    with Image.open(file) as image:
        assert (image.text["steps"], image.text["sampler"]) == (steps, sampler)
    assert asked == [(steps, sampler)]


def test_eta(tiny, run):
    run("a", *FAST)
    assert run("a", "--eta", "1", "--out", "b.png", *FAST) == (0, ["b.png"], [])
    with Image.open("a-7.png") as one, Image.open("b.png") as other:
        assert "eta" not in one.text and other.text["eta"] == "1.0"
        assert (np.array(one) != np.array(other)).any()


def test_guidance_rescale(tiny, run):
    run("a", *FAST)
    assert run("a", "--guidance-rescale", "1", "--out", "b.png", *FAST) == (0, ["b.png"], [])
    with Image.open("a-7.png") as one, Image.open("b.png") as other:
        assert "guidance rescale" not in one.text and other.text["guidance rescale"] == "1.0"
        assert (np.array(one) != np.array(other)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eta", "1", "--sampler", "heun"], "sampler heun has no option 'eta': it accepts none"),
        (["--steps", "51", "--sampler", "lcm"], "num_steps must be an int from 1 to 50, not 51"),
        (["--spacing", "karras", "--sampler", "lcm"], "with this sampler, not 'karras'"),
    ],
)
def test_options_that_a_sampler_does_not_have(tiny, run, options, message):
    status, out, [err] = run("a", *options)
    assert (status, out) == (2, []) and message in err
    assert os.listdir() == []


@pytest.mark.parametrize("spacing", arguments.SPACINGS)
def test_spacings(tiny, run, spacing):
    steps = [*FAST, "--steps", "4"]  # with 2 some are equal
    run("a", *steps)
    assert run("a", "--spacing", spacing, "--out", "b.png", *steps) == (0, ["b.png"], [])
    with Image.open("a-7.png") as one, Image.open("b.png") as other:
        assert "spacing" not in one.text and other.text["spacing"] == spacing
        assert (np.array(one) == np.array(other)).all() == (spacing == TINY.schedule.spacing)


@pytest.mark.parametrize("source", arguments.NOISE_SOURCES)
def test_noise_sources(tiny, run, source):
    """Each image of a batch is that of its seed, and the PNG tells which noise it was made of."""
    names = ["b-1.png", "b-2.png"]
    given = ["a", "--noise-source", source, "--steps", "2", "--out", "b.png"]
    assert run(*given, "--batch", "2", "--seed", "6") == (0, names, [])
    alone = run("a", *FAST, *["--noise-source", source] * (source != "keras"))[1][0]
    assert np.abs(pixels(alone) - pixels(names[1])).max() <= 1
    said = None if source == "keras" else source
    assert png.read_text(alone).get("noise source") == said
    assert png.read_text(names[1]) == png.read_text(alone) | {"batch": "2 of 2"}
    others = [kind for kind in arguments.NOISE_SOURCES if kind != source]
    for other in others:
        run("a", *FAST, "--noise-source", other, "--out", "other.png")
        assert np.abs(pixels(alone) - pixels("other.png")).max() > 1


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
    ("dtype", "low", "high"),
    [
        ("float32", 0, 0),
        pytest.param("float16", 0.001, 1, marks=pytest.mark.large),
        ("bfloat16", 0.001, 8),
    ],
)
def test_dtypes(tiny, saved, run, dtype, low, high, eagerly, monkeypatch):
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


def test_the_text_encoder_is_released(run, eagerly, monkeypatch, tmp_path):
    """Once all prompts are encoded; the embedded checkpoint, of which it can be loaded again."""
    seen = []

    def spy(self, *args, **options):
        seen.append((self._text_encoder, self))
        return np.zeros((1, 128, 128, 3), "uint8")

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


# Images to start from


PHOTO = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")


@pytest.fixture
def photo(tiny):
    """Writes an image and a mask whose middle is white to the empty folder."""
    Image.fromarray(PHOTO).save("photo.png")
    mask = np.zeros((64, 64), "uint8")
    mask[16:40, 16:40] = 255
    Image.fromarray(mask).save("mask.png")
    return mask > 0


def read_image(path):
    with Image.open(path) as image:
        return np.array(image), image.text


def test_image_to_image(photo, run, monkeypatch):
    shown = []
    monkeypatch.setattr(generate, "show_progress", shown.append)
    given = ["a cat", *FAST, "--steps", "10", "--image", "photo.png", "--out", "a.png"]
    assert run(*given, "--strength", "0.3") == (0, ["a.png"], [])
    assert "0 of 1 images generated, step 3 of 3 (3 of 10 steps) " in shown
    pixels, text = read_image("a.png")
    assert pixels.shape == (64, 64, 3)
    assert text["image"] == "photo.png" and text["strength"] == "0.3" and "mask" not in text
    assert text["image sha256"] == hashlib.sha256(Path("photo.png").read_bytes()).hexdigest()
    assert run(*given)[0] == 0 and read_image("a.png")[1]["strength"] == "0.8"


def test_what_is_white_in_the_mask_is_painted(photo, run):
    given = ["a cat", *FAST, "--image", "photo.png", "--mask", "mask.png", "--out", "a.png"]
    assert run(*given) == (0, ["a.png"], [])
    pixels, text = read_image("a.png")
    np.testing.assert_array_equal(pixels[~photo], PHOTO[~photo])
    assert (pixels[photo] != PHOTO[photo]).any(-1).mean() > 0.9
    assert (
        text["mask"] == "mask.png" and text["strength"] == "1.0" and len(text["mask sha256"]) == 64
    )


@pytest.mark.filterwarnings("error")
def test_crop_keeps_the_size_of_a_photo(photo, run):
    large = np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype="uint8")
    mask = np.zeros((300, 400), "uint8")
    mask[200:230, 100:140] = 255
    Image.fromarray(large).save("photo.png")
    Image.fromarray(mask).save("mask.png")
    given = ["--image", "photo.png", "--mask", "mask.png", "--crop", "8", "--out", "a.png"]
    assert run("a cat", *FAST, *given) == (0, ["a.png"], [])
    pixels, text = read_image("a.png")
    assert pixels.shape == large.shape and text["crop"] == "8"
    np.testing.assert_array_equal(pixels[mask == 0], large[mask == 0])


def test_lines_with_images_of_their_own(photo, run, monkeypatch):
    """Those that are alike are generated together; the others keep their order."""
    Image.fromarray(PHOTO[::-1]).save("other.png")
    write_jsonl(
        "p.jsonl",
        {"prompt": "a", "image": "photo.png"},
        {"prompt": "b", "image": "other.png"},
        {"prompt": "c", "image": "other.png", "strength": 1},
        {"prompt": "d"},
        {"prompt": "e", "image": "photo.png", "mask": "mask.png"},
    )
    sizes, original = [], StableDiffusion.generate_image

    def spy(self, context, negative, batch_size, *args, **options):
        sizes.append(batch_size)
        return original(self, context, negative, batch_size, *args, **options)

    monkeypatch.setattr(StableDiffusion, "generate_image", spy)
    given = ["--prompts", "p.jsonl", *FAST, "--batch", "4", "--out", "x"]
    status, paths, _ = run(*given)
    assert status == 0 and [Path(path).name[6] for path in paths] == list("abcde")
    assert sizes == [2, 1, 1, 1]
    texts = [read_image(path)[1] for path in paths]
    assert [text.get("strength") for text in texts] == ["0.8", "0.8", "1.0", None, "1.0"]
    status, paths, _ = run(*given)  # an image that has changed is generated again
    assert paths == []
    Image.fromarray(PHOTO[:, ::-1]).save("other.png")
    assert len(run(*given)[1]) == 2


@pytest.mark.filterwarnings("default:An image of")
def test_one_image_for_a_batch_is_encoded_once(photo, run, monkeypatch):
    """And its other size is said once."""
    encoded, encode = [], StableDiffusion.encode_images

    def spy(self, images):
        encoded.append(images.shape)
        return encode(self, images)

    monkeypatch.setattr(StableDiffusion, "encode_images", spy)
    Image.fromarray(PHOTO[:48]).save("photo.png")
    status, paths, errors = run("a cat", *FAST, "--image", "photo.png", "--batch", "2")
    assert status == 0 and len(paths) == 2 and encoded == [(1, 64, 64, 3)]
    assert errors == [
        "stable-diffusion: An image of 64 x 48 pixels is scaled and cropped to 64 x 64."
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--strength", "0.5"], "argument --strength: it needs --image"),
        (["--mask", "mask.png"], "argument --mask: it needs --image"),
        (["--image", "photo.png", "--crop", "8"], "argument --crop: it needs --mask"),
        (["--image", "photo.png", "--strength", "0"], "strength must be at least 0.5 with 2 steps"),
        (["--image", "no.png"], "argument --image: no.png can't be opened: there is no such file"),
        (["--image", "text.png"], "argument --image: text.png can't be opened"),
        (["--image", "point.png"], "argument --image: point.png has 1 x 1 pixels"),
        (["--image", "photo.png", "--mask", "wide.png"], "The mask has 64 x 16 pixels"),
        (["--image", "photo.png", "--mask", "black.png"], "The mask keeps everything"),
        (["--image", "photo.png", "--strength", "nan"], "'nan' is not a number from 0 to 1"),
    ],
)
def test_images_that_cannot_be_used(photo, run, given, message):
    Path("text.png").write_text("text")
    Image.new("RGB", (1, 1)).save("point.png")
    Image.new("L", (64, 16), 255).save("wide.png")
    Image.new("L", (64, 64)).save("black.png")
    before = sorted(os.listdir())
    status, out, errors = run("a cat", *FAST, *given)
    assert (status, out, len(errors)) == (2, [], 1) and message in errors[0]
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", "line 2: Expecting value"),
        ('{"prompt": "a", "image": "no.png"}', "line 2: argument --image: no.png can't be opened"),
        ('{"prompt": "a", "strength": 0.5}', "line 2: argument --strength: it needs --image"),
        ('{"prompt": "a", "strength": "1"}', "line 2: it can't have 'strength': '1'"),
        ('["a cat"]', 'line 2: it must be an object with a "prompt"'),
        ('{"negative": "a"}', 'line 2: it must be an object with a "prompt"'),
        ('{"prompt": 3}', "line 2: it can't have 'prompt': 3"),
        ('{"prompt": "a", "seed": "1"}', "line 2: it can't have 'seed': '1'"),
        ('{"prompt": "a", "seed": true}', "line 2: it can't have 'seed': True"),
        ('{"prompt": "a", "seed": -1}', "line 2: the seed must be from 0 to 4294967295, not -1"),
        ('{"prompt": "a", "steps": 3}', "line 2: it can't have 'steps': 3"),
        ('{"prompt": "\\udcff"}', "line 2: '\\udcff' is not in UTF-8"),
        (json.dumps({"prompt": "\udcff" + "x" * 999}), "line 2: '\\udcffxxx"),
        (json.dumps({"prompt": "a", "x" * 999: "y" * 999}), "line 2: it can't have 'xxx"),
        (json.dumps({"prompt": "a", "seed": 10**999}), "not 10000"),
        ('{"prompt": ' + "[" * 100_000, "line 2: "),
        (json.dumps({"prompt": "cat " * 99}), "at most 77 tokens, not 101"),
    ],
)
def test_wrong_lines_generate_nothing(tiny, run, line, message):
    Path("p.jsonl").write_text(f'{{"prompt": "a cat"}}\n{line}\n')
    status, out, err = run("--prompts", "p.jsonl", *FAST)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0] and len(err[0]) < 600
    assert os.listdir() == ["p.jsonl"]


def test_a_picture_bomb_is_no_image_of_an_earlier_run(tmp_path):
    for side in (11_000, 20_000):  # Pillow only warns of the first
        Image.new("1", (side, side)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="a.png is not an intact PNG: .* pixels"):
            png.read_text(tmp_path / "a.png")
        assert not png.is_generated(tmp_path / "a.png", {})


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


# Prompts of web interfaces

WEBUI = [*FAST, "--syntax", "webui"]
HINT = (
    "stable-diffusion: a prompt has (word:1.3), BREAK or <lora:name>, which are text unless "
    "--syntax webui is given"
)


def write_lora(path, model):
    """Writes a LoRA for tiny models that changes images a lot."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = {variable.path: variable for variable in model.weights}
    halves = {}
    for place, name in lora.name_kernels(model).items():
        *window, inputs, outputs = names[place].shape
        if not window and "to_k" in name:
            halves[name] = rng.normal(size=(inputs, 2)), rng.normal(size=(2, outputs))
    lora.save_lora(path, halves, 2)


def test_weights_of_a_prompt(tiny, run):
    assert run("a (cat:1.8), [red]", *WEBUI, "--out", "a.png") == (0, ["a.png"], [])
    assert png.read_text("a.png")["syntax"] == "webui"
    assert png.read_text("a.png")["prompt"] == "a (cat:1.8), [red]"
    run("a cat, red", *WEBUI, "--out", "b.png")
    run("a cat, red", *FAST, "--out", "c.png")
    assert (pixels("a.png") != pixels("b.png")).any() and "syntax" not in png.read_text("c.png")
    np.testing.assert_array_equal(pixels("b.png"), pixels("c.png"))


def test_long_prompts_are_the_same_in_any_batch(tiny, run):
    """Images with contexts of different lengths are generated in batches of their own."""
    long = "cat, " * 60
    prompts = ["a cat", long, f"a dog BREAK {long}", "a bird"]
    write_jsonl("p.jsonl", *({"prompt": text, "negative": "dull"} for text in prompts))
    given = ["--prompts", "p.jsonl", "--steps", "2", "--syntax", "webui"]
    status, paths, err = run(*given, "--batch", "4")
    assert (status, len(paths), err) == (0, 4, []) and paths == sorted(paths)
    for seed, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        alone = [prompt, "--seed", str(seed), "--negative", "dull", "--steps", "2"]
        run(*alone, "--syntax", "webui", "--out", "alone.png")
        assert np.abs(pixels(path) - pixels("alone.png")).max() <= 1


@pytest.mark.parametrize("prompt", ["a (cat:1.3)", "a cat BREAK a dog", "a <lora:x:1> cat"])
def test_a_plain_prompt_that_looks_like_a_web_interfaces(tiny, run, prompt):
    argv = [prompt, prompt, "--out", "x/", "--negative", prompt, *FAST]
    assert run(*argv)[2] == [HINT], "once"
    assert run("a (cat), BREAKFAST at 3:30", "--out", "x.png", *FAST)[2] == []


def test_unseen_words_are_those_of_the_text(taught, run):
    given = ["a (cat:1.3) BREAK (on [blue])", "--negative", "(a dog:0.5)", "--out", "x.png"]
    unseen = "stable-diffusion: the weights never saw these words: blue, dog"
    assert run(*given, *WEBUI)[2] == [unseen]


def test_loras_of_prompts(tiny, run, parts):
    """Each changes the images of its prompt, and no other."""
    before = parts["diffusion_model"].get_weights()
    write_lora(Path("loras/blip.safetensors"), parts["diffusion_model"])
    prompts = ["a cat", "a cat<lora:blip:0.8>", "a cat <lora:blip:-0.5>", "a cat"]
    write_jsonl("p.jsonl", *({"prompt": text, "seed": 7} for text in prompts))
    given = ["--syntax", "webui", "--lora-folder", "loras", "--steps", "2"]
    status, paths, err = run("--prompts", "p.jsonl", "--out", "x", "--batch", "4", *given)
    assert (status, len(paths), err) == (0, 4, [])
    images = [pixels(path) for path in paths]
    np.testing.assert_array_equal(images[0], images[3])
    assert all((a != b).any() for a, b in zip(images, images[1:], strict=False))
    assert all(map(np.array_equal, before, parts["diffusion_model"].get_weights()))
    texts = [png.read_text(path) for path in paths]
    assert [text["prompt"] for text in texts] == prompts
    assert [text.get("lora folder") for text in texts] == [None, "loras", "loras", None]
    run(prompts[1], *FAST, *given, "--out", "alone.png")
    assert np.abs(images[1] - pixels("alone.png")).max() <= 1
    run("a cat", *FAST, "--out", "plain.png")
    np.testing.assert_array_equal(images[0], pixels("plain.png"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a cat AND a dog"], "AND between prompts is not supported"),
        (["a", "a [cat:dog:0.5] x"], "[cat:dog:0.5] changes the prompt during sampling"),
        (["a", "--negative", "[a|b]"], "[a|b] changes the prompt during sampling"),
        (["<lora:blip:1>"], "<lora:blip> needs --lora-folder FOLDER"),
        (["<lora:blip:x>"], "<lora:blip:x> has a scale that is not a number"),
        (["a", "--negative", "<lora:blip>"], "<lora:blip> is not part of a text"),
        (["<hypernet:a:1>"], "<hypernet:a:1> is not supported"),
        (["<lora:no>", "--lora-folder", "loras"], "loras: no such .safetensors, .pt or .bin"),
        (
            ["<lora:two>", "--lora-folder", "loras"],
            "<lora:two> in --lora-folder loras: loras/a/two.pt and loras/two.safetensors",
        ),
        (["a", "--lora-folder", "none"], "--lora-folder: no folder none"),
        (["<lora:two>", "--lora-folder", "loras/a"], "two.pt"),
    ],
)
def test_wrong_prompts_of_web_interfaces(tiny, run, argv, message):
    Path("loras/a").mkdir(parents=True)
    Path("loras/two.safetensors").touch()
    Path("loras/a/two.pt").touch()
    status, out, err = run(*argv, *WEBUI)
    assert (status, out, len(err)) == (2, [], 1) and message in err[0]
    assert os.listdir() == ["loras"]


def test_loras_need_the_syntax(tiny, run):
    Path("loras").mkdir()
    _, _, err = run("<lora:x>", "--lora-folder", "loras", *FAST)
    assert err[-1] == "stable-diffusion: argument --lora-folder: it needs --syntax webui"


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
    assert (status, out) == (2, [])
    assert err == ["stable-diffusion: OSError: [Errno 28] No space left on device: 'x.png'"]
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
        (["a", "--sampler", "best"], "--sampler: invalid choice: 'best' (choose from"),
        (["a", "--sampler", "eular"], "no sampler 'eular'; did you mean 'euler'?"),
        (["a", "--guidance-rescale", "2"], "--guidance-rescale: '2' is not a number from 0 to 1"),
        (["a", "--eta", "1.5"], "--eta: '1.5' is not a number from 0 to 1"),
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


def test_outputs_are_checked_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PIPELINE, None)
    Path("a-1.png").mkdir()
    Path("p.txt").write_text("a")
    long = "x" * 252
    for argv, message in [
        (["a", "--seed", "1"], "a-1.png is a folder, not a file"),
        (["a", "a", "--seed", "0"], "a-1.png is a folder, not a file"),
        (["a", "--out", f"{long}.png"], "File name too long"),
    ]:
        status, out, [error] = run(*argv)
        assert (status, out) == (2, []) and message in error
        assert sorted(os.listdir()) == ["a-1.png", "p.txt"]


def test_a_folder_that_gets_no_image_is_not_left_behind(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("p.txt").write_text("a")
    for argv in (
        ["a", "--out", "new/deep/", "--weights", "absent"],
        ["a", "--out", "there/new/a.png", "--weights", "absent"],
        ["a", "--out", f"new/{'x' * 252}.png"],
        ["--prompts", "p.txt", "--out", "new", "--weights", "absent"],
        ["a", "--out", "there/", "--weights", "absent"],
        ["a", "--out", "p.txt/new/"],
    ):
        status, out, [_] = run(*argv)
        assert (status, out) == (2, [])
        assert sorted(os.listdir()) == ["p.txt", "there"] and not os.listdir("there")


def test_names_of_files_have_at_most_255_bytes():
    for prompt in ("\uff21" * 300, "猫" * 300, "a猫" * 300, "𝒳猫" * 300, "🐈𠀀" * 300):
        slug = generate.make_slug(prompt)
        assert 40 <= len(slug.encode()) <= generate.SLUG_BYTES
    assert generate.make_slug("猫" * 300) == "猫" * 66


def test_a_folder_of_images_may_have_a_dot_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a")
    Path("v1.png").mkdir()
    for folder in ("images-v1.5", "v1.png"):
        args = generate.get_parser().parse_args(["--prompts", "p.txt", "--out", folder])
        assert [job.path.parent.name for job in generate.read_jobs(args)] == [folder]


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
