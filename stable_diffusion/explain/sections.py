"""The sections of the page that explains an image: each a function from a trace to HTML.

Text of the prompt and of the checkpoint is escaped by `quote`. Every other part is a number, or
written here.
"""

from dataclasses import dataclass
from html import escape
from itertools import groupby

import numpy as np

from stable_diffusion.components import MAX_PROMPT_LENGTH
from stable_diffusion.explain import charts, pictures
from stable_diffusion.explain.daam import overlay_map

PHOTO = 768  # longest sides of images, in pixels: alone,
SMALL = 256  # in a step, and of a stage of the decoder,
THUMBNAIL = 128  # in the strip of images, and under heat maps
STRIP = 8  # images in the strip
MOST_NAMED = 4  # words that are cut into pieces
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what stands for a part of a character
NEARLY_NOISE = 0.05  # alphas_cumprod below which a latent shows nothing but noise
LEAST_ALPHA = 1e-6  # where x0 can be computed from the noise
COMMAND = 'stable-diffusion-explain "a green apple on a yellow background" --out green_apple'
EXAMPLE = """\
from stable_diffusion import StableDiffusion
from stable_diffusion.explain import trace
from stable_diffusion.explain.page import write_page

model = StableDiffusion(weights="emoji", jit_compile=False)
write_page(trace(model, "a green apple on a yellow background", seed=1), "index.html")
"""
PARTS = {  # titles of the parts of boxes
    "tokenizer": "Tokenizer",
    "text_encoder": "Text encoder",
    "noise_scheduler": "Noise schedule",
    "image_encoder": "Image encoder",
    "diffusion_model": "UNet",
    "guidance": "Guidance",
    "sampler": "Sampler",
    "decoder": "Decoder",
}


@dataclass(frozen=True)
class Scales:
    """Which values have the end colours in pictures, the same in all steps.

    Attributes:
        latent: of latents, x0 and predicted noise.
        context: of the context.
    """

    latent: float
    context: float


def find_scales(trace) -> Scales:
    """Returns the scales of a trace: nearly all values of the last step are within them."""
    last = trace.steps[-1]
    latent = max(3.0, float(np.percentile(np.abs(last.x0), 99)))
    context = float(np.percentile(np.abs(trace.context), 99))
    return Scales(*(max(round(value, 1), 0.1) for value in (latent, context)))


def choose_evenly(items, count):
    """Returns at most so many items of a list, evenly chosen, with the first and the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[n] for n in dict.fromkeys(places.tolist())]


def find_difference(step):
    """Returns the difference of both predictions of a step; None without guidance."""
    return None if step.without_prompt is None else step.with_prompt - step.without_prompt


def find_change(step):
    """Returns how much the prompt changes x0 in a step, on average; None where it isn't known."""
    difference = find_difference(step)
    if difference is None or step.alpha < LEAST_ALPHA:
        return None
    return float(np.abs(difference).mean() * ((1 - step.alpha) / step.alpha) ** 0.5)


def quote(text):
    """Escapes a text of the user's for HTML."""
    return escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def show_shape(array):
    """Returns the shape of an array as text: "(16, 16, 8)"."""
    return str(tuple(np.shape(array)))


def show_image(uri, alt, caption="", style=""):
    """Returns a figure of one image.

    Args:
        uri: a data URI.
        alt: what a reader who does not see it should know, escaped.
        caption: HTML.
        style: class of the figure.
    """
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{style}"><img src="{uri}" alt="{alt}">{caption}</figure>'


def show_channels(values, limit, alt, caption, style=""):
    """Returns a figure of the channels of a latent, with their shape."""
    caption = f"{caption} <code>{show_shape(values)}</code>"
    uri = pictures.encode_channels(values, limit)
    return show_image(uri, alt, caption, f"sheet diverging {style}")


def show_scale(limit, text=""):
    """Returns a colour scale from -limit to limit."""
    return (
        f'<p class="scale"><span>−{limit:g}</span><span class="ramp diverging" role="img" '
        f'aria-label="Colours from blue for −{limit:g} over white for 0 to red for {limit:g}">'
        f"</span><span>{limit:g}</span><span>{text}</span></p>"
    )


