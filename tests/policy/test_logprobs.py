"""Scoring against the model's own forward, and the traps between sampling and scoring."""

from __future__ import annotations

import pytest
import torch

from mrg_r1.kernels import calls as kernels
from mrg_r1.policy import logprobs as scoring
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs import completion_logprobs, group_logprobs
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.policy.lora import reference
from mrg_r1.policy.prefixes import PrefixTree
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.sampling import Sampling
from tests.conftest import EOS, each_family, either_way, inputs_of_modules, with_lora


def rolled_out(policy, prompts, *, group_size=3, length=12, step=0, seed=0):
    vision = policy.encode_images(prompts)
    return vision, rollout(
        policy, prompts, vision, Sampling(group_size=group_size, max_new_tokens=length, seed=seed, step=step)
    )


def plain_forward_logp(policy, prompts, completions, *, banned, temperature):
    """[B, G, C] from the public HF forward, one unpadded row at a time, with the model's own positions: shares no code
    with scoring.
    """
    model = policy.base
    rows = torch.zeros(completions.logp.shape)
    for b in range(len(prompts)):
        one = prompts.select([b])
        prompt = one.input_ids[0][one.attention_mask[0].bool()]
        for g in range(completions.token_ids.shape[1]):
            ids = torch.cat([prompt, completions.token_ids[b, g][completions.mask[b, g]]])
            logits = model(**inputs_of_modules(policy.image_token_id, one.images, ids[None])).logits[
                0, len(prompt) - 1 : -1
            ]
            logits[:, banned] = -torch.inf
            picked = (logits / temperature).log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            rows[b, g, : len(picked)] = picked
    return rows


@either_way
@each_family
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_logp_equals_scored_logp_equals_plain_forward(lora_policy, studies, build, temperature):
    """Traps 2 and 9: ragged prompts, two images of unequal size, two temperatures."""
    lora_policy.temperature = temperature
    prompts = build(lora_policy)(studies)
    rolled_out(lora_policy, prompts.select([1, 2]), length=5)  # a rollout of another batch size leaves nothing behind
    vision, completions = rolled_out(lora_policy, prompts)
    scored = group_logprobs(lora_policy, prompts, vision, completions, token_budget=120)
    ends = EOS[lora_policy.base.config.model_type]
    banned = [one for one in range(8) if one not in ends]  # every other special token of the tiny tokenizer
    with torch.no_grad():
        plain = plain_forward_logp(lora_policy, prompts, completions, banned=banned, temperature=temperature)
    assert completions.mask.sum() > 50
    torch.testing.assert_close(completions.logp, scored, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored, plain, atol=1e-5, rtol=0)


@each_family
def test_logp_follows_its_study_when_prompts_are_permuted_and_sliced(lora_policy, studies, build):
    """Trap 10: pixels must not drift from their prompts."""
    prompts = build(lora_policy)(studies)
    vision, completions = rolled_out(lora_policy, prompts)
    whole = group_logprobs(lora_policy, prompts, vision, completions, token_budget=10000)
    order = [2, 0, 3, 1]
    shuffled = prompts.select(order)
    assert shuffled.study_ids == ["c", "a", "d", "b"]
    length = completions.token_ids.shape[2]
    again, _ = completion_logprobs(
        lora_policy,
        shuffled,
        lora_policy.encode_images(shuffled),
        completions.token_ids[order].view(-1, length),
        completions.mask[order].view(-1, length),
        torch.arange(4).repeat_interleave(3),
    )
    torch.testing.assert_close(again.view(4, 3, length), whole[order], atol=1e-5, rtol=0)
    for b in range(4):
        one = prompts.select([b])
        alone, _ = completion_logprobs(
            lora_policy,
            one,
            lora_policy.encode_images(one),
            completions.token_ids[b],
            completions.mask[b],
            torch.zeros(3, dtype=torch.long),
        )
        torch.testing.assert_close(alone, whole[b], atol=1e-5, rtol=0)


@each_family
def test_image_tokens_that_are_not_the_features_are_refused(policy, studies, build):
    prompts = build(policy)(studies[:1])
    prompts.input_ids[0, (prompts.input_ids[0] == policy.image_token_id).nonzero()[0, 0]] = 10
    with pytest.raises(ValueError, match=r"study a: (8 image tokens in the prompt, 9|15 .*, 16) features"):
        policy.encode_images(prompts)


