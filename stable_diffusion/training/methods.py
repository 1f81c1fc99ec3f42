"""Methods of fine-tuning: which parameters learn, and how the result is saved.

A method uses the models of a pipeline. It decides which of their parameters learn, and wraps the
models as one Keras model for `NoisyLatents`: `method.model`. After `method.update_pipeline()` the
pipeline generates images with the present parameters.

    method              trains                                       writes
    Full                the UNet, or only its cross-attention        a checkpoint
    LoRA                small matrices beside kernels of the UNet    a file for `load_lora`
    TextualInversion    vectors of a new word                        a file for `load_embedding`

DreamBooth is `Full` or `LoRA` with a second `Stream`: images of the class.
"""

import re
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from stable_diffusion.adapters.embedding import add_token, save_embedding
from stable_diffusion.adapters.lora import name_kernels, save_lora
from stable_diffusion.checkpoints.kerascv import load_h5
from stable_diffusion.checkpoints.tensors import cast_stored, check_dtype
from stable_diffusion.checks import check_int
from stable_diffusion.config import UNetConfig
from stable_diffusion.training.data import NoisyLatents, StepLoss, denoising_loss
from stable_diffusion.training.distribution import check_backend
from stable_diffusion.training.optimizers import check_precision

PARAMETERS = {  # of `Full`: patterns of the paths of variables that learn
    "all": r".*",
    # Custom Diffusion (Kumari et al. 2022) trains only to_k and to_v of these.
    "cross-attention": r".*/attn2/.*",
}
NONE = r"(?!)"  # a pattern that matches no path
TARGETS = {  # of `LoRA`: patterns of the paths of kernels that get adapters
    "cross-attention": r".*/attn2/to_(q|k|v|out)/kernel",
    "attention": r".*/attn[12]/to_(q|k|v|out)/kernel",
    "transformers": r".*_attn_\d+/.*/kernel",
    "all": r".*/kernel",
}


def remat_scope(config: UNetConfig) -> keras.RematScope:
    """Returns a scope. Training a UNet that is built in it needs less memory, but more time.

    Of each residual block and each transformer only the inputs are kept for the backward pass. The
    backward pass computes everything else again (rematerialization). `RematScope("full")` does not
    fit: it also wraps every layer inside a block, and would compute it several times.

    Args:
        config: the `UNetConfig` of the UNet.

    Example:
        ```python
        with remat_scope(pipeline.config.unet):
            pipeline.diffusion_model  # the first access builds it
        ```
    """
    stages, blocks = range(len(config.widths)), range(config.res_blocks + 1)
    names = [f"{way}_{i}" for way in ("down", "up") for i in stages] + ["mid"]
    names = [f"{name}_{kind}" for name in names for kind in ("res", "attn")]
    return keras.RematScope(
        "list_of_layers", layer_names=[f"{name}_{j}" for name in names for j in blocks]
    )


class Denoiser(keras.Model):
    """The model that is trained: a functional model from a batch's inputs to the prediction."""

    def fit(self, x=None, *args, callbacks=None, **kwargs):
        """Trains like `keras.Model.fit`, and tells a `NoisyLatents` the number of each epoch.

        `keras.utils.PyDataset` has methods for this, but Keras also calls them when it only
        inspects the first batch.
        """
        check_backend()
        if isinstance(x, NoisyLatents):
            tell = keras.callbacks.LambdaCallback(on_epoch_begin=lambda n, _: x.set_epoch(n))
            callbacks = [tell, *(callbacks or [])]
        return super().fit(x, *args, callbacks=callbacks, **kwargs)

    def load_weights(self, filepath, **kwargs):
        """Loads like `keras.Model.load_weights`: all parameters, or none.

        Raises:
            ValueError: the file is damaged or of another model. The message says whether the model
                is unchanged or not usable.
        """
        load_h5(self, filepath, super().load_weights, **kwargs)


