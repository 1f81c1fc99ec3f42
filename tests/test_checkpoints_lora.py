"""LoRAs: outputs equal to those of peft and diffusers, and what doesn't fit is refused.

The reference are random adapters that peft gave to the tiny models in tests/data/diffusers_golden,
saved with the names of each kind of file, and what torch computes with them, beside the kernels and
merged into them (tests/data/make_lora_golden.py). All is float32 unless said; errors are relative
to the largest value of the reference. Needs none of these libraries.
"""

import gc
import json
import re
import shutil
from dataclasses import replace

import keras
import numpy as np
import pytest
from helpers import DATA, golden_pipeline, write_merges
from keras import ops
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stable_diffusion import SimpleTokenizer
from stable_diffusion.adapters.embedding import load_embedding
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


@pytest.mark.parametrize("name", ["everything_kohya", "everything_diffusers"])
def test_layers_that_the_config_leaves_out_are_ignored(name, shared, tmp_path):
    """The text encoder has two layers, and this file three."""
    path = file_of(name)
    tensors, expected = load_file(path), load_lora(shared, path)
    changed = snapshot(shared)
    unload_lora(shared)
    third = {re.sub(r"(layers[._])1", r"\g<1>2", key): x for key, x in tensors.items()}
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(third | tensors, tmp_path / "three.safetensors", metadata)
    assert len(third | tensors) > len(tensors)
    assert load_lora(shared, tmp_path / "three.safetensors") == expected
    check_same(snapshot(shared), changed)
    unload_lora(shared)
    key = next(key for key in third if key not in tensors)
    moved = {re.sub(r"(layers[._])0", r"\g<1>2", key): x for key, x in tensors.items()}
    for wrong in ({key: third[key]} | tensors, moved):  # no whole layer; a layer without a first
        save_file(wrong, tmp_path / "wrong.safetensors", metadata)
        with pytest.raises(ValueError, match="for no kernel"):
            load_lora(shared, tmp_path / "wrong.safetensors")


def test_every_kernel_can_be_changed(shared):
    kernels = [
        variable
        for part in ("text_encoder", "diffusion_model")
        for variable in find_variables(part, getattr(shared, part)).values()
        if variable.path.endswith("/kernel")
    ]
    assert load_lora(shared, LORA / "everything_kohya.safetensors") == len(kernels)


# --- Other kinds ---------------------------------------------------------------------------------

CONV, NORM = "lora_unet_down_blocks_0_resnets_0_conv2", "lora_unet_down_blocks_0_resnets_0_norm1"
TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
NAMES = {
    CONV: "down_blocks.0.resnets.0.conv2",
    NORM: "down_blocks.0.resnets.0.norm1",
    TO_Q: KEY[5:],
}


def parameter(model, key, leaf="weight"):
    """A parameter as PyTorch has it."""
    variable = find_variables("diffusion_model", model.diffusion_model)[f"{NAMES[key]}.{leaf}"]
    value = ops.convert_to_numpy(variable.value)
    return np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 1 else value


def randoms(**shapes):
    rng = np.random.default_rng(len(shapes))
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def load_parts(model, path, key, tensors, scale=1.0):
    names = {"up": "lora_up.weight", "down": "lora_down.weight"}
    named = {f"{key}.{names.get(part, part)}": value for part, value in tensors.items()}
    return load_lora(model, save(path / "a.safetensors", named), scale)


def kronecker(a, b):
    """The product with loops: block (i, j) is a[i, j] b."""
    return np.block([[value * b for value in row] for row in a])


