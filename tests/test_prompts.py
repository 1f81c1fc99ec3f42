"""The web interface's syntax of prompts: what it reads, equal; contexts within 1e-5."""

import json

import keras
import numpy as np
import pytest
from helpers import DATA

from stable_diffusion import DiffusionModel, StableDiffusion
from stable_diffusion.added_tokens import expand_tokens
from stable_diffusion.checkpoints.openvino import OpenVINOFolder
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.config import TINY, TINY_V2
from stable_diffusion.prompts import (
    MOST_CHUNKS,
    find_schedule,
    read_weights,
    split_loras,
    split_prompt,
    split_tokens,
    weigh_context,
)

JIT = keras.backend.backend() == "jax"
D = TINY.text.width
TABLE = json.loads((DATA / "prompts_golden.json").read_text("utf-8"))
WEBUI = {"prompt_syntax": "webui"}
OPTIONS = {"num_steps": 2, "verbose": 0, "seed": 0}
LONG = "cat, " * 60  # two chunks


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = SimpleTokenizer()
    tokenizer.add_tokens(["<one>", "<five>", *(f"<five>_{n}" for n in range(1, 5))])
    expand_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    """Its contexts have a mean that is not 0, as those of trained models."""
    tiny_pipeline.text_encoder.layers[-1].beta.assign(np.full(D, 0.3))
    return tiny_pipeline


# What the web interface reads


@pytest.mark.quick
def test_parts_and_weights_are_the_web_interfaces():
    assert len(TABLE) >= 60
    for row in TABLE:
        assert read_weights(row["prompt"]) == row["parts"], row["prompt"]


@pytest.mark.quick
def test_chunks_are_the_web_interfaces(tokenizer):
    """Their ids and weights; its words of several vectors are ours."""
    assert {len(row["chunks"]) for row in TABLE} >= {1, 2, 3}
    for row in TABLE:
        found = split_tokens(read_weights(row["prompt"]), tokenizer)
        expected = [
            [*zip(chunk["ids"][1:], chunk["weights"][1:], strict=True)] for chunk in row["chunks"]
        ]
        assert [[tuple(pair) for pair in chunk] for chunk in found] == expected, row["prompt"]


def test_weights_are_those_of_its_documentation():
    """Stated by hand: 1.1 to the number of brackets; \\ before a bracket; what is not closed."""
    for prompt, expected in [
        ("(word)", [["word", 1.1]]),
        ("((word))", [["word", pytest.approx(1.21)]]),
        ("[word]", [["word", pytest.approx(1 / 1.1)]]),
        ("(word:1.5)", [["word", 1.5]]),
        ("(word:0.25)", [["word", 0.25]]),
        ("\\(word\\)", [["(word)", 1.0]]),
        ("a (b [c", [["a ", 1.0], ["b ", 1.1], ["c", pytest.approx(1)]]),
        ("a BREAK b", [["a", 1.0], ["BREAK", -1], ["b", 1.0]]),
        ("a # (b)\nc # d", [["a \nc ", 1.0]]),
    ]:
        assert read_weights(prompt) == expected


def test_chunks_of_a_prompt_are_complete(model):
    """A start token, 75 ids, an end token and padding, of which Stable Diffusion 2 has its own."""
    [(ids, weights)] = split_prompt(model, "a (cat:1.5)")
    assert ids == [49406, 320, 2368, *[49407] * 74] == model.tokenize("a cat")
    assert weights == [1, 1, 1.5, *[1] * 74]
    padded = TINY_V2.text.__class__(**vars(TINY_V2.text) | {"pad_token": 0})
    other = StableDiffusion(jit_compile=False, weights=None, config=TINY_V2)
    other.config = TINY_V2.__class__(**vars(TINY_V2) | {"text": padded})
    [(ids, _)] = split_prompt(other, "a (cat:1.5)")
    assert ids == [49406, 320, 2368, 49407, *[0] * 73]
    (full, _), (rest, _) = split_prompt(other, "cat " * 76)
    assert full == [49406, *[2368] * 75, 49407] and rest[:4] == [49406, 2368, 49407, 0]


