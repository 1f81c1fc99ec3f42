"""Tests of scripts/emoji/training.py, torch_ops.py and train.py, which need PyTorch.

What needs Keras on PyTorch runs in a process of its own, with models of few parameters and without
compiling. Tolerance of the operations against Keras' own: 1e-4 of the largest value, float32.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training needs PyTorch")
pytestmark = pytest.mark.torch
SCRIPTS = Path(__file__).parents[2] / "scripts" / "emoji"
sys.path.insert(0, str(SCRIPTS))

import training  # noqa: E402


class Variable:
    def __init__(self, *shape):
        self.value = torch.nn.Parameter(torch.zeros(shape))


def make(folder, seed=0, rate=0.1):
    """Returns training of a vector and a matrix towards 3, with noise that depends on the step."""
    variables = [Variable(4), Variable(2, 3)]

    def compute_loss(step, part):
        generator = torch.Generator().manual_seed(step * 100 + part + seed)
        return sum(
            (v.value - 3 - 0.1 * torch.randn(v.value.shape, generator=generator)).square().mean()
            for v in variables
        )

    return training.Training(folder, variables, compute_loss, lambda step: rate), variables


def test_it_learns(tmp_path):
    run, variables = make(tmp_path)
    run.run(200)
    for variable in variables:
        assert (variable.value - 3).abs().max() < 0.3
    assert run.step == 200 and len((tmp_path / "log.csv").read_text().splitlines()) == 4


def test_it_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, expected = make(tmp_path / "whole")
    whole.run(30)
    make(tmp_path / "parts")[0].run(11)
    parts, variables = make(tmp_path / "parts")
    assert parts.step == 11
    parts.run(30)
    for variable, other in zip(variables, expected, strict=True):
        torch.testing.assert_close(variable.value, other.value, rtol=0, atol=0)
    for average, other in zip(parts.averages, whole.averages, strict=True):
        torch.testing.assert_close(average, other, rtol=0, atol=0)
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_a_signal_stops_it_with_a_checkpoint(tmp_path):
    run, _ = make(tmp_path)
    take_step, before = run.take_step, signal.getsignal(signal.SIGTERM)

    def stop_at_seven():
        if run.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step()

    run.take_step = stop_at_seven
    with pytest.raises(training.Stopped):
        run.run(100)
    assert make(tmp_path)[0].step == 7
    assert signal.getsignal(signal.SIGTERM) is before


def test_swap_exchanges_the_average(tmp_path):
    run, variables = make(tmp_path)
    run.run(5)
    values, averages = [v.value.detach().clone() for v in variables], [*run.averages]
    averages = [average.clone() for average in averages]
    run.swap()
    for variable, average, other in zip(variables, run.averages, averages, strict=True):
        torch.testing.assert_close(variable.value.detach(), other)
        assert not torch.equal(average, other)
    run.swap()
    for variable, value in zip(variables, values, strict=True):
        torch.testing.assert_close(variable.value.detach(), value)


def test_the_rate_rises_stays_and_falls():
    rates = [training.fall(step, 100, 10, 2.0, begin=0.5) for step in range(101)]
    assert rates[0] == 0.2 and rates[10:50] == [2.0] * 40
    assert all(one > other for one, other in zip(rates[51:100], rates[52:], strict=False))
    assert rates[100] == pytest.approx(0.02)


OPERATIONS = """
import keras, numpy as np, torch
from dataclasses import replace
from stable_diffusion import Decoder, DiffusionModel, ImageEncoder, TextEncoder
from stable_diffusion.config import TINY, undo_departures
import torch_ops

config = undo_departures(TINY)
rng = np.random.default_rng(0)
options = {"download_weights": False}
models = [
    (Decoder(64, 64, config=config.vae, **options), [(2, 8, 8, 4)]),
    (ImageEncoder(config=config.vae, **options), [(2, 64, 64, 3)]),
    (
        DiffusionModel(64, 64, 77, config=config.unet, **options),
        [(2, 8, 8, 4), (2, 32), (2, 77, 32)],
    ),
]
text = TextEncoder(77, config=replace(config.text, vocab_size=9), **options)
tokens = torch.from_numpy(rng.integers(0, 9, (2, 77)))
inputs = [[torch.from_numpy(rng.standard_normal(s, "float32")) for s in some] for _, some in models]
calls = [(m, x if len(x) > 1 else x[0]) for (m, _), x in zip(models, inputs)]
calls.append((text, {"tokens": tokens, "positions": torch.arange(77).expand(2, 77)}))
for model, _ in calls:
    model.set_weights([w + rng.normal(0, 0.1, w.shape) for w in model.get_weights()])

