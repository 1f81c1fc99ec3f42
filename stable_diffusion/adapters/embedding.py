"""Textual inversion: a new word for prompts, with one or several trained vectors.

A file has the vectors as one tensor of shape (D,) or (n, D), where D is the width of the text
encoder. The name of the tensor is the word (diffusers), or "emb_params" (AUTOMATIC1111's web
interface); then the name of the file is the word. When an embedding is loaded, the text encoder's
table of token embeddings gets a row for each vector, and the tokenizer gets a token for each row:
"<cat>", "<cat>_1", "<cat>_2", and so on, as in diffusers. In a prompt, "<cat>" stands for all of
them.

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
    guess_family,
    open_safetensors,
    save_safetensors,
)
from stable_diffusion.clip_tokenizer import SimpleTokenizer, expand_tokens
from stable_diffusion.text_encoder import TextEncoder

UNNAMED = "emb_params"  # the name of the tensor if the file's name is the word
TWO_ENCODERS = {"clip_g", "clip_l"}  # names in files for Stable Diffusion XL


def load_embedding(pipeline, path: str | Path, token: str | None = None) -> list[int]:
    """Adds a textual inversion: a token that prompts can contain from then on.

    The pipeline gets a new text encoder with a larger table of tokens, and with the same parameters
    and dtype policy. References to the old text encoder do not see the token.
    `config.text.vocab_size` of the pipeline and of its checkpoint grow, too.

    Args:
        pipeline: a `StableDiffusion`.
        path: path of a .safetensors file, as diffusers or AUTOMATIC1111's web interface writes it.
        token: how prompts write the token. None is its name in the file, or the name of the file
            if it has none there.

    Returns:
        The ids that the token stands for, one for each vector.

    Raises:
        ValueError: the file is no embedding or has vectors of another width, or the token exists
            already or is not allowed. Nothing is changed then.

    Example:
        ```python
        model = StableDiffusion()
        load_embedding(model, "cat-toy.safetensors", token="<cat-toy>")
        model.text_to_image("a <cat-toy> on a beach")
        ```
    """
    vectors, name = _read_vectors(open_safetensors(path))
    return add_token(pipeline, name if token is None else token, vectors, path)


def add_token(pipeline, token: str, vectors: np.ndarray, source="The embedding") -> list[int]:
    """Adds a token and its vectors to a pipeline, see `load_embedding`.

    Args:
        pipeline: a `StableDiffusion`.
        token: how prompts write the token.
        vectors: float array `(n, D)`.
        source: where the vectors came from, for errors.

    Returns:
        The ids that the token stands for, one for each vector.

    Raises:
        ValueError: see `load_embedding`.
    """
    tokenizer, old = pipeline.tokenizer, pipeline.text_encoder
    if not isinstance(old, TextEncoder) or not isinstance(tokenizer, SimpleTokenizer):
        raise ValueError(
            f"An embedding needs this package's TextEncoder and SimpleTokenizer, not "
            f"{type(old).__name__} and {type(tokenizer).__name__}."
        )
    tokens = _make_names(tokenizer, token, len(vectors))
    rows, width = old.weights[0].shape  # the table of token embeddings
    if vectors.shape[1] != width:
        raise ValueError(
            f"{source} is for a text encoder of width {vectors.shape[1]}, not {width}. Stable "
            f"Diffusion 1 has width 768, Stable Diffusion 2 has 1024."
        )
    first = len(tokenizer.vocab)
    if first > rows:
        raise ValueError(
            f"The tokenizer has {first} tokens, but the text encoder has only {rows} embeddings."
        )
    with np.errstate(over="ignore"):
        vectors = vectors.astype(old.weights[0].dtype)
    if not np.isfinite(vectors.astype("float32")).all():
        raise ValueError(f"{source} has values that are not finite in {old.weights[0].dtype}.")

    table = ops.convert_to_numpy(old.weights[0].value).astype(vectors.dtype)
    table = np.concatenate([table[:first], vectors, table[first + len(vectors) :]])
    new = _make_encoder(pipeline, old, len(table))
    new.weights[0].assign(table)
    for ours, theirs in zip(new.weights[1:], old.weights[1:], strict=True):
        ours.assign(theirs.value)
    tokenizer.add_tokens(tokens)
    expand_tokens(tokenizer)
    pipeline.checkpoint = copy.copy(pipeline.checkpoint)  # other pipelines may use it, too
    for holder in (pipeline, pipeline.checkpoint):
        text = replace(holder.config.text, vocab_size=len(table))
        holder.config = replace(holder.config, text=text)
    pipeline.changes.copy_originals(old, new)
    pipeline._text_encoder = new
    return list(range(first, first + len(vectors)))


def save_embedding(path: str | Path, token: str, vectors: np.ndarray):
    """Writes the vectors of a token as a .safetensors file, which diffusers reads, too.

    Args:
        path: path of the file.
        token: how prompts write the token.
        vectors: float array `(n, D)`. The file has its dtype.
    """
    save_safetensors(path, {token: vectors})


def _read_vectors(file):
    """Returns the vectors of a file as an array `(n, D)`, and the token's name."""
    path = Path(file.path)
    if TWO_ENCODERS & file.shapes.keys():
        raise ValueError(f"{path} is for the two text encoders of Stable Diffusion XL.")
    if len(file.shapes) != 1:
        names = ", ".join(sorted(file.shapes)[:MAX_NAMES])
        more = ", ..." if len(file.shapes) > MAX_NAMES else ""
        raise ValueError(
            f"{path} must have one tensor to be an embedding, not {len(file.shapes)} "
            f"({names}{more}).{guess_family(file.shapes)}"
        )
    (name, shape), *_ = file.shapes.items()
    if name in file.odd or len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(
            f"{path} must have float vectors, (D,) or (n, D), not {name} {shape} of "
            f"{file.odd.get(name, 'float')}."
        )
    try:
        vectors = file.read_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} in {path} can't be read: {error}") from error
    return vectors.reshape(-1, shape[-1]), path.stem if name == UNNAMED else name


def _make_names(tokenizer, token, count):
    """Returns the tokens for `count` vectors of a new token, such as "<cat>" and "<cat>_1".

    Raises:
        ValueError: one of them exists already, or `expand_tokens` would assign it to another token.
    """
    if not isinstance(token, str) or not token or token != token.strip():
        raise ValueError(
            f"token must be a str that is not empty, without spaces around it, not {token!r}."
        )
    tokens = [token, *(f"{token}_{n}" for n in range(1, count))]
    # One name more than vectors: if that exists, `expand_tokens` would add it to this token.
    if known := [name for name in (*tokens, f"{token}_{count}") if name in tokenizer.encoder]:
        raise ValueError(f"The tokenizer has {known[0]!r} already; pass another token.")
    base, _, number = token.rpartition("_")
    if base in tokenizer.vocab[tokenizer.end_of_text + 1 :] and number.isdecimal():
        raise ValueError(
            f"{token!r} is a name for a vector of the token {base!r}; pass another token."
        )
    return tokens


def _make_encoder(pipeline, old, rows):
    """Returns a text encoder like `old`, with a table of `rows` tokens; all parameters are zero."""
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
