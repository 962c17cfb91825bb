"""Rollout: keyed sampling, EOS, banned ids, and a generation config that must not be obeyed."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from mrg_r1.kernels import calls as kernels
from mrg_r1.rollout import decode, decoder
from mrg_r1.rollout.decode import greedy, rollout
from mrg_r1.rollout.resample import resample_groups
from mrg_r1.rollout.sampling import Sampling, keyed_uniforms, sample_tokens
from tests.conftest import EOS, each_family, either_way, inputs_of_modules


def sample(policy, prompts, on_ended=None, **changes):
    options = {"group_size": 4, "max_new_tokens": 10, "seed": 0, "step": 0} | changes
    return rollout(policy, prompts, policy.encode_images(prompts), Sampling(**options), on_ended=on_ended)


@each_family
def test_near_greedy_generation_config_is_not_obeyed(policy, studies, build):
    """Trap 1: temperature 1e-6 and top_k 1 stand in the checkpoint; the group differs all the same, with the model's
    entropy.
    """
    assert policy.base.generation_config.temperature == 1e-6 and policy.base.generation_config.top_k == 1
    prompts = build(policy)(studies[:1])
    completions = sample(policy, prompts, group_size=256, max_new_tokens=1)
    first = completions.token_ids[0, :, 0]
    with torch.no_grad():
        vision = policy.encode_images(prompts)
        _, entropy = policy(
            prompts, vision, first[:1, None], torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
        )
    # minus the mean sampled log-prob estimates the entropy; its standard error is the std of the log-probs over
    # sqrt(256)
    error = completions.logp[0, :, 0].std() / 16
    assert len(first.unique()) > 50
    assert abs(-completions.logp[0, :, 0].mean() - entropy[0, 0]) < 5 * error


@each_family
def test_banned_ids_are_never_sampled(policy, studies, build):
    """Trap 11: with every logit pushed towards the image token it still is not drawn."""
    with torch.no_grad():
        head = policy.base.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)  # untie: the embedding must stay
        head.weight[policy.image_token_id] = head.weight.abs().max() * 50
    completions = sample(policy, build(policy)(studies), group_size=16)
    assert not policy.banned[completions.token_ids[completions.mask]].any()
    assert torch.isfinite(completions.logp).all()


@each_family
def test_the_kernels_draw_what_torch_draws(lora_policy, studies, build, monkeypatch):
    """The same tokens, and the same log-probs but for the order of sums; whatever has ended, parted or never met."""
    if not kernels.ready(torch.zeros(1)):
        pytest.skip("no kernels here")
    eager_to_end(lora_policy)
    prompts, found = build(lora_policy)(studies), []
    for there in (True, False):
        monkeypatch.setattr(kernels, "ready", partial(_ready, there))
        found.append(sample(lora_policy, prompts, group_size=8, max_new_tokens=40))
    ours, torchs = found
    assert torch.equal(ours.token_ids, torchs.token_ids) and torch.equal(ours.mask, torchs.mask)
    assert torch.equal(ours.ended, torchs.ended) and ours.texts == torchs.texts
    torch.testing.assert_close(ours.logp, torchs.logp, atol=5e-6, rtol=0)


def _ready(there, *tensors):
    return there and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)


@each_family
def test_completion_does_not_depend_on_batch_order_or_group(policy, studies, build):
    """Keyed sampling; and docs/traps.md #7: member g of a study is the same wherever the study stands."""
    prompts = build(policy)(studies)
    together = sample(policy, prompts)
    for b, study in enumerate(studies):
        alone = sample(policy, build(policy)([study]))
        for g in range(4):
            assert alone.texts[0][g] == together.texts[b][g]
    shuffled = sample(policy, prompts.select([3, 1, 0, 2]))
    assert shuffled.texts == [together.texts[b] for b in (3, 1, 0, 2)]
    smaller = sample(policy, prompts, group_size=2)
    assert smaller.texts == [group[:2] for group in together.texts]


@each_family
@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"attempt": 1}])
def test_every_part_of_the_key_changes_the_sample(policy, studies, build, change):
    prompts = build(policy)(studies[:1])
    assert sample(policy, prompts).texts != sample(policy, prompts, **change).texts


