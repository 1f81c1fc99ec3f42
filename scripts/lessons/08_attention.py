"""Lesson 8: attention and words. The equation by hand, and where an image looks at which word.

    python scripts/lessons/08_attention.py

Lesson 2 (context) and lesson 4 (one step) come before.
"""

import numpy as np
from lesson import begin, save_picture, where

from stable_diffusion import StableDiffusion
from stable_diffusion.attention_block import Attention, attend, attention_probabilities
from stable_diffusion.block import uncompiled
from stable_diffusion.explain import attention_probe, heat_maps
from stable_diffusion.explain.probe import list_attention
from stable_diffusion.noise_scheduler import timestep_embedding

out = begin(__doc__)
model = StableDiffusion(weights="emoji", jit_compile=False)
unet, prompt = model.diffusion_model, "a penguin on a pink background"

# --- 1. Real queries and keys --------------------------------------------------------------------
#
# Most layers of the UNet see only a cell and its neighbours. Attention sees everything at once. In
# cross-attention each cell of the image asks all 77 tokens of the prompt. What a cell asks is a
# vector, its query q. Each token has a key k, "what I am about", and a value v, "what you get from
# me". We run the UNet once, on noise, and catch the q and k of one of its layers.

layers = {name: one for name, kind, one in list_attention(unet) if kind == "cross"}
caught = []


def catch(q, k, *others):
    caught.append((np.array(q), np.array(k)))
    return attend(q, k, *others)  # which is what the layer does when nobody looks


layer = layers["up_1_attn_0"]  # of 8x8 cells, on the way up to the latent's 16x16
layer.probe = catch
noise = np.random.default_rng(0).normal(size=(1, 16, 16, 8)).astype("float32")
embedding = timestep_embedding([999], model.config.unet.widths[0])
with uncompiled(unet):  # layer by layer, so that we see numbers
    unet.predict_on_batch([noise, embedding, model.encode_text(prompt)])
layer.probe = None
q, k = caught[0]
print(f"q {q.shape}: 8x8 cells; k {k.shape}: 77 tokens. It is one of {len(layers)} such layers,")
print(f"{where(Attention)}, and has {layer.heads} heads.")

# --- 2. softmax(q kᵀ / √d) -----------------------------------------------------------------------
#
# Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1. Each of 3 heads looks for
# something else, with d = 32 numbers of its own. The products q kᵀ, the scores, are large where
# question and key fit; √d keeps them small if d is large. softmax makes shares of them: e to the
# power of each score, divided by the sum, so that the shares of a cell sum to 1. In the end a cell
# gets the values of all tokens, each times its share.

queries = q.reshape(64, 3, 32).transpose(1, 0, 2)  # (3, 64, 32): head, cell, number
keys = k.reshape(77, 3, 32).transpose(1, 0, 2)  # (3, 77, 32): head, token, number
scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(32)  # (3, 64, 77): head, cell, token
shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
theirs = attention_probabilities(q.reshape(1, 64, 3, 32), k.reshape(1, 77, 3, 32))[0]
apart = np.abs(shares - np.array(theirs)).max()
print(f"shares {shares.shape}; those of {where(attention_probabilities)} differ by {apart:.0e}")

# --- 3. Where an image looks at a word -----------------------------------------------------------
#
# `attention_probe` (lesson 2) shows the shares of every layer. Enlarge those of a word to the size
# of the image, and sum them over layers, heads and steps: that is its heat map, bright where the
# image asked for it. Tang et al. 2022, https://arxiv.org/abs/2210.04885 (DAAM), equation 5.

options = {"seed": 0, "num_steps": 25, "verbose": 0}
result = heat_maps(model, prompt, **options)
print(f"\nheat maps {result.maps['pink'].shape} of {', '.join(result.maps)}: {where(heat_maps)}")
row = [(word, result.overlay(word)) for word in ("penguin", "pink", "background")]
save_picture(out / "08_words.png", [[("the image", result.image), *row]])

# The penguin asks for "penguin". But "pink" and "background" are all over the place. Why?

# --- 4. Take the words away ----------------------------------------------------------------------
#
# A probe may return other shares, and the model goes on with them. We set those of some tokens to
# 0, and divide the rest so that they sum to 1 again. First we hide the words. Then what comes after
# them: the end token and the padding (lesson 1). Guess what is lost.

last = len(prompt.split())  # place of the last word: here each word is one token, after the start


def generate_without(hidden):
    before = []  # the shares of the hidden tokens, in each layer and step

    def hide(probabilities, place):  # (B, N, T, 77): batch, heads, cells, tokens
        shares = probabilities[place.prompt]  # a view of the half that sees our prompt (lesson 6)
        before.append(shares[..., hidden].sum(axis=-1).mean())
        shares[..., hidden] = 0
        shares /= shares.sum(axis=-1, keepdims=True)
        return probabilities

    with attention_probe(model, hide, kinds="cross"):
        return model.text_to_image(prompt, **options)[0], np.mean(before)


row = [("all tokens", result.image)]
for name, hidden in (("no words", slice(1, last + 1)), ("no end, no padding", slice(last + 1, 77))):
    image, share = generate_without(hidden)
    print(f"{name}: these tokens had {share:.0%} of all shares")
    row.append((f"{name}: -{share:.0%}", image))
save_picture(out / "08_hidden.png", [row])

# Without its words it is the same penguin! Without the padding the pink fades. Lesson 2 told why:
# the padding has seen the whole prompt. A heat map shows where a word's own token was asked, not
# all that the word did.

# --- Exercises: write these functions in my_answer.py, then run check.py 08 my_answer.py ----------
#
# 1. attend_by_hand(q, k, v): softmax(q kᵀ / √d) v. q is (N, T, d), k and v are (N, S, d).
#    Scores may be 1000, and e^1000 is more than a float can hold.
# 2. map_word(shares, tokens, size): a heat map (h, w) of maximum 1 from shares (N, h w, S). Sum
#    over tokens, a list of places, and take the mean over heads.
# 3. weigh_word(shares, tokens, factor): new shares (B, N, T, S) in which these tokens count
#    `factor` times as much, and which sum to 1 over S again.
