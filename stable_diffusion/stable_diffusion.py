"""The pipeline: prompt to context, noise to latent, latent to image."""

from functools import partial

import numpy as np
from keras import ops, utils

from stable_diffusion import checks
from stable_diffusion.clip_skip import check_skip, skip_layers
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.components import MAX_PROMPT_LENGTH, Components
from stable_diffusion.diffusion_model import DiffusionModel, DiffusionModelV2
from stable_diffusion.guidance import embed_guidance, rescale_guidance
from stable_diffusion.images import fit_images, normalize_pixels, quantize_pixels, read_images
from stable_diffusion.masks import list_paintings
from stable_diffusion.noise import make_noise_source
from stable_diffusion.noise_scheduler import split_prediction, timestep_embedding
from stable_diffusion.previews import join_preview
from stable_diffusion.prompts import check_prompts, encode_prompts
from stable_diffusion.samplers import bind_options, choose_sampler
from stable_diffusion.samplers.deep_cache import DeepCache
from stable_diffusion.samplers.from_image import keep, start_from
from stable_diffusion.strips import decode_in_strips
from stable_diffusion.text_encoder import TextEncoder, TextEncoderV2


class StableDiffusion(Components):
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
        variant: which files of a folder in diffusers' layout, such as "fp16", "ema" or "non_ema";
            None is the plain ones, otherwise "fp16".
        vae: another VAE than that of `weights`, also a tiny one (TAESD): a file, a folder or an
            address on the hub, see `checkpoints.open_checkpoint`.

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

    def text_to_image(
        self,
        prompt,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=None,
        seed=None,
        clip_skip=0,
        prompt_syntax=None,
        **options,
    ):
        """Generates images from a prompt, or from each of several.

        Args:
            prompt: str, or a list of them, or encoded text, see `encode_text`.
            negative_prompt: what the images should not show: str, or a list with one a prompt; or
                encoded text.
            batch_size: number of images of each prompt.
            num_steps, unconditional_guidance_scale, **options: see `generate_image`.
            seed: int, or a list with one for each image; see `generate_image`.
            clip_skip, prompt_syntax: see `encode_text`. They also hold for `negative_prompt`.

        Returns:
            uint8 array `(prompts * batch_size, H, W, 3)`: first those of the first prompt.

        Raises:
            ValueError: a prompt that `encode_text` refuses, and as `generate_image`.
        """
        total = checks.count_prompts(prompt) * checks.check_int("batch_size", batch_size)
        if not checks.is_encoded(prompt):
            self.check_components("text_encoder", "diffusion_model", "decoder")
            prompt = partial(self.encode_text, prompt, clip_skip, prompt_syntax)
        return self.generate_image(
            prompt,
            negative_prompt,
            total,
            num_steps,
            unconditional_guidance_scale,
            seed=seed,
            clip_skip=clip_skip,
            prompt_syntax=prompt_syntax,
            **options,
        )

    def image_to_image(
        self,
        prompt,
        image,
        negative_prompt=None,
        strength=0.8,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=None,
        diffusion_noise=None,
        seed=None,
        clip_skip=0,
        sampler="ddim",
        **options,
    ):
        """Generates images from a prompt and an image, which gets noise in place of pure noise.

        Args:
            prompt, negative_prompt, batch_size, num_steps, unconditional_guidance_scale, seed,
            clip_skip: see `text_to_image`.
            image: one image, or one for each image that is generated, see `images.read_images`.
                They are scaled to the size that is generated, and cropped in the middle.
            strength: share of the steps that is taken, as in diffusers: with 0.6 the last 30 of 50.
                The less, the more the result is like `image`; even 1 leaves a little of it.
            diffusion_noise, sampler, **options: see `generate_latents`.

        Returns:
            uint8 array `(prompts * batch_size, H, W, 3)`: first those of the first prompt.

        Raises:
            ValueError: an image or a strength that can't be used, and as `text_to_image`.

        Reference: Meng et al. 2022, https://arxiv.org/abs/2108.01073 (SDEdit).
        """
        total = checks.count_prompts(prompt) * checks.check_int("batch_size", batch_size)
        first_step = checks.find_first_step(num_steps, strength)
        pixels = fit_images(read_images(image), self.img_height, self.img_width)
        row, spacing = choose_sampler(sampler, options.pop("spacing", None), self.config)
        return self.text_to_image(
            prompt,
            negative_prompt,
            batch_size,
            num_steps,
            unconditional_guidance_scale,
            seed,
            clip_skip,
            diffusion_noise=diffusion_noise,
            sampler=start_from(row, self._encode_later(pixels, total)),
            spacing=spacing,
            first_step=first_step,
            **options,
        )

    def inpaint(
        self,
        prompt,
        image,
        mask,
        negative_prompt=None,
        num_resamples=1,
        batch_size=1,
        num_steps=25,
        unconditional_guidance_scale=None,
        diffusion_noise=None,
        seed=None,
        verbose=True,
        strength=1.0,
        clip_skip=0,
        sampler="ddim",
        crop=None,
        **options,
    ):
        """Paints a part of an image anew; every other pixel of the result is the image's.

        A model for inpainting, of 2 C + 1 channels of input, sees the kept part; with any other
        model the kept part is put back after each step.

        Args:
            prompt, negative_prompt, batch_size, num_steps, unconditional_guidance_scale, seed,
            clip_skip: see `text_to_image`.
            image: one image, or one for each image that is generated, see `images.read_images`.
            mask: what is kept: 1 or white is, 0 or black is painted. (The command has it the other
                way round.) See `masks.list_paintings`.
            num_resamples: how often each step is taken, see `samplers.from_image.keep`. More fits
                the painted part better to the kept one.
            diffusion_noise, sampler, **options: see `generate_latents`.
            verbose: False for no progress bar.
            strength: share of the steps that is taken, as in `image_to_image`; but 1 starts from
                noise alone.
            crop: None to scale the whole image to the size that is generated, and to crop it in the
                middle. Or a number of pixels: then only the painted part, with so much around it,
                is generated and pasted into the image, which keeps its size.

        Returns:
            uint8 array `(prompts * batch_size, H, W, 3)`: of the size that is generated, or with
            `crop` of the image's.

        Raises:
            ValueError: an image, a mask or a strength that can't be used, and as `text_to_image`.
        """
        total = checks.count_prompts(prompt) * checks.check_int("batch_size", batch_size)
        first_step = checks.find_first_step(num_steps, strength)
        paintings = list_paintings(image, mask, self.img_height, self.img_width, crop)
        clean = self._encode_later(np.stack([each.seen for each in paintings]), total)
        cells = np.stack([each.find_cells(self.config.vae.cell_size) for each in paintings])
        cells = np.repeat(cells, total // len(cells), axis=0)
        sampler, spacing = choose_sampler(sampler, options.pop("spacing", None), self.config)
        if self.config.unet.in_channels == self.config.vae.latent_channels:
            sampler = keep(sampler, clean, cells, num_resamples, from_noise=not first_step)
        elif num_resamples != 1:
            raise ValueError("A model for inpainting sees what is kept: num_resamples must be 1.")
        else:
            hidden = self._encode_later(np.stack([each.hide() for each in paintings]), total)
            options["channels"] = lambda: np.concatenate([cells, hidden()], axis=-1)
            sampler = start_from(sampler, clean) if first_step else sampler
        images = self.text_to_image(
            prompt,
            negative_prompt,
            batch_size,
            num_steps,
            unconditional_guidance_scale,
            seed,
            clip_skip,
            diffusion_noise=diffusion_noise,
            verbose=verbose,
            sampler=sampler,
            spacing=spacing,
            first_step=first_step,
            **options,
        )
        paintings = [each for each in paintings for _ in range(total // len(paintings))]
        return np.stack([each.paste(one) for each, one in zip(paintings, images, strict=True)])

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
        preview=None,
        preview_decoder=None,
        **options,
    ):
        """Generates images from encoded text: the steps of `generate_latents`, then the decoder.

        Args:
            encoded_text, negative_prompt, batch_size, num_steps, unconditional_guidance_scale,
            diffusion_noise, seed, **options: see `generate_latents`.
            verbose: 0 for no progress bar.
            callback: function of `(step, timestep, latent, x0)`, called after each step with what
                `generate_latents` yields.
            preview: function of `(step, images)`, called after each step with small images of `x0`,
                uint8 `(batch_size, h, w, 3)`; see `previews`. With `crop` of `inpaint` they are of
                the part that is generated.
            preview_decoder: a model that makes these images instead, as large as the result: a tiny
                one, see `tiny_vae.load_decoder`, or `model.decoder`, which is slow.

        Returns:
            uint8 array `(batch_size, H, W, 3)`.

        Raises:
            ValueError: as `generate_latents`, or `preview` is no function.
        """
        self.check_components("diffusion_model", "decoder")
        num_steps = checks.check_int("num_steps", num_steps, 1, len(self.config.schedule))
        first_step = checks.check_int("first_step", options.get("first_step", 0), 0, num_steps - 1)
        taken = num_steps - first_step
        callback = join_preview(self, callback, preview, preview_decoder)
        if first_step and verbose:
            print(f"{taken} of {num_steps} steps:")
        progress = utils.Progbar(taken, verbose=verbose)
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
            progress.update(step - first_step + 1)
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
        clip_skip=0,
        noise_source="keras",
        prompt_syntax=None,
        guidance_rescale=0.0,
        channels=None,
        **sampler_options,
    ):
        """Generates latents step by step: a generator, which a caller may stop or steer.

            for step, timestep, latent, x0 in model.generate_latents(context):
                preview = model.decode_latents(x0)

        Args:
            encoded_text: `(T, D)`, or `(batch_size, T, D)`, see `encode_text`; or a function that
                returns it, which is called after the arguments were checked.
            negative_prompt: what the images should not show: str, a list of `batch_size`, or
                encoded text.
            batch_size: number of images.
            num_steps: number of steps, 1 to 1000. The UNet runs in each.
            unconditional_guidance_scale: how closely to follow the prompt. At 1 or less the model
                runs without guidance, in half the time. None is the checkpoint's own. A model for
                few steps may see it as an input; then there is no negative prompt.
            diffusion_noise: noise to start from, `(h, w, 4)` or `(batch_size, h, w, 4)`; it
                excludes `seed`. Some samplers start from a little less, see `samplers`.
            seed: int, for KerasCV's noise; or a list of `batch_size`, so that each image is the
                same whatever batch it is in. See also `noise_source`.
            sampler: a key of `samplers.SAMPLERS`, or a generator function like those; "auto" is the
                one that the checkpoint names.
            spacing: how timesteps are spaced: "linspace", "leading", "trailing", "quadratic" or
                "karras"; None is the checkpoint's own.
            guidance_interval: first and last timestep with guidance. Elsewhere the model follows
                the prompt only, in half the time. Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724, gain from leaving it out where noise is strongest.
            deep_cache: how many steps share the UNet's deep features, see `samplers.DeepCache`; 1
                is exact.
            latent: where to start in the middle, `(h, w, 4)` or `(batch_size, h, w, 4)`, as noisy
                as it is before step `first_step`.
            first_step: number of the first step that is taken, from 0.
            clip_skip, prompt_syntax: how `negative_prompt` is encoded, see `encode_text`.
            noise_source: the generator that a seed starts: "keras"; "torch" or "philox", as
                diffusers and the web interface draw. An int seed is seed + i for image i with
                these two. See `noise.make_noise_source`.
            guidance_rescale: how much of the values that guidance makes too large is taken back,
                from 0 to 1; 0.7 suits models without a signal at the last timestep. See
                `guidance.rescale_guidance`.
            channels: what a model for inpainting sees beside the latent: mask and latent of the
                masked image, `(batch_size, h, w, 5)`; or a function that returns it.
            **sampler_options: the sampler's own, such as `eta` of "ddim", see `samplers`.

        Yields:
            `(step, timestep, latent, x0)` after each step: its number from 0, the timestep where it
            began, the latent where it ended, and the clean latent that the model predicted: float32
            arrays `(batch_size, h, w, 4)`. `send(latent)` replaces the latent for the next step.

        Raises:
            ValueError: arguments that exclude each other, or a batch of another size; raised when
                the first step is asked for.
        """
        schedule, scale = self.config.schedule, unconditional_guidance_scale
        checks.check_channels(self.config, channels is not None)
        sampler, levels, scale, next_noise = self._plan(
            batch_size, num_steps, scale, seed, noise_source, sampler, spacing, sampler_options
        )
        from_image = sampler.start is None
        checks.check_start(num_steps, first_step, latent, from_image, diffusion_noise, seed)
        guided_from, guided_to = checks.read_interval(guidance_interval)
        rescale = checks.check_number("guidance_rescale", guidance_rescale, 0, 1)
        deep_cache = checks.check_int("deep_cache", deep_cache)
        self.check_clip_skip(clip_skip)
        check_prompts(self, checks.list_negatives(negative_prompt, batch_size), prompt_syntax)

        encoded_text = encoded_text() if callable(encoded_text) else encoded_text
        context, negative = _repeat("encoded_text", encoded_text, 2, batch_size), None
        if scale > 1 and not self.config.unet.guidance_width:
            negative = "" if negative_prompt is None else negative_prompt
            if np.ndim(negative) < 2:
                negative = self.encode_text(negative, clip_skip, prompt_syntax)
            negative = _repeat("negative_prompt", negative, 2, batch_size)

        if latent is None:
            latent = next_noise() if diffusion_noise is None else diffusion_noise
            latent = sampler.start(latent, levels[0].alpha) if sampler.start else latent
        latent = _repeat("latent or diffusion_noise", latent, 3, batch_size)

        channels = channels() if callable(channels) else channels
        unet = DeepCache(self.diffusion_model, deep_cache)

        def denoise(latent, alpha, timestep=None):
            timestep = schedule.find_timestep(alpha) if timestep is None else timestep
            steered = guided_from <= timestep <= guided_to
            seen = latent if channels is None else np.concatenate([latent, channels], axis=-1)
            guidance = (negative, scale, rescale) if steered else (None, 1.0)
            output = self._predict(unet, seen, timestep, context, *guidance)
            return split_prediction(output, latent, alpha, schedule.prediction_type)

        steps, sent = sampler.sample(denoise, latent, levels[first_step:], next_noise), None
        for step in range(first_step, num_steps):
            unet.step = step
            timestep, latent, x0 = steps.send(sent)
            sent = yield step, timestep, latent, x0

    def _plan(self, batch_size, num_steps, scale, seed, noise_source, sampler, spacing, options):
        """Checks arguments of `generate_latents`; returns sampler, levels, scale, noise source."""
        schedule, batch_size = self.config.schedule, checks.check_int("batch_size", batch_size)
        sampler, spacing = choose_sampler(sampler, spacing, self.config)
        sampler = bind_options(sampler, options, schedule.prediction_type)
        levels = schedule.levels(num_steps, spacing, sampler)
        scale = self.config.guidance_scale if scale is None else scale
        scale = checks.check_number("unconditional_guidance_scale", scale)
        noise = make_noise_source(self.latent_shape, batch_size, seed, noise_source)
        return sampler, levels, scale, noise

    def _predict(self, unet, latent, timestep, context, negative, scale, rescale=0.0):
        """Runs the UNet, with classifier-free guidance: away from the negative prompt.

        Both halves of the guidance go through the model in one pass, the negative prompt first; or
        in two, where their contexts have different lengths. A model that sees the scale needs one
        half only.

        Reference: Ho and Salimans 2022, https://arxiv.org/abs/2207.12598, equation 6.
        """
        if negative is not None and negative.shape[1] == context.shape[1]:
            latent, context = np.concatenate([latent] * 2), np.concatenate([negative, context])
        c, count = self.config.unet, len(latent)
        inputs = [latent, timestep_embedding([timestep] * count, c.widths[0]), context]
        if c.guidance_width:
            inputs.append(embed_guidance(scale, c.guidance_width, count))
        output = np.asarray(unet.predict_on_batch(inputs), "float32")
        if negative is None:
            return output
        if len(output) == len(negative):
            without = self._predict(unet, latent, timestep, negative, None, scale)
        else:
            without, output = np.split(output, 2)
        # (1+w) ε(prompt) - w ε(negative prompt), where scale is 1+w (equation 6)
        guided = without + scale * (output - without)
        return rescale_guidance(guided, output, rescale) if rescale else guided

    def encode_images(self, images):
        """Encodes images as latents: the mean of the posterior, scaled as the UNet knows latents.

        Args:
            images: array of pixels from 0 to 255, `(B, H, W, 3)`.

        Returns:
            float array `(B, h, w, 4)`.
        """
        return self.image_encoder.predict_on_batch(normalize_pixels(images))

    def _encode_later(self, images, batch_size):
        """Returns a function that encodes images and repeats each, `(batch_size, h, w, 4)`."""
        checks.check_entries("image", len(images), batch_size)
        self.check_components("image_encoder")

        def encode():  # one by one, so that a latent does not depend on the batch
            latents = [self.encode_images(each[None]) for each in images]
            return _repeat("image", np.concatenate(latents), 3, batch_size)

        return encode

    def decode_latents(self, latent):
        """Decodes latents `(B, h, w, 4)` to images: uint8 array `(B, H, W, 3)`."""
        return quantize_pixels(decode_in_strips(self.decoder, latent))

    def encode_text(self, prompt, clip_skip=0, prompt_syntax=None):
        """Encodes a prompt, or each of several, as the context for `generate_image`.

        Args:
            prompt: str, or a list of them. Without `prompt_syntax` each has at most 77 tokens,
                start and end included.
            clip_skip: how many of the text encoder's last layers are left out, as some models are
                trained; counted as in diffusers: the web interfaces' number minus 1. As there, and
                unlike diffusers, `negative_prompt` skips them too.
            prompt_syntax: "webui" for the web interface's: weights as in (word:1.3), and prompts of
                any length; see `prompts`. None for text as it is.

        Returns:
            float array `(prompts, 77, D)`; `(prompts, 77 n, D)` of n chunks with "webui".

        Raises:
            ValueError: no prompt, one that is too long or has syntax that is not supported, or not
                so many layers.
        """
        self.check_clip_skip(clip_skip)
        prompts = checks.list_prompts(prompt)
        if prompt_syntax is not None:
            return encode_prompts(self, prompts, prompt_syntax, clip_skip)
        tokens = np.array([self.tokenize(text) for text in prompts], "int32")
        positions = np.tile(np.arange(MAX_PROMPT_LENGTH, dtype="int32"), (len(tokens), 1))
        encoder = skip_layers(self.text_encoder, clip_skip)
        return encoder.predict_on_batch({"tokens": tokens, "positions": positions})

    def check_clip_skip(self, count):
        """Returns as an int how many of the text encoder's layers are left out.

        Raises:
            ValueError: there are not so many layers.
        """
        return check_skip(self._text_encoder or self.config.text, count)

    def tokenize(self, prompt):
        """Returns the ids of a prompt's tokens, padded to 77: a list of ints.

        Raises:
            ValueError: the prompt is too long.
        """
        limit, tokenizer = MAX_PROMPT_LENGTH, self.tokenizer
        # Counting the tokens of a whole book takes long. Other classes have no `count_least`.
        least = tokenizer.count_least(prompt) if isinstance(tokenizer, SimpleTokenizer) else 0
        ids = tokenizer.encode(prompt) if least <= 10 * limit else []
        if (count := max(least, len(ids))) > limit:
            shown = repr(prompt[:200]) + "..." * (len(prompt) > 200)
            raise ValueError(f"A prompt has at most {limit} tokens, not {count}: {shown}")
        pad = self.config.text.pad_token
        return ids + [self.tokenizer.end_of_text if pad is None else pad] * (limit - len(ids))

    def _get_timestep_embedding(self, timestep, batch_size, dim=320, max_period=10000):
        return ops.convert_to_tensor(timestep_embedding([timestep] * batch_size, dim, max_period))


class StableDiffusionV2(StableDiffusion):
    """Stable Diffusion 2: as `StableDiffusion`, with another text encoder and UNet.

    A drop-in for `keras_cv.models.StableDiffusionV2`; `weights="kerascv"` is "sd2.1-base", the
    512-pixel model that predicts noise.
    """

    version, TextEncoder, DiffusionModel = 2, TextEncoderV2, DiffusionModelV2


def _repeat(name, x, rank, batch_size):
    """Returns `x` as float32 with `batch_size` entries of `rank` dimensions, repeating each."""
    x = np.asarray(ops.convert_to_numpy(x), "float32").reshape(-1, *np.shape(x)[-rank:])
    checks.check_entries(name, len(x), batch_size)
    return np.repeat(x, batch_size // len(x), axis=0)
