"""Latents of images and contexts of captions, computed once and kept in a folder.

The name of a file is a hash of everything that its content depends on. For a latent this is the
content of the image file, the view, the size, the background and the parameters of the VAE; for a
context it is the tokens and the parameters of the text encoder. So a file is never out of date: if
something changes, the name changes. Several runs can share a folder, even at the same time. A
damaged file is computed again.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from stable_diffusion.files import replace_file
from stable_diffusion.image_encoder import encode_moments
from stable_diffusion.images import WHITE, crop_image, normalize_pixels, open_image
from stable_diffusion.training.folder import Example, View, list_views

BATCH = 4  # images or captions that are encoded at once


class Cache:
    """The latents and contexts of a data set. Reads them from disk when they are used.

    Args:
        folder: path of the folder. It is made if it does not exist.
        pipeline: the `StableDiffusion` whose image encoder and text encoder are used.
        crops: number of views of each image. 1 is the centre; more are random places.
        flip: whether each view is also used mirrored.
        background: colour behind transparent images: red, green and blue from 0 to 255.
    """

    def __init__(self, folder: str | Path, pipeline, crops=1, flip=False, background=WHITE):
        self.folder, self.pipeline = Path(folder), pipeline
        self.crops, self.flip, self.background = crops, flip, tuple(background)
        self.size = pipeline.img_height, pipeline.img_width
        self._hashes = {}

    def encode_examples(
        self,
        examples: list[Example],
        texts: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Example], list[str]]:
        """Encodes each view of each image, and each caption, unless the folder has it already.

        Args:
            examples: list of `Example`, see `read_folder`.
            texts: whether to encode captions. Pass False if the text encoder is trained.
            progress: function of two numbers: images that are done, and all images.

        Returns:
            A list of the examples whose images can be used, with their digests; and a list of
            messages that tell why the others cannot be used.

        Raises:
            ValueError: no image can be used, or a caption is too long.
        """
        if texts:
            self.encode_texts(sorted({text for example in examples for text in example.captions}))
        good, broken, waiting = [], [], []
        for done, example in enumerate(examples):
            try:
                example = example.with_digest()
                missing = [
                    view for view in self.list_views(example) if not self._has(example, view)
                ]
                image = open_image(example.path, self.background) if missing else None
            except (OSError, ValueError) as error:
                broken.append(str(error))
                continue
            waiting += [(example, view, self._crop_image(image, view)) for view in missing]
            while len(waiting) >= BATCH:
                self._encode_images(waiting[:BATCH])
                del waiting[:BATCH]
            good.append(example)
            if progress:
                progress(done + 1, len(examples))
        if waiting:
            self._encode_images(waiting)
        if not good:
            raise ValueError(f"None of {len(examples)} images can be used: {broken[0]}")
        return good, broken

    def encode_texts(self, texts: list[str]):
        """Encodes those of a list of texts that the folder does not have yet."""
        missing = [text for text in texts if _load_array(self._find_text_file(text)) is None]
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            contexts = np.asarray(self.pipeline.encode_text(some), "float32")
            for text, context in zip(some, contexts, strict=True):
                self._save_array(self._find_text_file(text), context)

    def list_views(self, example: Example) -> list[View]:
        """Returns the views of an image, see `folder.list_views`."""
        return list_views(example, self.crops, self.flip)

    def read_moments(self, example: Example, view: View) -> np.ndarray:
        """Returns mean and log variance of the VAE's posterior, float32 `(h, w, 2 C)`, not scaled.

        Raises:
            ValueError: the file is missing, and the image can no longer be opened.
        """
        path = self._find_image_file(example, view)
        moments = _load_array(path)
        if moments is None:
            image = open_image(example.path, self.background)
            self._encode_images([(example, view, self._crop_image(image, view))])
            moments = _load_array(path)
        return moments

    def read_context(self, text: str) -> np.ndarray:
        """Returns the context of a text, float32 `(77, D)`."""
        path = self._find_text_file(text)
        context = _load_array(path)
        if context is None:
            self.encode_texts([text])
            context = _load_array(path)
        return context

    def _encode_images(self, batch):
        """Encodes a list of tuples `(example, view, uint8 array (H, W, 3))`."""
        pixels = normalize_pixels(np.stack([image for _, _, image in batch]))
        moments = np.asarray(encode_moments(self.pipeline.image_encoder, pixels), "float32")
        for (example, view, _), each in zip(batch, moments, strict=True):
            self._save_array(self._find_image_file(example, view), each)

    def _crop_image(self, image, view):
        return crop_image(image, *self.size, (view.x, view.y), view.flip)

    def _has(self, example, view):
        return _load_array(self._find_image_file(example, view)) is not None

    def _find_image_file(self, example, view):
        return self._find_file("image_encoder", example.digest, view, self.size, self.background)

    def _find_text_file(self, text):
        pad = self.pipeline.config.text.pad_token
        return self._find_file("text_encoder", self.pipeline.tokenizer.encode(text), pad)

    def _find_file(self, component, *key):
        """Returns the path of the file for a component and whatever else its content depends on."""
        model = getattr(self.pipeline, component)
        if component not in self._hashes:
            self._hashes[component] = hash_parameters(model)
        digest = hashlib.sha256(repr((self._hashes[component], *key)).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npy"

    def _save_array(self, path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as written, open(written, "wb") as file:
            np.save(file, array, allow_pickle=False)


def hash_parameters(model: keras.Model) -> str:
    """Returns a hash of a model's config, dtype and parameters."""
    digest = hashlib.sha256(f"{model.config} {model.layers[1].compute_dtype}".encode())
    for weight in model.weights:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(weight.value)).view("uint8"))
    return digest.hexdigest()


def _load_array(path):
    """Returns the array in a file, or None if the file is missing or damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
