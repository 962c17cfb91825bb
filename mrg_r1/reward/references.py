"""The references' labels: read once by a labeler from a manifest, and kept beside it.

The file is `id` and the 14 observations, as every label file of this project; its name carries a digest of the
manifest's content and of the labeler, so that neither can change unnoticed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1.console import progress
from mrg_r1.files import atomically
from mrg_r1.labels.observations import classes_of_values, read_labels_csv, write_labels_csv
from mrg_r1.types import Study

FOLDER = ".reference_labels"
_AT_ONCE = 256  # texts
_SAVED_EVERY = 30.0  # seconds: what an interrupted reading loses at most


def reference_labels(
    studies: Sequence[Study],
    *,
    manifest: Path,
    labeler: Mapping[str, str],
    label: Callable[[Sequence[str]], NDArray[np.int64]],
    fallback: Path,
    said_first: bool = False,
) -> dict[str, list[int]]:
    """The 14 classes of each study's reference, from the file beside the manifest as far as it goes. A study without a
    report has the classes that the manifest says, whoever the labeler is.

    Args:
        studies: whose labels are needed; each with a report or said labels.
        manifest: the file that they come from.
        labeler: everything that tells one labeler from another, `name` among it.
        label: reads [N, 14] classes out of N texts.
        fallback: folder for the file where the manifest's own cannot be written to.
        said_first: a study with a report too has the classes that the manifest says, where it says any.

    Returns:
        id -> 14 classes.
    """
    path = _cache_file(manifest, labeler, fallback)
    known = read_labels_csv(path) if path.is_file() else {}
    said = {
        study.id: classes_of_values(study.said)
        for study in studies
        if study.said is not None and _as_said(study, said_first=said_first)
    }
    missing = [
        (study.id, study.report)
        for study in studies
        if study.report is not None and study.id not in known and study.id not in said
    ]
    batches = [missing[start : start + _AT_ONCE] for start in range(0, len(missing), _AT_ONCE)]
    saved = time.monotonic()
    for batch in progress(batches, "reading the references", quiet=len(batches) < 2):
        classes = label([report for _, report in batch])
        known |= {study_id: row for (study_id, _), row in zip(batch, classes.tolist(), strict=True)}
        if time.monotonic() - saved > _SAVED_EVERY:
            _save(path, known)
            saved = time.monotonic()
    if missing:
        _save(path, known)
    return {study.id: said[study.id] if study.id in said else known[study.id] for study in studies}


def label_sources(studies: Sequence[Study], labeler: Mapping[str, str], *, said_first: bool) -> dict[str, Any]:
    """Where `reference_labels` takes the labels of these studies from: `{"said": 0, "read": 512, "labeler": {"name": …,
    "fingerprint": …}}`, studies whose labels the manifest says, studies whose report a labeler has read, and that
    labeler, None where it has read none.
    """
    said = sum(_as_said(study, said_first=said_first) for study in studies)
    read = len(studies) - said
    return {"said": said, "read": read, "labeler": dict(labeler) if read else None}


def _as_said(study: Study, *, said_first: bool) -> bool:
    return study.said is not None and (said_first or study.report is None)


def kept_reference_labels(manifest: Path, labeler: Mapping[str, str], fallback: Path) -> dict[str, list[int]]:
    """id -> 14 classes, as far as `reference_labels` has kept them; nothing is read anew.

    Raises:
        ValueError: a damaged file.
    """
    path = _cache_file(manifest, labeler, fallback)
    return read_labels_csv(path) if path.is_file() else {}


def _cache_file(manifest: Path, labeler: Mapping[str, str], fallback: Path) -> Path:
    with open(manifest, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update("\n".join(f"{key}={labeler[key]}" for key in sorted(labeler)).encode())
    beside = manifest.parent / FOLDER
    writable = os.access(beside if beside.is_dir() else manifest.parent, os.W_OK)
    return (beside if writable else fallback) / f"{labeler['name']}-{digest.hexdigest()[:16]}.csv"


def _save(path: Path, labels: Mapping[str, Sequence[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        write_labels_csv(temporary, dict(labels))
