"""KerasCV's .h5 files. The reference is the layout that KerasCV 0.9.0 writes on Keras 2.15.

Parameters are copied, so they are compared for equality.
"""

import gzip
import json
import os
from dataclasses import replace

import h5py
import keras
import numpy as np
import pytest
from helpers import DATA, layers_of, write_legacy, write_names

from stable_diffusion import (
    Decoder,
    DiffusionModel,
    DiffusionModelV2,
    ImageEncoder,
    TextEncoder,
    TextEncoderV2,
)
from stable_diffusion.checkpoints import kerascv, open_checkpoint
from stable_diffusion.checkpoints.kerascv import (
    PRESETS,
    KerasCVFolder,
    KerasCVPreset,
    is_legacy,
    load_legacy,
)
from stable_diffusion.config import COMPONENTS, SD1, SD1_INPAINTING, SD2, TINY, TINY_V2

LAYOUT = DATA / "kerascv_h5_layout.json.gz"


def tiny(part, config=TINY, vocab_size=64, name=None):
    kwargs = {"download_weights": False, "name": name}
    return {
        "text_encoder": lambda: TextEncoder(7, vocab_size, config=config.text, **kwargs),
        "diffusion_model": lambda: DiffusionModel(64, 64, 7, config=config.unet, **kwargs),
        "decoder": lambda: Decoder(64, 64, config=config.vae, **kwargs),
        "image_encoder": lambda: ImageEncoder(config=config.vae, **kwargs),
    }[part]()


def flat(layers):
    return [value for _, tensors in layers for _, value in tensors]


def snapshot(model):
    return [np.array(value) for value in model.get_weights()]


def assert_equal(values, expected):
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, other)


def leaves_and_shapes(layers):
    return [
        [(name.removesuffix(":0").split("/")[-1], tuple(shape)) for name, shape in tensors]
        for _, tensors in layers
        if tensors
    ]


SIX = {
    "kcv_encoder.h5": lambda **kwargs: TextEncoder(77, **kwargs),
    "kcv_diffusion_model.h5": lambda **kwargs: DiffusionModel(64, 64, 77, **kwargs),
    "kcv_decoder.h5": lambda **kwargs: Decoder(64, 64, **kwargs),
    "vae_encoder.h5": lambda **kwargs: ImageEncoder(**kwargs),
    "text_encoder_v2_1.h5": lambda **kwargs: TextEncoderV2(77, **kwargs),
    "diffusion_model_v2_1.h5": lambda **kwargs: DiffusionModelV2(64, 64, 77, **kwargs),
}


@pytest.mark.parametrize("file", SIX)
def test_full_size_models_have_the_published_layout(file):
    layout = json.loads(gzip.decompress(LAYOUT.read_bytes()))[file]["layers"]
    with keras.StatelessScope(initialize_variables=False):  # shapes only, without the memory
        model = SIX[file](download_weights=False)
        ours = [[layer.name, [[w.path, w.shape] for w in layer.weights]] for layer in model.layers]
    keras.backend.clear_session()
    assert leaves_and_shapes(ours) == leaves_and_shapes(layout)


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("part", ["text_encoder", "diffusion_model", "decoder", "image_encoder"])
def test_round_trip(part, config, tmp_path):
    model = tiny(part, config)
    layers = layers_of(model)
    path = write_legacy(tmp_path / "x.h5", layers)
    assert is_legacy(path)
    model.load_weights(path)
    assert_equal(model.get_weights(), flat(layers))


@pytest.mark.parametrize(
    "options",
    [{"chunk": 3}, {"root": "model_weights"}, {"compression": "gzip"}, {"fletcher32": True}],
    ids=lambda options: next(iter(options)),
)
def test_variants_of_the_layout(options, tmp_path):
    model = tiny("decoder")
    layers = layers_of(model)
    load_legacy(model, write_legacy(tmp_path / "x.h5", layers, **options))
    assert_equal(model.get_weights(), flat(layers))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_cast(dtype, tmp_path):
    model = tiny("decoder")
    layers = [[n, [[t, v.astype(dtype)] for t, v in ts]] for n, ts in layers_of(model)]
    load_legacy(model, str(write_legacy(tmp_path / "x.h5", layers)))
    assert_equal(model.get_weights(), [value.astype("float32") for value in flat(layers)])
    assert {w.dtype for w in model.weights} == {"float32"}


def test_values_that_are_not_finite_are_loaded(tmp_path):
    model = tiny("decoder")
    layers = layers_of(model)
    flat(layers)[0][...] = np.inf
    with pytest.warns(UserWarning, match="x.h5 has values that are not finite"):
        load_legacy(model, write_legacy(tmp_path / "x.h5", layers))
    assert np.isinf(model.get_weights()[0]).all()


