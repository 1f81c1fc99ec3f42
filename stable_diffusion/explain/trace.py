"""Everything that happened while one image was generated, as one object."""

import time
from dataclasses import dataclass
from functools import partial

import keras
import numpy as np

from stable_diffusion.block import without_gradients
from stable_diffusion.checks import check_entries, check_int, check_number, find_first_step
from stable_diffusion.explain.boxes import Box, list_boxes
from stable_diffusion.explain.daam import AttentionSums, normalize_map
from stable_diffusion.explain.notebook import make_summary
from stable_diffusion.explain.passes import watch_passes
from stable_diffusion.explain.probe import attention_probe, find_attention
from stable_diffusion.explain.words import find_words
from stable_diffusion.guidance import rescale_guidance
from stable_diffusion.images import fit_images, read_images
from stable_diffusion.noise_scheduler import split_prediction
from stable_diffusion.previews import preview_latents
from stable_diffusion.prompts import split_prompt
from stable_diffusion.samplers import SAMPLERS

GUIDANCE_SCALES = (1.0, 3.0, 7.5)
DECODED_PIXELS = 256**2  # of an image whose expected images are decoded at every step
MOST_CELLS = 128  # a side of the feature maps of the decoder that are kept
REFUSED = (  # options of the tasks that a trace of one image from a seed can't have
    "batch_size",
    "callback",
    "channels",
    "crop",
    "diffusion_noise",
    "first_step",
    "latent",
    "mask",
    "verbose",
)


@dataclass(frozen=True)
class Token:
    """A token of the prompt.

    Attributes:
        id: its number in the vocabulary.
        text: what it stands for, as the vocabulary has it ("apple", "back", "ground").
        kind: "start", "text", "end" or "padding".
        ends_word: whether a space or the end of the prompt follows in the text.
        word: the word of the prompt that it is a part of; None if it is a part of none.
    """

    id: int
    text: str
    kind: str
    ends_word: bool = False
    word: str | None = None


