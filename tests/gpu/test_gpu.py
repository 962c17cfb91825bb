"""What only a CUDA device has: its flash kernels, decoding by a captured graph, bf16 scoring at speed. `make test-gpu`.

Skipped where there is no device, so that nothing here is proof of anything until it has run on one.
"""

from __future__ import annotations

import pytest
import torch

from mrg_r1.policy import flash_attention
from mrg_r1.policy.attention import SeqLens, attend, attend_backward
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs import completion_logprobs
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.rollout.decode import greedy, rollout
from mrg_r1.rollout.decoder import Decoder
from mrg_r1.rollout.sampling import Sampling
from tests.conftest import each_family, with_lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def lora_on(directory, device, dtype):
    return with_lora(load_policy(directory, dtype=dtype)).to(device)


# of decoders (Qwen's 128, MedGemma's 256) and of towers (Qwen2.5-VL's 80, the others' 72)
SIZES = [(4, 4, 64), (28, 4, 128), (8, 4, 256), (16, 16, 80), (16, 16, 72)]


@pytest.mark.parametrize("heads,key_heads,size", SIZES)
@pytest.mark.parametrize(
    "q_lengths,k_lengths,causal", [((5, 0, 70, 9), (5, 3, 70, 9), False), ((5, 70, 9), (5, 70, 9), True)]
)
def test_flash_kernels_agree_with_whole_score_matrices(heads, key_heads, size, q_lengths, k_lengths, causal):
    """Forward, log-sum-exp and the three gradients in bf16, against fp32 by `_plain`."""
    device = torch.device("cuda")
    q_lens, k_lens = SeqLens(q_lengths, device), SeqLens(k_lengths, device)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(tokens, count, size, device=device, dtype=torch.bfloat16)
        for tokens, count in ((q_lens.total, heads), (k_lens.total, key_heads), (k_lens.total, key_heads))
    )
    grad = torch.randn_like(q)
    out, lse = attend(q, k, v, q_lens, k_lens, causal=causal)
    found = attend_backward(grad, q, k, v, out, lse, q_lens, k_lens, causal=causal)
    wide = [tensor.float() for tensor in (q, k, v)]  # fp32 has no flash kernel on CUDA: whole matrices
    exact, exact_lse = attend(*wide, q_lens, k_lens, causal=causal)
    wanted = attend_backward(grad.float(), *wide, exact, exact_lse, q_lens, k_lens, causal=causal)
    torch.testing.assert_close(lse, exact_lse, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.float() - theirs).norm() / theirs.norm() < 2e-2


@pytest.mark.parametrize("heads,key_heads,size", SIZES)
@pytest.mark.parametrize(
    "q_lengths,k_lengths,causal", [((5, 0, 70, 9), (5, 3, 70, 9), False), ((5, 70, 9), (5, 70, 9), True)]
)
def test_the_flash_attn_package_is_torchs_kernels(monkeypatch, heads, key_heads, size, q_lengths, k_lengths, causal):
    """Forward, log-sum-exp and the three gradients, of a part of the keys too."""
    device = torch.device("cuda")
    try:
        package = flash_attention.find(device=device, dtype=torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    q_lens, k_lens = SeqLens(q_lengths, device), SeqLens(k_lengths, device)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(tokens, count, size, device=device, dtype=torch.bfloat16)
        for tokens, count in ((q_lens.total, heads), (k_lens.total, key_heads), (k_lens.total, key_heads))
    )
    grad = torch.randn_like(q)
    found = []
    for chosen in (None, package):
        monkeypatch.setattr(flash_attention, "_in_use", chosen)
        out, lse = attend(q, k, v, q_lens, k_lens, causal=causal)
        parts = attend_backward(grad, q, k, v, out, lse + 0.5, q_lens, k_lens, causal=causal)
        found.append((out, lse, *parts))
    for theirs, torchs in zip(found[1], found[0], strict=True):
        assert (theirs.float() - torchs.float()).norm() <= 2e-2 * torchs.float().norm()


