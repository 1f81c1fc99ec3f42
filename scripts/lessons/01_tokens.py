"""Lesson 1: tokens. How a prompt becomes numbers.

    python scripts/lessons/01_tokens.py

Nothing comes before. You need Python, and a little NumPy.
"""

import numpy as np
from lesson import begin, save_picture, where

from stable_diffusion import SimpleTokenizer
from stable_diffusion.cleaning import clean_text

out = begin(__doc__)
# Stable Diffusion's, which OpenAI made for the model CLIP. (The small checkpoint of this package
# has a list of its own with 3,988 tokens, so elsewhere you will see other numbers for the same
# words.)
tokenizer = SimpleTokenizer()
prompt = "A red apple, on a BLUE background"

# --- 1. Words become numbers ---------------------------------------------------------------------
#
# A network computes with numbers. So a prompt is cut into pieces, the tokens, and each token has a
# number, its id: the place where it stands in a fixed list, the vocabulary.

ids = tokenizer.encode(prompt)
print(f"{prompt!r} has {len(ids)} tokens:")
for token_id in ids:
    print(f"  {token_id:6}  {tokenizer.vocab[token_id]}")
print(f"The vocabulary has {len(tokenizer.vocab):,} tokens. What finds those of a prompt is in")
print(f"{where(SimpleTokenizer.encode)}.")

# The first and the last are no words: they say that the text starts and ends. "</w>" is the end of
# a word: "apple</w>" is a word by itself or the end of one. Spaces only divide words: how many
# there are does not matter. Before that the text is cleaned: upper case becomes lower case, and
# what broke on its way through the web is mended, such as "&amp;" for "&".

print(f"\ncleaned: {clean_text('  A &amp; B  CafÃ©  ')!r}, by {where(clean_text)}")

# --- 2. Why not one number for each word? --------------------------------------------------------
#
# There are too many words, and new ones come every day. And why not one for each letter? Then texts
# are long, and a letter means nothing. Byte-pair encoding lies between: start with letters, and
# join the pair of neighbours that was most frequent in a large text, again and again, 48,894 times.
# Frequent words end as one token, rare ones as a few pieces, and nothing is ever unknown.
# Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, section 3.2. Before you look: how many
# pieces have cat, cats, hippopotamus, stablediffusion, naïve, 日本 and 🍎?

print()
for word in ("cat", "cats", "hippopotamus", "stablediffusion", "naïve", "日本", "🍎"):
    pieces = [tokenizer.vocab[n] for n in tokenizer.encode(word)[1:-1]]
    print(f"  {word:16} {len(pieces)}: {' + '.join(pieces)}")

# Letters are stored as bytes, and those beyond English have several: "日本" has six. Its pieces
# look strange: each sign in them stands for one byte. The emoji's four bytes were so frequent
# that they became one token.

# --- 3. Joining by hand --------------------------------------------------------------------------
#
# The list of joins is ordered: what was learned first is joined first. Let us do it for one word.
# Which pair of its letters is the most frequent in English, would you say?


def find_rank(pair):
    """Returns when a pair's piece was learned: its place in the vocabulary; None if never."""
    return tokenizer.encoder.get("".join(pair))


print()
pieces = [*"strawberr", "y</w>"]
while True:
    print("  " + " ".join(pieces))
    pairs = list(zip(pieces, pieces[1:], strict=False))
    ranks = [find_rank(pair) for pair in pairs]
    if not any(ranks):
        break
    first = min((rank, n) for n, rank in enumerate(ranks) if rank)[1]
    pieces[first : first + 2] = ["".join(pairs[first])]
assert [tokenizer.encoder[piece] for piece in pieces] == tokenizer.encode("strawberry")[1:-1]

# --- 4. Always 77 --------------------------------------------------------------------------------
#
# The model that reads tokens was made for exactly 77 of them, start and end included. A shorter
# prompt is filled up, "padded", with the end token (Stable Diffusion 2 pads with 0). A longer one
# is refused by this package; others cut it off silently, and the last words do nothing.

padded = ids + [tokenizer.end_of_text] * (77 - len(ids))
print(f"\npadded: {len(padded)} ids, of which {77 - len(ids)} are padding")

# The picture has a row for each of three prompts, and 77 columns. Light grey is padding, dark grey
# are the start and the end; every other colour is an id. The same colour is the same token.


def colour_tokens(text):
    """Returns a row of colours, uint8 (1, 77, 3)."""
    own = tokenizer.encode(text)
    row = np.full((1, 77, 3), 235, "uint8")
    for n, token_id in enumerate(own):
        row[0, n] = np.random.default_rng(token_id).integers(0, 200, 3)
    row[0, [0, len(own) - 1]] = 100
    wide = row.repeat(24, axis=0).repeat(8, axis=1)
    wide[:, ::8] = 255  # a line between two places
    return wide


texts = [prompt, "a blue apple on a red background", "an astronaut riding a horse, " * 12]
save_picture(out / "01_tokens.png", [[(text[:64], colour_tokens(text))] for text in texts])

# The first two have the same tokens but for the comma, in another order. The third has 74 of 77.

# --- Exercises: write these functions in my_answer.py, then run check.py 01 my_answer.py ----------
#
# 1. count_tokens(prompt): how many of the 77 places a prompt takes, start and end included.
# 2. shorten_prompt(prompt): the longest beginning of the prompt, of whole words, that has at most
#    77 tokens with start and end. Words are what stands between spaces; join them with one space.
# 3. join_pairs(pieces, ranks): byte-pair encoding. pieces is a list of str, ranks a dict from a
#    pair (a, b) to its rank. Join the pair of the lowest rank, the leftmost of equal ones, until no
#    pair has a rank; return the list of pieces.
