"""`prepare mimic-cxr`: the tree of MIMIC-CXR-JPG 2.x and the reports of MIMIC-CXR become a manifest, some studies at a
time.

Nothing of it is part of the project; whoever has access brings it, and nothing leaves the machine.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from mrg_r1.console import progress
from mrg_r1.data.prepare.checking import CheckImages, problem_of_image, refuse_changed_sources
from mrg_r1.data.prepare.conversion import Conversion, Counts
from mrg_r1.data.prepare.headings import Headings
from mrg_r1.data.prepare.mimic_cxr.sections import Report, read_report
from mrg_r1.data.prepare.mimic_cxr.tables import AP, LATERAL, PA, SPLITS, Labels, Studies, find_table, read_studies
from mrg_r1.labels.missing import is_missing, report_fault
from mrg_r1.types import Study, StudyImage

_VIEW_NAMES = {PA: "frontal", AP: "frontal", LATERAL: "lateral"}
_SPLIT_NAMES = list(SPLITS.values())
_AT_ONCE = 256  # studies that are held while threads look at their images


@dataclass(frozen=True)
class Choices:
    """What a manifest of MIMIC-CXR is made of."""

    report: Literal["findings", "impression", "both"] = "findings"
    """The section to learn; `both` asks for findings and impression, in this order."""
    views: Literal["frontal", "all"] = "frontal"
    """`frontal`: PA, then AP, and no study without; `all`: a frontal, a lateral, then the others."""
    max_images: int = 2
    """Images a study, at most."""
    labels: Literal["none", "chexpert", "chexbert"] = "none"
    """`labels.said`: none, or what the CheXpert labeler or CheXbert read in the report, from the table of that name."""
    no_headings: Literal["refuse", "last-paragraph"] = "refuse"
    """A report with neither findings nor an impression: refuse it, or learn its last paragraph."""
    check_images: CheckImages = "size"
    """Of the images taken: nothing, that they are there and not empty, or that they can be decoded (hours)."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare_mimic_cxr` did."""

    counts: Counts
    found: int  # lines that an interrupted run had written
    not_utf8: list[str]  # reports that this run read as Windows-1252
    headings: Headings  # that are not known, of the reports that this run read


@dataclass(frozen=True)
class _Refused:
    reason: str
    where: str
    report: str | None = None  # the text that would have been learned


def prepare_mimic_cxr(
    root: Path, output: Path, *, reports: Path | None = None, choices: Choices | None = None
) -> Prepared:
    """Write `manifest.jsonl`, `refused.jsonl`, `reports.csv` and `reports_SPLIT.csv`; interrupted, the same call goes
    on.

    Studies come by patient and time. `prior` is the patient's last kept study of an earlier date and time; the
    published split keeps a patient's studies together.

    Args:
        root: MIMIC-CXR-JPG as downloaded: `files/p10/p10000032/s50414267/*.jpg` and the tables `mimic-cxr-2.*.csv.gz`.
        output: folder to write.
        reports: folder that holds `files/p10/p10000032/s50414267.txt`, or mimic-cxr-reports.zip; None means `root`.
        choices: None takes the defaults.

    Raises:
        ValueError: a table or archive that is damaged or lacks a column, a folder made with other settings, a table
            that changed after an interrupted run, not one study that can be kept.
        OSError: a file cannot be read or written, or there is no folder of images or reports.
    """
    choices = choices or Choices()
    reports = reports or root
    if choices.max_images < 1:
        raise ValueError(f"at most {choices.max_images} images a study; a study needs one")
    split_table, metadata = find_table(root, "split"), find_table(root, "metadata")
    label_table = find_table(root, choices.labels) if choices.labels != "none" else None
    if choices.check_images != "none" and not (root / "files").is_dir():
        raise NotADirectoryError(
            f"{root / 'files'}: no such folder of images; give the folder above it, or --check-images none without them"
        )
    settings = {
        "dataset": "mimic-cxr",
        "root": str(root.absolute()),
        "reports": str(reports.absolute()),
        **asdict(choices),
    }
    tables = [table for table in (split_table, metadata, label_table) if table is not None]
    refuse_changed_sources(output, [*tables, reports] if reports.is_file() else tables)
    with _Reports(reports) as texts:
        studies = read_studies(split_table, metadata)
        labels = Labels(label_table) if label_table is not None else None
        with Conversion(output, settings) as conversion:
            reader = _Reader(root.absolute(), studies, labels, texts, choices)
            _settle(reader, conversion)
            return Prepared(conversion.close(), conversion.found, texts.not_utf8, reader.headings)


