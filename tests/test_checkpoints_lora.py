"""LoRAs: outputs equal to those of peft and diffusers, and what doesn't fit is refused.

The reference are random adapters that peft gave to the tiny models in tests/data/diffusers_golden,
saved with the names of each kind of file, and what torch computes with them, beside the kernels and
merged into them (tests/data/make_lora_golden.py). All is float32 unless said; errors are relative
to the largest value of the reference. Needs none of these libraries.
"""

import gc
import json
import shutil
from dataclasses import replace

import keras
import numpy as np
import pytest
from helpers import DATA, golden_pipeline
from keras import ops
from safetensors.numpy import save_file

from stable_diffusion.adapters.lora import load_lora, unload_lora
from stable_diffusion.checkpoints.diffusers import LAYOUTS
from stable_diffusion.noise_scheduler import timestep_embedding

LORA = DATA / "lora_golden"
TOLERANCE = 5e-6  # up to 1.6e-6 is seen
FILES = [  # adapter, files that have it together, and family
    ("everything", ["everything_kohya"], "v1"),
    ("everything", ["everything_diffusers"], "v1"),
    ("attention", ["attention_folder"], "v1"),
    ("attention", ["attention_processor"], "v1"),
    ("rslora", ["rslora_peft_unet", "rslora_peft_text_encoder"], "v1"),
    ("original", ["original_kohya"], "v1"),
    ("linear", ["linear_kohya"], "v2"),
]
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def find_variables(component, model):
    """Returns the variables of a model by diffusers' names of them."""
    return {slot.name: slot.variable for slot in LAYOUTS[component].find_slots(model)}


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "lora_golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def shared():
    """A pipeline for tests that leave it as it was."""
    return golden_pipeline("v1")


@pytest.fixture(autouse=True)
def unchanged(request):
    """Checks that tests leave the shared pipeline as it was."""
    if "shared" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("shared")
    before = snapshot(model)
    yield
    unload_lora(model)
    check_same(snapshot(model), before)


def file_of(name):
    path = LORA / name
    return path if path.is_dir() else path.with_name(f"{name}.safetensors")


def run_unet(model, family="v1"):
    with np.load(DATA / f"diffusers_golden_{family}.npz") as file:
        latent, context = file["latent"], file["context"]
        time = timestep_embedding(file["timesteps"], 8)
    return ops.convert_to_numpy(model.diffusion_model([latent, time, context]))


def check(actual, expected, tolerance=TOLERANCE):
    actual = np.asarray(ops.convert_to_numpy(actual), "float32")
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"relative error {error:.1e}"


def snapshot(model, parts=("text_encoder", "diffusion_model")):
    """The bytes of all parameters."""
    return {
        f"{part} {variable.path}": ops.convert_to_numpy(variable.value).tobytes()
        for part in parts
        for variable in getattr(model, part).weights
    }


def check_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in actual if actual[name] != expected[name]]


# --- Equal to other libraries --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "files", "family"), FILES)
def test_outputs_equal_peft(name, files, family, golden, shared):
    model = shared if family == "v1" else golden_pipeline(family)
    for file in files:
        load_lora(model, file_of(file))
    for merged in ("", "_merged"):
        check(run_unet(model, family), golden[f"{name}_unet{merged}"])
        if f"{name}_context" in golden:
            check(model.encode_text(["", "prompt"]), golden[f"{name}_context{merged}"])


def test_the_same_picture(golden, shared):
    load_lora(shared, LORA / "everything_kohya.safetensors")
    with np.load(DATA / "diffusers_golden_v1.npz") as file:
        noise, without = file["noise"], file["drawn"]
    picture = shared.text_to_image("prompt", num_steps=4, diffusion_noise=noise, verbose=0)
    # diffusers rounds to the nearest level, KerasCV and so this pipeline down.
    assert np.abs(picture.astype(int) - golden["everything_drawn"]).max() <= 1
    assert np.abs(picture.astype(int) - without).max() > 30


def test_every_kernel_can_be_changed(shared):
    kernels = [
        variable
        for part in ("text_encoder", "diffusion_model")
        for variable in find_variables(part, getattr(shared, part)).values()
        if variable.path.endswith("/kernel")
    ]
    assert load_lora(shared, LORA / "everything_kohya.safetensors") == len(kernels)


