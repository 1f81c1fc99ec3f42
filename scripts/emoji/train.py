"""Trains the embedded checkpoint from nothing.

    python scripts/emoji/pictures.py --out pictures.npz
    python scripts/emoji/train.py pictures.npz --work runs/emoji --out weights/emoji

Stage by stage: the VAE learns to compress pictures; its latents of the training pictures are
written to a file; the text encoder learns what captions look like; it and the UNet learn to remove
noise. Everything lies in --work. A stage that is finished is not begun again, and one that was
stopped, by SIGTERM or Control-C, goes on where it was when the same command is given again. To
begin a stage anew, remove its folder.

--out is a folder in diffusers' layout, with two lists beside model_index.json: subjects.txt (what
it draws) and words.txt (what it was told). --export writes it before all is done.

Needs PyTorch, which trains these models faster on a CPU than TensorFlow and JAX do.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `training` has threads of its own
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import argparse
import gzip
import math
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import keras
import numpy as np
import torch
import torch_ops
import vae as autoencoder
from compositions import (
    ALIASES,
    COLOURS,
    FILL,
    PLACES,
    RELATIONS,
    SIZE,
    STYLES,
    Scene,
    Sprites,
    draw_caption,
    draw_scene,
    draw_variation,
    list_captions,
    list_unnamed,
)
from pictures import load_pictures
from training import THREADS, Stopped, Training, fall, save_grid, to_float
from vae import VAE

from stable_diffusion import Decoder, ImageEncoder, NoiseScheduler, SimpleTokenizer, StableDiffusion
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.checkpoints.diffusers import save_diffusers
from stable_diffusion.clip_tokenizer import NUM_PAIRS
from stable_diffusion.command.generate import split_words
from stable_diffusion.config import Config, TextConfig, UNetConfig, undo_departures
from stable_diffusion.files import WEIGHTS_DIR
from stable_diffusion.noise_scheduler import timestep_embedding

LENGTH = 77  # tokens
TEXT = TextConfig(width=128, depth=4, heads=4, hidden=512)
UNET = UNetConfig(
    widths=(64, 128, 192),
    heads=(2, 4, 6),
    attention=(False, True, True),
    context_width=TEXT.width,
    res_blocks=1,
    in_channels=autoencoder.CONFIG.latent_channels,
    out_channels=autoencoder.CONFIG.latent_channels,
    groups=16,
)
# With the linear schedule almost nothing is left of the picture at the last timestep, so sampling
# may start there, from pure noise: "trailing" does.
SCHEDULE = NoiseScheduler(clip_sample=False, prediction_type="v_prediction", spacing="trailing")

# The pictures whose latents are stored, and how often a kind of them is seen.
SCENES = {"plain": 52000, "large": 11000, "small": 11000, "place": 20000, "pair": 46000}
SHARES = {"plain": 0.46, "large": 0.06, "small": 0.07, "place": 0.11, "pair": 0.30}
UNCONDITIONAL = 0.1  # share of captions dropped, for classifier-free guidance

# How text encoder and UNet learn.
TEXT_STEPS, TEXT_BATCH, TEXT_RATE, TEXT_WARMUP = 3000, 128, 2e-3, 100
STEPS, BATCH, RATE, WARMUP, STEADY = 34000, 64, 1e-3, 500, 0.5
WEIGHT_DECAY = 1e-3
AVERAGE = 0.9995  # decay of the moving average of the parameters
SHOW_STEPS, SHOW_GUIDANCE, SHOWN_STEPS = 1000, 2.0, 20
PROMPTS = (  # of the pictures that show how far it is; some are held out
    "a red apple on a blue background",
    "a cat face on a green background",
    "a panda on a purple background",
    "a rocket on a pink background",
    "a flat pizza on a white background",
    "a flat owl on a black background",
    "a small banana on a red background",
    "a large guitar on a cyan background",
    "a dog face on the left of a yellow background",
    "a cat to the left of a dog on a white background",
    "a dog to the right of a cat on a green background",
    "a red apple above a teapot on an orange background",
    "an umbrella below a crown on a gray background",
    "a flat octopus and a flat rose on a brown background",
    "a robot",
    "a rabbit and a carrot",
)


# --- The latents of the training pictures. -------------------------------------------------------


def list_scenes(names):
    """Lists the training pictures: tuples of `Scene` and variation, kind by kind.

    The n-th of a kind is always the same one.
    """
    scenes = []
    for kind, (name, count) in enumerate(SCENES.items()):
        rng = np.random.default_rng(kind)
        for _ in range(count):
            scene = draw_scene(rng, names, kind=name)
            scenes.append((scene, draw_variation(rng, scene)))
    return scenes


def is_close(one, other):
    """Tells whether latents are the same but for rounding, bfloat16's included."""
    one = np.asarray(one, "float32")
    return np.mean((one - other) ** 2) < 0.01 * np.mean(one**2)


