"""The GRPO loop (docs/method.md §3). `grpo_step` is one step on one screen, in the order in which a study travels.

`phases=rollout` runs its first half, down to the rewards (`sample_only`), `phases=update` its second, from there on
(`update_step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mrg_r1.config.recipe import Recipe
from mrg_r1.data.loader import StudyLoader
from mrg_r1.engine.checkpoint import latest_step, load_checkpoint, save_checkpoint
from mrg_r1.engine.faults import NotFinite, Requeue, Signals, any_signal
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.grpo.advantages import batch_moments, group_advantages, per_term_advantages, std_of_moments, zero_signal
from mrg_r1.grpo.loss import Metrics, grpo_loss, loss_denominator, merge_metrics
from mrg_r1.policy.language import PromptCache
from mrg_r1.policy.logprobs import group_logprobs, micro_batches
from mrg_r1.policy.lora import add_lora, reference, restore_adapter
from mrg_r1.reward.compute import RewardError
from mrg_r1.reward.diagnostics import group_metrics, with_stds
from mrg_r1.reward.service.interface import RewardService, RewardsMissing, RewardsNotFinite
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.resample import resample_groups
from mrg_r1.tracking.collapse import CollapseWatch
from mrg_r1.tracking.completions import write_completions
from mrg_r1.tracking.gaps import GapWatch
from mrg_r1.tracking.log import Clock
from mrg_r1.training.experience import SavedExperience, next_step, open_experience, write_step
from mrg_r1.training.rewards import on_all_ranks, service_metrics, wait
from mrg_r1.training.run import Run, build_engine, finish, is_finished, open_loader, open_log, open_run, say_resuming
from mrg_r1.training.validation import keep_best, keep_for_replay, validate_before, warn_at_close, warn_of_gap
from mrg_r1.types import Experience, Rewards, Sampled, VisionFeatures


def grpo_step(
    step: int, *, run: Run, engine: Engine | None, loader: StudyLoader, rewards: RewardService, clock: Clock
) -> Metrics:
    """One step: B studies in, one or more updates of the policy out. Returns this rank's metrics as (sum, count) pairs.

    Without an engine nothing is learned: the step is left in RUN/experience.
    """
    recipe, policy, grpo = run.recipe, run.policy, run.recipe.grpo

    with clock.phase("load"):
        prompts = loader.batch(step).to(run.ranks.device)  # B studies, on this rank
    with clock.phase("vision"):
        vision = policy.encode_images(prompts)  # once an image, reused by every pass below
    with clock.phase("rollout"):
        sampling: dict[str, Any] = {
            "group_size": grpo.group_size,
            "max_new_tokens": recipe.rollout.max_new_tokens,
            "cache_tokens": recipe.rollout.cache_tokens,
            "seed": recipe.seed,
            "step": step,
        }
        # with its graph, where the update is to go on from it; otherwise the rollout makes its own
        states = policy.prompt_cache(prompts, vision) if recipe.rollout.reuse_prefill else None
        completions = rollout(policy, prompts, vision, states=states, on_ended=rewards.hint, **sampling)  # [B, G, C]
    context_of = run.rewarding.context_of(prompts.study_ids, step=step)
    with clock.phase("reward_exposed"):  # what the ranks wait for rewards
        ticket = rewards.submit(
            completions.texts, completions.ended.cpu(), prompts.study_ids, prompts.references, context_of
        )
    judged: Rewards | RewardError | None = None
    with ExitStack() as alone:
        if grpo.max_resample:
            with clock.phase("rollout"):
                alone.enter_context(policy.whole_decoder())  # ranks sample again as often as their own groups want it
        for attempt in range(1, grpo.max_resample + 1):
            with clock.phase("reward_exposed"):
                judged = wait(rewards, ticket)
            rows = [] if isinstance(judged, RewardError) else zero_signal(judged.total).nonzero().squeeze(1).tolist()
            if not rows:
                break
            with clock.phase("rollout"):
                completions = resample_groups(policy, prompts, vision, completions, rows, attempt=attempt, **sampling)
            with clock.phase("reward_exposed"):
                ticket = rewards.submit(
                    completions.texts, completions.ended.cpu(), prompts.study_ids, prompts.references, context_of
                )
            judged = None
    sampled = Sampled(prompts, completions)
    if engine is not None:
        frozen_logprobs(sampled, vision, run=run, clock=clock)  # while the labeler works
    with clock.phase("reward_exposed"):
        judged = wait(rewards, ticket) if judged is None else judged  # terms and total, [B, G]
    with clock.phase("advantages"):
        try:
            sampled.rewards = judged = on_all_ranks(judged, run.ranks)
        except RewardsNotFinite as error:
            keep_for_replay(run, step, sampled, problem=str(error))
            raise
    if engine is None:
        with clock.phase("save"):
            write_step(run.directory / "experience", step, sampled, recipe=recipe, ranks=run.ranks)
        parts: Metrics = {}
    else:
        parts = learn(step, sampled, vision, judged, states, run=run, engine=engine, clock=clock)
    if recipe.tracking.completions_every and step % recipe.tracking.completions_every == 0:
        folder = run.directory / "completions"
        write_completions(
            folder, step=step, rank=run.ranks.rank, prompts=prompts, completions=completions, rewards=judged
        )
    waited = {"time/load_share": clock.share("load")}  # of the step, what the ranks waited for images and prompts
    costs = clock.costs(int(completions.lengths.sum()), world_size=run.ranks.world_size)
    return parts | group_metrics(completions, judged) | service_metrics(rewards.health()) | waited | costs


def update_step(number: int, *, experience: SavedExperience, run: Run, engine: Engine, clock: Clock) -> Metrics:
    """The step that learns from saved reports and rewards as from its own; log-probs that were saved with them are used
    as they are.
    """
    with clock.phase("load"):
        studies = {study.id: study for study in run.studies["train"]}
        sampled, judged = experience.read(number, build=run.build, studies=studies, ranks=run.ranks)
    with clock.phase("vision"):
        vision = run.policy.encode_images(sampled.prompts)
    with clock.phase("prefill"):
        states = run.policy.prompt_cache(sampled.prompts, vision) if run.recipe.rollout.reuse_prefill else None
    frozen_logprobs(sampled, vision, run=run, clock=clock)
    parts = learn(number, sampled, vision, judged, states, run=run, engine=engine, clock=clock)
    costs = clock.costs(int(sampled.completions.lengths.sum()), world_size=run.ranks.world_size)
    return parts | group_metrics(sampled.completions, judged) | costs


def frozen_logprobs(sampled: Sampled, vision: VisionFeatures, *, run: Run, clock: Clock) -> None:
    """Put in the log-probs that no update of this step changes, where the loss needs them and they are not
    there yet.
    """
    policy, grpo, budget = run.policy, run.recipe.grpo, run.recipe.engine.micro_batch_tokens
    if grpo.beta > 0 and sampled.reference_logp is None:
        with clock.phase("reference"), reference(policy):  # adapters off
            sampled.reference_logp = group_logprobs(
                policy, sampled.prompts, vision, sampled.completions, token_budget=budget
            )
    if grpo.inner_iterations * grpo.minibatches > 1 and sampled.old_logp is None:
        with clock.phase(
            "old"
        ):  # later updates need the rollout's log-probs; a single one has them at hand (docs/traps.md #16)
            sampled.old_logp = group_logprobs(policy, sampled.prompts, vision, sampled.completions, token_budget=budget)


def learn(
    step: int,
    sampled: Sampled,
    vision: VisionFeatures,
    judged: Rewards,
    states: PromptCache | None,
    *,
    run: Run,
    engine: Engine,
    clock: Clock,
) -> Metrics:
    """From rewards to advantages to updates of the policy; a batch whose gradient was not finite is kept."""
    with clock.phase("advantages"):
        advantages = global_advantages(judged, run.recipe, run.ranks).to(run.policy.device)  # [B, G]
    experience = Experience(
        sampled.prompts, vision, sampled.completions, judged, advantages, sampled.reference_logp, sampled.old_logp
    )
    with clock.phase("update"):
        parts = update(experience, recipe=run.recipe, engine=engine, ranks=run.ranks, states=states)
    if float(parts["policy/skipped_updates"][0]):
        keep_for_replay(run, step, sampled)
    return parts


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
    advantages = experience.advantages.view(-1)
    old, ref = (
        None if tensor is None else tensor.view(-1, length)
        for tensor in (experience.old_logp, experience.reference_logp)
    )
    study_of_row = torch.arange(len(experience.prompts), device=ids.device).repeat_interleave(grpo.group_size)

    scored = done.mask.view(-1, length)
    everything = torch.arange(len(ids), device=ids.device)
    minibatches = [everything[first :: grpo.minibatches] for first in range(grpo.minibatches)]
    local = torch.stack([loss_denominator(mask[rows], grpo.aggregation).cpu() for rows in minibatches])
    denominators = ranks.sum(local).tolist()  # so that every loss is a global mean (docs/traps.md #5)
    plans = equal_plans(experience, minibatches, token_budget=recipe.engine.micro_batch_tokens, ranks=ranks)
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
                    aggregation=grpo.aggregation,
                    denominator=denominator,
                    max_length=recipe.rollout.max_new_tokens,
                    clip_low=grpo.clip_low,
                    clip_high=grpo.clip_high,
                    beta=grpo.beta,
                    ratio=grpo.ratio,
                    sampled_logp=sampled[part],
                    correction=grpo.correction,
                    tis_cap=grpo.correction_cap,
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


def global_advantages(judged: Rewards, recipe: Recipe, ranks: Ranks) -> Tensor:
    """[B, G] advantages, of the total or of each term in its group; the batch's std, where asked for, is that of all
    ranks.
    """
    scale = recipe.grpo.advantage_scale
    values = {"total": judged.total} if recipe.reward.normalise == "total" else judged.terms
    stds = None
    if scale == "batch":
        moments = ranks.sum(torch.stack([batch_moments(rewards) for rewards in values.values()]))
        stds = {name: std_of_moments(row) for name, row in zip(values, moments, strict=True)}
    if recipe.reward.normalise == "total":
        return group_advantages(judged.total, scale=scale, batch_std=None if stds is None else stds["total"])
    return per_term_advantages(judged.terms, judged.weights, scale=scale, batch_stds=stds)


def train(recipe: Recipe, ranks: Ranks) -> None:
    """Run or resume a GRPO recipe: evaluate, train, validate, keep the best adapter, evaluate again.

    `phases=update` trains on saved experience, without rewards and therefore without evaluations; `phases=rollout` is
    `sample_only`.
    """
    if is_finished(recipe, ranks):
        return
    if recipe.phases == "rollout":
        return sample_only(recipe, ranks)
    signals, clock = Signals(), Clock(ranks.beat)
    with clock.phase("start"):
        experience = (
            open_experience(recipe.experience, recipe) if recipe.phases == "update" and recipe.experience else None
        )
        run = open_run(recipe, ranks, task="grpo")
    evaluating = recipe.evaluation.test and recipe.phases == "all"
    with clock.phase("evaluation"):
        before = (
            run.evaluate_test("test_before", title="evaluating before")
            if evaluating and recipe.evaluation.before
            else None
        )

    with clock.phase("start"):
        add_lora(run.policy, rank=recipe.policy.lora.rank, alpha=recipe.policy.lora.alpha, seed=recipe.seed)
        if experience is not None and experience.adapter is not None:
            restore_adapter(run.policy, experience.adapter)
        engine = build_engine(run)
        record = load_checkpoint(engine, run.directory / "checkpoints") or {"step": 0, "best": None, "seconds": {}}
    start, best = record["step"], record["best"]
    clock.add(record["seconds"], record.get("cpu_seconds", 0.0))  # of the run before it was interrupted
    loader = open_loader(run, record, batch_size=recipe.grpo.studies_per_step)
    watch, gaps = CollapseWatch(record.get("collapse")), GapWatch(record.get("gaps"))
    skipped_in_a_row: int = record.get("skipped_in_a_row", 0)
    log = open_log(run, start, clock)
    say_resuming(run, log, record, stage=engine.stage)
    run.policy.train()

    def save(done: int) -> None:
        extra = {
            "best": best,
            "seconds": clock.totals,
            "cpu_seconds": clock.training_cpu_seconds,
            "collapse": watch.state,
            "gaps": gaps.state,
            "skipped_in_a_row": skipped_in_a_row,
            "position": loader.position(done),
            "studies": loader.fingerprint,
            "recipe": recipe.model_dump(mode="json"),
        }
        kept = best["step"] if best else None
        log.sync()
        save_checkpoint(
            engine, run.directory / "checkpoints", step=done, extra=extra, keep=recipe.checkpoint.keep, best=kept
        )

    if start == 0 and experience is None:
        with clock.phase("validation"):
            validate_before(run, gaps, log)
    signals.deferring = True  # from here on a step is finished first
    for step in range(start, recipe.steps):
        rate = engine.set_learning_rate(step)
        try:
            if experience is None:
                parts = grpo_step(
                    step, run=run, engine=engine, loader=loader, rewards=run.rewarding.service, clock=clock
                )
            else:
                parts = update_step(step, experience=experience, run=run, engine=engine, clock=clock)
        except RewardsNotFinite as error:
            parts = {"policy/skipped_updates": (torch.tensor(1.0), torch.tensor(1.0))}
            log.say(f"step {step} is skipped: {error}")
        except RewardsMissing:  # on all ranks alike, and before the step's first update
            if (
                step > start and latest_step(run.directory / "checkpoints") != step
            ):  # else it is on the disk, or there is nothing to keep
                save(step)
            run.close()
            raise
        reduced = with_stds(ranks.reduce_metrics(parts))
        metrics: dict[str, Any] = {**reduced, "policy/learning_rate": rate}
        if "loss" in metrics:  # else there were no rewards to learn from
            metrics["policy/grad_norm"] = engine.grad_norm()
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["policy/skipped_updates"] else 0
        last = step + 1 == recipe.steps
        if last or (recipe.evaluation.every and (step + 1) % recipe.evaluation.every == 0):
            with clock.phase("validation"):
                best = keep_best(run, best, step=step + 1, metrics=metrics, gaps=gaps, log=log)
        # before the checkpoint: what a killed run wrote too much is cut off at resuming, what it had not written would
        # be lost
        log.log(step, metrics | clock.end_step(), run.take_validated())
        if "loss" in metrics:
            warn_of_gap(log, step, metrics["sampling/logp_gap"], recipe.grpo.correction)
            collapse = watch.update(metrics)
            if collapse is not None:
                log.say(f"step {step}: {collapse}")
        signalled = any_signal(ranks.gather(signals.received))
        stopping = skipped_in_a_row >= recipe.engine.max_skipped
        due = last or (step + 1) % recipe.checkpoint.every == 0 or (best is not None and best["step"] == step + 1)
        if due or signalled or stopping:
            with clock.phase("checkpoint"):
                save(step + 1)
        if stopping:
            run.close()
            raise NotFinite(
                f"{skipped_in_a_row} steps in a row had a loss, gradient or reward that is not finite "
                f"(engine.max_skipped); their batches are in {run.directory / 'not_finite'}, the weights are as "
                "they were before them"
            )
        if signalled and not last:
            run.close()
            raise Requeue(f"stopped by {signalled} after step {step + 1} of {recipe.steps}, checkpoint written")

    signals.deferring = False
    loader.close()
    restore_adapter(run.policy, run.directory / "adapter")  # the best one, not the last
    with clock.phase("evaluation"):
        after = run.evaluate_test("test", title="evaluating after") if evaluating else None
    if before is not None and after is not None:
        warn_at_close(run, log)
    finish(run, log, clock, stage=engine.stage, before=before, after=after, best=best)


def sample_only(recipe: Recipe, ranks: Ranks) -> None:
    """`phases=rollout`: sample and score `steps` batches under the policy as it is, and leave each in RUN/experience.

    An interrupted one goes on at the first step that is not there.
    """
    signals, clock = Signals(), Clock(ranks.beat)
    start = next_step(recipe.output_dir, recipe, ranks)
    with clock.phase("start"):
        run = open_run(recipe, ranks, task="grpo")
    loader = open_loader(run, {"step": start}, batch_size=recipe.grpo.studies_per_step)
    log = open_log(run, start, clock)
    signals.deferring = True
    for step in range(start, recipe.steps):
        try:
            parts = grpo_step(step, run=run, engine=None, loader=loader, rewards=run.rewarding.service, clock=clock)
        except RewardsMissing:
            run.close()
            raise
        metrics: dict[str, Any] = {**with_stds(ranks.reduce_metrics(parts))}
        log.log(step, metrics | clock.end_step())
        signalled = any_signal(ranks.gather(signals.received))
        if signalled and step + 1 < recipe.steps:
            run.close()
            raise Requeue(f"stopped by {signalled} after step {step + 1} of {recipe.steps}, its experience written")
    signals.deferring = False
    loader.close()
    finish(run, log, clock, stage=None, before=None, after=None, best=None)
