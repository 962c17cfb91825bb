"""`prepare iu-xray`: the R2Gen annotation.json of IU X-Ray becomes a manifest (arXiv 2010.16056 for the split).

The reports are taken verbatim. Where the radiographs are not at hand they can be rendered from CheXbert's labels of the
reports; such studies are marked `rendered`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mrg_r1.data.images import ImageError, check_image
from mrg_r1.data.progress import progress
from mrg_r1.data.rendering import Rendering, claim_folder, render_files
from mrg_r1.data.study import SHOWN_PROBLEMS, ManifestError, write_manifest
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, POSITIVE, UNCERTAIN, read_labels_csv, values_of_classes
from mrg_r1.labels.training import write_reports_csv
from mrg_r1.types import Study, StudyImage


@dataclass(frozen=True)
class _Entry:
    """One study of annotation.json."""

    id: str
    split: str
    report: str
    image_paths: tuple[str, ...]


def prepare_iu_xray(
    annotation: Path,
    images: Path | None,
    output: Path,
    *,
    render_missing: Sequence[Path] = (),
    side: int = 224,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """Write `manifest.jsonl`, `refused.jsonl` (id, split, reason), `reports.csv` and `reports_SPLIT.csv` into a folder.

    The report CSVs hold every report that was read, also of studies that are refused, so that they can be labelled.
    A study whose images are all there keeps them; one of whose images some are missing, or one is damaged, is refused; one
    without any is rendered where a label CSV has it, otherwise refused.

    Args:
        annotation: R2Gen's annotation.json: split -> list of `{id, report, image_path: [...], split}`.
        images: the folder that `image_path` is relative to; None where there are no radiographs.
        output: folder to write; rendered images go to `images/ID.png` in it.
        render_missing: label CSVs (`id` and the 14 observations), merged; empty renders nothing. The labels become
            `labels.said`; `labels.drawn` is 1 for positive, the toss of a seeded coin for uncertain, 0 otherwise.
        side: pixels of rendered images.
        seed: of anatomy, noise and coins; each study's own depend on the seed and its id alone.

    Returns:
        split -> `{read, kept, rendered, refused}` counts, kept including rendered.

    Raises:
        ManifestError: annotation.json is not R2Gen's: broken JSON, missing keys, wrong types, an id that stands twice.
        ValueError: label CSVs that disagree, a folder made with other settings, or not one study that can be kept.
        OSError: a file cannot be read or written.
    """
    entries = _read_annotation(annotation)
    if images is not None and not images.is_dir():
        raise NotADirectoryError(f"{images}: no such folder of images; leave --images out where there are none")
    labels = _merge_labels(render_missing)
    claim_folder(
        output,
        {
            "dataset": "iu-xray",
            "seed": seed if labels else None,
            "side": side if labels else None,
            "labels": _fingerprint(labels) if labels else None,
        },
        images=sum(entry.id in labels for entry in entries),
        seed=seed,
        side=side,
    )
    read = [entry for entry in entries if entry.report.strip()]
    write_reports_csv(output / "reports.csv", {entry.id: entry.report for entry in read})
    splits = list(dict.fromkeys(entry.split for entry in entries))
    for split in splits:
        write_reports_csv(output / f"reports_{split}.csv", {entry.id: entry.report for entry in read if entry.split == split})

    refused = {entry.id: "the report is empty" for entry in entries if not entry.report.strip()}
    real: dict[str, list[Path]] = {}
    renderings: dict[str, Rendering] = {}
    for entry in read:
        paths = [images / path for path in entry.image_paths] if images is not None else []
        missing = [path for path in paths if not path.is_file()]
        if paths and not missing:
            real[entry.id] = paths
        elif paths and len(missing) < len(paths):
            there = f"{len(paths) - len(missing)} of the study's {len(paths)} images are there"
            refused[entry.id] = f"{missing[0]}: no such file, though {there}; fetch it"
        elif entry.id in labels:
            drawn = _drawn(labels[entry.id], seed, entry.id)
            renderings[entry.id] = Rendering(output / "images" / f"{entry.id}.png", drawn, zlib.crc32(entry.id.encode()))
        else:
            refused[entry.id] = _no_image(missing, bool(render_missing))
    refused |= _damaged_images(real)
    render_files(list(renderings.values()), seed=seed, side=side, workers=os.cpu_count() or 1)

    kept = [_study(entry, real.get(entry.id), renderings.get(entry.id), labels) for entry in read if entry.id not in refused]
    with open(output / "refused.jsonl", "w", encoding="utf-8") as file:
        for entry in entries:
            if entry.id in refused:
                file.write(json.dumps({"id": entry.id, "split": entry.split, "reason": refused[entry.id]}, ensure_ascii=False) + "\n")
    if not kept:
        first = entries[0].id
        raise ValueError(
            f"{annotation}: all {len(entries):,} studies were refused, the first, {first!r}, because: {refused[first]}. "
            f"Every reason stands in {output / 'refused.jsonl'}; the reports stand in {output / 'reports.csv'}"
        )
    write_manifest(output / "manifest.jsonl", kept)
    return {
        split: {
            "read": sum(entry.split == split for entry in entries),
            "kept": sum(study.split == split for study in kept),
            "rendered": sum(study.split == split and study.rendered for study in kept),
            "refused": sum(entry.split == split and entry.id in refused for entry in entries),
        }
        for split in splits
    }


def _study(entry: _Entry, real: list[Path] | None, rendering: Rendering | None, labels: dict[str, list[int]]) -> Study:
    images: tuple[StudyImage, ...]
    if rendering is not None:
        images = (StudyImage(rendering.path.absolute(), "frontal"),)
    else:  # the annotation does not say which image is frontal
        images = tuple(StudyImage(path.absolute()) for path in real or ())
    return Study(
        id=entry.id,
        patient_id=entry.id.split("_")[0],  # CXR2384_IM-0942: report 2384 of the collection, one a patient
        images=images,
        report=entry.report,
        findings=entry.report,  # R2Gen's text is the XML's FINDINGS
        split=entry.split,
        said=tuple(values_of_classes(labels[entry.id])) if entry.id in labels else None,
        drawn=rendering.drawn if rendering is not None else None,
        rendered=rendering is not None,
    )


def _drawn(classes: Sequence[int], seed: int, study_id: str) -> tuple[int | None, ...]:
    coins = np.random.default_rng([seed, zlib.crc32(study_id.encode())]).integers(0, 2, size=len(OBSERVATIONS))
    drawn: list[int | None] = [
        int(label == POSITIVE or (label == UNCERTAIN and coin == 1)) for label, coin in zip(classes, coins, strict=True)
    ]
    drawn[NO_FINDING] = 1 if classes[NO_FINDING] == POSITIVE else None
    return tuple(drawn)


def _no_image(missing: Sequence[Path], labels_given: bool) -> str:
    where = f"{missing[0]}: no such file" if missing else "no images (no --images folder)"
    if labels_given:
        return f"{where}, and no label CSV of --render-missing has this id; label its report with `mrg-r1 label` and give that CSV too"
    return f"{where}; give the folder with --images, or render it from labels with --render-missing LABELS.csv"


def _damaged_images(real: dict[str, list[Path]]) -> dict[str, str]:
    """Study id -> what is wrong with its first bad image."""
    images = [(study_id, path) for study_id, paths in real.items() for path in paths]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        found = progress(pool.map(lambda image: _image_problem(*image), images), "checking images", total=len(images))
        problems = [(study_id, problem) for (study_id, _), problem in zip(images, found, strict=True) if problem is not None]
    return dict(reversed(problems))


def _image_problem(study_id: str, path: Path) -> str | None:
    try:
        check_image(path, study_id)
    except ImageError as error:
        return str(error)
    return None


def _merge_labels(paths: Sequence[Path]) -> dict[str, list[int]]:
    merged: dict[str, list[int]] = {}
    for path in paths:
        for study_id, classes in read_labels_csv(path).items():
            if merged.setdefault(study_id, classes) != classes:
                raise ValueError(f"{path}, id {study_id!r}: another label CSV has other labels for it; keep one of the two")
    return merged


def _fingerprint(labels: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(sorted(labels.items())).encode()).hexdigest()[:16]


def _read_annotation(path: Path) -> list[_Entry]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ManifestError([f"{path}: broken JSON ({error}); fetch R2Gen's annotation.json again"]) from error
    if not isinstance(content, dict) or not content or not all(isinstance(studies, list) for studies in content.values()):
        raise ManifestError([f"{path}: not R2Gen's layout; expected an object of splits, each a list of studies"])
    problems: list[str] = []
    entries: dict[str, _Entry] = {}
    for split, studies in content.items():
        for position, record in enumerate(studies):
            if len(problems) > SHOWN_PROBLEMS:
                raise ManifestError(problems)
            where = f"{path}, {split}[{position}]"
            problem = _record_problem(record, split)
            if problem is None and record["id"] in entries:
                problem = f"id {record['id']!r} stands in {entries[record['id']].split!r} already; give every study its own id"
            if problem is not None:
                problems.append(f"{where}: {problem}")
                continue
            entries[record["id"]] = _Entry(record["id"], split, record["report"], tuple(record["image_path"]))
    if problems:
        raise ManifestError(problems)
    if not entries:
        raise ManifestError([f"{path}: no studies in it; fetch R2Gen's annotation.json again"])
    return list(entries.values())


def _record_problem(record: Any, split: str) -> str | None:
    if not isinstance(record, dict):
        return f"{record!r} is not a study; expected an object with id, report and image_path"
    study_id = record.get("id")
    # the id becomes a file's name
    if not isinstance(study_id, str) or not re.fullmatch(r"\w[\w.-]*", study_id):
        return f"field `id`: {study_id!r}; an id is letters, digits, _, - and dots"
    where = f"study {study_id!r}, field"
    if not isinstance(record.get("report"), str):
        return f"{where} `report`: {record.get('report')!r}; expected a string"
    paths = record.get("image_path")
    if not isinstance(paths, list) or not paths or not all(isinstance(item, str) and item for item in paths):
        return f"{where} `image_path`: {paths!r}; expected a list of at least one file"
    if record.get("split", split) != split:
        return f"{where} `split`: {record['split']!r}, but the study stands in the list of {split!r}; move it or mend the field"
    return None
