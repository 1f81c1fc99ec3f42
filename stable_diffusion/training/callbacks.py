"""Keras callbacks of a run: its state, the log of its losses, previews and a progress bar.

They count steps (batches) from the beginning of the run, also where it was stopped in between.
"""

import csv
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
from keras import ops
from PIL import Image, ImageDraw

from stable_diffusion.files import new_file
from stable_diffusion.training.methods import Method
from stable_diffusion.training.state import save_state

COLUMNS = ("step", "loss", "learning_rate", "images_per_second")
CURVE = 640, 360  # pixels
MARGIN = 50  # pixels around the curve, for numbers
TICKS = 5  # numbers on each axis
SMOOTHING = 20  # the curve shows means of 1/20 of the run


class Steps(keras.callbacks.Callback):
    """What the callbacks have in common: `at_step` is called after each step with its number.

    Args:
        first_step: steps that were taken before this run of `fit`.
    """

    def __init__(self, first_step=0):
        super().__init__()
        self.step = first_step

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self.at_step(self.step, logs or {})

    def at_step(self, step, logs):
        """Does what is to be done after a step."""


class SaveState(Steps):
    """Saves the state every so many steps, after the last one, and when it is asked to stop.

    Args:
        path: path of the file, see `save_state`.
        every: steps in between.
        last_step: number of the last step.
        first_step: see `Steps`.

    Attributes:
        stop: whether to end after this step; `stop_on_signals` sets it.
    """

    def __init__(self, path: Path, every: int, last_step: int, first_step: int = 0):
        super().__init__(first_step)
        self.path, self.every, self.last_step, self.stop = path, every, last_step, False

    def at_step(self, step, logs):
        if step % self.every == 0 or step == self.last_step or self.stop:
            save_state(self.path, self.model, step)
        if self.stop:
            self.model.stop_training = True


