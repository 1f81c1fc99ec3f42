"""Latents of pictures and contexts of captions, computed once and kept in a folder.

A file is named by a hash of all that determines what is in it: for a latent the picture's bytes,
its view, size and background, and the VAE's parameters; for a context its tokens and the text
encoder's parameters. So nothing goes stale: whatever is changed gets another name, and several
runs, also at the same time, can share a folder. A file that is damaged is computed anew.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from stable_diffusion.files import new_file
from stable_diffusion.image_encoder import encode_moments
from stable_diffusion.images import WHITE, crop_image, normalize_pixels, open_image
from stable_diffusion.training.folder import Example, View, list_views

BATCH = 4  # pictures or captions that are encoded at once


class Cache:
    """The latents and contexts of a data set, in memory only while they are used.

    Args:
        folder: path of the folder, made where it is missing.
        pipeline: the `StableDiffusion` whose image and text encoder are used.
        crops: 1 for the centre of each picture, more for so many random places.
        flip: whether each is also seen in a mirror.
        background: colour under transparent parts, 0 to 255 each.
    """

    def __init__(self, folder: str | Path, pipeline, crops=1, flip=False, background=WHITE):
        self.folder, self.pipeline = Path(folder), pipeline
        self.crops, self.flip, self.background = crops, flip, tuple(background)
        self.size = pipeline.img_height, pipeline.img_width
        self._fingerprints = {}

    def encode(
        self,
        examples: list[Example],
        texts: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Example], list[str]]:
        """Encodes what isn't there yet: each view of each picture, and each caption.

        Args:
            examples: as `read_folder` lists them.
            texts: whether captions are encoded; not where the text encoder itself is trained.
            progress: called with the number of pictures that are done, and of all.

        Returns:
            The examples whose pictures can be used, now with their digests; and why the others
            can't, a line each.

        Raises:
            ValueError: no picture can be used, or a caption is too long.
        """
        if texts:
            self.encode_texts(sorted({text for example in examples for text in example.captions}))
        good, broken, waiting = [], [], []
        for done, example in enumerate(examples):
            try:
                example = example.with_digest()
                missing = [view for view in self.views(example) if not self._has(example, view)]
                picture = open_image(example.path, self.background) if missing else None
            except (OSError, ValueError) as error:
                broken.append(str(error))
                continue
            waiting += [(example, view, self._crop(picture, view)) for view in missing]
            while len(waiting) >= BATCH:
                self._encode_pictures(waiting[:BATCH])
                del waiting[:BATCH]
            good.append(example)
            if progress:
                progress(done + 1, len(examples))
        if waiting:
            self._encode_pictures(waiting)
        if not good:
            raise ValueError(f"None of {len(examples)} pictures can be used: {broken[0]}")
        return good, broken

    def encode_texts(self, texts: list[str]):
        """Encodes those texts that aren't there yet."""
        missing = [text for text in texts if _load(self._text_file(text)) is None]
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            contexts = np.asarray(self.pipeline.encode_text(some), "float32")
            for text, context in zip(some, contexts, strict=True):
                self._save(self._text_file(text), context)

    def views(self, example: Example) -> list[View]:
        """Returns the views of a picture, see `list_views`."""
        return list_views(example, self.crops, self.flip)

    def moments(self, example: Example, view: View) -> np.ndarray:
        """Returns the VAE posterior's mean and log variance, float32 `(h, w, 2 C)`, not scaled.

        Raises:
            ValueError: it isn't there, and the picture can't be opened any more.
        """
        path = self._picture_file(example, view)
        moments = _load(path)
        if moments is None:
            picture = open_image(example.path, self.background)
            self._encode_pictures([(example, view, self._crop(picture, view))])
            moments = _load(path)
        return moments

    def context(self, text: str) -> np.ndarray:
        """Returns the context of a text, float32 `(77, D)`."""
        path = self._text_file(text)
        context = _load(path)
        if context is None:
            self.encode_texts([text])
            context = _load(path)
        return context

    def _encode_pictures(self, batch):
        """Encodes a list of tuples `(example, view, uint8 (H, W, 3))`."""
        pixels = normalize_pixels(np.stack([image for _, _, image in batch]))
        moments = np.asarray(encode_moments(self.pipeline.image_encoder, pixels), "float32")
        for (example, view, _), each in zip(batch, moments, strict=True):
            self._save(self._picture_file(example, view), each)

    def _crop(self, image, view):
        return crop_image(image, *self.size, (view.x, view.y), view.flip)

    def _has(self, example, view):
        return _load(self._picture_file(example, view)) is not None

    def _picture_file(self, example, view):
        return self._file("image_encoder", example.digest, view, self.size, self.background)

    def _text_file(self, text):
        pad = self.pipeline.config.text.pad_token
        return self._file("text_encoder", self.pipeline.tokenizer.encode(text), pad)

    def _file(self, part, *key):
        model = getattr(self.pipeline, part)
        if part not in self._fingerprints:
            self._fingerprints[part] = fingerprint(model)
        digest = hashlib.sha256(repr((self._fingerprints[part], *key)).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npy"

    def _save(self, path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as written, open(written, "wb") as file:
            np.save(file, array, allow_pickle=False)


def fingerprint(model: keras.Model) -> str:
    """Returns a hash of a model's architecture and parameters."""
    digest = hashlib.sha256(f"{model.config} {model.layers[1].compute_dtype}".encode())
    for weight in model.weights:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(weight.value)).view("uint8"))
    return digest.hexdigest()


def _load(path):
    """Returns the array in a file, or None if there is no such file or it is damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
