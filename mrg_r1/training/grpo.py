"""The GRPO loop (docs/method.md §3). A step is two halves: `sample_step`, from studies to reports whose rewards are on
their way, and `update_step`, from there to a changed policy.

`phases=rollout` runs the first half and saves it (`rollout_step`), `phases=update` the second on what was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mrg_r1.config.recipe import Recipe
from mrg_r1.data.loader import StudyLoader
from mrg_r1.engine.faults import Signals
from mrg_r1.engine.ranks import Ranks
from mrg_r1.engine.zero import Engine
from mrg_r1.grpo.advantages import without_signal
from mrg_r1.grpo.loss import Metrics
from mrg_r1.policy.language import PromptCache
from mrg_r1.policy.logprobs import group_logprobs
from mrg_r1.policy.lora import add_lora, reference, restore_adapter
from mrg_r1.reward.compute import RewardError
from mrg_r1.reward.diagnostics import group_metrics, with_stds
from mrg_r1.reward.service.interface import RewardService, RewardsMissing, RewardsNotFinite, Ticket
from mrg_r1.rollout.decode import rollout
from mrg_r1.rollout.resample import resample_groups
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.tracking.collapse import CollapseWatch, WordingWatch
from mrg_r1.tracking.completions import write_completions
from mrg_r1.tracking.gaps import GapWatch
from mrg_r1.tracking.log import Clock
from mrg_r1.training import sft
from mrg_r1.training.controls import best_of_groups, dealt_at_random
from mrg_r1.training.experience import SavedExperience, next_step, open_experience, write_step
from mrg_r1.training.looks import Looks, in_words
from mrg_r1.training.preflight import is_finished
from mrg_r1.training.rewards import on_all_ranks, service_metrics, wait
from mrg_r1.training.run import Run, open_run
from mrg_r1.training.state import open_state, start_training
from mrg_r1.training.update import global_advantages, tokens_of, update
from mrg_r1.training.utilisation import utilisation
from mrg_r1.training.validation import keep_best, keep_for_replay, validate_before, warn_at_close, warn_of_gap
from mrg_r1.types import Experience, Rewards, Sampled, VisionFeatures


@dataclass
class Pending:
    """What the first half of a step hands to the second.

    Attributes:
        prefill: the prompts' states with their graph, where the update is to go on from it.
        wait: until the labeler has read the reports.
        found: what `wait` came to, once somebody has asked.
    """

    sampled: Sampled
    vision: VisionFeatures
    prefill: PromptCache | None
    wait: Callable[[], Rewards | RewardError]
    found: Rewards | RewardError | None = None

    def rewards(self) -> Rewards | RewardError:
        """This rank's rewards, or why it has none."""
        if self.found is None:
            self.found = self.wait()
        return self.found


def grpo_step(
    step: int, *, run: Run, engine: Engine, loader: StudyLoader, reward_service: RewardService, clock: Clock
) -> Metrics:
    """One step: B studies in, one or more updates of the policy out. Returns this rank's metrics as (sum, count)
    pairs.
    """
    pending = sample_step(step, run=run, loader=loader, reward_service=reward_service, clock=clock)
    parts = update_step(step, pending, run=run, engine=engine, clock=clock)
    _keep_completions(step, pending.sampled, run)
    return parts | _sampling_metrics(reward_service, clock)


def sample_step(step: int, *, run: Run, loader: StudyLoader, reward_service: RewardService, clock: Clock) -> Pending:
    """The first half: studies, images, reports. The labeler is at work on them when this returns."""
    recipe, policy = run.recipe, run.policy
    sampling = Sampling(
        group_size=recipe.grpo.group_size,
        max_new_tokens=recipe.rollout.max_new_tokens,
        seed=recipe.seed,
        step=step,
        cache_tokens=recipe.rollout.cache_tokens,
    )
    with clock.phase("load"):
        prompts = loader.batch(step).to(run.ranks.device)  # B studies, on this rank
    with clock.phase("vision"):
        with torch.no_grad():  # an update that wants a graph makes its own (`Policy.forward`)
            vision = policy.encode_images(prompts)  # once an image, reused by every pass below
    with clock.phase("rollout"):
        prefill = policy.prompt_cache(prompts, vision) if recipe.rollout.reuse_prefill else None
        completions = rollout(  # [B, G, C]
            policy, prompts, vision, sampling, states=prefill, on_ended=reward_service.hint
        )
    sampled = Sampled(prompts, completions)
    ticket = _submit(step, sampled, run=run, reward_service=reward_service, clock=clock)
    pending = Pending(sampled, vision, prefill, partial(wait, reward_service, ticket))
    if recipe.grpo.max_resample:
        _resample(step, pending, sampling, run=run, reward_service=reward_service, clock=clock)
    return pending


