"""What each method trains, leaves alone and saves, on a model of few parameters.

What is saved is loaded by the pipeline, in the same process and backend, so outputs agree within
roundings of float32: 1e-5 of the largest value.
"""

from dataclasses import replace

import h5py
import keras
import numpy as np
import pytest
from helpers import relative_error
from PIL import Image
from safetensors.numpy import load_file, save_file

from stable_diffusion import StableDiffusion
from stable_diffusion.config import undo_departures
from stable_diffusion.noise_scheduler import timestep_embedding
from stable_diffusion.training import (
    Cache,
    Full,
    LoRA,
    NoisyLatents,
    Stream,
    TextualInversion,
    load_state,
    read_folder,
    remat_scope,
    save_state,
)
from stable_diffusion.training.optimizers import count_memory, make_optimizer

TOKEN, TOLERANCE = "<toy>", 1e-5
pytestmark = pytest.mark.usefixtures("reused")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), "uint8")).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a {TOKEN} number {n}")
    return folder


@pytest.fixture
def pipeline(weights):
    keras.utils.set_random_seed(0)
    return StableDiffusion(jit_compile=False, weights=weights)


def train(method, pictures, folder, steps=2, first_step=0, callbacks=()):
    """Takes some steps; returns the loss of each."""
    cache = Cache(folder / "cache", method.pipeline)
    examples, broken = cache.encode_examples(read_folder(pictures), texts=method.tokenize is None)
    assert not broken
    data = NoisyLatents(
        cache,
        [Stream(examples)],
        method.pipeline.config.schedule,
        batch_size=2,
        steps=1,
        first_step=first_step,
        dropout=0.5,
        tokenize=method.tokenize,
    )
    if not method.model.compiled:
        method.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    history = method.model.fit(data, epochs=steps, shuffle=False, verbose=0, callbacks=callbacks)
    history = history.history
    assert history["loss"] == pytest.approx(history["step_loss"])
    return history["loss"]


def predict(pipeline, context=None):
    rng = np.random.default_rng(1)
    # Its contexts are of any length.
    shapes = [[n or 77 for n in tensor.shape[1:]] for tensor in pipeline.diffusion_model.inputs]
    inputs = [rng.standard_normal((2, *shape), dtype="float32") for shape in shapes]
    inputs[2] = inputs[2] if context is None else np.repeat(context, 2, axis=0)
    return keras.ops.convert_to_numpy(pipeline.diffusion_model(inputs))


def values(model):
    return {v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.weights}


def changed(model, before):
    after = values(model)
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_full_trains_all_or_cross_attention_alone(pipeline, weights, pictures, tmp_path):
    before = values(pipeline.diffusion_model)
    train(Full(pipeline, "cross-attention"), pictures, tmp_path, steps=1)
    moved = changed(pipeline.diffusion_model, before)
    assert moved and moved == {path for path in before if "/attn2/" in path}

    method = Full(pipeline)
    train(method, pictures, tmp_path, steps=1)
    assert changed(pipeline.diffusion_model, before) == set(before)
    text = values(pipeline.text_encoder)
    method.save(tmp_path / "out", dtype="float32")
    loaded = StableDiffusion(jit_compile=False, weights=tmp_path / "out")
    np.testing.assert_allclose(predict(loaded), predict(pipeline), atol=TOLERANCE)
    assert not changed(loaded.text_encoder, text)
    with pytest.raises(ValueError, match="parameters must be one of 'all', 'cross-attention'"):
        Full(pipeline, "attention")


@pytest.mark.parametrize(
    "targets, keys",
    [("attention", "kohya"), pytest.param("all", "diffusers", marks=pytest.mark.large)],
)
def test_lora(targets, keys, weights, pictures, tmp_path):
    keras.utils.set_random_seed(0)
    pipeline = StableDiffusion(jit_compile=False, weights=weights)
    unet = pipeline.diffusion_model
    before, first = values(unet), predict(pipeline)
    method = LoRA(pipeline, rank=2, alpha=3.0, targets=targets)
    np.testing.assert_array_equal(predict(pipeline), first)
    train(method, pictures, tmp_path)
    assert not changed(unet, before)  # those that were there
    trained = predict(pipeline)
    assert relative_error(trained, first) > 0.01

    method.save(tmp_path / "lora.safetensors", keys=keys)
    stored = load_file(tmp_path / "lora.safetensors")
    assert len(stored) == len(method.adapters) * (3 if keys == "kohya" else 2)
    loaded = StableDiffusion(jit_compile=False, weights=weights)
    loaded.load_lora(tmp_path / "lora.safetensors")
    assert relative_error(predict(loaded), trained) < TOLERANCE
    if targets == "attention":
        assert len(method.adapters) == 8 * 4  # q, k, v, out of two attentions, in four blocks
        with pytest.raises(ValueError, match="has adapters already"):
            LoRA(pipeline)


