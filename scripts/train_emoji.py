"""Trains the embedded checkpoint: a small Stable Diffusion that draws emoji, from nothing.

    python scripts/emoji_data.py --out emoji.npz
    python scripts/train_emoji.py emoji.npz --work runs/emoji --out weights/emoji

First the VAE learns to compress pictures, then the text encoder and the UNet learn together to
remove noise from its latents. Every stage is plain Keras: a model, `compile` and `fit`. All of it
happens in `--work`; a run that was stopped goes on from the last epoch when the command is given
again. Each epoch leaves a grid of samples there. `--out` gets the result, a diffusers folder.
"""

import argparse
import gzip
import importlib.util
from dataclasses import replace
from itertools import islice
from pathlib import Path

import keras
import numpy as np
from keras import ops
from PIL import Image

from stable_diffusion import Decoder, ImageEncoder, NoiseScheduler, SimpleTokenizer, StableDiffusion
from stable_diffusion.checkpoints.config import Config, TextConfig, UNetConfig, VAEConfig
from stable_diffusion.checkpoints.diffusers import save_diffusers
from stable_diffusion.checkpoints.presets import original
from stable_diffusion.clip_tokenizer import NUM_PAIRS, WEIGHTS_DIR
from stable_diffusion.noise_scheduler import timestep_embedding

here = Path(__file__)
spec = importlib.util.spec_from_file_location("emoji_data", here.with_name("emoji_data.py"))
emoji = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emoji)

SIZE = 128  # pixels, 16x16 latent cells
LENGTH = 77  # tokens
CONFIG = original(
    Config(
        text=TextConfig(width=128, depth=3, heads=4, hidden=512),
        unet=UNetConfig(
            widths=(64, 128, 128),
            heads=(2, 4, 4),
            attention=(True, True, True),
            context_width=128,
            res_blocks=1,
        ),
        vae=VAEConfig(widths=(16, 32, 64, 96), res_blocks=1, groups=8, scaling_factor=1.0),
        size=SIZE,
    )
)
# With the linear schedule almost nothing is left of the picture at the last timestep, so sampling
# may start there, from pure noise: "trailing" does.
SCHEDULE = NoiseScheduler(clip_sample=False, prediction_type="v_prediction", spacing="trailing")
# Fruits and faces of animals: from one name to another in the font's order.
SUBJECTS = (("melon", "strawberry"), ("mouse face", "panda"))
KL_WEIGHT = 1e-6
UNCONDITIONAL = 0.1  # share of captions dropped, for classifier-free guidance
PLACES = [(None, None), ("small", None)]  # sizes and sides, see emoji_data.py
PLAIN = 0.75  # share of the first of them
PROMPTS = [
    "a red apple on a blue background",
    "a cat face on a green background",
    "a banana on a red background",
    "a panda on a purple background",
    "a small dog face on a white background",
    "a frog on a pink background",
    "a strawberry on a black background",
    "lemon on blue",
]


def to_float(pictures):
    """Maps uint8 pictures to float32 in [-1, 1]."""
    return pictures.astype("float32") / 127.5 - 1.0


def save_grid(path, pictures, columns):
    """Writes pictures, `(N, H, W, 3)` in [-1, 1], as one PNG."""
    pictures = np.clip((np.asarray(pictures, "float32") + 1) * 127.5, 0, 255).astype("uint8")
    rows = [np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def fit(model, data, epochs, folder, callbacks):
    """Fits, leaving a checkpoint each epoch; goes on from the newest one in `folder`."""
    keep = keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)
    log = keras.callbacks.CSVLogger(folder / "log.csv", append=True)
    model.fit(data, epochs=epochs, verbose=2, callbacks=[keep, log, *callbacks])


def subjects(path):
    """Returns names and pictures of the prepared data that are in `SUBJECTS`."""
    names, pictures = emoji.load(path)
    keep = [i for a, b in SUBJECTS for i in range(names.index(a), names.index(b) + 1)]
    return [names[i] for i in keep], pictures[keep]


class Crops(keras.utils.PyDataset):
    """Random pictures for the VAE, cut to `side` pixels; epoch and index determine them."""

    def __init__(self, names, pictures, batch_size, steps, side):
        super().__init__()
        self.names, self.pictures = names, pictures
        self.batch_size, self.steps, self.side, self.epoch = batch_size, steps, side, 0

    def __len__(self):
        return self.steps

    def on_epoch_begin(self):
        self.epoch += 1

    def __getitem__(self, index):
        rng = np.random.default_rng((self.side, self.epoch, index))
        batch = []
        for _ in range(self.batch_size):
            picture, _ = emoji.sample(rng, self.names, self.pictures)
            y, x = rng.integers(0, SIZE - self.side + 1, 2)
            batch.append(picture[y : y + self.side, x : x + self.side])
        batch = to_float(np.stack(batch))
        return batch, batch


