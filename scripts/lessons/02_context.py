"""Lesson 2: context. How tokens become vectors that know of each other.

    python scripts/lessons/02_context.py

Lesson 1 comes before: tokens.
"""

import numpy as np
from lesson import begin, save_picture, where
from keras import ops

from stable_diffusion import StableDiffusion
from stable_diffusion.explain import attention_probe
from stable_diffusion.text_encoder import CLIPEmbedding, CLIPEncoderLayer

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)  # the small checkpoint of this package
prompt = "a red apple on a blue background"

# --- 1. A vector for each token ------------------------------------------------------------------
#
# An id is only a name. The text encoder turns it into a vector: 128 numbers here, 768 in Stable
# Diffusion 1. First it looks two of them up in tables and adds them: one for the token, one for its
# place. Without the second, "cat bites dog" and "dog bites cat" would be the same.

tokens = np.array([model.tokenize(prompt)])  # the small checkpoint has a vocabulary of its own
positions = np.arange(77)[None]
embedding = model.text_encoder.get_layer("clip_embedding")
embedded = np.array(ops.convert_to_numpy(embedding([tokens, positions])))
print(f"tokens {tokens.shape} become vectors {embedded.shape}: {where(CLIPEmbedding)}")

# "a" stands there twice, as tokens 1 and 5. Its two vectors differ only by their places.

token_table, place_table = (np.array(weights) for weights in embedding.get_weights())
assert tokens[0, 1] == tokens[0, 5]
difference = embedded[0, 1] - embedded[0, 5] - (place_table[1] - place_table[5])
print(f"token table {token_table.shape}, place table {place_table.shape}")
print(f"the two vectors of 'a', less their places, differ by {np.abs(difference).max():.0e}")

# --- 2. Tokens look at each other ----------------------------------------------------------------
#
# Then come layers, 3 here and 12 in Stable Diffusion 1. In each, every token looks at itself and at
# those before it, and takes something from them. So "apple" can learn that it is red. This is
# attention, taken apart in lesson 8: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, (1).
# Here we only ask who looks at whom: a table of shares for each layer. A row is a token that looks,
# a column one that is looked at, a row sums to 1. A layer has N such tables, its "heads".

shares = {}


def see(probabilities, place):
    """Keeps a layer's shares, (1, N, 77, 77)."""
    shares[place.layer] = probabilities[0].mean(axis=0)  # the mean of the heads' tables


with attention_probe(model, see, component="text_encoder"):
    context = model.encode_text(prompt)
print(
    f"\nlayers {list(shares)}, a table each: {shares['layer_0'].shape}, {where(CLIPEncoderLayer)}"
)
print(f"the context: {context.shape}, what the rest of the model knows of the prompt")
above = np.triu(shares["layer_0"], 1).max()
print(f"the largest share above the diagonal is {above}: nobody looks at what comes later")

# Rows and columns: start, a, red, apple, on, a, blue, background, end. Bright is much (square roots
# are shown, so that small shares show too). Above the diagonal all is black: no token sees those
# after it ("causal"). So the end token is the first that has seen the whole prompt. In layer_1 the
# first words look mostly at column 0: the start says nothing, so it is the place to look for a
# token that needs nothing.

first = [(name, np.sqrt(table[:9, :9])) for name, table in shares.items()]
save_picture(out / "02_looks.png", [first])

# --- 3. The same word is another vector in another prompt ----------------------------------------
#
# Guess: where do these two contexts differ?  a red apple ...   a green apple ...


def compare(text, other):
    """Returns how far apart the vectors of each place are, relative to their length: (77,)."""
    a, b = (model.encode_text(one)[0] for one in (text, other))
    return np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)


changed = compare(prompt, prompt.replace("red", "green"))
print("\n'red' became 'green'. So much did each vector change:")
for n, word in enumerate(["<start>", *prompt.split(), "<end>"]):
    print(f"  {n}  {word:12} {changed[n]:5.2f}  {'#' * round(30 * changed[n])}")
print(f"  and the padding, places 9 to 76: {changed[9:].mean():.2f}")

# Before "red" nothing changed, because nobody looks ahead. The word itself changed most. All after
# it changed too: they looked at it, or at one that had. Not "apple" most, as one would expect, but
# "on" and "a": where a network keeps what it knows is its own affair. The padding has seen it too.

# --- 4. What does it look like? ------------------------------------------------------------------
#
# A column for each of the first 16 tokens, a row for each of 128 numbers, from blue (less than 0)
# to red (more than 0). On the right is the difference: most in column 2, the word itself.


def colour(values, limit=2.5):
    """Returns the colours of values: blue below 0, white at 0, red above; uint8 (..., 3)."""
    share = (values / limit).clip(-1, 1)[..., None]
    ends = np.where(share > 0, np.array([200, 30, 40]), np.array([30, 80, 190]))
    return (255 + np.abs(share) * (ends - 255.0)).astype("uint8")


green = model.encode_text(prompt.replace("red", "green"))
pairs = [("a red apple ...", context), ("a green apple ...", green)]
pairs.append(("difference", context - green))
save_picture(out / "02_context.png", [[(n, colour(c[0, :16].T).repeat(6, 1)) for n, c in pairs]])

# --- Exercises: write these functions in my_answer.py, then run check.py 02 my_answer.py ----------
#
# 1. embed(tokens, token_table, place_table): the sum of both vectors of each token. tokens is (T),
#    the tables are (vocabulary, D) and (places, D), the result is (T, D).
# 2. make_causal_mask(T): bool (T, T), True where the token of a row may look at that of a column.
# 3. find_changed(a, b): the places where two contexts (T, D) differ by more than 1e-5 in any
#    number, as a list of ints in order.
