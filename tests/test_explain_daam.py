"""Heat maps of words."""

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.explain import heat_maps
from stable_diffusion.explain.daam import AttentionSums, colour_map, normalize_map, overlay_map
from stable_diffusion.explain.probe import Place
from stable_diffusion.explain.words import Word

BICUBIC = Image.Resampling.BICUBIC
OPTIONS = {"seed": 3, "num_steps": 2, "verbose": 0}


def make_place(size, step, prompt=slice(1, 2)):
    return Place("mid_attn_0", "cross", size, step, 999, prompt, slice(prompt.start or 0))


@pytest.mark.quick
def test_sums_are_over_layers_heads_and_steps():
    sums, rng = AttentionSums(), np.random.default_rng(0)
    fine = rng.random((4, 2, 3, 16, 5)).astype("float32")  # four calls: 2 entries, 3 heads, 4x4
    coarse = rng.random((2, 2, 6, 4, 5)).astype("float32")  # two calls of 2x2
    for step in range(2):
        sums.add(fine[2 * step], make_place((4, 4), step))
        sums.add(fine[2 * step + 1], make_place((4, 4), step))
        sums.add(coarse[step], make_place((2, 2), step))
    sums.add(fine[0], make_place((4, 4), 0, prompt=slice(0)))  # the negative prompt's pass
    words = [Word("red", (1,)), Word("apple", (2, 4)), Word("red", (3,))]

    maps = sums.find_maps(words, (4, 4), step=1)
    summed = fine[2:, 1].sum((0, 1)).reshape(4, 4, 5)
    rough = coarse[1, 1].sum(0).reshape(2, 2, 5)
    for word, n, tokens in [("red", 0, [1]), ("red", 1, [3]), ("apple", 0, [2, 4])]:
        coarse_map = Image.fromarray(rough[..., tokens].sum(-1)).resize((4, 4), BICUBIC)
        expected = summed[..., tokens].sum(-1) + np.array(coarse_map)
        np.testing.assert_allclose(maps[word][n], expected, rtol=1e-5)
    both = [sums.find_maps(words, (4, 4), step=n)["apple"][0] for n in (0, 1)]
    np.testing.assert_allclose(sums.find_maps(words, (4, 4))["apple"][0], sum(both), rtol=1e-5)
    assert [len(some) for some in maps.values()] == [2, 1]


@pytest.mark.quick
def test_a_map_shows_where_the_word_is_seen():
    sums = AttentionSums()
    probabilities = np.zeros((2, 1, 16, 3), "float32")
    probabilities[1, 0, 6, 2] = 1  # the cell of row 1, column 2 sees token 2
    sums.add(probabilities, make_place((4, 4), 0))
    (found,) = sums.find_maps([Word("cat", (2,))], (64, 32))["cat"]
    assert found.shape == (64, 32) and found.min() == 0
    assert np.unravel_index(found.argmax(), found.shape) in [
        (row, column) for row in range(16, 32) for column in range(16, 24)
    ]
    assert found[48:].max() < 0.01 and found[:, :4].max() == 0
    assert normalize_map(found).max() == 1
    assert normalize_map(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]


@pytest.mark.quick
def test_colours():
    found = colour_map(np.array([[0, 0.2, 1]]))
    assert found.tolist() == [[[0, 0, 4], [66, 10, 104], [252, 255, 164]]]
    image = np.full((1, 3, 3), 100, "uint8")
    image[0, 0] = 0
    found = overlay_map(image, np.array([[0, 0, 1]]))
    assert found.dtype == "uint8" and found[0, 0].tolist() == [0, 0, 3]
    assert found[0, 1].tolist() == [35, 35, 38] and found[0, 2].tolist() == [199, 201, 142]


def test_heat_maps_of_an_image(few_pipeline):
    prompt = "A red, Apple red"
    result = heat_maps(few_pipeline, prompt, **OPTIONS)
    expected = few_pipeline.text_to_image(prompt, **OPTIONS)[0]
    assert np.abs(result.image.astype(int) - expected).max() <= 1
    assert list(result.maps) == ["A", "red", "Apple"]
    for word, heat in result.maps.items():
        assert heat.shape == (64, 64) and heat.dtype == "float32"
        assert heat.max() == 1 and heat.min() >= 0 and heat.std() > 0
        assert len(result.repeats[word]) == 1 + (word == "red")
        np.testing.assert_array_equal(result.overlay(word), overlay_map(result.image, heat))
    first, second = result.repeats["red"]
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(result.overlay("red", 1), overlay_map(result.image, second))
    with pytest.raises(ValueError, match="word must be one of A, red, Apple, not 'apple'"):
        result.overlay("apple")
    with pytest.raises(ValueError, match="'red' stands 2 times there, not 2"):
        result.overlay("red", 2)


def test_the_mean_of_repeats_is_that_of_their_sums(few_pipeline, monkeypatch):
    sums = {"a": [np.array([[4.0, 0.0]]), np.array([[0.0, 1.0]])]}
    monkeypatch.setattr(AttentionSums, "find_maps", lambda *_: sums)
    result = heat_maps(few_pipeline, "a", **OPTIONS | {"num_steps": 1})
    assert result.maps["a"].tolist() == [[1, 0.25]]
    assert [heat.tolist() for heat in result.repeats["a"]] == [[[1, 0]], [[0, 1]]]


def test_heat_maps_of_other_tasks(few_pipeline):
    image = few_pipeline.text_to_image("a cat", **OPTIONS)[0]
    mask = np.arange(64)[:, None] * np.ones(64) < 32
    tasks = [
        (few_pipeline.image_to_image, {"image": image}),
        (few_pipeline.inpaint, {"image": image, "mask": mask}),
        (few_pipeline.text_to_image, {"prompt_syntax": "webui", "sampler": "heun"}),
    ]
    for task, options in tasks:
        expected = task("a dog", **options, **OPTIONS)[0]
        result = heat_maps(few_pipeline, "a dog", **options, **OPTIONS)
        assert np.abs(result.image.astype(int) - expected).max() <= 1
        assert list(result.maps) == ["a", "dog"]


def test_heat_maps_of_a_long_prompt(few_pipeline):
    prompt = "red apple " * 39 + "(cat:1.2)"
    result = heat_maps(few_pipeline, prompt, prompt_syntax="webui", **OPTIONS | {"num_steps": 1})
    assert {word: len(some) for word, some in result.repeats.items()} == {
        "red": 39,
        "apple": 39,
        "cat": 1,
    }
    assert result.maps["cat"].max() == 1  # its token is in the second chunk


@pytest.mark.quick
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (["a", "b"], {}, "one image of one prompt, not"),
        (5, {}, "one image of one prompt, not 5"),
        ("a", {"batch_size": 2}, "one image of one prompt"),
        ("a", {"crop": 8}, "crop is not possible"),
        ("a " * 80, {}, "at most 77 tokens"),
    ],
)
def test_what_is_refused(few_pipeline, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        heat_maps(few_pipeline, prompt, **options)