def test_files_of_keras_have_the_adapters(weights, tmp_path):
    """Its callbacks are called as `fit` does."""
    path = tmp_path / "last.weights.h5"

    def begin():
        pipeline = StableDiffusion(jit_compile=False, weights=weights)
        method = LoRA(pipeline, rank=2, targets="cross-attention")
        saved = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        for callback in (saved, backup):
            callback.set_model(method.compile("sgd"))
        return method, saved, backup

    method, *callbacks = begin()
    for layer in method.adapters.values():
        layer.lora_kernel_b.assign(layer.lora_kernel_b + 0.5)
    expected = values(method.model)
    for callback in callbacks:
        callback.on_train_begin()
        callback.on_epoch_end(0, {})
    assert not changed(method.model, expected)  # saving changes nothing

    method, _, backup = begin()
    method.model.load_weights(path)
    assert not changed(method.model, expected)
    for layer in method.adapters.values():
        layer.lora_kernel_a.assign(0 * layer.lora_kernel_a)
        layer.lora_kernel_b.assign(0 * layer.lora_kernel_b)
    with pytest.raises(ValueError, match="All adapters are zero"):
        method.save(tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()
    backup.on_train_begin()
    assert not changed(method.model, expected)

    plain = Full(StableDiffusion(jit_compile=False, weights=weights))
    plain.model.save_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="doesn't fit the model 'denoiser', which is unchanged"):
        method.model.load_weights(tmp_path / "plain.weights.h5")
    assert not changed(method.model, expected)


def test_a_file_of_keras_that_fails_late_is_not_half_loaded(pipeline, tmp_path):
    method, path = LoRA(pipeline, rank=2, targets="cross-attention"), tmp_path / "a.weights.h5"
    method.model.save_weights(path)
    with h5py.File(path, "r+") as file:
        pairs = []
        file.visititems(
            lambda name, item: (
                pairs.append(item)
                if isinstance(item, h5py.Group) and set(item) >= {"1", "2"}
                else None
            )
        )
        last = max(pairs, key=lambda group: group.name)  # A and B change places
        for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
            last.move(old, new)
    with pytest.raises(ValueError, match="All parameters of the model 'denoiser' are NaN now"):
        method.model.load_weights(path)
    assert all(np.isnan(value).all() for value in values(method.model).values())


def test_results_that_float16_cannot_hold_are_refused(pipeline, tmp_path):
    lora = LoRA(pipeline, rank=2, targets="cross-attention")
    name, layer = max(lora.adapters.items())
    layer.lora_kernel_b.assign(layer.lora_kernel_b + 65520)
    path = tmp_path / "x.safetensors"
    path.write_text("before")
    wrong = f"{name.replace('.', '_')}.lora_up.weight has values that are not finite in float16; "
    with pytest.raises(ValueError, match=f"{wrong}float32 and bfloat16 can hold them"):
        lora.save(path, dtype="float16")
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    lora.save(path, dtype="bfloat16")
    assert all(np.isfinite(t.astype("float32")).all() for t in load_file(path).values())


def test_vectors_that_float16_cannot_hold_are_refused(pipeline, tmp_path):
    method, path = TextualInversion(pipeline, TOKEN, "cat"), tmp_path / "x.safetensors"
    method.learned.vectors.assign(method.learned.vectors + 1e6)
    with pytest.raises(ValueError, match=f"{TOKEN} has values that are not finite in float16; "):
        method.save(path, dtype="float16")
    with pytest.raises(ValueError, match="dtype must be one of"):
        method.save(path, dtype="int8")
    assert not path.exists()
    method.save(path)
    assert load_file(path)[TOKEN].min() > 9e5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be an int from 1, not 0"),
        ({"alpha": -1.0}, "alpha must be above 0, not -1.0"),
        ({"targets": "most"}, "targets must be one of 'cross-attention', 'attention'"),
    ],
)
def test_lora_refuses(options, message, pipeline):
    with pytest.raises(ValueError, match=message):
        LoRA(pipeline, **options)