@each_family
def test_ratio_is_one_with_dropout_configured_and_modes_toggled(lora_policy, studies, build):
    """Trap 3: an independent old pass in eval mode equals the training pass in train mode."""
    for module in lora_policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for layer in lora_policy.language_model.layers:  # PEFT builds no dropout for 0: put one where it would act
        projection = layer.self_attn.q_proj
        projection.lora_dropout["default"] = torch.nn.Dropout(0.5)
    prompts = build(lora_policy)(studies)
    lora_policy.eval()
    vision, completions = rolled_out(lora_policy, prompts)
    old = group_logprobs(lora_policy, prompts, vision, completions, token_budget=100)
    lora_policy.train()
    length = completions.token_ids.shape[2]
    new, _ = lora_policy(
        prompts,
        vision,
        completions.token_ids.view(-1, length),
        completions.mask.view(-1, length),
        torch.arange(4).repeat_interleave(3),
    )
    assert new.requires_grad
    torch.testing.assert_close(new.view_as(old), old, atol=1e-6, rtol=0)
    # the pass by the modules themselves, in which a dropout would act
    ids, mask = completions.token_ids.view(-1, length), completions.mask.view(-1, length)
    plain, _ = completion_logprobs_plain(lora_policy, prompts, vision, ids, mask, torch.arange(4).repeat_interleave(3))
    torch.testing.assert_close(plain.view_as(old), old, atol=1e-5, rtol=0)


@each_family
def test_reference_is_bitwise_the_base_model(lora_policy, studies, build, tiny_policy_directory):
    prompts = build(lora_policy)(studies)
    vision, completions = rolled_out(lora_policy, prompts)
    with_adapter = group_logprobs(lora_policy, prompts, vision, completions, token_budget=130)
    with reference(lora_policy):
        off = group_logprobs(lora_policy, prompts, vision, completions, token_budget=130)
    base = load_policy(tiny_policy_directory, dtype=torch.float32)
    plain = group_logprobs(base, prompts, base.encode_images(prompts), completions, token_budget=130)
    assert torch.equal(off, plain)
    assert (with_adapter - off).abs().max() > 1e-2


@each_family
def test_micro_batches_do_not_change_logp_or_gradient(lora_policy, studies, build):
    """Trap 5 at the level of the policy."""
    prompts = build(lora_policy)(studies)
    vision, completions = rolled_out(lora_policy, prompts)
    length = completions.token_ids.shape[2]
    ids, mask = completions.token_ids.view(-1, length), completions.mask.view(-1, length)
    rows_of = torch.arange(4).repeat_interleave(3)
    trained = [p for p in lora_policy.parameters() if p.requires_grad]
    gradients = []
    for size in (12, 5, 1):
        for parameter in trained:
            parameter.grad = None
        for rows in torch.arange(12).split(size):
            logp, _ = lora_policy(prompts, vision, ids[rows], mask[rows], rows_of[rows])
            logp.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-5


@each_family
def test_entropy_is_that_of_the_sampled_distribution(policy, studies, build):
    prompts = build(policy)(studies[:2])
    vision, completions = rolled_out(policy, prompts, group_size=2)
    length = completions.token_ids.shape[2]
    _, entropy = policy(
        prompts,
        vision,
        completions.token_ids.view(-1, length),
        completions.mask.view(-1, length),
        torch.tensor([0, 0, 1, 1]),
    )
    kept = int((~policy.banned).sum())
    first = entropy[:, 0]
    assert torch.all(first > 0) and torch.all(first <= torch.log(torch.tensor(float(kept))) + 1e-5)
    assert torch.equal(entropy != 0, completions.mask.view(-1, length))


