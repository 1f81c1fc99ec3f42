"""Words of prompts, and the places of their tokens in the context."""

import numpy as np
import pytest

from stable_diffusion import SimpleTokenizer, StableDiffusion
from stable_diffusion.config import TINY
from stable_diffusion.explain.words import Word, find_words

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(weights=None, config=TINY)  # nothing is built: the tokenizer is enough


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red apple", [("a", 1), ("red", 1), ("apple", 1)]),
        ("  A Red\n apple ", [("A", 1), ("Red", 1), ("apple", 1)]),  # as they stand there
        ("an (apple), ... cat!", [("an", 1), ("apple", 1), ("cat", 1)]),  # no punctuation
        ("don't well-known", [("don't", 2), ("well-known", 3)]),  # joined
        ("extraterrestrials 1984", [("extraterrestrials", 5), ("1984", 4)]),
        ("cat & cat", [("cat", 1), ("cat", 1)]),  # listed twice
        ("caf\u00c3\u00a9 cat", [("caf\u00c3\u00a9", 1), ("cat", 1)]),  # café, once cleaned
        ("'s", [("'s", 1)]),
        ("... !!", []),
        ("", []),
    ],
)
def test_words_and_their_numbers_of_tokens(model, prompt, expected):
    words = find_words(model, prompt)
    assert [(word.text, len(word.positions)) for word in words] == expected


def test_positions_have_the_words_tokens(model):
    prompt = "A strange, SPOTTED hippogriff; it's on a well-known (red) background 42!"
    ids, tokenizer = model.tokenize(prompt), SimpleTokenizer()
    words = find_words(model, prompt)
    assert [word.text for word in words][2:5] == ["SPOTTED", "hippogriff", "it's"]
    for word in words:
        assert [ids[n] for n in word.positions] == tokenizer.encode(word.text)[1:-1]
    used = [n for word in words for n in word.positions]
    assert used == sorted({*used})
    left = [ids[n] for n in range(1, ids.index(49407)) if n not in used]
    assert left == sum((tokenizer.encode(text)[1:-1] for text in [",", ";", "(", ")", "!"]), [])


def test_a_prompt_with_weights(model):
    words = find_words(model, "a (Red apple:1.3), [on] BREAK blue \\(ground\\)", "webui")
    assert words == [
        Word("a", (1,)),
        Word("Red", (2,)),
        Word("apple", (3,)),
        Word("on", (5,)),
        Word("blue", (78,)),
        Word("ground", (80,)),
    ]


def test_a_long_prompt_has_places_in_several_chunks(model):
    words = find_words(model, "red apple " * 60, "webui")
    places = [word.positions for word in words]
    assert len(words) == 120 and places[74] == (75,) and places[75] == (78,)
    assert places[-1] == (77 + 45,)
    with pytest.raises(ValueError, match="at most 77 tokens"):
        find_words(model, "red apple " * 60)


def test_a_token_of_a_textual_inversion_is_a_word(model):
    tokenizer = SimpleTokenizer()
    tokenizer.add_tokens("<cat-toy>")
    other = StableDiffusion(weights=None, config=TINY)
    other._tokenizer = tokenizer
    assert find_words(other, "a <cat-toy>, red") == [
        Word("a", (1,)),
        Word("<cat-toy>", (2,)),
        Word("red", (4,)),
    ]


def test_what_cleaning_joins(model):
    """A tokenizer whose words are not those between spaces is refused, not read wrongly."""

    class Joins(SimpleTokenizer):
        def encode(self, text):
            return super().encode(text.replace(" ", ""))

    other = StableDiffusion(weights=None, config=TINY)
    other._tokenizer = Joins()
    with pytest.raises(ValueError, match="'red apple' are not those of its words"):
        find_words(other, "red apple")
    for wrong in (5, None, ["a"], np.zeros(3)):
        with pytest.raises(ValueError, match="prompt must be a str"):
            find_words(model, wrong)
