"""Makes what tests/test_prompts.py compares with: how the web interface reads prompts.

    git clone https://github.com/AUTOMATIC1111/stable-diffusion-webui
    pip install torch lark
    python tests/data/make_prompts_golden.py stable-diffusion-webui

It runs the web interface's own functions (version 1.10.1), with the tokenizer of this package. For
each prompt, tests/data/prompts_golden.json gets the parts with their weights, and the ids and
weights of each chunk, up to its first end token.
"""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from stable_diffusion.added_tokens import expand_tokens
from stable_diffusion.clip_tokenizer import SimpleTokenizer

FILE = Path(__file__).parent / "prompts_golden.json"
WORDS = ("<one>", "<five>", *(f"<five>_{n}" for n in range(1, 5)))
LONG = "a very long and winding description of a small red apple on a blue background in the sun"
PROMPTS = (
    "",
    " ",
    "a red apple",
    "(a red apple)",
    "a (red) apple",
    "a ((red)) apple",
    "a (((red))) apple",
    "a [red] apple",
    "a [[red]] apple",
    "a ([red]) apple",
    "a [(red)] apple",
    "a (red:1.3) apple",
    "a (red:0.5) apple",
    "a (red:2) apple",
    "a (red:.5) apple",
    "a (red:1.) apple",
    "a (red:+1.5) apple",
    "a (red:-1) apple",
    "a (red:0) apple",
    "a (red : 1.3 ) apple",
    "a (red:1.3)(green:1.3) apple",
    "a (red: ) apple",
    "a (red:apple) there",
    "a (red:1.3apple) there",
    "a red:1.3) apple",
    "a red:1.3 apple",
    "(a (red:1.5) apple:1.2)",
    "((a red:1.5) apple:1.2)",
    "[a (red:1.5) apple]",
    "a (red apple",
    "a ((red apple",
    "a [red apple",
    "a [(red apple",
    "a red) apple",
    "a red] apple",
    "a (red] apple)",
    "a [red) apple]",
    "a (red [green) apple] there",
    "a (red (green] apple:1.4) there",
    "()",
    "[]",
    "(:1.3)",
    ":1.3)",
    "(((",
    ")))",
    r"a \(red\) apple",
    r"a \[red\] apple",
    r"a (\(red\):1.3) apple",
    r"a (red\) apple:1.3) there",
    r"a \\(red) apple",
    r"a \red apple\\",
    r"(smile \:\):1.2)",
    "unnecessary (parens)(here), and (here)",
    "(masterpiece:1.2), (best quality:1.1), a cat, [sketch], ((detailed)), looking at viewer",
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
    "a cat BREAK a dog",
    "a cat BREAK",
    "BREAK a dog",
    "a cat BREAK BREAK a dog",
    "a cat\nBREAK\na (dog:1.2)",
    "a cat, BREAKFAST, a BREAKdog",
    "(a cat BREAK a dog)",
    "(a cat BREAK a dog:1.5) BREAK (a bird)",
    "[a cat] BREAK [a dog]",
    "a café, 猫 (🐱:1.4), T-Rex's (don't)",
    "a ONE (<one>:1.3) and <ONE>",
    "a <five>, (<five>:1.2) on <one>",
    "cat " * 75,
    "cat " * 76,
    "cat " * 151,
    "(" + "cat " * 80 + ":1.2) dog",
    "cat " * 54 + ", " + "dog " * 25,
    "cat " * 55 + ", " + "dog " * 25,
    "cat " * 74 + ", dog",
    "cat " * 75 + ", dog",
    "cat " * 70 + ", (" + "dog " * 10 + ":1.3) and , " + "bird " * 90,
    ", " * 80,
    "cat " * 72 + "<five> dog",
    "cat " * 60 + ", " + "dog " * 10 + "<five> bird",
    "cat " * 70 + "<five> dog",
    f"{LONG}, ({LONG}:1.2), {LONG}, [{LONG}], {LONG}, {LONG}, (({LONG})), {LONG}",
    f"{LONG} BREAK {LONG}, {LONG} BREAK ({LONG}, {LONG}, {LONG}, {LONG}, {LONG}:0.8)",
)


class Words:
    """Finds words of several vectors, as the web interface's embeddings."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def find_embedding_at_position(self, tokens, position):
        """Returns the word at a place and its number of ids, or None."""
        for ids in self.tokenizer.vectors.values():
            if tokens[position] == ids[0]:
                return SimpleNamespace(vectors=len(ids), ids=ids), len(ids)
        return None, None


def load_interface(path, words):
    """Returns the web interface's modules, without those that need its settings or a GPU."""
    sys.path.insert(0, str(path))
    settings = SimpleNamespace(emphasis="Original", comma_padding_backtrack=20)
    hijack = {"model_hijack": SimpleNamespace(embedding_db=words)}
    stubs = {"devices": {}, "sd_hijack": hijack, "shared": {"opts": settings}}
    for name, content in stubs.items():
        module = ModuleType(f"modules.{name}")
        module.__dict__.update(content)
        sys.modules[f"modules.{name}"] = module
    from modules import prompt_parser, sd_hijack_clip

    return prompt_parser, sd_hijack_clip


def main():
    """Writes the golden file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a copy of the web interface")
    path = parser.parse_args().path
    tokenizer = SimpleTokenizer()
    tokenizer.add_tokens(list(WORDS))
    expand_tokens(tokenizer)

    prompt_parser, sd_hijack_clip = load_interface(path, Words(tokenizer))
    embedder = sd_hijack_clip.TextConditionalModel()
    embedder.id_start, embedder.id_end = tokenizer.start_of_text, tokenizer.end_of_text
    embedder.comma_token = tokenizer.encoder[",</w>"]
    embedder.tokenize = lambda texts: [tokenizer.encode(text)[1:-1] for text in texts]

    table = []
    for prompt in PROMPTS:
        chunks = []
        for chunk in embedder.tokenize_line(prompt)[0]:
            for fix in chunk.fixes:
                place = 1 + fix.offset
                chunk.tokens[place : place + len(fix.embedding.ids)] = fix.embedding.ids
            assert len(chunk.tokens) == len(chunk.multipliers) == 77
            end = chunk.tokens.index(tokenizer.end_of_text)
            assert {*chunk.tokens[end:]} == {tokenizer.end_of_text}
            assert {*chunk.multipliers[end:]} == {1.0}
            chunks.append({"ids": chunk.tokens[:end], "weights": chunk.multipliers[:end]})
        parts = prompt_parser.parse_prompt_attention(prompt)
        table.append({"prompt": prompt, "parts": parts, "chunks": chunks})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    FILE.write_text(f"[\n{lines}\n]\n", "utf-8")
    print(f"{len(table)} prompts in {FILE}, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
