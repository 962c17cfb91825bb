"""What the three layouts of IU X-Ray have in common: one study as it was read, and how its ids and image names
correspond.

The collection numbers its reports. Number 2384 is `2384.xml` with uId `CXR2384` and images `CXR2384_IM-0942-1001` at
Open-i, uid `2384` with files `2384_IM-0942-1001.dcm.png` at Kaggle, and `CXR2384_IM-0942` with `CXR2384_IM-0942/0.png`
at R2Gen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mrg_r1.data.prepare.headings import Headings

# Of a file in a layout of this collection, which has one report a patient, so that an id is a patient's too.
OTHER_COLLECTION = (
    "not of IU X-Ray (of MIMIC-CXR?): a patient would stand in several splits; give MIMIC-CXR-JPG itself to "
    "`mrg-r1 prepare mimic-cxr`, or a table of your own to `mrg-r1 prepare manifest`"
)
_IMAGE_SUFFIX = re.compile(r"(\.(dcm|dicom|png|jpe?g|tiff?|bmp|webp|gif|jp2))+$", re.IGNORECASE)
# One study carries its number twice at Open-i, CXR1_1_IM-0001-3001, and once at Kaggle.
_IMAGE_NAME = re.compile(r"(?:CXR)?(\d+)_(?:\1_)?(IM-.+)", re.IGNORECASE)
_STUDY_ID = re.compile(r"(?:CXR)?0*(\d+)(?:_.*)?", re.IGNORECASE)


@dataclass(frozen=True)
class IuImage:
    """One radiograph as its layout names it."""

    name: str
    view: str | None = None  # "frontal", "lateral" or None where the layout does not say


@dataclass(frozen=True)
class IuStudy:
    """One study as its layout has it; texts verbatim, None where there is none."""

    id: str
    where: str  # the file, and the member or line in it
    images: tuple[IuImage, ...]
    findings: str | None = None
    impression: str | None = None
    indication: str | None = None
    comparison: str | None = None
    split: str | None = None  # None until a split is chosen

    @property
    def patient_id(self) -> str:
        """CXR2384 of CXR2384_IM-0942: the collection has one report a patient."""
        return self.id.split("_")[0]


@dataclass(frozen=True)
class IuRefusal:
    """Something that stood in a layout and cannot become a study."""

    id: str
    where: str
    reason: str
    split: str | None = None


@dataclass(frozen=True)
class IuCollection:
    """All that one layout holds: every record of it is in `studies` or in `refusals`."""

    source: Path  # the file or folder
    layout: str  # "open-i", "kaggle" or "r2gen"
    title: str  # for people
    studies: tuple[IuStudy, ...]
    refusals: tuple[IuRefusal, ...]
    projections: Path | None = None  # read beside `source`
    headings: Headings = field(default_factory=Headings)  # labels of sections that are not known


def study_number(study_id: str) -> str | None:
    """The collection's number in an id of any layout, without leading zeros; None where there is none.

    >>> study_number("CXR2384_IM-0942"), study_number("2384"), study_number("mine")
    ('2384', '2384', None)
    """
    match = _STUDY_ID.fullmatch(study_id.strip())
    return match[1] if match else None


def image_key(name: str) -> str:
    """An image name of any layout in one form, without folder and endings.

    >>> image_key("CXR1_1_IM-0001-3001"), image_key("1_IM-0001-3001.dcm.png")
    ('1_IM-0001-3001', '1_IM-0001-3001')
    """
    stem = _IMAGE_SUFFIX.sub("", re.split(r"[/\\]", name)[-1])
    match = _IMAGE_NAME.fullmatch(stem)
    return f"{match[1]}_{match[2].upper()}" if match else stem


def image_of_another(image: str, number: str) -> str | None:
    """The number of the study that an image's name gives, if it is not `number`."""
    match = re.match(r"(\d+)_", image_key(image))
    return match[1] if match and match[1].lstrip("0") != number.lstrip("0") else None


def without_repeats(studies: Sequence[IuStudy]) -> tuple[list[IuStudy], list[IuRefusal]]:
    """The first study of each id, and a refusal for each that comes after it."""
    first: dict[str, IuStudy] = {}
    repeats = []
    for study in studies:
        if first.setdefault(study.id, study) is not study:
            reason = (
                f"id {study.id!r} stands in {first[study.id].where} already, which is kept; give every study its own id"
            )
            repeats.append(IuRefusal(study.id, study.where, reason))
    return list(first.values()), repeats


def with_views(collection: IuCollection, views: dict[str, str], projections: Path) -> IuCollection:
    """The same studies with the views that `views` (image key -> view), read from `projections`, knows; the others keep
    theirs.
    """
    studies = tuple(
        replace(
            study,
            images=tuple(replace(image, view=views.get(image_key(image.name), image.view)) for image in study.images),
        )
        for study in collection.studies
    )
    return replace(collection, studies=studies, projections=projections)
