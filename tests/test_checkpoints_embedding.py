"""Textual inversion: new tokens, equal to transformers' with the same rows in its table.

The reference is scripts/make_lora_golden.py's: the tiny text encoder with three more tokens.
float32 unless said; errors are relative to the largest value of the reference.
"""

import warnings

import keras
import numpy as np
import pytest
from helpers import DATA, GOLDEN, write_merges
from keras import ops
from safetensors.numpy import save_file

from stable_diffusion import SimpleTokenizer, StableDiffusion
from stable_diffusion.adapters.embedding import _warn_of_words, load_embedding
from stable_diffusion.adapters.lora import load_lora, unload_lora
from stable_diffusion.added_tokens import expand_tokens

pytestmark = pytest.mark.usefixtures("reused")
EMBEDDING = DATA / "lora_golden" / "embedding.safetensors"
TOLERANCE = 5e-6  # as tests/test_diffusers_golden.py
ROWS, D = 1000, 16  # of the tiny text encoder


@pytest.fixture(scope="session")
def merges(tmp_path_factory):
    """A list of pairs that makes 1000 tokens."""
    return write_merges(tmp_path_factory.mktemp("vocabulary") / "merges.txt", ROWS - 514)


@pytest.fixture
def model(merges):
    made = StableDiffusion(weights=GOLDEN / "v1", jit_compile=False)
    made._tokenizer = SimpleTokenizer(merges)
    assert len(made.tokenizer.vocab) == ROWS
    return made


def vectors(n=2, width=D, dtype="float32"):
    return np.random.default_rng(n).normal(size=(n, width)).astype(dtype)


def save(path, tensors):
    save_file(tensors, path)
    return path


def numpy(x):
    return ops.convert_to_numpy(x)


def state(model):
    """What must be as before if loading fails."""
    encoder, tokenizer = model.text_encoder, model.tokenizer
    parameters = [numpy(v.value).tobytes() for v in encoder.weights]
    tokens = list(tokenizer.vocab), dict(tokenizer.encoder), dict(tokenizer.vectors)
    return id(encoder), parameters, tokens, model.config, model.checkpoint.config


def refused(model, path, message, **options):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_embedding(model, path, **options)
    assert state(model) == before


def test_context_equals_transformers(model):
    assert load_embedding(model, EMBEDDING) == [1000, 1001, 1002]
    with np.load(DATA / "lora_golden.npz") as file:
        tokens, expected = file["tokens"].astype("int32"), file["embedding_context"]
    actual = numpy(model.text_encoder([tokens, np.arange(77, dtype="int32")[None]]))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def test_prompts_have_all_vectors(model):
    without = model.tokenizer.encode("a dog")
    load_embedding(model, EMBEDDING)
    assert model.tokenizer.vocab[1000:] == ["<cat>", "<cat>_1", "<cat>_2"]
    start, *words, end = without
    ids = model.tokenizer.encode("a <cat>dog")
    assert ids == [start, words[0], 1000, 1001, 1002, *words[1:], end]
    assert model.tokenizer.encode("a dog") == without
    assert model.tokenizer.encode("<cat>_1")[1:-1] == [1001]
    assert model.tokenizer.decode(ids) == "a <cat> <cat>_1 <cat>_2 dog"
    with_it, other = model.encode_text(["a <cat> dog", "a dog"])
    assert np.abs(with_it - other).max() > 0.1
    with pytest.raises(ValueError, match="at most 77 tokens, not 92"):
        model.encode_text("<cat>" * 30)


def test_everything_else_is_as_before(model):
    old, before = model.text_encoder, model.encode_text("a dog")
    config, checkpoint, reader = model.config, model.checkpoint.config, model.checkpoint
    load_embedding(model, EMBEDDING)
    new = model.text_encoder
    assert new is not old and new.name == old.name
    np.testing.assert_array_equal(model.encode_text("a dog"), before)
    assert new.weights[0].shape == (ROWS + 3, D) and old.weights[0].shape == (ROWS, D)
    assert new.layers[2].token_embedding.input_dim == ROWS + 3
    for a, b in zip(new.weights[1:], old.weights[1:], strict=True):
        np.testing.assert_array_equal(numpy(a.value), numpy(b.value))
    for holder in (model, model.checkpoint, new):
        text = holder.config if holder is new else holder.config.text
        assert text.vocab_size == ROWS + 3
    assert config.text.vocab_size == checkpoint.text.vocab_size == ROWS
    assert reader.config is checkpoint  # other pipelines may have the same reader
    assert model.config.unet == config.unet


