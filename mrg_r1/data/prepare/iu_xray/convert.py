"""`prepare iu-xray`: IU X-Ray, in any of the layouts that it is passed on in, becomes a manifest.

The texts are taken verbatim. Where the radiographs are not at hand they can be rendered from CheXbert's labels of the
reports; such studies are marked `rendered`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from mrg_r1.console import progress
from mrg_r1.cores import read_cores
from mrg_r1.data.prepare.checking import image_problems, refuse_changed_sources
from mrg_r1.data.prepare.conversion import Conversion, Counts
from mrg_r1.data.prepare.iu_xray.images import ImageFolder
from mrg_r1.data.prepare.iu_xray.kaggle import PROJECTIONS_COLUMNS, PROJECTIONS_NAME, read_kaggle, read_views
from mrg_r1.data.prepare.iu_xray.open_i import read_open_i
from mrg_r1.data.prepare.iu_xray.r2gen import read_r2gen, read_split_ids
from mrg_r1.data.prepare.iu_xray.splits import published_split, seeded_split
from mrg_r1.data.prepare.iu_xray.study import IuCollection, IuStudy, study_number, with_views
from mrg_r1.data.prepare.rendering import Rendering, claim_folder, render_files
from mrg_r1.data.prepare.rows import csv_columns
from mrg_r1.data.study import ManifestError
from mrg_r1.labels.missing import report_fault
from mrg_r1.labels.observations import (
    NO_FINDING,
    OBSERVATIONS,
    POSITIVE,
    UNCERTAIN,
    classes_of_values,
    read_labels_csv,
    values_of_classes,
)
from mrg_r1.types import Study, StudyImage

Report = Literal["findings", "impression", "both"]
_NAMES = ("annotation.json", "indiana_reports.csv", "NLMCXR_reports.tgz")  # as the layouts are published


def read_iu_xray(source: Path, projections: Path | None = None) -> IuCollection:
    """Read one of the three layouts; which it is, is seen from the content.

    Args:
        source: NLMCXR_reports.tgz or a folder of its XMLs, indiana_reports.csv, annotation.json, or a folder that holds
            one of these.
        projections: indiana_projections.csv. None takes the one beside indiana_reports.csv; beside XMLs it gives the
            views.

    Raises:
        ManifestError: no layout, or several in one folder; a file that is bad as a whole (see `read_open_i`,
            `read_kaggle`, `read_r2gen`).
        OSError: a file cannot be read.
    """
    source = _only_layout(source) if source.is_dir() else source
    if source.is_dir() or _is_archive(source):
        collection = read_open_i(source)
        return collection if projections is None else with_views(collection, read_views(projections), projections)
    start = _first_bytes(source)
    if start.startswith((b"{", b"[")):
        if projections is not None:
            raise ManifestError(
                [
                    f"{projections}: R2Gen names its images anew, so views cannot be found for them; leave "
                    "--projections out"
                ]
            )
        return read_r2gen(source)
    if start.startswith(b"<"):
        raise ManifestError([f"{source}: one XML; give the folder that it lies in, or NLMCXR_reports.tgz"])
    if start.startswith(b"PK"):
        raise ManifestError([f"{source}: a zip archive; unpack it and give the folder or the file in it"])
    if set(PROJECTIONS_COLUMNS) <= set(csv_columns(source)):
        raise ManifestError(
            [f"{source}: the images and no reports; give indiana_reports.csv, and this file with --projections"]
        )
    beside = source.with_name(PROJECTIONS_NAME)
    if projections is None and not beside.is_file():
        raise ManifestError(
            [f"{beside}: no such file; it names the images of {source.name}: give it with --projections"]
        )
    return read_kaggle(source, projections or beside)


def convert_iu_xray(
    collection: IuCollection,
    images: Path | None,
    output: Path,
    *,
    report: Report = "findings",
    split: str | None = None,
    render_missing: Sequence[Path] = (),
    side: int = 224,
    films: int = 1,
    seed: int = 0,
) -> Counts:
    """Write `manifest.jsonl`, `refused.jsonl` (id, split, reason, where), `reports.csv` and `reports_SPLIT.csv` into a
    folder.

    The report CSVs hold every report that was read, also of studies that are refused, so that they can be labelled.
    A study whose images are all there keeps them; one of whose images some are missing, or one is damaged, is refused;
    one without any is rendered where a label CSV has it, otherwise refused. Interrupted, the same call goes on.

    Args:
        collection: from `read_iu_xray`.
        images: the folder of radiographs, as `ImageFolder` looks for them; None where there are none.
        output: folder to write; rendered images go to `images/ID.png` in it.
        report: the text to learn: one section, or findings and impression with a line break between (one alone where
            there is only one). A study without it is refused.
        split: "seeded": 8:1:1 by patient; a file of R2Gen's ids: their split, and studies outside of it are refused;
            None: the layout's own, and seeded where it has none.
        render_missing: label CSVs (`id` and the 14 observations), merged; empty renders nothing. The labels become
            `labels.said`; `labels.drawn` is 1 for positive, the toss of a seeded coin for uncertain, 0 otherwise. An id
            of R2Gen's stands for the study with its number, as long as findings are asked for: its labels are theirs.
        side: pixels of rendered images.
        films: how many radiographs to render of each report of split `train`, every one of another chest. From the
            second on, a film is a study of its own, ID-film2 and so on, of the same patient and report; the report
            CSVs have its text once. Other splits get one.
        seed: of the seeded split, and of anatomy, noise and coins; each study's own depend on the seed and its id
            alone.

    Returns:
        split -> `{read, kept, rendered, refused}` counts, kept including rendered.

    Raises:
        ManifestError: a split file that is bad as a whole.
        ValueError: films below 1, or above 1 without labels to render from; label CSVs that disagree, a folder made
            with other settings, sections that the layout lacks, or not one study that can be kept.
        OSError: a file cannot be read or written.
    """
    folder = None if images is None else ImageFolder(images, collection.layout)
    if report != "findings" and collection.layout == "r2gen":
        raise ValueError(
            f"{collection.source}: R2Gen's file has the findings alone; for the impression give Open-i's XMLs or "
            "Kaggle's CSVs"
        )
    if films < 1 or (films > 1 and not render_missing):
        raise ValueError(
            f"films {films}: rendered radiographs a report, 1 or more; they are rendered from the labels "
            "of --render-missing LABELS.csv"
        )
    collection, split_name = _with_split(collection, split, seed)
    labels = _labels_of_studies(_merge_labels(render_missing), collection, report) if render_missing else None
    settings = {
        "dataset": "iu-xray",
        "layout": collection.layout,
        "report": report,
        "split": split_name,
        "seed": seed if labels or split_name == "seeded" else None,
        "side": side if labels else None,
        "labels": _fingerprint(labels) if labels else None,
    }
    if films > 1:
        settings["films"] = films
    claim_folder(output, settings, images=films * len(labels or ()), seed=seed, side=side)
    refuse_changed_sources(output, [collection.source, *([collection.projections] if collection.projections else [])])
    sources = {
        "source": str(collection.source.absolute()),
        "projections": str(collection.projections.absolute()) if collection.projections else None,
        "images": str(images.absolute()) if images else None,
    }
    with Conversion(output, settings, sources=sources) as conversion:
        plans: list[_Plan] = []
        for entry in collection.studies:
            first = _plan(entry, folder, labels, output, report, seed)
            further = _further_films(first, films if entry.split == "train" else 1, output, seed)
            plans += [plan for plan in (first, *further) if not conversion.done(plan.entry.id)]
        render_files(
            [plan.rendering for plan in plans if plan.rendering is not None],
            seed=seed,
            side=side,
            workers=read_cores().usable,
        )
        checked = image_problems(plans, lambda plan: plan.study if plan.rendering is None else None)
        for plan, damage in progress(checked, "checking images", total=len(plans)):
            entry = plan.entry
            if plan.study is not None and damage is None:
                conversion.keep(plan.study, entry.where, text_of=plan.film_of)
            else:
                conversion.refuse(entry.id, entry.split or "", damage or plan.reason, entry.where, plan.text)
        # last: a second record of a study must not pass for the study itself where a run is taken up again
        for refusal in collection.refusals:
            conversion.refuse(refusal.id, refusal.split or "", refusal.reason, refusal.where)
        return conversion.close()


@dataclass(frozen=True)
class _Plan:
    """What is to become of one study, if its images turn out to be whole."""

    entry: IuStudy
    text: str
    study: Study | None = None
    rendering: Rendering | None = None
    reason: str = ""  # where there is no study
    film_of: str | None = None  # the study whose report a further film shows


def _further_films(first: _Plan, films: int, output: Path, seed: int) -> Iterator[_Plan]:
    """Those after the first of a study that is rendered; none of another."""
    if first.rendering is None or first.study is None or first.study.said is None:
        return
    labels = classes_of_values(first.study.said)
    for film in range(2, films + 1):
        other = replace(first.entry, id=f"{first.entry.id}-film{film}")
        yield replace(_rendered(other, first.text, labels, output, seed), film_of=first.entry.id)


def _plan(
    entry: IuStudy,
    folder: ImageFolder | None,
    labels: Mapping[str, Sequence[int]] | None,
    output: Path,
    report: Report,
    seed: int,
) -> _Plan:
    text = _text(entry, report)
    if not text:
        sections = "findings and impression" if report == "both" else report
        return _Plan(
            entry,
            text,
            reason=f"the report is empty: no {sections} with a word in it; choose another section with --report",
        )
    found, problem = folder.find(entry) if folder is not None else ((), "")
    classes = labels.get(entry.id) if labels is not None else None
    if found:
        return _Plan(entry, text, _study(entry, text, found, classes))
    if problem or classes is None:
        return _Plan(entry, text, reason=problem or _no_image(entry, folder, labels is not None))
    return _rendered(entry, text, classes, output, seed)


def _rendered(entry: IuStudy, text: str, classes: Sequence[int], output: Path, seed: int) -> _Plan:
    drawn = _drawn(classes, seed, entry.id)
    rendering = Rendering(output / "images" / f"{entry.id}.png", drawn, zlib.crc32(entry.id.encode()))
    phantom = _study(entry, text, (StudyImage(rendering.path.absolute(), "frontal"),), classes)
    return _Plan(entry, text, replace(phantom, drawn=drawn, rendered=True), rendering)


def _study(entry: IuStudy, text: str, images: tuple[StudyImage, ...], classes: Sequence[int] | None) -> Study:
    return Study(
        id=entry.id,
        patient_id=entry.patient_id,
        images=images,
        report=text,
        split=entry.split or "",
        findings=entry.findings,
        impression=entry.impression,
        indication=entry.indication,
        comparison=entry.comparison,
        said=tuple(values_of_classes(classes)) if classes is not None else None,
    )


def _text(entry: IuStudy, report: Report) -> str:
    if report == "both":
        return "\n".join(text for text in (entry.findings, entry.impression) if text and report_fault(text) is None)
    text = entry.findings if report == "findings" else entry.impression
    return text if text and report_fault(text) is None else ""


def _drawn(classes: Sequence[int], seed: int, study_id: str) -> tuple[int | None, ...]:
    coins = np.random.default_rng([seed, zlib.crc32(study_id.encode())]).integers(0, 2, size=len(OBSERVATIONS))
    drawn: list[int | None] = [
        int(label == POSITIVE or (label == UNCERTAIN and coin == 1)) for label, coin in zip(classes, coins, strict=True)
    ]
    drawn[NO_FINDING] = 1 if classes[NO_FINDING] == POSITIVE else None
    return tuple(drawn)


def _no_image(entry: IuStudy, folder: ImageFolder | None, labels_given: bool) -> str:
    if not entry.images:
        where, remedy = "the collection has no image of it", "render it"
    elif folder is None:
        where, remedy = "no images (no --images folder)", "give the folder with --images, or render it"
    else:
        where, remedy = folder.missing(entry.images[0]), "fetch it, or render it"
    if labels_given:
        return (
            f"{where}, and no label CSV of --render-missing has this id; label its report with `mrg-r1 label` and "
            "give that CSV too"
        )
    return f"{where}; {remedy} from labels with --render-missing LABELS.csv"


def _with_split(collection: IuCollection, split: str | None, seed: int) -> tuple[IuCollection, str]:
    """The collection with a split, and what the folder's settings call it."""
    if split is None and collection.layout == "r2gen":
        return collection, "r2gen"
    if split in (None, "seeded"):
        return seeded_split(collection, seed), "seeded"
    path = Path(split or "")
    split_of = read_split_ids(path)
    return published_split(collection, split_of, path), _fingerprint(split_of)


