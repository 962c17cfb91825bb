"""Which studies of IU X-Ray are learned from: R2Gen's published split, or a seeded one of 8:1:1 by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mrg_r1.data.prepare.iu_xray.study import IuCollection, IuRefusal, IuStudy, image_key, study_number
from mrg_r1.data.study import ManifestError


def seeded_split(collection: IuCollection, seed: int) -> IuCollection:
    """Eight of ten patients to train, one to val, one to test (numbers rounded; what is left over is test's).

    Patients are ranked by a hash of seed and patient, all that the layout has: neither the order of files nor which
    texts and images are at hand moves a study from one split to another.
    """
    patients = {study.patient_id for study in collection.studies}
    ranked = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed} {patient}".encode()).digest())
    train, val = round(0.8 * len(ranked)), round(0.9 * len(ranked))
    split_of = {
        patient: "train" if rank < train else "val" if rank < val else "test" for rank, patient in enumerate(ranked)
    }
    return replace(
        collection, studies=tuple(replace(study, split=split_of[study.patient_id]) for study in collection.studies)
    )


def published_split(collection: IuCollection, split_of: Mapping[str, str], path: Path) -> IuCollection:
    """The split of the ids in a file. A study without an id there is refused, and so is an id without a study.

    Args:
        collection: any layout. R2Gen's ids (CXR2384_IM-0942) name the studies of the others by number, and one series
            of images that the study must have.
        split_of: id -> split, from `iu_r2gen.read_split_ids`.
        path: where they were read, for messages.

    Raises:
        ManifestError: two ids of the file are one study.
    """
    id_of: dict[str, str] = {}  # what a study of the collection is found by -> the file's id
    problems = []
    for study_id in split_of:
        for name in {study_id, study_number(study_id) or study_id}:
            if id_of.setdefault(name, study_id) != study_id and collection.layout != "r2gen":
                problems.append(
                    f"{path}: {id_of[name]!r} and {study_id!r} are one study, number {name}; keep one of them"
                )
    if problems:
        raise ManifestError(problems)

    studies: list[IuStudy] = []
    refusals: list[IuRefusal] = []
    met: set[str] = set()
    for study in collection.studies:
        listed = _listed(study.id, id_of, collection)
        if listed is None:
            reason = f"not one of the {len(split_of):,} studies of {path}; with --split seeded every study has a split"
            refusals.append(IuRefusal(study.id, study.where, reason))
            continue
        met.add(listed)
        if problem := _other_images(study, listed):
            refusals.append(
                IuRefusal(study.id, study.where, f"{problem}; {path} is of another edition", split_of[listed])
            )
        else:
            studies.append(replace(study, split=split_of[listed]))
    for refusal in collection.refusals:
        listed = _listed(refusal.id, id_of, collection)
        if listed is None:
            refusals.append(refusal)
        else:
            met.add(listed)
            refusals.append(replace(refusal, split=split_of[listed]))
    for study_id in split_of:
        if study_id not in met:
            reason = f"{path} has it, but there is no such study among {collection.title}; fetch the whole collection"
            refusals.append(IuRefusal(study_id, str(path), reason, split_of[study_id]))
    return replace(collection, studies=tuple(studies), refusals=tuple(refusals))


def _listed(study_id: str, id_of: Mapping[str, str], collection: IuCollection) -> str | None:
    """The file's id for a study; R2Gen's own ids are compared letter by letter."""
    if study_id in id_of:
        return id_of[study_id]
    number = study_number(study_id) if collection.layout != "r2gen" else None
    return id_of.get(number) if number is not None else None


def _other_images(study: IuStudy, listed: str) -> str | None:
    series = image_key(listed)
    if "IM-" not in series or not study.images or listed == study.id:
        return None
    if any(f"{image_key(image.name)}-".startswith(f"{series}-") for image in study.images):
        return None
    return f"{listed!r} names the images {series}, the study has {[image.name for image in study.images]}"