def write_header(trace):
    """Returns the title, the image and the facts."""
    height, width = trace.image_size
    facts = {
        "size": f"{width} × {height} pixels",
        "steps": f"{len(trace.steps)} of {trace.num_steps}"
        if len(trace.steps) < trace.num_steps
        else f"{trace.num_steps}",
        "sampler": quote(trace.sampler),
        "guidance": f"{trace.scale:g}",
        "seed": quote(trace.seed),
        "time": f"{trace.seconds:.0f} s with all that is shown here",
        "networks": quote(trace.checkpoint),
    }
    if trace.negative_prompt:
        facts = {"negative prompt": f"<bdi>{quote(trace.negative_prompt)}</bdi>"} | facts
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    given = ", and an image to start from" if trace.given is not None else ""
    picture = pictures.encode_photo(trace.image, PHOTO)
    return f"""
<header class="hero">
  {show_image(picture, f"The image of: {quote(trace.prompt)}", "", _size_style(trace.image))}
  <div>
    <p class="kicker">Stable Diffusion, from the inside</p>
    <h1>How this image was made</h1>
    <p class="prompt"><bdi>{quote(trace.prompt)}</bdi></p>
    <p class="lead">A computer got this text{given}, and made the image from it. This page shows
    everything that it computed on the way, with the numbers of this one run. You should know what
    an array is. There is no mathematics beyond square roots.</p>
    <dl class="facts">{rows}</dl>
  </div>
</header>"""


def write_way(trace, shown, scales):
    """Returns the overview: the strip of images, the short answer and the drawing."""
    channel = int(np.argmax(trace.steps[-1].latent.std((0, 1))))
    strip = []
    for step in choose_evenly(shown, STRIP):
        values = step.latent[..., channel : channel + 1]
        number = step.step + 1
        strip.append(
            f'<li><a href="#step-{number}"><img class="pixels diverging" alt="One channel of the '
            f'latent after step {number}" src="{pictures.encode_channels(values, scales.latent)}">'
            f'<img class="{_size_style(step.x0_image)}" alt="The image that the model expects at '
            f'step {number}" src="{pictures.encode_photo(step.x0_image, THUMBNAIL)}">'
            f"<span>step {number}</span></a></li>"
        )
    latent, given = trace.start, trace.given is not None
    shapes = {
        "tokens": f"{len(trace.tokens)} ids",
        "context": show_shape(trace.context),
        "latent": show_shape(latent),
        "image": show_shape(trace.image),
        "steps": len(trace.steps),
        "given": given,
    }
    begin = (
        "The given image is made small, and gets noise: random numbers."
        if given
        else "A grid of random numbers is made from the seed. This is the noise."
    )
    return f"""
<section id="way">
  <h2>The whole way</h2>
  <p>In the beginning there is noise. In every step the model says what in it is noise, and a part
  of that is taken away. The upper picture of each pair is the noise on its way to a small map
  of the image (one of its {latent.shape[2]} layers of numbers), the lower one is the image that the
  model expected at that step. Select one to see all of the step.</p>
  <ol class="strip">{"".join(strip)}</ol>
  <div class="columns">
    <div>
      <h3>In short</h3>
      <ol class="short">
        <li>The <a href="#tokens">tokenizer</a> cuts the prompt into tokens, and gives each its
        number.</li>
        <li>The <a href="#context">text encoder</a> turns the numbers into the context, which says
        what the image should show.</li>
        <li>{begin} It is a <a href="#noise">latent</a>, a small grid with several numbers in each
        cell.</li>
        <li>In <a href="#steps">{len(trace.steps)} steps</a> the UNet looks at the latent and the
        context, and says what is noise. A part of it is removed each time.</li>
        <li>The <a href="#decoder">decoder</a> turns the clean latent into pixels.</li>
      </ol>
      <p>The drawing shows the same. A shape such as <code>{shapes["latent"]}</code> beside an arrow
      says what goes along it: here an array of {latent.shape[0]} rows and {latent.shape[1]}
      columns, with {latent.shape[2]} numbers in each cell. The three blue boxes are neural
      networks: functions with millions of numbers, which were found by training on images with
      captions. The rest is ordinary code, a few lines
      each.</p>
    </div>
    {charts.draw_way(shapes)}
  </div>
</section>"""


