"""Trains the embedded checkpoint: a small Stable Diffusion that draws emoji, from nothing.

    python scripts/emoji/first/emoji_data.py --out emoji.npz
    python scripts/emoji/first/train_emoji.py emoji.npz --work runs/emoji --out weights/emoji

First the VAE learns to compress pictures. Its latents of all training pictures are written to a
file. The text encoder learns what captions look like, alone. Then it and the UNet learn together to
remove noise from the latents. Each stage is plain Keras: a model, `compile` and `fit`.

Everything happens in `--work`: after each epoch a checkpoint, a line in log.csv and a picture of
what the model does. A run that was stopped goes on from the last epoch when the same command is
given again. `--out` gets the result, a diffusers folder, with two lists beside model_index.json:
subjects.txt (what it draws) and words.txt (what it was told). Training goes on from such a folder,
with a new optimizer, by

    python scripts/emoji/first/train_emoji.py emoji.npz --init weights/emoji --work runs --out new

Each step is compiled: by XLA with KERAS_BACKEND=tensorflow, the default, which suits a CPU best.

In comments on shapes, N is the number of latents, and h, w are their cells.
"""

import argparse
import gzip
import math
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import emoji_data as emoji
import keras
import numpy as np
from keras import ops
from PIL import Image

from stable_diffusion import Decoder, ImageEncoder, NoiseScheduler, SimpleTokenizer, StableDiffusion
from stable_diffusion.checkpoints import open_checkpoint
from stable_diffusion.checkpoints.diffusers import save_diffusers
from stable_diffusion.clip_tokenizer import NUM_PAIRS, WEIGHTS_DIR
from stable_diffusion.command.generate import split_words
from stable_diffusion.config import Config, TextConfig, UNetConfig, VAEConfig, undo_departures
from stable_diffusion.noise_scheduler import timestep_embedding

SIZE = 128  # pixels, 16x16 latent cells
CHANNELS = 8  # of the latents; with Stable Diffusion's 4, so narrow a VAE blurs what is thin
LENGTH = 77  # tokens
CONFIG = undo_departures(
    Config(
        text=TextConfig(width=128, depth=3, heads=4, hidden=512),
        unet=UNetConfig(
            widths=(48, 96, 192),
            heads=(2, 3, 6),
            attention=(False, True, True),
            context_width=128,
            res_blocks=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            groups=16,
        ),
        vae=VAEConfig(
            widths=(16, 32, 64, 96),
            res_blocks=1,
            latent_channels=CHANNELS,
            groups=8,
            scaling_factor=1.0,
        ),
        size=SIZE,
    )
)

# The VAE.
CELL = 8  # pixels of a latent cell
CROP = SIZE // 2  # it learns from crops, which cost a quarter of a picture
VAE_BATCH, VAE_RATE, VAE_WARMUP = 8, 7e-4, 200  # the rate's peak, and the steps up to it
KL_WEIGHT = 2e-3
VAE_EPOCHS = 16

# What the text encoder and the UNet see.
SUBJECTS = 520  # those that are easiest to tell apart
VARIANTS = 2  # of each subject on each background, in slightly different places and sizes
PLACES = [("small", None), ("large", None), *((None, side) for side in emoji.SIDES)]
PLACED = 1  # how many of these each subject has on each background
PLAIN = 0.75  # share of pictures without a word of size or side
UNCONDITIONAL = 0.1  # share of captions dropped, for classifier-free guidance

# How they learn. With the linear schedule almost nothing is left of the picture at the last
# timestep, so sampling may start there, from pure noise: "trailing" does.
SCHEDULE = NoiseScheduler(clip_sample=False, prediction_type="v_prediction", spacing="trailing")
TEXT_BATCH, TEXT_RATE, TEXT_WARMUP = 64, 2e-3, 100
BATCH, RATE, WARMUP = 16, 8e-4, 500
EMA = 0.999

FLOOR = 0.01  # what is left of a learning rate at the end
SAMPLE_STEPS = 10  # and how many held-out pairs the VAE shows:
SAMPLE_PAIRS = 16
PROMPTS = [  # of the pictures after each epoch
    "a red apple on a blue background",
    "a cat face on a green background",
    "a banana on a red background",
    "a panda on a purple background",
    "a small dog face on a white background",
    "a rocket on a pink background",
    "a strawberry on the left of a black background",
    "pizza on blue",
]