def test_several(model, tmp_path):
    one, two = vectors(1), vectors(2)
    path = save(tmp_path / "style.safetensors", {"emb_params": two})
    assert load_embedding(model, save(tmp_path / "a.safetensors", {"<one>": one[0]})) == [1000]
    assert load_embedding(model, path) == [1001, 1002]
    assert load_embedding(model, path, token="sks") == [1003, 1004]
    encode = model.tokenizer.encode
    assert encode("<one> style sks")[1:-1] == [1000, 1001, 1002, 1003, 1004]
    table = numpy(model.text_encoder.weights[0].value)
    np.testing.assert_array_equal(table[1000:], np.concatenate([one, two, two]))


def test_a_token_that_is_in_words_gives_one_warning(recwarn):
    for token in ("SKS", "<sks>", "猫咪", "EasyNegative"):
        _warn_of_words(SimpleTokenizer(), token)
    (warning,) = recwarn
    message = (
        "The token 'SKS' is also found in words (sks, asks, risks, ...); '<SKS>' would not be."
    )
    assert str(warning.message) == message


def test_a_table_that_is_larger_than_the_vocabulary(merges, tmp_path):
    model = StableDiffusion(weights=GOLDEN / "v1", jit_compile=False)
    lines = merges.read_text().splitlines()[:-5]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    model._tokenizer = SimpleTokenizer(tmp_path / "merges.txt")
    before = numpy(model.text_encoder.weights[0].value)
    assert load_embedding(model, EMBEDDING) == [995, 996, 997]
    after = numpy(model.text_encoder.weights[0].value)
    assert after.shape == (ROWS, D) and model.config.text.vocab_size == ROWS
    same = np.r_[:995, 998:1000]
    np.testing.assert_array_equal(after[same], before[same])


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_other_policies(policy, stored, merges, tmp_path):
    path = save(tmp_path / "a.safetensors", {"<a>": vectors(dtype=stored)})
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        model = StableDiffusion(weights=GOLDEN / "v1", jit_compile=False)
        old = model.text_encoder
    finally:
        keras.config.set_dtype_policy(before)
    model._tokenizer = SimpleTokenizer(merges)
    load_embedding(model, path)  # while another policy is the global one
    new = model.text_encoder
    assert keras.config.dtype_policy() == before
    for a, b in zip(new.layers, old.layers, strict=True):
        assert a.dtype_policy.name == b.dtype_policy.name
    assert new.weights[0].dtype == old.weights[0].dtype
    expected = vectors().astype(stored).astype(numpy(new.weights[0].value).dtype)
    np.testing.assert_array_equal(numpy(new.weights[0].value)[ROWS:], expected)
    for a, b in zip(new.weights[1:], old.weights[1:], strict=True):
        assert numpy(a.value).tobytes() == numpy(b.value).tobytes()
    assert np.isfinite(np.asarray(model.encode_text("<a>"), "float32")).all()


def test_a_lora_survives(model):
    before = model.encode_text("a dog")
    load_lora(model, DATA / "lora_golden" / "attention_folder")
    with_it = model.encode_text("a dog")
    old = model.text_encoder
    load_embedding(model, EMBEDDING)
    np.testing.assert_array_equal(model.encode_text("a dog"), with_it)
    unload_lora(model)
    np.testing.assert_array_equal(model.encode_text("a dog"), before)
    model._text_encoder = old
    np.testing.assert_array_equal(model.encode_text("a dog"), before)
    assert np.abs(with_it - before).max() > 0.01


def test_compiled_as_the_pipeline(model):
    model.jit_compile = "auto"
    load_embedding(model, EMBEDDING)
    assert model.text_encoder.compiled
    assert model.text_encoder.jit_compile == model.decoder.jit_compile


def test_saved_and_loaded_again(model, tmp_path):
    load_embedding(model, EMBEDDING)
    model.save(tmp_path / "model", dtype="float32")
    again = StableDiffusion(weights=tmp_path / "model", jit_compile=False)
    expand_tokens(again.tokenizer)
    assert again.tokenizer.vectors == {"<cat>": [1000, 1001, 1002]}
    np.testing.assert_array_equal(again.encode_text("a <cat>"), model.encode_text("a <cat>"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "must have one tensor to be an embedding, not 0"),
        ({"<a>": vectors(), "<b>": vectors()}, r"not 2 \(<a>, <b>\)"),
        ({"clip_l": vectors(), "clip_g": vectors()}, "two text encoders of Stable Diffusion XL"),
        ({"clip_l": vectors()}, "two text encoders of Stable Diffusion XL"),
        ({"<a>": vectors(width=32)}, "is for a text encoder of width 32, not 16"),
        ({"<a>": vectors()[None]}, r"float vectors, \(D,\) or \(n, D\), not <a> \(1, 2, 16\)"),
        ({"<a>": np.array(1, "float32")}, r"float vectors, .* not <a> \(\)"),
        ({"<a>": vectors()[:0]}, r"float vectors, .* not <a> \(0, 16\)"),
        ({"<a>": vectors().astype("int32")}, r"float vectors, .* not <a> \(2, 16\) of I32"),
        ({"<a>": vectors() * np.nan}, "values that are not finite in float32"),
        ({"<a>": vectors().astype("float64") * 1e300}, "values that are not finite in float32"),
        ({"in": vectors()}, "has 'in' already"),
        ({" a": vectors()}, "token must be a str .* without spaces around it, .*not ' a'"),
    ],
)
def test_files_that_do_not_fit(tensors, message, model, tmp_path):
    refused(model, save(tmp_path / "a.safetensors", tensors), message)


