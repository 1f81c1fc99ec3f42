"""The embedded checkpoint, and scripts/emoji/first/train_emoji.py, which makes one.

The checkpoint draws what it is asked for and is small. The script is tested with a model of few
parameters, on synthetic pictures, without graphs, which take longer to build than to save here.
"""

import csv
import hashlib
import re
from dataclasses import replace

import keras
import numpy as np
import pytest
import train_emoji as script
from safetensors.numpy import load_file

from stable_diffusion import Decoder, ImageEncoder, SimpleTokenizer, StableDiffusion
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.command.generate import find_unseen_words
from stable_diffusion.config import TextConfig
from stable_diffusion.files import WEIGHTS_DIR

NAMES = ["red apple", "octopus", "woman's hat"]
RED, GREEN, BLUE = range(3)


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(jit_compile=False, weights="emoji")


def centre_and_border(picture):
    """Returns the median colours of the middle quarter and of the outermost pixels."""
    centre = picture[32:96, 32:96].reshape(-1, 3)
    edges = [picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]]
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    return np.median(centre, axis=0), np.median(border, axis=0)


def test_a_red_apple_on_a_blue_background(model):
    prompt = "a red apple on a blue background"
    pictures = model.text_to_image(prompt, batch_size=2, num_steps=20, seed=[0, 1], verbose=0)
    assert pictures.shape == (2, 128, 128, 3)
    assert not np.array_equal(pictures[0], pictures[1])
    for picture in pictures:
        centre, border = centre_and_border(picture)
        assert centre[RED] > 150 and centre[RED] > 2 * max(centre[GREEN], centre[BLUE])
        assert border[BLUE] > 100 and border[BLUE] > border[RED] + 40


@pytest.fixture(scope="module")
def pair(model):
    prompts = ["a lemon on a blue background", "a red apple on a green background"]
    return model.text_to_image(prompts, num_steps=20, seed=[0, 0], verbose=0)


def test_subject_and_background_follow_the_prompt(pair):
    lemon, apple = pair
    (lemon, blue), (apple, green) = centre_and_border(lemon), centre_and_border(apple)
    assert min(lemon[RED], lemon[GREEN]) > lemon[BLUE] + 60
    assert apple[RED] > apple[GREEN] + 60
    assert blue.argmax() == BLUE and green.argmax() == GREEN


def test_the_image_encoder_inverts_the_decoder(model, pair):
    """Encoding and decoding drawn pictures gives about the same pictures."""
    latents = model.image_encoder.predict_on_batch(pair / 127.5 - 1.0)
    decoded = np.asarray(model.decoder.predict_on_batch(latents), "float32")
    error = np.clip(decoded, -1, 1) - (pair / 127.5 - 1.0)
    assert 10 * np.log10(4 / np.mean(error**2)) > 20  # PSNR, dB


def test_it_is_small_and_is_the_documented_one():
    files = [path for path in (WEIGHTS_DIR / "emoji").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 26e6
    unet = WEIGHTS_DIR / "emoji" / "unet" / "diffusion_pytorch_model.safetensors"
    documented = re.findall(r"`([0-9a-f]{64})`", (WEIGHTS_DIR / "README.md").read_text("utf-8"))
    assert hashlib.sha256(unet.read_bytes()).hexdigest() in documented


# Training


@pytest.fixture
def train(monkeypatch):
    """The script, with a tiny model."""
    config = replace(
        script.CONFIG,
        text=TextConfig(width=32, depth=1, heads=4, hidden=64),
        unet=replace(
            script.CONFIG.unet,
            widths=(32, 32),
            heads=(2, 2),
            attention=(False, True),
            context_width=32,
        ),
        vae=replace(script.CONFIG.vae, widths=(8, 8, 8, 8)),
    )
    sizes = {"VAE_BATCH": 2, "TEXT_BATCH": 4, "BATCH": 4, "WARMUP": 2, "VAE_WARMUP": 2}
    samples = {"PROMPTS": ["a frog"], "SAMPLE_STEPS": 1, "SAMPLE_PAIRS": 2}
    for name, value in {"CONFIG": config, "EMA": 0.5, **sizes, **samples}.items():
        monkeypatch.setattr(script, name, value)
    compiled = keras.Model.compile

    def eager(self, *args, jit_compile=False, **options):
        compiled(self, *args, run_eagerly=True, jit_compile=False, **options)

    monkeypatch.setattr(keras.Model, "compile", eager)
    return script


@pytest.fixture
def pictures():
    """uint8 (3, 128, 128, 4): an opaque square of its own colour, transparent around."""
    result = np.zeros((len(NAMES), 128, 128, 4), "uint8")
    for picture, colour in zip(result, [(200, 0, 0), (0, 200, 0), (20, 20, 90)], strict=True):
        picture[8:120, 8:120] = (*colour, 255)
    return result


class Killed(BaseException):
    """What no part of the program catches."""


def kill_at(monkeypatch, script, name, count):
    """Makes the count-th call of one of the script's functions the last thing that happens."""
    original, calls = getattr(script, name), []

    def killed(*args):
        calls.append(args)
        if len(calls) == count:
            raise Killed
        return original(*args)

    monkeypatch.setattr(script, name, killed)


def losses(folder):
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(len(rows)))
    return [float(row["loss"]) for row in rows]