class Autoencoder(keras.Model):
    """Encodes to the posterior's moments, samples a latent, decodes it."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = keras.Model(encoder.inputs[0], encoder.layers[-2].output)
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
    """Mean absolute plus mean squared error: sharp edges and right colours."""
    error = y_true - y_pred
    return ops.mean(ops.abs(error) + ops.square(error), axis=(1, 2, 3))


def train_vae(names, pictures, folder, epochs, steps):
    """Trains on crops, because they cost a quarter of a picture; returns encoder and decoder."""
    folder.mkdir(parents=True, exist_ok=True)
    side = SIZE // 2
    encoder = ImageEncoder(download_weights=False, config=CONFIG.vae)
    decoder = Decoder(SIZE, SIZE, download_weights=False, config=CONFIG.vae)
    of_crops = Decoder(side, side, download_weights=False, config=CONFIG.vae)
    model = Autoencoder(encoder, of_crops)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * steps, 0.01, warmup_target=1e-3, warmup_steps=200
    )
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=reconstruction_loss)
    rng = np.random.default_rng(0)
    shown = [emoji.sample(rng, names, pictures, "held_out")[0] for _ in range(16)]
    shown = to_float(np.stack(shown))

    def sample(epoch, logs):
        decoder.set_weights(of_crops.get_weights())
        mean = ops.split(model.encoder(shown), 2, axis=-1)[0]
        decoded = np.clip(ops.convert_to_numpy(decoder(mean)), -1, 1)
        error = np.mean((decoded - shown) ** 2, axis=(1, 2, 3)) / 4
        print(f"held-out pairs: PSNR {np.mean(-10 * np.log10(error)):.2f} dB", flush=True)
        save_grid(folder / f"epoch_{epoch + 1:03}.png", np.concatenate([shown, decoded]), 16)

    show = keras.callbacks.LambdaCallback(on_epoch_end=sample)
    fit(model, Crops(names, pictures, 16, steps, side), epochs, folder, [show])
    decoder.set_weights(of_crops.get_weights())
    return encoder, decoder


def encode_pictures(names, pictures, encoder, cache):
    """Encodes every subject on every background, in each size and place; held-out pairs aside.

    Returns:
        Latents, float32 `(N, 16, 16, 4)` of unit variance; what each shows, N tuples
        `(name, colour, size, side)`; and the factor that gave them unit variance.
    """
    shown = [
        (i, colour, size, side)
        for i, name in enumerate(names)
        for colour in emoji.COLOURS
        if not emoji.held_out(name, colour)
        for size, side in PLACES
    ]

    def picture(i, colour, size, side):
        offset = emoji.SIDES[side][1] if side else (0, 0)
        return emoji.compose(pictures[i], emoji.COLOURS[colour], emoji.SCALES[size], offset)

    if not cache.exists():
        batches = [shown[start : start + 64] for start in range(0, len(shown), 64)]
        encoded = [
            encoder.predict_on_batch(to_float(np.stack([picture(*what) for what in batch])))
            for batch in batches
        ]
        np.save(cache, np.concatenate(encoded))
    latents = np.load(cache)
    factor = float(1 / latents.std())
    return latents * factor, [(names[i], *rest) for i, *rest in shown], factor


def write_vocabulary(names, path):
    """Writes the part of CLIP's BPE vocabulary that the captions need; returns its tokenizer.

    A pair is kept if what it joins occurs in a word of the captions, so that these words have the
    pieces they have with the whole vocabulary. Other words are spelled in shorter pieces.
    """
    captions = [emoji.caption(name, colour) for name in names for colour in emoji.COLOURS]
    captions += ["an emoji of a picture of a small large on the left right at the top bottom, of"]
    text = " ".join({f"{word}</w>" for caption in captions for word in caption.split()})
    whole = WEIGHTS_DIR / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(whole, "rt", encoding="utf-8") as file:
        pairs = islice(file, 1, 1 + NUM_PAIRS)
        needed = [pair for pair in pairs if pair.replace(" ", "").strip() in text]
    path.write_text("#version: 0.2\n" + "".join(needed), encoding="utf-8")
    return SimpleTokenizer(path)


class NoisyLatents(keras.utils.PyDataset):
    """Batches of noisy latents with their captions, and the v that the UNet is to predict."""

    def __init__(self, latents, shown, tokenizer, batch_size, steps):
        super().__init__()
        self.latents, self.shown, self.tokenizer = latents, shown, tokenizer
        self.batch_size, self.steps, self.epoch = batch_size, steps, 0
        plain = np.array([size is None for _, _, size, _ in shown])
        self.weight = np.where(plain, PLAIN / plain.sum(), (1 - PLAIN) / (~plain).sum())

    def __len__(self):
        return self.steps

    def on_epoch_begin(self):
        self.epoch += 1

    def tokens(self, rng, name, colour, size, side):
        dropped = rng.random() < UNCONDITIONAL
        ids = self.tokenizer.encode("" if dropped else emoji.caption(name, colour, rng, size, side))
        return ids + [self.tokenizer.end_of_text] * (LENGTH - len(ids))

    def __getitem__(self, index):
        rng = np.random.default_rng((self.epoch, index))
        chosen = rng.choice(len(self.shown), self.batch_size, p=self.weight)
        timesteps = rng.integers(0, len(SCHEDULE), self.batch_size)
        alpha = SCHEDULE.alphas_cumprod[timesteps][:, None, None, None].astype("float32")
        x0 = self.latents[chosen]
        noise = rng.standard_normal(x0.shape, dtype="float32")
        inputs = {
            "latent": alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise,
            "timestep_embedding": timestep_embedding(timesteps, CONFIG.unet.widths[0]),
            "tokens": np.array([self.tokens(rng, *self.shown[i]) for i in chosen], "int32"),
            "positions": np.tile(np.arange(LENGTH, dtype="int32"), (self.batch_size, 1)),
        }
        return inputs, alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0


def train_diffusion(data, pipeline, folder, epochs):
    """Trains text encoder and UNet jointly; the moving average of their parameters is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    text_encoder, unet = pipeline.text_encoder, pipeline.diffusion_model
    latent, time, _ = unet.inputs
    inputs = [latent, time, *text_encoder.inputs]
    model = keras.Model(
        {tensor.name: tensor for tensor in inputs}, unet([latent, time, text_encoder.output])
    )
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * data.steps, 0.01, warmup_target=8e-4, warmup_steps=data.steps
    )
    optimizer = keras.optimizers.AdamW(
        rate, weight_decay=1e-3, clipnorm=1.0, use_ema=True, ema_momentum=0.995
    )
    model.compile(optimizer, loss="mse")

    def sample(epoch, logs):
        pictures = pipeline.text_to_image(PROMPTS, num_steps=20, seed=[0] * len(PROMPTS), verbose=0)
        save_grid(folder / f"epoch_{epoch + 1:03}.png", to_float(pictures), len(PROMPTS))

    averaged = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    show = keras.callbacks.LambdaCallback(on_epoch_end=sample)
    fit(model, data, epochs, folder, [averaged, show])


