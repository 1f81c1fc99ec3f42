"""Compares `stable_diffusion.clip_tokenizer` with KerasCV's tokenizer, id by id.

Only on clean text: KerasCV does not repair text with ftfy.
"""

import random

import pytest

from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.files import WEIGHTS_DIR

keras_cv_tokenizer = pytest.importorskip("keras_cv.src.models.stable_diffusion.clip_tokenizer")

PROMPTS = [
    "",
    "A photograph of an astronaut riding a horse",
    "a cute magical flying dog, fantasy art drawn by disney concept artists, golden colour",
    "Portrait of a cat, 35mm, f/1.8, highly detailed; trending on ArtStation!!!",
    "don't stop: it's the artist's 2nd painting (they've said)",
    "  spaces\tand\nlines  ",
    "猫 кошка γάτα قط 🐱",
    "a <|endoftext|> b &amp; c",
]


@pytest.fixture
def both():
    path = str(WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz")
    return SimpleTokenizer(path), keras_cv_tokenizer.SimpleTokenizer(path)


def test_vocabularies_are_equal(both):
    ours, theirs = both
    assert ours.vocab == theirs.vocab
    assert ours.encoder == theirs.encoder
    assert (ours.start_of_text, ours.end_of_text) == (theirs.start_of_text, theirs.end_of_text)


def test_ids_are_equal_on_clean_text(both):
    ours, theirs = both
    rng = random.Random(0)
    alphabet = "aaabcdeeefghiiijklmnoooprstuvwxyzABCXYZ0123456789      ,.!?-_()[]{}:;'/*+=äéñжщ猫"
    fuzzed = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2000)]
    for text in PROMPTS + fuzzed:
        assert ours.encode(text) == theirs.encode(text), text


def test_ids_of_added_tokens_are_equal(both):
    for tokenizer in both:
        assert tokenizer.add_tokens(["<my-cat>", "<my-dog>"]) == 2
        assert tokenizer.add_tokens("<my-cat>") == 0
    ours, theirs = both
    for text in ["<my-cat>", "a photo of <my-cat> and <my-dog>, painted", "a <my-dog>."]:
        assert ours.encode(text) == theirs.encode(text), text
