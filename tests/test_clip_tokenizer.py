"""Tests of `stable_diffusion.clip_tokenizer`.

The reference is OpenAI's own tokenizer: `tests/data/clip_tokenizer_golden.json.gz` has its ids for
thousands of strings (made by `tests/data/make_tokenizer_golden.py`). Ids are compared exactly.
"""

import copy
import gzip
import hashlib
import importlib.util
import json
import os
import pickle
import random
import shutil
import time

import ftfy
import numpy as np
import pytest
from helpers import DATA

from stable_diffusion import clip_tokenizer, files
from stable_diffusion.added_tokens import expand_tokens
from stable_diffusion.cleaning import _Settings
from stable_diffusion.clip_tokenizer import _BYTE_TO_ID, NUM_PAIRS, SimpleTokenizer
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


def merge_as_published(tokenizer, word):
    """Byte-pair encoding as in the paper: the pair that was learned first, at all its places."""
    pieces = word.encode().translate(_BYTE_TO_ID).decode("latin-1")
    pieces = pieces[:-1] + chr(ord(pieces[-1]) + 256)
    joined = tokenizer._joined
    while pairs := {pieces[n : n + 2] for n in range(len(pieces) - 1)} & joined.keys():
        first = min(pairs, key=joined.get)
        pieces = pieces.replace(first, joined[first])
    return [ord(piece) for piece in pieces]


def test_pairs_are_joined_in_the_order_of_learning(tokenizer):
    rng = random.Random(0)
    alphabets = ["a", "ab", "haet", "abcdefghijklmnopqrst", "äöüéß", "猫犬ね", "😂😍", "!?.-="]
    words = ["".join(rng.choices(a, k=rng.randint(1, n))) for a in alphabets for n in range(1, 80)]
    words += ["a" * n for n in range(1, 80)] + ["haha" * 30, "😂" * 40, "-=" * 40]
    for word in words:
        assert tokenizer._encode_word(word) == merge_as_published(tokenizer, word), word


def test_a_long_word_takes_n_log_n(fresh):
    begin = time.process_time()
    for letters in ("a", "abcdefghijklmnopqrstuvwxyz"):
        word = "".join(random.Random(0).choices(letters, k=50_000))
        assert fresh.decode(fresh.encode(word)) == word
    assert time.process_time() - begin < 10  # 1 s is seen; with n² it is minutes


def test_ampersands_of_ampersands_take_no_longer(fresh):
    for text, same_as in [
        ("&" + "amp;" * 250_000 + "lt; cat", "< cat"),
        ("a &" + "amp;#38;" * 100_000 + "\n<", "a & <"),
    ]:
        assert fresh.encode(text) == fresh.encode(same_as)
    # In a line with "<", the reference undoes only two.
    assert len(fresh.encode("<&" + "amp;" * 1000)) == 2 + 2 + 2 * 998


def test_entities_in_one_another_end_before_they_take_too_long(fresh):
    begin = time.process_time()
    for text in ("&" + "&num;38;" * 125_000, "＆" + "amp；" * 40_000):
        with pytest.raises(
            ValueError, match="HTML entities in one another, .* more than [0-9]+ deep"
        ):
            fresh.encode("a cat\n" + text)
    assert fresh.encode("&" + "&num;38;" * 300) == fresh.encode("&")
    fresh.add_tokens("<x>")
    with pytest.raises(ValueError, match="HTML entities in one another"):
        fresh.encode(("<x>&" + "&num;38;" * 600) * 200)
    assert time.process_time() - begin < 20  # 3 s are seen; all passes would take hours


def test_a_limit_of_passes_changes_no_text():
    pieces = [
        "&",
        "amp;",
        "lt;",
        "&#38;",
        "#38;",
        "&num;",
        "<",
        "\n",
        "＆",
        "；",
        "é",
        "Ã©",
        "’",
        "\x1b[m",
    ]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=12))
        assert ftfy.fix_text(text, _Settings()) == ftfy.fix_text(text), text


def test_few_words_are_remembered(tokenizer, fresh, monkeypatch):
    monkeypatch.setattr(clip_tokenizer, "MAX_WORDS", 10)
    fresh._forget_words()
    for word in ["cat", *(f"{letter}cats" for letter in "abcdefghijklm"), "x" * 200, "cat"]:
        assert fresh.encode(f"{word}<|endoftext|>") == tokenizer.encode(f"{word}<|endoftext|>")
        assert len(fresh._cache) <= 10 and "x" * 200 not in fresh._cache


