"""The pipeline, on every backend, with tiny models of random parameters.

Pictures are uint8; where the same numbers go through differently shaped batches, they agree within
1 level. The flows at the end are those of clients of KerasCV.
"""

from dataclasses import replace
from functools import partial

import keras
import numpy as np
import pytest
from helpers import FEW
from keras import ops

from stable_diffusion import (
    Decoder,
    DiffusionModel,
    ImageEncoder,
    NoiseScheduler,
    StableDiffusion,
    StableDiffusionV2,
    TextEncoder,
)
from stable_diffusion.config import COMPONENTS, TINY, TINY_V2
from stable_diffusion.samplers.deep_cache import DeepCache

BACKEND = keras.backend.backend()
JIT = BACKEND == "jax"  # which is slow without; on the others compiling takes longer than running
H = W = 64  # pixels
h = w = 8  # latent cells
D = TINY.text.width
STEPS = 3


def randomize(model, seed=0):
    """Gives a model parameters that leave no term out: no zero biases, no unit scales."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        if len(shape) == 1:
            return 0.1 * rng.standard_normal(shape)
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))

    offset = {"gamma": 1.0}
    model.set_weights([draw(v.shape) + offset.get(v.name, 0.0) for v in model.weights])
    return model


def tiny(config=TINY, pipeline=StableDiffusion, **options):
    """Returns a pipeline whose parameters are always the same."""
    model = pipeline(jit_compile=JIT, weights=None, config=config, **options)
    for seed, part in enumerate(COMPONENTS):
        randomize(getattr(model, part), seed)
    return model


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    for seed, part in enumerate(COMPONENTS):
        randomize(getattr(tiny_pipeline, part), seed)
    return tiny_pipeline


def draw(model, prompt="a red apple", **options):
    options = {"num_steps": STEPS, "seed": 0, "verbose": 0, **options}
    return model.text_to_image(prompt, **options)


def differ(a, b):
    """Returns the greatest difference of two pictures in levels."""
    return np.abs(a.astype(int) - b).max()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


# Prompts and batches


def test_one_picture(model):
    images = draw(model)
    assert images.shape == (1, H, W, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, draw(model))


def test_the_prompt_matters(model):
    assert differ(draw(model), draw(model, "a blue cat")) > 2
    assert differ(draw(model), draw(model, negative_prompt="a blue cat")) > 2
    np.testing.assert_array_equal(draw(model), draw(model, negative_prompt=""))


def test_prompts_come_in_order_each_with_its_batch(model):
    prompts, negatives, seeds = ["a red apple", "a blue cat"], ["dull", "a green dog"], [5, 6, 7, 8]
    images = draw(model, prompts, negative_prompt=negatives, batch_size=2, seed=seeds)
    assert images.shape == (4, H, W, 3)
    for image, prompt, negative, seed in zip(
        images, np.repeat(prompts, 2), np.repeat(negatives, 2), seeds, strict=True
    ):
        alone = draw(model, str(prompt), negative_prompt=str(negative), seed=[seed])
        assert differ(image, alone[0]) <= 1
    assert min(differ(images[0], other) for other in images[1:]) > 2


def test_one_negative_prompt_for_all(model):
    prompts = ["a red apple", "a blue cat"]
    images = draw(model, prompts, negative_prompt="dull")
    assert differ(images, draw(model, prompts, negative_prompt=["dull", "dull"])) <= 1


def test_a_picture_of_a_list_of_seeds_is_the_same_in_any_batch(model):
    images = draw(model, batch_size=3, seed=[3, 1, 2])
    for image, seed in zip(images, [3, 1, 2], strict=True):
        assert differ(image, draw(model, seed=[seed])[0]) <= 1
    reversed_images = draw(model, batch_size=3, seed=np.array([2, 1, 3]))
    assert differ(images, reversed_images[::-1]) <= 1


def test_an_int_seed_is_kerascvs_noise(model):
    start = keras.random.normal((2, h, w, 4), seed=5)
    context = model.encode_text("a red apple")
    options = {"batch_size": 2, "num_steps": STEPS, "verbose": 0}
    given = model.generate_image(context, diffusion_noise=start, **options)
    np.testing.assert_array_equal(given, model.generate_image(context, seed=5, **options))


def test_without_a_seed_each_call_differs(model):
    assert differ(draw(model, seed=None), draw(model, seed=None)) > 2


PARTS = ("_text_encoder", "_diffusion_model", "_decoder", "_image_encoder")
CONTEXT = np.zeros((77, D))
WRONG = [
    *(("batch_size", value) for value in (0, -1, 2.0, True, "2", None)),
    *(("num_steps", value) for value in (0, -1, 2.5, "3", None, True, float("nan"))),
    *(("seed", value) for value in ("42", -1, 1.5, 2**32, True, [1, "2"], [-1, 0])),
    *(("unconditional_guidance_scale", value) for value in (float("nan"), float("inf"), "7", True)),
    *(("clip_skip", value) for value in (2, -1, 1.0, True, "1", None)),
    *(("deep_cache", value) for value in (0, 2.0, True, "2", None)),
    *(("first_step", value) for value in (2, -1, 1.0, True, "1", None)),
    *(("guidance_interval", value) for value in (5, (1, 2, 3), "ab", None)),
    *(("negative_prompt", value) for value in (3, [], ["a", 3], [["a"]], [None], b"a", {"a": 1})),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_arguments_are_refused_before_anything_is_built(name, value):
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    options = {"batch_size": 2 if isinstance(value, list) else 1, "num_steps": 2, "verbose": 0}
    options[name] = value
    with pytest.raises(ValueError, match=f"{name} must be "):
        model.text_to_image("a red apple", **options)
    with pytest.raises(ValueError, match=f"{name} must be "):
        model.generate_image(CONTEXT, **options)
    assert not any(getattr(model, part) for part in PARTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": "cat " * 80}, "at most 77 tokens, not 82"),
        ({"negative_prompt": ["a"] * 3}, "negative_prompt must have 1 or batch_size=2 entries"),
        ({"negative_prompt": np.zeros((3, 77, D))}, "negative_prompt must have 1 or batch_size=2"),
        ({"negative_prompt": np.zeros((0, 77, D))}, "negative_prompt must have 1 or batch_size=2"),
        ({"first_step": 1}, "first_step 1 needs the latent where it begins"),
        ({"diffusion_noise": np.zeros((h, w, 4))}, "diffusion_noise or seed, not both"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(options, message):
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    options = {"batch_size": 2, "num_steps": 2, "seed": 0, "verbose": 0} | options
    for use, given in ((model.text_to_image, "a red apple"), (model.generate_image, CONTEXT)):
        with pytest.raises(ValueError, match=message):
            use(given, **options)
    assert not any(getattr(model, part) for part in PARTS)


@pytest.mark.parametrize("clip_skip", [2, -1, 1.0, True, "1", None])
def test_clip_skip_is_checked_before_anything_is_built(clip_skip):
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    with pytest.raises(ValueError, match="clip_skip must be an int from 0 to 1, not "):
        model.encode_text("a red apple", clip_skip)
    assert not any(getattr(model, part) for part in PARTS)


def test_clip_skip_of_a_text_encoder_of_ones_own():
    """It has as many layers as it has, whatever the config says; another kind has one."""
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    config = replace(TINY.text, depth=4)
    model._text_encoder = TextEncoder(77, config=config, download_weights=False)
    assert model.encode_text("x", 3).shape == (1, 77, D)
    model._text_encoder = keras.Sequential()
    with pytest.raises(ValueError, match="clip_skip must be an int from 0 to 0, not 1"):
        model.encode_text("x", 1)


@pytest.mark.parametrize("prompt", [None, [], 3, ["a", 3], [["a"]], [None], b"a", {"a": 1}])
def test_wrong_prompts_are_refused_before_anything_is_built(prompt):
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    for use in (model.text_to_image, model.encode_text):
        with pytest.raises(ValueError, match="prompt must be a str or a list of at least one"):
            use(prompt)
    assert not any(getattr(model, part) for part in PARTS)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array])
def test_integers_of_any_type(model, integer):
    numbers = {"batch_size": 2, "num_steps": 3, "seed": 5, "clip_skip": 1, "deep_cache": 2}
    numbers["first_step"], latent = 1, noise(h, w, 4)
    expected = draw(model, latent=latent, **numbers)
    numbers = {name: integer(value) for name, value in numbers.items()}
    given = draw(model, latent=latent, **numbers)
    np.testing.assert_array_equal(given, expected)
    seeds = [integer(5), integer(6)]
    np.testing.assert_array_equal(
        draw(model, batch_size=2, num_steps=2, seed=seeds),
        draw(model, batch_size=2, num_steps=2, seed=[5, 6]),
    )


def test_sizes_of_any_integer_type():
    model = StableDiffusion(np.int64(64), np.int32(128), weights=None, config=TINY)
    assert (model.img_height, model.img_width) == (64, 128)


def test_a_model_for_inpainting_needs_more_than_a_prompt():
    config = replace(TINY, unet=replace(TINY.unet, in_channels=9))
    model = StableDiffusion(jit_compile=False, weights=None, config=config)
    for use in (model.text_to_image, partial(model.generate_image, np.zeros((77, D)))):
        with pytest.raises(ValueError, match="9 channels of input.* inpainting"):
            use("a red apple")
    assert not any(getattr(model, part) for part in PARTS)


def test_wrong_number_of_seeds_negatives_and_contexts(model):
    for wrong in (
        {"seed": [1, 2, 3]},
        {"negative_prompt": ["a", "b", "c"]},
    ):
        with pytest.raises(ValueError, match="2.*not 3"):
            draw(model, ["x", "y"], **wrong)
    with pytest.raises(ValueError, match="encoded_text must have 1 or batch_size=2 entries, not 3"):
        model.generate_image(np.zeros((3, 77, D)), batch_size=2, seed=0, verbose=0)


def test_no_prompts(model):
    with pytest.raises(ValueError, match="prompt.*at least one"):
        draw(model, [])


@pytest.mark.parametrize("word", ["cat", "🐱"])
def test_too_long_prompts(model, word):
    longest = "cat " * 75
    assert model.encode_text(longest).shape == (1, 77, D)
    too_long = longest + word
    count = len(model.tokenizer.encode(too_long))
    with pytest.raises(ValueError, match=f"at most 77 tokens.* {count}.*: 'cat cat"):
        model.encode_text(too_long)
    with pytest.raises(ValueError, match=f"at most 77 tokens.* {count}"):
        draw(model, negative_prompt=too_long)


def test_a_prompt_as_long_as_a_book_is_refused_before_it_is_tokenized(model, monkeypatch):
    blank = "a cat" + " \n" * 100_000  # white space makes no tokens
    np.testing.assert_array_equal(model.tokenize(blank), model.tokenize("a cat"))
    edge = model.tokenizer._longest * 768  # with start and end 770 tokens at least
    with pytest.raises(ValueError, match="at most 77 tokens, not "):
        model.tokenize("x" * edge)
    monkeypatch.setattr(model.tokenizer, "encode", None)
    with pytest.raises(ValueError, match="at most 77 tokens, not 771: 'x+'[.]{3}$") as error:
        model.tokenize("x" * (edge + 1))
    assert len(str(error.value)) < 300


# Encoded texts and noise


def test_encode_text(model):
    one, two = model.encode_text("a red apple"), model.encode_text(["a red apple", "x"])
    assert one.shape == (1, 77, D) and two.shape == (2, 77, D)
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)


def test_clip_skip(model, monkeypatch):
    """One layer less is a text encoder that was built with one layer less."""
    one = TextEncoder(77, config=replace(TINY.text, depth=1), download_weights=False)
    whole = {layer.name: layer for layer in model.text_encoder.layers}
    for layer in one.layers:
        layer.set_weights(whole[layer.name].get_weights())
    other = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    other._text_encoder = one
    prompts = ["a red apple", "x"]
    skipped, expected = model.encode_text(prompts, 1), other.encode_text(prompts)
    np.testing.assert_allclose(skipped, expected, atol=1e-5)
    assert differ(skipped, model.encode_text(prompts)) > 0.1
    np.testing.assert_array_equal(model.encode_text(prompts, 0), model.encode_text(prompts))

    seen, predict = [], model._predict

    def spy(unet, latent, timestep, context, negative, *scales):
        seen.append((context, negative))
        return predict(unet, latent, timestep, context, negative, *scales)

    monkeypatch.setattr(model, "_predict", spy)
    draw(model, "a red apple", negative_prompt="x", clip_skip=1)
    np.testing.assert_allclose(np.concatenate(seen[0]), expected, atol=1e-5)
    for wrong in (2, -1, 1.0, True, "1", None):
        with pytest.raises(ValueError, match="clip_skip must be an int from 0 to 1, not "):
            model.encode_text("x", wrong)


def test_shapes_of_an_encoded_text(model):
    context = np.asarray(model.encode_text("a red apple"))
    options = {"batch_size": 2, "num_steps": STEPS, "seed": 0, "verbose": 0}
    expected = draw(model, batch_size=2)
    for given in (context, context[0], np.repeat(context, 2, 0), ops.convert_to_tensor(context[0])):
        np.testing.assert_array_equal(model.generate_image(given, **options), expected)


def test_shapes_of_the_noise(model):
    context, start = model.encode_text("a red apple"), noise(h, w, 4)
    options = {"num_steps": STEPS, "verbose": 0}
    two = model.generate_image(context, batch_size=2, diffusion_noise=start, **options)
    # With AVX2 or without oneDNN, equal rows of a batch come out of TensorFlow 1e-6 apart.
    np.testing.assert_allclose(two[0].astype(int), two[1], atol=1)
    for given in (
        np.stack([start, start]),
        start.astype("float64"),
        start[None],
        ops.convert_to_tensor(start),
    ):
        images = model.generate_image(context, batch_size=2, diffusion_noise=given, **options)
        np.testing.assert_array_equal(images, two)
    with pytest.raises(ValueError, match="diffusion_noise must have 1 or batch_size=2 entries"):
        model.generate_image(context, batch_size=2, diffusion_noise=noise(3, h, w, 4))


def test_noise_and_seed_exclude_each_other(model):
    with pytest.raises(ValueError, match="diffusion_noise or seed, not both"):
        model.generate_image(np.zeros((77, D)), diffusion_noise=noise(h, w, 4), seed=0)


# Steps


class Spy:
    """Counts what goes through a model."""

    def __init__(self, monkeypatch, model):
        self.batches, self.timesteps = [], []
        predict = model.predict_on_batch

        def spy(inputs):
            self.batches.append({len(value) for value in keras.tree.flatten(inputs)})
            return predict(inputs)

        monkeypatch.setattr(model, "predict_on_batch", spy)


@pytest.mark.parametrize(("scale", "copies"), [(0, 1), (1, 1), (1.0, 1), (1.5, 2), (7.5, 2)])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_one_pass_a_step(model, monkeypatch, scale, copies, batch_size):
    unet, encoder = Spy(monkeypatch, model.diffusion_model), Spy(monkeypatch, model.text_encoder)
    draw(model, batch_size=batch_size, unconditional_guidance_scale=scale)
    assert unet.batches == [{copies * batch_size}] * STEPS
    assert len(encoder.batches) == copies


def test_guidance_of_one_is_the_prompt_alone(model):
    """Equation 6 of Ho and Salimans with a scale of 1, which the code leaves out."""
    alone = draw(model, unconditional_guidance_scale=1.0)
    assert differ(alone, draw(model, unconditional_guidance_scale=1.0 + 1e-6)) <= 1
    assert differ(alone, draw(model, unconditional_guidance_scale=7.5)) > 2


def test_callback(model):
    seen = []
    draw(model, batch_size=2, callback=lambda *arguments: seen.append(arguments))
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert [t for _, t, *_ in seen] == [t for t, _ in TINY.schedule.levels(STEPS)[:-1]]
    assert all(type(step) is int and type(t) is int for step, t, *_ in seen)
    for _, _, *latents in seen:
        for latent in latents:
            assert latent.shape == (2, h, w, 4) and latent.dtype == np.float32
    last = np.asarray(model.decoder.predict_on_batch(seen[-1][2]))
    expected = np.clip((last + 1) / 2 * 255, 0, 255).astype("uint8")
    np.testing.assert_array_equal(draw(model, batch_size=2), expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counts TensorFlow's traces")
def test_batches_of_any_size_are_traced_twice(monkeypatch):
    """For the first size, and for any; guidance that ends adds none."""
    model = tiny(FEW)
    for batch_size in (1, 2, 3, 5, 1):
        draw(model, batch_size=batch_size, num_steps=2, guidance_interval=(500, 1000))
    for part in (model.text_encoder, model.diffusion_model, model.decoder):
        assert part.predict_function.experimental_get_tracing_count() <= 2


def test_an_exception_in_the_callback_stops_the_drawing(model):
    def stop(step, timestep, latent, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, callback=stop)


def test_verbose(model, capsys):
    draw(model)
    assert capsys.readouterr() == ("", "")
    draw(model, verbose=1)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "unipc"])
def test_samplers(model, monkeypatch, sampler):
    """One pass a step, and with many steps nearly DDIM's picture."""
    unet, seen = Spy(monkeypatch, model.diffusion_model), []
    images = draw(model, sampler=sampler, callback=lambda *arguments: seen.append(arguments[:2]))
    assert unet.batches == [{2}] * STEPS
    assert seen == [(0, 999), (1, 666), (2, 333)]
    assert differ(images, draw(model)) > 2
    options = {"unconditional_guidance_scale": 1}
    many = draw(model, sampler=sampler, num_steps=30, **options)
    assert np.abs(many.astype(int) - draw(model, num_steps=100, **options)).mean() < 2