def test_textual_inversion_changes_its_vectors_alone(pipeline, weights, pictures, tmp_path):
    method = TextualInversion(pipeline, TOKEN, "two words", vectors=3)
    one, two = pipeline.tokenizer.encode("two words")[1:-1]
    table = values(pipeline.text_encoder)["clip_embedding/token_embedding/embeddings"]
    np.testing.assert_array_equal(table[method.ids], table[[one, two, one]])
    text = values(pipeline.text_encoder)
    before = text | values(pipeline.diffusion_model)
    assert [v.path for v in method.model.trainable_variables] == ["learned_tokens/vectors"]
    train(method, pictures, tmp_path)
    assert not changed(pipeline.text_encoder, text)
    method.update_pipeline()
    after = values(pipeline.text_encoder) | values(pipeline.diffusion_model)
    for path, value in before.items():
        rows = method.ids if path.endswith("token_embedding/embeddings") else []
        np.testing.assert_array_equal(np.delete(after[path], rows, 0), np.delete(value, rows, 0))
        assert (after[path][rows] != value[rows]).all()

    method.save(tmp_path / "toy.safetensors")
    loaded = StableDiffusion(jit_compile=False, weights=weights)
    loaded.load_embedding(tmp_path / "toy.safetensors")
    prompt = f"a {TOKEN} on a mat"
    context = pipeline.encode_text(prompt)
    np.testing.assert_allclose(loaded.encode_text(prompt), context, atol=TOLERANCE)
    # The model that is trained sees the same.
    batch = {
        "tokens": method.tokenize(prompt)[None].repeat(2, axis=0),
        "positions": np.tile(np.arange(77, dtype="int32"), (2, 1)),
    }
    rng = np.random.default_rng(1)
    for tensor in pipeline.diffusion_model.inputs[:2]:
        batch[tensor.name] = rng.standard_normal((2, *tensor.shape[1:]), dtype="float32")
    output = keras.ops.convert_to_numpy(method.model(batch))
    np.testing.assert_allclose(output, predict(pipeline, context), atol=TOLERANCE)


@pytest.fixture
def deeper(few):
    """A pipeline whose text encoder has three layers."""
    config = replace(few, text=replace(few.text, depth=3))
    return StableDiffusion(jit_compile=False, weights=None, config=config)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_textual_inversion_with_clip_skip(deeper, clip_skip):
    """The model that is trained sees the context that the pipeline encodes so."""
    method = TextualInversion(deeper, TOKEN, "cat", clip_skip=clip_skip)
    prompt, rng = f"a {TOKEN} on a mat", np.random.default_rng(1)
    batch = {
        "tokens": method.tokenize(prompt)[None].repeat(2, axis=0),
        "positions": np.tile(np.arange(77, dtype="int32"), (2, 1)),
    }
    for tensor in deeper.diffusion_model.inputs[:2]:
        batch[tensor.name] = rng.standard_normal((2, *tensor.shape[1:]), dtype="float32")
    output = keras.ops.convert_to_numpy(method.model(batch))
    expected = predict(deeper, deeper.encode_text(prompt, clip_skip))
    assert relative_error(output, expected) < TOLERANCE
    assert relative_error(output, predict(deeper, deeper.encode_text(prompt))) > 10 * TOLERANCE


def test_a_cache_does_not_mix_clip_skips(deeper, tmp_path):
    for clip_skip in (2, 0, 1, np.int64(1)):
        cache = Cache(tmp_path, deeper, clip_skip=clip_skip)
        expected = np.asarray(deeper.encode_text("a cat", clip_skip))[0]
        assert relative_error(cache.read_context("a cat"), expected) < TOLERANCE
    assert len(list(tmp_path.rglob("*.npy"))) == 3


