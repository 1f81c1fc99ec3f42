"""The embedded checkpoint draws what it is asked for, and is small."""

import hashlib
import re

import numpy as np
import pytest

from stable_diffusion import StableDiffusion
from stable_diffusion.clip_tokenizer import WEIGHTS_DIR

RED, GREEN, BLUE = range(3)


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(jit_compile=False, weights="emoji")


def centre_and_border(picture):
    """Returns the median colours of the middle quarter and of the outermost pixels."""
    centre = picture[32:96, 32:96].reshape(-1, 3)
    edges = [picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]]
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    return np.median(centre, axis=0), np.median(border, axis=0)


def test_a_red_apple_on_a_blue_background(model):
    prompt = "a red apple on a blue background"
    pictures = model.text_to_image(prompt, batch_size=2, num_steps=20, seed=[0, 1], verbose=0)
    assert pictures.shape == (2, 128, 128, 3)
    assert not np.array_equal(pictures[0], pictures[1])
    for picture in pictures:
        centre, border = centre_and_border(picture)
        assert centre[RED] > 150 and centre[RED] > 2 * max(centre[GREEN], centre[BLUE])
        assert border[BLUE] > 100 and border[BLUE] > border[RED] + 40


def test_subject_and_background_follow_the_prompt(model):
    prompts = ["a lemon on a blue background", "a red apple on a green background"]
    lemon, apple = model.text_to_image(prompts, num_steps=20, seed=[0, 0], verbose=0)
    (lemon, blue), (apple, green) = centre_and_border(lemon), centre_and_border(apple)
    assert min(lemon[RED], lemon[GREEN]) > lemon[BLUE] + 60
    assert apple[RED] > apple[GREEN] + 60
    assert blue.argmax() == BLUE and green.argmax() == GREEN


def test_the_image_encoder_inverts_the_decoder(model):
    """Encoding and decoding a drawn picture gives about the same picture."""
    picture = model.text_to_image("a panda on a green background", num_steps=10, seed=0, verbose=0)
    latent = model.image_encoder.predict_on_batch(picture / 127.5 - 1.0)
    decoded = np.asarray(model.decoder.predict_on_batch(latent), "float32")
    error = np.clip(decoded, -1, 1) - (picture / 127.5 - 1.0)
    assert 10 * np.log10(4 / np.mean(error**2)) > 20  # PSNR, dB


def test_it_is_small_and_is_the_documented_one():
    files = [path for path in (WEIGHTS_DIR / "emoji").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    unet = WEIGHTS_DIR / "emoji" / "unet" / "diffusion_pytorch_model.safetensors"
    documented = re.findall(r"`([0-9a-f]{64})`", (WEIGHTS_DIR / "README.md").read_text("utf-8"))
    assert hashlib.sha256(unet.read_bytes()).hexdigest() in documented
