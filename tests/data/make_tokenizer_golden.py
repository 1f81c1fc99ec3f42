"""Writes the token ids that OpenAI's own tokenizer gives to some thousands of difficult strings.

The tests compare `stable_diffusion.clip_tokenizer` with them. The original can not be a dependency
of the tests, because every package that has it needs PyTorch. Get the file from there, with ftfy
and regex installed, and run

    python tests/data/make_tokenizer_golden.py path/to/clip/simple_tokenizer.py

The fuzzed strings hold no lone surrogates (UTF-8 has none) and no characters newer than Unicode
3.2, so that all versions of Python, regex and ftfy agree about them. Made with ftfy 6.3.1.

Reference:
    https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py
"""

import argparse
import gzip
import importlib.util
import json
import random
import unicodedata
from pathlib import Path

DATA = Path(__file__).resolve().parent
VOCABULARY = DATA.parents[1] / "weights" / "bpe_simple_vocab_16e6.txt.gz"
OUTPUT = DATA / "clip_tokenizer_golden.json.gz"

HARD = [
    "",
    " \t\n ",
    "A photograph of an astronaut riding a horse",
    "don't, won't, I'll, we've, they're, I'm, he'd; DON'T 'S 'ſ",
    "<|startoftext|>",
    "a<|endoftext|>b <|StartOfText|> !<|endoftext|> <|ſtartoftext|> <|endoftext",
    "ſ İ ı K ß ẞ ΑΣ ΑΣΑ ǅ ﬁ Å ﬀ",
    "e\u0301 é n\u0303 a\u0300\u0301\u0302 \u0301alone ก็ हिन्दी",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☃️ ❤",
    "猫が好き 한국어 العربية עברית",
    "1234567890 ½ ² Ⅷ ٣ ①",
    "&amp; &amp;amp; &amp;amp;lt; &lt;b&gt; &#0; &#x1c; &#xD800; &eacute; &notit; &",
    "schÃ¶n â€œquotedâ€\x9d ÃƒÂ© l’eau “x” …",
    "\0 a\0b \x1b[31mred\x1b[0m \x07 \x1c x \x85 \xa0 \u2028 \u200b \ufeff \x1c",
    "</w> a</w> Ġ Ā ł </ w>",
    "x" * 300,
    "ab" * 150,
    "!" * 77,
    "!?" * 50,
    "_under_score_ #tag @name https://a.b/c?d=e&f=%20",
]
PIECES = [
    *"<|startoftext|> <|endoftext|> <|EndOfText|> 's 'ſ 'LL 're İ K ſ Σ ΑΣ &amp; &#233;".split(),
    *"&amp;amp;lt; &#0; 😀 👍 e\u0301 â€œ Ã© “ ’ < > 12 ½ </w> aaaa the cat 猫 ﬁ".split(),
    *[" ", "  ", "\t", "\n", "\xa0", "\u3000", "\x1c", "\0", "\u200d", "\u0301"],
]


def fuzzed_string(rng: random.Random) -> str:
    """Returns a string of up to 16 random characters and pieces."""
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0, 0x100), (0x100, 0x3000), (0x3000, 0x20000)]
    text = ""
    for _ in range(rng.randint(1, 16)):
        character = chr(rng.randrange(*rng.choice(ranges)))
        known = unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs")
        text += character if known and rng.random() < 0.6 else rng.choice(PIECES)
    return text


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("original", type=Path, help="OpenAI's simple_tokenizer.py")
    parser.add_argument("--count", type=int, default=3000, help="number of fuzzed strings")
    args = parser.parse_args()

    spec = importlib.util.spec_from_file_location("simple_tokenizer", args.original)
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    tokenizer = original.SimpleTokenizer(str(VOCABULARY))

    rng = random.Random(0)
    texts = HARD + [fuzzed_string(rng) for _ in range(args.count)]
    golden = [[text, tokenizer.encode(text)] for text in texts]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).encode()
    OUTPUT.write_bytes(gzip.compress(content, mtime=0))
    print(f"{len(golden)} strings, {OUTPUT.stat().st_size} bytes: {OUTPUT}")


if __name__ == "__main__":
    main()
