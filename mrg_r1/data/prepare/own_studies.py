"""`prepare manifest`: a table of one's own studies, checked into a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mrg_r1.console import progress
from mrg_r1.data.prepare.checking import image_problems, refuse_changed_sources
from mrg_r1.data.prepare.conversion import Conversion, Counts
from mrg_r1.data.prepare.tabular import Record, RowError, read_records, study_of_row
from mrg_r1.labels.observations import NO_FINDING
from mrg_r1.types import Study

SPLITS = ("train", "val", "test")


@dataclass
class Prepared:
    """What `prepare_manifest` found."""

    counts: Counts  # split -> {read, kept, rendered, refused}
    left_out: list[str] = field(default_factory=list)  # columns that a study has no place for
    shared_patients: dict[str, list[str]] = field(default_factory=dict)  # patients with studies in several splits
    never_silent: list[str] = field(default_factory=list)  # splits of whose labels not one is empty


def prepare_manifest(source: Path, images: Path | None, output: Path, *, splits: Sequence[str] = SPLITS) -> Prepared:
    """Write `manifest.jsonl`, `refused.jsonl` (id, split, reason, where), `reports.csv` and `reports_SPLIT.csv` into a
    folder.

    Every row becomes a study or a line of refused.jsonl. Of two rows with one id the first is taken. A study whose
    prior is not among the kept ones is refused, as a manifest refers to its own studies alone. Interrupted, the same
    call goes on.

    Args:
        source: CSV or JSONL, as `read_records` reads it.
        images: what image paths are relative to; None: the folder of `source`.
        output: folder to write.
        splits: the names that a split may have.

    Raises:
        ManifestError: the source as a whole (see `read_records`).
        ValueError: a folder made with other settings, a source that changed after an interrupted run, not one study
            that can be kept.
        OSError: a file cannot be read or written.
    """
    if source.is_dir():
        raise IsADirectoryError(f"{source}: a folder; give the CSV or JSONL file of the studies")
    if images is not None and not images.is_dir():
        raise NotADirectoryError(
            f"{images}: no such folder of images; without --images paths are relative to the folder of {source.name}"
        )
    folder = (images or source.parent).absolute()
    # finds what is wrong with the file as a whole before anything is written
    total = sum(1 for _ in read_records(source))
    settings = {"dataset": "manifest", "source": str(source.absolute()), "images": str(folder), "splits": list(splits)}
    refuse_changed_sources(output, [source])
    with Conversion(output, settings) as conversion:
        rows = _Rows(conversion, folder, splits)
        read = (rows.read(record) for record in progress(read_records(source), "checking studies", total=total))
        for row, damage in image_problems((row for row in read if row is not None), lambda row: row.study):
            rows.settle(row, damage)
        rows.settle_rest()
        return Prepared(conversion.close(), rows.left_out, rows.shared_patients(), rows.never_silent())


@dataclass(frozen=True)
class _Row:
    """A row that has been read; the images of its study, if it is one, are still to be checked."""

    id: str
    split: str
    where: str
    study: Study | None = None
    fault: str | None = None  # where there is no study


class _Rows:
    """Rows on their way into a conversion."""

    def __init__(self, conversion: Conversion, folder: Path, splits: Sequence[str]) -> None:
        self._conversion, self._folder, self._splits = conversion, folder, splits
        self._where: dict[str, str] = {}  # every id met
        self._patient_of: dict[str, str] = {}  # of every row that is a study
        self._waiting: dict[str, tuple[Study, str]] = {}  # whole, but their prior is not settled yet
        self._repeats: list[tuple[str, str, str, str]] = []
        self._splits_of: dict[str, dict[str, None]] = {}  # patient -> splits, in their order
        self._silent: dict[str, bool] = {}  # split with labels -> whether any of them is empty
        self.left_out: list[str] = []

    def read(self, record: Record) -> _Row | None:
        """A row that is to be settled, or None if it is."""
        self.left_out += [name for name in record.left_out() if name not in self.left_out]
        study_id = record.named("id")
        split = record.named("split") if record.named("split") in self._splits else ""
        if study_id and self._where.setdefault(study_id, record.where) != record.where:
            reason = f"field `id`: {study_id!r} stands in {self._where[study_id]} already; give every study its own id"
            self._repeats.append((study_id, split, reason, record.where))
            return None
        try:
            study = study_of_row(record, self._folder, self._splits)
        except RowError as error:
            return _Row(study_id, split, record.where, fault=str(error))
        self._splits_of.setdefault(study.patient_id, {})[study.split] = None
        self._patient_of[study.id] = study.patient_id
        if study.said is not None:
            self._silent[study.split] = self._silent.get(study.split, False) or None in study.said[:NO_FINDING]
        return None if self._conversion.done(study.id) else _Row(study.id, study.split, record.where, study)

    def settle(self, row: _Row, damage: str | None) -> None:
        """Keep or refuse a row, or let it wait for its prior."""
        if row.study is None:
            self._conversion.refuse(row.id, row.split, row.fault or "", row.where)
        elif damage is None and row.study.prior not in (None, row.study.id) and not self._is_kept(row.study.prior):
            self._waiting[row.study.id] = (row.study, row.where)
        else:
            self._settle_study(row.study, row.where, damage or self._wrong_prior(row.study))

    def settle_rest(self) -> None:
        """After the last row: studies whose prior stood behind them, or was not kept; and second rows of an id."""
        while ready := [waiting for waiting in self._waiting.values() if waiting[0].prior not in self._waiting]:
            for study, where in ready:
                del self._waiting[study.id]
                self._settle_study(study, where, self._wrong_prior(study))
        for study, where in self._waiting.values():
            self._settle_study(
                study, where, f"field `prior`: {study.prior!r} leads in a circle of priors; write null for the earliest"
            )
        # last: a second row must not pass for the first where a run is taken up again
        for repeat in self._repeats:
            self._conversion.refuse(*repeat)

    def _settle_study(self, study: Study, where: str, fault: str | None) -> None:
        if fault is not None:
            self._conversion.refuse(study.id, study.split, fault, where, study.report)
        else:
            self._conversion.keep(study, where)

    def _is_kept(self, study_id: str | None) -> bool:
        """Whether a study is kept and its row has been met, so that its patient is known."""
        return study_id in self._patient_of and self._conversion.kept(study_id)

    def _wrong_prior(self, study: Study) -> str | None:
        prior = study.prior
        if prior is None:
            return None
        if prior == study.id:
            return "field `prior`: a study cannot be its own prior; write null or an earlier study's id"
        if self._is_kept(prior):
            other = self._patient_of[prior]
            wrong = (
                f"field `prior`: {prior!r} is of patient {other!r}, not {study.patient_id!r}; write null or the "
                "right id"
            )
            return None if other == study.patient_id else wrong
        if prior in self._where:
            return f"field `prior`: {prior!r} was refused; mend that study, or write null"
        return f"field `prior`: no study {prior!r} in this file; add it or write null"

    def shared_patients(self) -> dict[str, list[str]]:
        """Patients with studies in several splits, and those splits."""
        return {patient: list(splits) for patient, splits in self._splits_of.items() if len(splits) > 1}

    def never_silent(self) -> list[str]:
        """Splits that have labels, of which not one is empty; No Finding, which nobody denies, aside."""
        return [split for split, silent in self._silent.items() if not silent]