# --- Sums, and back ------------------------------------------------------------------------------


def kernel(model, key=KEY):
    """A kernel as PyTorch has it."""
    name = f"{key.removeprefix('unet.')}.weight"
    return ops.convert_to_numpy(
        find_variables("diffusion_model", model.diffusion_model)[name].value
    ).T


def adapter(seed=0, rank=2, key=KEY, shape=(16, 16), dtype="float32"):
    rng = np.random.default_rng(seed)
    return {
        f"{key}.lora_A.weight": rng.normal(size=(rank, *shape[1:])).astype(dtype),
        f"{key}.lora_B.weight": rng.normal(size=(shape[0], rank)).astype(dtype),
    }


def product(tensors):
    down, up = (tensors[f"{KEY}.lora_{half}.weight"].astype("float32") for half in "AB")
    return up @ down


def save(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return path


def test_scale_and_several_add_up(shared, tmp_path):
    before, one, two = kernel(shared), adapter(1), adapter(2)
    for path, tensors, scale in (("one", one, 0.5), ("two", two, -2)):
        load_lora(shared, save(tmp_path / f"{path}.safetensors", tensors), scale)
    expected = before + 0.5 * product(one) - 2 * product(two)
    np.testing.assert_allclose(kernel(shared), expected, rtol=1e-5, atol=1e-5)
    assert unload_lora(shared) == 1
    np.testing.assert_array_equal(kernel(shared), before)
    assert unload_lora(shared) == 0


def test_only_changed_kernels_are_kept(shared, tmp_path):
    assert load_lora(shared, save(tmp_path / "a.safetensors", adapter())) == 1
    (kept,) = shared.changes._originals.values()
    assert [array.nbytes for array in kept.values()] == [16 * 16 * 4]


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_bfloat16"])
def test_other_policies(policy, golden):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        model = golden_pipeline("v1")
        kernels = snapshot(model)
        load_lora(model, LORA / "everything_diffusers.safetensors")
        load_lora(model, LORA / "attention_folder", 0.5)
        load_lora(model, LORA / "attention_folder", -0.5)
        dtype = model.diffusion_model.weights[0].dtype
        assert dtype == ("float32" if policy.startswith("mixed") else policy)
        check(run_unet(model), golden["everything_unet"], 0.1 if "bfloat" in policy else 0.01)
        unload_lora(model)
        check_same(snapshot(model), kernels)
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_are_rounded_once(dtype, tmp_path):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(dtype)
        model = golden_pipeline("v1")
    finally:
        keras.config.set_dtype_policy(before)
    old, tensors = kernel(model).astype("float32"), adapter(dtype=dtype)
    load_lora(model, save(tmp_path / "a.safetensors", tensors), 0.3)
    expected = (old + np.float32(0.3) * product(tensors)).astype(kernel(model).dtype)
    np.testing.assert_array_equal(kernel(model), expected)


def test_a_replaced_part_is_not_written_to(tmp_path):
    model, path = golden_pipeline("v1"), save(tmp_path / "a.safetensors", adapter())
    first, before = model.diffusion_model, kernel(model)
    load_lora(model, path)
    model._diffusion_model = None
    second = model.diffusion_model
    for variable in second.weights:
        variable.assign(variable.value + 1)
    other = kernel(model)
    assert unload_lora(model) == 1
    np.testing.assert_array_equal(kernel(model), other)
    model._diffusion_model = first
    np.testing.assert_array_equal(kernel(model), before)


def test_a_part_that_is_gone_is_forgotten(tmp_path):
    model, path = golden_pipeline("v1"), save(tmp_path / "a.safetensors", adapter())
    load_lora(model, path)
    model._diffusion_model = None
    keras.backend.clear_session()
    gc.collect()
    assert len(model.changes._originals) == 0
    load_lora(model, path)
    assert unload_lora(model) == 1


def test_parts_are_built_only_if_needed(tmp_path):
    model = golden_pipeline("v1")
    load_lora(model, save(tmp_path / "a.safetensors", adapter()))
    assert model._text_encoder is None and model._diffusion_model is not None


# --- alpha and rank ------------------------------------------------------------------------------


def factor(model, path, tensors):
    """How much of the product a LoRA adds."""
    before = kernel(model)
    load_lora(model, path)
    change = kernel(model) - before
    unload_lora(model)
    (found,) = np.linalg.lstsq(product(tensors).reshape(-1, 1), change.ravel(), rcond=None)[0]
    return found


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_in_the_file(shape, shared, tmp_path):
    tensors = adapter()
    path = tmp_path / "a.safetensors"
    save(path, tensors | {f"{KEY}.alpha": np.full(shape, 3.0, "float32")})
    assert factor(shared, path, tensors) == pytest.approx(3 / 2, rel=1e-5)


def test_integer_alpha(shared, tmp_path):
    tensors = adapter()
    path = save(tmp_path / "a.safetensors", tensors | {f"{KEY}.alpha": np.array(3, "int64")})
    assert factor(shared, path, tensors) == pytest.approx(3 / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1),
        ({"lora_alpha": 6}, 3),
        ({"lora_alpha": 6, "r": 2, "alpha_pattern": {"to_q": 1, ".*": 9}}, 1 / 2),
        ({"lora_alpha": 6, "alpha_pattern": {"q": 1, "attn2.to_q": 1}}, 3),
        ({"lora_alpha": 6, "alpha_pattern": {r"mid_block.*attn\d\.to_q": 8}}, 4),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"r": 9, "rank_pattern": {"attn1.to_q": 2}}, 1),
    ],
)
@pytest.mark.parametrize("where", ["metadata", "folder"])
def test_alpha_in_the_config(config, expected, where, shared, tmp_path):
    tensors = adapter()
    if where == "metadata":
        packed = {f"unet.{key}": value for key, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(packed)}
        path = save(tmp_path / "a.safetensors", tensors, metadata)
    else:
        path = tmp_path
        renamed = {k.replace("unet.", "base_model.model."): v for k, v in tensors.items()}
        save(path / "adapter_model.safetensors", renamed)
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    assert factor(shared, path, tensors) == pytest.approx(expected, rel=1e-5)


