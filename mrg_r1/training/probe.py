"""A look at a start before any step is paid for: a group of each of some validation studies, rewarded as the recipe
says, and one step's cost on this machine (`mrg-r1 probe`). Nothing is learned, and nothing is left on the disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrg_r1.config.recipe import Recipe, RecipeError, check_recipe
from mrg_r1.console import progress
from mrg_r1.data.loader import prompts_ahead
from mrg_r1.data.study import check_images
from mrg_r1.doctor.inputs import read_splits
from mrg_r1.doctor.texts import check_prompts
from mrg_r1.engine.ranks import OneRank
from mrg_r1.evaluation.probe import Sample, measure, outlook, verdict
from mrg_r1.grpo.advantages import without_signal
from mrg_r1.grpo.loss import Metrics
from mrg_r1.policy.family import family_of, lora_pattern
from mrg_r1.policy.load import load_tokenizer
from mrg_r1.policy.lora import add_lora
from mrg_r1.policy.policy import Policy
from mrg_r1.reward.service.interface import RewardService
from mrg_r1.rollout.decode import greedy, rollout
from mrg_r1.rollout.sampling import Sampling
from mrg_r1.tracking.log import Clock
from mrg_r1.training import rewards
from mrg_r1.training.grpo import Pending, update_step
from mrg_r1.training.preflight import DTYPES
from mrg_r1.training.run import Run, open_builder, open_policy
from mrg_r1.types import Completions, Prompts, Rewards, Sampled, Study

_TRAIN = 2000  # training references that the constant report is chosen from, and that a term's weights come from
_PHASES = ("vision", "rollout", "reward", "reference", "old", "update")  # of a step, as they are shown


Part = tuple[Completions, Rewards, Completions, Rewards]  # of a batch: groups and their rewards, greedy and theirs


class _Unlearning:
    """As much of an engine as an update needs whose gradient is thrown away."""

    skipped = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, *arguments: Any) -> Any:
        return self.policy(*arguments)

    def backward(self, loss_share: Tensor, *, last: bool) -> None:
        loss_share.backward()

    def finish_backward(self, loss_share: Tensor) -> None:
        loss_share.backward()


def probe(recipe: Recipe, *, studies: int, updates: bool = True) -> dict[str, Any]:
    """Sample a recipe's start on the first `studies` studies of its validation split, in this process alone.

    Args:
        studies: at most so many.
        updates: also take one step's update, without the optimizer, for its time and memory.

    Returns:
        `evaluation.probe.measure`'s numbers, with `outlook`, `verdict`, what was probed, and `step`: seconds a phase of
        one step of `grpo.studies_per_step` studies on one rank, and the process's peak memory in GiB.

    Raises:
        RecipeError, ManifestError, ValueError: bad input, named; before any model is loaded where that can be.
        RewardError: the labeler or a term fails.
    """
    check_recipe(recipe, world_size=1, task="grpo")
    lora_pattern(family_of(recipe.policy.path), recipe.policy.lora.targets)
    chosen, train = _studies(recipe, studies)
    check_prompts(recipe, chosen, load_tokenizer(recipe.policy.path))
    ranks = OneRank("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="mrg-r1-probe-") as folder:
        recipe = recipe.model_copy(update={"output_dir": Path(folder), "control": None})
        supervisor = rewards.start_service(recipe, ranks)  # loads the labeler while the policy is loaded here
        try:
            policy = open_policy(recipe, ranks, None)
            # B is 0: the policy as it was, with what a step trains
            add_lora(policy, **recipe.policy.lora.model_dump(), seed=recipe.seed)
            build = open_builder(recipe, ranks, policy)
            opened = rewards.open_rewards(recipe, ranks, supervisor, {"train": train, "val": chosen, "test": []})
        except BaseException:
            if supervisor is not None:
                supervisor.close()
            raise
        run = Run(
            recipe=recipe,
            ranks=ranks,
            directory=recipe.output_dir,
            studies={"train": train, "val": chosen, "test": []},
            policy=policy,
            build=build,
            rewards_if_any=opened,
            dtype=DTYPES[recipe.policy.dtype],
        )
        try:
            sample, step = _sample(run, chosen, updates=updates)
        finally:
            run.close()
    result = measure(sample)
    return {
        "policy": str(recipe.policy.path),
        "adapter": None if recipe.policy.adapter is None else str(recipe.policy.adapter),
        "manifest": str(recipe.data.manifest),
        "split": recipe.data.val_split,
        "labeler": opened.labeler,
        "weights": recipe.reward.weights,
        "margin": recipe.reward.margin_at(0),
        "temperature": recipe.rollout.temperature,
        "seed": recipe.seed,
        **result,
        "outlook": outlook(result),
        "verdict": verdict(result),
        "step": step,
    }


def _studies(recipe: Recipe, count: int) -> tuple[list[Study], list[Study]]:
    """The validation studies to probe, their images looked at, and the training studies whose references are read.

    Raises:
        RecipeError: no validation studies, or no training studies where a launch needs them.
        ManifestError: an image that cannot be read.
    """
    splits, _ = read_splits(recipe)
    chosen, train = splits["val"][:count], splits["train"]
    if not chosen:
        raise RecipeError(
            f"data.val_split {recipe.data.val_split!r}: {recipe.data.manifest} has no study of that split, and a probe "
            "wants studies that the start was not trained on; name another as data.val_split=NAME"
        )
    check_images(chosen)
    picked = np.random.default_rng(recipe.seed).permutation(len(train))[:_TRAIN]
    return chosen, [train[place] for place in sorted(picked.tolist())]


def _sample(run: Run, studies: Sequence[Study], *, updates: bool) -> tuple[Sample, dict[str, Any]]:
    """Batch after batch, as many studies as a step has: a group of each study, its greedy report, their rewards."""
    recipe, policy, clock = run.recipe, run.policy, Clock()
    size = recipe.grpo.studies_per_step
    batches = [studies[start : start + size] for start in range(0, len(studies), size)]
    sampling = Sampling(
        group_size=recipe.grpo.group_size,
        max_new_tokens=recipe.rollout.max_new_tokens,
        seed=recipe.seed,
        step=0,
        cache_tokens=recipe.rollout.cache_tokens,
    )
    parts: list[Part] = []
    update: dict[str, float] = {}
    memory = 0.0
    policy.eval()
    for number, ready in enumerate(progress(prompts_ahead(run.build, batches), "probing", total=len(batches))):
        prompts = ready.to(run.ranks.device)
        with torch.no_grad(), clock.phase("vision"):
            vision = policy.encode_images(prompts)
        learns = updates and number == 0
        with clock.phase("rollout"):
            prefill = policy.prompt_cache(prompts, vision) if learns and recipe.rollout.reuse_prefill else None
            done = rollout(policy, prompts, vision, sampling, states=prefill)
        with clock.phase("reward"):
            scored = _score(run, prompts, done)
        if learns:  # first of all: it needs most memory
            taken = Clock()
            metrics = _update(run, Pending(Sampled(prompts, done), vision, prefill, lambda: scored), taken)  # noqa: B023
            memory = float(metrics["time/memory_gib_max"][0])
            update = {name: taken.totals.get(name, 0.0) * size / len(batches[0]) for name in _PHASES}
        best = greedy(policy, prompts, vision, max_new_tokens=recipe.rollout.max_new_tokens)
        parts.append((done, scored, best, _score(run, prompts, best)))
    memory = max(memory, float(clock.costs(0, world_size=1)["time/memory_gib_max"][0]))
    seconds = {name: clock.totals.get(name, 0.0) * size / len(studies) + update.get(name, 0.0) for name in _PHASES}
    step = {
        "studies": size,
        "device": str(run.ranks.device),
        "threads": torch.get_num_threads(),
        "with_update": updates,
        "seconds": {name: round(spent, 4) for name, spent in seconds.items() if spent},
        "memory_gib": round(memory, 3),
    }
    return _joined(parts, recipe, _for_another_study(run, studies, parts)), step


def _update(run: Run, pending: Pending, clock: Clock) -> Metrics:
    """The second half of a step as training takes it, whose gradient nobody applies."""
    run.policy.train()
    metrics = update_step(0, pending, run=run, engine=_Unlearning(run.policy), clock=clock)  # type: ignore[arg-type]
    run.policy.zero_grad(set_to_none=True)
    run.policy.eval()
    return metrics


def _score(run: Run, prompts: Prompts, done: Completions) -> Rewards:
    service: RewardService = run.rewards.service
    context = run.rewards.context_of(prompts.study_ids, step=0)
    return service.result(service.submit(done.texts, done.ended.cpu(), prompts.study_ids, prompts.references, context))


def _for_another_study(run: Run, studies: Sequence[Study], parts: Sequence[Part]) -> NDArray[np.float64] | None:
    """[N, G] rewards of each group for the study after its own; None of a single study."""
    if len(studies) < 2:
        return None
    others = [*studies[1:], studies[0]]
    ids = [study.id for study in others]
    texts = [group for sampled, *_ in parts for group in sampled.texts]
    ended = torch.cat([sampled.ended.cpu() for sampled, *_ in parts])
    service = run.rewards.service
    context = run.rewards.context_of(ids, step=0)
    scored = service.result(service.submit(texts, ended, ids, [study.report for study in others], context))
    return scored.total.double().numpy()


def _joined(parts: Sequence[Part], recipe: Recipe, other_total: NDArray[np.float64] | None) -> Sample:
    sampled, scored, greedy_done, greedy_scored = zip(*parts, strict=True)

    def classes(of: Sequence[Rewards]) -> NDArray[np.int64]:
        return torch.cat([one.labels for one in of]).numpy()

    def total(of: Sequence[Rewards]) -> NDArray[np.float64]:
        return torch.cat([one.total for one in of]).double().numpy()

    silent = [
        without_signal(one.total, one.terms, one.weights, normalise=recipe.reward.normalise).cpu() for one in scored
    ]
    constant = [one.constant["total"] for one in scored if "total" in one.constant]
    return Sample(
        reference=torch.cat([one.reference_labels for one in scored]).numpy(),
        labels=classes(scored),
        greedy_labels=classes(greedy_scored)[:, 0],
        total=total(scored),
        greedy_total=total(greedy_scored)[:, 0],
        constant=torch.cat(constant).double().numpy() if constant else None,
        other_total=other_total,
        silent=torch.cat(silent).numpy(),
        texts=[group for one in scored for group in one.report_texts],
        greedy_texts=[group[0] for one in greedy_scored for group in one.report_texts],
        lengths=torch.cat([one.lengths.cpu() for one in sampled]).numpy(),
        greedy_lengths=torch.cat([one.lengths.cpu() for one in greedy_done]).numpy()[:, 0],
        ended=torch.cat([one.ended.cpu() for one in sampled]).numpy(),
    )