def test_a_sampler_of_ones_own(model):
    def jump(denoise, latent, levels, next_noise):
        for timestep, alpha in levels[:-1]:
            latent, _ = denoise(latent, alpha)  # the timestep follows from alpha
            yield timestep, latent + 0 * next_noise(), latent

    seen = []
    draw(model, sampler=jump, callback=lambda *arguments: seen.append(arguments[:2]))
    assert seen == [(0, 999), (1, 500), (2, 0)]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"sampler": "best"},
            "sampler must be one of ddim, ddpm, .*lcm, or .*not 'best'",
        ),
        ({"sampler": "unipc", "num_steps": 1000}, "num_steps must be an int from 1 to 999"),
        ({"guidance_interval": 5}, "guidance_interval must be two timesteps.*not 5"),
        ({"guidance_interval": (1, 2, 3)}, "guidance_interval must be two timesteps"),
        ({"guidance_interval": "ab"}, "guidance_interval must be two timesteps"),
        ({"guidance_interval": (np.nan, 1)}, "guidance_interval must be two timesteps"),
    ],
)
def test_wrong_options_of_sampling(model, option, message):
    with pytest.raises(ValueError, match=message):
        draw(model, **option)


def test_guidance_within_an_interval(model, monkeypatch):
    """Timesteps are 999, 500 and 0."""
    unet, whole = Spy(monkeypatch, model.diffusion_model), draw(model)
    for interval, batches in [
        ((0, 999), [{2}, {2}, {2}]),
        ((500, 999), [{2}, {2}, {1}]),
        ((1, 998), [{1}, {2}, {1}]),
        ((1, 2), [{1}, {1}, {1}]),
    ]:
        unet.batches.clear()
        images = draw(model, guidance_interval=interval)
        assert unet.batches == batches
        # The last step, which starts at timestep 0, takes hardly any noise away.
        assert (differ(images, whole) <= 1) == (interval[1] == 999)
    assert differ(images, draw(model, unconditional_guidance_scale=1)) <= 1