def test_textual_inversion_refuses(pipeline):
    skip = "clip_skip must be an int from 0 to 0, not 1"
    with pytest.raises(ValueError, match=skip):
        TextualInversion(pipeline, TOKEN, "cat", clip_skip=1)
    with pytest.raises(ValueError, match=skip):
        Cache("cache", pipeline, clip_skip=1)
    with pytest.raises(ValueError, match="vectors must be an int from 1, not 0"):
        TextualInversion(pipeline, TOKEN, "cat", 0)
    with pytest.raises(ValueError, match="initializer must contain a word, not ' '"):
        TextualInversion(pipeline, TOKEN, " ")


@pytest.mark.large
def test_rematerialisation_changes_nothing_but_memory(few, weights, pictures, tmp_path):
    losses = []
    for remat in (False, True):
        keras.utils.set_random_seed(0)
        pipeline = StableDiffusion(jit_compile=False, weights=weights)
        if remat:
            with remat_scope(few.unet):
                pipeline.diffusion_model  # noqa: B018
        names = [layer.name for layer in pipeline.diffusion_model.layers if layer._remat_mode]
        assert ("down_0_attn_0" in names) == remat
        losses.append(train(Full(pipeline), pictures, tmp_path))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"use_ema": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.large),
    ],
)
def test_a_run_goes_on_from_its_state(options, weights, pictures, tmp_path):
    state = tmp_path / "state.safetensors"

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                save_state(state, self.model, 3)

    def begin():
        keras.utils.set_random_seed(0)
        pipeline = StableDiffusion(jit_compile=False, weights=weights)
        method = LoRA(pipeline, rank=2)
        method.compile(
            make_optimizer("adam", 1e-2, 6, "cosine", warmup=2, **options), run_eagerly=True
        )
        return method

    method = begin()
    expected = train(method, pictures, tmp_path, steps=4, callbacks=[Save()])
    last = values(method.model)
    method = begin()
    assert load_state(state, method.model) == 3
    assert train(method, pictures, tmp_path, steps=1, first_step=3) == expected[3:]
    assert not changed(method.model, last)  # these are the averages, where there are any
    if options:
        return

    tensors = load_file(state)
    path = tmp_path / "other.safetensors"
    for content, message in (
        (dict(list(tensors.items())[1:]), "of a run with other parameters"),
        (None, "no intact state"),
    ):
        save_file(content, path, {"step": "1"}) if content else path.write_bytes(b"no state")
        before = values(method.model)
        with pytest.raises(ValueError, match=message):
            load_state(path, method.model)
        assert not changed(method.model, before)


def test_a_cache_is_keyed_by_content(pipeline, pictures, tmp_path):
    cache = Cache(tmp_path, pipeline, flip=True)
    examples, _ = cache.encode_examples(read_folder(pictures))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(files) == 3 * 2 + 3  # pictures and mirrored ones, captions
    one = cache.read_moments(examples[0], cache.list_views(examples[0])[0])
    image = Image.open(pictures / "0.png")  # 80 pixels wide, 70 high
    centre = image.resize((64, 64), Image.Resampling.LANCZOS, box=(5, 0, 75, 70))
    encoder = pipeline.image_encoder
    moments = keras.Model(encoder.inputs[0], encoder.layers[-2].output)
    expected = moments(np.asarray(centre, "float32")[None] / 127.5 - 1)
    assert one.shape == (8, 8, 8) and relative_error(one[None], expected) < TOLERANCE

    again = Cache(tmp_path, pipeline, flip=True)
    again.encode_examples(read_folder(pictures))
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    for path in {np.load(path).shape: path for path in files}.values():  # one of each kind
        whole, expected = path.read_bytes(), np.load(path)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        damaged = [b"", whole[:-9], bytes(flipped), np.full_like(expected, np.nan), np.zeros(2)]
        for damage in damaged:
            with open(path, "wb") as file:
                file.write(damage) if isinstance(damage, bytes) else np.save(file, damage)
            again.encode_examples(read_folder(pictures))
            assert relative_error(np.load(path), expected) < TOLERANCE
    pipeline.image_encoder.weights[0].assign(2 * pipeline.image_encoder.weights[0])
    Cache(tmp_path, pipeline).encode_examples(read_folder(pictures))
    assert len(list(tmp_path.rglob("*.npy"))) == len(files) + 3