@contextmanager
def stop_on_signals(saver: SaveState):
    """Lets Ctrl-C, or SIGTERM, end the run after its step, with its state saved.

    A second one ends it at once. Elsewhere than in the main thread signals are left as they are.
    """

    def stop(number, frame):
        saver.stop = True
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log(Steps):
    """Writes a line of CSV for each step, see `COLUMNS`, and shows a progress bar.

    What a run that was killed had written after its last state is dropped.

    Args:
        path: path of the file.
        images: pictures in a batch.
        last_step: number of the last step.
        first_step: see `Steps`.
        verbose: whether to show the bar.
    """

    def __init__(self, path, images, last_step, first_step=0, verbose=True):
        super().__init__(first_step)
        self.path, self.images, self.verbose = path, images, verbose
        self.bar = keras.utils.Progbar(
            last_step, verbose=int(verbose), stateful_metrics=["loss", "images/s"], unit_name="step"
        )
        rows = [row for row in read_log(path) if row["step"] <= first_step]
        with new_file(path) as written, open(written, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self.last = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        self.last = time.perf_counter()

    def at_step(self, step, logs):
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        speed = self.images / (time.perf_counter() - self.last)
        loss = float(logs["step_loss"])
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow([step, f"{loss:.9g}", f"{rate:.6g}", f"{speed:.3f}"])
        if self.verbose:
            self.bar.update(step, [("loss", loss), ("images/s", speed)])


def read_log(path: str | Path) -> list[dict]:
    """Returns the rows that `Log` wrote, dicts of numbers; none if there is no such file.

    A line that a killed run left unfinished is passed over.
    """
    rows = []
    if Path(path).is_file():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                try:
                    numbers = {key: float(row[key]) for key in COLUMNS}
                except (TypeError, ValueError):
                    continue
                rows.append(numbers | {"step": int(numbers["step"])})
    return rows


def draw_curve(path: str | Path, rows: list[dict]):
    """Draws the loss over the steps as a PNG: of each step in grey, means in black.

    Args:
        path: path of the file.
        rows: as of `read_log`, at least one.
    """
    steps, losses = (np.array([row[key] for row in rows], float) for key in ("step", "loss"))
    window = max(1, len(losses) // SMOOTHING)
    means = np.convolve(losses, np.ones(window) / window, "valid")
    top = float(np.nanpercentile(losses, 99)) * 1.1 or 1.0
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    (width, height), image = CURVE, Image.new("RGB", CURVE, "white")
    draw = ImageDraw.Draw(image)

    def place(step, loss):
        x = MARGIN + (step - first) / (last - first) * (width - 2 * MARGIN)
        return x, height - MARGIN - min(loss / top, 1) * (height - 2 * MARGIN)

    for part in np.linspace(0, 1, TICKS):
        step, loss = first + part * (last - first), part * top
        draw.line([place(first, loss), place(last, loss)], fill="lightgrey")
        draw.text((4, place(first, loss)[1] - 6), f"{loss:.3g}", fill="black")
        draw.text((place(step, 0)[0] - 8, height - MARGIN + 8), f"{step:.0f}", fill="black")
    draw.text((4, 8), "loss", fill="black")
    draw.text((width - MARGIN, height - 20), "step", fill="black")
    draw.line([place(*point) for point in zip(steps, losses, strict=True)], fill="darkgrey")
    points = zip(steps[window - 1 :], means, strict=True)
    draw.line([place(*point) for point in points], fill="black", width=2)
    with new_file(path) as written:
        image.save(written, "png")


class Preview(Steps):
    """Draws prompts every so many steps, with the averages of parameters where there are any.

    Args:
        method: what is trained.
        prompts: list of str.
        folder: gets a PNG each time, with a picture of each prompt beside each other.
        every: steps in between; 0 draws after the last step alone.
        last_step: number of the last step.
        first_step: see `Steps`.
        seed: of the first picture; each next one has 1 more.
        options: of `text_to_image`, such as `num_steps`.
        show: called with the number of the step and the grid, uint8 `(H, n W, 3)`.
    """

    def __init__(
        self, method: Method, prompts, folder, every, last_step, first_step=0, seed=0,
        options=None, show=None,
    ):  # fmt: skip
        super().__init__(first_step)
        self.method, self.prompts, self.folder = method, prompts, Path(folder)
        self.every, self.last_step, self.seed = every, last_step, seed
        self.options, self.show = options or {}, show

    def on_train_begin(self, logs=None):
        if self.step == 0:
            self.draw(0)

    def at_step(self, step, logs):
        if step == self.last_step or (self.every and step % self.every == 0):
            self.draw(step)

    def draw(self, step):
        """Draws the pictures of a step."""
        variables = self.model.trainable_variables
        trained = [ops.convert_to_numpy(variable.value) for variable in variables]
        if step:
            self.model.optimizer.finalize_variable_values(variables)  # the averages, with use_ema
        self.method.show()
        distribution = keras.distribution.distribution()
        keras.distribution.set_distribution(None)  # so few pictures can't be divided
        try:
            pictures = self.method.pipeline.text_to_image(
                self.prompts,
                seed=[self.seed + n for n in range(len(self.prompts))],
                verbose=0,
                **self.options,
            )
        finally:
            keras.distribution.set_distribution(distribution)
            for variable, value in zip(variables, trained, strict=True):
                variable.assign(value)
        grid = np.hstack(pictures)
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self.folder / f"step_{step:06}.png") as written:
            Image.fromarray(grid).save(written, "png")
        if self.show:
            self.show(step, grid)


class Summaries(Steps):
    """Writes losses, rates and previews for TensorBoard; Keras' own callback has no pictures.

    Args:
        folder: TensorBoard's folder.
        first_step: see `Steps`.
    """

    def __init__(self, folder: str | Path, first_step: int = 0):
        super().__init__(first_step)
        import tensorflow as tf

        self.summary, self.writer = tf.summary, tf.summary.create_file_writer(str(folder))

    def at_step(self, step, logs):
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        with self.writer.as_default():
            self.summary.scalar("loss", float(logs["step_loss"]), step=step)
            self.summary.scalar("learning_rate", rate, step=step)

    def image(self, step, grid):
        """Writes a preview, see `Preview`."""
        with self.writer.as_default():
            self.summary.image("preview", grid[None], step=step)
        self.writer.flush()

    def on_train_end(self, logs=None):
        self.writer.flush()
