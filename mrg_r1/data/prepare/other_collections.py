"""What tells studies of other collections from those that a layout or a table of one's own is taken for.

In them a patient has several studies, and nothing but a name or a path may say so: taken for studies of as many
patients, a score would see what was learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Fields that name a patient, or a study beside the id, without case and marks; not those that say what a patient is.
_PATIENT = re.compile(
    r"mrn|pid|medicalrecord.*|.*(?<!in)(?<!out)patient(?!s?(?:age|sex|gender|birth|dob|weight|size|height|bmi|position|"
    r"orientation|race|ethnic|comment|history|status|type|class|location|symptom|complaint)).*|"
    r"(?:subject(?!ive)|person(?!al|nel))(?!age|sex|gender|birth|dob|weight|size|height|bmi|race|ethnic|status|type|class).*"
)
_STUDIES = ("studyid", "dicomid", "studyinstanceuid")
# An image of MIMIC-CXR, a number of seven digits or more (MIMIC-CXR, NIH, PadChest), a hash (VinDr), a DICOM UID
_NUMBERED = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}|(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])|\d{7}|\d+(\.\d+){5}", re.I)
# The patient in a path, or in an id: a folder of MIMIC-CXR, CheXpert or BIDS (sub-012), or how such a name begins
# (patient12_1.png); and an image of NIH, whose patients are numbered to 30,805 (eight digits may be a date as well).
_PATIENT_IN_PATH = re.compile(
    r"(?:^|[/\\_-])(?:(p\d{8}|(?:patient|subject|subj)[-_ ]?\d+|sub-[0-9a-z]+)(?=[/\\_-])|"
    r"(000[0-3]\d{4})_\d{3}(?=\.|$))",
    re.IGNORECASE,
)


def patient_field(names: Iterable[str]) -> str | None:
    """A field that names a patient and is not our `patient_id`."""
    return next((name for name in names if name != "patient_id" and _PATIENT.fullmatch(_plain(name))), None)


def field_of_another(names: Iterable[str]) -> str | None:
    """A field that no layout of IU X-Ray has, which has one report a patient."""
    return next((name for name in names if _plain(name) in _STUDIES or _PATIENT.fullmatch(_plain(name))), None)


def names_another(text: str) -> bool:
    """Whether an id or a path is of a kind that IU X-Ray, whose largest number is 3999, does not have."""
    return bool(_NUMBERED.search(text) or _PATIENT_IN_PATH.search(text))


def patient_in(path: str) -> str | None:
    """The patient that a path or an id names as MIMIC-CXR, CheXpert, NIH and BIDS do. PadChest's files name none."""
    match = _PATIENT_IN_PATH.search(path)
    return match and (match[1] or match[2])


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
