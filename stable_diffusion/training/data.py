"""Noisy latents and what the diffusion model is to predict of them, batch by batch.

Each item of a batch has its own random numbers, which follow from the run's seed and from the
item's place in the run alone. So a batch is the same wherever and whenever it is drawn: after a
run was stopped, and in whichever process.

In comments on shapes, B is the number of items, h w are latent cells, C its channels.
"""

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from stable_diffusion.noise_scheduler import (
    NoiseScheduler,
    diffuse,
    join_prediction,
    timestep_embedding,
)
from stable_diffusion.training.cache import Cache
from stable_diffusion.training.folder import Example

LOG_VARIANCE = -30.0, 20.0  # where CompVis' DiagonalGaussianDistribution clips it


@dataclass(frozen=True)
class Stream:
    """One of the sources that a batch is made of.

    Attributes:
        examples: as `Cache.encode` returns them.
        weight: of these items in the loss: that of prior preservation for pictures of the class.
    """

    examples: list[Example]
    weight: float = 1.0


class NoisyLatents(keras.utils.PyDataset):
    """Batches `(inputs, targets, weights)` for a model of `methods`.

    The inputs are `latent` `(B, h, w, C)`, `timestep_embedding` `(B, E)` and `context` `(B, 77, D)`
    or, with `tokenize`, `tokens` and `positions` `(B, 77)`. Every picture comes equally often.

    Args:
        cache: the `Cache` with latents and contexts.
        streams: list of `Stream`. A batch has `batch_size` items of each.
        schedule: the `NoiseScheduler` that the model was trained with.
        batch_size: items of each stream, over all processes.
        steps: batches an epoch; None is once through the first stream.
        first_step: number of the first batch of epoch 0, for a run that goes on.
        seed: of everything random.
        dropout: share of captions that are replaced by the empty one, for guidance.
        offset: strength of the noise that is the same in all cells of a channel
            (https://www.crosslabs.org/blog/diffusion-with-offset-noise); 0 is without.
        snr_gamma: see `min_snr_weight`; None weighs all timesteps alike.
        tokenize: function from a caption to its token ids `(77,)`, where the text encoder is a part
            of the model that is trained; None takes contexts from the cache.
        process: index of this process, and number of processes. Each gets its equal part of a
            batch.

    Raises:
        ValueError: numbers that can't be, or a batch that can't be divided among the processes.
    """

    def __init__(
        self,
        cache: Cache,
        streams: list[Stream],
        schedule: NoiseScheduler,
        batch_size: int = 4,
        steps: int | None = None,
        first_step: int = 0,
        seed: int = 0,
        dropout: float = 0.1,
        offset: float = 0.0,
        snr_gamma: float | None = None,
        tokenize=None,
        process: tuple[int, int] = (0, 1),
    ):
        super().__init__()
        if batch_size < 1 or not 0 <= dropout <= 1 or offset < 0:
            raise ValueError(
                f"batch_size must be from 1, dropout from 0 to 1 and offset from 0, not "
                f"{batch_size}, {dropout} and {offset}."
            )
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"snr_gamma must be None or above 0, not {snr_gamma}.")
        if batch_size * len(streams) % process[1]:
            raise ValueError(
                f"A batch of {batch_size * len(streams)} can't be divided among {process[1]} "
                f"processes."
            )
        self.cache, self.streams, self.schedule = cache, streams, schedule
        self.batch_size, self.seed, self.first_step = batch_size, seed, first_step
        self.steps = steps or -(-len(streams[0].examples) // batch_size)
        self.dropout, self.offset, self.snr_gamma = dropout, offset, snr_gamma
        self.tokenize, self.process, self.epoch = tokenize, process, 0

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch):
        """Sets the number of the epoch, from 0, of the batches that are drawn next."""
        self.epoch = epoch

    def __getitem__(self, index):
        step = self.first_step + self.epoch * self.steps + index
        process, count = self.process
        places = [
            (number, step * self.batch_size + n)
            for number in range(len(self.streams))
            for n in range(self.batch_size)
        ]
        share = len(places) // count
        return self.draw(places[process * share : (process + 1) * share])

    def draw(self, places):
        """Draws the items at places in the run: tuples of a stream's number and a place in it."""
        chosen = [self._choose(number, place) for number, place in places]
        x0, noise = np.stack([c[0] for c in chosen]), np.stack([c[1] for c in chosen])
        timesteps, texts = np.array([c[2] for c in chosen]), [c[3] for c in chosen]
        latent, target = make_targets(self.schedule, x0, noise, timesteps)
        width = self.cache.pipeline.config.unet.widths[0]
        inputs = {"latent": latent, "timestep_embedding": timestep_embedding(timesteps, width)}
        if self.tokenize:
            inputs["tokens"] = np.array([self.tokenize(text) for text in texts], "int32")
            length = inputs["tokens"].shape[1]
            inputs["positions"] = np.tile(np.arange(length, dtype="int32"), (len(places), 1))
        else:
            inputs["context"] = np.stack([self.cache.context(text) for text in texts])
        # The mean over a batch of several streams is to be the sum of the streams' means.
        weights = np.array([self.streams[n].weight for n, _ in places]) * len(self.streams)
        if self.snr_gamma is not None:
            weights = weights * min_snr_weight(self.schedule, timesteps, self.snr_gamma)
        return inputs, target, weights.astype("float32")

    def _choose(self, number, place):
        """Returns x0, noise, timestep and caption of an item."""
        examples = self.streams[number].examples
        turn, place_in_turn = divmod(place, len(examples))
        order = np.random.default_rng((self.seed, number, turn, 0)).permutation(len(examples))
        example = examples[order[place_in_turn]]
        rng = np.random.default_rng((self.seed, number, place, 1))
        views = self.cache.views(example)
        moments = self.cache.moments(example, views[rng.integers(len(views))])
        x0 = sample_posterior(moments, rng) * np.float32(
            self.cache.pipeline.config.vae.scaling_factor
        )
        timestep = int(rng.integers(len(self.schedule)))
        noise = rng.standard_normal(x0.shape, dtype="float32")
        if self.offset:
            noise += np.float32(self.offset) * rng.standard_normal(x0.shape[-1], dtype="float32")
        text = example.captions[rng.integers(len(example.captions))]
        return x0, noise, timestep, "" if rng.random() < self.dropout else text


