"""What is trained, and how it is saved.

Each method takes the pipeline's own models, decides which of their parameters learn, and wraps them
as one Keras model for `NoisyLatents`: `method.model`. The pipeline draws with what was learned so
far at any time, after `method.show()`.

    Full                the UNet, or its cross-attention alone       a checkpoint, as `save` writes
    LoRA                small matrices beside kernels of the UNet    a file that `load_lora` reads
    TextualInversion    vectors of a new word                        a file for `load_embedding`

DreamBooth is `Full` or `LoRA` with a second `Stream` of pictures of the class.
"""

import re
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from stable_diffusion.adapters.embedding import add_token, save_embedding
from stable_diffusion.adapters.lora import name_kernels, save_lora
from stable_diffusion.config import UNetConfig
from stable_diffusion.training.data import NoisyLatents, StepLoss, denoising_loss

PARAMETERS = {  # of `Full`: patterns of variables' paths
    "all": r".*",
    # "to_k and to_v" alone would be Custom Diffusion's, Kumari et al. 2022.
    "cross-attention": r".*/attn2/.*",
}
TARGETS = {  # of `LoRA`: patterns of kernels' paths
    "cross-attention": r".*/attn2/to_(q|k|v|out)/kernel",
    "attention": r".*/attn[12]/to_(q|k|v|out)/kernel",
    "transformers": r".*_attn_\d+/.*/kernel",
    "all": r".*/kernel",
}


def remat_scope(config: UNetConfig) -> keras.RematScope:
    """Returns the scope in which a UNet is built to save memory and take more time.

    Of each residual block and each transformer only inputs are kept for the backward pass, where
    the rest is computed again. The whole of a block is, which is why `RematScope("full")` doesn't
    serve: it would do it again for each layer within a block within a model.

    Args:
        config: of the UNet.

    Example:
        ```python
        with remat_scope(pipeline.config.unet):
            pipeline.diffusion_model  # is built when it is first asked for
        ```
    """
    levels, blocks = range(len(config.widths)), range(config.res_blocks + 1)
    names = [f"{way}_{i}" for way in ("down", "up") for i in levels] + ["mid"]
    names = [f"{name}_{kind}" for name in names for kind in ("res", "attn")]
    return keras.RematScope(
        "list_of_layers", layer_names=[f"{name}_{j}" for name in names for j in blocks]
    )


class Denoiser(keras.Model):
    """The model that is trained: a functional model from a batch's inputs to the prediction."""

    def fit(self, x=None, *args, callbacks=None, **kwargs):
        """Trains as `keras.Model.fit`, and tells a `NoisyLatents` which epoch it is.

        `keras.utils.PyDataset` has methods for that, but Keras also calls them when it only looks
        at the first batch.
        """
        if isinstance(x, NoisyLatents):
            tell = keras.callbacks.LambdaCallback(on_epoch_begin=lambda n, _: x.set_epoch(n))
            callbacks = [tell, *(callbacks or [])]
        return super().fit(x, *args, callbacks=callbacks, **kwargs)


class Method:
    """What the methods have in common.

    Args:
        pipeline: the `StableDiffusion` that is trained.

    Attributes:
        model: the `Denoiser`.
        tokenize: for `NoisyLatents`.

    Raises:
        ValueError: the pipeline's UNet takes other inputs than a noisy latent.
    """

    tokenize = None

    def __init__(self, pipeline):
        unet = pipeline.config.unet
        if unet.in_channels != pipeline.config.vae.latent_channels:
            raise ValueError(
                f"Models that take more than a latent can't be trained: this one has "
                f"{unet.in_channels} channels of input, as those for inpainting."
            )
        self.pipeline = pipeline

    def compile(self, optimizer, **options) -> Denoiser:
        """Compiles the model with the loss of denoising, and returns it.

        Args:
            optimizer: a Keras optimizer.
            **options: passed to `keras.Model.compile`.
        """
        self.model.compile(optimizer, loss=denoising_loss, weighted_metrics=[StepLoss()], **options)
        return self.model

    def show(self):
        """Brings the pipeline to what was learned so far, so that it can draw."""

    def _wrap(self):
        """Returns the model of the UNet alone."""
        unet = self.pipeline.diffusion_model
        # Without own input tensors Keras would take the UNet's, and the name of its first layer.
        inputs = {
            tensor.name: keras.Input(tensor.shape[1:], name=tensor.name) for tensor in unet.inputs
        }
        return Denoiser(inputs, unet(list(inputs.values())), name="denoiser")