def test_values_that_are_not_finite_in_the_dtype_of_the_model(tmp_path):
    keras.config.set_dtype_policy("float16")
    try:
        model = tiny("decoder")
    finally:
        keras.config.set_dtype_policy("float32")
    layers = [[n, [[t, v.astype("float32")] for t, v in ts]] for n, ts in layers_of(model)]
    flat(layers)[0][...] = 1e5
    with pytest.warns(UserWarning, match=r"or not in the dtype of the decoder\w*: in "):
        load_legacy(model, write_legacy(tmp_path / "x.h5", layers))
    assert np.isinf(model.get_weights()[0]).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
def test_keras_3_files_still_load(tmp_path):
    model, path = tiny("decoder"), tmp_path / "x.weights.h5"
    expected = snapshot(model)
    model.save_weights(path)
    assert not is_legacy(path)
    model.set_weights([np.zeros_like(value) for value in expected])
    model.load_weights(path)
    assert_equal(model.get_weights(), expected)


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras", ".weights.json"])
def test_nothing_waits_for_a_pipe(suffix, tmp_path):
    model = tiny("decoder")
    before = snapshot(model)
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match=f"x{suffix} must be a file; it is a pipe"):
        model.load_weights(tmp_path / f"x{suffix}")
    assert_equal(model.get_weights(), before)


