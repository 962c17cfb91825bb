"""What makes a run's rewards: the service of this node, the references' labels, and the report that needs no looking.

`start_service` begins to load the labeler in its own process and returns; `open_rewards` waits for it, when the policy
has been loaded meanwhile. `wait` and `on_all_ranks` see to it that no rank goes on without rewards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mrg_r1.config.recipe import Recipe, RecipeError, held_out_is_rewarded
from mrg_r1.cores import labeler_threads, read_cores
from mrg_r1.engine.checkpoint import recorded_recipe
from mrg_r1.engine.ranks import Ranks
from mrg_r1.files import write_text_atomically
from mrg_r1.grpo.loss import Metrics
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.reward.card.card import MARGINS, best_real_constants
from mrg_r1.reward.compute import NotFiniteError, RewardContext, RewardError
from mrg_r1.reward.held_out import HeldOutLabeler
from mrg_r1.reward.outside import OutsideSettings
from mrg_r1.reward.references import reference_labels
from mrg_r1.reward.service.client import ServiceRewards
from mrg_r1.reward.service.interface import Health, RewardService, RewardsMissing, RewardsNotFinite, Ticket
from mrg_r1.reward.service.supervisor import ServiceSettings, Supervisor
from mrg_r1.reward.terms import inverse_prevalence
from mrg_r1.training.thresholds import resolve_thresholds
from mrg_r1.types import Rewards, Study

_HELD_OUT_DTYPE = "float32"


@dataclass
class RunRewards:
    """Rewards for the studies of a run.

    Attributes:
        service: where completions are handed in.
        labeler: its name and fingerprint.
        studies: by split, those that the run can meet.
        labels: study id -> the 14 classes of its reference.
        constant: by margin, the training report that would earn most if it were given to every study; None without
            a training report.
        ccs_weights: [13, 2] inside the cosine; None: equal.
        thresholds: [13] of `additive`; None where it is not a term.
    """

    recipe: Recipe
    service: RewardService
    labeler: dict[str, str]
    studies: dict[str, list[Study]]
    labels: dict[str, list[int]]
    constant: dict[float, str] | None
    ccs_weights: NDArray[np.float64] | None
    thresholds: NDArray[np.float64] | None
    supervisor: Supervisor | None  # on the node's first rank

    def context_of(self, study_ids: Sequence[str], *, step: int | None = None) -> RewardContext:
        """How a batch of these studies is rewarded: at `step` of the training, or, without one, as at its end."""
        margin = self.recipe.reward.margin_at(self.recipe.steps if step is None else step)
        return RewardContext(
            reference_labels=np.array([self.labels[study_id] for study_id in study_ids], dtype=np.int64),
            margin=margin,
            ccs_weights=self.ccs_weights,
            constant=self.constant_at(margin),
            thresholds=self.thresholds,
            contradictions=step is None,
        )

    def constant_at(self, margin: float) -> str | None:
        """The constant report of the margin that is nearest among those it was chosen at."""
        if self.constant is None:
            return None
        return self.constant[min(self.constant, key=lambda chosen_at: abs(chosen_at - margin))]

    def classes(self, split: str) -> NDArray[np.int64]:
        """[N, 14] classes of the references of a split."""
        return self.classes_of(self.studies[split])

    def classes_of(self, studies: Sequence[Study]) -> NDArray[np.int64]:
        """[N, 14] classes of the references of N studies that the run can meet."""
        return np.array([self.labels[study.id] for study in studies], dtype=np.int64).reshape(-1, len(OBSERVATIONS))

    def close(self) -> None:
        """The run needs no more rewards."""
        self.service.close()
        if self.supervisor is not None:
            self.supervisor.close()


def start_service(recipe: Recipe, ranks: Ranks) -> Supervisor | None:
    """Start this node's service, on its first rank; None on the others."""
    if not ranks.leads_node:
        return None
    reward, threads = recipe.reward, _labeler_threads(ranks)
    settings = ServiceSettings(
        labeler=str(reward.labeler),
        tokenizer=reward.tokenizer,
        device=reward.device,
        dtype=reward.dtype,
        reward_function={
            "weights": reward.weights,
            "margin": reward.margin,
            "format_style": reward.format,
            "mode": recipe.prompt.mode,
            "normalise": reward.normalise,
            "outside": asdict(outside_settings(recipe, threads=threads)),
        },
        threads=threads,
    )
    return Supervisor(settings, log=recipe.output_dir / f"reward_service_{ranks.rank}.log")


