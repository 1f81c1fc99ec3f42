"""`stable-diffusion-finetune`: runs, runs that are stopped, and what it refuses.

The model is tiny. Its graphs would take longer to build than to run, so that it runs without.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import FEW
from PIL import Image
from safetensors import safe_open

from stable_diffusion import StableDiffusion
from stable_diffusion.command import finetune as command
from stable_diffusion.training import Cache, Example, NoisyLatents, callbacks, distribution
from stable_diffusion.training.callbacks import CURVE

OPTIONS = ["--steps", "4", "--batch", "2", "--rate", "1e-2", "--dropout", "0.5"]


@pytest.fixture(scope="module")
def few():
    """The config of a UNet of one stage, for speed."""
    return replace(FEW, unet=replace(FEW.unet, widths=(16,), heads=(2,), attention=(True,)))


@pytest.fixture(scope="module")
def weights(few, tmp_path_factory):
    """A checkpoint of it, with random parameters."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "few"
    StableDiffusion(jit_compile=False, weights=None, config=few).save(folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of three images with captions, and a broken one."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as file:
        for n, colour in enumerate(["red", "green", "blue"]):
            image = Image.new("RGB", (128, 128), colour)
            image.paste("white", tuple(int(x) for x in (*rng.uniform(8, 50, 2), 70, 80)))
            image.save(folder / f"{n}.png")
            row = {"file_name": f"{n}.png", "text": f"a blip on a {colour} background"}
            file.write(json.dumps(row) + "\n")
        (folder / "bad.png").write_bytes(b"no image")
        file.write('{"file_name": "bad.png", "text": "a blip"}\n')
    return folder


@pytest.fixture
def finetune(weights, images, eagerly, monkeypatch):
    """Runs the command on the tiny model; returns its exit status."""
    monkeypatch.delenv(distribution.PROCESSES, raising=False)

    def run(*arguments, folder=images):
        given = [str(folder), "--weights", str(weights), *OPTIONS, *map(str, arguments)]
        return command.main(given)

    return run


def is_attention(path):
    """Tells whether a variable is one of the kernels that get a LoRA by default."""
    return re.search(r"/attn[12]/to_(q|k|v|out)/kernel$", path) is not None


def losses(work):
    with open(work / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def signal_at(monkeypatch, step, number):
    """Sends this process a signal in the middle of a step."""
    at_step = callbacks.Log.at_step

    def patched(self, now, logs):
        at_step(self, now, logs)
        if now == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(callbacks.Log, "at_step", patched)


def test_a_run_leaves_what_it_says(finetune, weights, tmp_path, capsys):
    out, work = tmp_path / "lora.safetensors", tmp_path / "lora.safetensors.work"
    preview = ["--preview", "a blip", "--preview", "a cat", "--preview-every", "2"]
    preview += ["--preview-steps", "1"]
    assert finetune("--method", "lora", "--out", out, "--steps", "2", *preview) == 0
    said = capsys.readouterr().out
    assert "bad.png can't be opened" in said and "3 images, 1 skipped" in said
    assert len(losses(work)) == 2
    names = sorted(path.name for path in (work / "previews").iterdir())
    assert names == ["step_000000.png", "step_000002.png"]
    for path, size in ((work / "previews" / names[0], (128, 64)), (work / "loss.png", CURVE)):
        with Image.open(path) as image:
            assert image.size == size
    if find_spec("tensorboard"):
        assert list((work / "tensorboard").iterdir())
    pipeline = StableDiffusion(jit_compile=False, weights=weights)
    names = [weight.path for weight in pipeline.diffusion_model.weights]
    start = pipeline.diffusion_model.get_weights()
    pipeline.load_lora(out)
    end = pipeline.diffusion_model.get_weights()
    changed = {n for n, a, b in zip(names, start, end, strict=True) if (a != b).any()}
    assert changed == set(filter(is_attention, names))
    # What is finished is not trained again, and more steps go on.
    assert finetune("--method", "lora", "--out", out, "--steps", "2") == 0
    before = losses(work)
    assert len(before) == 2
    assert finetune("--method", "lora", "--out", out, "--steps", "3") == 0
    assert losses(work)[:2] == before and len(losses(work)) == 3
    capsys.readouterr()
    assert finetune("--method", "lora", "--out", out, "--rank", "2") == 2
    error = capsys.readouterr().err
    assert "has a run with --rank 4, not 2; --restart begins anew" in error
    assert error.count("\n") == 1
    restart = ["--rank", "2", "--restart", "--steps", "1"]
    assert finetune("--method", "lora", "--out", out, *restart) == 0
    assert len(losses(work)) == 1


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.large)]
)
def test_a_stopped_run_goes_on_with_the_losses_it_would_have_had(
    number, finetune, monkeypatch, tmp_path, capsys
):
    method = ["--method", "lora", "--ema", "0.5", "--steps", "2"]
    if number == signal.SIGTERM:
        method = ["--method", "textual-inversion", "--token", "blip", "--initializer", "cat"]
        method += ["--dtype", "mixed_float16", "--ema", "0.5", "--steps", "2"]
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    assert finetune(*method, "--out", whole) == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 1, number)
        assert finetune(*method, "--out", stopped) == 128 + number
    said = capsys.readouterr().out
    assert "stopped after step 1 of 2: the same command goes on from there" in said
    assert not stopped.exists()
    assert finetune(*method, "--out", stopped) == 0
    assert "going on after step 1 of 2" in capsys.readouterr().out
    assert losses(Path(f"{stopped}.work")) == losses(Path(f"{whole}.work"))
    assert stopped.read_bytes() == whole.read_bytes()


