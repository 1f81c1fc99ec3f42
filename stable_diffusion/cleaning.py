"""Cleans a prompt, as the text was cleaned that CLIP was trained on: mojibake, HTML, upper case.

Reference:
    https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py (MIT licence): order of
    cleaning.
"""

import html

import ftfy
import regex

MAX_CLEANED = 5_000_000  # characters that ftfy may look at, in all passes over a text
MIN_PASSES = 6  # that it may take in any case
_AMPERSAND = "(?:amp|AMP|#38|#x26);"  # after an ampersand: HTML's name for one
_DEEP = regex.compile(f"(&(?:{_AMPERSAND}){{64}})(?:{_AMPERSAND})+")


def clean_text(text: str, texts: int = 1) -> str:
    """Returns a text repaired and in lower case, as the reference does it.

    The reference also strips and collapses white space, which changes no word.

    Args:
        text: the text.
        texts: how many texts like this one are cleaned together. Each gets less time then.

    Raises:
        ValueError: the text has so many HTML entities in one another that it would take too long.
    """
    # ftfy undoes "&amp;amp;amp;" one level after the other, each time in the whole text, so many
    # levels take n². Any number gives "&", so 64 do. From a line with "<" on it leaves them.
    end = text.rfind("\n", 0, text.index("<")) + 1 if "<" in text else len(text)
    text = _DEEP.sub(r"\1", text[:end]) + text[end:]
    settings = _Settings()
    settings.most = max(MIN_PASSES, MAX_CLEANED // (len(text) * texts + 1))
    return html.unescape(html.unescape(ftfy.fix_text(text, settings))).lower()


class _Settings(ftfy.TextFixerConfig):
    """ftfy's settings, which limit its passes over a line: one for each level of entities.

    ftfy reads `explain` once for each line, and `fix_c1_controls` once in each pass.
    """

    most = MIN_PASSES
    passes = 0

    @property
    def explain(self):
        self.passes = 0
        return False

    @property
    def fix_c1_controls(self):
        self.passes += 1
        if self.passes > self.most:
            raise ValueError(
                f"The text has HTML entities in one another, as in &amp;lt;, more than "
                f"{self.most} deep. Shorten it."
            )
        return True

    def _replace(self, **changes):
        new = super()._replace(**changes)
        new.most = self.most
        return new
