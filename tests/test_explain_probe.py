"""Attention that is watched: the same images, and nothing is left behind."""

import keras
import numpy as np
import pytest
from helpers import run_python
from keras import backend

from stable_diffusion import StableDiffusion
from stable_diffusion.block import _cut_models
from stable_diffusion.config import TINY
from stable_diffusion.explain import attention_probe
from stable_diffusion.explain.passes import watch_passes
from stable_diffusion.explain.probe import list_attention

LAYERS = ["down_0_attn_0", "mid_attn_0", "up_1_attn_0", "up_1_attn_1"]  # of the config FEW
PROMPT, OPTIONS = "a red apple", {"seed": 3, "num_steps": 3, "verbose": 0}
EXACT = 1e-6  # of probabilities, in float32


@pytest.fixture(scope="module")
def model(few_pipeline):
    """A pipeline whose guidance matters."""
    few_pipeline.unguided = few_pipeline.text_to_image(
        PROMPT, unconditional_guidance_scale=1, **OPTIONS
    )
    few_pipeline.expected = few_pipeline.text_to_image(PROMPT, **OPTIONS)
    assert levels_apart(few_pipeline.unguided, few_pipeline.expected) > 8
    return few_pipeline


def levels_apart(images, others):
    return np.abs(images.astype(int) - others).max()


def list_state(model, component="diffusion_model"):
    """Returns all that a probe may have changed."""
    watched = getattr(model, component)
    return (
        watched.run_eagerly,
        watched.jit_compile,
        watched.predict_function,
        dict(_cut_models.get(watched, {})),
        model.__dict__.get("_predict"),
        [layer.probe for *_, layer in list_attention(watched)],
        [layer.__dict__.get("probe") for *_, layer in list_attention(watched)],
    )


def test_what_a_probe_sees(model):
    seen = []
    with attention_probe(model, lambda *both: seen.append(both)):
        images = model.text_to_image(PROMPT, **OPTIONS)
    assert levels_apart(images, model.expected) <= 1
    steps = [(place.step, place.layer, place.kind) for _, place in seen]
    kinds = ["self", "cross"]
    assert steps == [(n, layer, kind) for n in range(3) for layer in LAYERS for kind in kinds]
    timesteps = [level.timestep for level in model.config.schedule.levels(3)[:-1]]
    for probabilities, place in seen:
        assert place.timestep == timesteps[place.step]
        assert (place.negative, place.prompt) == (slice(1), slice(1, 2))
        cells = 16 if place.layer == "mid_attn_0" else 64
        tokens = cells if place.kind == "self" else 77
        assert place.size == (cells**0.5, cells**0.5)
        assert probabilities.shape == (2, 2, cells, tokens) and probabilities.dtype == "float32"
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
        assert probabilities.min() >= 0 and probabilities.std() > 0


def test_only_one_kind(model):
    seen = []
    with attention_probe(model, lambda _, place: seen.append(place.kind), kinds="cross"):
        images = model.text_to_image(PROMPT, **OPTIONS)
    assert seen == ["cross"] * 3 * len(LAYERS)
    assert levels_apart(images, model.expected) <= 1


def test_the_probabilities_are_those_of_the_equation(model):
    """Of the text encoder's first layer, from its parameters in float64."""
    seen, encoder = [], model.text_encoder
    with attention_probe(model, lambda *both: seen.append(both), "text_encoder"):
        model.encode_text(PROMPT)
    ((probabilities, place),) = seen
    assert (place.layer, place.kind, place.size) == ("layer_0", "self", (77,))
    assert (place.step, place.timestep) == (None, None)

    layer = encoder.get_layer("layer_0")
    tokens = np.array([model.tokenize(PROMPT)])
    x = keras.ops.convert_to_numpy(encoder.layers[2]([tokens, np.arange(77)[None]]))
    x = keras.ops.convert_to_numpy(layer.layer_norm1(x)).astype("float64")[0]
    queries, keys = (
        x @ np.array(weights[0], "float64") + np.array(weights[1], "float64")
        for weights in (layer.self_attn.to_q.get_weights(), layer.self_attn.to_k.get_weights())
    )
    heads = layer.self_attn.heads
    queries, keys = (np.stack(np.split(each, heads, axis=-1)) for each in (queries, keys))
    scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(queries.shape[-1])
    scores[:, np.triu(np.ones((77, 77), bool), 1)] = -np.inf
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities[0], expected, atol=EXACT)


