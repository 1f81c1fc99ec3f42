"""Which words a prompt has, and where in the context their tokens are."""

from dataclasses import dataclass

from stable_diffusion.checks import list_prompts
from stable_diffusion.cleaning import clean_text
from stable_diffusion.prompts import BREAK, CHUNK, check_prompts, read_weights, split_tokens


@dataclass(frozen=True)
class Word:
    """A word of a prompt: what stands between spaces, without punctuation around it.

    Attributes:
        text: as it stands in the prompt, "Apple" in "(Red, Apple)".
        positions: places of its tokens in the context, from 0, in order.
    """

    text: str
    positions: tuple[int, ...]


def find_words(model, prompt, prompt_syntax=None) -> list[Word]:
    """Finds the words of a prompt, in order; a word that stands there twice is listed twice.

    Args:
        model: the `StableDiffusion`.
        prompt: str.
        prompt_syntax: see `StableDiffusion.encode_text`. With "webui" weights and brackets are no
            part of words, and a long prompt has positions of several chunks.

    Raises:
        ValueError: a prompt that can't be encoded, or whose tokens are not those of its words.
    """
    (prompt,) = list_prompts([prompt])
    check_prompts(model, [prompt], prompt_syntax)
    pieces = read_weights(prompt) if prompt_syntax else [[prompt, 1.0]]
    chunks = split_tokens(pieces, model.tokenizer) if prompt_syntax else [range(CHUNK)]
    positions = iter(
        chunk * (CHUNK + 2) + 1 + place
        for chunk, ids in enumerate(chunks)
        for place in range(len(ids))
    )
    words = []
    for piece in pieces:
        if list(piece) != BREAK:
            for text, count, is_word in _split_text(model.tokenizer, piece[0]):
                found = tuple(next(positions) for _ in range(count))
                words += [Word(text, found)] if is_word else []
    return words


def _split_text(tokenizer, text):
    """Yields the parts of a text: each with its number of tokens, and whether it is a word."""

    def encode(part):
        return tokenizer.encode(part)[1:-1]

    whole = encode(text)
    for parts in (text.split(), clean_text(text).split()):  # cleaning may join what a space parts
        if sum(map(encode, parts), []) == whole:
            break
    else:
        raise ValueError(f"The tokens of {text!r:.200} are not those of its words.")
    for part in parts:
        for start, end in _list_spans(part):
            split = part[:start], part[start:end], part[end:]
            if sum(map(encode, split), []) == encode(part):
                break
        for n, piece in enumerate(split):
            yield piece, len(encode(piece)), n == 1 and start < end


def _list_spans(part):
    """Lists where a word may begin and end: letters and digits, and then more and more around them.

    The token <cat-toy> of a textual inversion is a word with its brackets.
    """
    inside = [n for n, letter in enumerate(part) if letter.isalnum()]
    if not inside:
        return [(0, 0)]
    spans = [
        (start, end)
        for start in range(inside[0] + 1)
        for end in range(inside[-1] + 1, len(part) + 1)
    ]
    return sorted(spans, key=lambda span: span[1] - span[0])
