"""Draws what image to image and inpainting make of an image, as one picture.

    python scripts/examples/draw_tasks.py weights/pictures/tasks.png

Six images in pairs, what is given and what is made of it: another animal by image to image, another
fruit where a mask says so (grey here), and an image that is continued beyond its edge.
"""

import argparse

import numpy as np
from PIL import Image

from stable_diffusion import StableDiffusion

GAP = 8  # white pixels between pairs
GREY = 0.5  # how much of the painted part is shown as grey


def continue_image(model, prompt, image, **options):
    """Paints what is right of an image: outpainting is inpainting on a larger canvas.

    Args:
        model: the `StableDiffusion`.
        prompt: of the whole.
        image: uint8 array `(H, W, 3)`, with the height of what the model generates, and narrower.
        **options: of `StableDiffusion.inpaint`.

    Returns:
        The canvas and the result, uint8 arrays of the size that the model generates.
    """
    canvas = np.full((len(image), model.img_width, 3), 255, "uint8")
    canvas[:, : image.shape[1]] = image
    mask = np.zeros(canvas.shape[:2], bool)
    mask[:, : image.shape[1]] = True
    return canvas, model.inpaint(prompt, canvas, mask, **options)[0]


def draw(model):
    """Returns the picture: uint8 array `(H, 6 W + 2 GAP, 3)`."""
    options = {"num_steps": 50, "seed": 1, "verbose": 0}
    blue, green = "on a blue background", "on a green background"
    cat = model.text_to_image(f"a cat face {green}", **options | {"seed": 3})[0]
    dog = model.image_to_image(f"a dog face {green}", cat, strength=0.7, **options)[0]
    apple = model.text_to_image(f"a red apple {blue}", **options | {"seed": 0})[0]
    mask = np.ones(apple.shape[:2], bool)
    mask[8:-8, 8:-8] = False
    pear = model.inpaint(f"a pear {blue}", apple, mask, **options)[0]
    shown = np.where(mask[..., None], apple, apple * (1 - GREY) + 128 * GREY).astype("uint8")
    half, whole = continue_image(model, f"a red apple {blue}", apple[:, :72], **options)
    gap = np.full((len(apple), GAP, 3), 255, "uint8")
    return np.hstack([cat, dog, gap, shown, pear, gap, half, whole])


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="PNG file to write")
    out = parser.parse_args().out
    Image.fromarray(draw(StableDiffusion(jit_compile=False, weights="emoji"))).save(out)


if __name__ == "__main__":
    main()
