"""Keras callbacks of a run: they save its state, log losses, and generate previews.

They count steps (batches) from the beginning of the run, even if it was stopped in between.
"""

import csv
import math
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
from keras import ops
from PIL import Image, ImageDraw

from stable_diffusion.replacing import replace_file
from stable_diffusion.training.methods import Method
from stable_diffusion.training.state import ADVICE, check_finite, save_state

COLUMNS = ("step", "loss", "learning_rate", "images_per_second")
CURVE = 640, 360  # pixels: width and height of the image
MARGIN = 50  # pixels around the curve, for numbers
TICKS = 5  # numbers beside each axis
SMOOTHING = 20  # the curve shows means of 1/20 of the run


class Steps(keras.callbacks.Callback):
    """The base class of the callbacks here: it calls `at_step` after each step.

    Args:
        first_step: number of steps before this call of `fit`.
    """

    def __init__(self, first_step=0):
        super().__init__()
        self.step = first_step

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self.at_step(self.step, logs or {})

    def at_step(self, step, logs):
        """Runs after each step.

        Args:
            step: number of the step, from 1.
            logs: dict of Keras' metrics.
        """


class SaveState(Steps):
    """Saves the state of a run: every `every` steps, after the last step, and before it stops.

    Args:
        path: path of the file, see `save_state`.
        every: number of steps between two states.
        last_step: number of the last step.
        first_step: see `Steps`.
        data: a hash of the data, see `save_state`.

    Attributes:
        stop: whether the run stops after the present step: 0, or the number of the signal that
            `stop_on_signals` got.
    """

    def __init__(self, path: Path, every: int, last_step: int, first_step: int = 0, data: str = ""):
        super().__init__(first_step)
        self.path, self.every, self.last_step = path, every, last_step
        self.data, self.stop = data, 0

    def at_step(self, step, logs):
        if step % self.every == 0 or step == self.last_step or self.stop:
            save_state(self.path, self.model, step, self.data)
        if self.stop:
            self.model.stop_training = True


@contextmanager
def stop_on_signals(saver: SaveState):
    """Lets Ctrl-C or SIGTERM stop the run after the present step, so that its state is saved.

    A second signal stops it at once. In other threads than the main thread this does nothing.
    """

    def stop(number, frame):
        saver.stop = number
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


class StopAtNaN(Steps):
    """Ends the run with an error at the first loss that is not finite.

    Put it before `SaveState`, which saves only finite parameters.

    Raises:
        ValueError: the loss is not finite. It names the step.
    """

    def at_step(self, step, logs):
        loss = float(logs["step_loss"])
        if not math.isfinite(loss):
            self.model.stop_training = True
            raise ValueError(f"The loss of step {step} is {loss}. {ADVICE}")


class Log(Steps):
    """Writes a line of CSV with the `COLUMNS` for each step, and shows a progress bar.

    Lines of later steps than `first_step` are removed: a run that was killed may have written them
    after its last state.

    Args:
        path: path of the file.
        images: number of images in a batch.
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
        with replace_file(path) as written, open(written, "w", newline="") as file:
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
    """Returns the rows that `Log` wrote, as dicts of numbers; none if the file is missing.

    Damaged lines, such as an unfinished one that a killed run left, are skipped.
    """
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text("utf-8", errors="replace").split("\n"):
            try:
                numbers = dict(zip(COLUMNS, map(float, line.split(",")), strict=True))
                row = numbers | {"step": int(numbers["step"])}
            except (ValueError, OverflowError):  # also the names of the columns
                continue
            if math.isfinite(row["loss"]):
                rows.append(row)
    return rows


def draw_curve(path: str | Path, rows: list[dict]):
    """Draws a PNG of the loss over the steps: each step in grey, moving means in black.

    Args:
        path: path of the file.
        rows: the result of `read_log`, at least one row.
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

    for share in np.linspace(0, 1, TICKS):
        step, loss = first + share * (last - first), share * top
        draw.line([place(first, loss), place(last, loss)], fill="lightgrey")
        draw.text((4, place(first, loss)[1] - 6), f"{loss:.3g}", fill="black")
        draw.text((place(step, 0)[0] - 8, height - MARGIN + 8), f"{step:.0f}", fill="black")
    draw.text((4, 8), "loss", fill="black")
    draw.text((width - MARGIN, height - 20), "step", fill="black")
    draw.line([place(*point) for point in zip(steps, losses, strict=True)], fill="darkgrey")
    points = zip(steps[window - 1 :], means, strict=True)
    draw.line([place(*point) for point in points], fill="black", width=2)
    with replace_file(path) as written:
        image.save(written, "png")


class Preview(Steps):
    """Generates images of some prompts before the first step, every `every` steps, and at the end.

    If the optimizer keeps averages of the parameters, the images are made with these.

    Args:
        method: the `Method` that is trained.
        prompts: list of str.
        folder: path of a folder. It gets a PNG each time, with the images side by side.
        every: number of steps between two previews; 0 leaves out those between first and last.
        last_step: number of the last step.
        first_step: see `Steps`.
        seed: seed of the first image. Each next image has the next seed.
        options: dict of arguments for `text_to_image`, such as `num_steps`.
        show: function of the number of the step and of the images, uint8 `(H, n W, 3)`.
    """

    def __init__(
        self,
        method: Method,
        prompts,
        folder,
        every,
        last_step,
        first_step=0,
        seed=0,
        options=None,
        show=None,
    ):
        super().__init__(first_step)
        self.method, self.prompts, self.folder = method, prompts, Path(folder)
        self.every, self.last_step, self.seed = every, last_step, seed
        self.options, self.show = options or {}, show

    def on_train_begin(self, logs=None):
        if self.step == 0:
            self.generate_images(0)

    def at_step(self, step, logs):
        if step == self.last_step or (self.every and step % self.every == 0):
            self.generate_images(step)

    def generate_images(self, step):
        """Generates the images for a step, and writes them."""
        variables = self.model.trainable_variables
        trained = [ops.convert_to_numpy(variable.value) for variable in variables]
        check_finite({v.path: x for v, x in zip(variables, trained, strict=True)}, step)
        if step:
            self.model.optimizer.finalize_variable_values(variables)  # assigns averages
        self.method.update_pipeline()
        distribution = keras.distribution.distribution()
        keras.distribution.set_distribution(None)  # so few images can't be divided
        try:
            images = self.method.pipeline.text_to_image(
                self.prompts,
                seed=[self.seed + n for n in range(len(self.prompts))],
                verbose=0,
                **self.options,
            )
        finally:
            keras.distribution.set_distribution(distribution)
            for variable, value in zip(variables, trained, strict=True):
                variable.assign(value)
        grid = np.hstack(images)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_file(self.folder / f"step_{step:06}.png") as written:
            Image.fromarray(grid).save(written, "png")
        if self.show:
            self.show(step, grid)


class Summaries(Steps):
    """Writes losses, learning rates and previews for TensorBoard.

    Keras' own callback for TensorBoard writes no images.

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

    def write_image(self, step, grid):
        """Writes a preview; an argument `show` for `Preview`."""
        with self.writer.as_default():
            self.summary.image("preview", grid[None], step=step)
        self.writer.flush()

    def on_train_end(self, logs=None):
        self.writer.flush()