def outside_settings(recipe: Recipe, *, threads: int) -> OutsideSettings:
    """How others are asked that score terms; RadEval's processes share the labeler's cores."""
    radeval = recipe.radeval
    each = threads // radeval.workers if radeval.device == "cpu" else 1
    return OutsideSettings(
        radeval=None if radeval.python is None else radeval.settings((), threads=each),
        workers=radeval.workers,
        http=recipe.reward.http.settings,
        send_text_to=tuple(recipe.reward.send_text_to),
    )


def _labeler_threads(ranks: Ranks) -> int:
    """Of a labeler on the CPU of this node; beside a GPU a rank keeps one core busy."""
    each = torch.get_num_threads() if ranks.device.type == "cpu" else 1
    return labeler_threads(read_cores(), ranks=ranks.node.size, each=each)


def open_rewards(
    recipe: Recipe, ranks: Ranks, supervisor: Supervisor | None, studies: dict[str, list[Study]]
) -> RunRewards:
    """Wait for the services of all nodes, connect to this node's, and have the references read. Every rank calls this.

    Args:
        supervisor: from `start_service`.
        studies: by split, those that the run can meet; the training studies under `train`.

    Raises:
        RecipeError: a labeler or a term that cannot be loaded, on any node; all ranks raise it.
    """
    mine: tuple[str | None, Path, int] | None = None
    if supervisor is not None:
        problem = None
        try:
            supervisor.wait()
        except ValueError as error:
            problem = str(error) if len(ranks.nodes) == 1 else f"{ranks.node}: {error}"
        mine = (problem, supervisor.directory, os.getpid())
    everyone = ranks.gather(mine)
    problems = [said[0] for said in everyone if said is not None and said[0] is not None]
    if problems:
        if supervisor is not None:
            supervisor.close()
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    _, directory, keeper = everyone[ranks.node.first]
    service = ServiceRewards(directory, keeper=keeper, timeout=recipe.reward.timeout)
    keep_radeval(recipe, ranks, service.radeval)
    return prepare(recipe, ranks, service, service.labeler, supervisor, studies)


def keep_radeval(recipe: Recipe, ranks: Ranks, radeval: Mapping[str, Any] | None) -> None:
    """Refuse rewards of another RadEval than the other nodes', or than this run began with, which RUN/radeval.json
    says. Every rank calls this.

    Raises:
        RecipeError: both, with version and weights; all ranks raise it.
    """
    everyone = ranks.gather(radeval)
    if others := [one for one in everyone if one != everyone[0]]:
        raise RecipeError(f"radeval.python {recipe.radeval.python}: the nodes have {everyone[0]} and {others[0]}")

    def keep() -> None:
        kept = recipe.output_dir / "radeval.json"
        resumed = recorded_recipe(recipe.output_dir / "checkpoints") is not None
        if kept.is_file() and resumed and not recipe.resume.allow_changes:
            began = json.loads(kept.read_text(encoding="utf-8"))
            if began != radeval:
                raise RecipeError(
                    f"radeval.python {recipe.radeval.python}: this run began with {began} ({kept}), and it is "
                    f"{radeval} by now: another reward; take the old environment, or resume.allow_changes=true"
                )
        if radeval is not None:
            write_text_atomically(kept, json.dumps(radeval, indent=1) + "\n")

    ranks.from_main(keep, RecipeError)