def test_latents_and_contexts_that_are_not_finite_are_named(pipeline, pictures, tmp_path):
    cache = Cache(tmp_path, pipeline)
    for model, name in ((pipeline.text_encoder, "caption 'a <toy>"), (pipeline.image_encoder, "0")):
        kernel = model.trainable_weights[-1]
        value = keras.ops.convert_to_numpy(kernel.value).copy()
        kernel.assign(np.full_like(value, np.nan))
        with pytest.raises(ValueError, match=f"{name}.*: the weights encode it with values that"):
            cache.encode_examples(read_folder(pictures))
        kernel.assign(value)
        cache._hashes.clear()


def test_broken_pictures_are_named_and_skipped(pipeline, pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "good.png").write_bytes((pictures / "0.png").read_bytes())
    cache = Cache(tmp_path / "cache", pipeline)
    examples, broken = cache.encode_examples(read_folder(folder, ["a toy"]))
    assert [example.path.name for example in examples] == ["good.png"]
    assert len(broken) == 1 and "bad.png can't be opened" in broken[0]
    (folder / "good.png").unlink()
    with pytest.raises(ValueError, match="None of 1 images can be used: .*bad.png"):
        cache.encode_examples(read_folder(folder, ["a toy"]))


def test_optimizers():
    optimizer = make_optimizer("AdamW", 1e-3, 100, "cosine", 10, clipnorm=1.0, weight_decay=0.1)
    rates = [float(optimizer._learning_rate(step)) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4, 0], abs=1e-8)
    constant = make_optimizer("sgd", 1e-3, 100, warmup=10)
    rates = [float(constant._learning_rate(step)) for step in (5, 10, 100)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])
    assert float(make_optimizer("lion", 1e-3, 100).learning_rate) == pytest.approx(1e-3)
    for arguments, options, message in (
        (("best", 1e-3, 1), {}, "optimizer must be one of .*adamw.*, not 'best'"),
        (("sgd", 1e-3, 1, "linear"), {}, "schedule must be one of constant, cosine"),
        (("sgd", 1e-3, 1), {"beta_1": 0.9}, "sgd: .*beta_1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_optimizer(*arguments, **options)


def test_memory_is_counted():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5), keras.layers.Dense(2)])
    model.layers[0].trainable = False
    memory = count_memory(model, lambda: make_optimizer("adam", 1e-3, 1))
    assert memory["trained"] == 12 and memory["all"] == 32
    assert memory["parameters"] == 4 * 32 and memory["gradients"] == 4 * 12
    assert memory["optimizer"] == 2 * 4 * 12


@pytest.mark.torch
@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_runs_what_was_trained(few, keys, pictures, tmp_path):
    """Its pipeline loads the LoRA and the new word, and predicts the same."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    keras.utils.set_random_seed(0)
    folder = tmp_path / "weights"
    StableDiffusion(jit_compile=False, weights=None, config=undo_departures(few)).save(
        folder, dtype="float32"
    )
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline = StableDiffusion(jit_compile=False, weights=folder)
    word = TextualInversion(pipeline, TOKEN, "two words", vectors=3)
    train(word, pictures, tmp_path)
    word.save(tmp_path / "word.safetensors")
    theirs.load_textual_inversion(tmp_path / "word.safetensors")
    prompt = f"a {TOKEN} on a mat"
    context = StableDiffusion(jit_compile=False, weights=folder)
    context.load_embedding(tmp_path / "word.safetensors")
    context = context.encode_text(prompt)
    with torch.no_grad():
        encoded, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
    assert relative_error(context, encoded.numpy()) < 1e-4

    pipeline = StableDiffusion(jit_compile=False, weights=folder)
    method = LoRA(pipeline, rank=2, alpha=3.0, targets="transformers")
    train(method, pictures, tmp_path)
    method.save(tmp_path / "lora.safetensors", keys=keys)
    theirs.load_lora_weights(tmp_path / "lora.safetensors")
    latent = np.random.default_rng(0).standard_normal((1, 8, 8, 4), dtype="float32")
    inputs = [latent, timestep_embedding([300], 16), context]
    ours = keras.ops.convert_to_numpy(pipeline.diffusion_model(inputs))
    with torch.no_grad():
        sample = theirs.unet(torch.tensor(latent).movedim(-1, 1), 300, torch.tensor(context)).sample
    assert relative_error(ours, sample.movedim(1, -1).numpy()) < 1e-4
