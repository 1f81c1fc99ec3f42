"""Byte-pair tokenizer of CLIP: turns a prompt into the ids that the text encoder was trained on.

A prompt is cleaned and cut into words, and each word is spelled in UTF-8 bytes. Byte-pair encoding
then joins neighbouring pieces of the word: always the pair that was learned first, until no two
neighbours are among the 48,894 learned pairs. So every text has a spelling, and a common word is
one id.

    ids              tokens
        0 ...   255  one byte, inside a word
      256 ...   511  one byte, at the end of a word (written with "</w>")
      512 ... 49405  the learned pairs, in the order in which they were learned
    49406,    49407  start of text, end of text
    49408 ...        tokens added by `SimpleTokenizer.add_tokens`

Reference:
    R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare Words with Subword Units",
    2016, https://arxiv.org/abs/1508.07909: byte-pair encoding.
    https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py (MIT licence): vocabulary,
    order of cleaning, pattern of a word. The ids of every text are the same as there, with a start
    and an end token around them.
"""

import gzip
import heapq
from itertools import islice
from pathlib import Path

import regex

from stable_diffusion.added_tokens import AddedTokens, check_tokens
from stable_diffusion.cleaning import clean_text
from stable_diffusion.files import WEIGHTS_DIR

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
NUM_PAIRS = 48894  # the file has 262,144, in the order of learning; CLIP uses the first of them

# The vocabulary file writes each byte as one visible character: its Latin-1 character where that is
# visible, else one from U+0100 on. Ids follow the order of this table from character code to byte.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTES = {b: b for b in _VISIBLE} | {0x100 + n: b for n, b in enumerate(_HIDDEN)}
_BYTE_TO_ID = bytes((_VISIBLE + _HIDDEN).index(byte) for byte in range(256))

# (?i) matters even in lower-case text: it makes "'ſ" an ending like "'s", as in the reference.
_WORD = r"(?i)<\|(?:start|end)oftext\|>|'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
MAX_WORDS = 20_000  # whose ids a tokenizer remembers
MAX_REMEMBERED = 100  # characters of such a word