def to_float(pictures):
    """Maps uint8 pictures to float32 in [-1, 1]."""
    return pictures.astype("float32") / 127.5 - 1.0


def save_grid(path, pictures, columns):
    """Writes pictures, `(N, H, W, 3)` in [-1, 1], as one PNG."""
    pictures = np.clip((np.asarray(pictures, "float32") + 1) * 127.5, 0, 255).astype("uint8")
    rows = [np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def write_lines(path, lines):
    """Writes a text file: the whole file, or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


# --- Training that can be stopped at any time. ---------------------------------------------------


class Checkpoint(keras.callbacks.Callback):
    """Saves the model's and the optimizer's variables after each epoch: whole, or not at all."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        temporary = self.path.with_name(f"next.{self.path.name}")
        self.model.save_weights(temporary)
        temporary.replace(self.path)


def rate_schedule(peak, warmup, steps):
    """Returns a learning rate that rises linearly, then falls as a cosine until `steps`."""
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), FLOOR, warmup_target=peak, warmup_steps=warmup
    )


def fit(model, data, epochs, folder, callbacks):
    """Fits, leaving a checkpoint each epoch; goes on from the one in `folder`, if there is one.

    Everything that training goes on from is in the checkpoint: the parameters as the optimizer
    left them, its moments and averages, and how many steps it has taken, which tells the learning
    rate, the epoch and thereby the data.

    Args:
        model: compiled and built.
        data: a `Batches`.
        epochs: how many in all, those before included.
        folder: where the checkpoint and log.csv are.
        callbacks: come after the checkpoint, so that they may change the parameters.
    """
    newest = folder / "latest.weights.h5"
    model.optimizer.build(model.trainable_variables)
    if newest.exists():
        model.load_weights(newest)
    data.epoch = int(ops.convert_to_numpy(model.optimizer.iterations)) // len(data)
    print(f"{folder}: {data.epoch} of {epochs} epochs done", flush=True)
    model.fit(
        data,
        initial_epoch=data.epoch,
        epochs=epochs,
        shuffle=False,  # the batches are random already
        verbose=1 if sys.stdout.isatty() else 2,
        callbacks=[
            Checkpoint(newest),
            keras.callbacks.CSVLogger(folder / "log.csv", append=True),
            *callbacks,
        ],
    )


class Batches(keras.utils.PyDataset):
    """Random batches; the epoch and the index in it determine them."""

    def __init__(self, batch_size, steps):
        super().__init__()
        self.batch_size, self.steps, self.epoch = batch_size, steps, 0

    def __len__(self):
        return self.steps

    def on_epoch_begin(self):
        self.epoch += 1

    def __getitem__(self, index):
        return self.draw(np.random.default_rng((self.epoch, index)))


# --- The VAE. ------------------------------------------------------------------------------------


