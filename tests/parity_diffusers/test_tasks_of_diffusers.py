"""Image to image and inpainting, as diffusers' pipelines do them.

The reference is PyTorch on a CPU, in float32, with small models of random parameters. Images are
within 2 of 255 levels, at most 1 is seen; every pixel that is kept is exactly the input's.
"""

import pytest

REASON = "needs pip install torch diffusers transformers accelerate"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)
from diffusers_tasks import FAMILIES, SCHEDULERS, STRENGTHS, make_pair, measure  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # of these libraries, about each other
]

LEVELS = 2


@pytest.fixture(scope="module", params=[(t, f) for t, some in FAMILIES.items() for f in some])
def task_and_pair(request, tmp_path_factory):
    task, family = request.param
    return task, make_pair(family, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_images_are_those_of_diffusers(task_and_pair, sampler, strength):
    task, pair = task_and_pair
    difference, kept = measure(pair, task, sampler, strength)
    assert difference <= LEVELS and not kept
