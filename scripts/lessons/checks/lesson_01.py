"""Checks of lesson 1."""

from lesson import Wrong

from stable_diffusion import SimpleTokenizer

encode = SimpleTokenizer().encode
LONG = "a photo of an astronaut, riding a horse on the moon; " * 12


def check_count_tokens(answer):
    for prompt in ("a red apple", "a well-known hippopotamus 🍎", ""):
        found, right = answer(prompt), len(encode(prompt))
        if found == right:
            continue
        if found == right - 2:
            raise Wrong(f"{prompt!r} gave {found}: the start and the end take a place each, too.")
        if found == 77:
            raise Wrong(f"{prompt!r} gave 77: padding does not count.")
        if found == len(prompt.split()) + 2:
            raise Wrong(f"{prompt!r} gave {found}: a word can have several tokens. Encode it.")
        raise Wrong(f"{prompt!r} gave {found!r}, and it takes {right}.")


def check_shorten_prompt(answer):
    for prompt in (LONG, "cat " * 80, "hippopotamus " * 40, "a  red\napple"):
        words, found = prompt.split(), answer(prompt)
        count = max(n for n in range(len(words) + 1) if len(encode(" ".join(words[:n]))) <= 77)
        right = " ".join(words[:count])
        if not isinstance(found, str):
            raise Wrong(f"it should return a str, not {type(found).__name__}.")
        if len(encode(found)) > 77:
            raise Wrong(f"{prompt[:30]!r}... became {len(encode(found))} tokens: 77 is the most.")
        if found != right and right.startswith(found):
            raise Wrong(
                f"{prompt[:30]!r}... became {len(found.split())} words: {count} words still fit."
            )
        if found != right:
            raise Wrong(f"{prompt[:30]!r}... became {found[-40:]!r}: its end should be another.")


def check_join_pairs(answer):
    ranks = {("a", "b"): 2, ("b", "c"): 1, ("a", "bc"): 3, ("x", "x"): 0, ("xx", "x"): 5}
    cases = {
        "abc": ["abc"],
        "ab": ["ab"],
        "xxx": ["xxx"],
        "xxxx": ["xx", "xx"],
        "dabd": ["d", "ab", "d"],
        "": [],
    }
    for word, right in cases.items():
        found = answer([*word], dict(ranks))
        if word == "abc" and found == ["ab", "c"]:
            raise Wrong("a b c became ab c: b c has the lower rank, so it is joined first.")
        if word == "xxx" and found == ["x", "xx"]:
            raise Wrong("x x x became x xx: of equal ranks the leftmost pair is joined.")
        if word == "abc" and found == ["a", "bc"]:
            raise Wrong("a b c became a bc: go on, a bc has a rank too.")
        if found != right:
            raise Wrong(f"{' '.join(word)} became {found!r}, and it should be {right!r}.")


def _join_once(pieces, ranks, key=min):
    pairs = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]
    if not pairs:
        return pieces
    best = key(pairs, key=ranks.get)
    n = next(n for n, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair == best)
    return [*pieces[:n], "".join(best), *pieces[n + 2 :]]


WRONG = {
    "count_tokens": [
        (lambda prompt: len(encode(prompt)) - 2, "take a place each"),
        (lambda prompt: 77, "padding does not count"),
        (lambda prompt: len(prompt.split()) + 2, "several tokens"),
        (lambda prompt: None, "gave None"),
    ],
    "shorten_prompt": [
        (lambda prompt: prompt, "77 is the most"),
        (lambda prompt: " ".join(prompt.split()[:15]), "words still fit"),
        (lambda prompt: prompt.split(), "should return a str, not list"),
    ],
    "join_pairs": [
        (_join_once, "a bc has a rank too"),
        (lambda pieces, ranks: _join_once(pieces, ranks, max), "the lower rank"),
        (lambda pieces, ranks: ["".join(pieces)], "should be ['xx', 'xx']"),
    ],
}
