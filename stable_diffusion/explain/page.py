"""One page that explains an image: HTML that needs no network, and is readable without JavaScript.

The page is a single file. Pictures are data URIs, the style and the script stand inside. A policy
in its head forbids the browser to load anything, and to run any other script.
"""

import base64
import hashlib
from pathlib import Path

from stable_diffusion.explain import sections
from stable_diffusion.replacing import check_output, replace_file

MOST_BYTES = 4_900_000  # of a page
CONTENTS = {  # id of a section: how it is called in the table of contents
    "way": "The whole way",
    "tokens": "Tokens",
    "context": "Context",
    "noise": "Noise and latent",
    "schedule": "Noise schedule",
    "steps": "Step by step",
    "guidance": "Guidance",
    "words": "Where it looks",
    "decoder": "Decoder",
    "boxes": "Every box",
    "further": "Read on",
}
FOLDER = Path(__file__).parent


def make_page(trace) -> str:
    """Makes a web page that explains how an image was generated.

    The page is smaller than 5 MB. If all steps would be too much, some are left out, which the page
    says.

    Args:
        trace: the `Trace`.

    Returns:
        str, a whole HTML document.
    """
    scales = sections.find_scales(trace)
    rest = _join_page(trace, sections.choose_evenly(trace.steps, sections.STRIP), [], scales)
    panels = {}

    def make_panels(steps):
        for step in steps:
            if step.step not in panels:
                panels[step.step] = sections.write_step(trace, step, scales)
        return [panels[step.step] for step in steps]

    tried = make_panels(sections.choose_evenly(trace.steps, 3))  # the first, a middle one, the last
    room, largest = MOST_BYTES - len(rest.encode()), max(len(panel.encode()) for panel in tried)
    shown = sections.choose_evenly(trace.steps, max(2, room // largest))
    page = _join_page(trace, shown, make_panels(shown), scales)
    while len(page.encode()) > MOST_BYTES and len(shown) > 2:
        shown = sections.choose_evenly(trace.steps, int(0.9 * len(shown)))
        page = _join_page(trace, shown, make_panels(shown), scales)
    return page


def write_page(trace, path):
    """Writes the page of `make_page` to a file, as a whole or not at all.

    Args:
        trace: the `Trace`.
        path: of the file, such as "index.html"; one that is there is replaced.

    Raises:
        ValueError: a path that can't be written.
    """
    check_output(path)
    page = make_page(trace)
    with replace_file(path) as written:
        written.write_text(page, encoding="utf-8")


def _join_page(trace, shown, panels, scales):
    style, script = _read("page.css"), _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    body = [
        sections.write_way(trace, shown, scales),
        sections.write_tokens(trace),
        sections.write_context(trace, scales),
        sections.write_noise(trace, scales),
        sections.write_schedule(trace),
        sections.write_steps(trace, shown, panels, scales),
        sections.write_guidance(trace),
        sections.write_words(trace),
        sections.write_decoder(trace, scales),
        sections.write_boxes(trace),
        sections.write_further(trace),
    ]
    contents = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text in CONTENTS.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>How “{sections.quote(trace.prompt)}” was made</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#way">To the text</a>
{sections.write_header(trace)}
<div class="page">
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>{"".join(body)}</main>
</div>
<script>{script}</script>
</body>
</html>
"""


def _read(name):
    return (FOLDER / name).read_text("utf-8")
