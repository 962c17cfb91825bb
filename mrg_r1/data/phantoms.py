"""`prepare phantom`: a manifest of rendered studies, with the drawn truth and the said labels kept apart (spec section 6)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mrg_r1.data.rendering import Rendering, claim_folder, render_files
from mrg_r1.data.study import write_manifest
from mrg_r1.labels.observations import classes_of_values, write_labels_csv
from mrg_r1.labels.training import write_reports_csv
from mrg_r1.phantom.contact_sheet import contact_sheet
from mrg_r1.phantom.sampler import PRESETS, PhantomStudy, sample_balanced, sample_study
from mrg_r1.types import Study, StudyImage

LABELER_TEXTS = 10_000  # reports to train a labeler on: texts are cheap, and wording this varied wants many
HELD_OUT_TEXTS = 400  # reports in wordings that no split uses: how well a labeler reads what it was not taught


def write_phantoms(output: Path, *, preset: str, seed: int, side: int, splits: Mapping[str, int], workers: int) -> Path:
    """Write a phantom dataset; an interrupted one is taken up where it stopped.

    Studies are numbered through the splits in their order, so that no two splits share one. The folder receives
    `images/SPLIT/ID.png`, `manifest.jsonl`, `contact_sheet.png`, `reports.csv` and `labels.csv` (`LABELER_TEXTS`
    texts of no split and what they say, for `labeler train`; every other one by `sample_balanced`), `heldout_reports.csv` and
    `heldout_labels.csv` (`HELD_OUT_TEXTS` texts in the held-out wording), and `prepare.json`, the settings.

    Args:
        output: folder to write.
        preset: a name of `mrg_r1.phantom.sampler.PRESETS`.
        seed: the same seed and settings give the same bytes.
        side: pixels of the square images.
        splits: name -> studies, at least one each.
        workers: rendering processes.

    Returns:
        The manifest's path. It is written last: where it stands with all its images, nothing is done again.

    Raises:
        ValueError: an unknown preset, a bad split, or a folder made with other settings.
        OSError: the folder cannot be written or has no room.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}; the presets are {', '.join(PRESETS)}")
    if not splits:
        raise ValueError("no splits; give at least one, such as train=4000")
    for name, count in splits.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"split {name!r}; a split's name is letters, digits, - and _ (it becomes a folder)")
        if count < 1:
            raise ValueError(f"split {name!r}: {count} studies; a split needs at least one")
    total = sum(splits.values())
    settings = {"dataset": "phantom", "preset": preset, "seed": seed, "side": side, "splits": [list(split) for split in splits.items()]}
    claim_folder(output, settings, images=total, seed=seed, side=side)

    manifest = output / "manifest.jsonl"
    split_of = [name for name, count in splits.items() for _ in range(count)]
    paths = [output / "images" / split / f"{_study_id(index)}.png" for index, split in enumerate(split_of)]
    if manifest.is_file() and all(path.is_file() for path in paths):
        return manifest

    phantoms = [sample_study(preset, seed, index) for index in range(total)]
    renderings = [Rendering(path, tuple(phantom.drawn), phantom.index) for path, phantom in zip(paths, phantoms, strict=True)]
    render_files(renderings, seed=seed, side=side, workers=workers)

    held_out = (sample_study(preset, seed, index, wording="heldout") for index in range(total, total + HELD_OUT_TEXTS))
    start = total + HELD_OUT_TEXTS
    taught = ((sample_balanced if index % 2 else sample_study)(preset, seed, index) for index in range(start, start + LABELER_TEXTS))
    _write_texts(output, "", taught)
    _write_texts(output, "heldout_", held_out)
    contact_sheet(output / "contact_sheet.png", seed=seed)
    write_manifest(manifest, [_study(*parts) for parts in zip(phantoms, split_of, paths, strict=True)])
    return manifest


def _study_id(index: int) -> str:
    return f"phantom-{index:06d}"


def _study(phantom: PhantomStudy, split: str, path: Path) -> Study:
    return Study(
        id=_study_id(phantom.index),
        patient_id=phantom.patient_id,
        images=(StudyImage(path.absolute(), "frontal"),),
        report=phantom.report,
        findings=phantom.report,
        split=split,
        said=tuple(phantom.said),
        drawn=tuple(phantom.drawn),
        rendered=True,
    )


def _write_texts(output: Path, prefix: str, phantoms: Iterable[PhantomStudy]) -> None:
    by_id = {_study_id(phantom.index): phantom for phantom in phantoms}
    write_reports_csv(output / f"{prefix}reports.csv", {study_id: phantom.report for study_id, phantom in by_id.items()})
    labels: dict[str, Sequence[int]] = {study_id: classes_of_values(phantom.said) for study_id, phantom in by_id.items()}
    write_labels_csv(output / f"{prefix}labels.csv", labels)