class Crops(Batches):
    """Crops of pictures for the VAE, each of which it has to reproduce.

    Half of the pictures are as the VAE is measured, the others as the UNet will see them. Crops
    begin where a latent cell does, so that a cell sees a picture as it will in the whole one.
    """

    def __init__(self, names, pictures, steps):
        super().__init__(VAE_BATCH, steps)
        self.names, self.pictures, self.scenes = names, pictures, list_scenes(names)

    def draw(self, rng):
        batch = []
        for row in range(self.batch_size):
            if row % 2:
                picture, _ = emoji.sample(rng, self.names, self.pictures)
            else:
                picture = draw_scene(self.pictures, *self.scenes[rng.integers(len(self.scenes))])
            y, x = CELL * rng.integers(0, (SIZE - CROP) // CELL + 1, 2)
            batch.append(picture[y : y + CROP, x : x + CROP])
        batch = to_float(np.stack(batch))
        return batch, batch


def moments(encoder):
    """Returns the model of the posterior's mean and log variance, `(B, h, w, 2 * channels)`."""
    return keras.Model(encoder.inputs[0], encoder.layers[-2].output)


class Autoencoder(keras.Model):
    """Encodes to the posterior's moments, samples a latent, decodes it."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = moments(encoder)
        self.decoder = decoder
        self.seed = keras.random.SeedGenerator(0)

    def call(self, pictures, training=False):
        mean, log_variance = ops.split(self.encoder(pictures), 2, axis=-1)
        if training:
            log_variance = ops.clip(log_variance, -30.0, 20.0)
            kl = 0.5 * ops.mean(ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance)
            self.add_loss(KL_WEIGHT * kl)
            noise = keras.random.normal(ops.shape(mean), seed=self.seed)
            mean = mean + ops.exp(0.5 * log_variance) * noise
        return self.decoder(mean)


def reconstruction_loss(y_true, y_pred):
    """Mean absolute plus ten times mean squared error: sharp edges and right colours."""
    error = y_true - y_pred
    return ops.mean(ops.abs(error) + 10.0 * ops.square(error), axis=(1, 2, 3))


def train_vae(names, pictures, folder, epochs, steps, begun=None, freeze=False):
    """Trains encoder and decoder, or the decoder alone.

    Args:
        names, pictures: the data set.
        folder: of the checkpoint, the log and the samples.
        epochs: how many in all.
        steps: batches an epoch.
        begun: a diffusers folder whose VAE to start from, or None.
        freeze: whether the encoder stays as it is, because a UNet knows its latents.

    Returns:
        The folder of the result, in diffusers' layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    if begun:
        encoder, decoder, config = load_vae(begun)
    else:
        config = CONFIG.vae
        encoder = ImageEncoder(download_weights=False, config=config)
        decoder = Decoder(SIZE, SIZE, download_weights=False, config=config)
    of_crops = Decoder(CROP, CROP, download_weights=False, config=config)
    of_crops.set_weights(decoder.get_weights())
    model = Autoencoder(encoder, of_crops)
    model.encoder.trainable = not freeze
    model(np.zeros((1, CROP, CROP, 3), "float32"))  # builds it, so that variables can be loaded
    rate = rate_schedule(VAE_RATE, VAE_WARMUP, epochs * steps)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), reconstruction_loss, jit_compile=True)
    rng = np.random.default_rng(0)
    shown = [emoji.sample(rng, names, pictures, "held_out")[0] for _ in range(SAMPLE_PAIRS)]
    shown = to_float(np.stack(shown))

    def sample(epoch, logs):
        decoder.set_weights(of_crops.get_weights())
        mean = ops.split(model.encoder(shown), 2, axis=-1)[0]
        decoded = np.clip(ops.convert_to_numpy(decoder(mean)), -1, 1)
        error = np.mean((decoded - shown) ** 2, axis=(1, 2, 3)) / 4
        print(f"held-out pairs: PSNR {np.mean(-10 * np.log10(error)):.2f} dB", flush=True)
        save_grid(
            folder / f"epoch_{epoch + 1:03}.png", np.concatenate([shown, decoded]), len(shown)
        )

    show = keras.callbacks.LambdaCallback(on_epoch_end=sample)
    fit(model, Crops(names, pictures, steps), epochs, folder, [show])
    decoder.set_weights(of_crops.get_weights())
    parts = {"image_encoder": encoder, "decoder": decoder}
    save_diffusers(folder / "checkpoint", replace(CONFIG, vae=config), parts, dtype="float32")
    return folder / "checkpoint"


def load_vae(folder):
    """Reads encoder, decoder and their config from a diffusers folder.

    Raises:
        ValueError: no VAE is there, or one of other latents.
    """
    checkpoint = open_checkpoint(folder)
    config, unet = checkpoint.config.vae, CONFIG.unet
    scale = 2 ** (len(config.widths) - 1)
    if (scale, config.latent_channels) != (unet.cell_size, unet.in_channels):
        raise ValueError(
            f"{folder}: the VAE must have {unet.in_channels} channels at 1/{unet.cell_size} of "
            f"the size, not {config.latent_channels} at 1/{scale}"
        )
    if config.scaling_factor != 1:  # as the UNet of that folder had it
        checkpoint.config = replace(checkpoint.config, vae=replace(config, scaling_factor=1.0))
    encoder = checkpoint.build("image_encoder", ImageEncoder)
    decoder = checkpoint.build("decoder", partial(Decoder, SIZE, SIZE))
    return encoder, decoder, checkpoint.config.vae