def test_encoded_negative_prompts(model, monkeypatch):
    negative, expected = model.encode_text("a dog"), draw(model, negative_prompt="a dog")
    context = model.encode_text("a red apple")
    encoder = Spy(monkeypatch, model.text_encoder)
    for given in (negative, negative[0], ops.convert_to_tensor(negative)):
        images = model.generate_image(context, given, num_steps=STEPS, seed=0, verbose=0)
        np.testing.assert_array_equal(images, expected)
    assert not encoder.batches


class Count:
    """Counts calls of the two halves of a UNet."""

    def __init__(self, monkeypatch, model):
        model = DeepCache(model, 2)
        self.whole, self.shallow = Spy(monkeypatch, model.whole), Spy(monkeypatch, model.shallow)

    def __call__(self):
        counts = len(self.whole.batches), len(self.shallow.batches)
        self.whole.batches.clear(), self.shallow.batches.clear()
        return counts


def test_deep_cache(model, monkeypatch):
    count, plain = Count(monkeypatch, model.diffusion_model), draw(model, num_steps=7)
    assert count() == (0, 0)
    images = draw(model, num_steps=7, deep_cache=3)
    assert count() == (3, 4)
    assert 1 < differ(images, plain)
    assert differ(images, draw(model, num_steps=7, deep_cache=3)) == 0, "it starts anew"
    assert count() == (3, 4)
    draw(model, num_steps=4, deep_cache=4, guidance_interval=(0, 500))  # the first two without
    assert count() == (2, 2)


