"""A vision tower is taught to see before it is taught to write: one linear head on its features, labels as targets.

A published policy comes with a pretrained tower; a tiny random one has none, and next-token prediction alone teaches it
to look hardly at all. The head is thrown away; what stays is a tower whose features tell the findings apart.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mrg_r1.console import progress, progress_bar
from mrg_r1.data.workers import process_study
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.metrics.ranking import auc
from mrg_r1.policy.images import image_features
from mrg_r1.policy.load import load_image_processor, load_policy, save_policy
from mrg_r1.policy.policy import Policy
from mrg_r1.types import ImageInputs, Study

STEPS, BATCH, LEARNING_RATE, WARMUP = 600, 64, 1e-3, 20
LOOK_EVERY = 50  # steps
SEEN = 0.98  # a finding whose AUC is above this is seen: where all are, there is no more to teach
PATIENCE = 3  # looks without a better mean AUC, after which it stops
HEADS = ("tokens", "mean")
_HELD_OUT = 0.1  # of the taught patients, where there is no split val to look at
_ENOUGH = 5  # positives, and negatives, that an AUC wants


@dataclass(frozen=True)
class Films:
    """Images as the policy reads them, and what there is to see in each.

    Attributes:
        images: one entry an image, ready for the tower.
        views: of each: "frontal", "lateral" or "unknown"; each has a head of its own.
        truth: [images, 13] float32, 1 where the finding is there (said to be uncertain counts as there).
    """

    images: list[ImageInputs]
    views: list[str]
    truth: Tensor

    def __len__(self) -> int:
        return len(self.images)


def teach_tower(
    policy_path: Path,
    taught: Sequence[Study],
    watched: Sequence[Study],
    *,
    image_side: int,
    steps: int = STEPS,
    seed: int = 0,
    head: str = "tokens",
) -> dict[str, Any]:
    """Teach the vision tower of a checkpoint directory to tell findings apart, in place.

    Each view has one linear layer over all image tokens of an image, or over their mean; the loss is binary cross-
    entropy over the observations that occur. AdamW, a cosine to zero over `steps`; every `LOOK_EVERY` steps the AUC
    of each finding is taken on images that are not taught. It ends where every finding's is above `SEEN`, or where
    the mean has not risen for `PATIENCE` looks, and the tower of the best look stays.

    Args:
        policy_path: a checkpoint directory; its weights are replaced, and `training.json` written beside them.
        taught: studies whose labels are the targets: `drawn` where they have it, else `said`, in which silence counts
            as absent.
        watched: others, to look at; empty: a tenth of the patients of `taught` is held out.
        image_side: pixels; larger images are reduced to this area.
        steps: at most.
        seed: of the order and the head.
        head: "tokens": it reads every image token in its place, and is taught in the fewest steps; "mean": it reads the
            mean over the tokens, so that each token comes to tell what is anywhere on the film.

    Returns:
        What `training.json` holds: `auc` by finding and `mean_auc` of the tower that stays, `curve`, `steps`,
        `seconds`, `labels` (drawn or said), studies and images.

    Raises:
        ValueError: another head, a study without labels, no finding that is there in some studies and not in others, or
            images of several sizes.
    """
    started = time.monotonic()
    if head not in HEADS:
        raise ValueError(f"head {head!r} of the tower's teaching; allowed are {' and '.join(HEADS)}")
    labels = labels_of([*taught, *watched])
    policy = load_policy(policy_path, dtype=torch.float32)
    processor = load_image_processor(policy_path, min_pixels=56 * 56, max_pixels=image_side**2)
    rng = np.random.default_rng(seed)
    if not watched:
        patients = sorted({study.patient_id for study in taught})
        held = {patients[i] for i in rng.permutation(len(patients))[: max(1, round(_HELD_OUT * len(patients)))]}
        watched = [study for study in taught if study.patient_id in held]
        taught = [study for study in taught if study.patient_id not in held]
    films, others = (_films(studies, policy, processor, labels) for studies in (taught, watched))
    _require_one_size(films, others)
    known = _told_apart(films, others, labels)
    sight = _Sight(policy, films, known, seed=seed, pooled=head == "mean")
    curve, best = _fit(sight, films, others, steps=steps, rng=rng)
    sight.restore(best)
    save_policy(policy, policy_path, source=policy_path)
    summary = {
        "auc": curve[best.look]["auc"],
        "mean_auc": curve[best.look]["mean_auc"],
        "steps": curve[best.look]["step"],
        "head": head,
        "labels": labels,
        "studies": len(taught),
        "images": len(films),
        "watched_studies": len(watched),
        "image_side": image_side,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "curve": curve,
    }
    write_text_atomically(policy_path / "training.json", json.dumps({"tower": summary}, indent=2) + "\n")
    return summary


def labels_of(studies: Sequence[Study]) -> str:
    """ "drawn" where every study has the truth that it was drawn from, "said" where every one has at least what is
    said.

    Raises:
        ValueError: a study has neither, or there are none.
    """
    if not studies:
        raise ValueError("no studies to teach the tower with; name a split that has some")
    if all(study.drawn is not None for study in studies):
        return "drawn"
    for study in studies:
        if study.said is None:
            raise ValueError(
                f"study {study.id}: no labels to teach the tower with; give each study labels.drawn or labels.said "
                "(mrg-r1 label reads them out of reports)"
            )
    return "said"


def _films(studies: Sequence[Study], policy: Policy, processor: Any, labels: str) -> Films:
    images: list[ImageInputs] = []
    views: list[str] = []
    truth: list[list[float]] = []
    for study in progress(studies, "reading images"):
        values = (study.drawn if labels == "drawn" else study.said) or ()
        processed = policy.layout.image_inputs(process_study(study.id, [i.path for i in study.images], processor))
        for number, image in enumerate(study.images):
            images.append(_kept(processed.select([number])))
            views.append(image.view or "unknown")
            truth.append([float(value in (1, -1)) for value in values[:NO_FINDING]])
    return Films(images, views, torch.tensor(truth))


def _require_one_size(films: Films, others: Films) -> None:
    """Refuse what a linear layer over all image tokens cannot take, before the first step.

    Raises:
        ValueError: images of several sizes, or a view that is watched and not taught.
    """
    untaught = sorted(set(others.views) - set(films.views))
    if untaught:
        raise ValueError(f"view {untaught[0]!r} is in the watched studies and in none of the taught ones; teach it too")
    sizes = {
        f"{name} {tensor.tolist()}"  # grids: patches in time, height and width
        for image in [*films.images, *others.images]
        for name, tensor in image.tensors.items()
        if not tensor.is_floating_point()
    }
    if len(sizes) > 1:
        raise ValueError(
            f"images of several sizes ({'; '.join(sorted(sizes)[:3])}); the head wants films of one size, as "
            "`mrg-r1 prepare` renders them"
        )


def _kept(image: ImageInputs) -> ImageInputs:
    """Pixels as bfloat16 of a grey level's precision: thousands of films stay in memory at once."""
    halved = {name: t.bfloat16() if t.is_floating_point() else t for name, t in image.tensors.items()}
    return ImageInputs(halved, image.rows)