KINDS_OF_16 = {  # tensors for a kernel (16, 16), and their formula in the papers
    "LoHa": (
        {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)},
        lambda t: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
        1.5 / 2,
    ),
    "LoKr, whole": (
        {"lokr_w1": (2, 4), "lokr_w2": (8, 4)},
        lambda t: kronecker(t["lokr_w1"], t["lokr_w2"]),
        1,
    ),
    "LoKr, w2 of two": (
        {"lokr_w1": (2, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 4)},
        lambda t: kronecker(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
        1.5 / 3,
    ),
    "LoKr, both of two": (
        {"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 4)},
        lambda t: kronecker(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
        1.5 / 3,
    ),
    "full": ({"diff": (16, 16)}, lambda t: t["diff"], 1),
}


@pytest.mark.parametrize("kind", KINDS_OF_16)
def test_kinds(kind, shared, tmp_path):
    shapes, formula, factor = KINDS_OF_16[kind]
    tensors, before = randoms(**shapes), parameter(shared, TO_Q)
    load_parts(shared, tmp_path, TO_Q, tensors | {"alpha": np.array(1.5, "float32")}, 0.5)
    expected = before + 0.5 * factor * formula(tensors)
    np.testing.assert_allclose(parameter(shared, TO_Q), expected, rtol=1e-5, atol=1e-5)
    assert unload_lora(shared) == 1
    np.testing.assert_array_equal(parameter(shared, TO_Q), before)


@pytest.mark.parametrize(
    ("shapes", "formula"),
    [
        (
            {"hada_w1_a": (8, 2), "hada_w1_b": (2, 72), "hada_w2_a": (8, 2), "hada_w2_b": (2, 72)},
            lambda t: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
        ),
        (
            {"lokr_w1": (2, 4), "lokr_w2": (4, 2, 3, 3)},
            lambda t: np.einsum("ab,cdhw->acbdhw", t["lokr_w1"], t["lokr_w2"]),
        ),
        (
            {"lokr_w1": (2, 4), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 18)},
            lambda t: np.einsum("ab,cr,rk->acbk", *t.values()),
        ),
        ({"diff": (8, 8, 3, 3)}, lambda t: t["diff"]),
    ],
)
def test_kinds_of_convolutions(shapes, formula, shared, tmp_path):
    tensors, before = randoms(**shapes), parameter(shared, CONV)
    load_parts(shared, tmp_path, CONV, tensors)
    expected = before + formula(tensors).reshape(before.shape)
    np.testing.assert_allclose(parameter(shared, CONV), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "lengths", "axes"),
    [
        (TO_Q, (16, 1), 1),
        (TO_Q, (1, 16), 0),
        (CONV, (8, 1, 1, 1), (1, 2, 3)),
        (CONV, (1, 8, 1, 1), (0, 2, 3)),
    ],
)
def test_dora(key, lengths, axes, shared, tmp_path):
    """Rows or columns of W + s BA are divided by their lengths and get those of the file."""
    before = parameter(shared, key)
    inputs = before.shape[1:]
    tensors = randoms(down=(2, *inputs), up=(before.shape[0], 2), dora_scale=lengths)
    load_parts(shared, tmp_path, key, tensors | {"alpha": np.array(1.0, "float32")}, 0.3)
    delta = (tensors["up"] @ tensors["down"].reshape(2, -1)).reshape(before.shape) / 2
    whole = before + delta
    norm = np.sqrt((whole.astype("float64") ** 2).sum(axis=axes, keepdims=True))
    expected = before + 0.3 * (tensors["dora_scale"] * whole / norm - before)
    np.testing.assert_allclose(parameter(shared, key), expected, rtol=1e-5, atol=1e-5)
    unload_lora(shared)
    np.testing.assert_array_equal(parameter(shared, key), before)