def gradient_of(policy, arguments, *, score=None):
    """Log-probs and the gradient of a weighted sum of them."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    logp, entropy = policy(*arguments) if score is None else score(policy, *arguments)
    (logp * torch.sin(torch.arange(logp.numel()).float()).view(logp.shape)).sum().backward()
    return logp.detach(), entropy, torch.cat([p.grad.float().flatten() for p in trained])


def ragged(policy, prompts, *, tokens=292):
    """Eleven completions of four studies in no order: an empty one, single tokens, equal and unequal lengths, a study
    with one. Of few different `tokens` some begin alike and two are the same.
    """
    lengths = torch.tensor([13, 1, 5, 0, 7, 7, 2, 13, 4, 1, 3])
    ids = torch.randint(8, 8 + tokens, (11, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(13) < lengths[:, None]
    return prompts, policy.encode_images(prompts), ids, mask, torch.tensor([1, 0, 1, 2, 3, 3, 0, 1, 3, 1, 0])


@either_way
@each_family
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("tokens,wide", [(292, False), (2, False), (2, True), (1, True)])
def test_shared_prefix_equals_the_naive_pass(lora_policy, studies, build, temperature, tokens, wide, monkeypatch):
    """Trap 13: log-probs, entropies and gradients on ragged groups, one and two images of unequal size, grouped-query
    attention; also where completions begin alike or one is another's beginning, within the layers' windows and beyond.
    """
    lora_policy.temperature = temperature
    if wide and lora_policy.base.config.model_type == "gemma3":
        lora_policy.base.config.text_config.sliding_window = 1024
        for layer in lora_policy.language_model.layers:
            layer.self_attn.sliding_window = layer.self_attn.sliding_window and 1024
    trees = []
    make = PrefixTree.of
    monkeypatch.setattr(PrefixTree, "of", lambda *given: trees.append(make(*given)) or trees[-1])
    arguments = ragged(lora_policy, build(lora_policy)(studies), tokens=tokens)
    naive, naive_entropy, naive_gradient = gradient_of(lora_policy, arguments, score=completion_logprobs_plain)
    logp, entropy, gradient = gradient_of(lora_policy, arguments)
    assert torch.equal(logp != 0, arguments[3])
    torch.testing.assert_close(logp, naive, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, naive_entropy, atol=1e-5, rtol=0)
    assert (gradient - naive_gradient).norm() / naive_gradient.norm() < 1e-5
    # only the kernel reads a tree
    assert [tree is not None for tree in trees] == ([tokens < 292] if kernels.ready(logp) else [])


@each_family
@pytest.mark.parametrize("tokens", [292, 2])
def test_shared_prefix_in_bf16_is_as_near_to_fp32_as_the_naive_pass(
    tiny_policy_directory, studies, build, tokens, monkeypatch
):
    """bf16 rounds, so two bf16 passes differ; neither may be farther from the fp32 pass than the other by much. What
    completions share is not looked for: its attention is float32's.
    """

    def passes(dtype):
        policy = with_lora(load_policy(tiny_policy_directory, dtype=dtype))
        arguments = ragged(policy, build(policy)(studies), tokens=tokens)
        return [gradient_of(policy, arguments, score=score) for score in (None, completion_logprobs_plain)]

    (exact, _, exact_gradient), _ = passes(torch.float32)
    monkeypatch.setattr(PrefixTree, "of", lambda *given: pytest.fail("a tree in bfloat16"))
    errors, gradient_errors = [], []
    for logp, _, gradient in passes(torch.bfloat16):
        errors.append((logp - exact).abs().mean())
        gradient_errors.append((gradient - exact_gradient).norm() / exact_gradient.norm())
    assert errors[0] < 0.05 and errors[0] < 1.5 * errors[1]
    # four norms a layer round more often, and so do alternatives that are alike, in both passes
    assert gradient_errors[0] < (0.15 if tiny_policy_directory.name == "gemma3" else 0.1) * (1 if tokens > 2 else 4)
    assert gradient_errors[0] < 1.5 * gradient_errors[1]


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_log_softmax_equals_the_whole_one(tiny_policy_directory, monkeypatch, dtype):
    """Trap 14: forward and backward, a chunk of 3 tokens against autograd through everything at once."""
    policy = load_policy(tiny_policy_directory, dtype=dtype, temperature=0.7)
    hidden = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    ids = torch.randint(8, 300, (10,), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(10, generator=torch.Generator().manual_seed(2))
    whole = policy.next_token_logits(hidden).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (wanted,) = torch.autograd.grad((whole * weights).sum(), hidden)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 3 * len(policy.banned))
    logp, _ = scoring.token_logprobs(policy, hidden, ids)
    (found,) = torch.autograd.grad((logp * weights).sum(), hidden)
    torch.testing.assert_close(logp, whole, atol=1e-6, rtol=0)
    assert wanted.norm() > 0
    assert (found - wanted).float().norm() / wanted.float().norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@each_family
def test_gradient_checkpointing_gives_the_same_gradient(lora_policy, studies, build):
    """Trap 17: with and without recomputation; and the rollout in training mode is the same, its cache never off."""
    prompts = build(lora_policy)(studies)
    arguments = ragged(lora_policy, prompts)
    lora_policy.train()
    _, _, without = gradient_of(lora_policy, arguments)
    _, before = rolled_out(lora_policy, prompts)
    lora_policy.checkpoint_gradients()
    _, _, with_it = gradient_of(lora_policy, arguments)
    _, after = rolled_out(lora_policy, prompts)
    assert without.norm() > 0 and torch.equal(with_it, without)
    assert torch.equal(before.token_ids, after.token_ids) and torch.equal(before.logp, after.logp)


@each_family
def test_recomputation_keeps_less_for_the_backward_pass(lora_policy, studies, build):
    arguments = ragged(lora_policy, build(lora_policy)(studies))
    kept = []
    for recompute in (False, True):
        lora_policy.recompute = recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            lora_policy(*arguments)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@each_family
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_gap_between_sampled_and_scored_logp(tiny_policy_directory, studies, build, dtype, limit):
    """Merged LoRA and decoding against unmerged LoRA and scoring: nothing in fp32, rounding in bf16, under the level
    that is warned of.
    """
    policy = with_lora(load_policy(tiny_policy_directory, dtype=dtype))
    prompts = build(policy)(studies)
    vision, done = rolled_out(policy, prompts, length=40)
    scored = group_logprobs(policy, prompts, vision, done, token_budget=10_000)
    gap = (scored - done.logp).abs()[done.mask]
    assert gap.mean() < limit
    assert dtype == torch.float32 or gap.mean() > 1e-5, "bf16 that does not round is not bf16"