# --- The latents of the training pictures. -------------------------------------------------------


def list_scenes(names):
    """Lists the training pictures: `(subject's index, colour, size, side, variant)`."""
    scenes = []
    for index, name in enumerate(names):
        for number, colour in enumerate(emoji.COLOURS):
            if emoji.held_out(name, colour):
                continue
            scenes += [(index, colour, None, None, variant) for variant in range(VARIANTS)]
            first = index + number  # so that each colour has all places, of different subjects
            places = [PLACES[(first + n) % len(PLACES)] for n in range(PLACED)]
            scenes += [(index, colour, size, side, 0) for size, side in places]
    return scenes


def draw_scene(pictures, index, colour, size, side, variant):
    """Draws one of `list_scenes`, uint8 `(128, 128, 3)`."""
    if side:
        scale, offset = emoji.SCALES["small"], emoji.SIDES[side][1]
    elif size:
        scale, offset = emoji.SCALES[size], (0, 0)
    else:
        place = list(emoji.COLOURS).index(colour)
        scale, offset = emoji.jitter(np.random.default_rng((index, place, variant)))
    return emoji.compose(pictures[index], emoji.COLOURS[colour], scale, offset)


def encode_scenes(scenes, pictures, encoder, cache, batch_size=64):
    """Encodes the training pictures, a batch at a time, into a file.

    A stopped run goes on with the rows that are still zero, as no latent is.

    Args:
        scenes: see `list_scenes`.
        pictures: uint8 `(subjects, 128, 128, 4)`.
        encoder: the `ImageEncoder`.
        cache: path of the .npy file.
        batch_size: how many pictures are in memory at once.

    Returns:
        The posterior's means, float16 `(N, h, w, 4)`, read from the file when they are needed.

    Raises:
        ValueError: the file is of other pictures or another VAE.
    """
    encoder = moments(encoder)
    encoder.compile(jit_compile=True)
    channels = encoder.outputs[0].shape[-1] // 2

    def encode(some):
        batch = to_float(np.stack([draw_scene(pictures, *scene) for scene in some]))
        return np.asarray(encoder.predict_on_batch(batch))[..., :channels]

    first = encode(scenes[:batch_size])
    shape = (len(scenes), *first.shape[1:])
    part = cache.with_name(f"next.{cache.name}")
    begun = next((path for path in (cache, part) if path.exists()), None)
    if begun is None:
        latents = np.lib.format.open_memmap(part, "w+", "float16", shape)
        latents[:batch_size] = first
    else:
        latents = np.load(begun, mmap_mode="r+")
        if latents.shape != shape or not np.allclose(latents[:batch_size], first, atol=0.1):
            raise ValueError(f"{begun}: of other pictures or another VAE; remove it to go on")
    todo = np.flatnonzero(~latents.any(axis=(1, 2, 3)))
    for start in range(0, len(todo), batch_size):
        rows = todo[start : start + batch_size]
        latents[rows] = encode([scenes[row] for row in rows])
        if start // batch_size % 50 == 0:
            print(f"{shape[0] - len(todo) + start} of {shape[0]} pictures encoded", flush=True)
    latents.flush()
    if begun != cache:
        part.replace(cache)
    return np.load(cache, mmap_mode="r")


# --- Text encoder and UNet. ----------------------------------------------------------------------


def list_words(names):
    """Returns every word of the training captions, sorted."""
    return sorted(
        {
            word
            for index, colour, size, side, _ in list_scenes(names)
            for caption in emoji.captions(names[index], colour, size, side)
            for word in split_words(caption)
        }
    )


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