def test_norms_and_biases(shared, tmp_path):
    before = [parameter(shared, key, leaf) for key in (CONV, NORM) for leaf in ("weight", "bias")]
    tensors = randoms(a=(8, 8, 3, 3), b=(8,), c=(8,), d=(8,))
    names = [f"{CONV}.diff", f"{CONV}.diff_b", f"{NORM}.w_norm", f"{NORM}.b_norm"]
    path = save(tmp_path / "a.safetensors", dict(zip(names, tensors.values(), strict=True)))
    assert load_lora(shared, path, 0.5) == 4
    after = [parameter(shared, key, leaf) for key in (CONV, NORM) for leaf in ("weight", "bias")]
    for old, new, delta in zip(before, after, tensors.values(), strict=True):
        np.testing.assert_allclose(new, old + 0.5 * delta, rtol=1e-6, atol=1e-6)
    unload_lora(shared)
    lora = randoms(up=(8, 2), down=(2, 8, 3, 3), diff_b=(8,))
    assert load_parts(shared, tmp_path, CONV, lora) == 2
    assert unload_lora(shared) == 2
    assert load_parts(shared, tmp_path, CONV, {"diff_b": lora["diff_b"]}) == 1


@pytest.mark.parametrize(
    ("key", "shapes", "message"),
    [
        (
            TO_Q,
            {"lokr_w1": (3, 4), "lokr_w2": (8, 4)},
            r"1 misshapen .*lokr_w2 \(8, 4\), not \(0, 4",
        ),
        (TO_Q, {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16)}, "1 without the other half"),
        (TO_Q, {"up": (16, 2), "down": (2, 16), "diff": (16, 16)}, "1 without the other half"),
        (TO_Q, {"up": (16, 2), "down": (2, 16), "dora_scale": (8, 1)}, r"1 misshapen .*dora_scale"),
        (TO_Q, {"diff": (16, 8)}, r"1 misshapen .*diff \(16, 8\), not \(16, 16\)"),
        (TO_Q, {"diff_b": (16,)}, r"1 for no kernel \(.*to_q.diff_b"),  # it has no bias
        (NORM, {"up": (8, 2), "down": (2, 8)}, "1 for no kernel"),
    ],
)
def test_kinds_that_do_not_fit(key, shapes, message, shared, tmp_path):
    tensors = {f"{key}.{part}": value for part, value in randoms(**shapes).items()}
    tensors = {k.replace(".up", ".lora_up.weight"): v for k, v in tensors.items()}
    tensors = {k.replace(".down", ".lora_down.weight"): v for k, v in tensors.items()}
    refused(shared, save(tmp_path / "a.safetensors", tensors), message)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "LoKr, whole"])