def test_another_parts_config_is_not_used(shared, tmp_path):
    tensors, metadata = adapter(), {"lora_adapter_metadata": '{"text_encoder.lora_alpha": 9}'}
    path = save(tmp_path / "a.safetensors", tensors, metadata)
    assert factor(shared, path, tensors) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', not 'LOHA'"),
        ({"use_dora": True}, "use_dora must be False, not True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be .* not 'pissa'"),
        ({"init_lora_weights": []}, r"init_lora_weights must be .* not \[\]"),
        ({"lora_alpha": "6"}, "lora_alpha must be a positive number, not '6'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number, not nan"),
        ({"alpha_pattern": {"to_q": [1]}}, r"to_q must be a positive number, not \[1\]"),
        ({"alpha_pattern": [1]}, r"pattern must be a positive number, not \[1\]"),
        ({"alpha_pattern": {"(": 1}}, r"bad pattern, '\('"),
        ({"alpha_pattern": {"(.+)" * 9 + r"\1[xz]": 1}}, "bad pattern.*timed out"),
        ({"r": 4}, r"2 misshapen \(.*lora_A.weight \(2, 16\), not \(4, 16\)"),
    ],
)
def test_bad_configs(config, message, shared, tmp_path):
    renamed = {k.replace("unet.", "base_model.model."): v for k, v in adapter().items()}
    save(tmp_path / "adapter_model.safetensors", renamed)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_lora(shared, tmp_path)


def test_peft_without_config(shared, tmp_path):
    shutil.copy(LORA / "rslora_peft_unet" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="adapter_config.json is no JSON file"):
        load_lora(shared, tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100000])