def test_changed_probabilities_are_used(model):
    """Attention to the first token only is that to a context of nothing but the first token."""
    context = model.encode_text(PROMPT)
    first = np.repeat(context[:, :1], 77, axis=1)
    expected = model.generate_image(first, **OPTIONS)
    assert levels_apart(expected, model.expected) > 8

    def look_at_the_first_token(probabilities, place):
        probabilities[place.prompt] = np.eye(77)[0]
        return probabilities

    with attention_probe(model, look_at_the_first_token, kinds="cross"):
        images = model.generate_image(context, **OPTIONS)
    assert levels_apart(images, expected) <= 1

    def keep(probabilities, place):  # may be broadcast
        return np.full(probabilities.shape[-1:], 1 / probabilities.shape[-1])

    with attention_probe(model, keep, kinds="cross"):
        images = model.generate_image(context, **OPTIONS)
    with attention_probe(model, lambda p, place: p.mean(axis=-1, keepdims=True), kinds="cross"):
        assert levels_apart(images, model.generate_image(context, **OPTIONS)) <= 1
    assert levels_apart(images, model.expected) > 8


def test_a_batch_without_guidance(model):
    seen = []
    with attention_probe(model, lambda *both: seen.append(both), kinds=["cross"]):
        images = model.text_to_image(
            PROMPT, batch_size=2, unconditional_guidance_scale=1, **OPTIONS | {"seed": [3, 4]}
        )
    assert {len(probabilities) for probabilities, _ in seen} == {2}
    assert all(place.prompt == slice(2) for _, place in seen)
    assert all(len(probabilities[place.negative]) == 0 for probabilities, place in seen)
    with attention_probe(model, lambda *_: None):
        again = model.text_to_image(
            PROMPT, unconditional_guidance_scale=1, **OPTIONS | {"seed": [4]}
        )
    assert levels_apart(images[1:], again) <= 1


def test_guidance_in_two_passes(model):
    """The contexts of a long negative prompt and of a short prompt have different lengths."""
    options = OPTIONS | {"num_steps": 1, "prompt_syntax": "webui"}
    long = "a dog " * 50
    expected = model.text_to_image(PROMPT, long, **options)
    seen, passes = [], []
    with (
        watch_passes(model, passes.append),
        attention_probe(model, lambda *both: seen.append(both), kinds="cross"),
    ):
        images = model.text_to_image(PROMPT, long, **options)
    assert levels_apart(images, expected) <= 1
    found = {(p.shape[0], p.shape[-1], str(place.prompt)) for p, place in seen}
    assert found == {(1, 77, str(slice(1))), (1, 154, str(slice(0)))}
    assert [len(run.output[run.negative]) for run in passes] == [0, 1]
    assert [len(run.output[run.prompt]) for run in passes] == [1, 0]


