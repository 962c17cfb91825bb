"""`prepare phantom`: a manifest of rendered studies, with the drawn truth and the said labels kept apart (spec section
6).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mrg_r1.console import progress
from mrg_r1.data.prepare.rendering import Rendering, claim_folder, render_files
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values, write_labels_csv
from mrg_r1.labels.reports import write_reports_csv
from mrg_r1.phantom.contact_sheet import contact_sheet, full_contact_sheet
from mrg_r1.phantom.habits import USUAL, Habits
from mrg_r1.phantom.recombined import Sentences, recombine
from mrg_r1.phantom.sampler import PRESETS, require_writable, sample_balanced, sample_study
from mrg_r1.phantom.study import PhantomStudy
from mrg_r1.types import Study, StudyImage

LABELER_TEXTS = 10_000  # reports to train a labeler on: texts are cheap, and wording this varied wants many
HELD_OUT_TEXTS = 400  # reports in wordings that no split uses: how well a labeler reads what it was not taught


def write_phantoms(
    output: Path,
    *,
    preset: str,
    seed: int,
    side: int,
    splits: Mapping[str, int],
    workers: int,
    prevalence: Mapping[int, float] | None = None,
    faint: float = 0.0,
    habits: Habits = USUAL,
    sentences: Sentences | None = None,
    without_reports: Collection[str] = (),
) -> Path:
    """Write a phantom dataset; an interrupted one is taken up where it stopped.

    Studies are numbered through the splits in their order, so that no two splits share one. The folder receives
    `images/SPLIT/ID.png` (in `full` most often `ID-lateral.png` too), `manifest.jsonl`, `contact_sheet.png`,
    `reports.csv` and `labels.csv` (`LABELER_TEXTS` texts of no split and what they say, for `labeler train`; every
    other one by `sample_balanced`), `heldout_reports.csv` and `heldout_labels.csv` (`HELD_OUT_TEXTS` texts in the
    held-out wording), and `prepare.json`, the settings.

    Args:
        output: folder to write.
        preset: a name of `mrg_r1.phantom.sampler.PRESETS`.
        seed: the same seed and settings give the same bytes.
        side: pixels of the square images.
        splits: name -> studies, at least one each.
        workers: rendering processes.
        prevalence: of "five": observation -> share of studies that have it, where it is not to be 35 %.
        faint: of "five": share of the findings that are there which are drawn faintly, some of them hardly.
        habits: of "five": how the radiologists write. The texts for a labeler are written as usual, with every frame.
        sentences: of "balanced": the studies' reports are put together from these; a finding without a sentence is
            passed over. The texts for a labeler stay the grammar's.
        without_reports: splits whose studies get what their reports say as `labels.said`, and no report.

    Returns:
        The manifest's path. It is written last: where it stands with all its images, nothing is done again.

    Raises:
        ValueError: an unknown preset, a bad split, one to go without reports that is none, or a folder made with other
            settings.
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
    require_writable(preset, faint, habits)
    if sentences is not None and preset != "balanced":
        raise ValueError(
            f"sentences with preset {preset!r}; reports are put together from real ones for preset balanced"
        )
    unknown = sorted(set(without_reports) - set(splits))
    if unknown:
        raise ValueError(f"without reports: no split {unknown[0]!r}; the splits are {', '.join(splits)}")
    split_of = _numbered(preset, splits)
    images = 2 * len(split_of) if preset == "full" else len(split_of)
    settings = {
        "dataset": "phantom",
        "preset": preset,
        "seed": seed,
        "side": side,
        "splits": [list(split) for split in splits.items()],
    }
    settings["prevalence"] = [
        [OBSERVATIONS[observation], share] for observation, share in sorted((prevalence or {}).items())
    ]
    if faint:
        settings["faint"] = faint
    if habits != USUAL:
        settings["habits"] = asdict(habits)
    if sentences is not None:
        settings["sentences"] = hashlib.sha256(repr(sentences).encode()).hexdigest()[:16]
    if without_reports:
        settings["without_reports"] = sorted(without_reports)
    claim_folder(output, settings, images=images, seed=seed, side=side)

    manifest = output / "manifest.jsonl"
    if manifest.is_file() and all(image.path.is_file() for study in read_manifest(manifest) for image in study.images):
        return manifest

    phantoms = [
        sample_study(preset, seed, index, prevalence=prevalence, faint=faint, habits=habits)
        for index in progress(split_of, "sampling")
    ]
    if sentences is not None:
        phantoms = [_in_real_words(phantom, sentences, seed) for phantom in phantoms]
    paths = {phantom.index: _paths(output / "images" / split_of[phantom.index], phantom) for phantom in phantoms}
    renderings = [
        Rendering(path, phantom.shown, phantom.index, view, phantom.patient)
        if preset == "full"
        else Rendering(path, phantom.drawn, phantom.index, strengths=phantom.strengths)
        for phantom in phantoms
        for path, view in zip(paths[phantom.index], phantom.views, strict=True)
    ]
    render_files(renderings, seed=seed, side=side, workers=workers)

    start = max(split_of) + 1
    start += start % 2 if preset == "full" else 0
    held_out = (sample_study(preset, seed, index, wording="heldout") for index in range(start, start + HELD_OUT_TEXTS))
    start += HELD_OUT_TEXTS
    taught = (
        (sample_balanced if index % 2 else sample_study)(preset, seed, index)
        for index in range(start, start + LABELER_TEXTS)
    )
    _write_texts(output, "", taught)
    _write_texts(output, "heldout_", held_out)
    (contact_sheet if preset == "five" else full_contact_sheet)(output / "contact_sheet.png", seed=seed)
    studies = (_study(phantom, split_of[phantom.index], paths[phantom.index]) for phantom in phantoms)
    write_manifest(
        manifest,
        [replace(study, report=None, findings=None) if study.split in without_reports else study for study in studies],
    )
    return manifest


