r"""The web interface's syntax of prompts: weights, breaks, and any number of tokens.

    (word)         1.1 times the weight; ((word)) 1.21 times
    [word]         1 / 1.1 times
    (word:1.3)     1.3 times
    \( \) \[ \]    brackets that are part of the text
    BREAK          the rest begins a new chunk
    # words        a comment, up to the end of the line
    <lora:name:1>  a LoRA, which is no part of the text: see `split_loras`

A prompt becomes chunks of 75 tokens, and the text encoder sees each chunk by itself, between a
start and an end token. Where a chunk is full and one of its last 20 tokens is a comma, the chunk
ends after that comma. The contexts of the chunks are joined along T. Each token's vector is
multiplied by its weight, and then the whole chunk so that it has its old mean.

Two things are refused, because they make several contexts of a prompt: AND between prompts, and
[a:b:0.5] or [a|b], which change the prompt during sampling.

Reference: https://github.com/AUTOMATIC1111/stable-diffusion-webui, version 1.10.1 with its default
settings: modules/prompt_parser.py, modules/sd_hijack_clip.py, modules/sd_emphasis.py.
"""

import re

import numpy as np

from stable_diffusion.checks import check_number
from stable_diffusion.clip_skip import skip_layers
from stable_diffusion.clip_tokenizer import SimpleTokenizer

PROMPT_SYNTAXES = ("webui",)  # and None: every character is text, as in KerasCV
CHUNK = 75  # tokens, without start and end
COMMA_REACH = 20  # last tokens of a chunk, of which a comma may end it
MOST_CHUNKS = 100  # of a prompt; attention to more takes minutes
STRONGER = {")": 1.1, "]": 1 / 1.1}
BREAK = ["BREAK", -1]  # among pieces of text and their weights

_COMMENT = re.compile(r"#[^\n]*")
_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_LAST_WEIGHT = re.compile(r":\s*[-+]?(\d+\.?|\d*\.\d+)\s*$")
_STEP = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*")
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[-+]?[.\d]+)\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)


def check_syntax(syntax):
    """Raises a ValueError unless a prompt's syntax is one of `PROMPT_SYNTAXES`, or None."""
    if syntax is not None and syntax not in PROMPT_SYNTAXES:
        known = ", ".join(PROMPT_SYNTAXES)
        raise ValueError(f"prompt_syntax must be None or one of {known}, not {syntax!r:.200}.")


def check_prompts(pipeline, prompts, syntax):
    """Raises a ValueError if a pipeline can't encode one of several prompts in a syntax."""
    check_syntax(syntax)
    for prompt in prompts:
        split_prompt(pipeline, prompt) if syntax else pipeline.tokenize(prompt)


def encode_prompts(pipeline, prompts, syntax="webui", clip_skip=0):
    """Encodes prompts in the web interface's syntax.

    Args:
        pipeline: a `StableDiffusion`.
        prompts: list of str.
        syntax: one of `PROMPT_SYNTAXES`.
        clip_skip: see `StableDiffusion.encode_text`.

    Returns:
        float32 array `(prompts, 77 * chunks, D)`. A prompt of fewer chunks than the longest is
        filled up with its last vector, as in the web interface. So encode prompts one by one where
        they should not depend on each other.

    Raises:
        ValueError: another syntax, and as `split_prompt`.
    """
    check_syntax(syntax)
    chunks = [split_prompt(pipeline, prompt) for prompt in prompts]
    flat = [chunk for some in chunks for chunk in some]
    tokens = np.array([ids for ids, _ in flat], "int32")
    positions = np.tile(np.arange(CHUNK + 2, dtype="int32"), (len(flat), 1))
    encoder = skip_layers(pipeline.text_encoder, clip_skip)
    encoded = encoder.predict_on_batch({"tokens": tokens, "positions": positions})
    weights = np.array([weights for _, weights in flat], "float32")
    encoded = weigh_context(np.asarray(encoded, "float32"), weights)
    ends, width = np.cumsum([len(some) for some in chunks]), encoded.shape[-1]
    contexts = [part.reshape(-1, width) for part in np.split(encoded, ends[:-1])]
    longest = max(map(len, contexts))
    fill = [[(0, longest - len(context)), (0, 0)] for context in contexts]
    return np.stack([np.pad(x, some, "edge") for x, some in zip(contexts, fill, strict=True)])


def weigh_context(context, weights):
    """Multiplies vectors by their weights, and each chunk so that it has its old mean.

    Args:
        context: float array `(chunks, T, D)`.
        weights: float array `(chunks, T)`.
    """
    weighted = context * weights[..., None]
    old, new = (x.mean((1, 2), keepdims=True, dtype="float64") for x in (context, weighted))
    ratio = np.divide(old, new, out=np.ones_like(old), where=new != 0)
    return (weighted * ratio).astype(context.dtype)