class Full(Method):
    """Trains the UNet's own parameters.

    Args:
        pipeline: the `StableDiffusion`.
        parameters: key of `PARAMETERS`.

    Raises:
        ValueError: an unknown key.
    """

    def __init__(self, pipeline, parameters: str = "all"):
        super().__init__(pipeline)
        if parameters not in PARAMETERS:
            raise ValueError(f"parameters must be one of {_list(PARAMETERS)}, not {parameters!r}.")
        freeze(pipeline.diffusion_model, PARAMETERS[parameters])
        self.model = self._wrap()

    def save(self, path: str | Path, dtype: str | None = None):
        """Writes the whole pipeline as a diffusers folder, see `checkpoints.save`."""
        self.pipeline.save(path, dtype=dtype)


class LoRA(Method):
    """Trains small matrices beside the UNet's kernels, with Keras' own `enable_lora`.

    A kernel W gets W + alpha / rank * A B. A is random and B zero at first, so that the model is
    the same before the first step.

    Args:
        pipeline: the `StableDiffusion`.
        rank: columns of A and rows of B.
        alpha: a factor; None is the rank.
        targets: key of `TARGETS`.

    Raises:
        ValueError: an unknown key, a rank below 1, or a UNet that has adapters already.

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """

    def __init__(self, pipeline, rank: int = 4, alpha: float | None = None, targets="attention"):
        super().__init__(pipeline)
        if targets not in TARGETS:
            raise ValueError(f"targets must be one of {_list(TARGETS)}, not {targets!r}.")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an int from 1, not {rank!r}.")
        alpha = rank if alpha is None else alpha
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha!r}.")
        unet = pipeline.diffusion_model
        found = [layer for layer in unet._flatten_layers() if hasattr(layer, "enable_lora")]
        if any(layer.lora_enabled for layer in found):
            raise ValueError("The UNet has adapters already; take a new pipeline.")
        names = name_kernels(unet)
        freeze(unet, r"(?!)")
        unet.predict_function = None  # one that was traced before wouldn't know the adapters
        self.rank, self.alpha, self.adapters = rank, alpha, {}
        for layer in found:
            path = layer.kernel.path
            if re.fullmatch(TARGETS[targets], path):
                layer.enable_lora(rank, lora_alpha=alpha)
                self.adapters[names[path]] = layer
        self.model = self._wrap()

    def save(self, path: str | Path, keys: str = "kohya", dtype: str = "float32"):
        """Writes the adapters alone, as a .safetensors file.

        Args:
            path: path of the file.
            keys: how tensors are called: "kohya" (which diffusers reads, too) or "diffusers"
                (peft's names after "unet."; alpha is in the metadata).
            dtype: "float32", "float16" or "bfloat16".

        Raises:
            ValueError: unknown keys.
        """
        halves = {
            name: tuple(
                ops.convert_to_numpy(kernel.value)
                for kernel in (layer.lora_kernel_a, layer.lora_kernel_b)
            )
            for name, layer in self.adapters.items()
        }
        save_lora(path, halves, self.alpha, keys, dtype)