def test_deep_features_used_at_once_are_exact(model):
    """The two halves, one after the other, are the whole."""
    inputs = [noise(2, h, w, 4), noise(2, 32, seed=1), noise(2, 77, D, seed=2)]
    expected = np.asarray(model.diffusion_model.predict_on_batch(inputs))
    cached = DeepCache(model.diffusion_model, 2)
    for step in range(2):
        cached.step = step
        np.testing.assert_allclose(cached.predict_on_batch(inputs), expected, atol=1e-4)
    assert cached.whole_step == 0


def test_deep_cache_counts_steps_and_not_runs(model, monkeypatch):
    """A sampler that runs the model twice in a step has the whole UNet twice in a whole step."""
    count = Count(monkeypatch, model.diffusion_model)

    def twice(denoise, latent, levels, next_noise):
        for timestep, alpha in levels[:-1]:
            for _ in range(2):
                x0, _ = denoise(latent, alpha, timestep)
            latent = yield timestep, x0, x0
            latent = x0 if latent is None else latent

    draw(model, num_steps=4, deep_cache=2, sampler=twice)
    assert count() == (4, 4)


def test_deep_cache_needs_levels():
    config = replace(TINY.unet, widths=(32,), heads=(2,), attention=(True,))
    unet = DiffusionModel(8 * h, 8 * w, 77, download_weights=False, config=config)
    for model in (unet, keras.Sequential()):
        with pytest.raises(ValueError, match="needs a DiffusionModel of several stages"):
            DeepCache(model, 2)