class SimpleTokenizer:
    """Converts text to CLIP's token ids, and ids to text.

    Differs from KerasCV: text is first repaired with ftfy, because CLIP's training text was. And an
    added token is found as in transformers (see `add_tokens`), because KerasCV can miss one that
    has an upper-case letter or stands next to something else than a space.

    Args:
        bpe_path: path of a list of pairs: CLIP's gzipped one, or a shorter one as `merges.txt` is
            in diffusers' layout; None for CLIP's in `WEIGHTS_DIR`.

    Attributes:
        vocab: list of the tokens in the order of their ids.
        encoder: dict from token to id.
        start_of_text: id before the first word, 49406.
        end_of_text: id after the last word, 49407; KerasCV also pads with it.
        vectors: dict from an added token to its ids, for tokens that stand for several vectors, as
            a textual inversion may (see `added_tokens.expand_tokens`).

    Raises:
        ValueError: if `bpe_path` is not such a file.
    """

    def __init__(self, bpe_path: str | Path | None = None):
        path = bpe_path or WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz"
        self.vocab = [chr(code) + ending for ending in ("", WORD_END) for code in _BYTES]
        try:
            opener = gzip.open if str(path).endswith(".gz") else open
            if not Path(path).is_file():
                raise OSError("no file")  # to open a pipe would wait for ever
            with opener(path, "rt", encoding="utf-8") as file:
                _title, *lines = islice(file, 1 + NUM_PAIRS)
            self.vocab += [*("".join(line.split()) for line in lines), START, END]
            self.encoder = {token: n for n, token in enumerate(self.vocab)}
            # While a word is put together, a piece is the one character that has its id as code.
            piece = {token: chr(n) for token, n in self.encoder.items()}
            self._joined = {piece[a] + piece[b]: piece[a + b] for a, b in map(str.split, lines)}
        except Exception as error:  # a wrong file can fail at each of these steps
            raise ValueError(f"bpe_path {path} is not a list of BPE pairs") from error
        self.start_of_text, self.end_of_text = self.encoder[START], self.encoder[END]
        self._forget_words()
        self._longest = max(len(token.removesuffix(WORD_END)) for token in self.vocab)
        self.vectors = {}
        self.add_tokens([])

    def add_tokens(self, tokens: str | list[str]) -> int:
        """Gives each of `tokens` an id of its own, from 49408 on.

        From then on `encode` finds each in a prompt, in upper or lower case, also inside a longer
        word and in text without spaces: it finds "sks" in "SKS!" and in "masks". So "<sks>" is a
        better token. Of two tokens that start at the same place it takes the longer one, and of
        "<cat>" and "<CAT>" the one that is written in the same case. Transformers does the same.

        Args:
            tokens: one token, or several. Those in the vocabulary already are skipped.

        Returns:
            How many were added.

        Raises:
            ValueError: if one is not a string, is empty, has white space at an end, or has more
                than `added_tokens.MAX_TOKEN` characters, not counting an ending such as _12; then
                none is added.
        """
        tokens = check_tokens(tokens)
        new = [token for token in dict.fromkeys(tokens) if token not in self.encoder]
        self.encoder |= {token: len(self.vocab) + n for n, token in enumerate(new)}
        self.vocab += new
        self._added = AddedTokens(self.vocab[self.end_of_text + 1 :])
        return len(new)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`: start of text, those of its words, end of text.

        Args:
            text: any string. Nothing is cut off: the result can be longer than CLIP's 77 ids.

        Raises:
            ValueError: if `text` is not a string, or has many HTML entities in one another.
        """
        ids = [self.start_of_text]
        for word, added in self._split(text):
            ids += added or self._cache.get(word) or self._encode_word(word)
        return [*ids, self.end_of_text]

    def count_least(self, text: str) -> int:
        """Returns how many ids `encode` gives at least, before any word is encoded.

        No id stands for more bytes than the longest token has.
        """
        words = self._split(text)
        return 2 + sum(len(ids) or -(-len(word.encode()) // self._longest) for word, ids in words)

    def _split(self, text):
        """Yields each word of a text and [], or the text of an added token and its ids."""
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, not {type(text).__name__}")
        parts = self._added.split(text)
        for part, token in parts:
            if token is not None:
                yield part, self.vectors.get(token, [self.encoder[token]])
            else:
                words = regex.findall(_WORD, clean_text(part, len(parts)))
                yield from ((word, []) for word in words)

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of `token_ids`, with one space between words.

        `encode` loses upper case, the kind and number of spaces, and what it cleans. It also loses
        whether there was a space between letters, digits, punctuation marks and endings: "don't 24"
        comes back as "don 't 2 4". Start and end tokens give no text. Bytes that are not UTF-8 give
        U+FFFD; they come from ids that were cut off within a character.

        Args:
            token_ids: ids of the vocabulary, with or without start and end tokens.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        text = b""
        for token_id in token_ids:
            if not 0 <= token_id < len(self.vocab):
                raise ValueError(f"{token_id} is not a token id, 0 to {len(self.vocab) - 1}")
            if token_id > self.end_of_text:
                text += f"{self.vocab[token_id]} ".encode(errors="replace")
            elif token_id < self.start_of_text:
                symbols = self.vocab[token_id].replace(WORD_END, " ")
                text += symbols.translate(_BYTES).encode("latin-1")
        return text.decode(errors="replace").strip(" ")

    def _encode_word(self, word: str) -> list[int]:
        """Returns the ids of one word, by byte-pair encoding, and remembers them.

        The pieces are a linked list, at the places of their first bytes. A heap has all pairs that
        can be joined: the one that was learned first is on top, of equal ones the leftmost. Each
        join makes at most two new pairs, so n bytes take n log n operations.
        """
        pieces = [*word.encode().translate(_BYTE_TO_ID).decode("latin-1"), ""]  # "" is the edge
        pieces[-2] = chr(ord(pieces[-2]) + 256)  # the id of that byte at a word's end
        before = [*range(-1, len(pieces) - 1)]
        after = [*range(1, len(pieces)), 0]
        heap = []

        def push(place):
            if joined := self._joined.get(pieces[place] + pieces[after[place]]):
                heapq.heappush(heap, (joined, place))

        for place in range(len(pieces)):
            push(place)
        while heap:
            joined, place = heapq.heappop(heap)
            gone = after[place]
            if self._joined.get(pieces[place] + pieces[gone]) == joined:  # still neighbours
                pieces[place], pieces[gone] = joined, ""
                after[place] = after[gone]
                before[after[gone]] = place
                push(before[place])
                push(place)
        ids = [ord(piece) for piece in pieces if piece]
        if len(word) <= MAX_REMEMBERED:
            if len(self._cache) >= MAX_WORDS:
                self._forget_words()
            self._cache[word] = ids
        return ids

    def _forget_words(self):
        self._cache = {START: [self.start_of_text], END: [self.end_of_text]}