@dataclass(frozen=True)
class Step:
    """One step of the sampler. Arrays are float32, of one image: `(h, w, C)`.

    Attributes:
        step: its number, from 0.
        timestep: place in the noise schedule where it began.
        alpha, alpha_next: alphas_cumprod where it began and where it ended.
        before, latent: the latent where it began and where it ended.
        x0: the clean latent that the model expects.
        x0_image: that, as an image: uint8 `(H, W, 3)`, or `(h, w, 3)` of the linear preview.
        with_prompt, without_prompt: the noise that the UNet predicts with the prompt, and with the
            negative prompt; the latter is None in steps without guidance.
        noise: the noise that the step removes: both, combined by guidance.
        maps: how much each cell attends to each word, a dict from the word to float32 `(h, w)`,
            from 0 to 1 over the whole trace of that word.
    """

    step: int
    timestep: int | float
    alpha: float
    alpha_next: float
    before: np.ndarray
    latent: np.ndarray
    x0: np.ndarray
    x0_image: np.ndarray
    with_prompt: np.ndarray
    without_prompt: np.ndarray | None
    noise: np.ndarray
    maps: dict[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """What happened while one image was generated, see `trace`.

    A notebook shows it as pictures (`notebook.make_summary`). `page.write_page` makes a web page.

    Attributes:
        prompt, negative_prompt: the texts; the latter is "" unless one was given.
        seed, num_steps, scale: what they were; scale is the guidance scale.
        sampler: its name.
        checkpoint: how large it is: "text_encoder 1.1, diffusion_model 5.6, decoder 1.2 million
            parameters".
        image_size: of the image, `(H, W)`.
        tokens: list of `Token`, 77 or a multiple of it.
        context: float32 `(T, D)`, what the UNet sees of the prompt.
        negative_context: that of the negative prompt; None without guidance.
        given: the image that image to image starts from, uint8 `(H, W, 3)`; None from noise.
        given_latent: that image as a latent, `(h, w, C)`; None from noise.
        noise: the noise, `(h, w, C)`.
        start: the latent before the first step, `(h, w, C)`.
        steps: list of `Step`.
        guidance: a dict from a guidance scale to the image that it gives, uint8 `(H, W, 3)`.
            At 1 or less the prompt is followed without guidance.
        stages: what the decoder's stages give: a dict from the name of the last layer of a stage to
            its feature map, float32 `(height, width, channels)`, in order. Maps of more than 128
            cells a side are reduced by averaging. Empty where the decoder is no sequence of layers.
        image: the result, uint8 `(H, W, 3)`.
        maps: the heat map of each word over all steps, float32 `(H, W)` from 0 to 1.
        alphas_cumprod: float64 `(train_timesteps,)`.
        prediction_type: what the UNet predicts, see `noise_scheduler.split_prediction`.
        boxes: list of `boxes.Box`, in the order in which they run.
        seconds: how long it took.
    """

    prompt: str
    negative_prompt: str
    seed: int
    num_steps: int
    scale: float
    sampler: str
    checkpoint: str
    image_size: tuple[int, int]
    tokens: list[Token]
    context: np.ndarray
    negative_context: np.ndarray | None
    given: np.ndarray | None
    given_latent: np.ndarray | None
    noise: np.ndarray
    start: np.ndarray
    steps: list[Step]
    guidance: dict[float, np.ndarray]
    stages: dict[str, np.ndarray]
    image: np.ndarray
    maps: dict[str, np.ndarray]
    alphas_cumprod: np.ndarray
    prediction_type: str
    boxes: list[Box]
    seconds: float

    def _repr_html_(self):
        return make_summary(self)


def trace(
    model,
    prompt,
    negative_prompt=None,
    seed=0,
    num_steps=50,
    unconditional_guidance_scale=None,
    image=None,
    strength=0.8,
    guidance_scales=GUIDANCE_SCALES,
    progress=None,
    **options,
):
    """Generates one image, and keeps what happened.

    The image is that of `text_to_image` with the same arguments, or of `image_to_image` if there is
    an image. The UNet runs layer by layer meanwhile, as `attention_probe` says.

    Args:
        model: the `StableDiffusion`.
        prompt, negative_prompt: str; None is "".
        seed: int.
        num_steps, unconditional_guidance_scale: see `StableDiffusion.generate_latents`.
        image, strength: see `StableDiffusion.image_to_image`; None to start from noise.
        guidance_scales: the image is generated with each of these scales too.
        progress: function of `(done, total)`, called after each step: how many have been taken, of
            all images.
        **options: those of `StableDiffusion.generate_latents` and `encode_text`, such as `sampler`.

    Returns:
        A `Trace`.

    Raises:
        ValueError: several prompts, a model that can't be probed, and as the task.
    """
    start = time.perf_counter()
    _check_arguments(prompt, negative_prompt, options)
    find_attention(model, kinds="cross")
    seed = check_int("seed", seed, 0)
    num_steps = check_int("num_steps", num_steps, 1, len(model.config.schedule))
    scales = [check_number("guidance_scales", scale, 0) for scale in guidance_scales]
    syntax, skip = options.pop("prompt_syntax", None), options.pop("clip_skip", 0)
    words = find_words(model, prompt, syntax)
    sampler, spacing = options.get("sampler", "ddim"), options.get("spacing")
    noise_source = options.get("noise_source", "keras")
    row, levels, scale, draw = model._plan(
        1, num_steps, unconditional_guidance_scale, seed, noise_source, sampler, spacing, {}
    )
    first_step = 0 if image is None else find_first_step(num_steps, strength)

    context = model.encode_text(prompt, skip, syntax)
    guided = max(scale, *scales, 0) > 1 and not model.config.unet.guidance_width
    negative = model.encode_text(negative_prompt or "", skip, syntax) if guided else None
    task, given = model.text_to_image, None
    if image is not None:
        given = fit_images(read_images(image), model.img_height, model.img_width)
        check_entries("image", len(given), 1)
        task = partial(model.image_to_image, image=given, strength=strength)
    taken = num_steps - first_step
    total, done = taken * (1 + len({*scales} - {scale})), iter(range(1, 10**9))

    def generate(scale, callback=None):
        def after_step(*state):
            if callback:
                callback(*state)
            if progress:
                progress(next(done), total)

        return task(
            prompt=context,
            negative_prompt=negative if scale > 1 else None,
            num_steps=num_steps,
            unconditional_guidance_scale=scale,
            seed=seed,
            verbose=0,
            callback=after_step,
            **options,
        )[0]

    passes, states, sums = {}, {}, AttentionSums()

    def see(run):
        passes.setdefault(run.step, []).append(run)

    def keep(step, timestep, latent, x0):
        states[step] = timestep, latent[0], x0[0]

    with watch_passes(model, see), attention_probe(model, sums.add, kinds="cross"):
        result = generate(scale, keep)
    maps = sums.find_maps(words, result.shape[:2])
    step_maps = _find_step_maps(sums, words, states)
    guidance = scale, options.get("guidance_rescale", 0.0)
    steps = [
        _make_step(model, step, levels[step : step + 2], passes[step], states[step], guidance, some)
        for step, some in zip(states, step_maps, strict=True)
    ]
    others = {other: generate(other) for other in scales if other != scale}
    return Trace(
        prompt=prompt,
        negative_prompt=negative_prompt or "",
        seed=seed,
        num_steps=num_steps,
        scale=scale,
        sampler=_find_sampler_name(row, sampler),
        checkpoint=_describe_size(model),
        image_size=result.shape[:2],
        tokens=list_tokens(model, prompt, words, syntax),
        context=np.asarray(context[0], "float32"),
        negative_context=None if negative is None else np.asarray(negative[0], "float32"),
        given=None if given is None else given[0],
        given_latent=None if given is None else np.asarray(model.encode_images(given)[0]),
        noise=draw()[0],
        start=steps[0].before,
        steps=steps,
        guidance={other: others.get(other, result) for other in scales},
        stages=find_stages(model.decoder, steps[-1].latent),
        image=result,
        maps={word: normalize_map(np.mean(some, axis=0)) for word, some in maps.items()},
        alphas_cumprod=model.config.schedule.alphas_cumprod,
        prediction_type=model.config.schedule.prediction_type,
        boxes=list_boxes(model, row.sample, context.shape[1:]),
        seconds=time.perf_counter() - start,
    )


def _check_arguments(prompt, negative_prompt, options):
    if not isinstance(prompt, str) or not isinstance(negative_prompt, str | None):
        raise ValueError(
            f"A trace is of one prompt and one negative prompt, each a str, not {prompt!r:.200} "
            f"and {negative_prompt!r:.200}."
        )
    if refused := sorted({*options} & {*REFUSED}):
        raise ValueError(f"A trace is of one image from a seed: it has no {', '.join(refused)}.")


def _find_sampler_name(row, sampler):
    names = (name for name, one in SAMPLERS.items() if one.scheduler == row.scheduler)
    return sampler if sampler in SAMPLERS else next(names, getattr(row.sample, "__name__", "own"))


def _describe_size(model):
    counts = (
        (name, sum(int(np.prod(weight.shape)) for weight in getattr(model, name).weights))
        for name in ("text_encoder", "diffusion_model", "decoder")
    )
    return ", ".join(f"{name} {count / 1e6:.1f}" for name, count in counts) + " million parameters"


def list_tokens(model, prompt, words, prompt_syntax=None):
    """Returns the tokens that the text encoder sees of a prompt.

    Args:
        model: the `StableDiffusion`.
        prompt: str.
        words: what `find_words` finds in it.
        prompt_syntax: see `StableDiffusion.encode_text`.

    Returns:
        List of `Token`, 77, or with "webui" 77 of each chunk.
    """
    if prompt_syntax:
        chunks = [ids for ids, _ in split_prompt(model, prompt)]
    else:
        chunks = [model.tokenize(prompt)]
    of_position = {place: word for word in words for place in word.positions}
    tokens, tokenizer = [], model.tokenizer
    for ids in chunks:
        end = ids.index(tokenizer.end_of_text)  # padding after it may be the same id
        for place, id in enumerate(ids):
            kind = "start" if place == 0 else "text" if place < end else "end"
            kind = "padding" if place > end else kind
            word = of_position.get(len(tokens)) if kind == "text" else None
            last = word is not None and word.positions[-1] == len(tokens)
            text = tokenizer.decode([id]) if kind == "text" else ""
            tokens.append(Token(int(id), text, kind, last, word and word.text))
    return tokens


def _find_step_maps(sums, words, states):
    """Returns the maps of words at each step, at the size of the finest layer."""
    sizes = [size for _, size in sums.sums]
    size = max(sizes, key=lambda cells: cells[0] * cells[1])
    means = [
        {word: np.mean(some, axis=0) for word, some in sums.find_maps(words, size, step).items()}
        for step in states
    ]
    largest = {
        word: max(step[word].max() for step in means) for word in (means[0] if means else ())
    }
    tiny = np.finfo("float32").tiny
    return [
        {word: heat / max(largest[word], tiny) for word, heat in step.items()} for step in means
    ]


def _make_step(model, step, levels, passes, state, guidance, maps):
    """Returns the `Step` of the first time that the UNet ran in it."""
    (timestep, latent, x0), (level, after) = state, levels
    alpha, kind = level.alpha, model.config.schedule.prediction_type
    before = passes[0].latent[0, ..., : model.latent_shape[-1]]
    halves, (scale, rescale) = {}, guidance
    for run in passes:
        for name, entries in {"with": run.prompt, "without": run.negative}.items():
            for output in run.output[entries]:
                halves.setdefault(name, output)
    if "without" in halves:
        halves["guided"] = halves["without"] + scale * (halves["with"] - halves["without"])
        if rescale:
            outputs = halves["guided"][None], halves["with"][None]
            (halves["guided"],) = rescale_guidance(*outputs, rescale)
    noise = {name: split_prediction(one, before, alpha, kind)[1] for name, one in halves.items()}
    small = model.img_height * model.img_width <= DECODED_PIXELS
    decode = model.decode_latents if small else partial(preview_latents, model)
    return Step(
        step=step,
        timestep=timestep,
        alpha=alpha,
        alpha_next=after.alpha,
        before=before,
        latent=latent,
        x0=x0,
        x0_image=decode(x0[None])[0],
        with_prompt=noise["with"],
        without_prompt=noise.get("without"),
        noise=noise.get("guided", noise["with"]),
        maps=maps,
    )


def find_stages(decoder, latent):
    """Returns the feature maps of a decoder's stages, see `Trace.stages`.

    Args:
        decoder: the `Decoder`, or another sequence of layers; any other object has no stages.
        latent: float array `(h, w, C)`.
    """
    stages = {}
    if not isinstance(decoder, keras.Sequential):
        return stages
    with without_gradients():
        x = latent[None]
        for layer, following in zip(decoder.layers, [*decoder.layers[1:], None], strict=True):
            x = layer(x)
            ends = following is None or following.name == "conv_norm_out"
            ends = ends or following.output.shape[1] != layer.output.shape[1]
            if ends or layer.name in ("conv_in", "mid_res_1"):
                stages[layer.name] = _reduce(keras.ops.convert_to_numpy(x)[0])
    return stages


def _reduce(features):
    """Averages neighbouring cells until a map has at most `MOST_CELLS` cells a side."""
    factor = -(-max(features.shape[:2]) // MOST_CELLS)
    height, width = (size // factor for size in features.shape[:2])
    cut = features[: height * factor, : width * factor]
    return cut.reshape(height, factor, width, factor, -1).mean(axis=(1, 3)).astype("float32")