@pytest.mark.parametrize("timesteps", [[999, 500, 0], [999]], ids=len)
def test_ddim_is_the_papers(model, timesteps):
    """The loop written out with equation 12 of Song et al. in float64."""
    latent, alphas = noise(1, h, w, 4).astype("float64"), TINY.schedule.alphas_cumprod
    contexts = [np.asarray(model.encode_text(text)) for text in ("", "a red apple")]
    for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
        frequencies = 10000.0 ** (-np.arange(16) / 16)
        embedding = np.concatenate([np.cos(t * frequencies), np.sin(t * frequencies)])[None]
        without, with_prompt = (
            np.asarray(model.diffusion_model.predict_on_batch([latent, embedding, context]))
            for context in contexts
        )
        predicted = without + 7.5 * (with_prompt - without).astype("float64")
        before = 1.0 if previous is None else alphas[previous]
        x0 = (latent - np.sqrt(1 - alphas[t]) * predicted) / np.sqrt(alphas[t])
        latent = np.sqrt(before) * x0 + np.sqrt(1 - before) * predicted
    decoded = np.asarray(model.decoder.predict_on_batch(latent.astype("float32")))
    expected = np.clip((decoded + 1) * 127.5, 0, 255).astype("uint8")
    options = {"num_steps": len(timesteps), "diffusion_noise": noise(1, h, w, 4), "verbose": 0}
    assert differ(model.generate_image(contexts[1], **options), expected) <= 1


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.5, None])
def test_wrong_num_steps(model, num_steps):
    with pytest.raises(ValueError, match="num_steps must be an int from 1 to 1000"):
        draw(model, num_steps=num_steps)


