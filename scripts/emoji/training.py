"""Training that can be stopped at any time: steps, their gradients, checkpoints.

A step's batch is cut into parts, each of which a thread computes. PyTorch's own threads, which work
on one operation together, would wait for each other most of the time: these models are small.
"""

import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch_ops
from PIL import Image

SAVE_SECONDS = 240  # between two checkpoints
THREADS = 2  # and parts that a step's batch is cut into


def to_float(pictures):
    """Maps uint8 pictures to a float32 tensor in [-1, 1]."""
    return torch.from_numpy(np.asarray(pictures, "float32") / 127.5 - 1.0)


def to_uint8(pictures):
    """Maps a tensor in [-1, 1] to uint8 pictures."""
    pictures = pictures.detach().float().numpy()
    return np.rint(np.clip((pictures + 1) * 127.5, 0, 255)).astype("uint8")


def save_grid(path, pictures, columns):
    """Writes uint8 pictures as one PNG."""
    rows = [np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def fall(step, steps, warmup, peak, begin=0.0, floor=0.01):
    """Returns a learning rate that rises, stays, and falls as a cosine from the share `begin`."""
    rise = min(1.0, (step + 1) / warmup)
    share = max(0.0, (step / steps - begin) / (1 - begin))
    return peak * rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


class Stopped(Exception):
    """Training was asked to stop, and has left its checkpoint."""


class Training:
    """Some parameters, their optimizer, their moving average and how far they are.

    Args:
        folder: where the checkpoint and the log are.
        variables: Keras variables, trained.
        compute_loss: function of the step and the part's number that returns a scalar tensor, of
            data that these two numbers determine.
        rate: function of the step that returns the learning rate.
        weight_decay: AdamW's.
        average: decay of the moving average.
        betas: Adam's.
    """

    def __init__(
        self, folder, variables, compute_loss, rate, weight_decay=0.0, average=0.999,
        betas=(0.9, 0.99),
    ):  # fmt: skip
        self.folder, self.compute_loss, self.rate = folder, compute_loss, rate
        self.values = [variable.value for variable in variables]
        matrices = [value for value in self.values if value.ndim > 1]
        others = [value for value in self.values if value.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        self.averages = [value.detach().clone() for value in self.values]
        self.average = average
        self.step, self.seconds = 0, 0.0  # seconds of processor time
        self.pool = ThreadPoolExecutor(THREADS, initializer=torch_ops.prepare_thread)
        self.asked = False
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "latest.pt"
        if self.path.exists():
            self.load()

    def load(self):
        """Goes on from the checkpoint."""
        state = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for value, saved in zip(self.values, state["values"], strict=True):
                value.copy_(saved)
            for average, saved in zip(self.averages, state["averages"], strict=True):
                average.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self):
        """Writes the checkpoint: a reader sees the old one or the whole new one."""
        state = {
            "values": [value.detach() for value in self.values],
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def swap(self):
        """Exchanges the parameters and their moving average."""
        with torch.no_grad():
            for value, average in zip(self.values, self.averages, strict=True):
                other = value.detach().clone()
                value.copy_(average)
                average.copy_(other)

    def take_step(self):
        """Takes one step; returns its loss."""

        def work(part):
            loss = self.compute_loss(self.step, part)
            grads = torch.autograd.grad(loss, self.values)
            return float(loss.detach()), grads

        losses, grads = zip(*self.pool.map(work, range(THREADS)), strict=True)
        for value, *some in zip(self.values, *grads, strict=True):
            value.grad = sum(some[1:], some[0]) / THREADS
        torch.nn.utils.clip_grad_norm_(self.values, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.step()
        self.step += 1
        decay = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, [v.detach() for v in self.values], 1 - decay)
        return sum(losses) / THREADS

    def run(self, steps, show=None, show_steps=2000, log_steps=50):
        """Trains until `steps` are taken in all.

        Args:
            steps: how many.
            show: function without arguments, called with the average in the parameters' place.
            show_steps: how often.
            log_steps: how many steps a line of the log is the mean of.

        Raises:
            Stopped: a signal asked for it.
        """
        previous = [signal.signal(some, self._ask) for some in (signal.SIGTERM, signal.SIGINT)]
        saved, began, spent, losses = time.time(), time.time(), time.process_time(), []
        try:
            while self.step < steps and not self.asked:
                losses.append(self.take_step())
                self.seconds += time.process_time() - spent
                spent = time.process_time()
                if self.step % log_steps == 0:
                    rate = len(losses) / (time.time() - began)
                    line = f"{self.step},{np.mean(losses):.5f},{rate:.3f},{self.seconds:.0f}"
                    with open(self.folder / "log.csv", "a", encoding="utf-8") as file:
                        file.write(line + "\n")
                    print(f"{self.folder.name} step,loss,steps/s,cpu seconds: {line}", flush=True)
                    losses, began = [], time.time()
                if show and self.step % show_steps == 0:
                    self.swap()
                    show()
                    self.swap()
                if time.time() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.time()
            self.save()
        finally:
            signal.signal(signal.SIGTERM, previous[0])
            signal.signal(signal.SIGINT, previous[1])
        if self.asked and self.step < steps:
            raise Stopped

    def _ask(self, *_):
        self.asked = True
