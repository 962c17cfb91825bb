"""What all converters of `prepare` share: studies stream through, kept or refused, and become a manifest, whole or not
at all.

Everything settled is appended to one journal, a line a study, so that a run that was killed goes on where it stopped.
Only when the last study is settled is the journal written out as `manifest.jsonl`, `refused.jsonl`, `reports.csv` and
`reports_SPLIT.csv`.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.table import Table

from mrg_r1 import __version__
from mrg_r1.console import progress
from mrg_r1.data.prepare.rendering import claim_settings
from mrg_r1.data.study import SHOWN_PROBLEMS, ManifestError, manifest_line
from mrg_r1.files import naming
from mrg_r1.labels.missing import report_fault
from mrg_r1.types import Study

JOURNAL_FILE = "conversion.part"
COUNTED = ("read", "kept", "rendered", "refused")
# split -> COUNTED, `kept` including `rendered`, `read` their and the refused ones' sum
Counts = dict[str, dict[str, int]]

_SPLIT_NAME = r"[\w.-]+"  # it becomes part of a file's name


class Conversion:
    """A folder that studies are converted into.

        with Conversion(output, settings) as conversion:
            for entry in entries:
                if not conversion.done(entry.id):
                    conversion.keep(study_of(entry))  # or conversion.refuse(entry.id, entry.split, "no image; ...",
                    where)
            counts = conversion.close()

    A run that is killed leaves its journal, and the same command goes on: what is settled, refused studies too, is not
    looked at again. A finished folder is done anew, as what was refused may have been mended since; its files stay
    until the new ones are whole.

    In memory are the ids, the patients and the counts, no study.

    Attributes:
        found: how many studies an earlier run had settled; set on entering.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, sources: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            output: the folder to write.
            settings: JSON values that the content depends on (see `claim_settings`).
            sources: JSON values, such as paths, that a finished folder may be done anew from others of, an interrupted
                run not gone on with: where they differ from those of its journal, every study is looked at again.
        """
        self.output = output
        self.found = 0
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # tuples are lists in what is read back
        self._sources = json.loads(json.dumps(dict(sources or {})))
        self._path = output / JOURNAL_FILE
        self._patients: dict[str, str] = {}  # of the kept studies
        self._refused: set[str] = set()  # ids
        self._refusals: set[tuple[str, str]] = set()  # id and place

    def __enter__(self) -> Self:
        """
        Raises:
            ValueError: a folder made with other settings, or into which another process is converting; a damaged
                journal.
            OSError: the folder cannot be written.
        """
        claim_settings(self.output, self._settings)
        self._journal = open(self._path, "a+b")  # whatever was read, writing is at the end
        try:
            with naming(self._path):
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._take_up()
        except BlockingIOError as error:
            self._close_journal(error)
            raise ValueError(
                f"{self.output}: another process is converting into it; wait for its end or choose another output"
            ) from error
        except (ValueError, OSError) as error:
            self._close_journal(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_journal(error)

    def done(self, study_id: str) -> bool:
        """Whether this study is settled: kept or refused, now or by a run that was interrupted."""
        return study_id in self._patients or study_id in self._refused

    def kept(self, study_id: str) -> bool:
        """Whether this study is settled as kept, so that it may be another's `prior`."""
        return study_id in self._patients

    def keep(self, study: Study, where: str = "", *, text_of: str | None = None) -> bool:
        """Settle a study as a line of the manifest; or, where `read_manifest` would not read it back, as refused with
        that reason.

        Args:
            study: image paths absolute; `prior` may name a study that is kept later.
            where: the file and row it was read from, named if it is refused.
            text_of: the settled study whose report this one repeats, so that the report CSVs leave it out.

        Returns:
            Whether it was kept.

        Raises:
            ValueError: the id is kept already; a converter asks `done` first.
            OSError: the journal cannot be written.
        """
        if study.id in self._patients:
            raise ValueError(f"study {study.id!r} is kept already; refuse its second row, naming both")
        try:
            if not re.fullmatch(_SPLIT_NAME, study.split):
                reason = (
                    f"field `split`: {study.split!r}; a split's name is letters, digits, _, - and dots "
                    "(reports_SPLIT.csv)"
                )
                raise ManifestError([reason])
            line = manifest_line(study, self.output.absolute())
        except ManifestError as error:
            self.refuse(study.id, study.split, "; ".join(error.problems), where, study.report)
            return False
        repeated = "" if text_of is None else f', "text_of": {json.dumps(text_of)}'
        self._append(f'{{"kept": {line}{repeated}}}\n'.encode())
        self._patients[study.id] = study.patient_id
        return True

    def refuse(self, study_id: str, split: str, reason: str, where: str = "", report: str | None = None) -> None:
        """Settle a study as a line of `refused.jsonl`. The same id and place once more is passed over, so that a
        resumed run may repeat it.

        Args:
            study_id: may be that of a settled study (a second row of it), or empty where there is none.
            split: empty where it is not known.
            reason: what is wrong with which value, and the remedy.
            where: the file and row, such as "images.csv, line 7".
            report: its text where one was read, for the report CSVs.

        Raises:
            OSError: the journal cannot be written.
        """
        if (study_id, where) in self._refusals:
            return
        record = {"id": study_id, "split": split, "reason": reason, "where": where}
        self._append(json.dumps({"refused": record, "report": report}).encode() + b"\n")
        self._refusals.add((study_id, where))
        if study_id:
            self._refused.add(study_id)

    def close(self) -> Counts:
        """Check the whole and put the files in place, the manifest last; the journal is then removed.

        `reports.csv` and `reports_SPLIT.csv` have the text of every kept study and of those refused ones that one was
        read of, once an id.

        Returns:
            split -> `{read, kept, rendered, refused}` in the order in which the splits were met.

        Raises:
            ManifestError: a `prior` that is not among the kept studies, is another patient's or the study itself; no
                file has changed.
            ValueError: not one study was kept: names the first reason. refused.jsonl and the report CSVs are in place,
                and a manifest of an earlier run is left as it was.
            OSError: a file cannot be written; the journal stays.
        """
        counts: Counts = {}
        first = None
        problems: list[str] = []
        with _Files(self.output) as files:
            files.line("manifest.jsonl")
            files.line("refused.jsonl")
            files.row("reports.csv", ["id", "report"])
            told: set[str] = set()
            total = len(self._patients) + len(self._refusals)
            for record in progress(self._settled(), "writing the manifest", total=total):
                kept = record.get("kept")
                study = kept or record["refused"]
                split = study["split"]
                if split not in counts:
                    counts[split] = dict.fromkeys(COUNTED, 0)
                    if re.fullmatch(_SPLIT_NAME, split):
                        files.row(f"reports_{split}.csv", ["id", "report"])
                counts[split]["read"] += 1
                if kept:
                    counts[split]["kept"] += 1
                    counts[split]["rendered"] += kept["rendered"]
                    problems += self._wrong_prior(kept)
                    if len(problems) > SHOWN_PROBLEMS:
                        break
                    files.line("manifest.jsonl", kept)
                else:
                    first = first or study
                    counts[split]["refused"] += 1
                    files.line("refused.jsonl", study)
                report = kept["report"] if kept else record["report"]
                name = record.get("text_of", study["id"])  # a further film's report is told once
                if report is not None and report_fault(report) is None and name and name not in told:
                    told.add(name)
                    files.row("reports.csv", [study["id"], report])
                    if re.fullmatch(_SPLIT_NAME, split):
                        files.row(f"reports_{split}.csv", [study["id"], report])
            if problems:
                raise ManifestError(problems)
            # Last: where the manifest stands, everything beside it does.
            files.put(leave_out=() if self._patients else ("manifest.jsonl",), last="manifest.jsonl")
        self._path.unlink()
        if not self._patients:
            raise ValueError(self._nothing_kept(first))
        return counts

    def _nothing_kept(self, first: Mapping[str, str] | None) -> str:
        if first is None:
            return f"{self.output}: no study was read, so nothing can be trained on; look at the files that were given"
        what = f"the first, {first['id']!r}" + (f" ({first['where']})" if first["where"] else "")
        return (
            f"{self.output}: all {len(self._refusals):,} studies were refused, {what}, because: {first['reason']}. "
            f"Every reason stands in {self.output / 'refused.jsonl'}; the reports stand in "
            f"{self.output / 'reports.csv'}"
        )

    def _wrong_prior(self, record: Mapping[str, Any]) -> list[str]:
        prior = record["prior"]
        if prior is None or (prior != record["id"] and self._patients.get(prior) == record["patient_id"]):
            return []
        if prior == record["id"]:
            wrong = "a study cannot be its own prior"
        elif prior not in self._patients:
            wrong = f"{prior!r} was {'refused' if prior in self._refused else 'not read'}, so it cannot be referred to"
        else:
            wrong = f"{prior!r} is of patient {self._patients[prior]!r}, not {record['patient_id']!r}"
        remedy = f"write null or a kept study's id, remove {self._path} and run the same command again"
        return [f"{self.output / 'manifest.jsonl'}, study {record['id']!r}, field `prior`: {wrong}; {remedy}"]

    def _close_journal(self, error: BaseException | None) -> None:
        """
        Args:
            error: what has failed already. Closing writes once more what a full disk did not take, and fails too: that
                is not to stand in its place.
        """
        try:
            with naming(self._path):
                self._journal.close()
        except OSError:
            if error is None:
                raise

    def _append(self, line: bytes) -> None:
        with naming(self._path):
            self._journal.write(line)
            # to the system, which outlives this process; what a power failure tears off is done again
            self._journal.flush()

    def _take_up(self) -> None:
        """Read what an earlier run with the same settings settled; cut off what it did not finish writing."""
        header = (
            json.dumps(
                {"settings": self._settings, "sources": self._sources, "mrg_r1": __version__}, sort_keys=True
            ).encode()
            + b"\n"
        )
        self._journal.seek(0)
        # Settings that were open (None) may have been settled since: what was refused for want of them is looked at
        # again.
        if self._journal.readline() != header:
            self._journal.truncate(0)
            self._append(header)
            return
        whole = self._journal.tell()
        torn = None
        for number, line in enumerate(self._journal, start=2):
            if torn is not None:
                raise ValueError(f"{self._path}, line {torn}: damaged; remove this file and run the same command again")
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end")
                record = json.loads(line)
            except ValueError:
                torn = number
                continue
            whole += len(line)
            if "kept" in record:
                self._patients[record["kept"]["id"]] = record["kept"]["patient_id"]
            else:
                refused = record["refused"]
                self._refusals.add((refused["id"], refused["where"]))
                if refused["id"]:
                    self._refused.add(refused["id"])
        self._journal.truncate(whole)
        self.found = len(self._patients) + len(self._refusals)

    def _settled(self) -> Iterator[dict[str, Any]]:
        with open(self._path, "rb") as file:
            file.readline()
            for line in file:
                yield json.loads(line)


