"""What tells studies of other collections from those that a layout or a table of one's own is taken for.

In them a patient has several studies, and nothing but a name or a path may say so: taken for studies of as many
patients, a score would see what was learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Fields that name a patient, or a study beside the id, without case and marks.
_PATIENTS = ("subjectid", "patientid", "patient", "subject", "patientidentifier", "personid")
_STUDIES = ("studyid", "dicomid", "studyinstanceuid")
# An image of MIMIC-CXR, a number of seven digits or more (MIMIC-CXR, NIH, PadChest), a hash (VinDr), a DICOM UID
_NUMBERED = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}|(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])|\d{7}|\d+(\.\d+){5}", re.I)
_PATIENT_FOLDER = re.compile(r"(?:^|[/\\])(p\d{8}|patient\d+)(?:[/\\]|$)")


def patient_field(names: Iterable[str]) -> str | None:
    """A field that names a patient and is not our `patient_id`."""
    return next((name for name in names if name != "patient_id" and _plain(name) in _PATIENTS), None)


def field_of_another(names: Iterable[str]) -> str | None:
    """A field that no layout of IU X-Ray has, which has one report a patient."""
    return next((name for name in names if _plain(name) in (*_PATIENTS, *_STUDIES)), None)


def names_another(text: str) -> bool:
    """Whether an id or a path is of a kind that IU X-Ray, whose largest number is 3999, does not have."""
    return bool(_NUMBERED.search(text) or _PATIENT_FOLDER.search(text))


def patient_folder(path: str) -> str | None:
    """The patient that a path of MIMIC-CXR or CheXpert names."""
    match = _PATIENT_FOLDER.search(path)
    return match[1] if match else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