class TextualInversion(Method):
    """Trains the vectors of a new word; every other parameter stays as it is, bit for bit.

    The pipeline's tokenizer and text encoder get the word at once, see `load_embedding`.

    Args:
        pipeline: the `StableDiffusion`.
        token: how the word is written in prompts and captions, such as "<cat-toy>".
        initializer: a word to start from. Vectors take its pieces in turn.
        vectors: how many.

    Raises:
        ValueError: a token that there is already, an initializer without a word, or no vectors.

    Reference: Gal et al. 2022, https://arxiv.org/abs/2208.01618, section 3.
    """

    def __init__(self, pipeline, token: str, initializer: str, vectors: int = 1):
        super().__init__(pipeline)
        if not isinstance(vectors, int) or vectors < 1:
            raise ValueError(f"vectors must be an int from 1, not {vectors!r}.")
        pieces = pipeline.tokenizer.encode(initializer)[1:-1]
        if not pieces:
            raise ValueError(f"initializer must have a word, not {initializer!r}.")
        table = ops.convert_to_numpy(ops.cast(pipeline.text_encoder.weights[0], "float32"))
        first = table[[pieces[n % len(pieces)] for n in range(vectors)]]
        self.token, self.ids = token, add_token(pipeline, token, first)
        self.model = self._wrap_both(first)

    def _wrap_both(self, first):
        """Returns the model of text encoder and UNet, with a table of vectors of its own."""
        encoder, unet = self.pipeline.text_encoder, self.pipeline.diffusion_model
        freeze(encoder, r"(?!)")
        freeze(unet, r"(?!)")
        shapes = {tensor.name: tensor.shape[1:] for tensor in unet.inputs[:2]}
        inputs = {name: keras.Input(shape, name=name) for name, shape in shapes.items()}
        texts = {
            tensor.name: keras.Input(tensor.shape[1:], dtype="int32", name=tensor.name)
            for tensor in encoder.inputs
        }
        embedding, *rest = encoder.layers[len(encoder.inputs) :]
        self.learned = LearnedTokens(embedding, self.ids[0], len(first), name="learned_tokens")
        x = self.learned(list(texts.values()))
        self.learned.vectors.assign(first)
        for layer in rest:
            x = layer(x)
        return Denoiser(inputs | texts, unet([*inputs.values(), x]), name="denoiser")

    def tokenize(self, text: str) -> np.ndarray:
        """Returns the ids of a caption, int32 `(77,)`.

        Raises:
            ValueError: it is too long.
        """
        return np.array(self.pipeline.tokenize(text), "int32")

    def show(self):
        """See `Method.show`."""
        table = self.pipeline.text_encoder.weights[0]
        rows = ops.cast(self.learned.vectors.value, table.dtype)
        table.assign(ops.slice_update(table.value, (self.ids[0], 0), rows))

    def save(self, path: str | Path, dtype: str = "float32"):
        """Writes the vectors alone, as a .safetensors file that diffusers reads, too.

        Args:
            path: path of the file.
            dtype: "float32", "float16" or "bfloat16".
        """
        vectors = ops.convert_to_numpy(self.learned.vectors.value).astype(dtype)
        save_embedding(path, self.token, vectors)


class LearnedTokens(layers.Layer):
    """A `CLIPEmbedding` of which some tokens are in a table of their own, which is trained.

    Args:
        embedding: the `CLIPEmbedding`, which stays as it is.
        first: id of the first of the tokens.
        count: how many there are.

    Called on `[tokens, positions]`, ints `(B, T)` each; returns `(B, T, D)`.
    """

    def __init__(self, embedding, first, count, **kwargs):
        super().__init__(**kwargs)
        self.embedding, self.first, self.count = embedding, first, count

    def build(self, input_shape):
        width = self.embedding.token_embedding.output_dim
        self.vectors = self.add_weight((self.count, width), name="vectors", dtype="float32")

    def compute_output_spec(self, inputs):
        width = self.embedding.token_embedding.output_dim
        return keras.KerasTensor((*inputs[0].shape, width), self.compute_dtype)

    def call(self, inputs):
        tokens, positions = inputs
        place = tokens - self.first  # in the table, where it is from 0 to count - 1
        mine = ops.logical_and(place >= 0, place < self.count)
        learned = ops.take(self.vectors, ops.clip(place, 0, self.count - 1), axis=0)
        others = self.embedding.token_embedding(tokens)
        x = ops.where(mine[..., None], ops.cast(learned, others.dtype), others)
        return x + self.embedding.position_embedding(positions)


def freeze(model: keras.Model, trained: str):
    """Lets those of a model's variables learn whose path matches a pattern, and no others."""
    for variable in model.weights:
        variable.trainable = bool(re.fullmatch(trained, variable.path))


def _list(names):
    return ", ".join(map(repr, names))