# What is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat AND a dog", "AND between prompts is not supported"),
        ("a cat :1.2 AND a dog:0.5", "AND between prompts is not supported"),
        ("a cat, 16:9", "':9' at its end weighs a prompt before AND"),
        ("a [cat:dog:0.5] there", r"\[cat:dog:0.5\] changes the prompt during sampling"),
        ("a [cat:10]", r"\[cat:10\] changes the prompt"),
        ("a [cat::0.5]", r"\[cat::0.5\] changes the prompt"),
        ("a ([cat: dog : .5 ]:1.3)", r"\[cat: dog : .5 \] changes"),
        ("a [cat|dog] there", r"\[cat\|dog\] changes the prompt"),
        ("a (cat:1.2.3)", "weight 1.2.3 is not a number"),
        (f"a (cat:{'9' * 400})", "weight 9+ is not a number"),
        ("a cat <lora:blip:0.8>", "<lora:blip:0.8> is not part of a text: call load_lora"),
        ("a cat <hypernet:x>", "<hypernet:x> is not part of a text"),
    ],
)
def test_what_is_not_supported_is_refused_before_anything_is_built(prompt, message):
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    for use in (
        lambda: model.encode_text(prompt, **WEBUI),
        lambda: model.encode_text(["a", prompt], **WEBUI),
        lambda: model.text_to_image(prompt, **OPTIONS, **WEBUI),
        lambda: model.text_to_image("a", negative_prompt=prompt, **OPTIONS, **WEBUI),
        lambda: model.generate_image(np.zeros((77, D)), prompt, **OPTIONS, **WEBUI),
    ):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not model._text_encoder and not model._diffusion_model
    if "9999" not in prompt:
        assert model.tokenize(prompt), "without the syntax it is text"


@pytest.mark.parametrize(
    "prompt",
    [
        "sANDy BRAND",
        "a cat: 3 dogs",
        "(a cat:1.2)",
        "[cat:dog]",
        "[cat:dog:red:0.5]",
        "[cat:dog:0.5 there",
        "[cat (dog:0.5]",
        r"\[cat:dog:0.5\]",
        r"[cat\:dog\:0.5]",
        "a | b [c:d:0.5]",
        "(a | b)",
        "[cat:dog:half]",
    ],
)
def test_what_is_text_is_not_refused(prompt, model):
    assert find_schedule(prompt) is None
    assert split_prompt(model, prompt)


@pytest.mark.parametrize("syntax", ["a1111", "", True, 1, ["webui"]])
def test_another_syntax_is_refused(syntax):
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    for use in (
        lambda: model.encode_text("a", prompt_syntax=syntax),
        lambda: model.text_to_image("a", **OPTIONS, prompt_syntax=syntax),
        lambda: model.generate_image(np.zeros((77, D)), **OPTIONS, prompt_syntax=syntax),
    ):
        with pytest.raises(ValueError, match="prompt_syntax must be None or one of webui, not "):
            use()
    assert not model._text_encoder and not model._diffusion_model


