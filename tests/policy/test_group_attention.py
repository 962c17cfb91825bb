"""A group's attention by the kernel against two attentions of each completion, merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mrg_r1.kernels import bindings, library
from mrg_r1.kernels import calls as kernels
from mrg_r1.kernels.attention import group_attention
from mrg_r1.policy.attention import SeqLens
from mrg_r1.policy.group_attention import GroupAttention, GroupLens

CPU = torch.device("cpu")
# lengths of each study's completions, and of the prompts: unequal ones, an empty completion, studies without any
CASES = {
    "ragged": ([[3, 5, 9], [4, 4], [1], [12, 2, 7, 7]], [6, 9, 4, 6]),
    "equal prompts": ([[3, 5], [8, 1], [2, 2]], [7, 7, 7]),
    "nothing of some studies": ([[], [3, 0, 5], [], [2]], [5, 4, 6, 3]),
    "one study": ([[1, 2, 11]], [13]),
    "more than a block of rows": ([[90, 70], [33]], [65, 40]),
}

pytestmark = pytest.mark.skipif(library.state().library is None, reason=library.state().text)


def lens_of(groups, prompts):
    lengths = [length for group in groups for length in group]
    return GroupLens(
        SeqLens(tuple(sum(group) for group in groups), CPU),
        SeqLens(tuple(prompts), CPU),
        SeqLens(tuple(lengths), CPU),
    )


def tensors(lens, *, heads, key_heads, size=8):
    generator = torch.Generator().manual_seed(0)
    own, shared = lens.completions.total, lens.prompts.total
    shapes = [(own, heads), (own, key_heads), (own, key_heads), (shared, key_heads), (shared, key_heads)]
    return [torch.randn(*shape, size, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("size", [8, 33, 64])
@pytest.mark.parametrize("heads,key_heads", [(4, 4), (4, 2), (6, 1), (70, 1)])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_two_attentions_also_in_the_gradient(monkeypatch, case, heads, key_heads, size):
    """Prompts that nobody looks at have a gradient of exactly 0."""
    groups, prompts = CASES[case]
    lens = lens_of(groups, prompts)
    given = tensors(lens, heads=heads, key_heads=key_heads, size=size)
    found = lens.attend(*given)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, given, grad)
    monkeypatch.setattr(kernels, "ready", lambda *tensors: False)
    expected = GroupAttention.apply(*given, lens.groups, lens.prompts, lens.completions)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, given, grad), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
    for study, group in enumerate(groups):
        if not sum(group):
            own = slice(lens.prompts.starts[study], lens.prompts.starts[study + 1])
            assert not ours[3][own].any() and not ours[4][own].any()


def test_threads_change_nothing(monkeypatch):
    """To the last bit: each study under each key head is one thread's."""
    monkeypatch.setattr(bindings, "_WORTH", 0)
    lens, found = lens_of(*CASES["more than a block of rows"]), []
    given = tensors(lens, heads=6, key_heads=2, size=33)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = lens.attend(*given)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_heads_may_be_views_of_larger_tensors():
    lens = lens_of(*CASES["ragged"])
    given = [one.detach() for one in tensors(lens, heads=4, key_heads=2)]
    wider = [torch.cat([one, one], dim=1)[:, : one.shape[1]] for one in given]
    assert not wider[0].is_contiguous()
    assert torch.equal(lens.attend(*wider), lens.attend(*given))


CHANGES = {
    "a path beyond the tokens": ("tokens", 3, 1000),
    "before them": ("tokens", 3, -1),
    "a completion that begins after its end": ("starts", 1, 99),
    "prompts that fall": ("prompts", 1, 99),
    "of more completions than there are": ("of_study", 4, 9),
    "own tokens that others have": ("begins", 0, 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_paths_that_lead_outside_are_refused(change):
    lens, (name, at, value) = lens_of(*CASES["ragged"]), CHANGES[change]
    paths = lens._paths
    changed = getattr(paths, name).clone()
    changed[at] = value
    with pytest.raises(ValueError, match="group_attention"):
        replace(paths, **{name: changed})


def test_paths_of_other_axes_are_refused():
    lens = lens_of(*CASES["ragged"])
    given = [one.detach() for one in tensors(lens, heads=4, key_heads=2)]
    for cut in (0, 3):
        fewer = [one[:-1] if number // 3 == cut // 3 else one for number, one in enumerate(given)]
        with pytest.raises(ValueError, match="group_attention"):
            group_attention(*fewer, lens._paths)