def prepare(
    recipe: Recipe,
    ranks: Ranks,
    service: RewardService,
    labeler: dict[str, str],
    supervisor: Supervisor | None,
    studies: dict[str, list[Study]],
) -> RunRewards:
    """Have the references read by a service that is ready, and choose the constant report. Every rank calls this."""
    labels: dict[str, list[int]] = {}
    train = studies["train"]
    if ranks.is_main:
        labels = reference_labels(
            [study for part in studies.values() for study in part],
            manifest=recipe.data.manifest,
            labeler=labeler | {"dtype": recipe.reward.dtype, "tokenizer": str(recipe.reward.tokenizer)},
            label=service.label,
            fallback=recipe.output_dir / "reference_labels",
            said_first=recipe.reward.references == "said",
        )
    labels = ranks.agree(labels)
    opened = RunRewards(recipe, service, labeler, studies, labels, None, None, None, supervisor)
    classes = opened.classes("train")
    opened.thresholds = ranks.from_main(lambda: resolve_thresholds(recipe, classes), RecipeError)
    if ranks.is_main and any(study.report is not None for study in train):
        opened.constant = _constants(recipe, classes, [study.report for study in train], opened.thresholds)
    opened.constant = ranks.agree(opened.constant)
    if train:
        opened.ccs_weights = _ccs_weights(recipe, classes)
    return opened


def _ccs_weights(recipe: Recipe, classes: NDArray[np.int64]) -> NDArray[np.float64] | None:
    return inverse_prevalence(classes) if recipe.reward.ccs_weights == "inverse_prevalence" else None


def _constants(
    recipe: Recipe, classes: NDArray[np.int64], texts: Sequence[str | None], thresholds: NDArray[np.float64] | None
) -> dict[float, str]:
    """By margin, the training report that would earn most of MCCS, CCS, CE-F1 and additive as the recipe weights them,
    and of MCCS where it rewards none of them, over all training labels; studies with labels alone (None) have none
    to give.

    Of a margin that moves: where it begins, where it ends, and every multiple of 0.05 between.
    """
    reward = recipe.reward
    ends = sorted((reward.margin_at(0), reward.margin_at(recipe.steps)))
    margins = sorted({*ends, *(margin for margin in MARGINS if ends[0] < margin < ends[1])})
    weights = {f"of_{name}": reward.weights.get(name, 0.0) for name in ("mccs", "ccs", "ce_f1", "additive")}
    if not any(weights.values()):
        weights["of_mccs"] = 1.0
    chosen = best_real_constants(
        classes,
        texts,
        margins,
        ccs_weights=_ccs_weights(recipe, classes),
        thresholds=thresholds,
        **weights,
    )
    reports = {margin: texts[study] for margin, study in zip(margins, chosen, strict=True)}
    return {
        margin: report for margin, report in reports.items() if report is not None
    }  # each has one, as some study has


def start_held_out(recipe: Recipe, ranks: Ranks) -> Supervisor | None:
    """Start the held-out labeler's process on rank 0, which is the only one that asks it; None on the others, and
    without a held-out labeler.
    """
    evaluation = recipe.evaluation
    if evaluation.held_out_labeler is None or not ranks.is_main:
        return None
    settings = ServiceSettings(
        labeler=str(evaluation.held_out_labeler),
        tokenizer=evaluation.held_out_tokenizer,
        device=evaluation.held_out_device,
        dtype=_HELD_OUT_DTYPE,
        reward_function={"mode": recipe.prompt.mode},  # nothing is scored there; hints are taken apart
        threads=_labeler_threads(ranks),
        name="held_out",
        device_field="evaluation.held_out_device",
    )
    return Supervisor(settings, log=recipe.output_dir / "held_out_service.log")