def test_a_book_is_refused_before_it_is_tokenized(model, monkeypatch):
    limit = 77 * MOST_CHUNKS
    monkeypatch.setattr(model.tokenizer, "encode", None)
    with pytest.raises(ValueError, match=rf"contexts of {limit} tokens, not \d+, .*'[.]{{3}}$"):
        split_prompt(model, "word " * 200_000)


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a cat", "a cat", []),
        ("a <lora:blip:0.8> cat", "a  cat", [("blip", 0.8)]),
        ("a cat<lora:blip>", "a cat", [("blip", 1.0)]),
        ("<lora:a:1><lyco:b c:-.5>", "", [("a", 1.0), ("b c", -0.5)]),
        ("<lora:a:1><lora:a:0.5:0.5>", "", [("a", 1.0), ("a", 0.5)]),
        ("a # <lora:a:1>", "a ", []),
        ("a < b > c", "a < b > c", []),
    ],
)
def test_split_loras(prompt, text, loras):
    assert split_loras(prompt) == (text, loras)


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<lora:a:x>", "has a scale that is not a number"),
        ("<lora:a:nan>", "has a scale that is not a number"),
        ("<lora:a:te=1>", "has a scale that is not a number"),
        ("<lora:a:1:0.5>", "has several scales"),
        ("<lora:a:1:1:1>", "has several scales"),
        ("<hypernet:a:1>", "is not supported"),
    ],
)
def test_loras_that_are_refused(tag, message):
    with pytest.raises(ValueError, match=f"^{tag} {message}"):
        split_loras(f"a cat {tag}")


# Contexts


def test_plain_text_is_the_same_in_both_syntaxes(model):
    prompts = ["a red apple", ""]
    np.testing.assert_array_equal(model.encode_text(prompts, **WEBUI), model.encode_text(prompts))
    np.testing.assert_array_equal(
        model.encode_text("a (red:1.0) apple", 1, **WEBUI), model.encode_text("a red apple", 1)
    )


def test_weights_multiply_vectors_and_a_chunk_keeps_its_mean(model):
    plain = np.asarray(model.encode_text("a red apple"), "float64")
    weights = np.ones((1, 77, 1))
    weights[0, 2], weights[0, 3] = 1.5, 1 / 1.1
    expected = plain * weights
    expected *= plain.mean() / expected.mean()
    found = model.encode_text("a (red:1.5) [apple]", **WEBUI)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32 and np.abs(found - plain).max() > 0.05
    np.testing.assert_allclose(found.mean(), plain.mean(), rtol=1e-4)


def test_each_chunk_has_its_own_mean():
    rng = np.random.default_rng(0)
    context, weights = rng.normal(0.3, 1, (3, 77, 5)), rng.uniform(0.5, 1.5, (3, 77))
    found = weigh_context(context.astype("float32"), weights.astype("float32"))
    for x, y, w in zip(context, found, weights, strict=True):
        expected = x * w[:, None]
        np.testing.assert_allclose(y, expected * (x.mean() / expected.mean()), rtol=1e-4)


def test_chunks_are_joined_along_t(model):
    context = model.encode_text("a cat BREAK a (dog:1.3)", **WEBUI)
    assert context.shape == (1, 154, D)
    np.testing.assert_allclose(context[:, :77], model.encode_text("a cat"), atol=1e-5)
    np.testing.assert_allclose(
        context[:, 77:], model.encode_text("a (dog:1.3)", **WEBUI), atol=1e-5
    )
    both = model.encode_text(["a bird", "a cat BREAK a (dog:1.3)"], **WEBUI)
    np.testing.assert_allclose(both[1:], context, atol=1e-5)
    np.testing.assert_allclose(both[0, :77], model.encode_text("a bird")[0], atol=1e-5)
    np.testing.assert_array_equal(both[0, 77:], np.repeat(both[:1, 76], 77, 0), "the last vector")


def test_words_of_several_vectors(model):
    """They count as their tokens, and are weighed as one."""
    other = StableDiffusion(jit_compile=JIT, weights=None, config=TINY)
    other._tokenizer = SimpleTokenizer()
    other.tokenizer.add_tokens(["<two>", "<two>_1"])
    expand_tokens(other.tokenizer)
    [(ids, weights)] = split_prompt(other, "a (<TWO>:1.5) cat")
    assert ids[:6] == [49406, 320, 49408, 49409, 2368, 49407] and weights[1:5] == [1, 1.5, 1.5, 1]
    first, second = split_prompt(other, "cat " * 74 + "<two>")
    assert first[0][74:] == [2368, 49407, 49407] and second[0][1:4] == [49408, 49409, 49407]
    other.tokenizer.vectors["<two>"] = [49408] * 76
    with pytest.raises(ValueError, match="A word may have 75 vectors, not 76"):
        split_prompt(other, "a cat")