def test_timestep_embedding(model):
    embedding = ops.convert_to_numpy(model._get_timestep_embedding(3, 2))
    assert embedding.shape == (2, 320)
    np.testing.assert_allclose(embedding[1, [0, 160]], [np.cos(3), np.sin(3)], rtol=1e-6)


# Sizes and parts


@pytest.mark.parametrize("size", [100, 8, 63.9, "64", -64])
def test_wrong_sizes(size):
    for sizes in ({"img_height": size}, {"img_width": size}):
        with pytest.raises(ValueError, match=f"multiples of 16 pixels, not {size!r}"):
            StableDiffusion(**sizes, weights=None, config=TINY)
    with pytest.raises(ValueError, match="multiples of 64 pixels, not 96"):
        StableDiffusion(96, 512, weights=None)


def test_sizes(eagerly):
    model = StableDiffusion(weights=None, config=TINY)
    assert (model.img_height, model.img_width) == (64, 64)
    model = StableDiffusion(weights=None)
    assert (model.img_height, model.img_width) == (512, 512)
    model = StableDiffusion(32, 48, jit_compile=JIT, weights=None, config=TINY)
    assert draw(model, num_steps=1).shape == (1, 32, 48, 3)


def test_parts_are_built_when_first_asked_for():
    model = StableDiffusion(weights=None, jit_compile=JIT, config=TINY)
    parts = {
        "_text_encoder": TextEncoder,
        "_diffusion_model": DiffusionModel,
        "_decoder": Decoder,
        "_image_encoder": ImageEncoder,
    }
    for name, kind in parts.items():
        assert getattr(model, name) is None
        part = getattr(model, name[1:])
        assert isinstance(part, kind) and getattr(model, name) is part
        assert getattr(model, name[1:]) is part
    assert model._tokenizer is None
    assert model.tokenizer is model.tokenizer


def test_drawing_needs_no_image_encoder(eagerly):
    fresh = StableDiffusion(weights=None, jit_compile=JIT, config=TINY)
    draw(fresh, num_steps=1)
    assert fresh._image_encoder is None


def test_assigned_parts_are_used(model):
    other = StableDiffusion(weights=None, jit_compile=JIT, config=TINY)
    for part in ("_text_encoder", "_diffusion_model", "_decoder", "_tokenizer"):
        setattr(other, part, getattr(model, part))
    np.testing.assert_array_equal(draw(other), draw(model))
    other._tokenizer = type(
        "Tokenizer", (), {"encode": lambda self, text: [49406, 5, 49407], "end_of_text": 49407}
    )()
    np.testing.assert_array_equal(draw(other, "x"), draw(other, "y"))


def test_v2(eagerly):
    model = tiny(TINY_V2, StableDiffusionV2)
    assert draw(model, num_steps=1).shape == (1, H, W, 3)


def test_v2s_defaults():
    model = StableDiffusionV2(weights=None)
    assert model.config.text.width == 1024 and model.config.unet.context_width == 1024
    assert StableDiffusion(weights=None).config.unet.context_width == 768


