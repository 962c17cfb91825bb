"""From rewards to advantages to updates of the policy: what a step of GRPO learns, cut into minibatches and passes
(docs/method.md §3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrg_r1.config.recipe import Recipe
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.grpo.advantages import batch_moments, group_advantages, per_term_advantages, std_of_moments
from mrg_r1.grpo.loss import LossConfig, Metrics, grpo_loss, loss_denominator, merge_metrics
from mrg_r1.policy.language import PromptCache
from mrg_r1.policy.logprobs import micro_batches
from mrg_r1.training.utilisation import Tokens
from mrg_r1.types import Experience, Rewards


def global_advantages(rewards: Rewards, recipe: Recipe, ranks: Ranks) -> Tensor:
    """[B, G] advantages, of the total or of each term in its group; the batch's std, where asked for, is that of all
    ranks.
    """
    scale = recipe.grpo.advantage_scale
    values = {"total": rewards.total} if recipe.reward.normalise == "total" else rewards.terms
    stds = None
    if scale == "batch":
        moments = ranks.sum(torch.stack([batch_moments(of_term) for of_term in values.values()]))
        stds = {name: std_of_moments(row) for name, row in zip(values, moments, strict=True)}
    if recipe.reward.normalise == "total":
        return group_advantages(rewards.total, scale=scale, batch_std=None if stds is None else stds["total"])
    return per_term_advantages(rewards.terms, rewards.weights, scale=scale, batch_stds=stds)


def update(
    experience: Experience, *, recipe: Recipe, engine: Engine, ranks: Ranks, states: PromptCache | None = None
) -> Metrics:
    """`inner_iterations` passes over the rollout, each in `minibatches` optimizer steps, each in passes of
    `micro_batch_tokens`.

    Minibatch k has every `minibatches`-th completion from the k-th on: the same ones however many ranks share the
    batch, since a rank's completions lie together and divide by their number (docs/traps.md #5). With `states`, the
    prompts as the rollout's prefill left them, gradients gather at them and go through the prompts once at the end.
    """
    grpo, done = recipe.grpo, experience.completions
    length = done.token_ids.shape[2]
    ids, mask, sampled = (tensor.view(-1, length) for tensor in (done.token_ids, done.mask, done.logp))  # [R, C]
    if grpo.mask_truncated:
        mask = mask & done.ended.view(-1, 1)  # out of numerator and denominator both
    if experience.kept is not None:
        mask = mask & experience.kept.view(-1, 1)  # likewise
    advantages = experience.advantages.view(-1)
    old, ref = (
        None if tensor is None else tensor.view(-1, length)
        for tensor in (experience.old_logp, experience.reference_logp)
    )
    study_of_row = torch.arange(len(done.mask), device=ids.device).repeat_interleave(done.mask.shape[1])

    scored = done.mask.view(-1, length)
    everything = torch.arange(len(ids), device=ids.device)
    minibatches = [everything[first :: grpo.minibatches] for first in range(grpo.minibatches)]
    local = torch.stack([loss_denominator(mask[rows], grpo.aggregation).cpu() for rows in minibatches])
    denominators = ranks.sum(local).tolist()  # so that every loss is a global mean (docs/traps.md #5)
    plans = equal_plans(experience, minibatches, token_budget=recipe.engine.micro_batch_tokens, ranks=ranks)
    config = LossConfig(
        aggregation=grpo.aggregation,
        max_length=recipe.rollout.max_new_tokens,
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        beta=grpo.beta,
        ratio=grpo.ratio,
        correction=grpo.correction,
        correction_cap=grpo.correction_cap,
        kl=grpo.kl,
        likelihood=recipe.control == "rft",
    )
    leaves = None if states is None else states.leaves()
    parts: list[Metrics] = []
    skipped = 0  # updates whose gradient was not finite, on any rank
    for _ in range(grpo.inner_iterations):
        for plan, denominator in zip(plans, denominators, strict=True):
            for number, part in enumerate(plan):
                logp, entropy = engine(
                    experience.prompts, experience.vision, ids[part], scored[part], study_of_row[part], leaves
                )
                loss, metrics = grpo_loss(
                    logp=logp,
                    old_logp=None if old is None else old[part],
                    reference_logp=None if ref is None else ref[part],
                    advantages=advantages[part],
                    mask=mask[part],
                    denominator=denominator,
                    config=config,
                    sampled_logp=sampled[part],
                )
                engine.backward(loss, last=states is None and number + 1 == len(plan))
                ranks.beat(f"update, pass {number + 1} of {len(plan)}")
                kept = mask[part].sum().double()
                metrics["entropy"] = (entropy.masked_fill(~mask[part], 0.0).double().sum(), kept)
                # a share of the global loss: summed over micro-batches and ranks, counted once an update and not once a
                # rank
                metrics["loss"] = (loss.detach().double(), torch.tensor(1.0 / (len(plan) * ranks.world_size)))
                parts.append(metrics)
            skipped += engine.skipped and states is None
    if states is not None and leaves is not None:
        engine.finish_backward(states.continuation(leaves))
        skipped += engine.skipped
    names = {"loss": "loss", "logp_gap": "sampling/logp_gap", "logp_gap_max": "sampling/logp_gap_max"}
    merged = {names.get(name, f"policy/{name}"): pair for name, pair in merge_metrics(parts).items()}
    passes = torch.tensor(float(sum(len(plan) for plan in plans)))
    merged["policy/passes"] = (passes, torch.tensor(float(len(plans))))  # forward and backward passes of an update
    return merged | {"policy/skipped_updates": (torch.tensor(float(skipped)), torch.tensor(1.0))}


def tokens_of(experience: Experience, recipe: Recipe, *, prefilled: bool) -> Tokens:
    """What `update` runs over: every optimizer step goes through the prompts that its minibatch has completions of.

    Args:
        prefilled: the prompts went forward in the rollout, so that they do not here.
    """
    rows, group = int(experience.completions.mask[..., 0].numel()), experience.completions.mask.shape[1]
    scored = int(experience.completions.mask.sum())
    again = recipe.grpo.inner_iterations
    through = sum(experience.prompts.lengths) * min(recipe.grpo.minibatches, group) * again
    return Tokens(
        prompts=through,
        prompts_forward=0 if prefilled else through,
        completions=(scored - rows) * again,
        scored=scored * again,
    )


def equal_plans(
    experience: Experience, minibatches: Sequence[Tensor], *, token_budget: int, ranks: Ranks
) -> list[list[Tensor]]:
    """The forward passes of each minibatch as tensors of rows: as many on every rank, which meet in each
    backward pass.
    """
    done = experience.completions
    mask = done.mask.flatten(0, 1)
    study_of_row = torch.arange(len(done.mask), device=mask.device).repeat_interleave(done.mask.shape[1])

    def plans(counts: Sequence[int]) -> list[list[Tensor]]:
        return [
            [
                rows[part]
                for part in micro_batches(
                    experience.prompts, mask[rows], study_of_row[rows], token_budget=token_budget, at_least=count
                )
            ]
            for rows, count in zip(minibatches, counts, strict=True)
        ]

    mine = [len(plan) for plan in plans([1] * len(minibatches))]
    return plans([max(counts) for counts in zip(*ranks.gather(mine), strict=True)])