class _Files:
    """Text files of one folder that are written beside their names and put in place together; those not put are
    removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, IO[str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def line(self, name: str, record: Mapping[str, Any] | None = None) -> None:
        """A line of JSON; None makes the file and writes nothing."""
        file = self._file(name)
        if record is not None:
            with naming(self._folder / name):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def row(self, name: str, values: list[str]) -> None:
        """A row of CSV."""
        file = self._file(name)
        with naming(self._folder / name):
            csv.writer(file).writerow(values)

    def put(self, *, leave_out: tuple[str, ...], last: str) -> None:
        for name, file in self._open.items():
            with naming(self._folder / name):
                file.flush()
                os.fsync(file.fileno())
        for name in sorted(self._open, key=lambda name: name == last):
            if name not in leave_out:
                os.replace(self._temporary(name), self._folder / name)

    def _file(self, name: str) -> IO[str]:
        if name not in self._open:
            # Half a surrogate pair, which only a refused study's text can have, is shown as its escape.
            file = open(self._temporary(name), "w", newline="", encoding="utf-8", errors="backslashreplace")
            # also where closing fails, since the disk is full
            self._stack.callback(self._temporary(name).unlink, missing_ok=True)
            self._stack.enter_context(naming(self._folder / name, self._temporary(name)))
            self._open[name] = self._stack.enter_context(file)
        return self._open[name]

    def _temporary(self, name: str) -> Path:
        return self._folder / f"{name}.tmp"  # the journal's lock keeps others out; what a kill leaves is written over


def outcome_table(title: str, counts: Counts) -> Table:
    """What `Conversion.close` counted, a row a split and their total; `rendered` only where any study is."""
    columns = [column for column in COUNTED if column != "rendered" or any(count[column] for count in counts.values())]
    table = Table("split", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for split, count in counts.items():
        table.add_row(split or "(none)", *(f"{count[column]:,}" for column in columns))
    table.add_section()
    table.add_row("total", *(f"{sum(count[column] for count in counts.values()):,}" for column in columns))
    return table


def print_outcome(title: str, counts: Counts, output: Path) -> None:
    """The table of what a converter read, kept and refused, and where it stands."""
    Console().print(outcome_table(title, counts))
    print(f"{output / 'manifest.jsonl'}: written")
    if any(count["refused"] for count in counts.values()):
        print(f"{output / 'refused.jsonl'}: why each was refused")