def test_keras_3_formats_that_are_not_hdf5_are_left_to_keras(tmp_path):
    assert not is_legacy(tmp_path / "x.keras")


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*no\.h5"):
        is_legacy(tmp_path / "no.h5")


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match="must be a file; it is a folder"):
        is_legacy(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer")],
)
def test_not_hdf5(content, what, tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.h5 is not an HDF5 file: it is {what}"):
        tiny("decoder").load_weights(path)


@pytest.mark.parametrize("kept", [0.1, 0.9])
def test_truncated(kept, tmp_path):
    model = tiny("decoder")
    before = snapshot(model)
    path = write_legacy(tmp_path / "x.h5", layers_of(model))
    content = path.read_bytes()
    size = int(kept * len(content))
    path.write_bytes(content[:size])
    message = f"x.h5 is truncated: it has {size} of {len(content)} bytes"
    with pytest.raises(ValueError, match=message):
        model.load_weights(path)
    assert_equal(model.get_weights(), before)


def test_hdf5_of_something_else(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["x"] = [1.0]
    assert not is_legacy(path)
    with pytest.raises(ValueError, match="x.h5 is not in Keras 2's legacy layout"):
        load_legacy(tiny("decoder"), path)


def test_a_listed_tensor_is_missing(tmp_path):
    model = tiny("decoder")
    path = write_legacy(tmp_path / "x.h5", layers_of(model))
    with h5py.File(path, "a") as file:
        del file["conv_in"]
    with pytest.raises(ValueError, match=r"x\.h5 is corrupt: .*conv_in"):
        load_legacy(model, path)


def mismatch(model, path):
    """Returns the error's message, and checks that the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match="which is unchanged") as error:
        model.load_weights(path)
    assert_equal(model.get_weights(), before)
    assert str(path) in str(error.value) and repr(model.name) in str(error.value)
    return str(error.value)


def test_names_in_a_file_are_quoted_in_short(tmp_path):
    model = tiny("decoder")
    layers = layers_of(model)
    layers[-1][1][-1] = ["x" * 9999, np.zeros(7, "float32")]
    assert len(mismatch(model, write_legacy(tmp_path / "x.h5", layers))) < 1000


def test_wrong_shape_in_the_last_layer(tmp_path):
    model = tiny("decoder", name="mine")
    layers = layers_of(model)
    layers[-1][1][0][1] = layers[-1][1][0][1][..., :2]
    last, count = layers[-1][1][0][0], sum(value.size for value in flat(layers))
    message = mismatch(model, write_legacy(tmp_path / "x.h5", layers))
    assert f"{count:,} parameters, the model " in message
    variable = model.layers[-1].weights[0]
    assert message.endswith(
        "The first 1 of 1 differences, model | file:\n"
        f"  {variable.path} {tuple(variable.shape)} | {last} {(*variable.shape[:-1], 2)}"
    )


def test_too_few_layers(tmp_path):
    model = tiny("decoder")
    message = mismatch(model, write_legacy(tmp_path / "x.h5", layers_of(model)[:-1]))
    weighted = sum(bool(layer.weights) for layer in model.layers)
    assert f"It has {weighted - 1} layers with " in message
    assert f"the model {weighted} layers with " in message
    assert message.count("| nothing") == len(model.layers[-1].weights)


def test_too_many_layers(tmp_path):
    model = tiny("decoder")
    extra = [["more", [["more/kernel:0", np.zeros(2, "float32")]]]]
    message = mismatch(model, write_legacy(tmp_path / "x.h5", layers_of(model) + extra))
    assert message.endswith("\n  nothing | more/kernel:0 (2,)")


def test_too_few_tensors_in_a_layer(tmp_path):
    model = tiny("decoder")
    layers = layers_of(model)
    name, _ = layers[-1][1].pop()
    message = mismatch(model, write_legacy(tmp_path / "x.h5", layers))
    assert message.endswith(f"{name.removesuffix(':0')} (3,) | nothing")


def test_integers(tmp_path):
    model = tiny("decoder")
    layers = layers_of(model)
    layers[-1][1][1][1] = np.zeros(3, "int32")
    message = mismatch(model, write_legacy(tmp_path / "x.h5", layers))
    assert message.endswith(" (3,) is int32, not float")


def test_only_ten_differences_are_listed(tmp_path):
    path = write_legacy(tmp_path / "x.h5", layers_of(tiny("image_encoder")))
    message = mismatch(tiny("diffusion_model"), path)
    assert "The first 10 of " in message and len(message.splitlines()) == 12


@pytest.mark.parametrize(
    ("file", "looks"),
    [
        ("kcv_encoder.h5", "kcv_encoder.h5, the text encoder of Stable Diffusion 1."),
        ("kcv_diffusion_model.h5", "kcv_diffusion_model.h5, the diffusion model of Stable Diff"),
        ("kcv_decoder.h5", "kcv_decoder.h5, the VAE's decoder."),
        ("vae_encoder.h5", "vae_encoder.h5, the VAE's image encoder."),
        ("text_encoder_v2_1.h5", "text_encoder_v2_1.h5, the text encoder of Stable Diffusion 2."),
        ("diffusion_model_v2_1.h5", "diffusion_model_v2_1.h5, the diffusion model of Stable Diff"),
        ("inpainting", "an inpainting diffusion model, which has 9 channels of input."),
    ],
)
def test_which_published_file_it_looks_like(file, looks, tmp_path):
    layout = json.loads(gzip.decompress(LAYOUT.read_bytes()))
    layers = layout["kcv_diffusion_model.h5" if file == "inpainting" else file]["layers"]
    if file == "inpainting":
        next(shape for _, ts in layers for _, shape in ts if shape == [3, 3, 4, 320])[2] = 9
    path = tmp_path / file
    with h5py.File(path, "w") as hdf5:  # the shapes without values, which take no space
        write_names(hdf5, "layer_names", [name for name, _ in layers], None)
        for layer, tensors in layers:
            group = hdf5.create_group(layer)
            write_names(group, "weight_names", [name for name, _ in tensors], None)
            for name, shape in tensors:
                group.create_dataset(name, shape, "float32")
    assert f"The file looks like {looks}" in mismatch(tiny("decoder"), path)


def corrupt(path, dataset):
    """Flips bits of a dataset's stored values, which its checksum then contradicts."""
    with h5py.File(path) as file:
        position = file[dataset].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0xFF]))


def test_corrupt_midway_leaves_no_usable_model(tmp_path):
    model = tiny("decoder", name="mine")
    before, layers = snapshot(model), layers_of(model)
    path = write_legacy(tmp_path / "x.h5", layers, fletcher32=True)
    layer, tensors = [entry for entry in layers if entry[1]][3]
    corrupt(path, f"{layer}/{tensors[0][0]}")
    with pytest.raises(ValueError, match=r"x\.h5 is corrupt.*'mine' are NaN now") as error:
        model.load_weights(path)
    assert tensors[0][0] in str(error.value)
    after, first = model.get_weights(), len(flat([entry for entry in layers if entry[1]][:3]))
    assert all(np.isnan(value).all() for value in after[: first + 1])
    assert_equal(after[first + 1 :], before[first + 1 :])
    assert np.isnan(model.predict_on_batch(np.zeros((1, *model.input_shape[1:]), "float32"))).all()
    load_legacy(model, write_legacy(tmp_path / "y.h5", layers))
    assert_equal(model.get_weights(), flat(layers))