def check_trainable(config):
    """Raises a ValueError if a model cannot be trained.

    Its input is more than a latent, or it predicts noise where the schedule leaves no signal.
    """
    if config.unet.guidance_width:
        raise ValueError(
            "A model that sees the guidance scale, for few steps, can't be trained: its loss would "
            "need the model that it was distilled from."
        )
    seen, channels = config.unet.in_channels, config.vae.latent_channels
    if seen != channels:
        raise ValueError(
            f"Only models whose input is a latent of {channels} channels can be trained. This one "
            f"has {seen}, like those for inpainting."
        )
    config.schedule.levels(1, "trailing")  # the last timestep, without a signal if any is


class Method:
    """The base class of all methods.

    Args:
        pipeline: the `StableDiffusion` to train.

    Attributes:
        model: the `Denoiser`.
        tokenize: the argument of that name for `NoisyLatents`.

    Raises:
        ValueError: the UNet has other inputs than a noisy latent, or the backend or TensorFlow's
            strategy can't train.
    """

    tokenize = None

    def __init__(self, pipeline):
        check_backend()
        check_trainable(pipeline.config)
        self.pipeline = pipeline

    def compile(self, optimizer, **options) -> Denoiser:
        """Compiles the model with `denoising_loss`, and returns it.

        Args:
            optimizer: a Keras optimizer.
            **options: passed to `keras.Model.compile`.

        Raises:
            ValueError: see `optimizers.check_precision`.
        """
        optimizer = keras.optimizers.get(optimizer)
        check_precision(optimizer, (v.dtype for v in self.model.trainable_variables))
        # Keras wraps it in a LossScaleOptimizer for mixed_float16. If that one built it, Nadam's
        # product would not be among its variables, and would be missing in the state of a run.
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        self.model.compile(optimizer, loss=denoising_loss, weighted_metrics=[StepLoss()], **options)
        return self.model

    def update_pipeline(self):
        """Copies the learned parameters to the pipeline, so that it generates images with them."""

    def _wrap_unet(self):
        """Returns the `Denoiser` that consists only of the UNet."""
        unet = self.pipeline.diffusion_model
        # Without input tensors of its own, the model would get the UNet's and their names.
        inputs = {
            tensor.name: keras.Input(tensor.shape[1:], name=tensor.name) for tensor in unet.inputs
        }
        return Denoiser(inputs, unet(list(inputs.values())), name="denoiser")


class Full(Method):
    """Trains the UNet's own parameters.

    Args:
        pipeline: the `StableDiffusion`.
        parameters: a key of `PARAMETERS`.

    Raises:
        ValueError: the key is unknown.
    """

    def __init__(self, pipeline, parameters: str = "all"):
        super().__init__(pipeline)
        if parameters not in PARAMETERS:
            raise ValueError(
                f"parameters must be one of {_format_names(PARAMETERS)}, not {parameters!r}."
            )
        freeze_variables(pipeline.diffusion_model, PARAMETERS[parameters])
        self.model = self._wrap_unet()

    def save(self, path: str | Path, dtype: str | None = None):
        """Writes the whole pipeline as a folder in diffusers' layout.

        Args:
            path: path of the folder.
            dtype: see `checkpoints.save_checkpoint`.
        """
        self.pipeline.save(path, dtype=dtype)


