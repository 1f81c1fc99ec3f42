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
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from stable_diffusion import StableDiffusion
from stable_diffusion.command import finetune as command
from stable_diffusion.training import callbacks, distribution
from stable_diffusion.training.callbacks import CURVE

OPTIONS = ["--steps", "4", "--batch", "2", "--rate", "1e-2", "--dropout", "0.5"]


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
def finetune(weights, images, monkeypatch):
    """Runs the command on the tiny model; returns its exit status."""
    compiled = keras.Model.compile

    def compile(self, *args, **options):
        compiled(self, *args, **options | {"run_eagerly": True, "jit_compile": False})

    monkeypatch.setattr(keras.Model, "compile", compile)
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
    assert finetune("--method", "lora", "--out", out, *preview, "--preview-steps", "1") == 0
    said = capsys.readouterr().out
    assert "bad.png can't be opened" in said and "3 images, 1 skipped" in said
    assert len(losses(work)) == 4
    names = sorted(path.name for path in (work / "previews").iterdir())
    assert names == ["step_000000.png", "step_000002.png", "step_000004.png"]
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
    assert finetune("--method", "lora", "--out", out) == 0
    before = losses(work)
    assert finetune("--method", "lora", "--out", out, "--steps", "5") == 0
    assert losses(work)[:4] == before and len(losses(work)) == 5
    capsys.readouterr()
    assert finetune("--method", "lora", "--out", out, "--rank", "2") == 2
    error = capsys.readouterr().err
    assert "has a run with --rank 4, not 2; --restart begins anew" in error
    assert error.count("\n") == 1
    assert finetune("--method", "lora", "--out", out, "--rank", "2", "--restart") == 0
    assert len(losses(work)) == 4


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.large)]
)
def test_a_stopped_run_goes_on_with_the_losses_it_would_have_had(
    number, finetune, monkeypatch, tmp_path, capsys
):
    method = ["--method", "full", "--ema", "0.5"]
    if number == signal.SIGTERM:
        method = ["--method", "textual-inversion", "--token", "blip", "--initializer", "cat"]
    suffix = ".safetensors" if number == signal.SIGTERM else ""
    whole, stopped = tmp_path / f"whole{suffix}", tmp_path / f"stopped{suffix}"
    assert finetune(*method, "--out", whole) == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 2, number)
        assert finetune(*method, "--out", stopped) == 130
    said = capsys.readouterr().out
    assert "stopped after step 2 of 4: the same command goes on from there" in said
    assert not stopped.exists()
    assert finetune(*method, "--out", stopped) == 0
    assert "going on after step 2 of 4" in capsys.readouterr().out
    assert losses(Path(f"{stopped}.work")) == losses(Path(f"{whole}.work"))
    result = "unet/diffusion_pytorch_model.safetensors" if not suffix else ""
    assert (stopped / result).read_bytes() == (whole / result).read_bytes()


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


@pytest.mark.large
def test_dreambooth_generates_the_class_first(finetune, monkeypatch, tmp_path):
    generated = []

    def generate(self, prompts, **options):
        generated.extend(prompts)
        return np.zeros((len(prompts), 64, 64, 3), "uint8")

    monkeypatch.setattr(StableDiffusion, "text_to_image", generate)
    out = tmp_path / "out.safetensors"
    given = ["--method", "dreambooth", "--parameters", "lora", "--out", out]
    known = ["--class-prompt", "a cat", "--class-prompt", "a dog", "--class-images", "5"]
    assert finetune(*given, *known) == 0
    assert generated == ["a cat", "a dog", "a cat", "a dog", "a cat"]
    (folder,) = Path(f"{out}.work").glob("class-*")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == generated
    (folder / "00003.png").unlink()
    assert finetune(*given, *known, "--restart") == 0
    assert generated[5:] == ["a dog"]


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
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, message, finetune, tmp_path, capsys):
    arguments = [str(tmp_path / a) if a.startswith("x") and a[1:] in ("", ".safetensors") else a
                 for a in arguments]  # fmt: skip
    assert finetune(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_caption_is_an_error(finetune, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    given = ["--method", "lora", "--out", tmp_path / "x.safetensors"]
    assert finetune(*given, folder=tmp_path) == 2
    assert "1 of 1 images have no caption" in capsys.readouterr().err
    new = ["--method", "textual-inversion", "--token", "<x>", "--initializer", "cat"]
    given = [*new, "--out", tmp_path / "x.safetensors", "--prompt", "an image of a cat"]
    assert finetune(*given, folder=tmp_path) == 2
    assert "lacks <x>" in capsys.readouterr().err


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