@each_family
@pytest.mark.parametrize("eos_index", [0, 1])
def test_eos_ends_a_row_and_is_scored(policy, studies, build, eos_index):
    """Trap 8: two EOS ids, one of which is the pad id or none; the EOS is in the mask, what follows is not."""
    assert policy.eos_ids == EOS[policy.base.config.model_type] and policy.pad_id == 0
    eos = policy.eos_ids[eos_index]
    head = policy.next_token_logits

    def eager_to_end(hidden, **laid_out):
        logits = head(hidden, **laid_out)
        logits[:, eos] += 6.0
        return logits

    policy.next_token_logits = eager_to_end
    completions = sample(policy, build(policy)(studies), group_size=16, max_new_tokens=12)
    assert completions.ended.float().mean() > 0.5
    lengths = completions.lengths
    assert lengths.min() < lengths.max(), "rows of unequal length, so that compaction took place"
    for b in range(4):
        for g in range(16):
            ids, length = completions.token_ids[b, g], int(lengths[b, g])
            ends = torch.isin(ids[:length], torch.tensor(policy.eos_ids)).nonzero().flatten().tolist()
            assert completions.mask[b, g, :length].all() and not completions.mask[b, g, length:].any()
            assert ends == ([length - 1] if completions.ended[b, g] else [])
            assert torch.all(completions.token_ids[b, g, length:] == policy.pad_id)
            assert torch.all(completions.logp[b, g, length:] == 0)
            assert completions.ended[b, g] or length == 12


@each_family
def test_ids_trained_on_are_the_ids_sampled(policy, studies, build):
    """Trap 21: decode-encode is not the identity for random byte sequences; ids are kept, never re-tokenised."""
    completions = sample(policy, build(policy)(studies), group_size=8)
    changed = 0
    for b in range(4):
        for g in range(8):
            ids = completions.token_ids[b, g][completions.mask[b, g]].tolist()
            assert completions.texts[b][g] == policy.tokenizer.decode(ids, skip_special_tokens=True)
            changed += policy.tokenizer(completions.texts[b][g], add_special_tokens=False)["input_ids"] != ids
    assert changed > 0, "the test needs samples whose text encodes to other ids"


@each_family
def test_greedy_takes_the_most_probable_token(policy, studies, build):
    prompts = build(policy)(studies)
    vision = policy.encode_images(prompts)
    best = greedy(policy, prompts, vision, max_new_tokens=6)
    with torch.no_grad():
        for token in range(10, 200, 10):  # no other first token is more probable
            ids = torch.full((4, 1), token)
            logp, _ = policy(prompts, vision, ids, torch.ones(4, 1, dtype=torch.bool), torch.arange(4))
            assert torch.all(logp[:, 0] <= best.logp[:, 0, 0] + 1e-6)


@each_family
def test_resampled_groups_replace_only_their_studies(policy, studies, build):
    prompts = build(policy)(studies)
    vision = policy.encode_images(prompts)
    options = {"group_size": 3, "max_new_tokens": 8, "seed": 0, "step": 0}
    first = rollout(policy, prompts, vision, Sampling(**options))
    again = resample_groups(policy, prompts, vision, first, [1, 3], Sampling(**options, attempt=1))
    fresh = rollout(policy, prompts, vision, Sampling(attempt=1, **options))
    assert again.texts == [first.texts[0], fresh.texts[1], first.texts[2], fresh.texts[3]]


def test_sampling_follows_the_distribution():
    log_probs = torch.tensor([[0.5, 0.25, 0.0, 0.25, 0.0]]).log()
    uniforms = keyed_uniforms(seed=0, step=0, study_ids=["a"], group_size=4000, length=1)[:, 0]
    drawn = sample_tokens(log_probs.expand(4000, -1), uniforms)
    counts = np.bincount(drawn, minlength=5) / 4000
    assert counts[2] == 0 and counts[4] == 0
    assert np.abs(counts - np.array([0.5, 0.25, 0, 0.25, 0])).max() < 0.03


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_of_probability_zero_is_not_drawn_at_the_ends(uniform):
    log_probs = torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3, 0.0]]).log()
    drawn = int(sample_tokens(log_probs, torch.tensor([uniform], dtype=torch.float64)))
    assert drawn == (1 if uniform == 0 else 3)