def update_step(step: int, pending: Pending, *, run: Run, engine: Engine, clock: Clock) -> Metrics:
    """The second half: rewards, advantages, updates of the policy. A batch that cannot be learned from is kept."""
    sampled, recipe, kept = pending.sampled, run.recipe, None
    if recipe.control == "rft":
        rewards = take_rewards(step, pending, run=run, clock=clock)
        with clock.phase("advantages"):
            learned, kept = best_of_groups(sampled, rewards)  # [B, 1]
            advantages = torch.ones(kept.shape)
        frozen_logprobs(learned, pending.vision, run=run, clock=clock)
    else:
        learned = sampled
        frozen_logprobs(sampled, pending.vision, run=run, clock=clock)  # while the labeler works
        rewards = take_rewards(step, pending, run=run, clock=clock)  # terms and total, [B, G]
        with clock.phase("advantages"):
            signal = rewards
            if recipe.control == "random":
                signal = dealt_at_random(rewards, sampled.prompts, seed=recipe.seed, step=step)
            advantages = global_advantages(signal, recipe, run.ranks)  # [B, G]
    with clock.phase("update"):
        experience = Experience(
            prompts=sampled.prompts,
            vision=pending.vision,
            completions=learned.completions,
            rewards=rewards,
            advantages=advantages.to(run.policy.device),
            reference_logp=learned.reference_logp,
            old_logp=learned.old_logp,
            kept=kept,
        )
        parts = update(experience, recipe=recipe, engine=engine, ranks=run.ranks, states=pending.prefill)
    if float(parts["policy/skipped_updates"][0]):
        keep_for_replay(run, step, sampled)
    used = utilisation(
        run.policy.shape,
        tokens_of(experience, recipe, prefilled=pending.prefill is not None),
        lora_rank=recipe.policy.lora.rank,
        seconds=float(clock.share("update")[0]),
        dtype=run.policy.base.lm_head.weight.dtype,
    )
    return parts | used | _batch_metrics(sampled, rewards, run, clock)


def rollout_step(step: int, *, run: Run, loader: StudyLoader, reward_service: RewardService, clock: Clock) -> Metrics:
    """The first half alone: reports and rewards are left in RUN/experience, and nothing is learned."""
    pending = sample_step(step, run=run, loader=loader, reward_service=reward_service, clock=clock)
    rewards = take_rewards(step, pending, run=run, clock=clock)
    with clock.phase("save"):
        write_step(run.directory / "experience", step, pending.sampled, recipe=run.recipe, ranks=run.ranks)
    _keep_completions(step, pending.sampled, run)
    return _batch_metrics(pending.sampled, rewards, run, clock) | _sampling_metrics(reward_service, clock)


def saved_step(number: int, *, experience: SavedExperience, run: Run, clock: Clock) -> Pending:
    """Saved reports and rewards in place of the first half; log-probs that were saved with them are used as they
    are.
    """
    with clock.phase("load"):
        studies = {study.id: study for study in run.studies["train"]}
        sampled, rewards = experience.read(number, build=run.build, studies=studies, ranks=run.ranks)
    with clock.phase("vision"), torch.no_grad():
        vision = run.policy.encode_images(sampled.prompts)
    with clock.phase("prefill"):
        prefill = run.policy.prompt_cache(sampled.prompts, vision) if run.recipe.rollout.reuse_prefill else None
    return Pending(sampled, vision, prefill, lambda: rewards)


def frozen_logprobs(sampled: Sampled, vision: VisionFeatures, *, run: Run, clock: Clock) -> None:
    """Put in the log-probs that no update of this step changes, where the loss needs them and they are not
    there yet.
    """
    policy, grpo, budget = run.policy, run.recipe.grpo, run.recipe.engine.micro_batch_tokens
    if grpo.beta > 0 and sampled.reference_logp is None:
        with clock.phase("reference"), reference(policy), torch.no_grad():  # adapters off
            # the images too, where an adapter has been at work on them
            seen = policy.encode_images(sampled.prompts, again=vision) if policy.adapts_vision else vision
            sampled.reference_logp = group_logprobs(
                policy, sampled.prompts, seen, sampled.completions, token_budget=budget
            )
    # later updates need the rollout's log-probs; a single one has them at hand (docs/traps.md #16)
    if grpo.inner_iterations * grpo.minibatches > 1 and sampled.old_logp is None:
        with clock.phase("old"):
            sampled.old_logp = group_logprobs(policy, sampled.prompts, vision, sampled.completions, token_budget=budget)