@pytest.mark.parametrize("key", [CONV, TO_Q])
def test_kinds_equal_peft(kind, key, shared, tmp_path):
    """peft merges random matrices into the same kernel."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    before = np.array(parameter(shared, key))
    layer = torch.nn.Conv2d(8, 8, 3) if key == CONV else torch.nn.Linear(16, 16, bias=False)
    layer.weight.data = torch.tensor(before)
    config = {"r": 1 + (kind == "LoHa"), "target_modules": ["0"], "init_weights": False}
    if kind in ("LoRA", "DoRA"):
        config = {"r": 3, "lora_alpha": 2, "target_modules": ["0"], "use_dora": kind == "DoRA"}
        config = peft.LoraConfig(**config, init_lora_weights=False)
    elif kind == "LoHa":
        config = peft.LoHaConfig(**config, alpha=2)
    else:
        config |= {"r": 32} if kind == "LoKr, whole" else {}
        config = peft.LoKrConfig(**config, alpha=2, decompose_both=True)
    torch.manual_seed(0)
    model = peft.get_peft_model(torch.nn.Sequential(layer), config)
    for name, value in model.named_parameters():
        if "magnitude" in name:
            value.data = value.data * (1 + torch.rand_like(value))
    tensors = peft.get_peft_model_state_dict(model)
    tensors = {k.removeprefix("base_model.model.0."): v.numpy() for k, v in tensors.items()}
    named = {f"{key}.{part}": np.ascontiguousarray(v) for part, v in tensors.items()}
    named[f"{key}.alpha"] = np.array(2.0, "float32")
    peft_config = model.peft_config["default"]
    expected = model.merge_and_unload()[0].weight.detach().numpy()
    if kind != "LoKr, whole":  # LyCORIS and peft have other factors for it
        load_lora(shared, save(tmp_path / "a.safetensors", named))
        np.testing.assert_allclose(parameter(shared, key), expected, rtol=1e-4, atol=1e-5)
        unload_lora(shared)
    peft_config.save_pretrained(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensors = {part: np.ascontiguousarray(value) for part, value in tensors.items()}
    load_lora(shared, save_as_peft(tmp_path / "peft", NAMES[key], tensors, config))
    np.testing.assert_allclose(parameter(shared, key), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - before).max() > 0.001


# --- Other names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to_q", "text"),
    [
        ("diffusion_model.middle_block.1.{}", "text_encoders.clip_l.transformer.{}"),  # ComfyUI
        ("unet.middle_block.1.{}", "clip_l.{}"),  # OneTrainer, from 2025 on
        ("lora_unet.mid_block.attentions.0.{}", "lora_te.{}"),  # OneTrainer's own
        ("lycoris_mid_block_attentions_0_{}", "lora_te_{}"),
    ],
)
def test_prefixes(to_q, text, shared, tmp_path):
    block = "transformer_blocks.0.attn1.to_q"
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    parts = [block, layer] if "." in text.replace("{}", "") else [block, layer.replace(".", "_")]
    parts[0] = parts[0] if "." in to_q else block.replace(".", "_")
    keys = [to_q.format(parts[0]), text.format(parts[1])]
    tensors = {}
    for key in keys:
        tensors |= {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v
                    for k, v in adapter(key=key).items()}  # fmt: skip
    before = kernel(shared)
    assert load_lora(shared, save(tmp_path / "a.safetensors", tensors)) == 2
    np.testing.assert_allclose(kernel(shared), before + product(adapter()), rtol=1e-5, atol=1e-5)


ORDERS = [  # of cloneofsimo's files, by the version of diffusers that they were made with
    "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 ff.net.0.proj "
    "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0",
    "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 "
    "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0 ff.net.0.proj",
]
BLOCKS = ["down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
BLOCKS += ["mid_block.attentions.0"]  # diffusers registers it last


def listed(model, order):
    """The matrices of a file without names, and diffusers' names of their kernels."""
    variables = find_variables("diffusion_model", model.diffusion_model)
    names = [f"{block}.transformer_blocks.0.{leaf}" for block in BLOCKS for leaf in order.split()]
    shapes = [ops.convert_to_numpy(variables[f"{name}.weight"].value).T.shape for name in names]
    return names, [randoms(up=(o, 1), down=(1, i)) for o, i in shapes]