def generate_greedily(policy, prompts, length):
    """The most probable tokens by transformers' own `generate`, a study at a time: shares no code with the rollout."""
    banned = policy.banned.nonzero().flatten().tolist()
    rows = []
    for b in range(len(prompts)):
        one = prompts.select([b])
        kept = one.attention_mask[0].bool()
        ids = one.input_ids[:, kept]
        out = policy.base.generate(
            **inputs_of_modules(policy.image_token_id, one.images, ids),
            do_sample=False,
            repetition_penalty=1.0,
            suppress_tokens=banned,
            max_new_tokens=length,
            eos_token_id=policy.eos_ids,
            pad_token_id=policy.pad_id,
        )
        rows.append(out[0, ids.shape[1] :].tolist())
    return rows


@either_way
@each_family
@pytest.mark.parametrize("name", ["policy", "lora_policy"])
def test_greedy_equals_transformers_generate(request, studies, build, name):
    """Forty tokens: over several widths of the static cache, ragged prompts, two images of unequal size."""
    chosen = request.getfixturevalue(name)
    prompts = build(chosen)(studies)
    best = greedy(chosen, prompts, chosen.encode_images(prompts), max_new_tokens=40)
    expected = generate_greedily(chosen, prompts, 40)
    assert [best.token_ids[b, 0][best.mask[b, 0]].tolist() for b in range(4)] == expected
    assert max(map(len, expected)) > 20


def eager_to_end(policy, chance=3.0):
    """Rows end early and at different tokens."""
    head = policy.next_token_logits

    def logits(hidden, **laid_out):
        found = head(hidden, **laid_out)
        found[:, policy.eos_ids] += chance
        return found

    policy.next_token_logits = logits


@either_way
@each_family
def test_compaction_changes_nothing(lora_policy, studies, build, monkeypatch):
    """Dropping rows that have ended: the same tokens, and the same log-probs but for the order of sums."""
    eager_to_end(lora_policy)
    prompts = build(lora_policy)(studies)
    compactions, inner = [], decode.Decoder.compact

    def counted(decoder, running):
        compactions.append((running.numel(), int(running.sum())))
        inner(decoder, running)

    monkeypatch.setattr(decode.Decoder, "compact", counted)
    answers = []
    for share in (0.0, 0.75, 0.999):
        monkeypatch.setattr(decode, "_COMPACT_BELOW", share)
        answers.append(sample(lora_policy, prompts, group_size=6, max_new_tokens=40))
        if share == 0.0:
            assert not compactions
    assert len(compactions) > 8
    lengths = answers[0].lengths
    assert lengths.min() < 4 and lengths.max() > 20
    for other in answers[1:]:
        assert torch.equal(other.token_ids, answers[0].token_ids) and torch.equal(other.mask, answers[0].mask)
        torch.testing.assert_close(other.logp, answers[0].logp, atol=2e-6, rtol=0)


@either_way
@each_family
@pytest.mark.parametrize("compact_below", [0.0, 0.75])
@pytest.mark.parametrize("sampled", [True, False])
def test_places_of_one_state_are_computed_once_and_ended_ones_not_at_all(
    lora_policy, studies, build, monkeypatch, sampled, compact_below
):
    """The same tokens, and the same log-probs but for the order of sums."""
    ends = EOS[lora_policy.base.config.model_type]
    lora_policy.banned[[one for one in range(len(lora_policy.banned)) if one > 14 and one not in ends]] = True
    eager_to_end(lora_policy, chance=-1.0 if sampled else 0.0)  # of few tokens, so that members of a group begin alike
    prompts = build(lora_policy)(studies)
    monkeypatch.setattr(decode, "_COMPACT_BELOW", compact_below)
    computed, inner = [], decoder.Decoder._advance

    def counted(one, width):
        going = int((~one.ended).sum())
        computed.append((len(one.ended), going, len(one.ended if one.shared is None else one.shared.places)))
        inner(one, width)

    monkeypatch.setattr(decoder.Decoder, "_advance", counted)
    answers, totals = [], []
    for share in (0.0, 1.0):
        computed.clear()
        monkeypatch.setattr(decoder, "_WORTH", {"kernels": share, "torch": share})
        if sampled:
            answers.append(sample(lora_policy, prompts, group_size=12, max_new_tokens=40))
        else:
            answers.append(greedy(lora_policy, prompts, lora_policy.encode_images(prompts), max_new_tokens=40))
        totals.append([sum(column) for column in zip(*computed, strict=True)])
    (places, going, without), (_, _, shared) = totals
    assert without == places and (shared < going if sampled else shared == going)
    lengths = answers[0].lengths
    assert not sampled or lengths.min() < 10 < lengths.max()
    for name in ("token_ids", "mask", "ended"):
        assert torch.equal(getattr(answers[1], name), getattr(answers[0], name))
    assert answers[1].texts == answers[0].texts
    torch.testing.assert_close(answers[1].logp, answers[0].logp, atol=5e-6, rtol=0)


