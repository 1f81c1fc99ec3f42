"""Textual inversion: a new word for prompts, with one or several trained vectors.

A file has the vectors as one tensor of shape (D,) or (n, D), where D is the width of the text
encoder. The name of the tensor is the word (diffusers). AUTOMATIC1111's web interface names the
tensor "emb_params", or "*" in a dict "string_to_param"; then the name of the file is the word. When
an embedding is loaded, the text encoder's table of token embeddings gets a row for each vector, and
the tokenizer gets a token for each row: "<cat>", "<cat>_1", "<cat>_2", and so on, as in diffusers.
In a prompt, "<cat>" stands for all of them, in upper or lower case, with or without spaces around
it (see `SimpleTokenizer.add_tokens`).

References:
    Gal et al. 2022, https://arxiv.org/abs/2208.01618.
    https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/textual_inversion.py
"""

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError

from stable_diffusion.added_tokens import MAX_TOKEN, expand_tokens
from stable_diffusion.checkpoints.building import uninitialized
from stable_diffusion.checkpoints.contents import quote
from stable_diffusion.checkpoints.tensors import (
    MAX_NAMES,
    guess_family,
    open_tensors,
    save_safetensors,
)
from stable_diffusion.checks import check_path
from stable_diffusion.clip_tokenizer import WORD_END, SimpleTokenizer
from stable_diffusion.text_encoder import TextEncoder

UNNAMED = ("emb_params", "string_to_param.")  # beginnings of names that are not the word
TWO_ENCODERS = {"clip_g", "clip_l"}  # names in files for Stable Diffusion XL


def load_embedding(pipeline, path: str | Path, token: str | None = None) -> list[int]:
    """Adds a textual inversion: a token that prompts can contain from then on.

    The pipeline gets a new text encoder with a larger table of tokens, and with the same parameters
    and dtype policy. References to the old text encoder do not see the token.
    `config.text.vocab_size` of the pipeline and of its checkpoint grow, too.

    Args:
        pipeline: a `StableDiffusion`.
        path: path of a file, as diffusers or AUTOMATIC1111's web interface writes it: safetensors,
            or PyTorch's (.pt, .bin), which needs PyTorch.
        token: how prompts write the token. None is its name in the file, or the name of the file
            if it has none there.

    Returns:
        The ids that the token stands for, one for each vector.

    Raises:
        ValueError: the file is no embedding or has vectors of another width, or the token exists
            already or is not allowed. Nothing is changed then.

    Warns:
        UserWarning: the token is found in words, as "sks" in "masks": prompts with these words
            would contain it.

    Example:
        ```python
        model = StableDiffusion()
        load_embedding(model, "cat-toy.safetensors", token="<cat-toy>")
        model.text_to_image("a <cat-toy> on a beach")
        ```
    """
    file = open_tensors(check_path("path", path))
    vectors, name = _read_vectors(file)
    ids = add_token(pipeline, name if token is None else token, vectors, path)
    inner = file.metadata.get("name", name)
    if token is None and name == Path(path).stem and inner != name:
        warnings.warn(
            f"{path} calls itself {quote(inner)!r}. In prompts the word is {name!r}, the name of "
            f"the file; the argument token sets another one.",
            stacklevel=3,
        )
    return ids


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
    tokens, vectors = _check_word(pipeline, token, vectors, source)
    _warn_of_words(pipeline.tokenizer, token)
    add_word(pipeline, tokens, vectors)
    return [pipeline.tokenizer.encoder[name] for name in tokens]


def mark_known_words(pipeline, words: dict[str, np.ndarray], source) -> dict[str, np.ndarray]:
    """Renames the words of a file that the tokenizer has already, such as "x" to "<x>".

    Args:
        pipeline, words, source: see `check_words`.

    Returns:
        The words with their new names.

    Warns:
        UserWarning: the new name of each.
    """
    vocabulary = getattr(pipeline.tokenizer, "vocab", [])
    known = set(vocabulary[: pipeline.tokenizer.end_of_text + 1]) if vocabulary else set()
    renamed = {token: f"<{token}>" for token in words if token in known}
    for token, name in renamed.items():
        warnings.warn(
            f"{source} brings the word {quote(token)!r}, which prompts have already. Write "
            f"{quote(name)!r} for it.",
            stacklevel=4,
        )
    return {renamed.get(token, token): vectors for token, vectors in words.items()}


def check_words(pipeline, words: dict[str, np.ndarray], source) -> list[tuple]:
    """Checks the words of a file that brings several, before any is added.

    Args:
        pipeline: a `StableDiffusion`.
        words: dict from token to its vectors, `(D,)` or `(n, D)`.
        source: see `add_token`.

    Returns:
        The arguments of `add_word` for each word. Those with the same vectors already are left out.

    Raises:
        ValueError: see `load_embedding`.

    Warns:
        UserWarning: see `load_embedding`.
    """
    checked = []
    for token, vectors in words.items():
        if vectors.ndim not in (1, 2) or not vectors.size:
            raise ValueError(
                f"{source}: {quote(token)} must be (D,) or (n, D), not {vectors.shape}."
            )
        vectors = vectors.reshape(-1, vectors.shape[-1])
        if not _has_word(pipeline, token, vectors):
            checked.append(_check_word(pipeline, token, vectors, source))
            _warn_of_words(pipeline.tokenizer, token)
    names = [name for tokens, _ in checked for name in tokens]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{source} has the token {twice[0]!r} twice.")
    return checked