def test_no_text_has_fewer_ids_than_the_least(tokenizer, fresh):
    golden = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    assert not [text for text, ids in golden[::5] if fresh.count_least(text) > 2 + len(ids)]
    longest = "😂" * (8 * 20 + 7)  # eight are one token, and the seven at a word's end
    assert tokenizer.count_least(longest) == len(tokenizer.encode(longest)) == 2 + 21
    assert tokenizer.count_least(longest + "😂😂") == 2 + 22
    assert tokenizer.count_least(" a  &amp;amp; " + "\n" * 10_000) == 4


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


WORDS = [  # added tokens, a text, and its ids with transformers' tokenizer
    (["Sks"], "skset SKS asks sks2 Sks", [49408, 875, 49408, 320, 49408, 49408, 273, 49408]),
    (["猫咪", "ねこ"], "一只猫咪 ねこだ", [19759, 222, 34517, 359, 49408, 49409, 4813, 510]),
    (["EasyNegative"], "easynegative, EASYNEGATIVEv", [49408, 267, 49408, 341]),
    (["my  cat"], "a My cat, my\n cat", [320, 49408, 267, 49408]),
    (["<a", "<a>b"], "<A>B <A>", [49409, 49408, 285]),
    (["Größe"], "größen GRÖSSE", [49408, 333, 709, 7255, 8938]),
]


@pytest.mark.parametrize(("tokens", "text", "ids"), WORDS)
def test_added_tokens_are_found_as_in_transformers(tokens, text, ids, fresh):
    fresh.add_tokens(tokens)
    assert fresh.encode(text)[1:-1] == ids


@pytest.mark.torch
def test_transformers_finds_added_tokens(tokenizer):
    CLIPTokenizer = pytest.importorskip("transformers").CLIPTokenizer
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 1 + NUM_PAIRS]
    merges = [tuple(line.split()) for line in lines]
    rng = random.Random(0)
    for tokens, text, ids in WORDS:
        theirs = CLIPTokenizer(vocab=dict(tokenizer.encoder), merges=merges)
        theirs.add_tokens(tokens)
        assert theirs(text)["input_ids"][1:-1] == ids
        ours = copy.deepcopy(tokenizer)
        ours.add_tokens(tokens)
        for _ in range(50):
            pieces = [*tokens, *(t.upper() for t in tokens), "ask", "猫", " ", ".", "<", "3", "S"]
            text = "".join(rng.choices(pieces, k=8))
            assert ours.encode(text) == theirs(text)["input_ids"], text


def test_added_token_with_marks_at_its_ends_is_found_between_letters(fresh):
    fresh.add_tokens("<cat>")
    assert fresh.encode("a<cat><cat>a") == [49406, 320, 49408, 49408, 320, 49407]


def test_added_tokens_differ_by_case(fresh):
    fresh.add_tokens(["<CAT>", "<cat>"])
    assert fresh.encode("<cat> <CAT>") == [49406, 49409, 49408, 49407]
    assert fresh.encode("a<CAT><cat>b")[2:4] == [49408, 49409]
    assert fresh.encode("<Cat>")[1] in (49408, 49409)


def test_longest_added_token_is_found(fresh):
    tokens = ["<a", "<a>b", "<a>", "[c]d", "[c", "[c]"]
    fresh.add_tokens(tokens)
    for token in tokens:
        assert fresh.encode(f"x {token}.")[2] == fresh.encoder[token]


def test_add_tokens_rejects_what_is_not_a_token(fresh):
    for bad in ["", " ", "\n\t", " cat", "cat ", None, 3, b"cat", ["cat"]]:
        for tokens in ([bad, "<new>"], ["<new>", bad], bad if bad != ["cat"] else [bad]):
            with pytest.raises(
                ValueError, match="A token must be a str, not empty nor space-padded: "
            ) as error:
                fresh.add_tokens(tokens)
            assert str(error.value).endswith(repr(bad))
    for tokens in (["<new>", "x" * 151], "x" * 151 + "_1", "x" * 150 + "_1234"):
        with pytest.raises(ValueError, match="A token may have 150 characters, not 15[0-9]"):
            fresh.add_tokens(tokens)
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
    assert fresh.encode("x<A>猫<A>_1")[2:5] == [49408, 49409, 49411]
    assert fresh.encode("<A>_1") == [49406, 49409, 49407]


def test_wrong_bpe_path(tmp_path):
    paths = [tmp_path / "missing.gz", tmp_path, 12345, tmp_path / "pipe", "/dev/zero"]
    os.mkfifo(tmp_path / "pipe")
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
