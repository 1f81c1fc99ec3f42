"""Animations as GIF and WebP files, and that of `--animate`: how an image came to be."""

from pathlib import Path

from stable_diffusion.replacing import replace_file

SUFFIXES = (".gif", ".webp")
DURATION, LAST_DURATION = 100, 1500  # milliseconds of a frame, and of the image at the end


def name_animations(path, count):
    """Returns the paths of the animations of `count` images, as those of images: FILE-1.gif, ...

    Raises:
        ValueError: the path is no .gif and no .webp.
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES or file.is_dir():
        raise ValueError(f"argument --animate: {path!r} is neither a .gif nor a .webp file")
    return [file] if count == 1 else [file.with_stem(f"{file.stem}-{n + 1}") for n in range(count)]


def load_preview_decoder(path, model):
    """Returns the decoder of a tiny VAE, for previews of a pipeline's latents.

    Raises:
        ValueError: it is no tiny VAE, or one of other latents.
    """
    from stable_diffusion.tiny_vae import load_decoder

    decoder = load_decoder(path, model.img_height, model.img_width)
    if decoder.input_shape[1:] != model.latent_shape:
        ours, theirs = (
            "x".join(map(str, s)) for s in (model.latent_shape, decoder.input_shape[1:])
        )
        raise ValueError(
            f"argument --preview-vae: it has latents of {theirs}, the weights of {ours}"
        )
    decoder.compile(jit_compile=model.jit_compile)
    return decoder


def animate_image(path, previews, image):
    """Writes an animation of the previews after each step, as large as the image, and the image.

    Args:
        path: of a .gif or a .webp, which is replaced as a whole.
        previews: list of uint8 arrays `(h, w, 3)`.
        image: uint8 array `(H, W, 3)`.
    """
    import numpy as np
    from PIL import Image

    size, smooth = image.shape[1::-1], Image.Resampling.BICUBIC
    frames = [np.asarray(Image.fromarray(each).resize(size, smooth)) for each in previews]
    write_animation(path, [*frames, image], LAST_DURATION)


def write_animation(path, images, last_duration=DURATION):
    """Writes images as an animation that repeats for ever, whole or not at all.

    Each frame of a GIF has a palette of its own. An octree finds it 50 times as fast as Pillow's
    default, which merges hues that cover few pixels; dithering hides its steps.

    Args:
        path: of a .gif or a .webp, which is replaced.
        images: list of uint8 arrays `(H, W, 3)`.
        last_duration: how many milliseconds the last one is shown.
    """
    from PIL import Image

    kind, frames = Path(path).suffix[1:].lower(), list(map(Image.fromarray, images))
    if kind == "gif":
        palettes = [frame.quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
        frames = [
            frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
            for frame, palette in zip(frames, palettes, strict=True)
        ]
    durations = [DURATION] * (len(frames) - 1) + [last_duration]
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    with replace_file(path) as written:
        frames[0].save(written, kind, **options)