def write_tokens(trace):
    """Returns the section about tokens and padding."""
    text = [token for token in trace.tokens if token.kind == "text"]
    padding = [token for token in trace.tokens if token.kind == "padding"]
    total, chunks = len(trace.tokens), len(trace.tokens) // MAX_PROMPT_LENGTH
    read = f"{chunks} times {MAX_PROMPT_LENGTH}" if chunks > 1 else MAX_PROMPT_LENGTH
    chips, before = [], None
    for is_padding, tokens in groupby(trace.tokens, lambda token: token.kind == "padding"):
        tokens = list(tokens)
        if is_padding:
            chips.append([_show_token(tokens[0], f"{len(tokens)} × padding")])
        for token in [] if is_padding else tokens:
            if not _goes_on(before, token):
                chips.append([])
            chips[-1].append(_show_token(token, _name_token(token)))
            before = token
    chips = [f"<li>{''.join(pieces)}</li>" for pieces in chips]
    split = _list_split_words(text)
    pieces = (
        "Most words are one token. But the list has no entry for every word of the world. "
        + " ".join(f"<b>{quote(word)}</b> is cut into {count} pieces." for word, count in split)
        if split
        else "Here every word is in the list as a whole. A rare word would be cut into pieces that "
        "are, so that every text has tokens."
    )
    if any(BROKEN in token.text for token in text):
        pieces += " A sign that the list does not have is cut into its bytes."
    ends = "with a start and an end token around them"
    if chunks > 1:
        ends = f"in {chunks} parts with a start and an end token around each"
    filled = (
        f"The prompt has {len(text)} tokens, {ends}. The other {len(padding)} places hold the "
        f"padding token, number {padding[0].id}. It stands for no text; it only fills up."
        if padding
        else f"The prompt has {len(text)} tokens, {ends}. No place is left for padding."
    )
    see = _see(f"""Each box is a token, with its id below. Boxes that touch are pieces of one
        word. Capitals were made small first, as in training. {pieces}""")
    why = _why(f"""The text encoder always reads {read} tokens, because it was trained with
        that many at once. {filled} The result has the shape <code>({total},)</code>.""")
    return f"""
<section id="tokens">
  <h2>The prompt becomes tokens</h2>
  <p>A neural network computes with numbers. So the tokenizer cuts the prompt into pieces from a
  fixed list, its vocabulary. Such a piece is a token, and its place in the list is its id.
  (Checkpoints may have lists of their own.)</p>
  <ol class="tokens">{"".join(chips)}</ol>
  {see}
  {why}
  {_cite(trace, "encode")}
</section>"""


def write_context(trace, scales):
    """Returns the section about the context."""
    kinds = [token.kind for token in trace.tokens]
    shown = [n for n, kind in enumerate(kinds) if kind != "padding"]
    rest = [n for n, kind in enumerate(kinds) if kind == "padding"]
    empty, other = trace.negative_context, "the empty prompt"
    if trace.negative_prompt:
        other = "the negative prompt"
    distances = None
    if empty is not None and empty.shape == trace.context.shape:
        distances = ((trace.context - empty) ** 2).mean(axis=1) ** 0.5
    labels = "".join(f"<li><span>{quote(_name_token(trace.tokens[n]))}</span></li>" for n in shown)
    first = pictures.encode_values(trace.context[shown], scales.context)
    rows = f'style="--rows:{len(shown)}"'
    alt = f"{len(shown)} rows of {trace.context.shape[1]} coloured cells"
    picture = (
        f'<div class="context" {rows}><ol class="names" aria-hidden="true">{labels}</ol>'
        f'<img class="diverging" src="{first}" alt="{alt}, one row for each token of the prompt">'
        f"{_show_bars(distances, shown)}</div>"
    )
    if rest:
        second = pictures.encode_values(trace.context[rest], scales.context)
        picture += (
            f'<div class="context padding" style="--rows:{len(rest)}"><ol class="names"><li>'
            f"<span>{len(rest)} × padding</span></li></ol>"
            f'<img class="diverging" src="{second}" alt="The rows of the padding tokens">'
            f"{_show_bars(distances, rest)}</div>"
        )
    compared = ""
    if distances is not None:
        compared = f"""The bars on the right tell how far a row is from the same row of {other}. The
        first row's distance is {distances[0]:.2f}: the start token sees nothing before it, so its
        row is the same for every prompt."""
        if rest:
            compared += f""" But padding's is {distances[rest].mean():.2f} on average: those rows
            come after the prompt and have read it."""
    see = _see(f"""A single number has no meaning that one could name; the network found its own way
        to write things down. Columns that have one colour from top to bottom hold what all tokens
        have in common. {compared}""")
    why = _why("""Inside the text encoder, attention mixes each token with those before it. So the
        row of a noun also knows the adjective in front of it. Tokens never look ahead.""")
    return f"""
<section id="context">
  <h2>Tokens become the context</h2>
  <p>An id says nothing about meaning. So the text encoder, the first neural network, turns each
  token into a vector of {trace.context.shape[1]} numbers. Together they are the context, of shape
  <code>{show_shape(trace.context)}</code>. It is all that the rest of the model learns about the
  prompt.</p>
  <figure>{picture}
  <figcaption>The context. A row is a token, a column one of its {trace.context.shape[1]} numbers.
  </figcaption></figure>
  {show_scale(scales.context, "Values beyond have the colours of the ends.")}
  {see}
  {why}
  {_cite(trace, "clip_embedding", "layer_0")}
</section>"""


