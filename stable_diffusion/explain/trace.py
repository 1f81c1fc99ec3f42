"""Everything that happened while one image was generated, as one object."""

from dataclasses import dataclass

import numpy as np


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
class Box:
    """A part of the computation.

    Attributes:
        name: what it is called in the source: "text_encoder", "down_0_res_0", "ddim".
        part: the component or module that it belongs to: "tokenizer", "text_encoder",
            "noise_scheduler", "diffusion_model", "guidance", "sampler" or "decoder".
        text: what it does, in a sentence.
        takes, gives: shapes of what goes in and what comes out, without the batch:
            "(16, 16, 8)", "(77, 128)".
        source: where it is written: "stable_diffusion/decoder.py:45".
    """

    name: str
    part: str
    text: str
    takes: str
    gives: str
    source: str


@dataclass(frozen=True)
class Trace:
    """What happened while one image was generated, see `trace`.

    A notebook shows it as pictures (`_repr_html_`); `page.write_page` makes a web page of it.

    Attributes:
        prompt, negative_prompt: the texts; the latter is "" unless one was given.
        seed, num_steps, scale: what they were; scale is the guidance scale.
        sampler: its name.
        checkpoint: what was loaded, "emoji" or the name of a file or folder.
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
        stages: what the decoder's stages give: a dict from the name of the last layer of a stage to
            its feature map, float32 `(height, width, channels)`, in order.
        image: the result, uint8 `(H, W, 3)`.
        maps: the heat map of each word over all steps, float32 `(H, W)` from 0 to 1.
        alphas_cumprod: float64 `(train_timesteps,)`.
        prediction_type: what the UNet predicts, see `noise_scheduler.split_prediction`.
        boxes: list of `Box`, in the order in which they run.
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
