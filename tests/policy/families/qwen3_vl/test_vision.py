"""The hand-run vision tower against transformers' forward."""

from __future__ import annotations

import pytest
import torch

from mrg_r1.policy.images import image_features
from mrg_r1.policy.logprobs import completion_logprobs
from mrg_r1.types import ImageInputs

GRIDS = [[[1, 6, 6]], [[1, 4, 8], [1, 12, 20]], [[1, 10, 14], [1, 18, 14], [1, 8, 8]], [[1, 16, 16], [1, 2, 2]]]


@pytest.fixture
def tiny_policy_directory(tiny_policies):
    return tiny_policies("qwen3_vl")


@pytest.mark.parametrize("grids", GRIDS)
def test_features_are_those_of_transformers(policy, grids):
    """Images of unequal size, smaller and larger than the square of learned positions."""
    sizes = [time * height * width for time, height, width in grids]
    pixels = torch.randn(sum(sizes), 1536, generator=torch.Generator().manual_seed(0))
    seen = policy.base.get_image_features(pixels, torch.tensor(grids), return_dict=True)
    rows = {"pixel_values": sizes, "image_grid_thw": [1] * len(grids)}
    images = ImageInputs({"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, rows)
    found = image_features(policy, images)
    assert [len(features) for features in found] == [size // 4 for size in sizes]
    assert len(seen.deepstack_features) == 2
    for mine, *theirs in zip(found, seen.pooler_output, *seen.deepstack_features, strict=True):
        for part, wanted in zip(mine.split(64, dim=1), theirs, strict=True):
            assert wanted.abs().max() > 0.05
            torch.testing.assert_close(part, wanted, atol=5e-6, rtol=1e-5)


def test_what_is_added_after_the_first_layers_matters(policy, studies, build):
    prompts = build(policy)(studies)
    vision = policy.encode_images(prompts)
    ids = torch.randint(20, 300, (4, 7), generator=torch.Generator().manual_seed(0))
    arguments = (ids, torch.ones_like(ids).bool(), torch.arange(4))
    found = []
    for width in (192, 128, 64):  # two maps, the first, none
        seen = vision.select(range(4))
        seen.per_study = [features[:, :width] for features in vision.per_study]
        with torch.no_grad():
            found.append(completion_logprobs(policy, prompts, seen, *arguments)[0])
    whole, one, none = found
    assert (one - whole).abs().max() > 1e-3 and (none - one).abs().max() > 1e-3