def write_noise(trace, scales):
    """Returns the section about the noise and the latent, or the given image and its latent."""
    noise = trace.noise
    height, width, channels = noise.shape
    pixels = int(np.prod(trace.image.shape))
    cell = trace.image_size[0] // height
    about = f"""A latent is a small stand-in for an image. Each of its {height}×{width} cells stands
    for {cell}×{cell} pixels, and has {channels} numbers, its channels. That makes {noise.size:,}
    numbers instead of the {pixels:,} of the image, {pixels / noise.size:.0f} times fewer. This is
    why the model can be quick: it works on latents, and only the decoder makes pixels."""
    about = _tell("The latent", about)
    sheet = show_channels(
        noise,
        scales.latent,
        f"{channels} squares of random colours, without any form",
        f"The noise: {channels} channels, one square for each",
        "large",
    )
    chart = f"""<figure class="large">{charts.draw_histogram(noise)}<figcaption>How often each value
    occurs (bars), and the normal distribution (line). Mean {noise.mean():.2f}, deviation
    {noise.std():.2f}.</figcaption></figure>"""
    scale = show_scale(scales.latent, "This scale holds for all latents and all noise on the page.")
    origin = f"""The numbers come from a generator of random numbers, which was started with the
    seed {quote(trace.seed)}. The same seed always gives the same noise, so the same image. Another
    seed gives another noise, and another image of the same prompt."""
    if trace.given is None:
        see = _see(f"Nothing, and that is the point: no cell tells anything of others. {origin}")
        return f"""
<section id="noise">
  <h2>Where the noise comes from</h2>
  <p>Generation starts with an array of random numbers, of shape
  <code>{show_shape(noise)}</code>. It has the form of a latent.</p>
  <div class="pair">{sheet}{chart}</div>
  {scale}
  {see}
  {about}
  {_cite(trace, "make_noise_source")}
</section>"""
    first = trace.steps[0]
    image = show_image(
        pictures.encode_photo(trace.given, PHOTO),
        "The image that was given",
        f"The given image <code>{show_shape(trace.given)}</code>",
        _size_style(trace.given),
    )
    latent = show_channels(
        trace.given_latent,
        scales.latent,
        "The channels of its latent, in which its outlines can be seen",
        "Its latent",
    )
    start = show_channels(
        trace.start,
        scales.latent,
        "The channels of the latent with noise",
        "The start: both added",
    )
    skipped = trace.num_steps - len(trace.steps)
    see = _see(f"""In the channels of the latent one can make out the image. In the start much of it
        is covered, but not all. {origin}""")
    why = _why(f"""What is still visible of the image guides the first steps, so its layout and
        colours survive. Because the start has less noise than pure noise, the first {skipped} of
        {trace.num_steps} steps were left out.""")
    return f"""
<section id="noise">
  <h2>The given image gets noise</h2>
  <p>This run did not start from noise alone. An encoder, the decoder's counterpart, turned the
  given image into a latent. Then noise was added.</p>
  <div class="grid">{image}{latent}{sheet}{start}</div>
  {scale}
  <p class="equation">start = √ᾱ · latent + √(1−ᾱ) · noise = {first.alpha**0.5:.2f} · latent +
  {(1 - first.alpha) ** 0.5:.2f} · noise</p>
  {see}
  {why}
  {about}
  {_cite(trace, "make_noise_source")}
</section>"""