@pytest.mark.large
def test_a_killed_run_forgets_what_it_did_after_its_last_state(finetune, monkeypatch, tmp_path):
    class Killed(BaseException):
        pass

    def killed(self, step, logs):
        at_step(self, step, logs)
        if step == 3:
            raise Killed

    out, at_step = tmp_path / "lora.safetensors", callbacks.Log.at_step
    given = ["--method", "lora", "--out", out, "--save-every", "2"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.Log, "at_step", killed)
        finetune(*given)
    work = Path(f"{out}.work")
    before = losses(work)
    assert len(before) == 3
    assert finetune(*given) == 0
    assert losses(work)[:3] == before and len(losses(work)) == 4


def test_dreambooth_generates_what_is_missing_of_the_class(weights, monkeypatch, tmp_path):
    generated, skipped = [], set()

    def generate(self, prompts, clip_skip, **options):
        generated.extend(prompts)
        skipped.add(clip_skip)
        return np.zeros((len(prompts), 64, 64, 3), "uint8")

    monkeypatch.setattr(StableDiffusion, "text_to_image", generate)
    known = ["--class-prompt", "a cat", "--class-prompt", "a dog", "--class-images"]
    given = ["images", "--method", "dreambooth", "--out", str(tmp_path / "out"), *known]

    def list_images(count, *more):
        arguments = [*given, str(count), "--weights", str(weights), *more]
        args = command.get_parser().parse_args(arguments)
        command.check_arguments(args)
        examples = command.generate_class_images(args)
        return {example.path.name: example.captions for example in examples}

    images = {f"0000{n}.png": (("a cat", "a dog")[n % 2],) for n in range(5)}
    assert list_images(5) == images
    assert generated == ["a cat", "a dog", "a cat", "a dog", "a cat"]
    (folder,) = (tmp_path / "out.work").glob("class-*")
    (folder / "00003.png").unlink()
    (folder / "mine.png").touch()
    assert list_images(5) == images and generated[5:] == ["a dog"]
    assert list(list_images(2)) == ["00000.png", "00001.png"] and len(generated) == 6
    assert (folder / "00004.png").exists() and (folder / "mine.png").exists()
    assert skipped == {0}
    list_images(2, "--clip-skip", "1")  # in another folder
    assert skipped == {0, 1} and len(generated) == 8
    monkeypatch.setattr(command, "open_pipeline", lambda args: StableDiffusion(weights=None))
    for option in ("--variant", "--vae"):
        list_images(1, option, "x")
    assert len(generated) == 10