@each_family
@pytest.mark.parametrize("cache_tokens", [1, 120, 250])
def test_a_rollout_in_parts_is_the_whole_one(lora_policy, studies, build, cache_tokens):
    eager_to_end(lora_policy)
    prompts = build(lora_policy)(studies)
    whole = sample(lora_policy, prompts)
    parts = sample(lora_policy, prompts, cache_tokens=cache_tokens)
    assert (
        torch.equal(parts.token_ids, whole.token_ids)
        and torch.equal(parts.ended, whole.ended)
        and parts.texts == whole.texts
    )
    torch.testing.assert_close(parts.logp, whole.logp, atol=2e-6, rtol=0)


@each_family
@pytest.mark.parametrize("cache_tokens", [None, 120])
def test_what_has_ended_is_handed_on_while_others_go_on(lora_policy, studies, build, cache_tokens):
    """Every text that is handed on is one of the rollout's, none twice, some before the last token; and the samples are
    the same.
    """
    eager_to_end(lora_policy)
    prompts = build(lora_policy)(studies)
    early: list[list[str]] = []
    plain = sample(lora_policy, prompts, group_size=6, max_new_tokens=40, cache_tokens=cache_tokens)
    told = sample(
        lora_policy, prompts, group_size=6, max_new_tokens=40, cache_tokens=cache_tokens, on_ended=early.append
    )
    assert torch.equal(told.token_ids, plain.token_ids) and told.texts == plain.texts
    handed = [text for texts in early for text in texts]
    ended = [told.texts[b][g] for b in range(4) for g in range(6)]
    assert len(early) > 4 and len(handed) > 12
    assert not set(handed) - set(ended)
    if cache_tokens is None:
        assert not Counter(handed) - Counter(ended)


def test_keys_and_values_are_held_for_as_many_tokens_as_allowed(lora_policy, studies, build):
    prompts = build(lora_policy)(studies)
    tokens = prompts.attention_mask.sum(dim=1).tolist()
    parts = decode._parts(prompts, own=40, cache_tokens=tokens[0] + tokens[1] + 80)
    assert parts[0] == [0, 1] and [study for part in parts for study in part] == [0, 1, 2, 3]
    assert decode._parts(prompts, own=40, cache_tokens=None) == [[0, 1, 2, 3]]
    assert decode._parts(prompts, own=40, cache_tokens=1) == [[0], [1], [2], [3]]


def test_a_study_twice_in_a_step_has_other_numbers_and_the_first_time_keeps_its_own():
    def draw(names, occurrences=None):
        return keyed_uniforms(seed=0, step=3, study_ids=names, group_size=2, length=5, occurrences=occurrences)

    twice, once = draw(["a", "b", "a"], [0, 0, 1]), draw(["a", "b"])
    assert torch.equal(twice[:4], once)
    assert not torch.equal(twice[4:], once[:2])


@each_family
def test_no_special_token_but_eos_has_a_probability(policy):
    logits = policy.next_token_logits(torch.zeros(1, policy.base.lm_head.in_features))[0]
    special = {number for number, token in policy.tokenizer.added_tokens_decoder.items() if token.special}
    assert special - set(policy.eos_ids)
    for number in special:
        assert bool(logits[number].isfinite()) == (number in policy.eos_ids)
