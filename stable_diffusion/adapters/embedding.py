"""Textual inversion: a new word for prompts, of one or several vectors that were trained for it.

A file has the vectors as one tensor, (D,) or (n, D) of the text encoder's width D, under the word
(diffusers) or under "emb_params" (AUTOMATIC1111's web UI, where the file's name is the word). The
text encoder's table of token embeddings gets a row for each vector, the tokenizer a token for each
row: "<cat>", "<cat>_1", "<cat>_2", and so on, as in diffusers. Where a prompt has "<cat>", all of
them are meant.

References:
    Gal et al. 2022, https://arxiv.org/abs/2208.01618.
    https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/textual_inversion.py
"""

import copy
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError

from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.checkpoints.tensors import (
    MAX_NAMES,
    looks_like,
    open_safetensors,
    save_safetensors,
)
from stable_diffusion.clip_tokenizer import SimpleTokenizer, expand_tokens
from stable_diffusion.text_encoder import TextEncoder

UNNAMED = "emb_params"
TWO_ENCODERS = {"clip_g", "clip_l"}  # names in the files of Stable Diffusion XL


def load_embedding(pipeline, path: str | Path, token: str | None = None) -> list[int]:
    """Adds a textual inversion: a token that prompts can have from then on.

    The pipeline gets another text encoder, with the same parameters and dtype policy and a larger
    table of tokens, so get it from the pipeline anew. `config.text.vocab_size` of the pipeline and
    of its checkpoint grow with it.

    Args:
        pipeline: a `StableDiffusion`.
        path: a .safetensors file of diffusers' or AUTOMATIC1111's kind, `(D,)` or `(n, D)`.
        token: how it is written in prompts; None for its name in the file, or for the file's name
            where it has none there.

    Returns:
        The ids that the token stands for, one for each vector.

    Raises:
        ValueError: a file that isn't an embedding, or one for another width; a token that there is
            already, or that can't be one. Nothing is changed then.

    Example:
        ```python
        model = StableDiffusion()
        load_embedding(model, "cat-toy.safetensors", token="<cat-toy>")
        model.text_to_image("a <cat-toy> on a beach")
        ```
    """
    vectors, name = _read(open_safetensors(path))
    return add_token(pipeline, name if token is None else token, vectors, path)


def add_token(pipeline, token: str, vectors: np.ndarray, source="The embedding") -> list[int]:
    """Adds a token with its vectors to a pipeline, see `load_embedding`.

    Args:
        pipeline: a `StableDiffusion`.
        token: how it is written in prompts.
        vectors: float array `(n, D)`.
        source: what errors name.

    Returns:
        The ids that the token stands for.

    Raises:
        ValueError: as `load_embedding`.
    """
    tokenizer, old = pipeline.tokenizer, pipeline.text_encoder
    if not isinstance(old, TextEncoder) or not isinstance(tokenizer, SimpleTokenizer):
        raise ValueError(
            f"An embedding needs this package's TextEncoder and SimpleTokenizer, not "
            f"{type(old).__name__} and {type(tokenizer).__name__}."
        )
    tokens = _name_vectors(tokenizer, token, len(vectors))
    rows, width = old.weights[0].shape  # the embedding of tokens
    if vectors.shape[1] != width:
        raise ValueError(
            f"{source} is for a text encoder of width {vectors.shape[1]}, not {width}: 768 is "
            f"Stable Diffusion 1's, 1024 is 2's."
        )
    first = len(tokenizer.vocab)
    if first > rows:
        raise ValueError(f"The tokenizer has {first} tokens, the text encoder only {rows}.")
    with np.errstate(over="ignore"):
        vectors = vectors.astype(old.weights[0].dtype)
    if not np.isfinite(vectors.astype("float32")).all():
        raise ValueError(f"{source} has values that are not finite in {old.weights[0].dtype}.")

    table = ops.convert_to_numpy(old.weights[0].value).astype(vectors.dtype)
    table = np.concatenate([table[:first], vectors, table[first + len(vectors) :]])
    new = _resize(pipeline, old, len(table))
    new.weights[0].assign(table)
    for ours, theirs in zip(new.weights[1:], old.weights[1:], strict=True):
        ours.assign(theirs.value)
    tokenizer.add_tokens(tokens)
    expand_tokens(tokenizer)
    pipeline.checkpoint = copy.copy(pipeline.checkpoint)  # other pipelines can have the same
    for holder in (pipeline, pipeline.checkpoint):
        text = replace(holder.config.text, vocab_size=len(table))
        holder.config = replace(holder.config, text=text)
    pipeline.changes.move(old, new)
    pipeline._text_encoder = new
    return list(range(first, first + len(vectors)))


def save_embedding(path: str | Path, token: str, vectors: np.ndarray):
    """Writes the vectors of a token as a .safetensors file that diffusers reads, too.

    Args:
        path: path of the file.
        token: how it is written in prompts.
        vectors: float array `(n, D)`, of the dtype that is stored.
    """
    save_safetensors(path, {token: vectors})


def _read(file):
    """Returns the vectors of a file as `(n, D)`, and what the token is called in it."""
    path = Path(file.path)
    if TWO_ENCODERS & file.shapes.keys():
        raise ValueError(f"{path} is for the two text encoders of Stable Diffusion XL.")
    if len(file.shapes) != 1:
        names = ", ".join(sorted(file.shapes)[:MAX_NAMES])
        more = ", ..." if len(file.shapes) > MAX_NAMES else ""
        raise ValueError(
            f"{path} must have one tensor to be an embedding; it has {len(file.shapes)} "
            f"({names}{more}).{looks_like(file.shapes)}"
        )
    (name, shape), *_ = file.shapes.items()
    if name in file.odd or len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(
            f"{path} must have float vectors, (D,) or (n, D), not {name} {shape} of "
            f"{file.odd.get(name, 'float')}."
        )
    try:
        vectors = file.read(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} in {path} can't be read: {error}") from error
    return vectors.reshape(-1, shape[-1]), path.stem if name == UNNAMED else name


def _name_vectors(tokenizer, token, count):
    """Returns the names of a token's vectors, all of them new.

    Raises:
        ValueError: one that exists, or that `expand_tokens` would take for another's vector.
    """
    if not isinstance(token, str) or not token or token != token.strip():
        raise ValueError(f"token must be a str, not empty nor space-padded, not {token!r}.")
    tokens = [token, *(f"{token}_{n}" for n in range(1, count))]
    # One more: with it, there would be a vector too many.
    if known := [name for name in (*tokens, f"{token}_{count}") if name in tokenizer.encoder]:
        raise ValueError(f"The tokenizer knows {known[0]!r} already; pass another token.")
    base, _, number = token.rpartition("_")
    if base in tokenizer.vocab[tokenizer.end_of_text + 1 :] and number.isdecimal():
        raise ValueError(f"{token!r} would be a vector of the token {base!r}; pass another token.")
    return tokens


def _resize(pipeline, old, rows):
    """Returns a text encoder like another, with a table of `rows` tokens and zeros everywhere."""
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(old.layers[2].dtype_policy)
        with uninitialized():
            new = pipeline.TextEncoder(
                old.inputs[0].shape[1],
                rows,
                name=old.name,
                download_weights=False,
                config=replace(old.config, vocab_size=rows),
            )
    finally:
        keras.config.set_dtype_policy(policy)
    new.compile(jit_compile=pipeline.jit_compile)
    return new