def _in_real_words(phantom: PhantomStudy, sentences: Sentences, seed: int) -> PhantomStudy:
    report, said = recombine(sentences, phantom.drawn, seed, phantom.index)
    return replace(phantom, report=report, said=said)


def _numbered(preset: str, splits: Mapping[str, int]) -> dict[int, str]:
    """Study number -> its split. In `full` every split begins at an even number, so that a patient's two studies share
    theirs.
    """
    split_of: dict[int, str] = {}
    start = 0
    for name, count in splits.items():
        split_of.update(dict.fromkeys(range(start, start + count), name))
        start += count + (count % 2 if preset == "full" else 0)
    return split_of


def _study_id(index: int) -> str:
    return f"phantom-{index:06d}"


def _paths(folder: Path, phantom: PhantomStudy) -> list[Path]:
    """Where the views of a study go, the frontal one first."""
    return [
        folder / f"{_study_id(phantom.index)}{'' if view == 'frontal' else f'-{view}'}.png" for view in phantom.views
    ]


def _study(phantom: PhantomStudy, split: str, paths: Sequence[Path]) -> Study:
    return Study(
        id=_study_id(phantom.index),
        patient_id=phantom.patient_id,
        images=tuple(StudyImage(path.absolute(), view) for path, view in zip(paths, phantom.views, strict=True)),
        report=phantom.report,
        findings=phantom.report,
        indication=phantom.indication,
        comparison=phantom.comparison,
        split=split,
        said=tuple(phantom.said),
        drawn=tuple(phantom.drawn),
        rendered=True,
        prior=None if phantom.prior is None else _study_id(phantom.prior),
    )


def _write_texts(output: Path, prefix: str, phantoms: Iterable[PhantomStudy]) -> None:
    by_id = {_study_id(phantom.index): phantom for phantom in phantoms}
    write_reports_csv(
        output / f"{prefix}reports.csv", {study_id: phantom.report for study_id, phantom in by_id.items()}
    )
    labels: dict[str, Sequence[int]] = {
        study_id: classes_of_values(phantom.said) for study_id, phantom in by_id.items()
    }
    write_labels_csv(output / f"{prefix}labels.csv", labels)