def test_inputs_as_list_tuple_and_dict(eagerly):
    model = tiny(FEW)  # which runs eagerly: each kind has a graph of its own
    inputs = {
        "latent": noise(2, h, w, 4),
        "timestep_embedding": noise(2, FEW.unet.widths[0], seed=1),
        "context": noise(2, 77, FEW.text.width, seed=2),
    }
    listed = list(inputs.values())
    results = [
        model.diffusion_model.predict_on_batch(given) for given in (inputs, listed, tuple(listed))
    ]
    results.append(ops.convert_to_numpy(model.diffusion_model(listed)))
    results.append(ops.convert_to_numpy(model.diffusion_model(inputs)))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-4)

    tokens, positions = np.full((2, 77), 7, "int32"), np.tile(np.arange(77, dtype="int32"), (2, 1))
    inputs = {"tokens": tokens, "positions": positions}
    results = [
        model.text_encoder.predict_on_batch(given)
        for given in (inputs, [tokens, positions], (tokens, positions))
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.filterwarnings("ignore:The structure of `inputs`:UserWarning")  # a list of one
def test_image_encoder(model):
    pictures = np.tanh(noise(2, 32, 48, 3))
    encoder = model.image_encoder
    latents = np.asarray(encoder.predict_on_batch(pictures))
    assert latents.shape == (2, 4, 6, 4)
    moments = keras.Model(encoder.inputs, encoder.layers[-2].output).predict_on_batch(pictures)
    assert moments.shape == (2, 4, 6, 8)
    np.testing.assert_allclose(latents, moments[..., :4] * 0.18215, atol=1e-5)


# Precision and compilers


@pytest.fixture
def dtype_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    "policy",
    [
        "mixed_float16",
        pytest.param("mixed_bfloat16", marks=pytest.mark.large),
        pytest.param("float16", marks=pytest.mark.large),
        "bfloat16",
    ],
)
def test_dtype_policies(dtype_policy, model, policy, eagerly):
    expected = draw(model, num_steps=2)
    dtype_policy(policy)
    other = tiny()
    seen = []
    images = draw(
        other, num_steps=2, callback=lambda step, timestep, latent, x0: seen.append(latent)
    )
    assert images.shape == (1, H, W, 3) and images.dtype == np.uint8
    assert all(np.isfinite(latent).all() and latent.dtype == np.float32 for latent in seen)
    assert np.abs(images.astype(int) - expected).mean() < (4 if "float16" == policy[-7:] else 16)
    context = np.asarray(other.encode_text("a red apple"), "float32")
    assert np.isfinite(context).all()
    assert np.isfinite(
        np.asarray(other.image_encoder.predict_on_batch(np.tanh(noise(1, H, W, 3))), "float32")
    ).all()


@pytest.mark.parametrize(
    "pipeline",
    [StableDiffusion]
    if BACKEND == "jax"
    else [pytest.param(StableDiffusion, marks=pytest.mark.large)],
)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own: deprecations, what it can't trace
def test_jit_compile(model, pipeline):
    compiled = pipeline(jit_compile=True, weights=None, config=TINY)
    for part in ("text_encoder", "diffusion_model", "decoder"):
        getattr(compiled, part).set_weights(getattr(model, part).get_weights())
        assert getattr(compiled, part).jit_compile
    assert differ(draw(compiled), draw(model)) <= 2


# Files


