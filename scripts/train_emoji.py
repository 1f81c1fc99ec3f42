"""Trains the embedded checkpoint: a small Stable Diffusion that draws emoji, from nothing.

    python scripts/emoji_data.py --out emoji.npz
    python scripts/train_emoji.py emoji.npz --work runs/emoji --out weights/emoji

First the VAE learns to compress pictures, then the text encoder and the UNet learn together to
remove noise from its latents. Every stage is plain Keras: a model, `compile` and `fit`. All of it
happens in `--work`; a run that was stopped goes on from the last epoch when the command is given
again. Each epoch leaves a grid of samples there. `--out` gets the result, a diffusers folder.
"""

import argparse
import importlib.util
from pathlib import Path

import keras
import numpy as np
from keras import ops
from PIL import Image

from stable_diffusion import config as sd
from stable_diffusion.clip_tokenizer import WEIGHTS_DIR, SimpleTokenizer
from stable_diffusion.decoder import Decoder
from stable_diffusion.diffusion_model import DiffusionModel
from stable_diffusion.image_encoder import ImageEncoder
from stable_diffusion.noise_scheduler import NoiseScheduler, timestep_embedding
from stable_diffusion.text_encoder import TextEncoder

spec = importlib.util.spec_from_file_location("emoji_data", Path(__file__).with_name("emoji_data.py"))
emoji = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emoji)

SIZE = 128  # pixels, 16x16 latent cells
LENGTH = 77
CONFIG = sd.original(
    sd.Config(
        text=sd.TextConfig(width=128, depth=3, heads=4, hidden=512),
        unet=sd.UNetConfig(
            widths=(64, 128, 128),
            heads=(2, 4, 4),
            attention=(True, True, True),
            context_width=128,
            res_blocks=1,
        ),
        vae=sd.VAEConfig(widths=(16, 32, 64, 96), res_blocks=1, groups=8, scaling_factor=1.0),
        schedule=sd.ScheduleConfig(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="linear",
            prediction_type="v_prediction",
        ),
        size=SIZE,
    )
)
# Plants, food and animals: from one name to another in the font's order.
SUBJECTS = (("hot dog", "birthday cake"), ("rat", "paw prints"))
KL_WEIGHT = 1e-6
UNCONDITIONAL = 0.1  # share of captions dropped, for classifier-free guidance


def to_float(pictures):
    """Maps uint8 pictures to float32 in [-1, 1]."""
    return pictures.astype("float32") / 127.5 - 1.0


def save_grid(path, pictures, columns):
    """Writes pictures, `(N, H, W, 3)` in [-1, 1], as one PNG."""
    pictures = np.clip((np.asarray(pictures, "float32") + 1) * 127.5, 0, 255).astype("uint8")
    rows = [np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


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
        self.encoder = keras.Model(encoder.inputs, encoder.layers[-2].output)
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


def fit(model, data, epochs, folder, callbacks=()):
    """Fits, leaving a checkpoint each epoch; goes on from the newest one in `folder`."""
    keep_on = keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)
    log = keras.callbacks.CSVLogger(folder / "log.csv", append=True)
    model.fit(data, epochs=epochs, verbose=2, callbacks=[keep_on, log, *callbacks])


def subjects(path):
    """Returns names and pictures of the prepared data that are in `SUBJECTS`."""
    names, pictures = emoji.load(path)
    keep = [i for a, b in SUBJECTS for i in range(names.index(a), names.index(b) + 1)]
    return [names[i] for i in keep], pictures[keep]


def train_vae(names, pictures, folder, epochs, steps):
    """Trains on crops, most of the time, because they cost a quarter of a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = ImageEncoder(download_weights=False, config=CONFIG.vae)
    decoder = Decoder(SIZE, SIZE, download_weights=False, config=CONFIG.vae)
    side = SIZE // 2
    small = Decoder(side, side, download_weights=False, config=CONFIG.vae)
    model = Autoencoder(encoder, small)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * steps, 0.01, warmup_target=1e-3, warmup_steps=200
    )
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss=reconstruction_loss)
    rng = np.random.default_rng(0)
    shown = to_float(
        np.stack([emoji.sample(rng, names, pictures, "held_out")[0] for _ in range(16)])
    )

    def sample(epoch, logs):
        decoder.set_weights(small.get_weights())
        mean = ops.split(model.encoder(shown), 2, axis=-1)[0]
        decoded = ops.convert_to_numpy(decoder(mean))
        error = np.mean((np.clip(decoded, -1, 1) - shown) ** 2, axis=(1, 2, 3)) / 4
        print(f"held-out pairs: PSNR {np.mean(-10 * np.log10(error)):.2f} dB", flush=True)
        save_grid(folder / f"epoch_{epoch + 1:03}.png", np.concatenate([shown, decoded]), 16)

    show = keras.callbacks.LambdaCallback(on_epoch_end=sample)
    fit(model, Crops(names, pictures, 16, steps, side), epochs, folder, [show])
    decoder.set_weights(small.get_weights())
    return encoder, decoder


if __name__ == "__main__":
    import sys

    names, pictures = subjects(sys.argv[1])
    print(len(names))
    train_vae(names, pictures, Path(sys.argv[2]) / "vae", 14, 200)
