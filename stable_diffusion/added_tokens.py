"""Tokens beside CLIP's own, as textual inversion adds them: checking and finding them.

A text is searched for them before it is cleaned and cut into words.
"""

import regex

MAX_TOKEN = 150  # characters: to search a prompt for a longer one may take cubic time


class AddedTokens:
    """Finds tokens in a text, in upper or lower case, wherever they are.

    Of two that start at the same place it takes the longer one, and of "<cat>" and "<CAT>" the one
    that is written in the same case.

    Args:
        tokens: list of them.
    """

    def __init__(self, tokens):
        # The longest comes first, so it is found. Without tokens the pattern matches nothing, and
        # regex sees this at once.
        added = sorted(tokens, key=len, reverse=True)
        self._patterns = {token: make_token_pattern(token) for token in added}
        self._any = regex.compile(f"({'|'.join(self._patterns.values()) or '#(?!)'})")

    def split(self, text):
        """Splits a text: a list of `(part, token)`, where the token is None if the part is none."""
        parts = self._any.split(text)  # what the pattern's group has captured is at the odd places
        return [(part, self._find(part) if n % 2 else None) for n, part in enumerate(parts)]

    def _find(self, part):
        alike = (token for token in self._patterns if regex.fullmatch(self._patterns[token], part))
        return part if part in self._patterns else next(alike)


def make_token_pattern(token: str) -> str:
    """Returns a pattern that finds an added token in any case, with any white space inside it."""
    return "(?i:" + r"\s+".join(map(regex.escape, token.split())) + ")"


def check_tokens(tokens):
    """Returns tokens, one or several, as a list.

    Raises:
        ValueError: one is not a string, is empty, has white space at an end, or has more than
            `MAX_TOKEN` characters, not counting an ending such as _12.
    """
    tokens = [*tokens] if isinstance(tokens, list | tuple | set) else [tokens]
    if bad := [t for t in tokens if not isinstance(t, str) or not t or t != t.strip()]:
        raise ValueError(f"A token must be a str, not empty nor space-padded: {bad[0]!r:.200}")
    if long := [t for t in tokens if len(regex.sub("_[0-9]{1,3}$", "", t)) > MAX_TOKEN]:
        raise ValueError(
            f"A token may have {MAX_TOKEN} characters, not {len(long[0])}: {long[0]!r:.{MAX_TOKEN}}"
        )
    return tokens


def expand_tokens(tokenizer):
    """Makes `encode` return all ids of an added token that stands for several vectors.

    Such a token was added under several names: "<cat>", "<cat>_1", "<cat>_2" and so on. So a saved
    tokenizer still tells which vectors belong together.

    Args:
        tokenizer: the `SimpleTokenizer`, whose `vectors` are made anew.
    """
    added = tokenizer.vocab[tokenizer.end_of_text + 1 :]
    ids = {token: n for n, token in enumerate(added, tokenizer.end_of_text + 1)}
    tokenizer.vectors = {}
    for token in added:
        names = [token]
        while (further := f"{token}_{len(names)}") in ids:
            names.append(further)
        if len(names) > 1:
            tokenizer.vectors[token] = [ids[name] for name in names]