def take_rewards(step: int, pending: Pending, *, run: Run, clock: Clock) -> Rewards:
    """Wait for the rewards of the step, on all ranks.

    Raises:
        RewardsMissing: a rank has none; all ranks raise it. `RewardsNotFinite` for numbers that are not finite; the
            batch is then kept.
    """
    with clock.phase("reward_exposed"):  # what the ranks wait for rewards
        found = pending.rewards()
    with clock.phase("advantages"):
        try:
            rewards = on_all_ranks(found, run.ranks)
        except RewardsNotFinite as error:
            keep_for_replay(run, step, pending.sampled, problem=str(error))
            raise
    pending.sampled.rewards = rewards
    return rewards


def _submit(step: int, sampled: Sampled, *, run: Run, reward_service: RewardService, clock: Clock) -> Ticket:
    """Hand the reports to the labeler, and go on."""
    prompts, completions = sampled.prompts, sampled.completions
    context = run.rewards.context_of(prompts.study_ids, step=step)
    with clock.phase("reward_exposed"):
        return reward_service.submit(
            completions.texts, completions.ended.cpu(), prompts.study_ids, prompts.references, context
        )


def _resample(
    step: int, pending: Pending, sampling: Sampling, *, run: Run, reward_service: RewardService, clock: Clock
) -> None:
    """Sample the groups whose rewards are all equal again, up to `max_resample` times. The rewards of the last attempt
    are on their way when this returns, unless there was nothing left to sample.
    """
    policy, sampled = run.policy, pending.sampled
    with ExitStack() as alone:
        with clock.phase("rollout"):
            alone.enter_context(policy.whole_decoder())  # ranks sample again as often as their own groups want it
        for attempt in range(1, run.recipe.grpo.max_resample + 1):
            with clock.phase("reward_exposed"):
                found = pending.rewards()
            if isinstance(found, RewardError):
                return
            silent = without_signal(found.total, found.terms, found.weights, normalise=run.recipe.reward.normalise)
            rows = silent.nonzero().squeeze(1).tolist()
            if not rows:
                return
            with clock.phase("rollout"):
                again = replace(sampling, attempt=attempt)
                sampled.completions = resample_groups(
                    policy, sampled.prompts, pending.vision, sampled.completions, rows, again
                )
            ticket = _submit(step, sampled, run=run, reward_service=reward_service, clock=clock)
            pending.wait, pending.found = partial(wait, reward_service, ticket), None


def _keep_completions(step: int, sampled: Sampled, run: Run) -> None:
    """RUN/completions, every so many steps."""
    every = run.recipe.tracking.completions_every
    if every and step % every == 0 and sampled.rewards is not None:
        write_completions(
            run.directory / "completions",
            step=step,
            rank=run.ranks.rank,
            prompts=sampled.prompts,
            completions=sampled.completions,
            rewards=sampled.rewards,
        )


def _batch_metrics(sampled: Sampled, rewards: Rewards, run: Run, clock: Clock) -> Metrics:
    """Of the groups and their rewards, and what the step has cost."""
    tokens = int(sampled.completions.lengths.sum())
    return group_metrics(sampled.completions, rewards, normalise=run.recipe.reward.normalise) | clock.costs(
        tokens, world_size=run.ranks.world_size
    )


def _sampling_metrics(reward_service: RewardService, clock: Clock) -> Metrics:
    """Of the labeler, and the share of the step in which the ranks waited for images and prompts."""
    return service_metrics(reward_service.health()) | {"time/load_share": clock.share("load")}