def write_schedule(trace):
    """Returns the section about the noise schedule."""
    alphas, last = trace.alphas_cumprod, len(trace.alphas_cumprod) - 1
    timesteps = [step.timestep for step in trace.steps]
    see = _see(f"""At timestep 0 there is nearly no noise. At timestep {last} there is nearly
        nothing else. Generation begins at timestep {timesteps[0]:g} and goes to the
        left.""")
    why = _why("""One could jump from noise to image at once. The result would have no detail: from
        pure noise the network can only guess a mean of all images that fit the prompt. (Where these
        are all alike, the mean looks like one of them.) After a small step there is a little less
        noise, so the next guess is a little better.""")
    return f"""
<section id="schedule">
  <h2>How much noise, and when</h2>
  <p>In training the network saw images with noise, at {last + 1:,} noise levels. A level is named
  by its timestep. At timestep t a latent is mixed from a clean one, x0, and noise:</p>
  <p class="equation">x_t = √ᾱ · x0 + √(1−ᾱ) · noise</p>
  <p>ᾱ (“alpha bar”) is a number between 0 and 1 that the schedule has for each timestep. In the
  source it is <code>alphas_cumprod[t]</code>.</p>
  <figure class="wide">{charts.draw_schedule(alphas, timesteps)}
  <figcaption><span><i class="key signal"></i>√ᾱ, how much of the image is there.</span>
  <span><i class="key noise"></i>√(1−ᾱ), how much noise.</span> The dots are the {len(timesteps)}
  timesteps of this run.</figcaption></figure>
  {see}
  {why}
  {_cite(trace, "levels", "timestep_embedding")}
</section>"""


def write_steps(trace, shown, panels, scales):
    """Returns the section with the slider.

    Args:
        trace: the `Trace`.
        shown: list of the `Step` that are shown.
        panels: what `write_step` returns of each.
        scales: the `Scales`.
    """
    fewer = ""
    if len(shown) < len(trace.steps):
        fewer = f"""<p class="note">This run had {len(trace.steps)} steps. So that the page stays
        small, {len(shown)} of them are shown, evenly chosen, with the first and the last.</p>"""
    guided = any(step.without_prompt is not None for step in shown)
    predict = """The UNet, the second neural network, gets the latent, the timestep and the context.
    It predicts the noise in the latent."""
    if guided:
        predict += """ It does so twice: once with the context of the prompt, and once with that of
        the empty prompt, or of the negative prompt (what not to show) if there is one."""
    if guided and any(step.without_prompt is None for step in shown):
        predict += " In some steps of this run it does so once, without guidance."
    guidance = (
        f"""<li><b>Strengthen.</b> <a href="#guidance">Guidance</a> exaggerates what the prompt
        changes: <code>noise = without + {trace.scale:g} · (with − without)</code>.</li>"""
        if guided
        else ""
    )
    converted = {
        "v_prediction": """<p class="note">The network of this checkpoint does not predict noise
        itself, but a mix of noise and image: <code>v = √ᾱ · noise − √(1−ᾱ) · x0</code>. The noise
        that you see was computed from it; nothing else changes.</p>""",
        "sample": """<p class="note">The network of this checkpoint does not predict noise, but x0
        itself. The noise that you see was computed from it; nothing else changes.</p>""",
    }.get(trace.prediction_type, "")
    move = (
        "The sampler, here DDIM, puts the same predicted noise back, but less of it: "
        "<code>√ᾱ_next · x0 + √(1−ᾱ_next) · noise</code>. The next step starts from there; after "
        "the last one nearly none comes back."
        if trace.sampler == "ddim"
        else f"The sampler, {quote(trace.sampler)}, goes to the next noise level, where there is "
        "less noise. The next step starts from there."
    )
    stretched = (
        """The difference of both predictions is small, so its colours are stretched; the caption
        says how far they reach. But it counts, above all at first: to get x0 it is divided by √ᾱ,
        which is least there."""
        if guided
        else ""
    )
    told = "for latents and noise in all steps. Values beyond have the colours of the ends."
    scale = show_scale(scales.latent, told)
    begins = (
        """At first the latent and the predicted noise look the same, because the latent is nearly
        nothing but noise. Then a form appears in it, while the noise fades."""
        if shown[0].alpha < NEARLY_NOISE
        else "The form in the latent becomes clearer from step to step, while the noise fades."
    )
    see = _see(f"""{begins} {stretched} The early guesses are smooth. Detail comes late: it can't be
        known while noise covers it.""")
    return f"""
<section id="steps">
  <h2>Step by step from noise to image</h2>
  <ol class="short">
    <li><b>Predict.</b> {predict}</li>
    {guidance}
    <li><b>Subtract.</b> Without the noise, this is left:
    <code>x0 = (x_t − √(1−ᾱ) · noise) / √ᾱ</code>. It is the network's present guess of the
    finished latent. Decoded, it is the large image.</li>
    <li><b>Go on.</b> {move}</li>
  </ol>
  <p>Grey numbers below a picture are those of this list.</p>
  {_cite(trace, "diffusion_model", *["guidance"][:guided], "sampler")}
  {see}
  {fewer}{converted}
  {scale}
  <div class="controls" id="controls" hidden>
    <button type="button" id="play" aria-pressed="false">Play</button>
    <button type="button" id="back" aria-label="One step back">←</button>
    <label for="slider">Step</label>
    <input type="range" id="slider" min="0" max="{len(shown) - 1}" value="0" step="1">
    <button type="button" id="next" aria-label="One step on">→</button>
    <output id="place" for="slider"></output>
  </div>
  <div id="panels">{"".join(panels)}</div>
</section>"""


