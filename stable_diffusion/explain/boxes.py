"""The parts of the computation: what each does, its shapes, and where it is written."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import keras

from stable_diffusion import stable_diffusion as pipeline
from stable_diffusion.attention_block import AttentionBlock
from stable_diffusion.clip_tokenizer import SimpleTokenizer
from stable_diffusion.decoder import Decoder
from stable_diffusion.diffusion_model import SpatialTransformer, _unet
from stable_diffusion.images import quantize_pixels
from stable_diffusion.noise import make_noise_source
from stable_diffusion.noise_scheduler import NoiseScheduler, split_prediction, timestep_embedding
from stable_diffusion.padded_conv2d import PaddedConv2D
from stable_diffusion.resnet_block import ResnetBlock
from stable_diffusion.text_encoder import CLIPEmbedding, CLIPEncoderLayer, TextEncoder

PACKAGE = Path(pipeline.__file__).parent
SENTENCES = {  # what a layer of each class does
    CLIPEmbedding: "Looks up a vector for each token and one for its place, and adds them.",
    CLIPEncoderLayer: "Lets each token look at those before it, and computes on.",
    ResnetBlock: "Two convolutions beside a residual connection; in the UNet it sees the timestep.",
    SpatialTransformer: "Lets each cell look at all others, then at the prompt.",
    AttentionBlock: "Lets each cell look at all others.",
    PaddedConv2D: "A convolution: each cell is computed from its neighbourhood.",
    keras.layers.UpSampling2D: "Repeats each cell, so that the size doubles.",
    keras.Sequential: "Repeats each cell, so that the size doubles, and convolves.",
    keras.layers.Concatenate: "Puts a feature map of the way down beside the present one.",
    keras.layers.GroupNormalization: "Shifts and scales groups of channels to mean 0, variance 1.",
    keras.layers.LayerNormalization: "Shifts and scales each token to mean 0 and variance 1.",
    keras.layers.Dense: "A linear layer.",
    keras.layers.Activation: "A nonlinear function of each value.",
    keras.layers.Rescaling: "Multiplies by a number, so that values have the size that is wanted.",
}


@dataclass(frozen=True)
class Box:
    """A part of the computation.

    Attributes:
        name: what it is called in the source: "text_encoder", "down_0_res_0", "ddim".
        part: what it belongs to: "tokenizer", "text_encoder", "noise_scheduler", "sampler",
            "diffusion_model", "guidance" or "decoder".
        text: what it does, in a sentence.
        takes, gives: shapes of what goes in and what comes out, without the batch: "(16, 16, 8)",
            "(77, 128)". Several are joined by " + ".
        source: where it is written: "stable_diffusion/decoder.py:45".
    """

    name: str
    part: str
    text: str
    takes: str
    gives: str
    source: str


def find_source(thing):
    """Returns where a function, method or class is written: "stable_diffusion/decoder.py:14".

    Raises:
        ValueError: it is not written in this package.
    """
    thing = getattr(thing, "func", thing)  # of a partial
    try:
        path, (_, line) = Path(inspect.getsourcefile(thing)), inspect.getsourcelines(thing)
        return f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}:{line}"
    except (TypeError, OSError, ValueError) as error:
        raise ValueError(f"{thing!r:.200} has no source in this package.") from error


def list_boxes(model, sampler, context_shape):
    """Returns the boxes that a prompt goes through, in the order in which they run.

    Args:
        model: the `StableDiffusion`.
        sampler: the sampler's function.
        context_shape: `(T, D)`.

    Returns:
        List of `Box`.
    """
    c, latent = model.config, str(model.latent_shape)
    context, image = str(context_shape), f"({model.img_height}, {model.img_width}, 3)"
    tokens, time = f"({context_shape[0]})", f"({c.unet.widths[0]})"
    encode, levels = SimpleTokenizer.encode, NoiseScheduler.levels
    both = f"{latent} + {time} + {context}"
    try:
        sampler_source = find_source(sampler)
    except ValueError:  # a function of the user's
        sampler_source = find_source(pipeline.StableDiffusion.generate_latents)
    fixed = {
        "encode": ("tokenizer", "Splits the prompt into tokens.", "text", tokens, encode),
        "levels": ("noise_scheduler", "Lists the noise levels.", "-", "(steps + 1)", levels),
        "make_noise_source": (
            "noise_scheduler", "Draws the noise from the seed.", "seed", latent, make_noise_source
        ),
        "timestep_embedding": (
            "noise_scheduler", "Writes the timestep as cosines.", "(1)", time, timestep_embedding
        ),
        "guidance": (
            "guidance", "Goes further than the prompt asks, away from the negative prompt.",
            f"{latent} + {latent}", latent, pipeline.StableDiffusion._predict,
        ),
        "split_prediction": (
            "sampler", "Splits the noisy latent into a clean one and noise.",
            f"{latent} + {latent}", f"{latent} + {latent}", split_prediction,
        ),
        "quantize_pixels": ("decoder", "Rounds to levels of 255.", image, image, quantize_pixels),
    }  # fmt: skip
    made = {name: Box(name, *row[:4], find_source(row[4])) for name, row in fixed.items()}
    name = getattr(sampler, "__name__", None) or getattr(sampler, "func", sampler).__name__
    step = "Goes to the next noise level."
    gives = f"{latent} + {latent}"
    return [
        made["encode"],
        *list_layers(model.text_encoder, "text_encoder", TextEncoder),
        made["levels"],
        made["make_noise_source"],
        made["timestep_embedding"],
        Box("diffusion_model", "diffusion_model", "Predicts the noise in the latent.", both, latent,
            find_source(type(model.diffusion_model))),
        *list_layers(model.diffusion_model, "diffusion_model", _unet),
        made["guidance"],
        made["split_prediction"],
        Box(name, "sampler", step, gives, latent, sampler_source),
        *list_layers(model.decoder, "decoder", Decoder),
        made["quantize_pixels"],
    ]  # fmt: skip


def list_layers(model, part, kind):
    """Returns a `Box` for each named layer of a Keras model, except its inputs.

    Args:
        model: the model; another object has no layers.
        part: see `Box`.
        kind: the class or function that puts the layers together, where Keras' own are written.
    """
    boxes = []
    for layer in getattr(model, "layers", []):
        if isinstance(layer, keras.layers.InputLayer):
            continue
        own = type(layer).__module__.startswith("stable_diffusion.")
        text = next((SENTENCES[c] for c in type(layer).__mro__ if c in SENTENCES), "A layer.")
        takes, gives = _shape(layer.input), _shape(layer.output)
        boxes.append(
            Box(layer.name, part, text, takes, gives, find_source(type(layer) if own else kind))
        )
    return boxes


def _shape(tensors):
    tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
    shapes = [tuple(size or "any" for size in tensor.shape[1:]) for tensor in tensors]
    return " + ".join(str(shape).replace("'", "").replace(",)", ")") for shape in shapes)
