"""What RUN's files say of the weights that it left, for the card: no report's text, and of a path its last part."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrg_r1.data.study import ManifestError, read_manifest
from mrg_r1.files import sha256_of
from mrg_r1.metrics.identity import ids_hash
from mrg_r1.tracking.page.reading import read_json, read_lines
from mrg_r1.tracking.sharing import without_paths
from mrg_r1.types import Study

_HUB = "models--"  # how the hub's cache calls a folder: models--OWNER--NAME/snapshots/REVISION


@dataclass(frozen=True)
class Base:
    """The checkpoint that was trained from.

    Attributes:
        name: its id on the hub where it lies in the hub's cache, or None: only who has it knows where it is from.
        folder: the last part of its path.
    """

    name: str | None
    revision: str | None
    folder: str
    model_type: str
    model_class: str


@dataclass(frozen=True)
class SplitFacts:
    """Studies of one split of the manifest: all of them, those with labels alone, those drawn by a program."""

    studies: int
    labels_only: int
    rendered: int


@dataclass(frozen=True)
class Data:
    """The manifest as it is now.

    Attributes:
        splits: by name; None where the file cannot be read as a manifest any more.
        unchanged: whether the test split's ids are those that were evaluated; None where that cannot be told.
    """

    sha256: str
    size: int
    dataset: str | None
    splits: dict[str, SplitFacts] | None
    unchanged: bool | None


@dataclass(frozen=True)
class CardFacts:
    """Everything on the card that does not depend on how the weights are written.

    Attributes:
        recipe: as plain values, paths cut.
        instruction: the prompt's words, also where the recipe leaves them to the mode.
        learned_by: `GRPO` or `SFT`; None where the run has no step on record.
        evaluations: name -> (before, after) of RUN/evaluation; the run's own test split first.
        thresholds: content of RUN/thresholds.json, where `reward.threshold: auto` chose.
    """

    recipe: dict[str, Any]
    instruction: str
    learned_by: str | None
    base: Base
    data: Data | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    evaluations: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]
    thresholds: dict[str, Any] | None


def read_facts(run: Path, recipe: Mapping[str, Any], *, instruction: str, policy: Path) -> CardFacts:
    """Read a run's files; those that are not there yet are left out.

    Args:
        run: its folder.
        recipe: of RUN/config.yaml, as plain values.
        policy: the checkpoint, where it lies now.

    Raises:
        ValueError: a file of the run that is damaged; names it.
    """
    evaluations = _evaluations(run / "evaluation")
    shown = without_paths(recipe)
    return CardFacts(
        recipe=shown,
        instruction=instruction,
        learned_by=_learned_by(run),
        base=_base(policy),
        data=_data(Path(recipe["data"]["manifest"]), recipe, evaluations.get("test", (None, None))[1]),
        summary=read_json(run / "summary.json") or {},
        environment=read_json(run / "environment.json") or {},
        evaluations=evaluations,
        thresholds=read_json(run / "thresholds.json"),
    )


def _learned_by(run: Path) -> str | None:
    for _, row in read_lines(run / "metrics.jsonl", ["step"]):
        return "SFT" if "sft/target_tokens" in row else "GRPO"
    return None


def _base(policy: Path) -> Base:
    config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    parts = policy.resolve().parts
    name = revision = None
    for number, part in enumerate(parts[:-2]):
        owner, _, title = part.removeprefix(_HUB).partition("--")
        if (
            part.startswith(_HUB)
            and re.fullmatch(r"[\w.-]+/[\w.-]+", f"{owner}/{title}")
            and parts[number + 1] == "snapshots"
        ):
            name, revision = f"{owner}/{title}", parts[number + 2]
    model_class = str((config.get("architectures") or [""])[0])
    if not model_class.isidentifier():  # it becomes a word of a program
        model_class = "AutoModelForImageTextToText"
    return Base(name, revision, policy.resolve().name, str(config["model_type"]), model_class)


def _data(manifest: Path, recipe: Mapping[str, Any], evaluated: Mapping[str, Any] | None) -> Data | None:
    """None where the manifest does not lie there now."""
    if not manifest.is_file():
        return None
    settings = read_json(manifest.parent / "prepare.json") or {}
    dataset = settings.get("dataset")
    sha256, size = sha256_of(manifest), manifest.stat().st_size
    try:
        studies = read_manifest(manifest, references=False)
    except ManifestError:
        return Data(sha256, size, dataset, None, None)
    test = [study.id for study in studies if study.split == recipe["data"]["test_split"]]
    test = test[: recipe["evaluation"]["max_test_studies"]]
    unchanged = None if evaluated is None else ids_hash(test) == evaluated["ids_sha256"]
    return Data(sha256, size, dataset, _splits(studies), unchanged)


def _splits(studies: list[Study]) -> dict[str, SplitFacts]:
    counted = Counter(study.split for study in studies)
    bare = Counter(study.split for study in studies if study.report is None)
    drawn = Counter(study.split for study in studies if study.rendered)
    return {split: SplitFacts(count, bare[split], drawn[split]) for split, count in counted.items()}


def _evaluations(folder: Path) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    names = sorted(path.stem for path in folder.glob("*.json") if not path.stem.endswith("_before"))
    found = {}
    for name in sorted(names, key=lambda name: name != "test"):
        after = read_json(folder / f"{name}.json") or {}
        missing = [key for key in ("n", "definitions", "baselines", "ids_sha256") if key not in after]
        if missing:
            raise ValueError(f"{folder / name}.json: no field `{missing[0]}`; remove it and evaluate again")
        found[name] = (read_json(folder / f"{name}_before.json"), after)
    return found