@pytest.mark.parametrize("part", ["text_encoder", "diffusion_model", "decoder", "image_encoder"])
def test_save_and_load_weights(model, part, tmp_path):
    path = tmp_path / "x.weights.h5"
    getattr(model, part).save_weights(path)
    fresh = getattr(StableDiffusion(weights=None, jit_compile=JIT, config=TINY), part)
    fresh.load_weights(path)
    for a, b in zip(fresh.get_weights(), getattr(model, part).get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# What clients of KerasCV do


def test_textual_inversion(model):
    """As in Keras' guide: the model learns a new word."""
    client = StableDiffusion(weights=None, jit_compile=JIT, config=TINY)
    client._diffusion_model, client._decoder = model.diffusion_model, model.decoder
    client._text_encoder = model.text_encoder
    assert client.tokenizer.add_tokens("<my-funny-cat-token>") == 1
    ids = client.tokenizer.encode("a photo of <my-funny-cat-token>")
    assert ids[-2] == 49408

    old = client.text_encoder.layers[2].token_embedding.get_weights()[0]
    new = np.concatenate([old, old[2368:2369]])  # starts as a cat
    encoder = TextEncoder(77, vocab_size=49409, download_weights=False, config=TINY.text)
    for index, layer in enumerate(client.text_encoder.layers):
        if index != 2:
            encoder.layers[index].set_weights(layer.get_weights())
    assert "clip_embedding" in encoder.layers[2].name
    encoder.layers[2].token_embedding.set_weights([new])
    encoder.layers[2].position_embedding.set_weights(
        client.text_encoder.layers[2].position_embedding.get_weights()
    )
    before = draw(client, "a photo of a cat")
    client._text_encoder = encoder
    client._text_encoder.compile(jit_compile=JIT)
    assert differ(draw(client, "a photo of a cat"), before) <= 1
    assert differ(draw(client, "a photo of a <my-funny-cat-token>"), before) <= 1

    for layer in encoder.layers:
        layer.trainable = "clip_embedding" in layer.name
    encoder.layers[2].position_embedding.trainable = False
    assert len(encoder.trainable_weights) == 1
    assert encoder.trainable_weights[0] is encoder.layers[2].token_embedding.weights[0]
    if BACKEND != "tensorflow":
        return
    import tensorflow as tf

    tokens = np.array([ids + [49407] * (77 - len(ids))])
    with tf.GradientTape() as tape:
        context = encoder([tokens, np.arange(77)[None]])
        inputs = [tf.constant(noise(1, h, w, 4)), tf.constant(noise(1, 32)), context]
        loss = tf.reduce_mean(tf.square(model.diffusion_model(inputs, training=True)))
    (gradient,) = tape.gradient(loss, [encoder.trainable_weights[0].value])
    assert isinstance(gradient, tf.IndexedSlices)
    assert set(ids) == set(gradient.indices.numpy().ravel())
    own = gradient.values.numpy().reshape(-1, D)[gradient.indices.numpy().ravel() == 49408]
    assert np.abs(own).max() > 0


def test_fine_tuning(model):
    """As in Keras' guide to fine-tuning: a step of training the diffusion model."""
    encoder = ImageEncoder(download_weights=False, config=TINY.vae)
    vae = keras.Model(encoder.inputs[0], encoder.layers[-2].output)
    mean, log_variance = ops.split(vae(np.tanh(noise(2, H, W, 3)), training=False), 2, axis=-1)
    log_variance = ops.clip(log_variance, -30, 20)
    latents = mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=0)
    latents = latents * 0.18215
    scheduler, timesteps = NoiseScheduler(), np.array([10, 900])
    target = keras.random.normal(ops.shape(latents), seed=1)
    noisy = scheduler.add_noise(ops.cast(latents, target.dtype), target, timesteps)
    embedding = [model._get_timestep_embedding(int(t), 1, 32) for t in timesteps]
    embedding = ops.concatenate(embedding)
    context = ops.repeat(model.encode_text("a cat"), 2, axis=0)

    unet = DiffusionModel(H, W, 77, download_weights=False, config=TINY.unet)
    unet.set_weights(model.diffusion_model.get_weights())
    output = unet([noisy, embedding, context], training=True)
    assert tuple(output.shape) == (2, h, w, 4)
    unet.compile(keras.optimizers.SGD(1e-2), loss="mse", jit_compile=JIT, run_eagerly=not JIT)
    inputs = [ops.convert_to_numpy(x) for x in (noisy, embedding, context)]
    losses = [unet.train_on_batch(inputs, ops.convert_to_numpy(target)) for _ in range(3)]
    assert losses[-1] < losses[0]
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(unet.get_weights(), model.diffusion_model.get_weights(), strict=True)
    ]
    assert all(changed)


def test_latent_walk(model):
    """As in Keras' guide: from one prompt to another, and in a circle through the noise."""
    a, b = (ops.squeeze(model.encode_text(text)) for text in ("a red apple", "a blue cat"))
    walk = ops.linspace(a, b, 4)
    start = keras.random.normal((h, w, 4), seed=3)
    options = {"num_steps": STEPS, "diffusion_noise": start, "verbose": 0}
    batches = [model.generate_image(batch, batch_size=2, **options) for batch in ops.split(walk, 2)]
    images = np.concatenate(batches)
    assert images.shape == (4, H, W, 3)
    for image, end in ((images[0], a), (images[-1], b)):
        assert differ(image, model.generate_image(end, **options)[0]) <= 1

    x, y = noise(h, w, 4), noise(h, w, 4, seed=1)
    angles = np.linspace(0, 2 * np.pi, 3)[:, None, None, None]
    circle = np.cos(angles) * x + np.sin(angles) * y
    images = model.generate_image(
        a, batch_size=3, num_steps=STEPS, diffusion_noise=circle, verbose=0
    )
    assert differ(images[0], images[2]) <= 1 < differ(images[0], images[1])