def _merge_labels(paths: Sequence[Path]) -> dict[str, tuple[Path, list[int]]]:
    merged: dict[str, tuple[Path, list[int]]] = {}
    for path in paths:
        for study_id, classes in read_labels_csv(path).items():
            if merged.setdefault(study_id, (path, classes))[1] != classes:
                raise ValueError(
                    f"{path}, id {study_id!r}: another label CSV has other labels for it; keep one of the two"
                )
    return merged


def _labels_of_studies(
    labels: Mapping[str, tuple[Path, list[int]]], collection: IuCollection, report: Report
) -> dict[str, list[int]]:
    """Study id -> classes. R2Gen's ids find the studies of the other layouts by number."""
    found = {study.id: labels[study.id][1] for study in collection.studies if study.id in labels}
    if collection.layout == "r2gen":
        return found
    ids = {study_number(study.id): study.id for study in collection.studies}
    given = set(found)
    for label_id, (path, classes) in labels.items():
        study_id = ids.get(study_number(label_id))
        if study_id is None or study_id in given:
            continue
        if report != "findings":
            remedy = "label OUT/reports.csv with `mrg-r1 label` and give that file"
            raise ValueError(
                f"{path}, id {label_id!r}: an id of R2Gen's, whose labels are of the findings, not of {report!r}; "
                f"{remedy}"
            )
        if found.setdefault(study_id, classes) != classes:
            raise ValueError(
                f"{path}, id {label_id!r}: another id has other labels for study {study_id!r}; keep one of the two"
            )
    return found


def _fingerprint(by_id: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(sorted(by_id.items())).encode()).hexdigest()[:16]


def _only_layout(folder: Path) -> Path:
    """The one layout in a folder: a file of a published name, or the folder itself if there are XMLs in it."""
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    if any(folder.rglob("*.xml")):
        found.append(folder)
    if len(found) > 1:
        names = ", ".join(path.name if path != folder else "*.xml" for path in found)
        raise ManifestError([f"{folder}: several layouts of IU X-Ray ({names}); give the one to read"])
    if not found:
        raise ManifestError(
            [
                f"{folder}: neither XML reports nor one of {', '.join(_NAMES)} in it; give the folder or file of "
                "the reports"
            ]
        )
    return found[0]


def _is_archive(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(262)
    return start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar"


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