def add_word(pipeline, tokens: list[str], vectors: np.ndarray) -> tuple:
    """Adds tokens and their vectors, which were checked, to a pipeline.

    Returns:
        The arguments that `remove_word` needs to remove them again.
    """
    table = _read_table(pipeline)
    first, after = len(pipeline.tokenizer.vocab), len(pipeline.tokenizer.vocab) + len(tokens)
    _replace_table(pipeline, np.concatenate([table[:first], vectors, table[after:]]))
    pipeline.tokenizer.add_tokens(tokens)
    expand_tokens(pipeline.tokenizer)
    return tokens, vectors, table[first:after]


def remove_word(pipeline, tokens: list[str], vectors: np.ndarray, rows: np.ndarray):
    """Removes what `add_word` has added; the ids of later tokens become smaller.

    Nothing is done if the tokenizer or the text encoder have not these tokens and vectors any more,
    because others were assigned to the pipeline.

    Args:
        pipeline, tokens, vectors, rows: what `add_word` returned.
    """
    tokenizer = pipeline.tokenizer
    if not _has_word(pipeline, tokens[0], vectors):
        return
    first, table = tokenizer.encoder[tokens[0]], _read_table(pipeline)
    _replace_table(pipeline, np.concatenate([table[:first], table[first + len(tokens) :], rows]))
    later = [name for name in tokenizer.vocab[first:] if name not in tokens]
    for name in tokenizer.vocab[first:]:
        del tokenizer.encoder[name]
    del tokenizer.vocab[first:]
    tokenizer.add_tokens(later)
    expand_tokens(tokenizer)


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
        names = ", ".join(map(quote, sorted(file.shapes)[:MAX_NAMES]))
        more = ", ..." if len(file.shapes) > MAX_NAMES else ""
        raise ValueError(
            f"{path} must have one tensor to be an embedding, not {len(file.shapes)} "
            f"({names}{more}).{guess_family(file.shapes)}"
        )
    (name, shape), *_ = file.shapes.items()
    if name in file.odd or len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(
            f"{path} must have float vectors, (D,) or (n, D), not {quote(name)} {quote(shape)} of "
            f"{file.odd.get(name, 'float')}."
        )
    try:
        vectors = file.read_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{quote(name)} in {path} can't be read: {quote(str(error))}") from error
    return vectors.reshape(-1, shape[-1]), path.stem if name.startswith(UNNAMED) else name


def _check_word(pipeline, token, vectors, source):
    """Returns the tokens for the vectors of a word, and the vectors in the dtype of the table.

    Raises:
        ValueError: see `load_embedding`.
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    if not isinstance(encoder, TextEncoder) or not isinstance(tokenizer, SimpleTokenizer):
        raise ValueError(
            f"An embedding needs this package's TextEncoder and SimpleTokenizer, not "
            f"{type(encoder).__name__} and {type(tokenizer).__name__}."
        )
    tokens = _make_names(tokenizer, token, len(vectors))
    rows, width = encoder.weights[0].shape  # the table of token embeddings
    if vectors.shape[1] != width:
        raise ValueError(
            f"{source} is for a text encoder of width {vectors.shape[1]}, not {width}. Stable "
            f"Diffusion 1 has width 768, Stable Diffusion 2 has 1024."
        )
    if len(tokenizer.vocab) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer.vocab)} tokens, but the text encoder has only "
            f"{rows} embeddings."
        )
    with np.errstate(over="ignore"):
        vectors = vectors.astype(encoder.weights[0].dtype)
    if not np.isfinite(vectors.astype("float32")).all():
        raise ValueError(f"{source} has values that are not finite in {encoder.weights[0].dtype}.")
    return tokens, vectors


def _has_word(pipeline, token, vectors):
    """Returns whether a pipeline has a token with these vectors."""
    first = getattr(pipeline.tokenizer, "encoder", {}).get(token)
    if first is None or not isinstance(pipeline.text_encoder, TextEncoder):
        return False
    table = _read_table(pipeline)
    return np.array_equal(table[first : first + len(vectors)], vectors.astype(table.dtype))


def _read_table(pipeline):
    """Returns the table of token embeddings, a numpy array of its dtype."""
    table = pipeline.text_encoder.weights[0]
    return ops.convert_to_numpy(table.value).astype(table.dtype)


def _replace_table(pipeline, table):
    """Gives a pipeline a text encoder like its own with another table of token embeddings."""
    old = pipeline.text_encoder
    new = _make_encoder(pipeline, old, len(table))
    new.weights[0].assign(table)
    for ours, theirs in zip(new.weights[1:], old.weights[1:], strict=True):
        ours.assign(theirs.value)
    pipeline.checkpoint = copy.copy(pipeline.checkpoint)  # other pipelines may use it, too
    for holder in (pipeline, pipeline.checkpoint):
        text = replace(holder.config.text, vocab_size=len(table))
        holder.config = replace(holder.config, text=text)
    pipeline.changes.copy_originals(old, new)
    pipeline._text_encoder = new


def _make_names(tokenizer, token, count):
    """Returns the tokens for `count` vectors of a new token, such as "<cat>" and "<cat>_1".

    Raises:
        ValueError: one of them exists already, or `expand_tokens` would assign it to another token.
    """
    if not isinstance(token, str) or not token[:MAX_TOKEN] == token.strip() > "":
        raise ValueError(
            f"token must be a str that is not empty, without spaces around it, and of at most "
            f"{MAX_TOKEN} characters, not {token!r:.{MAX_TOKEN}}."
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


def _warn_of_words(tokenizer, token):
    """Warns of a token that is in words of the vocabulary, because it is found in them, too."""
    ends = [n for n, text in enumerate(tokenizer.vocab) if text.endswith(WORD_END)]
    words = tokenizer.decode(ends).split(" ")
    if found := sorted((word for word in words if token.lower() in word), key=len):
        names = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
        warnings.warn(
            f"The token {token!r} is also found in words ({names}); '<{token}>' would not be.",
            stacklevel=4,
        )


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