def write_step(trace, step, scales):
    """Returns what is shown of a step."""
    number, signal, noise = step.step + 1, step.alpha**0.5, (1 - step.alpha) ** 0.5
    at, difference = f"at step {number}", find_difference(step)

    def sheet(values, caption, number="", limit=scales.latent, note=""):
        mark = number and f"<i>{number}</i> "
        return show_channels(values, limit, f"{caption} {at}", f"{mark}<b>{caption}</b>{note}")

    change = find_change(step)
    changed = "" if change is None else f" The prompt changes x0 by {change:.2f} on average."
    sheets = [sheet(step.before, "The latent")]
    if difference is None:
        sheets.append(sheet(step.with_prompt, "Predicted noise", 1))
    else:
        most = max(float(np.percentile(np.abs(difference), 99.5)), 1e-6)
        sheets += [
            sheet(step.with_prompt, "Noise, with the prompt", 1),
            sheet(step.without_prompt, "Noise, without it", 1),
            sheet(difference, "Their difference", 2, most, f", colours to ±{most:.2g}"),
            sheet(step.noise, f"Noise, guided by {trace.scale:g}", 2),
        ]
    sheets.append(sheet(step.x0, "x0, the guess", 2 if difference is None else 3))
    small = pictures.encode_photo(step.x0_image, THUMBNAIL)
    maps = "".join(
        f'<figure class="map"><span><img src="{pictures.encode_heat(heat)}" '
        f'alt="Where the UNet looks at {quote(word)}, {at}"></span>'
        f"<figcaption><bdi>{quote(word)}</bdi></figcaption></figure>"
        for word, heat in step.maps.items()
    )
    if maps:
        maps = f"""<h4>Where it looks at each word <span>from dark, nothing, to bright, the most
        that the word gets in any step</span></h4><div class="maps">{maps}</div>"""
    preview = ""
    if step.x0_image.shape != trace.image.shape:
        preview = ", a small preview: a pixel for each cell"
    image = show_image(
        pictures.encode_photo(step.x0_image, SMALL),
        f"The image that the model expects {at}",
        f"<i>{3 if difference is not None else 2}</i> <b>x0 as an image</b>{preview}",
        f"guess {_size_style(step.x0_image)}",
    )
    return f"""
<article class="step" id="step-{number}" style="--x0:url({small})">
  <h3>Step {number} of {trace.num_steps}<span>timestep {step.timestep:g}</span></h3>
  <p class="equation">latent = {signal:.3f} · image + {noise:.3f} · noise</p>
  <div class="panel">
    <div class="left">{image}
    <figure class="curve">{charts.mark_schedule(trace.alphas_cumprod, step.timestep, step.alpha)}
    <figcaption>Its place in the schedule.{changed}</figcaption></figure></div>
    <div class="right"><div class="sheets">{"".join(sheets)}</div>{maps}</div>
  </div>
</article>"""


def write_guidance(trace):
    """Returns the section about guidance."""
    images = "".join(
        show_image(
            pictures.encode_photo(image, PHOTO),
            f"The image with guidance {scale:g}",
            f"<b>{scale:g}</b>"
            + (", no guidance" if scale == 1 else "")
            + (", this run" if scale == trace.scale else ""),
            _size_style(image),
        )
        for scale, image in trace.guidance.items()
    )
    sizes, chart = [find_change(step) for step in trace.steps], ""
    if None not in sizes:
        text = f"Bars, {sizes[0]:.2f} at the first step and {sizes[-1]:.2f} at the last."
        chart = f"""<figure class="wide">{charts.draw_values(sizes, "step", text)}<figcaption>How
        much the prompt changes x0, a bar for each step (mean of the absolute difference, without
        the guidance scale).</figcaption></figure>"""
        if sizes[0] > 2 * sizes[-1]:
            chart += _why("""With much noise the network sees nearly no image, so it relies on the
            prompt. Later the latent itself shows what it is going to be, and the prompt changes
            little.""")
    see = ""
    if trace.guidance:
        first = "At 1 the formula gives the prediction with the prompt, unchanged."
        see = _see(f"""The same prompt and the same noise, with other guidance scales.
        {first if 1 in trace.guidance else ""} A higher scale makes the subject clearer and colours
        stronger. Too high a scale makes hard edges and glaring colours.""")
    return f"""
<section id="guidance">
  <h2>Guidance: how strictly to follow the prompt</h2>
  <p>A network that is told the prompt follows it only loosely. But we can ask it twice, with the
  prompt and without. The difference is what the prompt changes, and we can take more of it:</p>
  <p class="equation">noise = without + scale · (with − without)</p>
  <div class="trio">{images}</div>
  {see}
  {chart}
  {_cite(trace, "guidance")}
</section>"""