def test_bad_metadata(text, shared, tmp_path):
    path = save(tmp_path / "a.safetensors", adapter(), {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="lora_adapter_metadata is no JSON object"):
        load_lora(shared, path)


# --- What is refused -----------------------------------------------------------------------------


def refused(model, path, message, **options):
    """Checks that a file is refused, and that nothing is left of it."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_lora(model, path, **options)
    check_same(snapshot(model), before)
    assert unload_lora(model) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "Stable Diffusion XL"),
        ("text_encoder_2.text_model.x.lora_A.weight", "Stable Diffusion XL"),
        ("lora_unet_x_transformer_blocks_1_attn1_to_q.lora_up.weight", "Stable Diffusion XL"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "for a transformer"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "for a transformer"),
        ("lora_unet_conv_in.dora_scale", "of the kind DoRA"),
        ("unet.conv_in.lora_magnitude_vector.weight", "of the kind DoRA"),
        ("lora_unet_conv_in.hada_w1_a", "of the kind LoHa"),
        ("lora_unet_conv_in.lokr_w1", "of the kind LoKr"),
        ("lora_unet_conv_in.lora_mid.weight", "of the kind LoCon with a third matrix"),
    ],
)
def test_unsupported_kinds(name, message, shared, tmp_path):
    path = save(tmp_path / "a.safetensors", adapter() | {name: np.zeros((2, 2), "float32")})
    refused(shared, path, rf"a\.safetensors is a LoRA .*{message}.*isn't supported: it has ")


def damaged(kind):
    tensors, conv = adapter(), "unet.conv_in"
    a, b = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
    if kind == "unknown":
        tensors["unet.conv_in.bias"] = np.zeros(8, "float32")
    elif kind == "for no kernel":
        tensors |= adapter(key="unet.up_blocks.7.conv")
    elif kind == "norm":
        tensors |= adapter(key="unet.conv_norm_out")
    elif kind == "half":
        del tensors[b]
    elif kind == "alpha alone":
        tensors[f"{conv}.alpha"] = np.array(1, "float32")
    elif kind == "rank":
        tensors[a] = tensors[a][:1]
    elif kind == "no rank":
        tensors[a], tensors[b] = tensors[a][:0], tensors[b][:, :0]
    elif kind == "width":
        tensors[a] = tensors[a][:, :8]
    elif kind == "vector":
        tensors[b] = tensors[b][:, 0]
    elif kind == "window":
        tensors |= adapter(key=conv, shape=(8, 4, 1, 1))
    elif kind == "alpha":
        tensors[f"{KEY}.alpha"] = np.ones(2, "float32")
    elif kind == "int":
        tensors[a] = tensors[a].astype("int32")
    elif kind == "doubled":
        tensors |= {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in tensors.items()}
    elif kind == "doubled kernel":
        tensors |= {
            k.replace(KEY, f"lora_unet_{KEY[5:].replace('.', '_')}"): v for k, v in tensors.items()
        }
    return tensors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown", r"1 unknown \(unet\.conv_in\.bias\)\."),
        ("for no kernel", r"1 for no kernel \(unet\.up_blocks\.7\.conv\.lora_A\.weight\)\."),
        ("norm", r"1 for no kernel \(unet\.conv_norm_out\.lora_A\.weight\)\."),
        ("half", r"1 without the other half \(.*to_q\.lora_A\.weight\)\."),
        ("alpha alone", r"1 without the other half \(unet\.conv_in\.alpha\)\."),
        ("rank", r"1 misshapen \(.*to_q\.lora_A\.weight \(1, 16\), not \(2, 16\)\)\."),
        ("no rank", r"2 misshapen \("),
        ("width", r"1 misshapen \(.*to_q\.lora_A\.weight \(2, 8\), not \(2, 16\)\)\."),
        ("vector", r"2 misshapen \("),
        ("window", r"1 misshapen \(unet\.conv_in\.lora_A.* \(2, 4, 1, 1\), not \(2, 4, 3, 3\)\)\."),
        ("alpha", r"1 misshapen \(.*to_q\.alpha \(2,\), not \(\)\)\."),
        ("int", r"1 not float \(.*to_q\.lora_A\.weight I32\)\."),
        ("doubled", r"2 doubled \("),
        ("doubled kernel", r"1 doubled \("),
    ],
)
def test_files_that_do_not_fit(kind, message, shared, tmp_path):
    path = save(tmp_path / "a.safetensors", damaged(kind))
    refused(
        shared, path, rf"a\.safetensors doesn't fit the pipeline, which is unchanged: {message}"
    )


def test_the_first_ten_are_named(shared, tmp_path):
    tensors = {f"unet.extra.{n:02}": np.zeros(1, "float32") for n in range(12)}
    path = save(tmp_path / "a.safetensors", adapter() | tensors)
    refused(shared, path, r"12 unknown \(unet\.extra\.00, .*unet\.extra\.09, \.\.\.\)")


def test_another_family(tmp_path):
    model = golden_pipeline("v2")
    refused(model, save(tmp_path / "a.safetensors", adapter(shape=(32, 32))), "2 misshapen")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_values_that_are_not_finite(value, shared, tmp_path):
    last = adapter()
    last[f"{KEY}.lora_A.weight"][0, 0] = value
    last[f"{KEY}.lora_B.weight"][:] = 100
    tensors = adapter(key="unet.conv_in", shape=(8, 4, 3, 3)) | last
    message = r"is unchanged: with .*to_q.lora_B.weight some values are not finite"
    refused(shared, save(tmp_path / "a.safetensors", tensors), message)


def test_a_failed_load_keeps_those_before(shared, tmp_path):
    before = kernel(shared)
    load_lora(shared, save(tmp_path / "a.safetensors", adapter()))
    with_it = kernel(shared)
    later = "unet.up_blocks.1.attentions.0.proj_in"
    bad = adapter(1) | adapter(key=later, shape=(8, 8))
    bad[f"{later}.lora_B.weight"][:] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        load_lora(shared, save(tmp_path / "b.safetensors", bad))
    np.testing.assert_array_equal(kernel(shared), with_it)
    assert unload_lora(shared) == 1
    np.testing.assert_array_equal(kernel(shared), before)


def test_a_file_that_becomes_unreadable(shared, tmp_path, monkeypatch):
    tensors = adapter() | adapter(key="unet.conv_in", shape=(8, 4, 3, 3))
    path = save(tmp_path / "a.safetensors", tensors)
    from stable_diffusion.checkpoints.tensors import SafetensorsFiles

    read, last = SafetensorsFiles.read_tensor, f"{KEY}.lora_B.weight"
    monkeypatch.setattr(
        SafetensorsFiles,
        "read_tensor",
        lambda file, name: read(file, name) if name != last else open(tmp_path / "missing"),
    )
    refused(shared, path, rf"{last} in .*a\.safetensors can't be read: .*missing")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_files(size, shared, tmp_path):
    path = save(tmp_path / "a.safetensors", adapter())
    path.write_bytes(path.read_bytes()[:size])
    refused(shared, path, r"a\.safetensors is no intact safetensors file")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_not_opened(suffix, shared, tmp_path):
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    refused(shared, path, r"is a pickle.* Convert it to \.safetensors")
    assert not (tmp_path / "run").exists()


def test_paths(shared, tmp_path):
    refused(shared, tmp_path / "missing.safetensors", "path must be that of a .safetensors file")
    refused(shared, tmp_path, r"must have one of pytorch_lora_weights.*; it has 0\.")
    (tmp_path / "a.txt").write_text("dear")
    refused(shared, tmp_path / "a.txt", "path must be that of a .safetensors file, not '.*a.txt'")
    for name in ("pytorch_lora_weights", "adapter_model"):
        save(tmp_path / f"{name}.safetensors", adapter())
    refused(shared, tmp_path, r"it has 2\.")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "pytorch_lora_weights.safetensors").symlink_to(tmp_path / "a.txt")
    refused(shared, inside, "leads out of")


def test_files_of_something_else(shared, tmp_path):
    refused(shared, save(tmp_path / "a.safetensors", {}), "has no LoRA")
    unet = DATA / "diffusers_golden/v1/unet/diffusion_pytorch_model.safetensors"
    refused(shared, unet, r"has no LoRA: \d+ unknown .* looks like a UNet in diffusers' layout")
    refused(shared, LORA / "embedding.safetensors", r"has no LoRA: 1 unknown \(<cat>\)")


@pytest.mark.parametrize("scale", ["1", None, float("nan"), float("inf")])
def test_scale(scale, shared):
    path = LORA / "attention_folder"
    refused(shared, path, "scale must be a finite number", scale=scale)


def test_config_of_the_pipeline_is_not_changed(shared):
    config = shared.config
    load_lora(shared, LORA / "attention_folder")
    assert shared.config == replace(config)