class CaptionedLatents(Batches):
    """Captions, and the latents of what they say.

    Args:
        latents: float `(N, h, w, 4)`, as the VAE gives them.
        config: the `Config` of the model to train.
        scenes: what the latents show, see `list_scenes`.
        names: of the subjects.
        tokenizer: the `SimpleTokenizer`.
        batch_size: captions a batch.
        steps: batches an epoch.
    """

    def __init__(self, latents, config, scenes, names, tokenizer, batch_size, steps):
        super().__init__(batch_size, steps)
        self.latents, self.config = latents, config
        self.scenes, self.names, self.tokenizer = scenes, names, tokenizer
        plain = np.array([size is side is None for _, _, size, side, _ in scenes])
        self.weight = np.where(plain, PLAIN / plain.sum(), (1 - PLAIN) / (~plain).sum())

    def tokens(self, rng, index, colour, size, side, _):
        if side and rng.random() < 0.5:
            size = "small"  # as everything on a side is
        text = emoji.caption(self.names[index], colour, rng, size, side)
        ids = self.tokenizer.encode("" if rng.random() < UNCONDITIONAL else text)
        return ids + [self.tokenizer.end_of_text] * (LENGTH - len(ids))

    def draw(self, rng):
        chosen = rng.choice(len(self.scenes), self.batch_size, p=self.weight)
        inputs = {
            "tokens": np.array([self.tokens(rng, *self.scenes[i]) for i in chosen], "int32"),
            "positions": np.tile(np.arange(LENGTH, dtype="int32"), (self.batch_size, 1)),
        }
        return inputs, self.latents[chosen].astype("float32") * self.config.vae.scaling_factor


class NoisyLatents(CaptionedLatents):
    """Noisy latents with their captions, and the v that the UNet is to predict."""

    def draw(self, rng):
        inputs, x0 = super().draw(rng)
        schedule, width = self.config.schedule, self.config.unet.widths[0]
        timesteps = rng.integers(0, len(schedule), self.batch_size)
        alpha = schedule.alphas_cumprod[timesteps][:, None, None, None].astype("float32")
        noise = rng.standard_normal(x0.shape, dtype="float32")
        inputs["latent"] = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
        inputs["timestep_embedding"] = timestep_embedding(timesteps, width)
        return inputs, alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0


def train_text(data, text_encoder, folder, epochs):
    """Teaches the text encoder to tell what a caption looks like, before the UNet listens to it.

    A linear layer, dropped afterwards, predicts the latent from the mean of the context after the
    caption's end. This costs a tenth of a UNet's step and has no noise in it, and what the UNet
    would otherwise have to wait for is in the context from its first step on. (Stable Diffusion's
    text encoder has learned from pictures before its UNet, too, as a part of CLIP.)

    Args:
        data: `CaptionedLatents`.
        text_encoder: the `TextEncoder`.
        folder: of the checkpoint and the log.
        epochs: how many in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens, positions = text_encoder.inputs
    ended = ops.cast(ops.equal(tokens, data.tokenizer.end_of_text), "float32")[..., None]
    mean = ops.sum(ended * text_encoder.output, axis=1) / ops.sum(ended, axis=1)  # (B, D)
    shape = data.latents.shape[1:]
    latent = keras.layers.Reshape(shape)(keras.layers.Dense(math.prod(shape))(mean))
    model = keras.Model({"tokens": tokens, "positions": positions}, latent)
    rate = rate_schedule(TEXT_RATE, TEXT_WARMUP, epochs * len(data))
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), "mse", jit_compile=True)
    fit(model, data, epochs, folder, [])


def train_diffusion(data, pipeline, folder, epochs):
    """Trains text encoder and UNet jointly; the moving average of their parameters is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    text_encoder, unet = pipeline.text_encoder, pipeline.diffusion_model
    latent, time, _ = unet.inputs
    inputs = [latent, time, *text_encoder.inputs]
    model = keras.Model(
        {tensor.name: tensor for tensor in inputs}, unet([latent, time, text_encoder.output])
    )
    optimizer = keras.optimizers.AdamW(
        rate_schedule(RATE, WARMUP, epochs * len(data)),
        weight_decay=1e-3,
        clipnorm=1.0,
        use_ema=True,
        ema_momentum=EMA,
    )
    model.compile(optimizer, "mse", jit_compile=True)

    def sample(epoch, logs):
        prompts, seeds = PROMPTS * 2, np.repeat([0, 1], len(PROMPTS))
        pictures = pipeline.text_to_image(prompts, num_steps=SAMPLE_STEPS, seed=seeds, verbose=0)
        save_grid(folder / f"epoch_{epoch + 1:03}.png", to_float(pictures), len(PROMPTS))

    # At an epoch's end the average takes the parameters' place, for the samples, and goes back
    # before the next one. The checkpoint is written before that.
    averaged = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    show = keras.callbacks.LambdaCallback(on_epoch_end=sample)
    fit(model, data, epochs, folder, [averaged, show])


