"""A group's attention over padded rectangles against the two flash attentions of each completion."""

from __future__ import annotations

import pytest
import torch

from mrg_r1.policy import rectangles
from mrg_r1.policy.attention import GroupAttention, GroupLens, SeqLens
from mrg_r1.policy.rectangles import Rectangles

CPU = torch.device("cpu")
# lengths of each study's completions, and of the prompts: unequal ones, an empty completion, studies without any
CASES = {
    "ragged": ([[3, 5, 9], [4, 4], [1], [12, 2, 7, 7]], [6, 9, 4, 6]),
    "equal prompts": ([[3, 5], [8, 1], [2, 2]], [7, 7, 7]),
    "nothing of some studies": ([[], [3, 0, 5], [], [2]], [5, 4, 6, 3]),
    "one study": ([[1, 2, 11]], [13]),
}


def lens_of(groups, prompts, *, key_heads):
    lengths = [length for group in groups for length in group]
    return GroupLens(
        SeqLens(tuple(sum(group) for group in groups), CPU),
        SeqLens(tuple(prompts), CPU),
        SeqLens(tuple(lengths), CPU),
        key_heads,
    )


def tensors(lens, *, heads, key_heads, size=8):
    generator = torch.Generator().manual_seed(0)
    own, shared = lens.completions.total, lens.prompts.total
    shapes = [(own, heads), (own, key_heads), (own, key_heads), (shared, key_heads), (shared, key_heads)]
    return [torch.randn(*shape, size, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("scores", [1, 2000, 2**17])
@pytest.mark.parametrize("heads,key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("case", CASES)
def test_rectangles_equal_flash_attention_also_in_the_gradient(monkeypatch, case, heads, key_heads, scores):
    """However many studies share a rectangle; prompts that nobody looks at have a gradient of exactly 0."""
    monkeypatch.setattr(rectangles, "SCORES", scores)
    groups, prompts = CASES[case]
    lens = lens_of(groups, prompts, key_heads=key_heads)
    given = tensors(lens, heads=heads, key_heads=key_heads)
    expected = GroupAttention.apply(*given, lens.groups, lens.prompts, lens.completions)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, given, grad)
    assert lens._rectangles is not None
    found = lens.attend(*given)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found, given, grad), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=1e-5)


def test_every_token_has_one_place_and_padding_none():
    groups, prompts = CASES["ragged"]
    axis = Rectangles.of_groups(groups, prompts, key_heads=2).completions
    packed = torch.arange(2.0 * sum(map(sum, groups))).view(-1, 2, 1)
    padded = axis.put(packed, 2)
    padded[axis.padding] = float("nan")
    assert torch.equal(axis.take(padded, 2, 1), packed)


@pytest.mark.parametrize(
    "groups,prompts",
    [
        ([[65, 3]], [5]),  # a long completion
        ([[7, 3]], [257]),  # a long prompt
        ([[16] * 8, [16] * 8], [5, 5]),  # all of one length, which the flash kernel takes in one call
        ([[], []], [5, 5]),
    ],
)
def test_flash_attention_keeps_what_it_does_as_well(groups, prompts):
    assert Rectangles.of_groups(groups, prompts, key_heads=2) is None
