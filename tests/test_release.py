"""Parts whose memory is freed: gone, and loaded again when they are next asked for."""

import gc
import weakref

import numpy as np
import pytest

from stable_diffusion import StableDiffusion
from stable_diffusion.checkpoints import release
from stable_diffusion.config import TINY


@pytest.fixture
def saved(tmp_path):
    StableDiffusion(weights=None, jit_compile=False, config=TINY).save(tmp_path / "x")
    return StableDiffusion(weights=tmp_path / "x", jit_compile=False)


def test_released_and_loaded_again(saved):
    expected = saved.text_encoder.get_weights()
    gone = weakref.ref(saved.text_encoder.weights[0])
    release(saved, "text_encoder")
    gc.collect()
    assert saved._text_encoder is None and gone() is None
    release(saved, "text_encoder")  # there is none any more
    for value, right in zip(saved.text_encoder.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(value, right)


def test_what_no_checkpoint_has_is_kept(saved):
    random = StableDiffusion(weights=None, jit_compile=False, config=TINY)
    assigned = StableDiffusion(weights=saved.checkpoint, jit_compile=False)
    assigned._text_encoder = random.text_encoder
    changed = StableDiffusion(weights=saved.checkpoint, jit_compile=False)
    kernel = changed.text_encoder.get_weights()[0]
    changed.changes.keep_original(changed.text_encoder, 0, kernel)  # as load_lora does
    for model in (random, assigned, changed):
        before = model.text_encoder
        with pytest.raises(ValueError, match="The text_encoder can't be released"):
            release(model, "text_encoder")
        assert model._text_encoder is before
    with pytest.raises(ValueError, match="component must be one of text_encoder, .*, not 'vae'"):
        release(saved, "vae")