class LoRA(Method):
    """Trains small matrices beside kernels of the UNet, with Keras' own `enable_lora`.

    A kernel W is replaced by W + alpha / rank * A B. At first A is random and B is zero, so the
    first step starts with an unchanged model. Files of Keras (`save_weights`, `ModelCheckpoint`,
    `BackupAndRestore`) have the adapters, too.

    Args:
        pipeline: the `StableDiffusion`.
        rank: number of columns of A and of rows of B.
        alpha: a factor; None is the rank.
        targets: a key of `TARGETS`.

    Raises:
        ValueError: the key is unknown, the rank is below 1, alpha is not above 0, or the UNet has
            adapters already.

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """

    def __init__(self, pipeline, rank: int = 4, alpha: float | None = None, targets="attention"):
        super().__init__(pipeline)
        if targets not in TARGETS:
            raise ValueError(f"targets must be one of {_format_names(TARGETS)}, not {targets!r}.")
        rank = check_int("rank", rank)
        alpha = rank if alpha is None else alpha
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha!r}.")
        unet = pipeline.diffusion_model
        found = [layer for layer in unet._flatten_layers() if hasattr(layer, "enable_lora")]
        if any(layer.lora_enabled for layer in found):
            raise ValueError("The UNet has adapters already; make a new pipeline.")
        names = name_kernels(unet)
        freeze_variables(unet, NONE)
        unet.predict_function = None  # a function that was traced before lacks the adapters
        self.rank, self.alpha, self.adapters = rank, alpha, {}
        for layer in found:
            path = layer.kernel.path
            if re.fullmatch(TARGETS[targets], path):
                layer.enable_lora(rank, lora_alpha=alpha)
                _keep_adapters(layer)
                self.adapters[names[path]] = layer
        self.model = self._wrap_unet()

    def save(self, path: str | Path, keys: str = "kohya", dtype: str = "float32"):
        """Writes only the adapters, as a .safetensors file.

        Args:
            path: path of the file.
            keys, dtype: see `adapters.lora.save_lora`.

        Raises:
            ValueError: see `adapters.lora.save_lora`. Or every A and B is zero.
        """
        halves = {
            name: tuple(
                ops.convert_to_numpy(kernel.value)
                for kernel in (layer.lora_kernel_a, layer.lora_kernel_b)
            )
            for name, layer in self.adapters.items()
        }
        if not any(np.any(half) for pair in halves.values() for half in pair):
            raise ValueError(
                "All adapters are zero, A and B, which no training does. Keras does it where it "
                "adds them to the kernels. Nothing was written."
            )
        save_lora(path, halves, self.alpha, keys, dtype)


class TextualInversion(Method):
    """Trains the vectors of a new word. All other parameters stay unchanged, bit for bit.

    The pipeline's tokenizer and text encoder get the word at once, see `load_embedding`.

    Args:
        pipeline: the `StableDiffusion`.
        token: how prompts and captions write the word, such as "<cat-toy>".
        initializer: a known word. Its vectors are the first values; if it has fewer vectors than
            the new word, they are used again in the same order.
        vectors: number of vectors.
        clip_skip: how captions are encoded, see `StableDiffusion.encode_text`.

    Raises:
        ValueError: the token exists already, the initializer contains no word, the number of
            vectors is below 1, or the text encoder has not so many layers.

    Reference: Gal et al. 2022, https://arxiv.org/abs/2208.01618, section 3.
    """

    def __init__(
        self, pipeline, token: str, initializer: str, vectors: int = 1, clip_skip: int = 0
    ):
        super().__init__(pipeline)
        vectors = check_int("vectors", vectors)
        self.clip_skip = pipeline.check_clip_skip(clip_skip)
        pieces = pipeline.tokenizer.encode(initializer)[1:-1]
        if not pieces:
            raise ValueError(f"initializer must contain a word, not {initializer!r}.")
        table = ops.convert_to_numpy(ops.cast(pipeline.text_encoder.weights[0], "float32"))
        first = table[[pieces[n % len(pieces)] for n in range(vectors)]]
        self.token, self.ids = token, add_token(pipeline, token, first)
        self.model = self._wrap_models(first)

    def _wrap_models(self, first):
        """Returns the `Denoiser` that consists of text encoder, table of vectors and UNet.

        Args:
            first: the first values of the vectors, float32 `(n, D)`.
        """
        encoder, unet = self.pipeline.text_encoder, self.pipeline.diffusion_model
        freeze_variables(encoder, NONE)
        freeze_variables(unet, NONE)
        shapes = {tensor.name: tensor.shape[1:] for tensor in unet.inputs[:2]}
        inputs = {name: keras.Input(shape, name=name) for name, shape in shapes.items()}
        texts = {
            tensor.name: keras.Input(tensor.shape[1:], dtype="int32", name=tensor.name)
            for tensor in encoder.inputs
        }
        embedding, *rest, norm = encoder.layers[len(encoder.inputs) :]
        self.learned = LearnedTokens(embedding, self.ids[0], len(first), name="learned_tokens")
        x = self.learned(list(texts.values()))
        self.learned.vectors.assign(first)
        for layer in [*rest[: len(rest) - self.clip_skip], norm]:
            x = layer(x)
        return Denoiser(inputs | texts, unet([*inputs.values(), x]), name="denoiser")

    def tokenize(self, text: str) -> np.ndarray:
        """Returns the ids of a caption's tokens, int32 `(77,)`.

        Raises:
            ValueError: the caption is too long.
        """
        return np.array(self.pipeline.tokenize(text), "int32")

    def update_pipeline(self):
        """See `Method.update_pipeline`."""
        table = self.pipeline.text_encoder.weights[0]
        rows = ops.cast(self.learned.vectors.value, table.dtype)
        table.assign(ops.slice_update(table.value, (self.ids[0], 0), rows))

    def save(self, path: str | Path, dtype: str = "float32"):
        """Writes only the vectors, as a .safetensors file, which diffusers reads, too.

        Args:
            path: path of the file.
            dtype: "float32", "float16" or "bfloat16".

        Raises:
            ValueError: the dtype is unknown, or it cannot hold a value. Nothing is written then.
        """
        check_dtype(dtype)
        vectors = ops.convert_to_numpy(self.learned.vectors.value)
        save_embedding(path, self.token, cast_stored(self.token, vectors, dtype))


