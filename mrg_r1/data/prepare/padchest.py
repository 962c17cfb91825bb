"""`prepare padchest`: the table of PadChest, findings with Spanish reports, becomes a manifest.

Nothing of it is part of the project; whoever has access brings it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from mrg_r1.data.prepare.checking import refuse_changed_sources
from mrg_r1.data.prepare.conversion import Conversion
from mrg_r1.data.prepare.labelled import (
    Draft,
    ImageChoices,
    Nameless,
    Prepared,
    Said,
    check_folders,
    seeded_split,
    settle,
    unmapped_note,
)
from mrg_r1.data.prepare.rows import Row, read_csv
from mrg_r1.labels.missing import is_missing, report_fault
from mrg_r1.labels.observations import OBSERVATIONS

# A label is of an observation where its name, or that of one above it in PadChest's published tree, is a phrase that
# the CheXpert labeler counts under the observation; masses of other places than the lung are of none.
_LABELS_OF = {
    "Enlarged Cardiomediastinum": "mediastinal enlargement, superior mediastinal enlargement",
    "Cardiomegaly": "cardiomegaly",
    "Lung Opacity": "infiltrates, interstitial pattern, ground glass pattern, reticular interstitial pattern, "
    "reticulonodular interstitial pattern, miliary opacities, alveolar pattern, increased density",
    "Lung Lesion": "nodule, multiple nodules, mass, pulmonary mass",
    "Edema": "pulmonary edema",
    "Consolidation": "consolidation",
    "Pneumonia": "pneumonia, atypical pneumonia, viral pneumonia",
    "Atelectasis": "atelectasis, total atelectasis, lobar atelectasis, segmental atelectasis, laminar atelectasis, "
    "round atelectasis, atelectasis basal",
    "Pneumothorax": "pneumothorax, hydropneumothorax",
    "Pleural Effusion": "pleural effusion, loculated pleural effusion, loculated fissural effusion, hydropneumothorax, "
    "empyema, hemothorax",
    "Pleural Other": "pleural thickening, apical pleural thickening, calcified pleural thickening",
    "Fracture": "fracture, clavicle fracture, humeral fracture, vertebral fracture, rib fracture, callus rib fracture",
    "Support Devices": "tracheostomy tube, endotracheal tube, nsg tube, chest drain tube, ventriculoperitoneal drain "
    "tube, gastrostomy tube, nephrostomy tube, catheter, central venous catheter, central venous catheter via "
    "subclavian vein, central venous catheter via jugular vein, reservoir central venous catheter, central venous "
    "catheter via umbilical vein, electrical device, dual chamber device, single chamber device, pacemaker, dai, "
    "artificial heart valve, artificial mitral heart valve, artificial aortic heart valve",
    "No Finding": "normal",
}
_MAPPED = {name for names in _LABELS_OF.values() for name in names.split(", ")}
_ALONE = ("normal", "exclude")  # labels that PadChest gives alone
# in the order in which images are preferred; others (COSTAL) are no view that has a name here
_VIEWS = {"PA": "frontal", "AP": "frontal", "AP_horizontal": "frontal", "L": "lateral"}
_COLUMNS = ("imageid", "imagedir", "studyid", "patientid", "projection", "report", "labels")
_SHARES = (("train", 0.8), ("val", 0.1), ("test", 0.1))
_ID = re.compile(r"[\w.-]+")


def prepare_padchest(
    table: Path,
    output: Path,
    *,
    images: Path | None = None,
    report: Literal["spanish", "none"] = "spanish",
    seed: int = 0,
    choices: ImageChoices | None = None,
) -> Prepared:
    """Write `manifest.jsonl`, `refused.jsonl`, `reports.csv` and `reports_SPLIT.csv`; interrupted, the same call goes
    on.

    The rows of a study's images are one study. There is no published split: patients go 8:1:1, by a hash.

    Args:
        table: PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv, or .csv.gz.
        output: folder to write.
        images: the folder that holds `0/NAME.png` (`ImageDir`, `ImageID`) or NAME.png; None means the table's.
        report: `none` leaves the texts out, so that studies have labels alone.
        seed: of the split.
        choices: None takes the defaults.

    Raises:
        ManifestError: the table as a whole: damaged, not UTF-8, without a column.
        ValueError: a folder made with other settings, a table that changed after an interrupted run, not one study
            that can be kept.
        OSError: a file cannot be read or written, a folder that is not there.
    """
    choices, images = choices or ImageChoices(), images or table.parent
    if table.is_dir():
        raise IsADirectoryError(f"{table}: a folder; give the table PADCHEST_chest_x_ray_images_labels_160K_....csv")
    check_folders(table.parent, images, choices)
    settings = {
        "dataset": "padchest",
        "table": str(table.absolute()),
        "images": str(images.absolute()),
        "report": report,
        "seed": seed,
        **asdict(choices),
    }
    refuse_changed_sources(output, [table])
    reader = _Reader(images.absolute(), seed, with_report=report == "spanish")
    for row in read_csv(table, _COLUMNS):
        reader.add(row)
    reader.close()
    with Conversion(output, settings) as conversion:
        settle(reader.drafts.values(), reader.nameless, conversion, choices)
        return Prepared(conversion.close(), conversion.found, unmapped_note(reader.unmapped, len(reader.drafts)))


def _is_id(cell: str) -> bool:
    """NaN is what programs write for none, and all of its studies would be one."""
    return bool(_ID.fullmatch(cell)) and not is_missing(cell)


class _Reader:
    """The rows of the table, gathered into studies."""

    def __init__(self, images: Path, seed: int, *, with_report: bool) -> None:
        self.drafts: dict[str, Draft] = {}
        self.nameless: list[Nameless] = []
        self.unmapped: Counter[str] = Counter()
        self._images, self._seed, self._with_report = images, seed, with_report
        self._folders: dict[str, str] = {}
        self._cells: dict[str, tuple[str, str]] = {}  # study -> its `Report` and `Labels`

    def add(self, row: Row) -> None:
        cells = {name: row.values.get(name, "").strip() for name in _COLUMNS}
        wrong = [name for name in ("StudyID", "PatientID", "ImageID") if not _is_id(cells[name.lower()])]
        if row.fault is not None or wrong:
            shown = "" if row.fault else f"column {wrong[0]}: {cells[wrong[0].lower()]!r} is no id; correct the row"
            self.nameless.append(Nameless(row.fault or shown, row.where))
            return
        study, patient, name = cells["studyid"], cells["patientid"], cells["imageid"]
        draft = self.drafts.get(study)
        if draft is None:
            draft = self.drafts[study] = self._draft(study, patient, cells, row.where)
        elif draft.patient_id != patient:
            reason = f"column PatientID: {patient!r}, and {draft.patient_id!r} in {draft.where}, of the same study"
            draft.refuse(f"{reason}; correct one of them", row.where)
        elif (changed := self._changed(study, cells)) is not None:
            draft.refuse(f"column {changed}: another than in {draft.where}, of the same study; keep one", row.where)
        image = (f"{self._folder(cells['imagedir'])}/{name}", cells["projection"])
        if image in draft.images:
            draft.refuse(f"column ImageID: {name} stands twice, first in or after {draft.where}; keep one", row.where)
        if cells["projection"].upper() != "EXCLUDE":  # no chest, or nothing that can be read
            draft.images.append(image)

    def close(self) -> None:
        """After the last row: projections become views, the better ones first."""
        places = {projection: place for place, projection in enumerate(_VIEWS)}
        for draft in self.drafts.values():
            draft.images.sort(key=lambda image: places.get(image[1] or "", len(places)))
            draft.images = [(path, _VIEWS.get(projection or "")) for path, projection in draft.images]

    def _draft(self, study: str, patient: str, cells: dict[str, str], where: str) -> Draft:
        self._cells[study] = (cells["report"], cells["labels"])
        said, fault = self._said(cells["labels"])
        report = cells["report"] if self._with_report and report_fault(cells["report"]) is None else None
        draft = Draft(study, patient, seeded_split(patient, self._seed, _SHARES), where, said, report=report)
        if fault is None and said is None and report is None:
            fault = f"column Labels: {cells['labels']!r}: no label of an observation, and no report: nothing to learn"
        if fault is not None:
            draft.refuse(fault, where)
        return draft

    def _said(self, cell: str) -> tuple[Said | None, str | None]:
        """The 14 values of a cell such as `['pleural effusion', 'unchanged']`, None where none is of an observation;
        and what is wrong with it.
        """
        try:
            listed = [] if is_missing(cell) else ast.literal_eval(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            listed = None
        if not isinstance(listed, list) or not all(isinstance(label, str) for label in listed):
            return None, f"column Labels: {cell[:60]!r}; expected a list such as ['pleural effusion', 'unchanged']"
        labels = {" ".join(label.casefold().split()) for label in listed} - {""}
        for label in _ALONE:
            if label in labels and len(labels) > 1:
                return None, f"column Labels: {label!r} beside {sorted(labels - {label})[0]!r}; keep what is right"
        if "exclude" in labels:
            return None, "column Labels: 'exclude': PadChest says that its report is not to be used"
        self.unmapped.update(labels - _MAPPED)
        if not labels & _MAPPED:
            return None, None
        return tuple(1 if labels & set(_LABELS_OF[name].split(", ")) else None for name in OBSERVATIONS), None

    def _changed(self, study: str, cells: dict[str, str]) -> str | None:
        """The column of a study's text or labels that is not as in its first row."""
        report, labels = self._cells[study]
        return "Report" if report != cells["report"] else "Labels" if labels != cells["labels"] else None

    def _folder(self, name: str) -> str:
        """Where the images of an `ImageDir` lie: in a folder of that name, or all in one."""
        if name not in self._folders:
            inside = self._images / name
            plain = bool(_ID.fullmatch(name)) and name not in (".", "..")
            self._folders[name] = str(inside if plain and inside.is_dir() else self._images)
        return self._folders[name]