def sample_posterior(moments, rng):
    """Draws a latent from the VAE's posterior.

    Args:
        moments: `(h, w, 2 C)`, mean and log variance.
        rng: numpy Generator.

    Returns:
        float32 `(h, w, C)`, not scaled to unit variance yet.

    Reference: Kingma and Welling 2014, https://arxiv.org/abs/1312.6114, section 2.4.
    """
    mean, log_variance = np.split(moments, 2, axis=-1)
    deviation = np.exp(0.5 * np.clip(log_variance, *LOG_VARIANCE))
    return mean + deviation * rng.standard_normal(mean.shape, dtype="float32")


def make_targets(schedule: NoiseScheduler, x0, noise, timesteps):
    """Adds noise, and computes what the model should predict.

    Args:
        schedule: with the `prediction_type`.
        x0, noise: float32 `(B, h, w, C)`.
        timesteps: ints `(B,)`.

    Returns:
        The noisy latents and the targets, float32 `(B, h, w, C)` both; see
        `noise_scheduler.diffuse` and `noise_scheduler.join_prediction`.
    """
    alpha = schedule.alphas_cumprod[timesteps][:, None, None, None]  # (B, 1, 1, 1), float64
    noisy = diffuse(x0, noise, alpha)
    target = join_prediction(x0, noise, alpha, schedule.prediction_type)
    return noisy.astype("float32"), target.astype("float32")


def min_snr_weight(schedule: NoiseScheduler, timesteps, gamma=5.0):
    """Weighs timesteps so that nearly clean ones don't dominate: min(SNR, gamma), for x0.

    Args:
        schedule: with the `prediction_type`, by which the loss already has a weight in terms of x0:
            SNR for "epsilon", SNR + 1 for "v_prediction". It is divided out.
        timesteps: ints `(B,)`.
        gamma: the most that a timestep weighs.

    Returns:
        float64 `(B,)`.

    Reference: Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4.
    """
    alpha = schedule.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    own = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[schedule.prediction_type]
    return np.minimum(snr, gamma) / own


def denoising_loss(y_true, y_pred):
    """Mean squared error of each item: `(B, h, w, C)` twice to `(B,)`, in float32."""
    error = ops.cast(y_true, "float32") - ops.cast(y_pred, "float32")
    return ops.mean(ops.square(error), axis=(1, 2, 3))


class StepLoss(keras.metrics.Metric):
    """The loss of the last batch, where Keras' own is the mean of the epoch so far."""

    def __init__(self, name="step_loss"):
        super().__init__(name=name)
        self.value = self.add_variable((), initializer="zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        loss = denoising_loss(y_true, y_pred)
        self.value.assign(ops.mean(loss if sample_weight is None else loss * sample_weight))

    def result(self):
        return ops.convert_to_tensor(self.value)