def test_interrupted_midway_leaves_no_usable_model(tmp_path, monkeypatch):
    model = tiny("decoder")
    path = write_legacy(tmp_path / "x.h5", layers_of(model))
    read, count = h5py.Dataset.__getitem__, iter(range(100))

    def interrupted(self, key):
        if next(count) == 5:
            raise KeyboardInterrupt
        return read(self, key)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_legacy(model, path)
    assert np.isnan(model.get_weights()[0]).all()


# Presets and folders


def test_presets_name_the_six_published_files():
    from stable_diffusion.checkpoints.hub import PUBLISHED

    assert PRESETS["sd1.4"].config == SD1 and PRESETS["sd2.1-base"].config == SD2
    assert {f for preset in PRESETS.values() for f in preset.files.values()} == set(PUBLISHED)
    v1, v2 = (preset.files for preset in PRESETS.values())
    assert (v1["decoder"], v1["image_encoder"]) == (v2["decoder"], v2["image_encoder"])


def test_no_such_preset():
    with pytest.raises(ValueError, match="presets are sd1.4, sd2.1-base; there is no 'sd3'"):
        KerasCVPreset("sd3")


def make(part):
    def build(config, download_weights):
        assert not download_weights
        return tiny(part, replace(TINY, **{COMPONENTS[part]: config}))

    return build


def test_preset_downloads_the_file_of_the_part_asked_for(tmp_path, monkeypatch):
    layers = layers_of(tiny("decoder"))
    path, asked = write_legacy(tmp_path / "kcv_decoder.h5", layers), []
    monkeypatch.setattr(kerascv, "download_published", lambda file: asked.append(file) or str(path))
    monkeypatch.setitem(PRESETS, "sd2.1-base", PRESETS["sd2.1-base"]._replace(config=TINY_V2))
    reader = open_checkpoint("sd2.1-base", SD1)
    assert reader.config == TINY_V2 and asked == []
    model = reader.build("decoder", make("decoder"))
    assert_equal(model.get_weights(), flat(layers))
    assert set(asked) == {"kcv_decoder.h5"}


@pytest.mark.parametrize("part", ["text_encoder", "image_encoder"])
@pytest.mark.parametrize("preset", ["sd1.4", "sd2.1-base"])
def test_folder(preset, part, tmp_path):
    config = {"sd1.4": TINY, "sd2.1-base": TINY_V2}[preset]
    layers = layers_of(tiny(part, config))
    write_legacy(tmp_path / PRESETS[preset].files[part], layers)
    reader = open_checkpoint(tmp_path, config)
    assert reader.config == config and isinstance(reader, KerasCVFolder)
    assert_equal(reader.build(part, make(part)).get_weights(), flat(layers))


@pytest.mark.parametrize(
    ("files", "given", "config", "encoder"),
    [
        (["kcv_encoder.h5"], SD1, SD1, "kcv_encoder.h5"),
        (["kcv_encoder.h5"], SD2, SD1, "kcv_encoder.h5"),
        (["kcv_encoder.h5"], SD1_INPAINTING, SD1_INPAINTING, "kcv_encoder.h5"),
        (["text_encoder_v2_1.h5"], SD1, SD2, "text_encoder_v2_1.h5"),
        (["diffusion_model_v2_1.h5"], SD1, SD2, "text_encoder_v2_1.h5"),
        (["text_encoder_v2_1.h5"], TINY_V2, TINY_V2, "text_encoder_v2_1.h5"),
        (["kcv_encoder.h5", "text_encoder_v2_1.h5"], SD1, SD1, "kcv_encoder.h5"),
        (["kcv_encoder.h5", "text_encoder_v2_1.h5"], SD2, SD2, "text_encoder_v2_1.h5"),
        (["kcv_decoder.h5"], SD1, SD1, "kcv_encoder.h5"),
        (["kcv_decoder.h5"], SD2, SD2, "text_encoder_v2_1.h5"),
    ],
)
def test_folder_tells_the_version(files, given, config, encoder, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    reader = KerasCVFolder(tmp_path, given)
    assert reader.config == config and reader.names["text_encoder"] == encoder


def test_folder_without_the_part_asked_for(tmp_path):
    (tmp_path / "kcv_decoder.h5").touch()
    (tmp_path / "notes.txt").touch()
    reader, built = KerasCVFolder(tmp_path, SD1), []
    message = "has no kcv_encoder.h5, the file of the text_encoder. It has: kcv_decoder.h5, notes.t"
    with pytest.raises(ValueError, match=message) as error:
        reader.build("text_encoder", built.append)
    assert str(tmp_path) in str(error.value) and not built


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="There is no folder .*no"):
        KerasCVFolder(tmp_path / "no", SD1)
