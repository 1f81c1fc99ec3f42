"""Latents of images and contexts of captions, computed once and kept in a folder.

The name of a file is a hash of everything that its content depends on. For a latent this is the
content of the image file, the view, the size, the background and the parameters of the VAE; for a
context it is the tokens, the clip skip and the parameters of the text encoder. So a file is never
out of date: if something changes, the name changes. Each image and each caption is encoded by
itself, because the last digits differ from batch to batch: a run that goes on after a kill has the
same files as one that nobody killed. Several runs can share a folder, even at the same time. A file
ends with a checksum, after what `numpy.load` reads; a damaged file is computed again. What killed
runs left beside the files is removed when the folder is opened.
"""

import hashlib
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import keras
import numpy as np
from keras import ops

from stable_diffusion.image_encoder import encode_moments
from stable_diffusion.images import WHITE, crop_image, normalize_pixels, open_image
from stable_diffusion.locking import remove_leftovers
from stable_diffusion.replacing import replace_file
from stable_diffusion.training.folder import Example, View, list_views

CHECKSUM = 4  # bytes of a CRC-32


class Cache:
    """The latents and contexts of a data set. Reads them from disk when they are used.

    Args:
        folder: path of the folder. It is made if it does not exist.
        pipeline: the `StableDiffusion` whose image encoder and text encoder are used.
        crops: number of views of each image. 1 is the centre; more are random places.
        flip: whether each view is also used mirrored.
        background: colour behind transparent images: red, green and blue from 0 to 255.
        clip_skip: how captions are encoded, see `StableDiffusion.encode_text`.

    Raises:
        ValueError: the text encoder has not so many layers.
    """

    def __init__(
        self, folder: str | Path, pipeline, crops=1, flip=False, background=WHITE, clip_skip=0
    ):
        self.folder, self.pipeline = Path(folder), pipeline
        self.clip_skip = pipeline.check_clip_skip(clip_skip)
        self.crops, self.flip, self.background = crops, flip, tuple(background)
        self.size = pipeline.img_height, pipeline.img_width
        self._hashes = {}
        for subfolder in self.folder.glob("??"):
            remove_leftovers(subfolder)

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
            ValueError: no image can be used, a caption is too long, or a latent or context is not
                finite.
        """
        if texts:
            self.encode_texts(sorted({text for example in examples for text in example.captions}))
        good, broken = [], []
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
            for view in missing:
                self._encode_view(example, view, image)
            good.append(example)
            if progress:
                progress(done + 1, len(examples))
        if not good:
            raise ValueError(f"None of {len(examples)} images can be used: {broken[0]}")
        return good, broken

    def encode_texts(self, texts: list[str]):
        """Encodes those of a list of texts that the folder does not have yet."""
        for text in texts:
            path = self._find_text_file(text)
            if _load_array(path) is None:
                context = np.asarray(self.pipeline.encode_text(text, self.clip_skip)[0], "float32")
                self._save_array(path, context, f"caption {text!r:.200}")

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
            self._encode_view(example, view, open_image(example.path, self.background))
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

    def _encode_view(self, example, view, image):
        """Encodes a view of an example's image, which is a uint8 array `(H, W, 3)`."""
        pixels = normalize_pixels(crop_image(image, *self.size, (view.x, view.y), view.flip))
        moments = np.asarray(encode_moments(self.pipeline.image_encoder, pixels[None]), "float32")
        self._save_array(self._find_image_file(example, view), moments[0], example.path)

    def _has(self, example, view):
        return _load_array(self._find_image_file(example, view)) is not None

    def _find_image_file(self, example, view):
        return self._find_file("image_encoder", example.digest, view, self.size, self.background)

    def _find_text_file(self, text):
        skip = [self.clip_skip] if self.clip_skip else []  # folders of older versions have none
        tokens, pad = self.pipeline.tokenizer.encode(text), self.pipeline.config.text.pad_token
        return self._find_file("text_encoder", tokens, pad, *skip)

    def _find_file(self, component, *key):
        """Returns the path of the file for a component and whatever else its content depends on."""
        model = getattr(self.pipeline, component)
        if component not in self._hashes:
            self._hashes[component] = hash_parameters(model)
        digest = hashlib.sha256(repr((self._hashes[component], *key)).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npy"

    def _save_array(self, path, array, source):
        if not np.isfinite(array).all():
            raise ValueError(f"{source}: the weights encode it with values that are not finite.")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = BytesIO()
        np.save(content, array, allow_pickle=False)
        with replace_file(path, flush=False) as written:
            written.write_bytes(content.getvalue() + _compute_checksum(content.getvalue()))


def hash_parameters(model: keras.Model) -> str:
    """Returns a hash of a model's config, dtype and parameters."""
    digest = hashlib.sha256(f"{model.config} {model.layers[1].compute_dtype}".encode())
    for weight in model.weights:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(weight.value)).view("uint8"))
    return digest.hexdigest()


def _load_array(path):
    """Returns the array in a file, or None if the file is missing or damaged."""
    try:
        content = path.read_bytes() if path.is_file() else b""
        if content[-CHECKSUM:] != _compute_checksum(content[:-CHECKSUM]):
            return None
        return np.load(BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _compute_checksum(content):
    return zlib.crc32(content).to_bytes(CHECKSUM, "big")