def train(recipe: Recipe, ranks: Ranks) -> None:
    """Run or resume a GRPO recipe: evaluate, train, validate, keep the best adapter, evaluate again.

    `phases=update` trains on saved experience, without rewards and therefore without evaluations; `phases=rollout` is
    `sample_only`, and `control: sft` is `sft.train`.
    """
    if recipe.control == "sft":
        return sft.train(recipe, ranks)
    if is_finished(recipe.output_dir, ranks):
        return
    if recipe.phases == "rollout":
        return sample_only(recipe, ranks)
    signals, clock, experience = Signals(), Clock(ranks.beat), None
    with clock.phase("start"):
        if recipe.phases == "update" and recipe.experience is not None:
            experience = open_experience(recipe.experience, recipe)

    def make_trainable(run: Run) -> None:
        add_lora(run.policy, **recipe.policy.lora.model_dump(), seed=recipe.seed)
        if experience is not None and experience.adapter is not None:
            restore_adapter(run.policy, experience.adapter)

    state = start_training(
        recipe,
        ranks,
        signals,
        clock,
        task="grpo",
        batch_size=recipe.grpo.studies_per_step,
        make_trainable=make_trainable,
    )
    run, engine, log = state.run, state.engine, state.log
    watch, gaps = CollapseWatch(state.record.get("collapse")), GapWatch(state.record.get("gaps"))
    wording = WordingWatch(state.record.get("wording"))
    looks = Looks(recipe.evaluation.select, state.record.get("looks"))
    state.own = lambda: {
        "collapse": watch.state,
        "wording": wording.state,
        "gaps": gaps.state,
        "looks": looks.state,
    }

    def take(step: int) -> Metrics:
        try:
            if experience is not None:
                pending = saved_step(step, experience=experience, run=run, clock=clock)
                return update_step(step, pending, run=run, engine=engine, clock=clock)
            return grpo_step(
                step, run=run, engine=engine, loader=state.loader, reward_service=run.rewards.service, clock=clock
            )
        except RewardsNotFinite as error:
            log.say(f"step {step} is skipped: {error}")
            return {"policy/skipped_updates": (torch.tensor(1.0), torch.tensor(1.0))}
        except RewardsMissing:  # on all ranks alike, and before the step's first update
            state.save_what_was_learned(step)
            raise

    if state.start == 0 and experience is None:
        with clock.phase("validation"):
            state.best = validate_before(run, gaps, looks, log)
    with state.stepping():
        for step in range(state.start, recipe.steps):
            rate = engine.set_learning_rate(step)
            metrics: dict[str, Any] = {**with_stds(ranks.reduce_metrics(take(step))), "policy/learning_rate": rate}
            learned = "loss" in metrics  # else there were no rewards to learn from
            if learned:
                metrics["policy/grad_norm"] = engine.grad_norm()
            last = step + 1 == recipe.steps
            if last or (recipe.evaluation.every and (step + 1) % recipe.evaluation.every == 0):
                with clock.phase("validation"):
                    state.best = keep_best(
                        run, state.best, step=step + 1, metrics=metrics, gaps=gaps, looks=looks, log=log
                    )
            state.log_step(step, metrics)
            if learned:
                warn_of_gap(log, step, metrics["sampling/logp_gap"], recipe.grpo.correction)
                for warning in (watch.update(metrics), wording.update(metrics)):
                    if warning is not None:
                        log.say(f"step {step}: {warning}")
            state.end_step(step, last=last, due=state.best is not None and state.best["step"] == step + 1)

    if state.best is not None and state.best["step"] == 0:
        log.say(
            "no validation was better than the policy before training: RUN/adapter is the start's, and adds nothing"
        )
    if state.best is not None and (chosen := looks.closing(state.best)):
        state.best |= chosen
        log.say(in_words(state.best, recipe.evaluation.select))
    restore_adapter(run.policy, run.directory / "adapter")  # the best one, not the last
    after = state.evaluate_after()
    if state.before is not None and after is not None:
        warn_at_close(run, log)
    state.finish(after)


def sample_only(recipe: Recipe, ranks: Ranks) -> None:
    """`phases=rollout`: sample and score `steps` batches under the policy as it is, and leave each in RUN/experience.

    An interrupted one goes on at the first step that is not there.
    """
    signals, clock = Signals(), Clock(ranks.beat)
    start = next_step(recipe.output_dir, recipe, ranks)
    with clock.phase("start"):
        run = open_run(recipe, ranks, task="grpo")
        clock.count_labelers(run.labeler_cpu_seconds, sharing=ranks.node.size)
    state = open_state(run, signals, clock, record={"step": start}, batch_size=recipe.grpo.studies_per_step)
    with state.stepping():
        for step in range(start, recipe.steps):
            parts = rollout_step(step, run=run, loader=state.loader, reward_service=run.rewards.service, clock=clock)
            state.log_step(step, {**with_stds(ranks.reduce_metrics(parts))})
            state.end_step(step, last=step + 1 == recipe.steps)
    state.finish(None)
