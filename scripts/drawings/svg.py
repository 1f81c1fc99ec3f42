"""What drawings are made of: boxes, arrows, texts and small pictures, as SVG.

A drawing has its own background and colours for light and for dark, so it can be read on a page of
either kind. The colours are classes, which `COLOURS` lists.
"""

from xml.sax.saxutils import escape

SANS = (
    "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', Helvetica, Arial, "
    "sans-serif"
)
MONO = "ui-monospace, SFMono-Regular, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
COLOURS = {  # name: (fill, stroke) on light, (fill, stroke) on dark
    "page": (("#ffffff", "#d1d9e0"), ("#0d1117", "#3d444d")),
    "panel": (("#f6f8fa", "#d1d9e0"), ("#151b23", "#3d444d")),
    "plain": (("#ffffff", "#818b98"), ("#212830", "#818b98")),
    "blue": (("#ddf0ff", "#0969da"), ("#0f2747", "#4493f8")),
    "orange": (("#ffecd9", "#bc4c00"), ("#3a2110", "#f0883e")),
    "green": (("#dafbe1", "#1a7f37"), ("#11311c", "#3fb950")),
    "violet": (("#f3eaff", "#8250df"), ("#271c45", "#ab7df8")),
}
INKS = {  # name: colour of text and lines on light, on dark
    "ink": ("#1f2328", "#f0f6fc"),
    "soft": ("#59636e", "#9da7b3"),
    **{name: (light[1], dark[1]) for name, (light, dark) in list(COLOURS.items())[3:]},
}
MONO_WIDTH = 0.6  # of a character of the font mono, in parts of its size
HEAD = 8  # length of an arrow's head


class Drawing:
    """An SVG of `width` and `height` that grows part by part; later parts lie above earlier ones.

    Args:
        width, height: in units that are pixels where it is shown at full size.
        title: what it shows, for people who cannot see it.
    """

    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []
        self.add_box(0.5, 0.5, width - 1, height - 1, "page", radius=10)

    def add_box(self, x, y, width, height, colour="plain", radius=6):
        """Draws a box with rounded corners; `x` and `y` are its left and upper edge."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'class="{colour}"/>'
        )

    def add_text(self, x, y, text, size=13, ink="ink", anchor="middle", kind=""):
        """Writes a line, whose middle height is `y`.

        Args:
            x, y: place of the text's anchor.
            text: a line.
            size: of the font.
            ink: a name in `INKS`.
            anchor: "start", "middle" or "end": which part of the text is at `x`.
            kind: "", "bold" or "mono".
        """
        names = f"ink-{ink} {kind}".strip()
        self.parts.append(
            f'<text x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size:g}" '
            f'text-anchor="{anchor}" class="{names}">{escape(text)}</text>'
        )

    def add_label(self, x, y, text, size=12, ink="soft", colour="page"):
        """Writes a line of the font mono onto an arrow, which it interrupts."""
        width = MONO_WIDTH * size * len(text) + 8
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - size / 2 - 1:g}" width="{width:g}" '
            f'height="{size + 2:g}" class="{colour} bare"/>'
        )
        self.add_text(x, y, text, size, ink, kind="mono")

    def add_arrow(self, *points, ink="soft", radius=8, head=True):
        """Draws an arrow through points `(x, y)`; its lines run along the axes."""
        (x, y), (x_to, y_to) = points[-2:]
        across, down = _sign(x_to - x), _sign(y_to - y)
        path = [f"M{points[0][0]:g} {points[0][1]:g}"]
        for before, (x, y), after in zip(points, points[1:], points[2:], strict=False):
            x_in, y_in = _sign(x - before[0]), _sign(y - before[1])
            x_out, y_out = _sign(after[0] - x), _sign(after[1] - y)
            path.append(f"L{x - radius * x_in:g} {y - radius * y_in:g}")
            path.append(f"Q{x:g} {y:g} {x + radius * x_out:g} {y + radius * y_out:g}")
        short = HEAD / 2 if head else 0  # so that the line does not stick out of the tip
        path.append(f"L{x_to - short * across:g} {y_to - short * down:g}")
        self.parts.append(f'<path d="{"".join(path)}" class="line line-{ink}"/>')
        if head:
            back_x, back_y = x_to - HEAD * across, y_to - HEAD * down
            side_x, side_y = 0.5 * HEAD * down, 0.5 * HEAD * across
            self.parts.append(
                f'<path d="M{x_to:g} {y_to:g}L{back_x + side_x:g} {back_y + side_y:g}'
                f'L{back_x - side_x:g} {back_y - side_y:g}Z" class="ink-{ink}"/>'
            )

    def add_dot(self, x, y, radius=3.5, ink="soft", letter=""):
        """Draws a dot, with a letter in it if there is one."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="ink-{ink}"/>')
        if letter:
            self.parts.append(
                f'<text x="{x:g}" y="{y + 0.5 * radius:g}" font-size="{1.4 * radius:g}" '
                f'text-anchor="middle" class="badge">{escape(letter)}</text>'
            )

    def add_cells(self, x, y, size, rows):
        """Draws a small image of square cells; `rows` are lists of colours `(r, g, b)`."""
        cell = size / len(rows)
        self.parts.append('<g shape-rendering="crispEdges">')  # no gaps at other sizes
        for i, row in enumerate(rows):
            for j, colour in enumerate(row):
                self.parts.append(
                    f'<rect x="{x + j * cell:g}" y="{y + i * cell:g}" width="{cell:g}" '
                    f'height="{cell:g}" fill="#{"".join(f"{value:02x}" for value in colour)}"/>'
                )
        self.parts.append(
            f'</g><rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" class="frame"/>'
        )

    def join(self):
        """Returns the SVG's text."""
        start = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">'
        )
        head = [
            start,
            f"<title>{escape(self.title)}</title>",
            "<style>",
            *_list_rules(),
            "</style>",
        ]
        return "\n".join([*head, *self.parts, "</svg>", ""])


def _sign(number):
    return (number > 0) - (number < 0)


def _list_rules():
    """Returns the lines of the style sheet."""
    yield f"text {{ font-family: {SANS}; }}"
    yield f".mono {{ font-family: {MONO}; }}"
    yield ".bold, .badge { font-weight: 600; }"
    yield ".line { fill: none; stroke-width: 1.6; }"
    yield ".frame { fill: none; stroke-width: 1; }"
    yield "rect { stroke-width: 1.2; }"
    for dark in False, True:
        if dark:
            yield "@media (prefers-color-scheme: dark) {"
        for name, pairs in COLOURS.items():
            fill, stroke = pairs[dark]
            yield f".{name} {{ fill: {fill}; stroke: {stroke}; }}"
        for name, pair in INKS.items():
            yield f".ink-{name} {{ fill: {pair[dark]}; }}"
            yield f".line-{name} {{ stroke: {pair[dark]}; }}"
        yield f".badge {{ fill: {COLOURS['page'][dark][0]}; }}"
        yield f".frame {{ stroke: {INKS['soft'][dark]}; }}"
    yield "}"
    yield ".bare { stroke: none; }"
