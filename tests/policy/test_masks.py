"""Windows and images that see themselves, against whole scores: what comes out, and every gradient."""

from __future__ import annotations

import pytest
import torch

from mrg_r1.policy.attention import SeqLens
from mrg_r1.policy.group_attention import GroupLens
from mrg_r1.policy.masks import PromptSight, attend_group

CPU = torch.device("cpu")
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def heads(tokens: int, seed: int) -> list[torch.Tensor]:
    """q, k and v of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    counts = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(tokens, count, SIZE, generator=generator, requires_grad=True) for count in counts]


def whole_scores(q, k, v, sees):
    """[Tq, heads, D] of queries that see the keys where `sees` [Tq, Tk] says so, by the definition."""
    k, v = (tensor.repeat_interleave(HEADS // KEY_HEADS, dim=1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SIZE**-0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


def alike(found, wanted, leaves):
    """The same values and the same gradients."""
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), leaves), torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


LENGTHS = (9, 14, 3)
IMAGES = [0, 0, 1, 1, 1, 1, 0, 2, 2] + [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 0, 0] + [0, 0, 0]


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("with_images", [False, True])
def test_prompts_see_a_window_and_their_own_image(window, with_images):
    lens = SeqLens(LENGTHS, CPU)
    images = torch.tensor(IMAGES) if with_images else None
    sight = PromptSight(lens, images)
    q, k, v = heads(lens.total, 0)
    at, sequence = torch.arange(lens.total), torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    sees = at[:, None] >= at
    if images is not None:
        sees |= (images[:, None] == images) & (images > 0)
    sees &= sequence[:, None] == sequence
    if window is not None:
        sees &= at[:, None] - at < window
    alike(sight.attend(q, k, v, window), whole_scores(q, k, v, sees), (q, k, v))
    last = lens.last_tokens
    alike(sight.attend_last(q[last], k, v, window), whole_scores(q, k, v, sees)[last], (q, k, v))


@pytest.mark.parametrize("window", [1, 4, 10, 13])
def test_completions_see_what_their_window_still_covers(window):
    """Unequal members and prompts, a study without a completion, a window that ends in the prompt and one past it."""
    members, prompts = [[5, 2], [], [8]], SeqLens((9, 4, 6), CPU)
    own = SeqLens(tuple(length for group in members for length in group), CPU)
    lens = GroupLens(SeqLens(tuple(map(sum, members)), CPU), prompts, own)
    assert lens.longest == 14
    q, k, v = heads(own.total, 0)
    _, prompt_k, prompt_v = heads(prompts.total, 1)
    found = attend_group(q, k, v, prompt_k, prompt_v, members=members, prompts=prompts, window=window)
    rows = []
    for number, study in enumerate([0, 0, 2]):
        start, length = own.starts[number], own.lengths[number]
        prompt = slice(prompts.starts[study], prompts.starts[study + 1])
        mine = slice(start, start + length)
        at = torch.arange(prompts.lengths[study] + length)
        sees = (at[:, None] >= at) & (at[:, None] - at < window)
        keys, values = torch.cat([prompt_k[prompt], k[mine]]), torch.cat([prompt_v[prompt], v[mine]])
        rows.append(whole_scores(q[mine], keys, values, sees[prompts.lengths[study] :]))
    alike(found, torch.cat(rows), (q, k, v, prompt_k, prompt_v) if window > 1 else (q, k, v))