# A killed run doesn't close its log.
leaves_its_log_open = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.large
@leaves_its_log_open
def test_training_goes_on_where_it_was_killed(train, pictures, monkeypatch, tmp_path, capsys):
    """Killed after an epoch's checkpoint, while the averages are in the model's place."""
    train.emoji.save(tmp_path / "data.npz", NAMES[:1], pictures[:1])
    parts = {
        "image_encoder": ImageEncoder(download_weights=False, config=train.CONFIG.vae),
        "decoder": Decoder(128, 128, download_weights=False, config=train.CONFIG.vae),
    }
    train.save_diffusers(tmp_path / "vae", train.CONFIG, parts)

    def run(name):
        work, vae = tmp_path / name, str(tmp_path / "vae")
        command = [str(tmp_path / "data.npz"), "--vae", vae, "--epochs", "2", "--steps", "2"]
        command += ["--vae-epochs", "0", "--text-epochs", "1"]
        assert train.main([*command, "--work", str(work), "--out", str(work / "out")]) == 0
        model = StableDiffusion(jit_compile=False, weights=work / "out")
        return model.diffusion_model.get_weights()

    samples = np.zeros((2, 128, 128, 3), "uint8")  # drawing them takes longer than training
    monkeypatch.setattr(StableDiffusion, "text_to_image", lambda *args, **options: samples)
    expected = run("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, train, "save_grid", 1)
        run("killed")
    folder, out = tmp_path / "killed" / "diffusion", tmp_path / "killed" / "out"
    assert not out.exists()
    trained = run("killed")
    assert "diffusion: 1 of 2 epochs done" in capsys.readouterr().out
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "whole" / "diffusion"), rtol=1e-4)
    for one, other in zip(trained, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)  # float16 has steps of this size near 1
    assert len(losses(tmp_path / "killed" / "text")) == 1

    assert (out / "subjects.txt").read_text().splitlines() == NAMES[:1]
    captions = train.emoji.captions("red apple", "blue", "small", "left")
    assert find_unseen_words(open_checkpoint(out), captions) == []
    assert find_unseen_words(open_checkpoint(out), ["a horse on blue"]) == ["horse"]
    files = {path.name for path in (tmp_path / "killed").rglob("*")}
    assert "epoch_002.png" in files
    assert not any(name.startswith("next.") or name.endswith(".tmp") for name in files)

    monkeypatch.setattr(train, "RATE", 0.0)  # what it goes on from can be seen in the result
    command = [str(tmp_path / "data.npz"), "--init", str(out), "--epochs", "1", "--steps", "1"]
    more = tmp_path / "more"
    assert train.main([*command, "--work", str(more), "--out", str(more / "out")]) == 0
    assert not (more / "vae").exists() and not (more / "text").exists()
    for file in [path.relative_to(out) for path in out.rglob("*") if path.is_file()]:
        if file.suffix == ".safetensors":  # not bytes, because -0.0 may have become 0.0
            before, after = (load_file(folder / file) for folder in (out, more / "out"))
            assert before.keys() == after.keys()
            for key, tensor in before.items():
                np.testing.assert_array_equal(tensor, after[key])
        else:
            assert (more / "out" / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.large
@leaves_its_log_open
def test_the_vae_goes_on_where_it_was_killed(train, pictures, monkeypatch, tmp_path):
    """Without the noise of its latents, which is another after a restart, the loss is the same."""
    monkeypatch.setattr(keras.random, "normal", lambda shape, seed: keras.ops.zeros(shape))

    def run(name):
        return train.train_vae(NAMES, pictures, tmp_path / name, 2, 1)

    run("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, train, "save_grid", 1)
        run("killed")
    folder = run("killed")
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    encoder, decoder, config = train.load_vae(folder)
    assert config == train.CONFIG.vae and decoder.output_shape == (None, 128, 128, 3)


@pytest.mark.large
def test_the_decoder_learns_alone(train, pictures, tmp_path):
    """Where a UNet knows the encoder's latents, and where the factor of a UNet is in the config."""
    config = replace(train.CONFIG, vae=replace(train.CONFIG.vae, scaling_factor=0.5))
    parts = {
        "image_encoder": ImageEncoder(download_weights=False, config=config.vae),
        "decoder": Decoder(128, 128, download_weights=False, config=config.vae),
    }
    train.save_diffusers(tmp_path / "begun", config, parts, dtype="float32")
    work = tmp_path / "vae"
    folder = train.train_vae(NAMES, pictures, work, 1, 2, begun=tmp_path / "begun", freeze=True)
    encoder, decoder, config = train.load_vae(folder)
    assert config == train.CONFIG.vae
    for one, other in zip(encoder.get_weights(), parts["image_encoder"].get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    changes = [
        np.abs(one - other).max()
        for one, other in zip(decoder.get_weights(), parts["decoder"].get_weights(), strict=True)
    ]
    assert 0 < max(changes) < 0.01  # two steps from where it was, at the beginning of the warm-up


@pytest.mark.large
def test_what_fit_goes_on_from_are_not_the_averages(train, tmp_path):
    """In the checkpoint are the parameters, in the model that `fit` leaves are the averages."""

    class Data(train.Batches):
        def draw(self, rng):
            x = rng.standard_normal((4, 3), "float32")
            return x, x.sum(1, keepdims=True)

    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.AdamW(0.1, use_ema=True, ema_momentum=0.9), "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    def run(epochs):
        model, saved = build(), build()
        averaged = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        train.fit(model, Data(4, 5), epochs, tmp_path, [averaged])
        saved.load_weights(tmp_path / "latest.weights.h5")
        [moving, _] = saved.optimizer._model_variables_moving_average
        return model.get_weights()[0], saved.get_weights()[0], np.array(moving)

    for epochs in (2, 2, 4):
        left, saved, average = run(epochs)
        assert np.abs(left - saved).max() > 0.01
        np.testing.assert_allclose(left, average, rtol=1e-5)
    resumed = losses(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    run(4)
    np.testing.assert_allclose(losses(tmp_path), resumed, rtol=1e-4)  # without any jump


@pytest.mark.large
def test_the_latents_of_a_killed_run_are_used(train, pictures, monkeypatch, tmp_path):
    encoder = ImageEncoder(download_weights=False, config=train.CONFIG.vae)
    scenes = train.list_scenes(NAMES)[:20]
    cache = tmp_path / "latents.npy"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, train, "draw_scene", 14)
        train.encode_scenes(scenes, pictures, encoder, cache, batch_size=4)
    assert not cache.exists()
    drawn, draw = [], train.draw_scene
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_scene", lambda *args: drawn.append(args) or draw(*args))
        latents = train.encode_scenes(scenes, pictures, encoder, cache, batch_size=4)
    assert len(drawn) == 4 + 8  # the first batch is compared, three were there
    assert latents.dtype == np.float16 and list(tmp_path.iterdir()) == [cache]
    batch = train.to_float(np.stack([draw(pictures, *scene) for scene in scenes]))
    expected = np.asarray(train.moments(encoder).predict_on_batch(batch))[..., : train.CHANNELS]
    np.testing.assert_allclose(latents, expected, atol=2e-3)

    other = ImageEncoder(download_weights=False, config=train.CONFIG.vae)
    other.set_weights([2 * weight for weight in encoder.get_weights()])
    for some, model in ((scenes, other), (scenes[:-1], encoder)):
        with pytest.raises(ValueError, match="latents.npy: of other pictures or another VAE"):
            train.encode_scenes(some, pictures, model, cache, batch_size=4)


def test_scenes(train, pictures):
    """All but the held-out pairs, plain ones in variants that differ, the others once each."""
    scenes = train.list_scenes(NAMES)
    pairs = {(NAMES[index], colour) for index, colour, *_ in scenes}
    everything = {(name, colour) for name in NAMES for colour in train.emoji.COLOURS}
    assert pairs == {pair for pair in everything if not train.emoji.held_out(*pair)} < everything
    of_one = [scene for scene in scenes if scene[:2] == (0, "blue")]
    assert len(of_one) == len(set(of_one)) == 2 + 1
    drawn = np.stack([train.draw_scene(pictures, *scene) for scene in of_one])
    assert len(np.unique(drawn.reshape(3, -1), axis=0)) == 3
    for place in train.PLACES:  # each on several colours, and of each subject
        some = [scene for scene in scenes if scene[2:4] == place]
        assert len({colour for _, colour, *_ in some}) > 3
        assert {index for index, *_ in some} == {0, 1, 2}
    np.testing.assert_array_equal(drawn[0], train.draw_scene(pictures, *of_one[0]))


def test_the_vocabulary_spells_words_as_the_whole_one_does(train, tmp_path):
    words = train.list_words([*NAMES, "ice cream", "x-ray"])
    assert {"woman's", "x", "ray", "small", "large", "picture", "an", "gray", "bottom"} <= set(
        words
    )
    small, whole = train.write_vocabulary(words, tmp_path / "merges.txt"), SimpleTokenizer()
    assert len(small.vocab) < 1500
    for name in (*NAMES, "ice cream", "x-ray"):
        for caption in train.emoji.captions(name, "purple", "small", "top"):
            pieces = [[t.vocab[n] for n in t.encode(caption)] for t in (small, whole)]
            assert pieces[0] == pieces[1]


def test_noisy_latents(train):
    """Of the inputs and v the latents can be computed; shares of captions are as documented."""
    scenes = train.list_scenes(NAMES)
    latents = np.arange(len(scenes), dtype="float16")[:, None, None, None] * np.ones((1, 2, 2, 4))
    tokenizer = SimpleTokenizer()
    config = replace(
        train.CONFIG,
        vae=replace(train.CONFIG.vae, scaling_factor=0.5),
        schedule=train.SCHEDULE,
    )
    latents = latents.astype("float16")
    data = train.NoisyLatents(latents, config, scenes, NAMES, tokenizer, 4, 100)
    texts, shown = [], []
    for index in range(60):
        inputs, v = data[index]
        alpha = train.SCHEDULE.alphas_cumprod
        for row in range(4):
            embedding = inputs["timestep_embedding"][row]
            known = train.timestep_embedding(np.arange(1000), 32)
            level = alpha[np.abs(known - embedding).sum(1).argmin()]
            x0 = level**0.5 * inputs["latent"][row] - (1 - level) ** 0.5 * v[row]
            np.testing.assert_allclose(x0, x0.flat[0], atol=1e-3)
            shown.append(scenes[round(float(x0.flat[0] / 0.5))])
            texts.append(tokenizer.decode(inputs["tokens"][row].tolist()))
    described = [re.sub("<[^>]*>", "", text).strip() for text in texts]
    assert 0.04 < np.mean([not text for text in described]) < 0.18
    assert 0.65 < np.mean([scene[2] is scene[3] is None for scene in shown]) < 0.85
    for text, (index, colour, size, side, _) in zip(described, shown, strict=True):
        if text:
            assert NAMES[index].split("'")[0] in text and colour in text
            assert (size or "") in text and (side or "") in text
    captioned, x0 = train.CaptionedLatents(latents, config, scenes, NAMES, tokenizer, 4, 100)[59]
    np.testing.assert_array_equal(captioned["tokens"], inputs["tokens"])
    assert [scenes[round(float(value))] for value in x0[:, 0, 0, 0] / 0.5] == shown[-4:]
    again, _ = data[3]
    np.testing.assert_array_equal(again["latent"], data[3][0]["latent"])
    data.on_epoch_begin()
    assert not np.array_equal(again["latent"], data[3][0]["latent"])


def test_the_script_rejects(train, tmp_path, pictures, capsys):
    def run(data, *options):
        return train.main([str(data), "--work", str(tmp_path / "work"), *options])

    train.emoji.save(tmp_path / "data.npz", NAMES, pictures)
    (tmp_path / "text").write_text("no pictures")
    assert run(tmp_path / "missing") == run(tmp_path / "text") == 2
    assert run(tmp_path / "data.npz", "--vae", str(tmp_path), "--vae-epochs", "0") == 2
    assert run(tmp_path / "data.npz", "--init", str(tmp_path)) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 4 and all(line.startswith("train_emoji: ") for line in messages)
    for options in (["--steps", "0"], ["--vae-epochs", "0"], ["--vae", "a", "--init", "b"]):
        with pytest.raises(SystemExit) as error:
            run(tmp_path / "data.npz", *options)
        assert error.value.code == 2
