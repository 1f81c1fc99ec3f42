"""Parameter counts of the named architectures. The reference is KerasCV 0.9.0."""

import keras
import pytest

from stable_diffusion import Decoder, DiffusionModel, ImageEncoder, TextEncoder
from stable_diffusion.config import SD1, SD1_INPAINTING, SD2, TINY, TINY_V2, undo_departures


@pytest.fixture
def shapes():
    """Models have shapes only, without the memory."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.backend.clear_session()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SD1, 123_060_480),
        (SD2, 340_387_840),
        (TINY, 49408 * 32 + 77 * 32 + 2 * 8544 + 64),
    ],
)
def test_text_encoder(shapes, config, count):
    model = TextEncoder(77, config=config.text, download_weights=False)
    assert model.count_params() == count
    assert model.output_shape == (None, 77, config.text.width)


@pytest.mark.parametrize(
    ("config", "count"),
    [(SD1, 859_520_964), (SD2, 865_910_724), (SD1_INPAINTING, 859_535_364)],
)
def test_diffusion_model(shapes, config, count):
    model = DiffusionModel(512, 512, 77, config=config.unet, download_weights=False)
    assert model.count_params() == count
    assert model.output_shape == (None, 64, 64, 4)


def test_decoder(shapes):
    model = Decoder(512, 512, config=SD1.vae, download_weights=False)
    assert model.count_params() == 49_490_199
    assert model.output_shape == (None, 512, 512, 3)


def test_image_encoder(shapes):
    model = ImageEncoder(config=SD1.vae, download_weights=False)
    assert model.count_params() == 34_163_664
    assert model.layers[-2].output.shape == (None, None, None, 8)


@pytest.mark.parametrize("config", [TINY, TINY_V2])
def test_tiny_sizes_stay_tiny(shapes, config):
    unet = DiffusionModel(64, 64, 77, config=config.unet, download_weights=False)
    decoder = Decoder(64, 64, config=config.vae, download_weights=False)
    assert unet.count_params() < 1e6 and decoder.count_params() < 2e5


def test_heads():
    """Parameters do not show them. In version 2 each has 64 channels."""
    assert SD1.unet.heads == (8, 8, 8, 8) and SD1.text.heads == 12
    assert SD2.unet.heads == tuple(width // 64 for width in SD2.unet.widths)
    assert SD2.text.heads == SD2.text.width // 64


def test_original_undoes_every_departure():
    config = undo_departures(SD2)
    assert config.text.activation == "gelu" and config.text.pad_token == 0
    assert config.unet.norm_epsilon == config.vae.norm_epsilon == 1e-6
    assert not config.unet.approximate_gelu
    assert config.schedule.levels(50)[0].timestep == 981
    assert config.schedule.levels(50)[-2].timestep == 1
    assert undo_departures(SD1).text == SD1.text
    assert undo_departures(undo_departures(SD2)) == undo_departures(SD2)


def test_configs_are_equal_by_value():
    assert undo_departures(SD1) != SD1
    assert len({SD1, SD2, SD1_INPAINTING, undo_departures(SD1), undo_departures(SD1)}) == 4