def _settle(reader: _Reader, conversion: Conversion) -> None:
    """Keep or refuse every study that is not settled yet."""
    studies = reader.studies
    patient = -1
    earlier: list[tuple[int, str]] = []  # time and id of this patient's kept studies
    for place, found in progress(_looked_at(reader, conversion), "reading studies", total=len(studies)):
        study_id, time = f"s{studies.ids[place]}", int(studies.times[place])
        if studies.subjects[place] != patient:
            patient, earlier = studies.subjects[place], []
        if isinstance(found, Study):
            prior = next((other for then, other in reversed(earlier) if then < time), None)
            conversion.keep(replace(found, prior=prior), reader.where(place))
        elif found is not None:
            conversion.refuse(study_id, reader.split(place), found.reason, found.where, found.report)
        if conversion.kept(study_id):
            earlier.append((time, study_id))
    # What no study of the split table is: rows of the other tables, and rows whose study cannot be told.
    known = set(studies.ids.tolist())
    for number, refusal in studies.refused.items():
        if number not in known:
            conversion.refuse(f"s{number}", "", refusal.reason, refusal.where)
    for refusal in (*studies.nameless, *(reader.labels.nameless if reader.labels else ())):
        conversion.refuse("", "", refusal.reason, refusal.where)


def _looked_at(reader: _Reader, conversion: Conversion) -> Iterator[tuple[int, Study | _Refused | None]]:
    """Every study's place with what is found, or None where it is settled already."""
    # files of a network are waited for together, and Pillow decodes outside the interpreter lock
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(reader.studies), _AT_ONCE):
            places = range(start, min(start + _AT_ONCE, len(reader.studies)))
            drafts = [
                None if conversion.done(f"s{reader.studies.ids[place]}") else reader.draft(place) for place in places
            ]
            yield from zip(places, pool.map(reader.with_images, places, drafts), strict=True)


class _Reader:
    """Studies of the tables, with their reports and images."""

    def __init__(self, root: Path, studies: Studies, labels: Labels | None, texts: _Reports, choices: Choices) -> None:
        self.studies = studies
        self.labels = labels
        self.headings = Headings()
        self._root, self._texts, self._choices = root, texts, choices

    def split(self, place: int) -> str:
        return _SPLIT_NAMES[self.studies.splits[place]]

    def where(self, place: int) -> str:
        return f"{self.studies.path.name}, line {self.studies.rows[place]}"

    def draft(self, place: int) -> Study | _Refused:
        """A study without its prior and with images that nobody has looked at, or why there is none."""
        number, subject = int(self.studies.ids[place]), int(self.studies.subjects[place])
        for refusals in (self.studies.refused, self.labels.refused if self.labels else {}):
            if number in refusals:
                return _Refused(refusals[number].reason, refusals[number].where)
        folder = f"files/p{str(subject)[:2]}/p{subject}/s{number}"
        try:
            report = read_report(self._texts.read(f"{folder}.txt"))
            self.headings.count(report.misspelt, report.unknown)
            text = _text_to_learn(report, self._choices)
        except _NoText as error:
            return _Refused(str(error), self.where(place))
        images = self._images(place, folder)
        if not images:
            reason = "no frontal image: ViewPosition of its images is neither PA nor AP; --views all takes the others"
            return _Refused(reason, self.where(place), text)
        return Study(
            id=f"s{number}",
            patient_id=f"p{subject}",
            images=images,
            report=text,
            split=self.split(place),
            findings=_null_if_missing(report.findings),
            impression=_null_if_missing(report.impression),
            indication=_null_if_missing(report.indication),
            comparison=_null_if_missing(report.comparison),
            said=self.labels.of(number) if self.labels else None,
        )

    def with_images(self, place: int, draft: Study | _Refused | None) -> Study | _Refused | None:
        """The draft, or its refusal where an image of it cannot be used."""
        if isinstance(draft, Study):
            for image in draft.images:
                problem = problem_of_image(image.path, draft.id, self._choices.check_images)
                if problem is not None:
                    return _Refused(problem, self.where(place), draft.report)
        return draft

    def _images(self, place: int, folder: str) -> tuple[StudyImage, ...]:
        first, end = self.studies.first[place], self.studies.first[place + 1]
        images = [(int(self.studies.views[row]), self.studies.dicoms[row].decode()) for row in range(first, end)]
        frontal = [image for image in images if image[0] in (PA, AP)]
        if self._choices.views == "frontal":
            images = frontal
        else:  # a frontal and a lateral say more than two frontals
            lateral = [image for image in images if image[0] == LATERAL]
            pair = [*frontal[:1], *lateral[:1]]
            images = [*pair, *(image for image in images if image not in pair)]
        base = self._root / folder
        return tuple(
            StudyImage(base / f"{dicom}.jpg", _VIEW_NAMES.get(view))
            for view, dicom in images[: self._choices.max_images]
        )


