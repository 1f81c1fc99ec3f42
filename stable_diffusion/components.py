"""The components of a pipeline: built when first asked for, replaced, changed and saved."""

from functools import partial

from stable_diffusion.adapters.embedding import load_embedding
from stable_diffusion.adapters.lora import load_lora, unload_lora
from stable_diffusion.checkpoints import open_checkpoint, save_checkpoint
from stable_diffusion.checkpoints.changes import Changes
from stable_diffusion.config import TinyVAEConfig
from stable_diffusion.decoder import Decoder
from stable_diffusion.image_encoder import ImageEncoder
from stable_diffusion.tiny_vae import TinyDecoder, TinyEncoder

MAX_PROMPT_LENGTH = 77  # tokens, CLIP's context length


class Components:
    """What `StableDiffusion`, which says more, is made of: a checkpoint and the models of it.

    A subclass says which version of Stable Diffusion it is, and has the classes of two models.

    Attributes:
        checkpoint: where parameters come from, see `checkpoints.open_checkpoint`.
        config: the `Config`.
        changes: the `Changes` that adapters made.
        img_height, img_width: size of the images in pixels.
    """

    version = TextEncoder = DiffusionModel = None
    _text_encoder = _diffusion_model = _decoder = _image_encoder = _tokenizer = None

    def __init__(
        self,
        img_height=None,
        img_width=None,
        jit_compile=True,
        weights="kerascv",
        config=None,
        variant=None,
        vae=None,
    ):
        self.jit_compile = jit_compile
        self.checkpoint = open_checkpoint(weights, config, self.version, variant=variant, vae=vae)
        self.changes = Changes()
        self.config = self.checkpoint.config
        self.img_height, self.img_width = self.config.resolve_size(img_height, img_width)

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
            make = partial(self.DiffusionModel, self.img_height, self.img_width, None)
            self._diffusion_model = self._build("diffusion_model", make)
        return self._diffusion_model

    @property
    def decoder(self):
        """The `Decoder`, or a `TinyDecoder`, which turns latents into images."""
        if self._decoder is None:
            kind = TinyDecoder if isinstance(self.config.vae, TinyVAEConfig) else Decoder
            make = partial(kind, self.img_height, self.img_width)
            self._decoder = self._build("decoder", make)
        return self._decoder

    @property
    def image_encoder(self):
        """The `ImageEncoder`, or a `TinyEncoder`, which turns images into latents."""
        if self._image_encoder is None:
            kind = TinyEncoder if isinstance(self.config.vae, TinyVAEConfig) else ImageEncoder
            self._image_encoder = self._build("image_encoder", kind)
        return self._image_encoder

    @property
    def tokenizer(self):
        """The `SimpleTokenizer`, which turns a prompt into tokens."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    @property
    def latent_shape(self):
        """Shape of one image's latent, `(h, w, C)`."""
        c = self.config.vae
        return self.img_height // c.cell_size, self.img_width // c.cell_size, c.latent_channels

    def check_components(self, *components):
        """Raises a ValueError if the checkpoint lacks one that is needed and not there yet."""
        for component in components:
            if getattr(self, f"_{component}") is None:
                self.checkpoint.check(component)

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
            path: path of a .safetensors, .pt or .bin file with the names of one of its `KINDS`, or
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
            path: path of a file of one or several vectors: safetensors, or PyTorch's (.pt, .bin).
            token: how it is written in prompts; None is the name in the file.

        Raises:
            ValueError: a file that doesn't fit, or a token that exists; nothing is changed then.
        """
        load_embedding(self, path, token)