def write_words(trace):
    """Returns the section with the heat map of each word."""
    maps = "".join(
        show_image(
            pictures.encode_photo(overlay_map(trace.image, heat), SMALL),
            f"The image in grey, bright where it looks at {quote(word)}",
            f"<bdi>{quote(word)}</bdi>",
            _size_style(trace.image),
        )
        for word, heat in trace.maps.items()
    )
    see = _see("""Bright means that the cells there paid much attention to the word. Words that name
        a thing are often bright on the thing, but not always: the map shows where the network reads
        the word, which need not be where the thing is.""")
    why = _why("""Nobody told the network where the things are; it learned by itself which words to
        read where. Each map is divided by its own maximum, so compare places, not words. A word
        that stands there twice has the mean of both. Small words have maps, too, because the
        shares have to go somewhere. The image shines through the colours.""")
    return f"""
<section id="words">
  <h2>Which part looks at which word</h2>
  <p>The UNet reads the context by attention: each cell of the latent spreads its attention over the
  tokens, in shares that add up to 1. Here the shares of each word are summed over all layers and
  all steps.</p>
  {f'<div class="grid words">{maps}</div>' if maps else "<p>This prompt has no words.</p>"}
  <p class="scale"><span>least</span><span class="ramp heat" role="img"
  aria-label="Colours from black over red to light yellow"></span><span>most</span></p>
  {see}
  {why}
</section>"""


def write_decoder(trace, scales):
    """Returns the section about the decoder."""
    latent = trace.steps[-1].latent
    figures = [
        show_channels(latent, scales.latent, "The channels of the last latent", "<b>The latent</b>")
    ]
    gives = {box.name: box.gives for box in trace.boxes if box.part == "decoder"}
    for name, features in trace.stages.items():
        if features.shape[-1] > 3:
            shape = show_shape(features)
            reduced = f", shown as {shape}" if gives.get(name, shape) != shape else ""
            figures.append(
                show_image(
                    pictures.encode_photo(pictures.find_components(features), SMALL),
                    f"The feature map after {quote(name)}",
                    f"<b>{quote(name)}</b> <code>{quote(gives.get(name, shape))}</code>{reduced}",
                    "pixels",
                )
            )
    figures.append(
        show_image(
            pictures.encode_photo(trace.image, PHOTO),
            "The image",
            f"<b>The image</b> <code>{show_shape(trace.image)}</code>",
            _size_style(trace.image),
        )
    )
    see = ""
    if trace.stages:
        see = _see("""A feature map has more channels than an image has colours. So each picture
            shows the three directions in which its channels vary most (principal components) as
            red, green and blue. The colours have no further meaning, and change from picture to
            picture; look at the forms. They get finer with every stage. The last layers turn them
            into true colours.""")
    why = _why("""The decoder was trained together with an encoder: images were made small and large
        again, until they came back nearly unchanged. It knows what edges and surfaces look like, so
        the latent does not have to spell out each pixel.""")
    return f"""
<section id="decoder">
  <h2>From the latent to pixels</h2>
  <p>The last latent is clean, but it is no image yet. The decoder, the third neural network, makes
  pixels of it. It goes from a small grid with many channels to a large one with three: red, green
  and blue.</p>
  <div class="grid stages">{"".join(figures)}</div>
  {see}
  {why}
  {_cite(trace, "unscale")}
</section>"""


