"""TAESD, the tiny VAE, as diffusers' `AutoencoderTiny` has it: layer by layer, files, whole images.

Both have the same random parameters, and compute in float32. Tolerance: 1e-5 of the largest value
of each layer; less than 2e-6 is seen. Images are within 2 of 255 levels.
"""

import keras
import numpy as np
import pytest

REASON = "needs pip install torch diffusers transformers accelerate"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)
from diffusers_tasks import make_pair, measure  # noqa: E402
from helpers import FEW, check_equal, relative_error  # noqa: E402

from stable_diffusion import StableDiffusion  # noqa: E402
from stable_diffusion.config import TinyVAEConfig  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # of these libraries, about each other
]

TOLERANCE = 1e-5
LEVELS = 2
FORMS = {  # arguments of `AutoencoderTiny`: the published model, and another one
    "published": {},
    "other": {
        "encoder_block_out_channels": (24,) * 4,
        "decoder_block_out_channels": (24,) * 4,
        "num_encoder_blocks": (1, 2, 1, 2),
        "num_decoder_blocks": (2, 1, 3, 1),
        "scaling_factor": 0.5,
    },
}


def make_tiny(form):
    """Returns an `AutoencoderTiny` of random parameters whose signal neither fades nor grows."""
    model, generator = diffusers.AutoencoderTiny(**FORMS[form]).eval(), torch.Generator()
    generator.manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        deviation = (1.0 / fan_in) ** 0.5
        torch.nn.init.normal_(parameter, std=deviation, generator=generator)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=FORMS)
def both(request, tmp_path_factory):
    """diffusers' model, the folder where it was saved, and a pipeline with it."""
    theirs, folder = make_tiny(request.param), tmp_path_factory.mktemp("tiny") / "vae"
    theirs.save_pretrained(folder)
    return theirs, folder, StableDiffusion(64, 64, False, None, FEW, vae=folder)


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def compare_layers(model, first, last, inputs, layers, theirs):
    """Compares the output of each layer of a half; returns the largest error, and how many."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(np.moveaxis(out.numpy(), 1, -1)))
        for layer in layers
    ]
    theirs()
    for hook in hooks:
        hook.remove()
    ours = keras.Model(model.inputs, [layer.output for layer in model.layers[first:last]])
    found = ours.predict_on_batch(inputs)
    errors = [relative_error(a, b) for a, b in zip(found, seen, strict=True)]
    return max(errors), len(errors)


def test_the_decoder_layer_by_layer(both):
    theirs, _, pipeline = both
    factor = pipeline.config.vae.scaling_factor
    latent = 2 * np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype("float32")
    images = []
    error, count = compare_layers(
        pipeline.decoder,
        2,  # after scaling and the limit, which diffusers has no layers for
        -1,
        latent,
        theirs.decoder.layers,
        lambda: images.append(theirs.decode(channels_first(latent / factor)).sample.numpy()),
    )
    assert error < TOLERANCE and count == len(theirs.decoder.layers)
    found = pipeline.decoder.predict_on_batch(latent)
    assert relative_error(found, np.moveaxis(images[0], 1, -1)) < TOLERANCE


def test_the_encoder_layer_by_layer(both):
    theirs, _, pipeline = both
    factor = pipeline.config.vae.scaling_factor
    images = np.random.default_rng(1).uniform(-1, 1, (2, 64, 48, 3)).astype("float32")
    latents = []
    error, count = compare_layers(
        pipeline.image_encoder,
        1,
        -2,  # before the variance, which there is none of, and scaling
        images,
        theirs.encoder.layers,
        lambda: latents.append(theirs.encode(channels_first(images)).latents.numpy()),
    )
    assert error < TOLERANCE and count == len(theirs.encoder.layers)
    found = pipeline.image_encoder.predict_on_batch(images)
    assert relative_error(found, factor * np.moveaxis(latents[0], 1, -1)) < TOLERANCE


def test_diffusers_loads_what_is_saved(both, tmp_path):
    theirs, _, pipeline = both
    pipeline.save(tmp_path / "x")
    again = diffusers.DiffusionPipeline.load_config(tmp_path / "x")
    assert again["vae"] == ["diffusers", "AutoencoderTiny"]
    again = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "x", subfolder="vae")
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert again.config.scaling_factor == theirs.config.scaling_factor


def test_the_original_files_of_pytorch(tmp_path):
    """diffusers counts the decoder's layers without the first, TAESD's limit."""
    theirs = make_tiny("published")
    theirs.save_pretrained(tmp_path / "vae")
    torch.save(theirs.encoder.layers.state_dict(), tmp_path / "taesd_encoder.pth")
    decoder = torch.nn.Sequential(torch.nn.Identity(), *theirs.decoder.layers)
    torch.save(decoder.state_dict(), tmp_path / "taesd_decoder.pth")
    expected = StableDiffusion(64, 64, False, None, FEW, vae=tmp_path / "vae")
    for path in (tmp_path / "taesd_encoder.pth", tmp_path / "taesd_decoder.pth"):
        model = StableDiffusion(64, 64, False, None, FEW, vae=path)
        assert model.config.vae == TinyVAEConfig()
        for component in ("decoder", "image_encoder"):
            check_equal(getattr(model, component), getattr(expected, component))


@pytest.mark.parametrize(("task", "family"), [("image to image", "1"), ("inpainting", "1")])
def test_images_are_those_of_diffusers(task, family, tmp_path):
    pair = make_pair(family, tmp_path, make_tiny("other"))
    assert pair.ours.config.vae.width == 24
    difference, kept = measure(pair, task, "ddim", 0.6)
    assert difference <= LEVELS and not kept