def test_files_of_something_else(model):
    unet = DATA / "diffusers_golden/v1/unet/diffusion_pytorch_model.safetensors"
    refused(model, unet, r"one tensor .*, \.\.\.\)\. The file looks like a UNet")
    lora = DATA / "lora_golden/everything_kohya.safetensors"
    refused(model, lora, "The file looks like a LoRA, which load_lora loads")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "token must be a str"),
        (3, "token must be a str"),
        ("<|endoftext|>", "has '<|endoftext|>' already"),
        ("a", "has 'a' already"),
        ("<cat>", "has '<cat>' already"),
        ("<cat>_2", "has '<cat>_2' already"),
        ("<cat>_3", "is a name for a vector of the token '<cat>'"),
        ("sks", "has 'sks_3' already"),
    ],
)
def test_tokens(token, message, model):
    load_embedding(model, EMBEDDING)
    model.tokenizer.add_tokens("sks_3")
    refused(model, EMBEDDING, message.replace("|", r"\|"), token=token)


def test_a_vocabulary_that_is_larger_than_the_table(model):
    model._tokenizer = SimpleTokenizer()
    refused(model, EMBEDDING, "The tokenizer has 49408 tokens, but the text encoder has only 1000")


def test_other_classes(model):
    model._tokenizer = object()
    with pytest.raises(ValueError, match="needs this package's TextEncoder and SimpleTokenizer"):
        load_embedding(model, EMBEDDING)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt"])
def test_pickles_are_not_opened(name, model, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(model, tmp_path / name, r"nor one of PyTorch: it is a text: cos system")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch reads these files, and isn't installed")


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["dict", "parameters", "emb_params"])
@pytest.mark.parametrize("inner", [None, "bad-hands", "other"])
def test_files_of_the_web_interface(kind, inner, torch, model, tmp_path):
    """The word is the name of the file; one line says if the file has another name inside."""
    tensor = torch.from_numpy(vectors(3))
    data = {"string_to_token": {"*": 265}, "name": inner, "step": 1}
    if kind == "emb_params":
        data = {"emb_params": tensor} | ({"name": inner} if inner else {})
    elif kind == "dict":
        data["string_to_param"] = {"*": tensor}
    else:
        data["string_to_param"] = torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)})
    torch.save(data, tmp_path / "bad-hands.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_embedding(model, tmp_path / "bad-hands.pt") == [ROWS, ROWS + 1, ROWS + 2]
    said = [str(w.message) for w in caught if "calls itself 'other'" in str(w.message)]
    assert len(said) == (inner == "other")
    ids = model.tokenizer.encode("a bad-hands")
    assert [n for n in ids if n >= ROWS] == [ROWS, ROWS + 1, ROWS + 2]
    np.testing.assert_array_equal(numpy(model.text_encoder.weights[0])[ROWS:], vectors(3))


@pytest.mark.torch
def test_files_of_diffusers(torch, model, tmp_path):
    """The word is the name of the tensor."""
    torch.save({"<cat-toy>": torch.from_numpy(vectors(1)[0])}, tmp_path / "learned_embeds.bin")
    assert load_embedding(model, tmp_path / "learned_embeds.bin") == [ROWS]
    assert "<cat-toy>" in model.tokenizer.encoder
    two = {"string_to_param": {"*": torch.ones(1, D), "+": torch.ones(1, D)}}
    torch.save(two, tmp_path / "two.pt")
    refused(model, tmp_path / "two.pt", "must have one tensor to be an embedding, not 2")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_files(size, model, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(EMBEDDING.read_bytes()[:size])
    refused(model, path, r"a\.safetensors is no intact safetensors file")


def test_no_such_file(model, tmp_path):
    refused(model, tmp_path / "a.safetensors", "There is no .*a.safetensors")