@each_family
def test_decoding_on_the_device_is_decoding_on_the_cpu(tiny_policy_directory, studies, build):
    """fp32, greedy and sampled, over several widths and compactions: the graph gives the tokens that the CPU gives."""
    answers = []
    for device in ("cpu", "cuda"):
        policy = lora_on(tiny_policy_directory, device, torch.float32)
        prompts = build(policy)(studies).to(device)
        vision = policy.encode_images(prompts)
        best = greedy(policy, prompts, vision, max_new_tokens=200)
        drawn = rollout(policy, prompts, vision, Sampling(group_size=3, max_new_tokens=200, seed=0, step=0))
        answers.append((best.token_ids.cpu(), drawn.token_ids.cpu(), drawn.logp.cpu()))
    assert torch.equal(answers[0][0][:, :, :20], answers[1][0][:, :, :20])
    same = (answers[0][1][:, :, :40] == answers[1][1][:, :, :40]).float().mean()
    assert same > 0.9, "rounding may part a row late, not most rows early"


@each_family
def test_a_replayed_graph_is_the_step_itself(tiny_policy_directory, studies, build, monkeypatch):
    policy = lora_on(tiny_policy_directory, "cuda", torch.bfloat16)
    prompts = build(policy)(studies).to("cuda")
    vision = policy.encode_images(prompts)
    options = {"group_size": 4, "max_new_tokens": 150, "seed": 0, "step": 0}
    by_graph = rollout(policy, prompts, vision, Sampling(**options))
    monkeypatch.setattr(
        Decoder, "advance", lambda decoder, written: decoder._advance(min(decoder.length, -(-written // 128) * 128))
    )
    eager = rollout(policy, prompts, vision, Sampling(**options))
    assert torch.equal(by_graph.token_ids, eager.token_ids) and torch.equal(by_graph.mask, eager.mask)
    torch.testing.assert_close(by_graph.logp, eager.logp, atol=1e-5, rtol=0)


@each_family
def test_sampled_logp_is_near_the_scored_one_in_bf16(tiny_policy_directory, studies, build):
    policy = lora_on(tiny_policy_directory, "cuda", torch.bfloat16)
    prompts = build(policy)(studies).to("cuda")
    vision = policy.encode_images(prompts)
    done = rollout(policy, prompts, vision, Sampling(group_size=4, max_new_tokens=60, seed=0, step=0))
    length = done.token_ids.shape[2]
    rows = torch.arange(4, device="cuda").repeat_interleave(4)
    with torch.no_grad():
        scored, _ = completion_logprobs(
            policy, prompts, vision, done.token_ids.view(-1, length), done.mask.view(-1, length), rows
        )
    gap = (scored - done.logp.view(-1, length)).abs()[done.mask.view(-1, length)]
    assert gap.mean() < 0.05


@each_family
def test_shared_prefix_equals_the_naive_pass_in_bf16(tiny_policy_directory, studies, build):
    policy = lora_on(tiny_policy_directory, "cuda", torch.bfloat16)
    prompts = build(policy)(studies).to("cuda")
    vision = policy.encode_images(prompts)
    lengths = torch.tensor([13, 1, 5, 0, 7, 7, 2, 13], device="cuda")
    ids = torch.randint(8, 300, (8, 13), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.arange(13, device="cuda") < lengths[:, None]
    rows = torch.tensor([1, 0, 1, 2, 3, 3, 0, 1], device="cuda")
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    found = []
    for score in (completion_logprobs, completion_logprobs_plain):
        policy.zero_grad()
        logp, _ = score(policy, prompts, vision, ids, mask, rows)
        logp.sum().backward()
        found.append((logp.detach(), torch.cat([parameter.grad.float().flatten() for parameter in trained])))
    (logp, gradient), (naive, naive_gradient) = found
    assert (logp - naive).abs()[mask].mean() < 0.03
    assert (gradient - naive_gradient).norm() / naive_gradient.norm() < 0.1