def split_prompt(pipeline, prompt):
    """Returns the chunks of a prompt: pairs of 77 ids and 77 weights.

    Raises:
        ValueError: syntax that is refused, a LoRA, a weight that is no number, or more chunks than
            the diffusion model accepts.
    """
    _check_text(prompt)
    tokenizer, limit = pipeline.tokenizer, _find_most_tokens(pipeline)
    pieces = read_weights(prompt)
    if isinstance(tokenizer, SimpleTokenizer):  # counting the tokens of a book takes long
        least = sum(tokenizer.count_least(text) - 2 for text, _ in pieces)
    else:
        least = 0
    chunks = [] if least > CHUNK * MOST_CHUNKS else split_tokens(pieces, tokenizer)
    count = (CHUNK + 2) * max(len(chunks), -(-least // CHUNK))
    if count > limit:
        shown = repr(prompt[:200]) + "..." * (len(prompt) > 200)
        raise ValueError(
            f"The diffusion model accepts contexts of {limit} tokens, not {count}, in chunks of "
            f"{CHUNK + 2}: {shown}"
        )
    end, pad = tokenizer.end_of_text, pipeline.config.text.pad_token
    return [_fill_chunk(chunk, tokenizer.start_of_text, end, pad) for chunk in chunks]


def _find_most_tokens(pipeline):
    """Returns how many tokens of context the UNet accepts; it may not be built yet."""
    shapes = getattr(pipeline._diffusion_model, "input_shape", None)
    known = shapes[2][1] if isinstance(shapes, list) and len(shapes) > 2 else None
    return known or pipeline.checkpoint.most_tokens or (CHUNK + 2) * MOST_CHUNKS


def _fill_chunk(chunk, start, end, pad):
    missing = CHUNK - len(chunk)
    ids = [start, *(n for n, _ in chunk), end, *[end if pad is None else pad] * missing]
    return ids, [1.0, *(weight for _, weight in chunk), *[1.0] * (1 + missing)]


def split_tokens(pieces, tokenizer):
    """Splits pieces of text into chunks of at most 75 tokens.

    Args:
        pieces: pairs of a text and its weight, see `read_weights`.
        tokenizer: a `SimpleTokenizer`, or what has its `encode`. A word of several vectors is not
            divided.

    Returns:
        List of at least one chunk, a list of pairs of an id and its weight.

    Raises:
        ValueError: a word has more vectors than a chunk.
    """
    lengths = {ids[0]: len(ids) for ids in getattr(tokenizer, "vectors", {}).values()}
    if lengths and max(lengths.values()) > CHUNK:
        raise ValueError(f"A word may have {CHUNK} vectors, not {max(lengths.values())}.")
    comma = tokenizer.encode(",")[1:-1]
    chunks, last_comma = [[]], None
    for piece in pieces:
        if list(piece) == BREAK:
            chunks, last_comma = [*chunks, []], None
            continue
        text, weight = piece
        ids = tokenizer.encode(text)[1:-1]
        while ids:
            length, chunk = lengths.get(ids[0], 1), chunks[-1]
            if [ids[0]] == comma:
                last_comma = len(chunk)
            elif last_comma is not None and len(chunk) == CHUNK <= last_comma + COMMA_REACH:
                chunks.append(chunk[last_comma + 1 :])
                del chunk[last_comma + 1 :]
                last_comma = None
            if len(chunks[-1]) + length > CHUNK:
                chunks, last_comma = [*chunks, []], None
            chunks[-1] += [(n, weight) for n in ids[:length]]
            ids = ids[length:]
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def read_weights(prompt):
    """Reads the weights of a prompt's parts.

    Args:
        prompt: str in the web interface's syntax.

    Returns:
        List of at least one `[text, weight]`, and of `BREAK`. Neighbours of the same weight are one
        text. In brackets a BREAK is a word, whose weight is negative, as it is there.

    Raises:
        ValueError: a weight that is no number.
    """
    pieces, opened = [], {"(": [], "[": []}

    def multiply(start, factor):
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _PIECE.finditer(_COMMENT.sub("", prompt)):
        kind, found = match.lastgroup, match[0]
        starts = opened["[" if found == "]" else "("]
        if kind == "open":
            opened[found].append(len(pieces))
        elif kind == "weight" and starts:
            multiply(starts.pop(), _read_number(match["weight"], prompt))
        elif kind == "close" and starts:
            multiply(starts.pop(), STRONGER[found])
        elif kind == "escaped":
            pieces.append([match["escaped"], 1.0])
        else:
            first, *others = re.split(r"\s*\bBREAK\b\s*", found)
            pieces.append([first, 1.0])
            for text in others:
                pieces += [list(BREAK), [text, 1.0]]
    for closing, starts in zip(")]", opened.values(), strict=True):
        for start in starts:
            multiply(start, STRONGER[closing])

    merged = []
    for text, weight in pieces or [["", 1.0]]:
        if merged and merged[-1][1] == weight:
            merged[-1][0] += text
        else:
            merged.append([text, weight])
    return merged


def _read_number(text, prompt):
    try:
        return check_number("weight", float(text))
    except ValueError as error:
        raise ValueError(f"The weight {text:.50} is not a number, in {prompt!r:.200}.") from error


def split_loras(prompt):
    """Takes the LoRAs out of a prompt.

    Args:
        prompt: str with any number of <lora:name>, <lora:name:scale> or <lora:name:scale:scale>:
            the second is that of the UNet, and must be equal.

    Returns:
        The prompt without them, and a list of pairs of a name and its scale.

    Raises:
        ValueError: another kind of network, or a scale that is no number.
    """
    loras = []
    for match in _NETWORK.finditer(_COMMENT.sub("", prompt)):
        name, *scales = match[2].split(":")
        if match[1] not in ("lora", "lyco"):
            raise ValueError(f"{match[0]:.200} is not supported, only <lora:name:1>.")
        try:
            scales = [check_number("scale", float(text)) for text in scales or ["1"]]
        except ValueError as error:
            raise ValueError(f"{match[0]:.200} has a scale that is not a number.") from error
        if len({*scales}) > 1 or len(scales) > 2:
            raise ValueError(f"{match[0]:.200} has several scales; only one for all is supported.")
        loras.append((name, scales[0]))
    return _NETWORK.sub("", _COMMENT.sub("", prompt)), loras


def _check_text(prompt):
    """Raises a ValueError for what makes several contexts of a prompt, and for LoRAs."""
    text = _COMMENT.sub("", prompt)
    if match := _NETWORK.search(text):
        raise ValueError(
            f"{match[0]:.200} is not part of a text: call load_lora with the path of its file, and "
            f"leave it out of the prompt. The command loads it from --lora-folder."
        )
    if re.search(r"\bAND\b", text):
        raise ValueError(f"AND between prompts is not supported; and is a word: {prompt!r:.200}")
    if match := _LAST_WEIGHT.search(text):
        raise ValueError(
            f"{match[0].strip()!r:.50} at its end weighs a prompt before AND, which is not "
            f"supported: {prompt!r:.200}"
        )
    if found := find_schedule(text):
        raise ValueError(
            f"{found:.200} changes the prompt during sampling, which is not supported; write "
            rf"\[ for a bracket: {prompt!r:.200}"
        )


def find_schedule(text):
    """Returns the first [a:b:0.5] or [a|b] of a prompt; None if it has none.

    The grammar: such brackets may have others inside, which are balanced; round ones may have one
    colon. A bracket that does not fit is text, and all that are open around it. A bar outside of
    [a|b] makes text of the whole prompt, as does a backslash before nothing.
    """
    found, opened = None, []  # brackets: their place, and the places of colons and bars in them
    for match in re.finditer(r"\\.|[\\()\[\]:|]", text):
        mark, place = match[0], match.start()
        inner = opened[-1] if opened else None
        if mark == "\\" or mark == "|" and (not inner or text[inner[0]] == "("):
            return None
        if mark in "([":
            opened.append([place])
        elif mark in ":|" and inner:
            inner.append(place)
            if text[inner[0]] == "(" and len(inner) > 2:
                opened = _make_text(text, opened)
        elif mark in ")]" and inner:
            start, *marks = opened[-1]
            kinds = {text[n] for n in marks}
            if text[start] != {")": "(", "]": "["}[mark]:
                opened = _make_text(text, opened)
            elif mark == "]" and kinds == {"|"}:
                opened.pop()
                found = found or text[start : place + 1]
            elif mark == "]" and kinds == {":"} and len(marks) < 3:
                step = _STEP.fullmatch(text, marks[-1] + 1, place)
                opened = opened[:-1] if step else _make_text(text, opened)
                found = found or (text[start : place + 1] if step else None)
            elif mark == "]" and kinds:
                opened = _make_text(text, opened)
            else:
                opened.pop()
        if opened is None:
            return None
    return None if _make_text(text, opened) is None else found


def _make_text(text, opened):
    """Forgets open brackets; returns None if that leaves a bar outside of brackets."""
    return None if any(text[n] == "|" for _, *marks in opened for n in marks) else []