def test_clip_skip(finetune, few, monkeypatch, tmp_path, capsys):
    """Of captions and previews; a run goes on with the same number only."""
    two = StableDiffusion(
        jit_compile=False, weights=None, config=replace(few, text=replace(few.text, depth=2))
    )
    two.save(tmp_path / "two", dtype="float32")
    previews, generate = [], StableDiffusion.text_to_image

    def spy(self, *given, clip_skip=0, **options):
        previews.append(clip_skip)
        return generate(self, *given, clip_skip=clip_skip, **options)

    monkeypatch.setattr(StableDiffusion, "text_to_image", spy)
    out = tmp_path / "out.safetensors"
    given = ["--method", "lora", "--out", out, "--weights", tmp_path / "two", "--steps", "1"]
    preview = ["--preview", "a blip", "--preview-steps", "1"]
    assert finetune(*given, "--clip-skip", "1", *preview) == 0
    last = f"wrote {out}; generate with --clip-skip 1, as it was trained\n"
    assert capsys.readouterr().out.endswith(last)
    assert previews == [1, 1]
    text = "a blip on a red background"
    expected = np.asarray(two.encode_text(text, 1))[0]
    with monkeypatch.context() as patch:
        patch.setattr(two, "encode_text", None)  # nothing is missing in the cache
        cache = Cache(f"{out}.work/cache", two, clip_skip=1)
        np.testing.assert_allclose(cache.read_context(text), expected, atol=1e-5)
    assert finetune(*given) == 2
    error = capsys.readouterr().err
    assert "has a run with --clip-skip 1, not 0; --restart begins anew" in error


def test_settings_of_a_version_without_an_option(tmp_path):
    """Such a run had the option's default."""
    parser = command.get_parser()
    given = ["images", "--method", "lora", "--out", str(tmp_path / "out.safetensors")]
    args = parser.parse_args(given)
    command.check_arguments(args)
    command.compare_settings(args)
    (args.work / "state.safetensors").touch()
    path = args.work / "settings.json"
    settings = json.loads(path.read_text())
    for key in ("clip_skip", "background", "vae"):
        del settings[key]
    path.write_text(json.dumps(settings))
    options = {"--clip-skip=1": "0", "--vae=x": "None", "--background=red": r"\(255, 255, 255\)"}
    for option, old in options.items():
        other = parser.parse_args([*given, option])
        command.check_arguments(other)
        with pytest.raises(ValueError, match=f"has a run with {option.split('=')[0]} {old}, not"):
            command.compare_settings(other)
    command.compare_settings(args)
    assert json.loads(path.read_text())["clip_skip"] == 0


