"""The pipeline: prompt to context, noise to latent, latent to image."""

from functools import partial

import numpy as np
from keras import ops, utils

from stable_diffusion.adapters.embedding import load_embedding
from stable_diffusion.adapters.lora import load_lora, unload_lora
from stable_diffusion.checkpoints import open_checkpoint, save_checkpoint
from stable_diffusion.checkpoints.changes import Changes
from stable_diffusion.decoder import Decoder
from stable_diffusion.diffusion_model import DiffusionModel, DiffusionModelV2
from stable_diffusion.image_encoder import ImageEncoder
from stable_diffusion.images import quantize_pixels
from stable_diffusion.noise import make_noise_source
from stable_diffusion.noise_scheduler import split_prediction, timestep_embedding
from stable_diffusion.samplers import find_sampler
from stable_diffusion.samplers.deep_cache import DeepCache
from stable_diffusion.strips import decode_in_strips
from stable_diffusion.text_encoder import TextEncoder, TextEncoderV2

MAX_PROMPT_LENGTH = 77  # tokens, CLIP's context length


class StableDiffusion:
    """Stable Diffusion 1: generates images from prompts.

    A drop-in for `keras_cv.models.StableDiffusion`. Each component is built, and its parameters
    loaded or downloaded, when it is first asked for. Any can be replaced by assigning
    `_text_encoder`, `_diffusion_model`, `_decoder`, `_image_encoder` or `_tokenizer`.

    The parameters that presets download are under the CreativeML Open RAIL-M licence (Stable
    Diffusion 1.4 and 2.1); by using them you accept its terms:
    https://raw.githubusercontent.com/CompVis/stable-diffusion/main/LICENSE.

    Args:
        img_height, img_width: size of the images in pixels, multiples of 64; None is the
            checkpoint's native size. Differs from KerasCV, which rounds other sizes silently.
        jit_compile: whether the backend's compiler is used: XLA on TensorFlow and JAX,
            `torch.compile` on PyTorch; OpenVINO always compiles and ignores it.
        weights: where the parameters come from: a preset ("emoji", "sd1.4", "sd2.1-base"); a folder
            in diffusers' layout, of .h5 files or of models for OpenVINO; a .safetensors or .ckpt
            file in the original layout; "hf://owner/name" on the Hugging Face Hub; None for fresh
            random ones. "kerascv" is the preset that KerasCV has for the class, "sd1.4" here. The
            result of `checkpoints.open_checkpoint`, which has further arguments, can be passed too.
        config: a `Config`: the architecture where `weights` doesn't tell.

    Raises:
        ValueError: a size, preset or folder that can't be used.

    Example:
        ```python
        model = StableDiffusion(weights="emoji")
        images = model.text_to_image("a red apple on a blue background", seed=0)
        PIL.Image.fromarray(images[0]).save("apple.png")
        ```
    """

    version, TextEncoder, DiffusionModel = 1, TextEncoder, DiffusionModel
    _text_encoder = _diffusion_model = _decoder = _image_encoder = _tokenizer = None

    def __init__(
        self, img_height=None, img_width=None, jit_compile=True, weights="kerascv", config=None
    ):
        self.jit_compile = jit_compile
        self.checkpoint = open_checkpoint(weights, config, self.version)
        self.changes = Changes()
        self.config = self.checkpoint.config
        self.img_height, self.img_width = self.config.resolve_size(img_height, img_width)

    def text_to_image(
        self,
        prompt,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=None,
        seed=None,
        **options,
    ):
        """Generates images from a prompt, or from each of several.

        Args:
            prompt: str, or a list of them.
            negative_prompt: what the images should not show: str, or a list with one a prompt.
            batch_size: number of images of each prompt.
            num_steps, unconditional_guidance_scale, **options: see `generate_image`.
            seed: int, or a list with one for each image; see `generate_image`.

        Returns:
            uint8 array `(prompts * batch_size, H, W, 3)`: first those of the first prompt.

        Raises:
            ValueError: a prompt of more than 77 tokens, and as `generate_image`.
        """
        context = self.encode_text(prompt)
        return self.generate_image(
            context,
            negative_prompt,
            len(context) * batch_size,
            num_steps,
            unconditional_guidance_scale,
            seed=seed,
            **options,
        )

    def generate_image(
        self,
        encoded_text,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=None,
        diffusion_noise=None,
        seed=None,
        verbose=1,
        callback=None,
        **options,
    ):
        """Generates images from encoded text: the steps of `generate_latents`, then the decoder.

        Args:
            encoded_text, negative_prompt, batch_size, num_steps, unconditional_guidance_scale,
            diffusion_noise, seed, **options: see `generate_latents`.
            verbose: 0 for no progress bar.
            callback: function of `(step, timestep, latent, x0)`, called after each step with what
                `generate_latents` yields.

        Returns:
            uint8 array `(batch_size, H, W, 3)`.

        Raises:
            ValueError: as `generate_latents`.
        """
        progress = utils.Progbar(num_steps, verbose=verbose)
        for step, timestep, latent, x0 in self.generate_latents(
            encoded_text,
            negative_prompt,
            batch_size,
            num_steps,
            unconditional_guidance_scale,
            diffusion_noise,
            seed,
            **options,
        ):
            progress.update(step + 1)
            if callback:
                callback(step, timestep, latent, x0)
        return self.decode_latents(latent)

    def generate_latents(
        self,
        encoded_text,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=None,
        diffusion_noise=None,
        seed=None,
        sampler="ddim",
        spacing=None,
        guidance_interval=(0, 1000),
        deep_cache=1,
        latent=None,
        first_step=0,
    ):
        """Generates latents step by step: a generator, which a caller may stop or steer.

            for step, timestep, latent, x0 in model.generate_latents(context):
                preview = model.decode_latents(x0)

        Args:
            encoded_text: `(77, D)`, or `(batch_size, 77, D)`, see `encode_text`.
            negative_prompt: what the images should not show: str, a list of `batch_size`, or
                encoded text.
            batch_size: number of images.
            num_steps: number of steps, 1 to 1000. The UNet runs in each.
            unconditional_guidance_scale: how closely to follow the prompt. At 1 or less the model
                runs without guidance, in half the time. None is the checkpoint's own.
            diffusion_noise: noise to start from, `(h, w, 4)` or `(batch_size, h, w, 4)`; it
                excludes `seed`.
            seed: int, for KerasCV's noise; or a list of `batch_size`, so that each image is the
                same whatever batch it is in.
            sampler: a key of `samplers.SAMPLERS`, or a generator function like those.
            spacing: how timesteps are spaced: "linspace", "leading", "trailing" or "quadratic";
                None is the checkpoint's own.
            guidance_interval: first and last timestep with guidance. Elsewhere the model follows
                the prompt only, in half the time. Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724, gain from leaving it out where noise is strongest.
            deep_cache: how many steps share the UNet's deep features, see `samplers.DeepCache`; 1
                is exact.
            latent: where to start in the middle, `(h, w, 4)` or `(batch_size, h, w, 4)`, as noisy
                as it is before step `first_step`.
            first_step: number of the first step that is taken, from 0.

        Yields:
            `(step, timestep, latent, x0)` after each step: its number from 0, the timestep where it
            began, the latent where it ended, and the clean latent that the model predicted: float32
            arrays `(batch_size, h, w, 4)`. `send(latent)` replaces the latent for the next step.

        Raises:
            ValueError: arguments that exclude each other, or a batch of another size; raised when
                the first step is asked for.
        """
        if diffusion_noise is not None and seed is not None:
            raise ValueError("Pass diffusion_noise or seed, not both: the seed only draws noise.")
        schedule, sampler = self.config.schedule, find_sampler(sampler)
        levels = schedule.levels(num_steps, spacing, sampler)
        if not 0 <= first_step < num_steps or (first_step and latent is None):
            raise ValueError(f"first_step {first_step!r} needs num_steps above it and a latent.")
        guided_from, guided_to = _read_interval(guidance_interval)
        scale = unconditional_guidance_scale
        scale = self.config.guidance_scale if scale is None else scale

        context, negative = _repeat("encoded_text", encoded_text, 2, batch_size), None
        if scale > 1:
            negative = "" if negative_prompt is None else negative_prompt
            negative = negative if np.ndim(negative) > 1 else self.encode_text(negative)
            negative = _repeat("negative_prompt", negative, 2, batch_size)

        next_noise = make_noise_source(self._latent_shape(), batch_size, seed)
        if latent is None:
            latent = next_noise() if diffusion_noise is None else diffusion_noise
        latent = _repeat("latent or diffusion_noise", latent, 3, batch_size)

        unet = DeepCache(self.diffusion_model, deep_cache)

        def denoise(latent, alpha, timestep=None):
            timestep = schedule.find_timestep(alpha) if timestep is None else timestep
            steered = guided_from <= timestep <= guided_to
            output = self._predict(
                unet, latent, timestep, context, negative if steered else None, scale
            )
            return split_prediction(output, latent, alpha, schedule.prediction_type)

        steps, sent = sampler.sample(denoise, latent, levels[first_step:], next_noise), None
        for step in range(first_step, num_steps):
            unet.step = step
            timestep, latent, x0 = steps.send(sent)
            sent = yield step, timestep, latent, x0

    def _predict(self, unet, latent, timestep, context, negative, scale):
        """Runs the UNet, with classifier-free guidance: away from the negative prompt.

        Both halves of the guidance go through the model in one pass, the negative prompt first.

        Reference: Ho and Salimans 2022, https://arxiv.org/abs/2207.12598, equation 6.
        """
        if negative is not None:
            latent, context = np.concatenate([latent] * 2), np.concatenate([negative, context])
        time = timestep_embedding([timestep] * len(latent), self.config.unet.widths[0])
        output = np.asarray(unet.predict_on_batch([latent, time, context]), "float32")
        if negative is None:
            return output
        without, output = np.split(output, 2)
        return without + scale * (output - without)

    def decode_latents(self, latent):
        """Decodes latents `(B, h, w, 4)` to images: uint8 array `(B, H, W, 3)`."""
        return quantize_pixels(decode_in_strips(self.decoder, latent))

    def encode_text(self, prompt):
        """Encodes a prompt, or each of several, as the context for `generate_image`.

        Args:
            prompt: str of at most 77 tokens, start and end included, or a list of them.

        Returns:
            float array `(prompts, 77, D)`.

        Raises:
            ValueError: no prompt, or one that is too long.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        tokens = np.array([self.tokenize(text) for text in prompts], "int32")
        if not len(tokens):
            raise ValueError("prompt must be a str or a list of at least one, not an empty list.")
        positions = np.tile(np.arange(MAX_PROMPT_LENGTH, dtype="int32"), (len(tokens), 1))
        return self.text_encoder.predict_on_batch({"tokens": tokens, "positions": positions})

    def tokenize(self, prompt):
        """Returns the ids of a prompt's tokens, padded to 77: a list of ints.

        Raises:
            ValueError: the prompt is too long.
        """
        ids, limit = self.tokenizer.encode(prompt), MAX_PROMPT_LENGTH
        if len(ids) > limit:
            raise ValueError(f"A prompt has at most {limit} tokens, not {len(ids)}: {prompt!r}")
        pad = self.config.text.pad_token
        return ids + [self.tokenizer.end_of_text if pad is None else pad] * (limit - len(ids))

    @property
    def text_encoder(self):
        """The `TextEncoder`, which turns tokens into the context."""
        if self._text_encoder is None:
            make = partial(self.TextEncoder, MAX_PROMPT_LENGTH)
            self._text_encoder = self._build("text_encoder", make)
        return self._text_encoder

    @property
    def diffusion_model(self):
        """The `DiffusionModel`, which predicts the noise in a latent."""
        if self._diffusion_model is None:
            size = self.img_height, self.img_width
            make = partial(self.DiffusionModel, *size, MAX_PROMPT_LENGTH)
            self._diffusion_model = self._build("diffusion_model", make)
        return self._diffusion_model

    @property
    def decoder(self):
        """The `Decoder`, which turns latents into images."""
        if self._decoder is None:
            make = partial(Decoder, self.img_height, self.img_width)
            self._decoder = self._build("decoder", make)
        return self._decoder

    @property
    def image_encoder(self):
        """The `ImageEncoder`, which turns images into latents."""
        if self._image_encoder is None:
            self._image_encoder = self._build("image_encoder", ImageEncoder)
        return self._image_encoder

    @property
    def tokenizer(self):
        """The `SimpleTokenizer`, which turns a prompt into tokens."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    def _build(self, component, make):
        model = self.checkpoint.build(component, make)
        model.compile(jit_compile=self.jit_compile)
        return model

    def save(self, path, format="diffusers", dtype=None):
        """Writes all components for this and other programs, see `checkpoints.save_checkpoint`.

        Args:
            path: path of a new folder, or of a .safetensors file.
            format: "diffusers" (a folder), "original" (a single file), "keras" (a folder of
                .weights.h5), "kerascv" (a folder of .h5 files that KerasCV loads) or "openvino" (a
                folder of models that generate the fastest on a CPU, and do nothing else).
            dtype: "float32", "float16" or "bfloat16"; None is that of the parameters.

        Raises:
            ValueError: arguments that can't be used; nothing is written then.
        """
        save_checkpoint(self, path, format, dtype)

    def load_lora(self, path, scale=1.0):
        """Adds a LoRA to the parameters, see `adapters.lora.load_lora`.

        Args:
            path: path of a .safetensors file with names of kohya's, diffusers' or peft's kind, or
                of a folder of the latter two. Several may be loaded, one after the other.
            scale: factor of what it adds.

        Raises:
            ValueError: a file that doesn't fit; the parameters are unchanged then.
        """
        load_lora(self, path, scale)

    def unload_lora(self):
        """Removes all LoRAs: every parameter is exactly as it was before."""
        unload_lora(self)

    def load_embedding(self, path, token=None):
        """Adds a textual inversion as a token, see `adapters.embedding.load_embedding`.

        Args:
            path: path of a .safetensors file of one or several vectors.
            token: how it is written in prompts; None is the name in the file.

        Raises:
            ValueError: a file that doesn't fit, or a token that exists; nothing is changed then.
        """
        load_embedding(self, path, token)

    def _get_timestep_embedding(self, timestep, batch_size, dim=320, max_period=10000):
        return ops.convert_to_tensor(timestep_embedding([timestep] * batch_size, dim, max_period))

    def _latent_shape(self):
        c = self.config.vae
        return self.img_height // c.cell_size, self.img_width // c.cell_size, c.latent_channels


class StableDiffusionV2(StableDiffusion):
    """Stable Diffusion 2: as `StableDiffusion`, with another text encoder and UNet.

    A drop-in for `keras_cv.models.StableDiffusionV2`; `weights="kerascv"` is "sd2.1-base", the
    512-pixel model that predicts noise.
    """

    version, TextEncoder, DiffusionModel = 2, TextEncoderV2, DiffusionModelV2


def _read_interval(interval):
    try:
        first, last = (float(end) for end in interval)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"guidance_interval must be two timesteps, first and last, not {interval!r}."
        ) from error
    return first, last


def _repeat(name, x, rank, batch_size):
    """Returns `x` as float32 with `batch_size` entries of `rank` dimensions, repeating each."""
    x = np.asarray(ops.convert_to_numpy(x), "float32").reshape(-1, *np.shape(x)[-rank:])
    if batch_size % len(x):
        raise ValueError(f"{name} must have 1 or batch_size={batch_size} entries, not {len(x)}.")
    return np.repeat(x, batch_size // len(x), axis=0)
