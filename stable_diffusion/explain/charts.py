"""Charts and drawings as SVG, written by hand. Their colours are the page's, see page.css."""

from html import escape

import numpy as np

WIDTH, HEIGHT = 360, 200  # of a chart; a phone shows it in its own size
LEFT, RIGHT, TOP, BOTTOM = 36, 18, 12, 36  # around the area of the curves


class _Area:
    """The area of a chart: where a point of the data is in the drawing."""

    def __init__(self, x_range, y_range):
        self.x_range, self.y_range = x_range, y_range

    def x(self, value):
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value):
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, xs, ys, style):
        points = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline class="c-line {style}" points="{points}"/>'

    def axes(self, x_ticks, y_ticks, x_label):
        low, high = self.x(self.x_range[0]), self.x(self.x_range[1])
        parts = [
            f'<path class="c-grid" d="M{low} {self.y(value)}H{high}"/>'
            f'<text x="{LEFT - 6}" y="{self.y(value) + 4}" text-anchor="end">{text}</text>'
            for value, text in y_ticks
        ]
        parts += [
            f'<text x="{self.x(value)}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}'
            "</text>"
            for value, text in x_ticks
        ]
        middle = (low + high) / 2
        label = f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
        return "".join(parts) + label


def draw_schedule(alphas_cumprod, timesteps, name="schedule-curves"):
    """Draws the two factors of the noise schedule, and the timesteps that were visited.

    Args:
        alphas_cumprod: float array `(train_timesteps,)`.
        timesteps: list of numbers.
        name: id of the curves, with which `mark_schedule` shows them again.

    Returns:
        str, an SVG.
    """
    area = _schedule_area(alphas_cumprod)
    last = len(alphas_cumprod) - 1
    xs = np.unique(np.linspace(0, last, 61).round().astype(int))
    signal, noise = alphas_cumprod[xs] ** 0.5, (1 - alphas_cumprod[xs]) ** 0.5
    axes = area.axes(
        [(x, x) for x in sorted({0, last // 2, last})],
        [(0, "0"), (0.5, "0.5"), (1, "1")],
        "timestep",
    )
    curves = area.line(xs, signal, "c-signal") + area.line(xs, noise, "c-noise")
    dots = "".join(
        f'<circle class="c-dot" cx="{area.x(t)}" cy="{area.y(0)}" r="1.6"/>' for t in timesteps
    )
    text = (
        f"Two curves over the timesteps 0 to {last}. The factor of the image falls from "
        f"{signal[0]:.2f} to {signal[-1]:.2f}, the factor of the noise rises from {noise[0]:.2f} "
        f"to {noise[-1]:.2f}."
    )
    return _svg(f'<g id="{name}">{axes}{curves}{dots}</g>', text)


def mark_schedule(alphas_cumprod, timestep, alpha, name="schedule-curves"):
    """Draws the curves of `draw_schedule`, which must be on the same page, with one place marked.

    Args:
        alphas_cumprod, name: as there.
        timestep: number of the place.
        alpha: alphas_cumprod there.

    Returns:
        str, an SVG.
    """
    area, signal, noise = _schedule_area(alphas_cumprod), alpha**0.5, (1 - alpha) ** 0.5
    x = area.x(timestep)
    mark = (
        f'<line class="c-mark" x1="{x}" x2="{x}" y1="{area.y(1)}" y2="{area.y(0)}"/>'
        f'<circle class="c-signal-dot" cx="{x}" cy="{area.y(signal)}" r="5"/>'
        f'<circle class="c-noise-dot" cx="{x}" cy="{area.y(noise)}" r="5"/>'
    )
    text = f"The curves of the noise schedule, with timestep {timestep:g} marked."
    return _svg(f'<use href="#{name}"/>{mark}', text)


def draw_histogram(values, bins=41, limit=4.0):
    """Draws how often values occur, and the normal distribution of mean 0 and deviation 1.

    Args:
        values: float array.
        bins: number of bars.
        limit: of the horizontal axis, from -limit to limit.

    Returns:
        str, an SVG.
    """
    counts, edges = np.histogram(values, bins, (-limit, limit))
    density = counts / values.size / (edges[1] - edges[0])
    area = _Area((-limit, limit), (0, max(0.45, float(density.max()))))
    bars = "".join(
        f'<rect class="c-bar" x="{area.x(left)}" width="{area.x(right) - area.x(left) - 1:.1f}" '
        f'y="{area.y(height)}" height="{area.y(0) - area.y(height):.1f}"/>'
        for left, right, height in zip(edges, edges[1:], density, strict=False)
    )
    xs = np.linspace(-limit, limit, 61)
    normal = area.line(xs, np.exp(-(xs**2) / 2) / (2 * np.pi) ** 0.5, "c-curve")
    axes = area.axes([(x, x) for x in (-3, -2, -1, 0, 1, 2, 3)], [], "value")
    text = "Bars of how often each value occurs, highest at 0, and the bell curve over them."
    return _svg(axes + bars + normal, text)


def draw_values(values, label, text):
    """Draws one value for each step, as bars.

    Args:
        values: list of floats, not negative.
        label: of the horizontal axis.
        text: what a reader who does not see the chart should know.

    Returns:
        str, an SVG.
    """
    top = max(max(values), 1e-9)
    area = _Area((0, len(values)), (0, top))
    bars = "".join(
        f'<rect class="c-bar" x="{area.x(n + 0.1)}" y="{area.y(value)}" '
        f'width="{area.x(0.8) - area.x(0):.1f}" height="{area.y(0) - area.y(value):.1f}"/>'
        for n, value in enumerate(values)
    )
    ticks = sorted({0, len(values) // 2, len(values) - 1})
    axes = area.axes([(n + 0.5, n + 1) for n in ticks], [(0, "0"), (top, f"{top:.2g}")], label)
    return _svg(axes + bars, text)


def draw_way(shapes):
    """Draws the way from the prompt and the seed to the image, with shapes on the arrows.

    Args:
        shapes: dict with "tokens", "context", "latent" and "image", each a str such as
            "(16, 16, 8)", "steps", a number, and "given", whether an image is given.

    Returns:
        str, an SVG whose boxes are links to the sections of the page.
    """
    start = "given image + noise" if shapes["given"] else "noise, from a seed"
    parts = [
        _arrow("M90 48 V84", ""),
        _arrow("M90 126 V162", shapes["tokens"], 96, 148),
        _arrow("M90 204 V300", shapes["context"], 96, 228),
        _arrow("M270 126 V300", shapes["latent"], 276, 228),
        _arrow("M180 424 V464", shapes["latent"], 186, 447),
        _arrow("M180 506 V546", shapes["image"], 186, 529),
        '<rect class="c-loop" x="12" y="258" width="336" height="166" rx="14"/>',
        f'<text class="small" x="180" y="280" text-anchor="middle">{shapes["steps"]} times</text>',
        _arrow("M318 389 H334 V323 H322", ""),
        _arrow("M107 346 V368", ""),
        _arrow("M172 389 H188", ""),
        _box(20, 6, 140, 42, "prompt", "", ""),
        _box(20, 84, 140, 42, "tokenizer", "tokens", ""),
        _box(20, 162, 140, 42, "text encoder", "context", "network"),
        _box(190, 84, 160, 42, start, "noise", ""),
        _box(42, 300, 276, 46, "UNet: what is noise here?", "steps", "network"),
        _box(42, 368, 130, 42, "guidance", "guidance", ""),
        _box(188, 368, 130, 42, "sampler", "schedule", ""),
        _box(100, 464, 160, 42, "decoder", "decoder", "network"),
        _box(100, 546, 160, 42, "image", "", ""),
    ]
    text = (
        "The prompt goes through the tokenizer and the text encoder to the UNet. Noise goes there, "
        f"too. UNet, guidance and sampler run {shapes['steps']} times. The decoder makes the image."
    )
    return _svg("".join(parts), text, 360, 592, "way")


def draw_boxes(boxes):
    """Draws boxes in the order in which they run, each as high as its output's feature map.

    Args:
        boxes: list of `trace.Box`. Those whose `gives` is not "(h, w, channels)" are left out.

    Returns:
        str, an SVG; "" if no box is left.
    """
    found = [(box, _read_shape(box.gives)) for box in boxes]
    found = [(box, shape) for box, shape in found if len(shape) == 3]
    if not found:
        return ""
    highest, most = max(s[0] for _, s in found), max(s[2] for _, s in found)
    width, height, label = 480 / len(found), 150, 0
    parts = []
    for n, (box, (rows, columns, channels)) in enumerate(found):
        tall = height * (rows / highest) ** 0.6
        top, shade = (height - tall) / 2, 0.25 + 0.75 * (channels / most) ** 0.7
        name = f"{box.name}: {box.gives}"
        place = f'x="{n * width + 1.5:.1f}" y="{top:.1f}"'
        parts.append(
            f'<rect class="c-stage" {place} width="{width - 3:.1f}" height="{tall:.1f}" rx="2" '
            f'opacity="{shade:.2f}"><title>{escape(name)}</title></rect>'
        )
        if (rows, columns) != label:
            label = rows, columns
            parts.append(
                f'<text class="small" x="{n * width + 1.5:.1f}" y="{height + 16}">{rows}</text>'
            )
    sizes = " → ".join(dict.fromkeys(f"{s[0]}×{s[1]}" for _, s in found))
    text = f"{len(found)} boxes side by side. Sizes of their feature maps: {sizes}."
    return _svg("".join(parts), text, 480, height + 22, "stages")


def _read_shape(text):
    try:
        return tuple(int(part) for part in text.strip("()").split(",") if part.strip())
    except ValueError:
        return ()


def _schedule_area(alphas_cumprod):
    return _Area((0, max(len(alphas_cumprod) - 1, 1)), (0, 1))


def _box(x, y, width, height, text, section, style):
    label = (
        f'<rect class="box {style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="9"/>'
        f'<text x="{x + width / 2}" y="{y + height / 2 + 5}" text-anchor="middle">{escape(text)}'
        "</text>"
    )
    return f'<a href="#{section}">{label}</a>' if section else label


def _arrow(path, text, x=0, y=0):
    label = f'<text class="small" x="{x}" y="{y}">{escape(text)}</text>' if text else ""
    return f'<path class="c-arrow" d="{path}" marker-end="url(#head)"/>{label}'


def _svg(content, text, width=WIDTH, height=HEIGHT, style="chart"):
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>'
    )
    role = "group" if "<a " in content else "img"  # links in an image would be hidden
    return (
        f'<svg class="{style}" viewBox="0 0 {width} {height}" role="{role}" '
        f'aria-label="{escape(text)}">{head if "#head" in content else ""}{content}</svg>'
    )