def encode_scenes(scenes, sprites, vae, path, batch_size=32):
    """Encodes the training pictures into a file; goes on with the rows that are still zero.

    Args:
        scenes: see `list_scenes`.
        sprites: the `Sprites`.
        vae: the `VAE`.
        path: of the .npy file.
        batch_size: how many pictures are encoded at once.

    Returns:
        The posterior's means, float16 `(N, h, w, C)`, read from the file when they are needed.

    Raises:
        ValueError: the file is of other pictures or another VAE.
        Stopped: a signal asked for it.
    """
    cells = SIZE // UNET.cell_size
    shape = (len(scenes), cells, cells, UNET.in_channels)

    @torch.no_grad()
    def encode(rows):
        pictures = [sprites.draw(scenes[row][0], **scenes[row][1]) for row in rows]
        return vae.encoder(to_float(np.stack(pictures))).float().chunk(2, -1)[0].numpy()

    first = np.arange(batch_size)
    if path.exists():
        latents = np.load(path, mmap_mode="r+")
        if latents.shape != shape or not is_close(latents[first], encode(first)):
            raise ValueError(f"{path}: of other pictures or another VAE; remove it to go on")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        latents = np.lib.format.open_memmap(path, "w+", "float16", shape)
        latents[first] = encode(first)
    todo = np.flatnonzero(~latents[:, ::5, ::5].any((1, 2, 3)))
    batches = np.array_split(todo, -(-len(todo) // batch_size)) if len(todo) else []
    stopped = []
    previous = [
        signal.signal(some, lambda *_: stopped.append(True))
        for some in (signal.SIGTERM, signal.SIGINT)
    ]
    try:
        for number, rows in enumerate(batches):
            latents[rows] = encode(rows)
            if number % 100 == 0:
                print(
                    f"{shape[0] - len(todo) + number * batch_size} of {shape[0]} pictures encoded"
                )
                sys.stdout.flush()
            if stopped:
                raise Stopped
    finally:
        latents.flush()
        signal.signal(signal.SIGTERM, previous[0])
        signal.signal(signal.SIGINT, previous[1])
    return np.load(path, mmap_mode="r")


# --- Captions. -----------------------------------------------------------------------------------


def list_words(names):
    """Returns every word of the training captions, sorted."""
    called = [*names, *ALIASES.values()]
    scenes = [
        Scene((name,), "white", style, size) for name in called for style in STYLES for size in FILL
    ]
    name = names[0]
    for colour in COLOURS:
        scenes.append(Scene((name,), colour))
        scenes += [Scene((name,), colour, place=place) for place in PLACES]
        scenes += [Scene((name, names[1]), colour, relation=relation) for relation in RELATIONS]
    captions = {
        caption
        for scene in scenes
        for caption in (*list_captions(scene, True), *list_captions(scene, False),
                        *list_unnamed(scene, True))
    }  # fmt: skip
    return sorted({word for caption in captions for word in split_words(caption)})


def write_lines(path, lines):
    """Writes a text file: the whole file, or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def write_vocabulary(words, path):
    """Writes the part of CLIP's BPE vocabulary that the words need; returns its tokenizer.

    A pair is kept if what it joins occurs in a word, so that these words have the pieces they have
    with the whole vocabulary. Other words are spelled in shorter pieces.
    """
    ends = (piece for word in words for piece in re.split("(?=')", word))  # CLIP splits woman + 's
    text = " ".join(f"{piece}</w>" for piece in ends)
    whole = WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(whole, "rt", encoding="utf-8") as file:
        pairs = islice(file, 1, 1 + NUM_PAIRS)
        needed = [pair.rstrip("\n") for pair in pairs if pair.replace(" ", "").strip() in text]
    write_lines(path, ["#version: 0.2", *needed])
    return SimpleTokenizer(path)


class Examples:
    """Random training examples: captions and latents of what they say.

    Args:
        scenes: see `list_scenes`.
        latents: float `(N, h, w, C)`, as the VAE gives them.
        factor: brings them to unit variance.
        tokenizer: the `SimpleTokenizer`.
    """

    def __init__(self, scenes, latents, factor, tokenizer):
        self.scenes, self.latents, self.factor = scenes, latents, factor
        self.tokenizer = tokenizer
        self.shares = np.array(list(SHARES.values()))
        self.ends = np.cumsum(list(SCENES.values()))

    def draw(self, rng, count):
        """Draws some examples.

        Returns:
            Latents, float32 tensor `(count, h, w, C)` of unit variance; and tokens, int32 tensor
            `(count, 77)`.
        """
        kinds = rng.choice(len(self.shares), count, p=self.shares / self.shares.sum())
        begins = np.concatenate([[0], self.ends[:-1]])
        rows = np.sort(rng.integers(begins[kinds], self.ends[kinds]))
        tokens = [self.tokenize(rng, self.scenes[row][0]) for row in rows]
        latents = torch.from_numpy(self.latents[rows].astype("float32") * self.factor)
        return latents, torch.tensor(tokens, dtype=torch.int32)

    def tokenize(self, rng, scene):
        """Draws a caption of a scene, or none: a list of 77 ids."""
        text = "" if rng.random() < UNCONDITIONAL else draw_caption(rng, scene)
        ids = self.tokenizer.encode(text)
        return ids + [self.tokenizer.end_of_text] * (LENGTH - len(ids))


# --- Text encoder and UNet. ----------------------------------------------------------------------


def encode_text(pipeline, tokens):
    """Returns the context of tokens, a tensor `(B, 77, D)`."""
    positions = torch.arange(LENGTH, dtype=torch.int32).expand(tokens.shape)
    return pipeline.text_encoder({"tokens": tokens, "positions": positions}, training=True)


def train_text(examples, pipeline, folder, export=False):
    """Teaches the text encoder to tell what a caption looks like, before the UNet listens to it.

    A linear layer, dropped afterwards, predicts the latent from the mean of the context after the
    caption's end. This costs a tenth of a UNet's step and has no noise in it, and what the UNet
    would otherwise have to wait for is in the context from its first step on. (Stable Diffusion's
    text encoder has learned from pictures before its UNet, too, as a part of CLIP.)
    """
    shape = examples.latents.shape[1:]
    linear = keras.layers.Dense(math.prod(shape))
    linear.build((None, TEXT.width))
    end = examples.tokenizer.end_of_text

    def compute_loss(step, part):
        rng = np.random.default_rng((step, part))
        latents, tokens = examples.draw(rng, TEXT_BATCH // THREADS)
        context = encode_text(pipeline, tokens).float()
        ended = (tokens == end).float()[..., None]
        mean = (ended * context).sum(1) / ended.sum(1)
        return (linear(mean).float().reshape(latents.shape) - latents).square().mean()

    variables = pipeline.text_encoder.trainable_variables + linear.trainable_variables
    training = Training(
        folder, variables, compute_loss,
        lambda step: fall(step, TEXT_STEPS, TEXT_WARMUP, TEXT_RATE),
    )  # fmt: skip
    training.run(0 if export else TEXT_STEPS)


def train_diffusion(examples, pipeline, folder, export=False):
    """Trains text encoder and UNet jointly; leaves the average of their parameters in them."""
    alphas = torch.from_numpy(SCHEDULE.alphas_cumprod.astype("float32"))

    def compute_loss(step, part):
        rng = np.random.default_rng((step, part))
        x0, tokens = examples.draw(rng, BATCH // THREADS)
        # Timesteps that are evenly spread in a batch make its loss less random.
        spread = (np.arange(len(x0)) + rng.random(len(x0))) / len(x0)
        timesteps = (rng.permutation(spread) * len(SCHEDULE)).astype(int)
        alpha = alphas[timesteps][:, None, None, None]
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype="float32"))
        latent = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        time = torch.from_numpy(timestep_embedding(timesteps, UNET.widths[0]))
        context = encode_text(pipeline, tokens)
        output = pipeline.diffusion_model([latent, time, context], training=True).float()
        return (output - target).square().mean()

    def show():
        pictures = pipeline.text_to_image(
            list(PROMPTS), num_steps=SHOWN_STEPS, unconditional_guidance_scale=SHOW_GUIDANCE,
            seed=list(range(len(PROMPTS))), verbose=0,
        )  # fmt: skip
        save_grid(folder / f"step_{training.step:06}.png", pictures, 8)

    variables = (
        pipeline.text_encoder.trainable_variables + pipeline.diffusion_model.trainable_variables
    )
    torch_ops.order_kernels(pipeline.diffusion_model)
    training = Training(
        folder, variables, compute_loss, lambda step: fall(step, STEPS, WARMUP, RATE, STEADY),
        weight_decay=WEIGHT_DECAY, average=AVERAGE,
    )  # fmt: skip
    print(f"UNet: {pipeline.diffusion_model.count_params():,} parameters", flush=True)
    training.run(0 if export else STEPS, show, SHOW_STEPS)
    training.swap()


# --- All of it. ----------------------------------------------------------------------------------


def build_pipeline(words, vae, factor, folder):
    """Returns a pipeline of the VAE and of an untrained text encoder and UNet."""
    tokenizer = write_vocabulary(words, folder / "merges.txt")
    config = undo_departures(
        Config(
            text=replace(TEXT, vocab_size=len(tokenizer.vocab)),
            unet=UNET,
            vae=replace(vae.config, scaling_factor=factor),
            size=SIZE,
        )
    )
    config = replace(config, schedule=SCHEDULE)
    keras.utils.set_random_seed(0)
    pipeline = StableDiffusion(jit_compile=False, weights=None, config=config)
    pipeline._tokenizer = tokenizer
    pipeline.decoder.set_weights(vae.decoder.get_weights())
    pipeline.image_encoder.set_weights(vae.image_encoder.get_weights())
    return pipeline


def load_vae(folder):
    """Reads the VAE of a checkpoint.

    Raises:
        ValueError: there is none, or one of other sizes.
    """
    checkpoint = open_checkpoint(folder)
    config = replace(checkpoint.config.vae, scaling_factor=1.0)
    if config != autoencoder.CONFIG:
        raise ValueError(f"{folder}: its VAE is {config}, not {autoencoder.CONFIG}")
    vae = VAE()
    image_encoder = checkpoint.build("image_encoder", ImageEncoder)
    decoder = checkpoint.build("decoder", partial(Decoder, SIZE, SIZE))
    vae.image_encoder.set_weights(image_encoder.get_weights())
    vae.decoder.set_weights(decoder.get_weights())
    return vae


def get_vae(args, sprites):
    """Returns the VAE of --init, or the one that is trained here."""
    if args.init:
        return load_vae(args.init)
    vae = VAE()
    autoencoder.train_vae(vae, sprites, args.work / "vae", export=args.export)
    config = undo_departures(Config(unet=UNET, vae=vae.config, size=SIZE))
    parts = {"image_encoder": vae.image_encoder, "decoder": vae.decoder}
    save_diffusers(args.work / "vae" / "checkpoint", config, parts, dtype="float16")
    return vae


def has_unet(folder):
    """Tells whether a checkpoint is more than a VAE."""
    return folder is not None and (folder / "unet" / "config.json").is_file()


def save(pipeline, names, words, out):
    """Writes the checkpoint in float16."""
    parts = ("text_encoder", "diffusion_model", "decoder", "image_encoder")
    models = {part: getattr(pipeline, part) for part in parts}
    save_diffusers(out, pipeline.config, models, pipeline.tokenizer, "float16")
    write_lines(out / "subjects.txt", names)
    write_lines(out / "words.txt", words)
    print(f"wrote {out}", flush=True)


def train(args):
    """Trains what isn't trained yet, and writes the checkpoint."""
    sprites = Sprites(load_pictures(args.pictures))
    vae = get_vae(args, sprites)
    words, scenes = list_words(sprites.names), list_scenes(sprites.names)
    latents = encode_scenes(scenes, sprites, vae, args.work / "latents.npy")
    if has_unet(args.init):
        pipeline = StableDiffusion(jit_compile=False, weights=str(args.init))
    else:
        factor = float(1 / latents[::17].std(dtype="float64"))  # a sample of them is enough
        pipeline = build_pipeline(words, vae, factor, args.work)
    factor = pipeline.config.vae.scaling_factor
    print(f"{len(words)} words of {len(pipeline.tokenizer.vocab)} pieces, factor {factor:.4f}")
    examples = Examples(scenes, latents, factor, pipeline.tokenizer)
    if not has_unet(args.init):
        train_text(examples, pipeline, args.work / "text", args.export)
    train_diffusion(examples, pipeline, args.work / "diffusion", args.export)
    if args.out:
        save(pipeline, sprites.names, words, args.out)


def choose_policy():
    """Returns Keras' dtype policy: bfloat16 only helps where the processor computes in it."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "mixed_bfloat16" if fast else "float32"


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", type=Path, help="what pictures.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument(
        "--init",
        type=Path,
        help="a checkpoint to begin with: its VAE stays as it is; its text encoder and UNet, if it "
        "has them, learn on",
    )
    parser.add_argument(
        "--export", action="store_true", help="write --out as far as it is, without more training"
    )
    args = parser.parse_args(argv)
    torch_ops.install()
    keras.config.set_dtype_policy(choose_policy())
    keras.utils.set_random_seed(0)
    try:
        train(args)
    except (OSError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print("stopped; the same command goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
