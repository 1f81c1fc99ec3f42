"""Batches for training: noisy latents, and the targets that the diffusion model should predict.

Each item of a batch has its own random numbers. They depend only on the seed of the run and on the
item's place in the run. So a batch is the same in a run that was stopped and goes on, and in any
number of processes.
"""

import hashlib
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

LOG_VARIANCE = -30.0, 20.0  # limits, those of CompVis' DiagonalGaussianDistribution


@dataclass(frozen=True)
class Stream:
    """A source of items. A batch has items of each stream.

    Attributes:
        examples: list of `Example`, see `Cache.encode_examples`.
        weight: weight of these items in the loss. DreamBooth weighs images of the class so.
    """

    examples: list[Example]
    weight: float = 1.0


def hash_streams(streams: list[Stream]) -> str:
    """Returns a hash of images and captions, which tells whether they have changed.

    Args:
        streams: list of `Stream`, whose examples have digests.
    """
    content = [
        [(example.digest, example.captions, example.repeats) for example in stream.examples]
        for stream in streams
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()


class NoisyLatents(keras.utils.PyDataset):
    """Makes batches `(inputs, targets, weights)` for the model of a `Method`.

    The inputs are a dict: `latent` `(B, h, w, C)`, `timestep_embedding` `(B, E)` and `context`
    `(B, 77, D)`; with `tokenize`, `tokens` and `positions` `(B, 77)` instead of `context`. The
    targets are `(B, h, w, C)`, the weights in the loss `(B,)`. All images occur equally often,
    or as often as their `repeats` say.

    Args:
        cache: the `Cache` with latents and contexts.
        streams: list of `Stream`. A batch has `batch_size` items of each.
        schedule: the `NoiseScheduler` of the checkpoint.
        batch_size: number of items of each stream, over all processes.
        steps: number of batches in an epoch. None is as many as the first stream needs.
        first_step: number of the first batch of epoch 0, for a run that goes on.
        seed: seed of all random numbers.
        dropout: share of captions that are replaced by the empty one, which guidance needs.
        offset: strength of additional noise that is the same in all cells of a channel
            (https://www.crosslabs.org/blog/diffusion-with-offset-noise). 0 is none.
        snr_gamma: see `compute_snr_weights`. None gives all timesteps the same weight.
        tokenize: function from a caption to its token ids `(77,)`, if the model that is trained
            contains the text encoder. None reads contexts from the cache.
        process: index of this process, and number of processes. Each gets an equal part of a
            batch.

    Raises:
        ValueError: a number is out of range, a batch cannot be divided among the processes, or
            `tokenize` finds a caption too long.
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
                f"batch_size must be 1 or more, dropout from 0 to 1 and offset 0 or more, not "
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
        self.examples = [
            [example for example in stream.examples for _ in range(example.repeats)]
            for stream in streams
        ]
        if tokenize:
            for text in {
                text for stream in streams for e in stream.examples for text in e.captions
            }:
                tokenize(text)  # raises the error before the first step
        self.batch_size, self.seed, self.first_step = batch_size, seed, first_step
        self.steps = steps or -(-len(self.examples[0]) // batch_size)
        self.dropout, self.offset, self.snr_gamma = dropout, offset, snr_gamma
        self.tokenize, self.process, self.epoch = tokenize, process, 0

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch):
        """Sets the number of the epoch, from 0, to which the next batches belong."""
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
        return self.make_batch(places[process * share : (process + 1) * share])

    def make_batch(self, places):
        """Returns the batch of some places in the run: pairs of a stream's number and a place."""
        chosen = [self._make_item(number, place) for number, place in places]
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
            inputs["context"] = np.stack([self.cache.read_context(text) for text in texts])
        # Keras computes the mean over the batch. We want the sum of the means of all streams.
        weights = np.array([self.streams[n].weight for n, _ in places]) * len(self.streams)
        if self.snr_gamma is not None:
            weights = weights * compute_snr_weights(self.schedule, timesteps, self.snr_gamma)
        return inputs, target, weights.astype("float32")

    def _make_item(self, number, place):
        """Returns clean latent, noise, timestep and caption for a place in a stream."""
        examples = self.examples[number]
        turn, place_in_turn = divmod(place, len(examples))
        order = np.random.default_rng((self.seed, number, turn, 0)).permutation(len(examples))
        example = examples[order[place_in_turn]]
        rng = np.random.default_rng((self.seed, number, place, 1))
        views = self.cache.list_views(example)
        moments = self.cache.read_moments(example, views[rng.integers(len(views))])
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
    """Samples a latent from the VAE's posterior.

    Args:
        moments: float32 `(h, w, 2 C)`, mean and log variance.
        rng: a numpy Generator.

    Returns:
        float32 `(h, w, C)`, not scaled to unit variance.

    Reference: Kingma and Welling 2014, https://arxiv.org/abs/1312.6114, section 2.4.
    """
    mean, log_variance = np.split(moments, 2, axis=-1)
    # z = μ + σ ε, where σ is √variance (section 2.4)
    deviation = np.exp(0.5 * np.clip(log_variance, *LOG_VARIANCE))
    return mean + deviation * rng.standard_normal(mean.shape, dtype="float32")


def make_targets(schedule: NoiseScheduler, x0, noise, timesteps):
    """Adds noise to clean latents, and computes the targets that the model should predict.

    Args:
        schedule: a `NoiseScheduler`; its `prediction_type` says what the targets are.
        x0, noise: float32 `(B, h, w, C)`.
        timesteps: ints `(B,)`.

    Returns:
        The noisy latents and the targets, both float32 `(B, h, w, C)`. See
        `noise_scheduler.diffuse` and `noise_scheduler.join_prediction`.
    """
    alpha = schedule.alphas_cumprod[timesteps][:, None, None, None]  # (B, 1, 1, 1), float64
    noisy = diffuse(x0, noise, alpha)
    target = join_prediction(x0, noise, alpha, schedule.prediction_type)
    return noisy.astype("float32"), target.astype("float32")


def compute_snr_weights(schedule: NoiseScheduler, timesteps, gamma=5.0):
    """Computes weights of timesteps that keep those with little noise from dominating the loss.

    In terms of the error of x0, a timestep gets the weight min(SNR, gamma). The loss without
    weights already weighs the error of x0: by SNR for "epsilon", by SNR + 1 for "v_prediction".
    So the result is min(SNR, gamma) divided by that.

    Args:
        schedule: a `NoiseScheduler`, with the `prediction_type`.
        timesteps: ints `(B,)`.
        gamma: the largest weight of a timestep.

    Returns:
        float64 `(B,)`.

    Reference: Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4.
    """
    alpha = schedule.alphas_cumprod[timesteps]
    # SNR = ᾱ / (1-ᾱ); the weight is min(SNR, γ) / SNR for ε (section 3.4)
    snr = np.maximum(alpha / (1 - alpha), np.finfo("float64").tiny)  # not 0 / 0 where alpha is 0
    own = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[schedule.prediction_type]
    return np.minimum(snr, gamma) / own


def denoising_loss(y_true, y_pred):
    """Computes the mean squared error of each item in float32: `(B, h, w, C)` to `(B,)`."""
    error = ops.cast(y_true, "float32") - ops.cast(y_pred, "float32")
    return ops.mean(ops.square(error), axis=(1, 2, 3))


class StepLoss(keras.metrics.Metric):
    """The loss of the last batch. Keras' own metric is the mean of the epoch so far."""

    def __init__(self, name="step_loss"):
        super().__init__(name=name)
        self.value = self.add_variable((), initializer="zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        loss = denoising_loss(y_true, y_pred)
        self.value.assign(ops.mean(loss if sample_weight is None else loss * sample_weight))

    def result(self):
        return ops.convert_to_tensor(self.value)