class LearnedTokens(layers.Layer):
    """A `CLIPEmbedding` with an additional table for some tokens. Only this table is trained.

    Args:
        embedding: the `CLIPEmbedding`. It stays unchanged.
        first: id of the first of these tokens.
        count: number of these tokens. Their ids follow one another.

    Inputs are `[tokens, positions]`, both ints `(B, T)`. The output is `(B, T, D)`.
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
        place = tokens - self.first  # row in the table, if it is from 0 to count - 1
        mine = ops.logical_and(place >= 0, place < self.count)
        learned = ops.take(self.vectors, ops.clip(place, 0, self.count - 1), axis=0)
        others = self.embedding.token_embedding(tokens)
        x = ops.where(mine[..., None], ops.cast(learned, others.dtype), others)
        return x + self.embedding.position_embedding(positions)


METHODS = {  # name of each method, as the command calls it
    "full": Full,
    "lora": LoRA,
    "textual-inversion": TextualInversion,
}


def _keep_adapters(layer):
    """Makes Keras save the adapters of a layer beside its kernel, and load both.

    By itself, Keras saves their sum as the kernel, and makes A and B zero when it loads a file.
    Then their gradients are zero for ever.
    """

    def save_own_variables(store):
        for number, variable in enumerate(layer.variables):
            store[str(number)] = variable

    def load_own_variables(store):
        if len(store.keys()) != len(layer.variables):
            raise ValueError(
                f"The file has {len(store.keys())} arrays for {layer.path}, not the "
                f"{len(layer.variables)} of a layer with LoRA's adapters."
            )
        for number, variable in enumerate(layer.variables):
            variable.assign(store[str(number)])

    layer.save_own_variables, layer.load_own_variables = save_own_variables, load_own_variables


def freeze_variables(model: keras.Model, trained: str):
    """Freezes all variables of a model, except those whose path matches a pattern."""
    for variable in model.weights:
        variable.trainable = bool(re.fullmatch(trained, variable.path))


def _format_names(names):
    return ", ".join(map(repr, names))