def test_passes_have_both_halves(model):
    """What guidance makes of the two halves is what the sampler gets."""
    context, passes, latents = model.encode_text(PROMPT), [], []
    with watch_passes(model, passes.append) as current:
        assert current().step is None
        for _, _, latent, x0 in model.generate_latents(
            context, num_steps=2, seed=3, unconditional_guidance_scale=4
        ):
            latents.append((latent, x0))
    assert [run.step for run in passes] == [0, 1]
    levels = model.config.schedule.levels(2)
    for run, level, (_, x0) in zip(passes, levels[:-1], latents, strict=True):
        with_prompt, without = run.output[run.prompt], run.output[run.negative]
        noise = without + 4 * (with_prompt - without)
        expected = (run.latent - (1 - level.alpha) ** 0.5 * noise) / level.alpha**0.5
        np.testing.assert_allclose(x0, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_other_tasks(model):
    image = model.expected[0]
    half = np.arange(64)[:, None] * np.ones(64) < 32
    tasks = [
        lambda: model.image_to_image(PROMPT, image, **OPTIONS),
        lambda: model.inpaint(PROMPT, image, half, **OPTIONS),
        lambda: model.text_to_image(PROMPT, sampler="heun", **OPTIONS),
    ]
    for task in tasks:
        expected, seen = task(), []
        with attention_probe(model, lambda _, place, seen=seen: seen.append(place.step)):
            assert levels_apart(task(), expected) <= 1
        assert seen and seen == sorted(seen)


def test_shared_features(tiny_pipeline):
    """DeepCache cuts the model: what is cut is watched, too, and is forgotten afterwards."""
    model = tiny_pipeline
    options = OPTIONS | {"num_steps": 4, "deep_cache": 2}
    expected = model.text_to_image(PROMPT, **options)
    before, seen = list_state(model), []
    assert before[3]  # what was cut and compiled
    with attention_probe(model, lambda _, place: seen.append((place.step, place.layer))):
        images = model.text_to_image(PROMPT, **options)
    assert levels_apart(images, expected) <= 1
    by_step = [{layer for step, layer in seen if step == n} for n in range(4)]
    assert by_step[0] == by_step[2] > by_step[1] == by_step[3] != set()
    assert list_state(model) == before


def test_probes_in_probes(model):
    """Each sees what those around it left; where they watch other kinds each sees its own."""
    order = []

    def double(probabilities, place):
        order.append("outer")
        return 2 * probabilities

    def see(probabilities, place):
        order.append("inner")
        assert place.kind == "self" or np.allclose(probabilities.sum(-1), 2, rtol=1e-5)
        assert place.kind == "cross" or np.allclose(probabilities.sum(-1), 1, rtol=1e-5)
        return probabilities / probabilities.sum(-1, keepdims=True)

    before = list_state(model)
    with attention_probe(model, double, kinds="cross"):
        with attention_probe(model, see):
            images = model.text_to_image(PROMPT, **OPTIONS)
        assert order[:3] == ["inner", "outer", "inner"]
        count = len(order)
        doubled = model.text_to_image(PROMPT, **OPTIONS)
        assert {*order[count:]} == {"outer"}
    assert levels_apart(images, model.expected) <= 1
    assert levels_apart(doubled, model.expected) > 8
    assert list_state(model) == before


def test_nothing_is_left_after_an_exception(model):
    before = list_state(model)
    assert before[2] is not None  # what was compiled

    def fail(probabilities, place):
        raise RuntimeError(place.layer)

    with pytest.raises(RuntimeError, match="down_0_attn_0"), attention_probe(model, fail):
        model.text_to_image(PROMPT, **OPTIONS)
    assert list_state(model) == before
    images = model.text_to_image(PROMPT, **OPTIONS)
    assert levels_apart(images, model.expected) == 0
    assert list_state(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": None}, "function must be a function, not None"),
        (
            {"component": "unet"},
            "component must be one of text_encoder, diffusion_model, .* 'unet'",
        ),
        ({"kinds": ()}, "kinds must be some of self, cross, not"),
        ({"kinds": "both"}, "kinds must be some of self, cross, not .'both'"),
        ({"component": "text_encoder", "kinds": "cross"}, "no attention layers .* of kind cross"),
    ],
)
def test_refused_arguments(model, options, message):
    before = list_state(model)
    with pytest.raises(ValueError, match=message):
        attention_probe(model, **{"function": print} | options).__enter__()
    assert list_state(model) == before


@pytest.mark.parametrize("changed", [np.ones(3), "x", np.ones((2, 2, 64, 77, 1))])
def test_refused_probabilities(model, changed):
    message = r"must return None or probabilities of shape \(2, 2, 64, 77\), not"
    with pytest.raises(ValueError, match=message):
        with attention_probe(model, lambda *_: changed, kinds="cross"):
            model.text_to_image(PROMPT, **OPTIONS)


def test_other_models_are_refused():
    other = StableDiffusion(weights=None, config=TINY)
    other._diffusion_model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="can't be probed: a Sequential has no attention layers"):
        attention_probe(other, print).__enter__()

    class Exported:
        def predict_on_batch(self, inputs):
            raise NotImplementedError

    other._diffusion_model = Exported()
    with pytest.raises(
        ValueError, match="a Exported has no attention layers .* Exported models have"
    ):
        attention_probe(other, print).__enter__()


def test_openvino_is_refused():
    pytest.importorskip("openvino")
    run_python(
        "import pytest\n"
        "from stable_diffusion import StableDiffusion\n"
        "from stable_diffusion.config import TINY\n"
        "from stable_diffusion.explain import attention_probe\n"
        "model = StableDiffusion(weights=None, config=TINY)\n"
        "with pytest.raises(ValueError, match='on OpenVINO, which runs whole models only'):\n"
        "    attention_probe(model, print).__enter__()\n",
        backend="openvino",
    )


@pytest.mark.skipif(backend.backend() != "tensorflow", reason="a graph of TensorFlow")
def test_a_compiled_graph_has_no_trace(model):
    """The graph that is made after a probe is the one that was made before."""
    unet = model.diffusion_model
    inputs = [np.zeros((1, *shape[1:]), "float32") for shape in ((1, 8, 8, 4), (1, 16))]
    inputs.append(np.zeros((1, 77, 16), "float32"))

    def list_operations():
        import tensorflow as tf

        graph = tf.function(lambda *x: unet(list(x), training=False)).get_concrete_function(*inputs)
        return [(one.type, one.name) for one in graph.graph.get_operations()]

    before = list_operations()
    with attention_probe(model, lambda *_: None):
        model.text_to_image(PROMPT, **OPTIONS | {"num_steps": 1})
    assert list_operations() == before
    assert not any("PyFunc" in kind for kind, _ in before)
