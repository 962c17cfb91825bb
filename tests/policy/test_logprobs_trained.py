"""SFT of every parameter: log-probs and the gradient of every weight against the checkpoint's own modules."""

from __future__ import annotations

import pytest
import torch

from mrg_r1.policy import logprobs_trained as scoring
from mrg_r1.policy.load import load_policy
from mrg_r1.policy.logprobs_plain import completion_logprobs_plain
from mrg_r1.policy.logprobs_trained import trained_logprobs
from mrg_r1.types import VisionFeatures
from tests.conftest import each_family, either_way


def ragged(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Completions of unequal length, one of a single token; a study with two, and one without any."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 300, (rows, 14), generator=generator)
    lengths = torch.tensor([14, 1, 9, 3, 0, 8][:rows])
    return ids, torch.arange(14) < lengths.unsqueeze(1), torch.tensor([0, 1, 1, 3, 2, 0][:rows])


def modules_features(policy, prompts) -> VisionFeatures:
    """The tower's by transformers' forward."""
    seen = policy.base.get_image_features(**prompts.images.tensors, return_dict=True)
    deeper = getattr(seen, "deepstack_features", None) or []
    images = [torch.cat(parts, dim=1) for parts in zip(seen.pooler_output, *deeper, strict=True)]
    studies, start = [], 0
    for count in prompts.images_per_study:
        studies.append(torch.cat(images[start : start + count]))
        start += count
    return VisionFeatures(studies)


def learn(policy, prompts, *, plain: bool, rows: int = 6, weights=None):
    """(logp, entropy, gradient of each parameter by name) of SFT's loss, or of log-probs weighted one by one."""
    for parameter in policy.parameters():
        parameter.grad = None
    arguments = ragged(rows)
    if plain:
        logp, entropy = completion_logprobs_plain(policy, prompts, modules_features(policy, prompts), *arguments)
    else:
        logp, entropy = policy(prompts, policy.encode_images(prompts), *arguments)
    (-(logp if weights is None else logp * weights).sum() / arguments[1].sum()).backward()
    gradients = {name: one.grad.clone() for name, one in policy.named_parameters() if one.grad is not None}
    return logp.detach(), entropy, gradients


def assert_same(found, wanted) -> None:
    logp, entropy, gradients = found
    torch.testing.assert_close(logp, wanted[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, wanted[1], atol=1e-5, rtol=0)
    assert gradients.keys() == wanted[2].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[2][name], atol=1e-5, rtol=1e-5, msg=lambda said: f"{name}: {said}")  # noqa: B023
        assert (gradient - wanted[2][name]).norm() <= 1e-5 * wanted[2][name].norm() + 1e-7, name


@pytest.fixture
def trained(tiny_policy_directory):
    policy = load_policy(tiny_policy_directory, dtype=torch.float32)
    policy.requires_grad_(True)
    return policy


@either_way
@each_family
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_loss_and_every_gradient_are_those_of_the_modules(trained, studies, build, temperature):
    trained.temperature = temperature
    prompts = build(trained)(studies)
    wanted = learn(trained, prompts, plain=True)
    assert wanted[2].keys() == dict(trained.named_parameters()).keys()
    # the bias of keys moves all scores of a query alike, so its gradient is zero but for rounding
    assert all(gradient.abs().max() > 1e-6 for name, gradient in wanted[2].items() if "k_proj.bias" not in name)
    assert_same(learn(trained, prompts, plain=False), wanted)


@each_family
def test_gradients_follow_what_the_loss_makes_of_each_token(trained, studies, build):
    weights = torch.rand(6, 14, generator=torch.Generator().manual_seed(1))
    prompts = build(trained)(studies)
    wanted = learn(trained, prompts, plain=True, weights=weights)
    assert_same(learn(trained, prompts, plain=False, weights=weights), wanted)


@each_family
def test_a_head_in_chunks_and_recomputed_layers_change_nothing(trained, studies, build, monkeypatch):
    prompts = build(trained)(studies)
    wanted = learn(trained, prompts, plain=False)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 4 * trained.base.lm_head.out_features)
    sizes = []
    log_probs = scoring._log_probs
    monkeypatch.setattr(scoring, "_log_probs", lambda *given: sizes.append(len(given[0])) or log_probs(*given))
    trained.checkpoint_gradients()
    assert_same(learn(trained, prompts, plain=False), wanted)
    assert max(sizes) == 4 and len(sizes) > 4


def test_a_head_of_its_own(untied, studies, build):
    policy = load_policy(untied, dtype=torch.float32)
    policy.requires_grad_(True)
    prompts = build(policy)(studies)
    wanted = learn(policy, prompts, plain=True)
    assert any("lm_head" in name for name in wanted[2]) and any("embed_tokens" in name for name in wanted[2])
    assert_same(learn(policy, prompts, plain=False), wanted)


@each_family
def test_bf16_is_as_near_to_fp32_as_the_modules(tiny_policy_directory, studies, build):
    def passes(dtype):
        policy = load_policy(tiny_policy_directory, dtype=dtype)
        policy.requires_grad_(True)
        prompts = build(policy)(studies)
        return [learn(policy, prompts, plain=plain) for plain in (False, True)]

    def flat(gradients):
        return torch.cat([gradients[name].flatten().float() for name in sorted(gradients)])

    (exact_logp, _, exact), _ = passes(torch.float32)
    ours, theirs = (
        ((logp - exact_logp).abs().mean(), (flat(found) - flat(exact)).norm())
        for logp, _, found in passes(torch.bfloat16)
    )
    assert ours[0] < 1.5 * theirs[0] and ours[1] < 1.5 * theirs[1]


def test_rows_without_a_token_have_no_log_prob(trained, studies, build):
    prompts = build(trained)(studies)
    ids, mask, study_of_row = ragged(6)
    logp, _ = trained_logprobs(trained, prompts, trained.encode_images(prompts), ids, mask, study_of_row)
    assert torch.equal(logp != 0, mask)
    nothing, _ = trained_logprobs(
        trained, prompts, trained.encode_images(prompts), ids, torch.zeros_like(mask), study_of_row
    )
    assert not nothing.any()