@pytest.mark.parametrize("order", ORDERS)
def test_files_without_names(order, shared, tmp_path):
    names, pairs = listed(shared, order)
    tensors = {f"unet:{n}:{half}": v for n, pair in enumerate(pairs) for half, v in pair.items()}
    text = [f"text_encoder:{n}:" for n in range(8)]  # k, v, q, out of two layers
    tensors |= {name + "up": np.full((16, 1), n, "float32") for n, name in enumerate(text)}
    tensors |= {name + "down": np.ones((1, 16), "float32") for name in text}
    metadata = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "unet:0:rank": "1"}
    before = find_variables("diffusion_model", shared.diffusion_model)
    before = {name: ops.convert_to_numpy(before[f"{name}.weight"].value).T for name in names}
    encoder = find_variables("text_encoder", shared.text_encoder)
    old = {name: ops.convert_to_numpy(variable.value) for name, variable in encoder.items()}
    path = save(tmp_path / "a.safetensors", tensors, metadata)
    assert load_lora(shared, path) == len(names) + 8
    after = find_variables("diffusion_model", shared.diffusion_model)
    for name, pair in zip(names, pairs, strict=True):
        new = ops.convert_to_numpy(after[f"{name}.weight"].value).T
        expected = before[name] + pair["up"] @ pair["down"]
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-5)
    for n, half in enumerate(["k", "v", "q", "out"] * 2):
        name = f"text_model.encoder.layers.{n // 4}.self_attn.{half}_proj.weight"
        new = ops.convert_to_numpy(encoder[name].value)
        np.testing.assert_allclose(new, old[name] + n, rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_lists_of_pytorch(shared, tmp_path):
    torch = pytest.importorskip("torch")
    _, pairs = listed(shared, ORDERS[0])
    unet = [torch.tensor(pair[half]) for pair in pairs for half in ("up", "down")]
    text = [torch.ones(16, 1), torch.ones(1, 16)] * 8
    for name, tensors in (("lora", unet), ("lora.text_encoder", text)):
        torch.save([torch.nn.Parameter(tensor) for tensor in tensors], tmp_path / f"{name}.pt")
        assert load_lora(shared, tmp_path / f"{name}.pt") == len(tensors) / 2


def test_files_without_names_that_do_not_fit(shared, tmp_path):
    _, pairs = listed(shared, ORDERS[0])
    tensors = {f"unet:{n}:{half}": v for n, pair in enumerate(pairs) for half, v in pair.items()}
    fewer = {name: value for name, value in tensors.items() if not name.startswith("unet:35:")}
    message = "35 pairs of matrices without names. They fit no order .* 36 of the diffusion_model"
    refused(shared, save(tmp_path / "a.safetensors", fewer), message)
    swapped = tensors | {"unet:4:up": tensors["unet:5:up"]}
    refused(shared, save(tmp_path / "a.safetensors", swapped), "36 pairs .* fit no order")
    for width, name in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2")):
        wide = tensors | {"unet:5:down": np.ones((1, width), "float32")}
        message = rf"36 pairs .* fit no order .*\. It was made for {name}\.$"
        refused(shared, save(tmp_path / "a.safetensors", wide), message)


def test_made_for_another_model(shared, tmp_path):
    cross = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, name in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2")):
        path = save(tmp_path / "a.safetensors", adapter(key=cross, shape=(16, width)))
        refused(shared, path, rf"1 misshapen .*\. It was made for {name}\.$")
    path = save(tmp_path / "a.safetensors", adapter(key=cross, shape=(16, 99)))
    refused(shared, path, r"1 misshapen .*\)\.$")


# --- Words in a LoRA -----------------------------------------------------------------------------


@pytest.fixture
def with_words(tmp_path):
    """A pipeline with a small vocabulary, and a LoRA with the words <one> and <two>."""
    model = golden_pipeline("v1")
    model._tokenizer = SimpleTokenizer(write_merges(tmp_path / "merges.txt", 1000 - 514))
    words = {
        "bundle_emb.<one>.string_to_param.*": np.full((1, 16), 0.5, "float32"),
        "bundle_emb.<two>.clip_l": np.full((2, 16), 0.25, "float32"),
    }
    return model, save(tmp_path / "lora.safetensors", adapter() | words)


def test_words_in_a_lora(with_words, tmp_path):
    model, path = with_words
    before, config, vocab = snapshot(model), model.config, list(model.tokenizer.vocab)
    old = ops.convert_to_numpy(model.text_encoder.weights[0].value)
    assert load_lora(model, path) == 1
    assert model.tokenizer.encode("<One><two>")[1:-1] == [1000, 1001, 1002]
    table = ops.convert_to_numpy(model.text_encoder.weights[0].value)
    np.testing.assert_array_equal(table[1000:, 0], [0.5, 0.25, 0.25])
    assert load_lora(model, path, -0.5) == 1  # the same words are not added again
    three = save(tmp_path / "three.safetensors", {"<three>": np.ones((1, 16), "float32")})
    load_embedding(model, three)
    assert unload_lora(model) == 1
    assert model.tokenizer.vocab == [*vocab, "<three>"]
    assert model.tokenizer.encode("<three> <two>")[1] == 1000
    assert 1001 not in model.tokenizer.encode("<three> <two>")
    table = ops.convert_to_numpy(model.text_encoder.weights[0].value)
    np.testing.assert_array_equal(table, np.concatenate([old, np.ones((1, 16))]))

    model, path = golden_pipeline("v1"), path
    model._tokenizer = SimpleTokenizer(tmp_path / "merges.txt")
    load_lora(model, path)
    unload_lora(model)
    check_same(snapshot(model), before)
    assert model.config == config and model.tokenizer.vocab == vocab
    assert model.tokenizer.encoder == {token: n for n, token in enumerate(vocab)}


def test_words_that_do_not_fit(with_words, tmp_path):
    model, _ = with_words
    for token, shape, message in (
        ("<x>", (1, 8), "is for a text encoder of width 8, not 16"),
        ("<x>", (1, 1, 16), r"<x> must be \(D,\) or \(n, D\), not \(1, 1, 16\)"),
        ("x" * 999, (1, 1, 16), r": x{197}\.\.\. must be \(D,\)"),
    ):
        name = f"bundle_emb.{token}.string_to_param.*"
        tensors = adapter() | {name: np.ones(shape, "float32")}
        refused(model, save(tmp_path / "a.safetensors", tensors), message)
    assert len(model.tokenizer.vocab) == 1000


def test_words_that_prompts_have_already(with_words, tmp_path):
    model, _ = with_words
    for token in ("in", "x"):
        words = {f"bundle_emb.{token}.string_to_param.*": np.full((1, 16), 0.5, "float32")}
        path = save(tmp_path / "lora.safetensors", adapter() | words)
        with pytest.warns(UserWarning, match=f"the word '{token}', .* Write '<{token}>' for it"):
            assert load_lora(model, path) == 1
        assert model.tokenizer.encode(f"{token} <{token}>")[2:-1] == [1000]
        with pytest.warns(UserWarning, match=f"Write '<{token}>' for it"):
            load_lora(model, path)  # the same word is not added again
        assert len(model.tokenizer.vocab) == 1001
        unload_lora(model)
        assert len(model.tokenizer.vocab) == 1000


def test_words_that_are_in_other_words(with_words, tmp_path):
    model, _ = with_words
    words = {"bundle_emb.hirt.emb_params": np.full((1, 16), 0.5, "float32")}
    model.tokenizer.vocab[600] = "shirt</w>"
    with pytest.warns(UserWarning, match=r"The token 'hirt' is also found in words \(shirt\)"):
        load_lora(model, save(tmp_path / "lora.safetensors", adapter() | words))


def test_words_of_cloneofsimo(with_words, tmp_path):
    model, _ = with_words
    _, pairs = listed(model, ORDERS[0])
    tensors = {f"unet:{n}:{half}": v for n, pair in enumerate(pairs) for half, v in pair.items()}
    tensors["<s1>"] = np.ones(16, "float32")
    load_lora(model, save(tmp_path / "a.safetensors", tensors, {"<s1>": "<embed>"}))
    assert model.tokenizer.encode("<s1>")[1:-1] == [1000]
    unload_lora(model)
    assert len(model.tokenizer.vocab) == 1000


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


def save_as_peft(folder, key, tensors, config):
    tensors = {f"base_model.model.{key}.{part}": value for part, value in tensors.items()}
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS_OF_16 if kind != "full"])
def test_other_kinds_of_peft(kind, shared, tmp_path):
    shapes, formula, _ = KINDS_OF_16[kind]
    tensors, before, name = randoms(**shapes), parameter(shared, TO_Q), NAMES[TO_Q]
    rank = next((s[1] for part, s in shapes.items() if part.endswith("_a")), 4)
    config = {"peft_type": kind[:4].upper(), "r": 9, "alpha": 9, "rank_pattern": {"to_q": rank}}
    config |= {"alpha_pattern": {"to_q": 1.5}, "lora_alpha": 7}
    assert load_lora(shared, save_as_peft(tmp_path, name, tensors, config)) == 1
    np.testing.assert_allclose(
        parameter(shared, TO_Q), before + 1.5 / rank * formula(tensors), rtol=1e-5, atol=1e-5
    )