def _null_if_missing(text: str | None) -> str | None:
    return None if text is None or is_missing(text, words=False) else text


class _NoText(ValueError):
    """A report that gives nothing to learn; the message says why and the remedy."""


def _text_to_learn(report: Report, choices: Choices) -> str:
    findings, impression = (
        text if text is not None and report_fault(text) is None else None
        for text in (report.findings, report.impression)
    )
    if findings is None and impression is None:
        if report.last_paragraph is None:
            raise _NoText(
                "the report has neither FINDINGS nor IMPRESSION, and no text that no heading names; nothing can "
                "be learned of it"
            )
        if choices.no_headings == "refuse":
            raise _NoText(
                "the report has neither FINDINGS nor IMPRESSION; --no-headings last-paragraph learns its last paragraph"
            )
        return report.last_paragraph
    if choices.report == "findings":
        if findings is None:
            raise _NoText("the report has no FINDINGS; --report impression learns its IMPRESSION")
        return findings
    if impression is None and not (report.combined and choices.report == "both"):
        what = (
            "FINDINGS AND IMPRESSION as one, which --report both"
            if report.combined
            else "FINDINGS, which --report findings"
        )
        raise _NoText(f"the report has no IMPRESSION; it has {what} learns")
    if choices.report == "impression":
        assert impression is not None
        return impression
    if findings is None:
        raise _NoText(
            "the report has no FINDINGS, and --report both asks for both; --report impression learns its IMPRESSION"
        )
    return f"{findings} {impression}" if impression is not None else findings


class _Reports:
    """The texts of mimic-cxr-reports.zip, unpacked or not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        self.not_utf8: list[str] = []

    def __enter__(self) -> Self:
        if self._path.is_file():
            try:
                self._archive = zipfile.ZipFile(self._path)
            except zipfile.BadZipFile as error:
                raise ValueError(
                    f"{self._path}: not a zip archive ({error}); fetch mimic-cxr-reports.zip again"
                ) from error
        elif not (self._path / "files").is_dir():
            remedy = (
                "unpack mimic-cxr-reports.zip and give the folder above `files`, or the archive itself, with --reports"
            )
            raise NotADirectoryError(f"{self._path / 'files'}: no such folder of reports; {remedy}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive is not None:
            self._archive.close()

    def read(self, name: str) -> str:
        """A report's text. What is not UTF-8 is read as Windows-1252, a superset of printed Latin-1, and remembered.

        Raises:
            _NoText: no such report, or one that is damaged, empty or no text.
        """
        raw = self._of_archive(name) if self._archive is not None else self._of_folder(name)
        where = self._path / name
        if not raw.strip():
            raise _NoText(f"{where}: the report is empty; fetch it again")
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
        try:
            text = raw.decode("cp1252")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} at {error.start}"
            raise _NoText(f"{where}: neither UTF-8 nor Windows-1252 ({byte}); save it as UTF-8") from error
        self.not_utf8.append(name)
        return text

    def _of_folder(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError as error:
            remedy = "unpack mimic-cxr-reports.zip there, or give its folder with --reports"
            raise _NoText(f"{self._path / name}: no such report; {remedy}") from error

    def _of_archive(self, name: str) -> bytes:
        assert self._archive is not None
        try:
            return self._archive.read(name)
        except KeyError as error:
            raise _NoText(f"{self._path / name}: not in the archive; fetch mimic-cxr-reports.zip again") from error
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _NoText(f"{self._path / name}: damaged ({error}); fetch mimic-cxr-reports.zip again") from error
