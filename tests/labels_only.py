"""Manifests in which some studies, or all, have said labels and no report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.types import Study
from tests.world import World

WEIGHTS = "reward.weights={mccs: 0.75, format: 0.25}"  # the world's own have `length`, which reads words


def labels_only(world: World, folder: Path, bare: Callable[[int, Study], bool]) -> tuple[str, dict[str, Study]]:
    """The world's manifest anew in `folder`, without the reports of the studies that `bare` says: as an override of a
    recipe, and its studies by id. What a bare study's labels say is another study's, so that nothing can be read from
    anywhere else.
    """
    folder.mkdir(exist_ok=True)
    studies = read_manifest(world.folder / "phantoms/manifest.jsonl")
    others = [*studies[1:], studies[0]]
    written = [
        replace(study, report=None, said=other.said) if bare(number, study) else study
        for number, (study, other) in enumerate(zip(studies, others, strict=True))
    ]
    write_manifest(folder / "manifest.jsonl", written)
    return f"data.manifest={folder}/manifest.jsonl", {study.id: study for study in written}


def every_other(number: int, study: Study) -> bool:
    return number % 2 == 1


def all_of_them(number: int, study: Study) -> bool:
    return True