# Images


def generate(model, prompt, **options):
    return model.text_to_image(prompt, **OPTIONS | WEBUI | options)


def differ(a, b):
    return np.abs(a.astype(int) - b).max()


@pytest.mark.parametrize("deep_cache", [1, 2])
def test_contexts_of_different_lengths_take_two_passes(model, deep_cache):
    """Guidance is then computed from both, as if each had been alone."""
    context, negative = model.encode_text(LONG, **WEBUI), model.encode_text("a dog")
    options = {"num_steps": 4, "seed": 0, "deep_cache": deep_cache}
    assert context.shape == (1, 154, D)
    sizes, original = [], model._predict

    def spy(unet, latent, timestep, context, negative, *scales):
        sizes.append((len(latent), context.shape[1], negative is None))
        return original(unet, latent, timestep, context, negative, *scales)

    model._predict = spy
    try:
        *_, (_, _, found, _) = model.generate_latents(context, negative, **options)
    finally:
        del model._predict
    assert sizes == 4 * [(1, 154, False), (1, 77, True)]

    from stable_diffusion.samplers.deep_cache import DeepCache

    caches = [DeepCache(model.diffusion_model, deep_cache) for _ in range(2)]

    def predict(unet, latent, timestep, context, negative, scale, rescale):
        outputs = []
        for cache, text in zip(caches, (negative, context), strict=True):
            cache.step = unet.step
            outputs.append(original(cache, latent, timestep, text, None, scale))
        return outputs[0] + scale * (outputs[1] - outputs[0])

    model._predict = predict
    try:
        *_, (_, _, expected, _) = model.generate_latents(context, negative, **options)
    finally:
        del model._predict
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_long_prompts_on_either_side(model):
    plain = generate(model, "a cat")
    assert differ(plain, model.text_to_image("a cat", **OPTIONS)) == 0
    assert differ(plain, generate(model, f"a cat BREAK {LONG}")) > 0
    assert differ(plain, generate(model, "a cat", negative_prompt=LONG)) > 0
    both = generate(model, LONG, negative_prompt=f"{LONG} BREAK a dog")
    assert both.shape == (1, 64, 64, 3)
    weighed = generate(model, "a (cat:1.8)")
    assert differ(weighed, plain) > 0
    with pytest.raises(ValueError, match="at most 77 tokens"):
        model.text_to_image(LONG, **OPTIONS)


def test_tasks_that_start_from_an_image_read_it_too(model):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")
    mask = np.ones((64, 64))
    mask[:32] = 0
    for task, given in ((model.image_to_image, {}), (model.inpaint, {"mask": mask})):
        plain = task("a cat", pixels, **given, **OPTIONS)
        np.testing.assert_array_equal(plain, task("a cat", pixels, **given, **OPTIONS | WEBUI))
        assert differ(plain, task(f"a (cat:1.9), {LONG}", pixels, **given, **OPTIONS | WEBUI)) > 0


def test_a_unet_for_77_tokens_refuses_more_before_the_first_step():
    """As clients of KerasCV build it, and as OpenVINO's models are."""
    model = StableDiffusion(jit_compile=False, weights=None, config=TINY)
    model._diffusion_model = DiffusionModel(64, 64, 77, config=TINY.unet, download_weights=False)
    message = "accepts contexts of 77 tokens, not 154, in chunks of 77: 'cat, "
    for use in (
        lambda: model.encode_text(LONG, **WEBUI),
        lambda: generate(model, LONG),
        lambda: generate(model, "a", negative_prompt=LONG),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert not model._text_encoder
    model._diffusion_model, model.checkpoint.most_tokens = None, OpenVINOFolder.most_tokens
    with pytest.raises(ValueError, match=message):
        generate(model, LONG)
    assert model.encode_text("a (cat:1.3)", **WEBUI).shape == (1, 77, D)