def main():
    """Trains what is not trained yet, and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="what scripts/emoji_data.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument("--vae-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="steps an epoch")
    args = parser.parse_args()
    names, pictures = subjects(args.data)
    encoder, decoder = train_vae(names, pictures, args.work / "vae", args.vae_epochs, args.steps)
    cache = args.work / "latents.npy"
    latents, shown, factor = encode_pictures(names, pictures, encoder, cache)
    tokenizer = write_vocabulary(names, args.work / "merges.txt")
    print(f"{len(latents)} latents times {factor:.4f}, {len(tokenizer.vocab)} tokens", flush=True)

    config = replace(
        CONFIG,
        text=replace(CONFIG.text, vocab_size=len(tokenizer.vocab)),
        vae=replace(CONFIG.vae, scaling_factor=factor),
        schedule=SCHEDULE,
    )
    pipeline = StableDiffusion(jit_compile=False, weights=None, config=config)
    pipeline._tokenizer = tokenizer
    pipeline.decoder.set_weights(decoder.get_weights())
    pipeline.image_encoder.set_weights(encoder.get_weights())
    data = NoisyLatents(latents, shown, tokenizer, 32, args.steps)
    train_diffusion(data, pipeline, args.work / "diffusion", args.epochs)
    if args.out:
        parts = ("text_encoder", "diffusion_model", "decoder", "image_encoder")
        models = {part: getattr(pipeline, part) for part in parts}
        save_diffusers(args.out, config, models, tokenizer)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