def _told_apart(films: Films, others: Films, labels: str) -> list[int]:
    """The observations that some films show and others do not, in both sets."""
    known = [
        observation
        for observation in range(NO_FINDING)
        if all(_ENOUGH <= int(part.truth[:, observation].sum()) <= len(part) - _ENOUGH for part in (films, others))
    ]
    if not known:
        raise ValueError(
            f"no observation of labels.{labels} is there in {_ENOUGH} images and absent in {_ENOUGH} of both the "
            f"taught ({len(films)}) and the watched ones ({len(others)}); give more studies"
        )
    return known


@dataclass
class _Best:
    look: int
    weights: dict[str, Tensor]
    mean: float


class _Sight:
    """The tower and a linear layer for each view."""

    def __init__(self, policy: Policy, films: Films, known: list[int], *, seed: int, pooled: bool) -> None:
        self.policy, self.known, self.pooled = policy, known, pooled
        self.modules = policy.family.vision_modules(policy.base)
        for module in self.modules:
            module.requires_grad_(True)
        with torch.no_grad():
            widths = {view: self._features(films.images[films.views.index(view)]).shape[1] for view in set(films.views)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {view: nn.Linear(width, len(known)) for view, width in sorted(widths.items())}
        self.heads = nn.ModuleDict(heads)

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in (*self.modules, self.heads) for p in module.parameters()]

    def _features(self, images: ImageInputs) -> Tensor:
        """[I, H] if pooled, else [I, image tokens * H]."""
        single = ImageInputs(
            {n: t.float() if t.is_floating_point() else t for n, t in images.tensors.items()}, images.rows
        )
        tokens = torch.stack(image_features(self.policy, single))
        return tokens.mean(1) if self.pooled else tokens.flatten(1)

    def logits(self, films: Films, chosen: Sequence[int]) -> Tensor:
        """[len(chosen), known findings]."""
        features = self._features(ImageInputs.join([films.images[i] for i in chosen]))
        views = [films.views[i] for i in chosen]
        answers = features.new_zeros(len(chosen), len(self.known))
        for view in sorted(set(views)):
            rows = [row for row, other in enumerate(views) if other == view]
            answers = answers.index_copy(0, torch.tensor(rows), self.heads[view](features[rows]))
        return answers

    def weights(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}": tensor.detach().clone()
            for number, module in enumerate(self.modules)
            for name, tensor in module.state_dict().items()
        }

    def restore(self, best: _Best) -> None:
        for number, module in enumerate(self.modules):
            prefix = f"{number}."
            module.load_state_dict(
                {name.removeprefix(prefix): t for name, t in best.weights.items() if name.startswith(prefix)}
            )
            module.requires_grad_(False)