def test_another_parts_config_is_not_used(shared, tmp_path):
    tensors, metadata = adapter(), {"lora_adapter_metadata": '{"text_encoder.lora_alpha": 9}'}
    path = save(tmp_path / "a.safetensors", tensors, metadata)
    assert factor(shared, path, tensors) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "OFT"}, "peft_type must be 'LORA' or 'LOHA' or 'LOKR', not 'OFT'"),
        ({"peft_type": "LOHA", "alpha": "6"}, "alpha must be a positive number, not '6'"),
        ({"use_dora": 1.5}, "use_dora must be False or True, not 1.5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be .* not 'pissa'"),
        ({"init_lora_weights": []}, r"init_lora_weights must be .* not \[\]"),
        ({"lora_alpha": "6"}, "lora_alpha must be a positive number, not '6'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number, not nan"),
        ({"alpha_pattern": {"to_q": [1]}}, r"to_q must be a positive number, not \[1\]"),
        ({"alpha_pattern": {"x" * 999: [1]}}, r": x{197}\.\.\. must be a positive number"),
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
    with pytest.raises(ValueError, match="There is no .*adapter_config.json"):
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
        ("lora_unet_conv_in.lora_mid.weight", "of the kind LoCon, .* with a third matrix"),
        ("lora_unet_conv_in.hada_t1", "of the kind LoCon, LoHa or LoKr with a third matrix"),
        ("lora_unet_conv_in.lokr_t2", "of the kind LoCon, LoHa or LoKr with a third matrix"),
        ("lora_unet_conv_in.on_input", r"of the kind \(IA\)³"),
        ("base_model.model.conv_in.ia3_l", r"of the kind \(IA\)³"),
        ("lora_unet_conv_in.oft_blocks", "of the kind OFT or BOFT"),
        ("unet.conv_in.boft_R", "of the kind OFT or BOFT"),
        ("lora_unet_conv_in.a1.weight", "of the kind GLoRA"),
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
    refused(shared, path, "nor one of PyTorch: it is a text: cos system")
    assert not (tmp_path / "run").exists()


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_files_of_pytorch(suffix, shared, tmp_path):
    """The same tensors as in a safetensors file; in a folder they have diffusers' name."""
    torch = pytest.importorskip("torch", reason="PyTorch reads these files, and isn't installed")
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in adapter().items()}
    torch.save(tensors, tmp_path / f"a{suffix}")
    (tmp_path / "folder").mkdir()
    torch.save(tensors, tmp_path / "folder" / "pytorch_lora_weights.bin")
    expected = factor(shared, save(tmp_path / "a.safetensors", adapter()), adapter())
    for path in (tmp_path / f"a{suffix}", tmp_path / "folder"):
        assert factor(shared, path, adapter()) == pytest.approx(expected)


def test_paths(shared, tmp_path):
    refused(shared, tmp_path / "missing.safetensors", "There is no .*missing.safetensors")
    refused(shared, tmp_path, r"must have one file of a LoRA: pytorch_lora_weights.* It has ")
    (tmp_path / "a.txt").write_text("dear")
    refused(shared, tmp_path / "a.txt", "nor one of PyTorch: it is a text: dear")
    for name in ("pytorch_lora_weights", "adapter_model"):
        save(tmp_path / f"{name}.safetensors", adapter())
    refused(shared, tmp_path, r"It has a.txt, adapter_model.safetensors, pytorch_lora_weights.saf")
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