@pytest.mark.parametrize("method", ["full", "lora", "textual-inversion"])
def test_a_dry_run_counts(method, finetune, weights, tmp_path, capsys):
    out = tmp_path / ("out" if method == "full" else "out.safetensors")
    new = ["--token", "blip", "--initializer", "cat"] if method == "textual-inversion" else []
    assert finetune("--method", method, "--out", out, "--dry-run", *new) == 0
    said = capsys.readouterr().out
    assert "bad.png can't be opened" in said and "images: 3 usable, 1 skipped" in said
    model = StableDiffusion(jit_compile=False, weights=weights).diffusion_model
    whole = model.count_params()
    halves = sum(4 * sum(w.shape) for w in model.weights if is_attention(w.path))  # rank 4
    trained = {
        "full": f"parameters: {whole:,} of {whole:,} are trained (100.00 %)",
        "lora": f"parameters: {halves:,} of {whole + halves:,} are trained",
        "textual-inversion": "parameters: 16 of",
    }
    assert trained[method] in said and "GiB optimizer" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "lora", "--out", "x"], "--out must be a .safetensors file"),
        (["--method", "full", "--out", "x.safetensors"], "--out must be a folder"),
        (["--method", "full", "--out", "x", "--parameters", "lora"], "there is --method lora"),
        (["--method", "textual-inversion", "--out", "x"], "needs --token and --initializer"),
        (["--method", "lora", "--out", "x", "--token", "x"], "are for --method textual-inversion"),
        (["--method", "dreambooth", "--out", "x"], "needs --class-prompt or --class-folder"),
        (["--method", "full", "--out", "x", "--class-prompt", "x"], "are for --method dreambooth"),
        (["--method", "full", "--out", "x", "--optimizer", "best"], "optimizer must be one of"),
        (["--method", "full", "--out", "x", "--model-devices", "2"], "is for --distribute model"),
        (["--method", "full", "--out", "x", "--weights", "missing"], "weights must be"),
        (["--method", "full", "--out", "x", "--variant", "ema"], "variant must be None or one"),
        (["--method", "full", "--out", "x", "--accumulate", "3"], "nearest are 3 and 6"),
        (["--method", "full", "--out", "x", "--accumulate", "5"], "nearest are 5 and 10"),
        (["--method", "full", "--out", "x", "--dtype", "bfloat16"], "AdamW learns nothing in bfl"),
        (["--method", "full", "--out", "x", "--clip-skip", "1"], "clip_skip must be an int from 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, message, finetune, tmp_path, capsys):
    arguments = [str(tmp_path / a) if a.startswith("x") and a[1:] in ("", ".safetensors") else a
                 for a in arguments]  # fmt: skip
    assert finetune(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full", "--out", "project"], "project is not empty, and it is no checkpoint in diff"),
        (
            ["full", "--out", "mine"],
            "mine is a file, and a checkpoint in diffusers' layout needs a",
        ),
        (["full", "--out", "absent/x"], "absent/x can't be written: there is no folder"),
        (["lora", "--out", "x.safetensors"], "x.safetensors is a folder, not a file"),
        (["lora", "--out", "y.safetensors", "--work", "mine"], "mine can't be a folder"),
        (["lora", "--out", "y.safetensors", "--cache", "mine/x"], "mine/x can't be a folder"),
        (["lora", "--out", "z.safetensors"], "state.safetensors is a folder, not a file"),
    ],
)
def test_outputs_are_checked_before_the_work(
    arguments, message, options, finetune, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "read_examples", None)
    Path("mine").write_text("mine")
    Path("z.safetensors.work/state.safetensors").mkdir(parents=True)
    Path("project/src").mkdir(parents=True)
    Path("x.safetensors").mkdir()
    assert finetune("--method", *arguments, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(os.listdir()) == ["mine", "project", "x.safetensors", "z.safetensors.work"]
    assert [*map(str, Path("z.safetensors.work").rglob("*"))] == [
        "z.safetensors.work/state.safetensors"
    ]
    assert os.listdir("project") == ["src"]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_for_inpainting_is_refused_before_the_work(
    method, options, few, finetune, monkeypatch, tmp_path, capsys
):
    config = replace(few, unet=replace(few.unet, in_channels=9))
    source = StableDiffusion(jit_compile=False, weights=None, config=config)
    monkeypatch.setattr(command, "open_pipeline", lambda args: source)
    monkeypatch.setattr(command, "find_long_texts", None)
    out = tmp_path / {"full": "x", "lora": "x.safetensors"}[method]
    assert finetune("--method", method, "--out", out, *options) == 2
    error = capsys.readouterr().err
    assert "a latent of 4 channels" in error and "has 9" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir()) and source._diffusion_model is None


def test_noise_cannot_be_predicted_without_a_signal(few, finetune, monkeypatch, tmp_path, capsys):
    config = replace(few, schedule=replace(few.schedule, zero_snr=True))
    source = StableDiffusion(jit_compile=False, weights=None, config=config)
    monkeypatch.setattr(command, "open_pipeline", lambda args: source)
    assert finetune("--method", "lora", "--out", tmp_path / "x.safetensors") == 2
    assert "epsilon can't begin where alpha is 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and source._diffusion_model is None


def test_a_dot_in_a_folders_name_is_no_suffix():
    for out, good in {"my-model-v1.5": True, "x.ckpt": False, "x.safetensors": False}.items():
        args = command.get_parser().parse_args(["images", "--method", "full", "--out", out])
        if good:
            command.check_arguments(args)
            assert args.work.name == f"{out}.work"
        else:
            with pytest.raises(ValueError, match="--out must be a folder for this method"):
                command.check_arguments(args)


def test_captions_without_the_word_are_quoted_in_short():
    args = Namespace(token="<x>")
    with pytest.raises(ValueError, match="1 of 1 captions lack <x>: 'aaaa") as error:
        command.check_captions(args, [Example(Path("a.png"), ("a" * 9999,))])
    assert len(str(error.value)) < 300