def _fit(
    sight: _Sight, films: Films, others: Films, *, steps: int, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], _Best]:
    optimizer = torch.optim.AdamW(sight.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    curve: list[dict[str, Any]] = []
    best = _Best(0, {}, -1.0)
    order: list[int] = []
    truth = films.truth[:, sight.known]
    with progress_bar() as bar:
        task = bar.add_task("teaching the tower", total=steps)
        for step in range(steps):
            if len(order) < BATCH:
                order += rng.permutation(len(films)).tolist()
            chosen, order = order[:BATCH], order[BATCH:]
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.binary_cross_entropy_with_logits(sight.logits(films, chosen), truth[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(sight.parameters(), 1.0)
            optimizer.step()
            bar.advance(task)
            if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
                found = _look(sight, others)
                mean = float(np.mean(list(found.values())))
                curve.append({"step": step + 1, "loss": round(loss.item(), 4), "mean_auc": mean, "auc": found})
                bar.update(task, description=f"teaching the tower: mean AUC {mean:.3f}")
                if mean > best.mean:
                    best = _Best(len(curve) - 1, sight.weights(), mean)
                if min(found.values()) > SEEN or len(curve) - 1 - best.look >= PATIENCE:
                    break
    return curve, best


def _look(sight: _Sight, others: Films) -> dict[str, float]:
    """The AUC of each finding on the watched images."""
    with torch.no_grad():
        parts = [
            sight.logits(others, range(start, min(start + BATCH, len(others))))
            for start in range(0, len(others), BATCH)
        ]
    scores: NDArray[np.float32] = torch.cat(parts).numpy()
    found = {}
    for column, observation in enumerate(sight.known):
        area = auc(scores[:, column], others.truth[:, observation].numpy() > 0)
        assert area is not None  # both kinds are there: `_told_apart`
        found[OBSERVATIONS[observation]] = area
    return found
