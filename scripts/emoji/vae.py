"""The VAE of the embedded checkpoint, and how it is trained."""

import keras
import numpy as np
import torch
import torch_ops
from compositions import CELL, SIZE, draw_scene, draw_variation
from training import THREADS, Training, fall, save_grid, to_float, to_uint8

from stable_diffusion import Decoder, ImageEncoder
from stable_diffusion.config import VAEConfig

CONFIG = VAEConfig(
    widths=(32, 64, 96, 112),
    res_blocks=1,
    latent_channels=12,
    groups=8,
    norm_epsilon=1e-6,  # as diffusers has it
    scaling_factor=1.0,
)

# It learns from crops first, which have no plain half, then from whole pictures.
CROP = SIZE // 2
CROP_STEPS, CROP_BATCH = 5000, 16
WHOLE_STEPS, WHOLE_BATCH = 2000, 4
STEPS = CROP_STEPS + WHOLE_STEPS
RATE, WARMUP, STEADY = 1e-3, 200, 0.4  # the rate's peak, the steps up to it, its share of steps
KL_WEIGHT = 3e-3
SQUARE_WEIGHT, EDGE_WEIGHT = 5.0, 1.0  # beside the mean absolute error
NOISE = 0.15  # most of the noise that half of the latents get, in their standard deviations
FREE_SHARE = 0.25  # of its pictures have subjects anywhere, not on the grid
SHOW_STEPS = 1000


def draw_picture(rng, sprites):
    """Draws a training picture for the VAE, uint8 `(128, 128, 3)`."""
    scene = draw_scene(rng, sprites.names)
    if rng.random() >= FREE_SHARE:
        return sprites.draw(scene, **draw_variation(rng, scene))
    spots = []
    for name, fill, _ in scene.spots():
        room = (SIZE - fill) // 2
        spots.append((name, fill, tuple(rng.integers(-room, room + 1, 2))))
    mirrored = tuple(rng.random(2) < 0.5)
    return sprites.draw_spots(spots, scene.colour, scene.style, mirrored)


def draw_crop(rng, sprites):
    """Draws a part of such a picture that isn't plain, uint8 `(64, 64, 3)`."""
    picture = draw_picture(rng, sprites)
    for _ in range(8):
        y, x = CELL * rng.integers(0, (SIZE - CROP) // CELL + 1, 2)
        crop = picture[y : y + CROP, x : x + CROP]
        if (crop != crop[0, 0]).any(-1).mean() > 0.3:
            break
    return crop


def differences(x):
    """Returns the differences between neighbouring pixels of `(B, H, W, C)`, down and across."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


class VAE:
    """The encoder to the posterior's moments, and the decoder."""

    def __init__(self, config=CONFIG):
        self.config = config
        self.image_encoder = ImageEncoder(download_weights=False, config=config)
        self.encoder = keras.Model(
            self.image_encoder.inputs[0], self.image_encoder.layers[-2].output
        )
        self.decoder = Decoder(SIZE, SIZE, download_weights=False, config=config)
        torch_ops.order_kernels(self.image_encoder)
        torch_ops.order_kernels(self.decoder)

    def decode(self, latent):
        """Decodes latents of any size, layer by layer: the model itself takes whole ones only."""
        for layer in self.decoder.layers:
            latent = layer(latent)
        return latent

    def variables(self):
        """Returns the variables that are trained."""
        return self.encoder.trainable_variables + self.decoder.trainable_variables

    def compute_loss(self, pictures, generator):
        """Encodes, samples, decodes and compares: a scalar tensor.

        Args:
            pictures: float32 `(B, H, W, 3)`.
            generator: PyTorch's, of the noise.
        """
        mean, log_variance = self.encoder(pictures).float().chunk(2, -1)
        log_variance = log_variance.clamp(-30, 20)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        most = NOISE * mean.detach().std()
        more = most * torch.rand((len(mean), 1, 1, 1), generator=generator)
        more = more * (torch.rand(more.shape, generator=generator) < 0.5)
        deviation = (log_variance.exp() + more.square()).sqrt()
        latent = mean + deviation * torch.randn(mean.shape, generator=generator)
        error = self.decode(latent).float() - pictures
        loss = error.abs().mean() + SQUARE_WEIGHT * error.square().mean() + KL_WEIGHT * kl
        return loss + EDGE_WEIGHT * sum(some.abs().mean() for some in differences(error))

    @torch.no_grad()
    def reconstruct(self, pictures, batch_size=8):
        """Encodes and decodes uint8 pictures; returns uint8."""
        done = []
        for start in range(0, len(pictures), batch_size):
            moments = self.encoder(to_float(pictures[start : start + batch_size])).float()
            done.append(to_uint8(self.decoder(moments.chunk(2, -1)[0])))
        return np.concatenate(done)


def train_vae(vae, sprites, folder, export=False):
    """Trains a `VAE`, or goes on with it; leaves the average of its parameters in it.

    Args:
        vae: the `VAE`.
        sprites: the `Sprites`.
        folder: of the checkpoint, the log and the samples.
        export: whether to leave it as far as it is.
    """

    def compute_loss(step, part):
        rng = np.random.default_rng((step, part))
        is_crop = step < CROP_STEPS
        count = (CROP_BATCH if is_crop else WHOLE_BATCH) // THREADS
        draw = draw_crop if is_crop else draw_picture
        pictures = to_float(np.stack([draw(rng, sprites) for _ in range(count)]))
        generator = torch.Generator().manual_seed(step * THREADS + part)
        return vae.compute_loss(pictures, generator)

    rng = np.random.default_rng(0)
    kinds = ["plain"] * 8 + ["large", "small", "place", "place"] + ["pair"] * 4
    scenes = [draw_scene(rng, sprites.names, True, kind) for kind in kinds]
    shown = np.stack([sprites.draw(scene) for scene in scenes])

    def show():
        decoded = vae.reconstruct(shown)
        save_grid(folder / f"step_{training.step:06}.png", [*shown, *decoded], len(shown))
        error = np.mean((decoded.astype(float) - shown) ** 2, axis=(1, 2, 3))
        ratios = [edge_energy(d) / edge_energy(s) for d, s in zip(decoded, shown, strict=True)]
        with torch.no_grad():
            mean, log_variance = vae.encoder(to_float(shown)).float().chunk(2, -1)
        print(
            f"held out: PSNR {np.mean(10 * np.log10(255**2 / error)):.2f} dB, edges "
            f"{np.mean(ratios):.3f}, latents' deviation {mean.std():.3f}, posterior's "
            f"{(0.5 * log_variance).exp().mean():.3f}",
            flush=True,
        )

    def rate(step):
        return fall(step, STEPS, WARMUP, RATE, STEADY)

    training = Training(folder, vae.variables(), compute_loss, rate)
    print(f"VAE: {vae.image_encoder.count_params() + vae.decoder.count_params():,} parameters")
    training.run(0 if export else STEPS, show, SHOW_STEPS)
    training.swap()


def edge_energy(picture):
    """Returns the mean squared difference between neighbouring pixels of a uint8 picture."""
    x = picture.astype("float64")
    return np.mean(np.diff(x, axis=0) ** 2) + np.mean(np.diff(x, axis=1) ** 2)
