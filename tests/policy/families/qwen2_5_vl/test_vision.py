"""The hand-run vision tower against transformers' forward."""

from __future__ import annotations

import pytest
import torch

from mrg_r1.policy.images import image_features
from mrg_r1.types import ImageInputs
from tests.conftest import make_study

GRIDS = [[[1, 6, 6]], [[1, 4, 8], [1, 12, 20]], [[1, 10, 14], [1, 18, 14], [1, 8, 8]], [[1, 16, 16], [1, 2, 2]]]


@pytest.mark.parametrize("grids", GRIDS)
def test_features_are_those_of_transformers(policy, grids):
    """Images of unequal size, windows cut at the right and lower edge, whole windows, an image smaller than a
    window.
    """
    sizes = [time * height * width for time, height, width in grids]
    pixels = torch.randn(sum(sizes), 1176, generator=torch.Generator().manual_seed(0))
    expected = policy.base.get_image_features(pixels, torch.tensor(grids), return_dict=True).pooler_output
    rows = {"pixel_values": sizes, "image_grid_thw": [1] * len(grids)}
    images = ImageInputs({"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, rows)
    found = image_features(policy, images)
    assert [len(features) for features in found] == [size // 4 for size in sizes]
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0.05
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_an_image_does_not_depend_on_its_neighbours(policy, studies, build):
    prompts = build(policy)(studies)
    together = policy.encode_images(prompts).per_study
    for b in range(4):
        alone = policy.encode_images(prompts.select([b])).per_study[0]
        torch.testing.assert_close(together[b], alone, atol=2e-6, rtol=1e-5)


def test_a_trained_tower_keeps_its_graph(policy, tmp_path, build):
    policy.requires_grad_(True)
    prompts = build(policy)([make_study(tmp_path, "a", [(84, 84)])])
    assert policy.encode_images(prompts).per_study[0].requires_grad
    with torch.no_grad():
        assert not policy.encode_images(prompts).per_study[0].requires_grad