def write_boxes(trace):
    """Returns the section with shapes and source lines of everything that ran."""
    parts = {}
    for box in trace.boxes:
        parts.setdefault(box.part, []).append(box)
    tables, drawings = [], []
    for part, boxes in parts.items():
        title, count = quote(PARTS.get(part, part)), f"{len(boxes)} box"
        tables.append(
            f"<details><summary>{title} <span>{count}{'es' if len(boxes) > 1 else ''}</span>"
            "</summary><table><thead><tr><th>box</th><th>what it does</th><th>shapes</th>"
            f"<th>source</th></tr></thead><tbody>{''.join(map(_show_box, boxes))}</tbody></table>"
            "</details>"
        )
        drawing = charts.draw_boxes(boxes) if part in ("diffusion_model", "decoder") else ""
        if drawing:
            drawings.append(f"""<figure>{drawing}<figcaption><b>{title}.</b> Each bar is a box, from
            left to right as they run. The higher, the larger its feature map; the number is its
            rows. The stronger its colour, the more channels.</figcaption></figure>""")
    return f"""
<section id="boxes">
  <h2>Every box, and where it is written</h2>
  <p>This is all that ran, in order. The last column names the file and the line where it is
  written, so you can read on there. Shapes are without the batch.</p>
  <div class="pair">{"".join(drawings)}</div>
  {"".join(tables)}
</section>"""


def write_further(trace):
    """Returns the section that says where to read on."""
    papers = {
        "https://arxiv.org/abs/2112.10752": "Latent diffusion: the three networks",
        "https://arxiv.org/abs/2006.11239": "DDPM: noise, timesteps, predicting the noise",
        "https://arxiv.org/abs/2010.02502": "DDIM: few steps without new noise",
        "https://arxiv.org/abs/2207.12598": "Classifier-free guidance",
        "https://arxiv.org/abs/2103.00020": "CLIP: the text encoder",
        "https://arxiv.org/abs/2210.04885": "DAAM: the heat maps",
    }
    links = "".join(f'<li><a href="{url}">{title}</a></li>' for url, title in papers.items())
    return f"""
<section id="further">
  <h2>Read on</h2>
  <p>Make such a page of a prompt of your own, with the package that made this one:</p>
  <pre><code>{quote(COMMAND)}</code></pre>
  <p>In Python, where <code>trace</code> gives all the arrays of this page:</p>
  <pre><code>{quote(EXAMPLE)}</code></pre>
  <p>The folder <code>scripts/lessons</code> of the source has lessons that go the same way in code,
  step by step, with exercises.</p>
  <p>The papers, each with one idea of this page:</p>
  <ul>{links}</ul>
</section>"""


def _show_box(box):
    source = quote(box.source).replace("/", "/<wbr>")
    return (
        f"<tr><th scope=row><code>{quote(box.name)}</code></th><td>{quote(box.text)}</td>"
        f'<td class="shape"><code>{quote(box.takes)}</code> <code>→ {quote(box.gives)}</code></td>'
        f'<td class="source"><code>{source}</code></td></tr>'
    )


def _cite(trace, *names):
    """Says where boxes are written, each place once: those of a name, or else of a part."""
    found = {}
    for name in names:
        named = [box for box in trace.boxes if box.name == name][:1]
        for box in named or [box for box in trace.boxes if box.part == name]:
            found.setdefault(box.source, box.name)
    places = ", ".join(
        f"<code>{quote(name)}</code> in <code>{quote(source).replace('/', '/<wbr>')}</code>"
        for source, name in found.items()
    )
    return places and f'<p class="cite">In the source: {places}.</p>'


def _see(text):
    return _tell("What you see", text)


def _why(text):
    return _tell("Why it is so", text)


def _tell(title, text):
    return f'<div class="told"><h3>{title}</h3><p>{text}</p></div>'


def _size_style(image):
    """Returns the class of an image: small ones are enlarged without smoothing."""
    return "pixels" if max(image.shape[:2]) < THUMBNAIL else "photo"


def _name_token(token):
    if token.kind != "text":
        return token.kind
    return "byte" if BROKEN in token.text else token.text


def _show_token(token, name):
    return f'<span class="{token.kind}"><bdi>{quote(name)}</bdi><code>{token.id}</code></span>'


def _goes_on(before, token):
    """Tells whether a token is a further piece of the word of the one before it."""
    joined = before is not None and before.word is not None and not before.ends_word
    return joined and before.word == token.word


def _list_split_words(tokens):
    """Lists the first words that have several tokens: `(word, number)`, each once."""
    counts, count = {}, 0
    for before, token in zip([None, *tokens], tokens, strict=False):
        count = count + 1 if _goes_on(before, token) else 1
        if count > 1:
            counts[token.word] = count
    return list(counts.items())[:MOST_NAMED]


def _show_bars(distances, rows):
    if distances is None:
        return ""
    most = max(float(distances.max()), 1e-9)
    bars = "".join(f'<i style="width:{100 * distances[n] / most:.0f}%"></i>' for n in rows)
    return f'<div class="bars" aria-hidden="true">{bars}</div>'
