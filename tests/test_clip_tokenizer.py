"""Tests of `stable_diffusion.clip_tokenizer`.

The reference is OpenAI's own tokenizer: `tests/data/clip_tokenizer_golden.json.gz` has its ids for
thousands of strings (made by `tests/data/make_tokenizer_golden.py`). Ids are compared exactly.
"""

import copy
import gzip
import hashlib
import importlib.util
import json
import pickle
import random
import shutil

import numpy as np
import pytest
from helpers import DATA

from stable_diffusion import files
from stable_diffusion.clip_tokenizer import SimpleTokenizer, expand_tokens
from stable_diffusion.files import WEIGHTS_DIR

pytestmark = pytest.mark.quick

VOCABULARY = WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz"
GOLDEN = DATA / "clip_tokenizer_golden.json.gz"


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleTokenizer()


@pytest.fixture
def fresh(tokenizer):
    """A tokenizer that a test may add tokens to."""
    return copy.deepcopy(tokenizer)


def test_shipped_vocabulary_is_openais():
    digest = hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_vocabulary(tokenizer):
    assert len(tokenizer.vocab) == len(tokenizer.encoder) == 49408
    assert [tokenizer.encoder[token] for token in tokenizer.vocab] == list(range(49408))
    assert tokenizer.vocab[:2] == ["!", '"']
    assert tokenizer.vocab[256] == "!</w>"
    assert tokenizer.vocab[512] == "in"
    assert tokenizer.vocab[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert (tokenizer.start_of_text, tokenizer.end_of_text) == (49406, 49407)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("a", [320]),
        ("hello world", [3306, 1002]),
        ("Hello,  WORLD!", [3306, 267, 1002, 256]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        (
            "a photograph of an astronaut riding a horse",
            [320, 8853, 539, 550, 18376, 6765, 320, 4558],
        ),
    ],
)
def test_well_known_ids(tokenizer, text, ids):
    assert tokenizer.encode(text) == [49406, *ids, 49407]


def test_ids_equal_those_of_openais_tokenizer(tokenizer):
    golden = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    assert len(golden) > 3000
    wrong = [text for text, ids in golden if tokenizer.encode(text)[1:-1] != ids]
    assert not wrong, f"{len(wrong)} of {len(golden)} differ, the first: {wrong[0]!r}"


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("cafe\u0301", "café"),  # NFC
        ("schÃ¶n", "schön"),  # UTF-8 that was read as Latin-1
        ("l’eau", "l'eau"),
        ("&amp;lt;", "<"),
        ("a\0b", "ab"),
        ("a\ud800b", "a\ufffdb"),  # lone surrogate
        ("\ud83d\ude00", "😀"),  # surrogate pair
    ],
)
def test_text_is_cleaned(tokenizer, text, same_as):
    assert tokenizer.encode(text) == tokenizer.encode(same_as)


def test_ids_do_not_depend_on_what_was_encoded_before(tokenizer, fresh):
    first = fresh.encode("Photographs of unphotographable astronauts")
    assert fresh.encode("Photographs of unphotographable astronauts") == first
    assert tokenizer.encode("Photographs of unphotographable astronauts") == first


def test_encode_rejects_what_is_not_text(tokenizer):
    for value, name in [(None, "NoneType"), (b"cat", "bytes"), (["cat"], "list"), (3, "int")]:
        with pytest.raises(ValueError, match=f"text must be a str, not {name}"):
            tokenizer.encode(value)


def random_clean_text(rng):
    """Returns lower-case words, digits and marks, each of which is one word to the tokenizer."""
    alphabets = [
        "abcdefghijklmnopqrstuvwxyz",
        "äöüßéèñçøå",
        "абвгдежз",
        "猫犬鳥",
        "😀🐱☃",
        "!?.,#*",
    ]
    words = []
    for _ in range(rng.randint(0, 12)):
        alphabet = rng.choice(alphabets)
        words.append("".join(rng.choices(alphabet, k=rng.randint(1, 9))))
    return " ".join(words + [rng.choice("0123456789")])