def train(args):
    """Trains what is not trained yet, and writes the checkpoint."""
    names, pictures = emoji.load(args.data)
    how_long = args.work / "vae", args.vae_epochs, args.steps
    args.work.mkdir(parents=True, exist_ok=True)
    if args.init:
        names, pictures = emoji.read_subjects(args.init, names, pictures)
        pipeline = StableDiffusion(jit_compile=False, weights=args.init)
        encoder = pipeline.image_encoder
        if args.vae_epochs:
            vae = train_vae(names, pictures, *how_long, begun=args.init, freeze=True)
            pipeline.decoder.set_weights(load_vae(vae)[1].get_weights())
    else:
        names, pictures = emoji.distinct(names, pictures, SUBJECTS)
        vae = args.vae
        if args.vae_epochs:
            vae = train_vae(names, pictures, *how_long, begun=args.vae)
        encoder, decoder, vae_config = load_vae(vae)
    scenes, words = list_scenes(names), list_words(names)
    latents = encode_scenes(scenes, pictures, encoder, args.work / "latents.npy")
    if not args.init:
        tokenizer = write_vocabulary(words, args.work / "merges.txt")
        factor = float(1 / latents[::7].std(dtype="float64"))  # a sample of them is enough
        config = replace(
            CONFIG,
            text=replace(CONFIG.text, vocab_size=len(tokenizer.vocab)),
            vae=replace(vae_config, scaling_factor=factor),
            schedule=SCHEDULE,
        )
        keras.utils.set_random_seed(0)
        pipeline = StableDiffusion(jit_compile=False, weights=None, config=config)
        pipeline._tokenizer = tokenizer
        pipeline.decoder.set_weights(decoder.get_weights())
        pipeline.image_encoder.set_weights(encoder.get_weights())
    config, tokenizer = pipeline.config, pipeline.tokenizer
    print(f"{len(names)} subjects, {len(words)} words of {len(tokenizer.vocab)} pieces, ", end="")
    print(f"{len(latents)} latents times {config.vae.scaling_factor:.4f}", flush=True)

    what = latents, config, scenes, names, tokenizer
    if not args.init:
        data = CaptionedLatents(*what, TEXT_BATCH, args.steps)
        train_text(data, pipeline.text_encoder, args.work / "text", args.text_epochs)
    data = NoisyLatents(*what, BATCH, args.steps)
    train_diffusion(data, pipeline, args.work / "diffusion", args.epochs)
    if args.out:
        parts = ("text_encoder", "diffusion_model", "decoder", "image_encoder")
        models = {part: getattr(pipeline, part) for part in parts}
        save_diffusers(args.out, config, models, tokenizer)
        write_lines(args.out / "subjects.txt", names)
        write_lines(args.out / "words.txt", words)
        print(f"wrote {args.out}")


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="what scripts/emoji/first/emoji_data.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument("--init", type=Path, help="go on from all parts of this --out of before")
    parser.add_argument("--vae", type=Path, help="diffusers folder: start from its VAE")
    parser.add_argument(
        "--vae-epochs",
        type=int,
        help=f"default: {VAE_EPOCHS}; 0 takes the one of --vae; with --init default 0, else only "
        "the decoder learns, because the UNet knows the encoder's latents",
    )
    parser.add_argument("--text-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=500, help="steps an epoch")
    args = parser.parse_args(argv)
    if args.vae_epochs is None:
        args.vae_epochs = 0 if args.init else VAE_EPOCHS
    has_vae = bool(args.vae or args.init)
    if min(args.vae_epochs or has_vae, args.text_epochs, args.epochs, args.steps) < 1:
        parser.error("epochs and steps must be at least 1")
    if args.init and args.vae:
        parser.error("--init comes with a VAE of its own")
    try:
        train(args)
    except (OSError, ValueError) as error:
        print(f"train_emoji: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
