"""The pipeline: prompt to context, noise to latent, latent to picture."""

from functools import partial

import numpy as np
from keras import ops, random, utils

import stable_diffusion as sd  # its subpackages are imported when they are first needed
from stable_diffusion.decoder import Decoder
from stable_diffusion.diffusion_model import DiffusionModel, DiffusionModelV2
from stable_diffusion.image_encoder import ImageEncoder
from stable_diffusion.noise_scheduler import timestep_embedding
from stable_diffusion.text_encoder import TextEncoder, TextEncoderV2

MAX_PROMPT_LENGTH = 77  # tokens, CLIP's context length


class StableDiffusion:
    """Stable Diffusion 1: draws pictures from prompts.

    A drop-in for `keras_cv.models.StableDiffusion`. Each part is built, and its parameters loaded
    or downloaded, when it is first asked for; any can be replaced by assigning `_text_encoder`,
    `_diffusion_model`, `_decoder`, `_image_encoder` or `_tokenizer`.

    The parameters that presets download are under the CreativeML Open RAIL-M licence (Stable
    Diffusion 1.4 and 2.1); by using them you accept its terms:
    https://raw.githubusercontent.com/CompVis/stable-diffusion/main/LICENSE.

    Args:
        img_height, img_width: size of the pictures in pixels, multiples of 64; None is the
            checkpoint's native size. Differs from KerasCV, which rounds other sizes silently.
        jit_compile: whether the backend's compiler is used: XLA on TensorFlow and JAX,
            `torch.compile` on PyTorch; OpenVINO always compiles and ignores it.
        weights: where the parameters come from: a preset ("emoji", "sd1.4", "sd2.1-base"); a folder
            in diffusers' layout, of .h5 files or of models for OpenVINO; a .safetensors or .ckpt
            file in the original layout; "hf://owner/name" on the Hugging Face Hub; None for fresh
            random ones; "kerascv" is the preset that KerasCV has for the class, "sd1.4" here. For
            what a file doesn't tell, see `checkpoints.open_checkpoint`, whose result can be passed.
        config: a `Config`, the architecture where `weights` doesn't tell.

    Raises:
        ValueError: a size, preset or folder that can't be used.

    Example:
        ```python
        model = StableDiffusion(weights="emoji")
        images = model.text_to_image("a red apple on a blue background", seed=0)
        PIL.Image.fromarray(images[0]).save("apple.png")
        ```
    """

    TextEncoder, DiffusionModel = TextEncoder, DiffusionModel
    _text_encoder = _diffusion_model = _decoder = _image_encoder = _tokenizer = None

    def __init__(
        self, img_height=None, img_width=None, jit_compile=True, weights="kerascv", config=None
    ):
        self.jit_compile = jit_compile
        self.checkpoint = sd.checkpoints.open_checkpoint(weights, config, self.TextEncoder.preset)
        self.config = self.checkpoint.config
        self.img_height, self.img_width = self.config.picture_size(img_height, img_width)

    def _part(self, name, make, *args):
        if getattr(self, f"_{name}") is None:
            model = self.checkpoint.build(name, partial(make, *args))
            model.compile(jit_compile=self.jit_compile)
            setattr(self, f"_{name}", model)
        return getattr(self, f"_{name}")

    @property
    def text_encoder(self):
        """The `TextEncoder`, which turns tokens into the context."""
        return self._part("text_encoder", self.TextEncoder, MAX_PROMPT_LENGTH)

    @property
    def diffusion_model(self):
        """The `DiffusionModel`, which predicts the noise in a latent."""
        size = self.img_height, self.img_width
        return self._part("diffusion_model", self.DiffusionModel, *size, MAX_PROMPT_LENGTH)

    @property
    def decoder(self):
        """The `Decoder`, which turns latents into pictures."""
        return self._part("decoder", Decoder, self.img_height, self.img_width)

    @property
    def image_encoder(self):
        """The `ImageEncoder`, which turns pictures into latents."""
        return self._part("image_encoder", ImageEncoder)

    @property
    def tokenizer(self):
        """The `SimpleTokenizer`, which turns a prompt into tokens."""
        self._tokenizer = self._tokenizer or self.checkpoint.tokenizer()
        return self._tokenizer

    def save(self, path, format="diffusers", dtype=None):
        """Writes all parts for this and other programs, see `checkpoints.save`.

        Args:
            path: path of a new folder, or of a .safetensors file.
            format: "diffusers" (a folder), "original" (a single file), "keras" (a folder of
                .weights.h5), "kerascv" (a folder of .h5 files that KerasCV loads) or "openvino" (a
                folder of models that draw the fastest on a CPU, and do nothing else).
            dtype: "float32", "float16" or "bfloat16"; None is that of the parameters.

        Raises:
            ValueError: arguments that can't be used; nothing is written then.
        """
        sd.checkpoints.save(self, path, format, dtype)

    def load_lora(self, path, scale=1.0):
        """Adds a LoRA to the parameters, see `checkpoints.lora.load_lora`.

        Args:
            path: path of a .safetensors file of kohya's, diffusers' or peft's keys, or of a folder
                of theirs. Several may be loaded, one after the other.
            scale: factor of what it adds.

        Raises:
            ValueError: a file that doesn't fit; the parameters are unchanged then.
        """
        sd.checkpoints.lora.load_lora(self, path, scale)

    def unload_lora(self):
        """Takes all LoRAs off again: every parameter is exactly as it was before."""
        sd.checkpoints.lora.unload_lora(self)

    def load_embedding(self, path, token=None):
        """Adds a textual inversion as a token, see `checkpoints.embedding.load_embedding`.

        Args:
            path: path of a .safetensors file of one or several vectors.
            token: how it is written in prompts; None is the name in the file.

        Raises:
            ValueError: a file that doesn't fit, or a token that exists; nothing is changed then.
        """
        sd.checkpoints.embedding.load_embedding(self, path, token)

    def text_to_image(
        self, prompt, negative_prompt=None, batch_size=1, num_steps=50,
        unconditional_guidance_scale=7.5, seed=None, **options,
    ):  # fmt: skip
        """Draws pictures of a prompt, or of each of several.

        Args:
            prompt: str, or a list of them.
            negative_prompt: what to steer away from: str, or a list with one for each prompt.
            batch_size: number of pictures of each prompt.
            num_steps, unconditional_guidance_scale, **options: see `generate_image`.
            seed: int, or a list with one for each picture; see `generate_image`.

        Returns:
            uint8 array `(prompts * batch_size, H, W, 3)`: first those of the first prompt.

        Raises:
            ValueError: a prompt of more than 77 tokens, and as `generate_image`.
        """
        context = self.encode_text(prompt)
        return self.generate_image(
            context, negative_prompt, len(context) * batch_size, num_steps,
            unconditional_guidance_scale, seed=seed, **options,
        )  # fmt: skip

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
        """Returns the ids of a prompt's tokens, filled up to 77: a list of ints.

        Raises:
            ValueError: the prompt is too long.
        """
        ids, limit = self.tokenizer.encode(prompt), MAX_PROMPT_LENGTH
        if len(ids) > limit:
            raise ValueError(f"A prompt has at most {limit} tokens, not {len(ids)}: {prompt!r}")
        pad = self.config.text.pad_token
        return ids + [self.tokenizer.end_of_text if pad is None else pad] * (limit - len(ids))

    def generate_image(
        self, encoded_text, negative_prompt=None, batch_size=1, num_steps=50,
        unconditional_guidance_scale=7.5, diffusion_noise=None, seed=None, verbose=1, callback=None,
        sampler="ddim", guidance_interval=(0, 1000), deep_cache=1,
    ):  # fmt: skip
        """Draws pictures of an encoded text, step by step and with classifier-free guidance.

        Args:
            encoded_text: `(77, D)`, or `(batch_size, 77, D)`, see `encode_text`.
            negative_prompt: what to steer away from: str, a list of `batch_size`, or encoded.
            batch_size: number of pictures.
            num_steps: number of steps, 1 to 1000, each a pass of the UNet.
            unconditional_guidance_scale: how far to follow the prompt. At 1 or less the model runs
                without guidance, in half the time.
            diffusion_noise: noise to start from, `(h, w, 4)` or `(batch_size, h, w, 4)`; it
                excludes `seed`.
            seed: int, for KerasCV's noise; or a list of `batch_size`, so that each picture is the
                same whatever batch it is in.
            verbose: 0 for no progress bar.
            callback: called after each step with `(step, timestep, latent)`: ints from 0 and from
                the training schedule, float32 array `(batch_size, h, w, 4)`.
            sampler: "ddim" (KerasCV's), "dpmpp-2m", "dpmpp-2m-quadratic", "unipc", or a generator
                function as they are.
            guidance_interval: first and last timestep with guidance, see `samplers.Guided`.
            deep_cache: how many steps share the UNet's deep features, see `samplers.DeepCache`; 1
                is exact.

        Returns:
            uint8 array `(batch_size, H, W, 3)`.

        Raises:
            ValueError: arguments that exclude each other, or a batch of another size.
        """
        if diffusion_noise is not None and seed is not None:
            raise ValueError("Pass diffusion_noise or seed, not both: the seed only draws noise.")
        if diffusion_noise is None:
            diffusion_noise = self._get_initial_diffusion_noise(batch_size, seed)
        latent = _expand("diffusion_noise", diffusion_noise, 3, batch_size)
        context = _expand("encoded_text", encoded_text, 2, batch_size)
        scale, negative, width = unconditional_guidance_scale, None, self.config.unet.widths[0]
        if scale > 1:
            negative = "" if negative_prompt is None else negative_prompt
            negative = negative if np.ndim(negative) > 1 else self.encode_text(negative)
            negative = _expand("negative_prompt", negative, 2, batch_size)
        unet = sd.samplers.DeepCache(self.diffusion_model, deep_cache)
        predict = sd.samplers.Guided(unet, width, context, negative, scale, guidance_interval)
        steps = sd.samplers.find(sampler)(predict, latent, self.config.schedule, num_steps)
        progress = utils.Progbar(num_steps, verbose=verbose)
        for step, (timestep, latent) in enumerate(steps):
            progress.update(step + 1)
            if callback:
                callback(step, timestep, latent)
        decoded = sd.tiling.decode(self.decoder, latent)
        return np.clip((decoded + 1) / 2 * 255, 0, 255).astype("uint8")

    def _get_timestep_embedding(self, timestep, batch_size, dim=320, max_period=10000):
        return ops.convert_to_tensor(timestep_embedding([timestep] * batch_size, dim, max_period))

    def _get_initial_diffusion_noise(self, batch_size, seed):
        scale = self.config.unet.latent_scale
        shape = self.img_height // scale, self.img_width // scale, self.config.vae.latent_channels
        if seed is None or isinstance(seed, int | np.integer):
            return random.normal((batch_size, *shape), seed=seed)
        if len(seed) != batch_size:
            raise ValueError(f"{batch_size} pictures need {batch_size} seeds, not {len(seed)}.")
        return ops.concatenate([random.normal((1, *shape), seed=int(one)) for one in seed])


class StableDiffusionV2(StableDiffusion):
    """Stable Diffusion 2: as `StableDiffusion`, with another text encoder and UNet.

    A drop-in for `keras_cv.models.StableDiffusionV2`; `weights="kerascv"` is "sd2.1-base", the
    512-pixel model that predicts noise.
    """

    TextEncoder, DiffusionModel = TextEncoderV2, DiffusionModelV2


def _expand(name, x, rank, batch_size):
    """Returns `x` as float32 with `batch_size` entries of `rank` dimensions, repeating each."""
    x = np.asarray(ops.convert_to_numpy(x), "float32").reshape(-1, *np.shape(x)[-rank:])
    if batch_size % len(x):
        raise ValueError(f"{name} must have 1 or batch_size={batch_size} entries, not {len(x)}.")
    return np.repeat(x, batch_size // len(x), axis=0)