def test_decode_inverts_encode_on_clean_text(tokenizer):
    rng = random.Random(0)
    for text in (random_clean_text(rng) for _ in range(1000)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoded_text_has_the_same_ids(tokenizer):
    for text in ["Don't 24!", "(a)", "naïve—x", "it's 'ſ", "x&y <b> #1", "e\u0301x\u0302"]:
        ids = tokenizer.encode(text)
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_decode(tokenizer):
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([49406, 320, 2368, 49407, 49407, 49407]) == "a cat"
    assert tokenizer.decode(np.array([320, 2368])) == "a cat"
    assert tokenizer.decode(iter([320, 2368])) == "a cat"
    assert tokenizer.decode(tokenizer.encode("Don't 24")) == "don 't 2 4"
    assert tokenizer.decode(tokenizer.encode("猫")[1:2]).endswith(("猫", "\ufffd"))


@pytest.mark.parametrize("token_id", [-1, 49408, 10**9])
def test_decode_rejects_unknown_ids(tokenizer, token_id):
    with pytest.raises(ValueError, match=rf"{token_id} is not a token id, 0 to 49407"):
        tokenizer.decode([320, token_id])


def test_add_tokens(fresh):
    before = fresh.encode("a photo of a cat")
    assert fresh.add_tokens("<My-Cat>") == 1
    assert fresh.encoder["<My-Cat>"] == 49408
    assert fresh.vocab[49408:] == ["<My-Cat>"]
    assert fresh.encode("a photo of a cat") == before
    assert fresh.add_tokens(["<My-Cat>", "sks", "Größe", "sks", "🐱", "my cat", "cat"]) == 4
    assert fresh.vocab[49409:] == ["sks", "Größe", "🐱", "my cat"]  # "cat" was there already
    assert (fresh.start_of_text, fresh.end_of_text) == (49406, 49407)
    ids = fresh.encode("<My-Cat> sks Größe 🐱 my cat")
    assert ids == [49406, 49408, 49409, 49410, 49411, 49412, 49407]
    assert fresh.decode(ids) == "<My-Cat> sks Größe 🐱 my cat"


def test_added_token_is_found_next_to_anything_but_letters(fresh):
    tokens = ["<My-Cat>", "Sks", "<*>", "$%(x", "éØ", "\\d+", "a|b", "X1", "İſ", "a\0b", "my  cat"]
    assert fresh.add_tokens(tokens) == len(tokens)
    for text in ["{}", "a {} b", "({})", "a,{}!", '"{}"', "A.{}.B", "\n{}\t", "...{}...", "<{}>"]:
        before, after = (fresh.encode(part)[1:-1] for part in text.split("{}"))
        for n, token in enumerate(tokens):
            ids = fresh.encode(text.format(token))
            assert ids == [49406, *before, 49408 + n, *after, 49407], text.format(token)


def test_added_token_is_not_found_inside_a_word(fresh):
    text = "skset asks sks2"
    before = fresh.encode(text)
    fresh.add_tokens("sks")
    assert fresh.encode(text) == before


def test_added_token_with_marks_at_its_ends_is_found_between_letters(fresh):
    fresh.add_tokens("<cat>")
    assert fresh.encode("a<cat><cat>a") == [49406, 320, 49408, 49408, 320, 49407]


def test_added_tokens_differ_by_case(fresh):
    fresh.add_tokens(["<CAT>", "<cat>"])
    assert fresh.encode("<cat> <CAT>") == [49406, 49409, 49408, 49407]
    assert 49408 not in fresh.encode("<Cat>")


def test_longest_added_token_is_found(fresh):
    tokens = ["<a", "<a>b", "<a>", "[c]d", "[c", "[c]"]
    fresh.add_tokens(tokens)
    for token in tokens:
        assert fresh.encode(f"x {token}.")[2] == fresh.encoder[token]


def test_add_tokens_rejects_what_is_not_a_token(fresh):
    for bad in ["", " ", "\n\t", " cat", "cat ", None, 3, b"cat", ["cat"]]:
        for tokens in ([bad, "<new>"], ["<new>", bad], bad if bad != ["cat"] else [bad]):
            with pytest.raises(
                ValueError, match="A token must be a str, not .*padded, not "
            ) as error:
                fresh.add_tokens(tokens)
            assert str(error.value).endswith(repr(bad))
    assert len(fresh.vocab) == len(fresh.encoder) == 49408


def test_tokenizers_do_not_share_added_tokens(tokenizer, fresh):
    fresh.add_tokens("<mine>")
    assert "<mine>" not in tokenizer.encoder
    assert 49408 not in tokenizer.encode("<mine>")
    assert pickle.loads(pickle.dumps(fresh)).encode("<mine>") == [49406, 49408, 49407]


def test_bpe_path(tmp_path):
    shutil.copy(VOCABULARY, tmp_path / "copy.gz")
    for path in [tmp_path / "copy.gz", str(tmp_path / "copy.gz")]:
        assert SimpleTokenizer(path).encode("a cat") == [49406, 320, 2368, 49407]


def wrong_vocabularies():
    content = gzip.decompress(VOCABULARY.read_bytes())
    zipped = VOCABULARY.read_bytes()
    return {
        "not_gzip": content,
        "empty": b"",
        "cut_off": zipped[:10000],
        "corrupt": zipped[:5000] + b"\xff" * 1000 + zipped[6000:],
        "not_pairs": gzip.compress(b"one two three\n" * 60000, 1),
        "unknown_pieces": gzip.compress(b"apple 12\n" * 60000, 1),
        "not_text": gzip.compress(b"\xff\xfe\n" * 60000, 1),
    }


def test_names_of_several_vectors(fresh):
    fresh.add_tokens(["<a>", "<a>_1", "<b>", "<a>_2", "<b>_2", "sks_1"])
    assert fresh.vectors == {}
    expand_tokens(fresh)
    assert fresh.vectors == {"<a>": [49408, 49409, 49411]}
    assert fresh.encode("<b><a>")[1:-1] == [49410, 49408, 49409, 49411]
    assert fresh.encode("<b>_2 sks_1")[1:-1] == [49412, 49413]


def test_wrong_bpe_path(tmp_path):
    paths = [tmp_path / "missing.gz", tmp_path, 12345]
    for name, content in wrong_vocabularies().items():
        paths.append(tmp_path / f"{name}.gz")
        paths[-1].write_bytes(content)
    for path in paths:
        with pytest.raises(ValueError) as caught:
            SimpleTokenizer(path)
        expected = f"bpe_path {path} is not a list of BPE pairs"
        assert str(caught.value) == expected


@pytest.mark.parametrize("weights", ["package/weights", "weights"])
def test_weights_dir_of_a_wheel_and_of_a_checkout(tmp_path, weights):
    (tmp_path / "package").mkdir()
    (tmp_path / weights).mkdir()
    file = shutil.copy(files.__file__, tmp_path / "package")
    spec = importlib.util.spec_from_file_location("installed_files", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.WEIGHTS_DIR == (tmp_path / weights).resolve()


def test_shorter_list_of_pairs(tmp_path):
    """A `merges.txt` that has what some words need gives them the pieces they have in CLIP's."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    words = "a red apple"
    pairs = [line for line in lines[1:48895] if line.replace(" ", "").replace("</w>", "") in words]
    path = tmp_path / "merges.txt"
    path.write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    whole, short = SimpleTokenizer(), SimpleTokenizer(path)
    assert len(short.vocab) == 512 + len(pairs) + 2
    assert short.end_of_text == len(short.vocab) - 1
    pieces = [[tokenizer.vocab[i] for i in tokenizer.encode(words)] for tokenizer in (whole, short)]
    assert pieces[0] == pieces[1]
    assert short.decode(short.encode("blue zebra")) == "blue zebra"
