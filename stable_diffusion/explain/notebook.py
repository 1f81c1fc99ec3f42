"""A trace as a notebook shows it: a short piece of HTML."""

from html import escape

import numpy as np

from stable_diffusion.explain.daam import overlay_map
from stable_diffusion.explain.pictures import encode_photo

SHOWN_STEPS = 8  # at most
SHOWN_WORDS = 12  # at most
CELL = "display:inline-block;margin:0 8px 8px 0;font:12px sans-serif;vertical-align:top"


def make_summary(trace) -> str:
    """Makes a short piece of HTML of a trace, with the pictures inside.

    It has the image, the tokens of the prompt, what the model expected at some of the steps, and
    the heat maps of words. `page.make_page` has all.

    Args:
        trace: the `Trace`.

    Returns:
        str, an HTML element.
    """
    tokens = (f"{escape(token.text)}&nbsp;{token.id}" for token in trace.tokens if token.text)
    last = len(trace.steps) - 1
    places = sorted({round(n) for n in np.linspace(0, last, min(SHOWN_STEPS, last + 1))})
    steps = ((f"step {trace.steps[n].step + 1}", trace.steps[n].x0_image) for n in places)
    words = [(word, overlay_map(trace.image, heat)) for word, heat in trace.maps.items()]
    said = f"{trace.sampler}, {trace.num_steps} steps, guidance {trace.scale:g}, seed {trace.seed}"
    rows = [
        _show("", trace.image, 192),
        f"<p>tokens: {' | '.join(tokens)}</p>",
        f"<p>what the model expected</p>{''.join(_show(*pair, 96) for pair in steps)}",
        f"<p>where the image looks at a word</p>"
        f"{''.join(_show(*pair, 96) for pair in words[:SHOWN_WORDS])}" * bool(words),
    ]
    title = f"<p><b>{escape(trace.prompt)}</b> ({escape(said)})</p>"
    return f'<div style="font:14px sans-serif">{title}{"".join(rows)}</div>'


def _show(label, image, size):
    """Returns an image with its label, `size` pixels high."""
    alt = escape(label or "the image")
    picture = f'<img src="{encode_photo(image, 256)}" alt="{alt}" height="{size}">'
    return f'<span style="{CELL}">{picture}<br>{escape(label)}</span>'
