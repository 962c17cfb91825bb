"""The flash-attn package behind `attend`: by a stand-in of its signatures; on a card by tests/gpu."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from mrg_r1.policy import flash_attention
from mrg_r1.policy.attention import PackedAttention, SeqLens, attend, attend_backward
from mrg_r1.policy.flash_attention import FlashAttention, choose, find
from mrg_r1.policy.group_attention import GroupAttention
from tests.policy.fake_cuda import FakeCuda
from tests.policy.flash_attn_stand_in import stand_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("major", [2, 3])
@pytest.mark.parametrize(
    "q_lengths,k_lengths,causal", [((5, 0, 7, 3), (4, 3, 7, 9), False), ((5, 7, 3), (5, 7, 3), True)]
)
def test_what_is_handed_over_and_taken_back(major, q_lengths, k_lengths, causal):
    """Of a part of the keys too: `out` and `lse` are then not this attention's own."""
    package = FlashAttention(stand_in(major), major, "")
    q_lens, k_lens = SeqLens(q_lengths, CPU), SeqLens(k_lengths, CPU)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(tokens, heads, 16, generator=generator).bfloat16()
        for tokens, heads in ((q_lens.total, 4), (k_lens.total, 2), (k_lens.total, 2), (q_lens.total, 4))
    )
    starts = q_lens.cu_seqlens, k_lens.cu_seqlens, q_lens.longest, k_lens.longest
    out, lse = package.forward(q, k, v, *starts, causal)
    wide = [one.float() for one in (q, k, v)]
    exact, exact_lse = attend(*wide, q_lens, k_lens, causal=causal)
    torch.testing.assert_close(out.float(), exact, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, exact_lse)
    larger = exact_lse + 0.5  # as if more keys were seen
    found = package.backward(grad, q, k, v, out, larger, *starts, causal)
    wanted = attend_backward(grad.float(), *wide, out.float(), larger, q_lens, k_lens, causal=causal)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("major", [2, 3])
def test_where_it_is_chosen_every_attention_on_a_card_is_its(monkeypatch, major):
    package = FlashAttention(stand_in(major), major, "")
    monkeypatch.setattr(flash_attention, "_in_use", package)
    with FakeCuda():
        monkeypatch.delattr(torch.ops.aten, "_flash_attention_forward", raising=False)
        groups, prompts, own = (SeqLens(lengths, CUDA) for lengths in ((5, 9), (4, 6), (2, 3, 9)))
        q, k, v, prompt_k, prompt_v = (
            torch.empty(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
            for tokens, heads in ((14, 4), (14, 2), (14, 2), (10, 2), (10, 2))
        )
        PackedAttention.apply(q, k, v, own, own, True)
        GroupAttention.apply(q, k, v, prompt_k, prompt_v, groups, prompts, own)
    assert package.module.calls == {"forward": 3, "backward": 3}


@pytest.fixture
def card(monkeypatch):
    """A device of some capability, and which modules can be imported."""

    def make(capability=8, **modules: ModuleType):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_in_")))  # None: an ImportError

    return make


def package_2(version="2.8.3"):
    package = ModuleType("flash_attn")
    package.__version__ = version
    return {"flash_attn": package, "flash_attn_in_flash_attn_interface": stand_in(2)}


@pytest.mark.parametrize("capability,major", [(8, 2), (9, 3), (10, 2)])
def test_version_3_is_taken_on_a_hopper_alone(card, capability, major):
    card(capability, **package_2(), flash_attn_interface=stand_in(3))
    assert find(device=CUDA, dtype=torch.bfloat16).major == major


def test_without_version_3_a_hopper_has_version_2(card):
    card(9, **package_2())
    found = find(device=CUDA, dtype=torch.bfloat16)
    assert (found.major, found.version) == (2, "2.8.3")


@pytest.mark.parametrize(
    "modules,device,dtype,said",
    [
        ({}, CUDA, torch.bfloat16, r"flash_attn cannot be imported.*pip install --no-build-isolation flash-attn"),
        (package_2("2.6.3"), CUDA, torch.bfloat16, "2.6.3 is older than 2.7"),
        (package_2() | {"flash_attn_in_flash_attn_interface": ModuleType("x")}, CUDA, torch.bfloat16, "not known here"),
        (package_2(), CUDA, torch.float32, "policy.dtype=bfloat16"),
        (package_2(), CPU, torch.bfloat16, "CUDA devices only, and this is cpu"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_remedy(card, modules, device, dtype, said):
    card(**modules)
    with pytest.raises(ValueError, match=said) as refused:
        choose("flash_attn", device=device, dtype=dtype)
    assert "policy.attention=torch" in str(refused.value)


@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_torchs_kernels_are_taken_unless_the_package_is_asked_for(monkeypatch, card, attention):
    monkeypatch.setattr(flash_attention, "_in_use", object())
    card(**package_2())
    choose(attention, device=CUDA, dtype=torch.bfloat16)
    assert flash_attention.in_use() is None