def test_a_missing_caption_is_an_error(finetune, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    given = ["--method", "lora", "--out", tmp_path / "x.safetensors"]
    assert finetune(*given, folder=tmp_path) == 2
    assert "1 of 1 images have no caption" in capsys.readouterr().err
    new = ["--method", "textual-inversion", "--token", "<x>", "--initializer", "cat"]
    given = [*new, "--out", tmp_path / "x.safetensors", "--prompt", "an image of a cat"]
    assert finetune(*given, folder=tmp_path) == 2
    assert "1 of 1 captions lack <x>: 'an image of a cat' of " in capsys.readouterr().err


def make_folder(folder, **captions):
    """Makes a folder of small images; returns it."""
    folder.mkdir(parents=True)
    for name, text in captions.items():
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    return folder


def capture_run(monkeypatch):
    """Lets the command end before it trains; returns a list that gets both lists of examples."""
    captured = []
    monkeypatch.setattr(command, "run_training", lambda *given: captured.extend(given[2:4]) or 0)
    return captured


def test_captions_that_are_too_long_are_refused_listed_or_cut(
    finetune, monkeypatch, tmp_path, capsys
):
    long = {name: f"a <b>, {name} " + "masterpiece, best quality " * 30 for name in ("one", "two")}
    folder = make_folder(tmp_path / "images", **long, short="a <b>")
    new = ["--method", "textual-inversion", "--token", "<b>", "--initializer", "cat"]
    given = [*new, "--out", tmp_path / "out.safetensors", "--vectors", "2"]
    assert finetune(*given, folder=folder) == 2
    error = capsys.readouterr().err
    assert "captions of more than 77 tokens: 2. That of" in error and error.count("\n") == 1
    assert (
        re.search("one.png has 1[0-9]{2}: 'a <b>, one", error) and "--truncate cuts them" in error
    )
    assert finetune(*given, "--dry-run", folder=folder) == 2
    said = capsys.readouterr()
    for name, text in long.items():
        line = f" tokens: {folder / name}.png: {text.strip()!r}\n"
        assert "too long: 1" in said.out and line in said.out
    assert "memory:" in said.out and "captions of more than 77 tokens: 2" in said.err
    captured = capture_run(monkeypatch)
    assert finetune(*given, "--truncate", folder=folder) == 0
    assert "captions of more than 77 tokens, which are cut: 2\n" in capsys.readouterr().out
    texts = [example.captions[0] for example in captured[0]]
    assert texts[0].startswith("a <b>, one masterpiece") and len(texts[0]) < 500
    assert texts[1] == "a <b>"
    assert finetune(*given, "--preview", "cat " * 80, folder=folder) == 2
    assert "a prompt has 82 tokens, more than 77: 'cat cat" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_new_word_is_found_in_text_without_spaces():
    given = ["images", "--method", "textual-inversion", "--token", "猫咪", "--initializer", "cat"]
    args = command.get_parser().parse_args([*given, "--out", "x.safetensors"])
    command.check_captions(args, [Example(Path("0.png"), ("一只猫咪在垫子上",))])
    with pytest.raises(ValueError, match="1 of 1 captions lack 猫咪"):
        command.check_captions(args, [Example(Path("0.png"), ("一只狗",))])


@pytest.mark.parametrize("work", ["out.safetensors.work", "."])
def test_what_the_run_writes_is_no_data(work, finetune, monkeypatch, tmp_path, capsys):
    folder = make_folder(tmp_path / "10_cat", a="a cat")
    make_folder(folder / "class", b="a cat")
    make_folder(folder / "5_more", c="a cat")
    for name in ("previews/step_000001.png", "class-0123abcd/00000.png", "loss.png"):
        (folder / work / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / work / name).touch()
    captured = capture_run(monkeypatch)
    given = ["--method", "dreambooth", "--parameters", "lora", "--class-folder", folder / "class"]
    given += ["--out", folder / "out.safetensors", "--work", folder / work]
    assert finetune(*given, folder=folder) == 0
    said = capsys.readouterr().out
    assert said == "folders such as 5_more repeat their images only with --repeats-from-folders\n"
    assert [e.path.name for e in captured[0]] == ["c.png", "a.png"]
    assert [e.path.name for e in captured[1]] == ["b.png"]
    assert finetune(*given, "--repeats-from-folders", folder=folder) == 0
    assert [e.repeats for e in captured[2]] == [5, 1] and not capsys.readouterr().out


def test_images_of_the_class_need_no_captions(finetune, monkeypatch, tmp_path, capsys):
    folder = make_folder(tmp_path / "images", a="a cat")
    known = make_folder(tmp_path / "class", b="a", bad="a")
    for path in known.glob("*.txt"):
        path.unlink()
    (known / "bad.png").write_bytes(b"no image")
    given = ["--method", "dreambooth", "--out", tmp_path / "out", "--class-folder", known]
    assert finetune(*given, folder=folder) == 2
    assert "2 of 2 images have no caption" in capsys.readouterr().err
    prompt = ["--class-prompt", "a cat", "--class-prompt", "a pet"]
    assert finetune(*given, *prompt, "--dry-run", folder=folder) == 0
    said = capsys.readouterr().out
    assert "images of the class: 1 usable, 1 skipped" in said and "bad.png can't be opened" in said
    prepared, prepare = [], command.prepare_data

    class Prepared(BaseException):
        pass

    def stop(*given):
        prepared.extend(prepare(*given)[1])
        raise Prepared

    monkeypatch.setattr(command, "prepare_data", stop)
    with pytest.raises(Prepared):
        finetune(*given, *prompt, folder=folder)
    assert "skipped, an image of the class: " in capsys.readouterr().out
    assert [example.captions for example in prepared[1].examples] == [("a cat", "a pet")]


def test_nothing_is_saved_before_the_loss_is_looked_at(tmp_path):
    given = ["images", "--method", "lora", "--out", str(tmp_path / "out.safetensors")]
    args = command.get_parser().parse_args([*given, "--preview", "a cat"])
    command.check_arguments(args)
    args.work.mkdir()
    saver, others = command.make_callbacks(args, None, 4, 0, "data", print, alone=True)
    kinds = [type(callback) for callback in [*others, saver]]
    assert kinds[:2] == [callbacks.Log, callbacks.StopAtNaN] and callbacks.Preview in kinds
    assert kinds[-1] == callbacks.SaveState and saver.data == "data"


@pytest.mark.large
def test_a_run_stops_at_the_first_loss_that_is_not_a_number(
    finetune, monkeypatch, tmp_path, capsys
):
    out, work = tmp_path / "out.safetensors", tmp_path / "out.safetensors.work"
    get = NoisyLatents.__getitem__

    def damage(self, index):
        inputs, targets, weights = get(self, index)
        return inputs, targets, weights * (np.nan if index == 1 else 1)

    monkeypatch.setattr(NoisyLatents, "__getitem__", damage)
    given = ["--method", "lora", "--out", out, "--save-every", "1", "--steps", "2"]
    assert finetune(*given) == 2
    error = capsys.readouterr().err
    assert "The loss of step 2 is nan. Try a smaller learning rate" in error
    assert error.count("\n") == 1 and not out.exists()
    with safe_open(work / "state.safetensors", "numpy") as state:
        assert state.metadata()["step"] == "1" and len(state.metadata()["data"]) == 64


def test_sigterm_in_other_phases_ends_the_command_as_ctrl_c(
    finetune, monkeypatch, tmp_path, capsys
):
    def encode(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    monkeypatch.setattr(command, "prepare_data", encode)
    assert finetune("--method", "lora", "--out", tmp_path / "out.safetensors") == 143
    assert "the same command goes on from the last saved step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_run_in_the_same_folder_is_refused(finetune, monkeypatch, tmp_path, capsys):
    out, work = tmp_path / "out.safetensors", tmp_path / "out.safetensors.work"
    statuses = []

    def run_another(*given):
        statuses.append(finetune("--method", "lora", "--out", out))
        return 0

    monkeypatch.setattr(command, "run_training", run_another)
    # The lock is one of the opened file, so a second run of the same process has none, either.
    assert finetune("--method", "lora", "--out", out) == 0
    assert statuses == [2]
    error = capsys.readouterr().err
    assert f"another run uses {work}; wait for its end" in error and error.count("\n") == 1
    capture_run(monkeypatch)
    assert finetune("--method", "lora", "--out", out) == 0 and not list(work.iterdir())


def test_folders_with_kohyas_names_are_said_once(tmp_path):
    for name in ("10_cat/sub", "2023_holiday", "10 dogs"):
        (tmp_path / "3_all" / name).mkdir(parents=True)
        (tmp_path / "3_all" / name / "a.png").touch()
    for folder, line in {"3_all/10_cat/sub": "", "3_all": "folders such as 10_cat repeat"}.items():
        given = [str(tmp_path / folder), "--prompt", "a cat", "--out", "x.safetensors"]
        args = command.get_parser().parse_args([*given, "--method", "lora"])
        command.check_arguments(args)
        said = []
        command.read_examples(args, said.append)
        assert len(said) == bool(line) and all(each.startswith(line) for each in said)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null", None])
def test_settings_that_are_lost_are_an_error(content, tmp_path):
    out = tmp_path / "out.safetensors"
    args = command.get_parser().parse_args(["images", "--method", "lora", "--out", str(out)])
    command.check_arguments(args)
    command.compare_settings(args)
    settings = args.work / "settings.json"
    whole = settings.read_bytes()
    for lost in (content, whole):  # without a state there is nothing to compare
        settings.write_bytes(lost) if lost is not None else settings.unlink()
        command.compare_settings(args)
        assert settings.read_bytes() == whole
    (args.work / "state.safetensors").touch()
    command.compare_settings(args)
    os.unlink(settings)
    os.mkfifo(settings)  # to read it would wait for ever
    with pytest.raises(ValueError, match="settings.json is missing or damaged, .* begins anew"):
        command.compare_settings(args)
    os.unlink(settings)
    if content is not None:
        settings.write_bytes(content)
    with pytest.raises(ValueError, match="settings.json is missing or damaged, .* begins anew"):
        command.compare_settings(args)
    args.restart = True
    command.compare_settings(args)
    assert settings.read_bytes() == whole


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="the message is for other backends")
def test_several_devices_need_jax(finetune, tmp_path, capsys):
    assert finetune("--method", "full", "--out", tmp_path / "x", "--distribute", "data") == 2
    assert "need the JAX backend, KERAS_BACKEND=jax, not " in capsys.readouterr().err


# --- Several devices and processes: the losses are those of one. ---------------------------------

DEVICES = """\
import sys
import keras
from stable_diffusion.command import finetune
from stable_diffusion.training import distribution

assert len(keras.distribution.list_devices()) == 4
for kind in ([], ["--distribute", "data"], ["--distribute", "model", "--model-devices", "2"]):
    build = finetune.build_method
    def check(args):
        method = build(args)
        if args.distribute == "model":
            sharded = 0
            for variable in method.model.trainable_variables:
                shards = {s.data.shape for s in variable.value.addressable_shards}
                sharded += shards != {tuple(variable.shape)}
            assert sharded > 50, sharded
        return method
    finetune.build_method = check
    out = sys.argv[1] + (kind[1] if kind else "one")
    assert finetune.main([*sys.argv[2:], "--out", out, "--batch", "4", *kind]) == 0
    finetune.build_method = build
    keras.distribution.set_distribution(None)
"""


def start(arguments, **environment):
    environment = os.environ | {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"} | environment
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said


@pytest.fixture
def on_jax(weights, images):
    pytest.importorskip("jax")
    full = ["--method", "full", "--weights", weights, "--steps", "3", "--rate", "1e-3"]
    return [images, *full, "--dropout", "0.5"]


@pytest.mark.large
def test_devices_have_the_losses_of_one(on_jax, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    finish(start(["-c", DEVICES, f"{tmp_path}/", *on_jax], XLA_FLAGS=flags))
    expected = losses(tmp_path / "one.work")
    assert losses(tmp_path / "data.work") == pytest.approx(expected, rel=1e-5)
    assert losses(tmp_path / "model.work") == pytest.approx(expected, rel=1e-5)


@pytest.mark.large
def test_processes_have_the_losses_of_one(on_jax, tmp_path):
    given = ["-m", "stable_diffusion.command.finetune", *on_jax, "--batch", "4"]
    finish(start([*given, "--out", tmp_path / "one"]))
    variables = {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{free_port()}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
    }
    given += ["--out", tmp_path / "two", "--distribute", "data"]
    finish(*(start(given, **variables, KERAS_DISTRIBUTION_PROCESS_ID=n) for n in "01"))
    expected = losses(tmp_path / "one.work")
    assert losses(tmp_path / "two.work") == pytest.approx(expected, rel=1e-5)
    one, two = (
        StableDiffusion(jit_compile=False, weights=tmp_path / name).diffusion_model.get_weights()
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def free_port():
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