def compute():
    results = []
    for model, x in calls:
        y = model(x)
        loss = (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum()
        values = [v.value for v in model.trainable_variables]
        results += [y.detach(), *torch.autograd.grad(loss, values, allow_unused=True)]
    return results

before = compute()
torch_ops.install()
for model, _ in calls:
    torch_ops.order_kernels(model)
after = compute()
largest = max(float(one.abs().max()) for one in before if one is not None)
for one, other in zip(before, after, strict=True):
    assert (one is None) == (other is None)
    if one is not None:
        scale = max(float(one.abs().max()), 1e-3 * largest)
        assert float((one - other).abs().max()) < 1e-4 * scale, one.shape
"""

WHOLE = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import train, compositions
import vae as autoencoder

work = Path(sys.argv[1])
names = ["cat", "red apple", "owl", "grapes"]
rng = np.random.default_rng(0)
sets = {}
for style, side in (("3d", 16), ("flat", 8)):
    sets[style] = rng.integers(0, 256, (len(names), side, side, 4)).astype("uint8")
    sets[style][..., 3] = 255
train.load_pictures = lambda path: sets
train.Sprites = lambda pictures: compositions.Sprites(pictures, names)
autoencoder.CONFIG = replace(autoencoder.CONFIG, widths=(8, 8, 8, 8), groups=4, latent_channels=4)
autoencoder.VAE.__init__.__defaults__ = (autoencoder.CONFIG,)
autoencoder.CROP_STEPS, autoencoder.STEPS, autoencoder.SHOW_STEPS = 1, 2, 2
autoencoder.CROP_BATCH = autoencoder.WHOLE_BATCH = 2
train.TEXT = replace(train.TEXT, width=16, depth=1, heads=2, hidden=32)
train.UNET = replace(
    train.UNET, widths=(16, 16), heads=(2, 2), attention=(False, True), context_width=16,
    in_channels=4, out_channels=4, groups=8,
)
train.SCENES = dict.fromkeys(train.SCENES, 8)
train.TEXT_STEPS, train.TEXT_BATCH, train.STEPS, train.BATCH, train.SHOW_STEPS = 2, 4, 2, 4, 2
train.PROMPTS, train.SHOWN_STEPS = train.PROMPTS[:8], 1
arguments = ["pictures.npz", "--work", str(work), "--out", str(work / "out")]
assert train.main(arguments) == 0
first = (work / "out" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
assert train.main(arguments) == 0  # nothing is left to do
assert (work / "out" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first
pipeline = train.StableDiffusion(jit_compile=False, weights=str(work / "out"))
assert pipeline.text_to_image("an apple", num_steps=1, seed=0, verbose=0).shape == (1, 128, 128, 3)
assert (work / "out" / "subjects.txt").read_text().splitlines() == names
words = (work / "out" / "words.txt").read_text().splitlines()
assert {"apple", "flat", "3d", "above", "cyan"} <= set(words)
assert len(pipeline.tokenizer.encode("owl")) == 3  # one piece, as with CLIP's whole vocabulary
more = ["pictures.npz", "--work", str(work / "more"), "--init", str(work / "out")]
assert train.main(more) == 0
assert not (work / "more" / "vae").exists() and not (work / "more" / "text").exists()
vae = ["pictures.npz", "--work", str(work / "again"), "--init", str(work / "vae" / "checkpoint")]
assert train.main([*vae, "--export", "--out", str(work / "none")]) == 0
assert train.main(["pictures.npz", "--work", str(work), "--init", str(work / "missing")]) == 2
for part in ("vae", "text", "diffusion"):
    assert (work / part / "latest.pt").is_file()
"""


def run(code, *arguments):
    root = SCRIPTS.parents[1]
    environment = {
        **os.environ,
        "KERAS_BACKEND": "torch",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes minutes
        "PYTHONPATH": os.pathsep.join([str(root), str(SCRIPTS)]),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_operations_are_keras_own():
    run(OPERATIONS)


def test_all_stages(tmp_path):
    run(WHOLE, tmp_path)
