"""Solutions of lesson 1."""

from stable_diffusion import SimpleTokenizer

tokenizer = SimpleTokenizer()


def count_tokens(prompt):
    return len(tokenizer.encode(prompt))  # with start and end, without padding


def shorten_prompt(prompt):
    words = prompt.split()
    while count_tokens(" ".join(words)) > 77:
        words.pop()  # one word less
    return " ".join(words)


def join_pairs(pieces, ranks):
    while True:
        pairs = list(zip(pieces, pieces[1:], strict=False))
        known = [(ranks[pair], n) for n, pair in enumerate(pairs) if pair in ranks]
        if not known:
            return pieces
        _, n = min(known)  # the lowest rank; of equal ranks the smallest place
        pieces = [*pieces[:n], "".join(pairs[n]), *pieces[n + 2 :]]