def open_held_out(
    recipe: Recipe,
    ranks: Ranks,
    supervisor: Supervisor | None,
    studies: Sequence[Study],
    *,
    rewarded: Mapping[str, str],
) -> HeldOutLabeler | None:
    """Wait for the held-out labeler and have it read the references of the studies that are evaluated. Every rank calls
    this; rank 0 gets it.

    Args:
        supervisor: from `start_held_out`.
        studies: those that the run can evaluate.
        rewarded: name and fingerprint of the rewarded labeler.

    Raises:
        RecipeError: the held-out labeler cannot be loaded, or it is the rewarded labeler under another name; all ranks
            raise it.
        RewardsMissing: it fails while it reads the references; all ranks raise it.
    """
    if recipe.evaluation.held_out_labeler is None:
        return None
    held_out: HeldOutLabeler | None = None

    def connect() -> None:
        nonlocal held_out
        if supervisor is None:
            return
        try:
            supervisor.wait()
            service = ServiceRewards(
                supervisor.directory, keeper=os.getpid(), timeout=recipe.reward.timeout, name=supervisor.settings.name
            )
            held_out = prepare_held_out(recipe, service, service.labeler, supervisor, studies, rewarded=rewarded)
        except (ValueError, RewardError) as error:
            supervisor.close()
            if isinstance(error, RecipeError):
                raise
            kind = RecipeError if isinstance(error, ValueError) else RewardsMissing
            raise kind(f"evaluation.held_out_labeler {recipe.evaluation.held_out_labeler}: {error}") from error

    ranks.from_main(connect, RecipeError, RewardsMissing)
    return held_out


def prepare_held_out(
    recipe: Recipe,
    service: RewardService,
    labeler: dict[str, str],
    supervisor: Supervisor | None,
    studies: Sequence[Study],
    *,
    rewarded: Mapping[str, str],
) -> HeldOutLabeler:
    """Refuse a held-out labeler that is the rewarded labeler, and have the references read, on rank 0.

    Raises:
        RecipeError: equal fingerprints.
    """
    if labeler["fingerprint"] == rewarded["fingerprint"]:
        raise RecipeError(held_out_is_rewarded(recipe))
    references = reference_labels(
        studies,
        manifest=recipe.data.manifest,
        labeler=labeler | {"dtype": _HELD_OUT_DTYPE, "tokenizer": str(recipe.evaluation.held_out_tokenizer)},
        label=service.label,
        fallback=recipe.output_dir / "reference_labels",
    )
    return HeldOutLabeler(service, labeler, references, supervisor)


def wait(service: RewardService, ticket: Ticket) -> Rewards | RewardError:
    """The rewards, or why there are none: other ranks have theirs, and go on to the next collective."""
    try:
        return service.result(ticket)
    except RewardError as error:
        return error


def on_all_ranks(found: Rewards | RewardError, ranks: Ranks) -> Rewards:
    """This rank's rewards, if every rank has its own.

    Raises:
        RewardsMissing: a rank has none; all ranks raise it, before anything is learned from the others (docs/traps.md
            #22). `RewardsNotFinite` where numbers that are not finite are the only reason.
    """
    mine = (str(found), isinstance(found, NotFiniteError)) if isinstance(found, RewardError) else None
    problems = ranks.gather(mine)
    failed = [f"rank {rank}: {problem[0]}" for rank, problem in enumerate(problems) if problem is not None]
    if failed or isinstance(found, RewardError):
        skippable = all(problem is None or problem[1] for problem in problems)
        raise (RewardsNotFinite if skippable else RewardsMissing)("\n".join(failed))
    return found


def service_metrics(health: Health) -> Metrics:
    """What the reward service did for this rank's step. Under `time/`, since it is of the machine and the moment: no
    resume repeats it.
    """
    one = torch.tensor(1.0)
    return {
        "time/reward_busy": (torch.tensor(health.busy), one),
        # copies within the batch, and what an earlier step or a hint has had read, are not read again
        "time/reward_read_share": (torch.tensor(float(health.computed)), torch.tensor(float(health.asked))),
        "time/reward_restarts_max": (torch.tensor(float(health.restarts)), one),
    }
