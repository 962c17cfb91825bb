"""Packed attention against whole score matrices, and two parts of the keys against one."""

from __future__ import annotations

import pytest
import torch

import mrg_r1.policy.attention as attention
from mrg_r1.kernels import calls as kernels
from mrg_r1.kernels import library
from mrg_r1.policy.attention import SeqLens, attend, attend_backward
from mrg_r1.policy.group_attention import merge_parts
from mrg_r1.policy.rotation import rotate

CPU = torch.device("cpu")


def plain(q, k, v, q_runs, k_runs, causal):
    """Attention of each run from its definition, differentiable; shares no code with the package."""
    share, outs = q.shape[1] // k.shape[1], []
    for q_start, q_length, k_start, k_length in zip(
        q_runs.starts, q_runs.lengths, k_runs.starts, k_runs.lengths, strict=False
    ):
        for t in range(q_length):
            seen = slice(k_start, k_start + (t + 1 if causal else k_length))
            heads = []
            for h in range(q.shape[1]):
                scores = k[seen, h // share] @ q[q_start + t, h] / q.shape[2] ** 0.5
                heads.append(scores.softmax(0) @ v[seen, h // share])
            outs.append(torch.stack(heads))
    return torch.stack(outs)


def tensors(queries, keys, *, heads, key_heads, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, count, size, generator=generator).requires_grad_()
        for tokens, count in ((queries, heads), (keys, key_heads), (keys, key_heads))
    ]


RUNS = [
    ((5, 5, 3, 0, 7), (5, 5, 3, 4, 7), False),
    ((5, 5, 3, 0, 7), (5, 5, 3, 0, 7), True),
    ((2, 9), (11, 4), False),
    ((6,), (6,), True),
]


@pytest.mark.parametrize("kernel", ["ours", "flash", "plain"])
@pytest.mark.parametrize("heads,key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("q_lengths,k_lengths,causal", RUNS)
def test_attention_of_unequal_runs_and_its_gradients(
    monkeypatch, kernel, heads, key_heads, q_lengths, k_lengths, causal
):
    if kernel == "plain":  # what runs where torch has no flash kernel
        monkeypatch.setattr(attention, "_CPU_FORWARD", None)
        monkeypatch.setattr(attention, "_CPU_BACKWARD", None)
    if kernel == "ours" and library.state().library is None:
        pytest.skip(library.state().text)
    if kernel != "ours":
        monkeypatch.setattr(kernels, "ready", lambda *tensors: False)
    q_runs, k_runs = SeqLens(q_lengths, CPU), SeqLens(k_lengths, CPU)
    q, k, v = tensors(q_runs.total, k_runs.total, heads=heads, key_heads=key_heads)
    expected = plain(q, k, v, q_runs, k_runs, causal)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out, lse = attend(q, k, v, q_runs, k_runs, causal=causal)
        found = attend_backward(grad, q, k, v, out, lse, q_runs, k_runs, causal=causal)
    torch.testing.assert_close(out, expected.detach(), atol=2e-6, rtol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=1e-5)


def test_two_parts_of_the_keys_merge_to_one_attention_also_in_the_gradient():
    """What shared-prefix attention rests on: each part gets the merged output and log-sum-exp, and its exact share of
    the gradient.
    """
    seq_lens = [SeqLens((length,), CPU) for length in (6, 9, 4, 13)]
    queries, first, second, whole = seq_lens
    q, k, v = tensors(6, 13, heads=4, key_heads=2)
    expected = plain(q, k, v, queries, whole, False)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out_1, lse_1 = attend(q, k[:9], v[:9], queries, first, causal=False)
        out_2, lse_2 = attend(q, k[9:], v[9:], queries, second, causal=False)
        lse = torch.logaddexp(lse_1, lse_2)
        out = merge_parts(out_1, lse_1 - lse, out_2, lse_2 - lse)
        torch.testing.assert_close(out, expected.detach(), atol=2e-6, rtol=1e-5)
        dq_1, dk_1, dv_1 = attend_backward(grad, q, k[:9], v[:9], out, lse, queries, first, causal=False)
        dq_2, dk_2, dv_2 = attend_backward(grad, q, k[9:], v[9:], out, lse, queries, second, causal=False)
    for mine, theirs in zip((dq_1 + dq_2, torch.cat([dk_1, dk_2]), torch.cat([dv_1, dv_2])), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_turns_back(dtype):
    x = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.randn(7, 1, 4, generator=torch.Generator().manual_seed(1))
    there = rotate(x, angles.cos(), angles.sin())
    assert there.dtype == dtype and (there - x).abs().max() > 0.1
    again = rotate(there, angles.cos(), angles.sin(), back=True)
    torch.testing.assert_close(again, x, atol=1e-6 if dtype == torch.float32 else 3e-2, rtol=1e-2)
