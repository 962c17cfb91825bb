"""What converters share: a killed run goes on, nothing half-written is taken for whole, and what is written can be read
back.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mrg_r1.data.prepare.conversion import JOURNAL_FILE, Conversion, outcome_table
from mrg_r1.data.study import ManifestError, read_manifest
from mrg_r1.labels.reports import read_reports_csv
from mrg_r1.types import Study, StudyImage

SETTINGS = {"dataset": "test", "text": "findings", "shape": (1, 2)}


def study(folder: Path, study_id: str, **changes: Any) -> Study:
    known = {"patient_id": "p1", "report": f"Report of {study_id}, clear.", "split": "train"}
    return Study(
        id=study_id, images=(StudyImage(folder / "images" / f"{study_id}.png", "frontal"),), **(known | changes)
    )


def refused(output: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (output / "refused.jsonl").read_text().splitlines()]


def files(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


def test_what_is_kept_can_be_read_back_and_what_is_refused_says_why_and_where(tmp_path: Path) -> None:
    output = tmp_path / "out"
    kept = [
        study(tmp_path, "a", said=(1, 0, -1, *[None] * 11), indication="Cough."),
        study(tmp_path, "c", split="val", prior="a", rendered=True, report='Commas, "quotes"\nand lines: Ärzte.'),
    ]
    with Conversion(output, SETTINGS) as conversion:
        assert conversion.keep(kept[0])
        conversion.refuse("b", "train", "no image; fetch it", "list.csv, line 3", report="Effusion.")
        conversion.refuse("d", "test", "the report is empty", report=" ")
        assert conversion.keep(kept[1])
        assert [conversion.kept(study_id) for study_id in "abc"] == [True, False, True]
        assert files(output) == {"prepare.json", JOURNAL_FILE}
        counts = conversion.close()
    assert counts == {
        "train": {"read": 2, "kept": 1, "rendered": 0, "refused": 1},
        "test": {"read": 1, "kept": 0, "rendered": 0, "refused": 1},
        "val": {"read": 1, "kept": 1, "rendered": 1, "refused": 0},
    }
    assert read_manifest(output / "manifest.jsonl") == kept
    assert refused(output) == [
        {"id": "b", "split": "train", "reason": "no image; fetch it", "where": "list.csv, line 3"},
        {"id": "d", "split": "test", "reason": "the report is empty", "where": ""},
    ]
    assert read_reports_csv(output / "reports.csv") == {"a": kept[0].report, "b": "Effusion.", "c": kept[1].report}
    assert read_reports_csv(output / "reports_train.csv") == {"a": kept[0].report, "b": "Effusion."}
    assert read_reports_csv(output / "reports_val.csv") == {"c": kept[1].report}
    reports = {"reports.csv", "reports_train.csv", "reports_val.csv", "reports_test.csv"}
    assert files(output) == {"prepare.json", "manifest.jsonl", "refused.jsonl"} | reports


KILLED = """
import os, signal, sys
from pathlib import Path
from mrg_r1.data.prepare.conversion import Conversion
from tests.data.prepare.test_conversion import SETTINGS, study
output = Path(sys.argv[1])
with Conversion(output, SETTINGS) as conversion:
    conversion.keep(study(output.parent, "a"))
    conversion.refuse("b", "train", "no image", "row 2", report="Refused, yet read.")
    conversion.keep(study(output.parent, "c", prior="a"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    output = tmp_path / "out"
    root = str(Path(__file__).resolve().parents[3])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(output)], cwd=root, env={**os.environ, "PYTHONPATH": root}, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    assert files(output) == {"prepare.json", JOURNAL_FILE}

    def finish(folder: Path) -> list[str]:
        looked_at = []
        with Conversion(folder, SETTINGS) as conversion:
            for study_id in "abcd":
                if conversion.done(study_id):
                    continue
                looked_at.append(study_id)
                if study_id == "b":
                    conversion.refuse("b", "train", "no image", "row 2", report="Refused, yet read.")
                else:
                    conversion.keep(study(tmp_path, study_id, prior="a" if study_id == "c" else None))
            assert conversion.close() == {"train": {"read": 4, "kept": 3, "rendered": 0, "refused": 1}}
        return looked_at

    assert finish(output) == ["d"]
    assert finish(tmp_path / "whole") == ["a", "b", "c", "d"]
    for name in files(tmp_path / "whole"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert files(output) == files(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_cut_off_and_its_study_done_again(tmp_path: Path, cut: int) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        for study_id in "ab":
            conversion.keep(study(tmp_path, study_id))
    journal = tmp_path / "out" / JOURNAL_FILE
    os.truncate(journal, journal.stat().st_size - cut)
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        assert conversion.found == 1
        assert conversion.done("a") and not conversion.done("b")
        conversion.keep(study(tmp_path, "b"))
        conversion.close()
    assert [item.id for item in read_manifest(tmp_path / "out" / "manifest.jsonl")] == ["a", "b"]


def test_a_tail_of_nulls_after_a_power_failure_is_cut_off_too(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "a"))
    with open(tmp_path / "out" / JOURNAL_FILE, "ab") as file:
        file.write(b"\0" * 5000)
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "b"))
        assert conversion.close()["train"]["kept"] == 2


def test_a_journal_damaged_in_its_middle_is_refused(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        for study_id in "abc":
            conversion.keep(study(tmp_path, study_id))
    journal = tmp_path / "out" / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"{\n", *lines[3:]]))
    with (
        pytest.raises(ValueError, match=rf"{JOURNAL_FILE}, line 3"),
        Conversion(tmp_path / "out", SETTINGS),
    ):
        pass


def test_an_interrupted_run_is_not_gone_on_with_from_other_sources(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS, sources={"images": "wrong"}) as conversion:
        conversion.refuse("a", "train", "wrong/a.png: no such file")
    with Conversion(tmp_path / "out", SETTINGS, sources={"images": "right"}) as conversion:
        assert conversion.found == 0 and not conversion.done("a")
        conversion.keep(study(tmp_path, "a"))
    with Conversion(tmp_path / "out", SETTINGS, sources={"images": "right"}) as conversion:
        assert conversion.done("a")
        assert conversion.close() == {"train": {"read": 1, "kept": 1, "rendered": 0, "refused": 0}}


def test_a_folder_made_with_other_settings_is_refused(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "a"))
    other = {**SETTINGS, "text": "impression"}
    with (
        pytest.raises(ValueError, match="`text`.*'findings'.*'impression'"),
        Conversion(tmp_path / "out", other),
    ):
        pass
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        assert conversion.done("a")


def test_settings_that_were_open_and_are_settled_since_look_at_every_study_again(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", {**SETTINGS, "labels": None}) as conversion:
        conversion.refuse("a", "train", "no labels")
    with Conversion(tmp_path / "out", {**SETTINGS, "labels": "abcdef"}) as conversion:
        assert conversion.found == 0 and not conversion.done("a")
        conversion.keep(study(tmp_path, "a"))
        assert conversion.close() == {"train": {"read": 1, "kept": 1, "rendered": 0, "refused": 0}}


def test_a_finished_folder_is_done_anew_and_its_files_stay_until_then(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Conversion(output, SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "a"))
        conversion.refuse("b", "train", "no image")
        conversion.close()
    before = (output / "manifest.jsonl").read_bytes()
    with Conversion(output, SETTINGS) as conversion:  # the image has been fetched since
        assert conversion.found == 0 and not conversion.done("a") and not conversion.done("b")
        for study_id in "ab":
            conversion.keep(study(tmp_path, study_id))
        assert (output / "manifest.jsonl").read_bytes() == before
        assert conversion.close()["train"] == {"read": 2, "kept": 2, "rendered": 0, "refused": 0}
    assert [item.id for item in read_manifest(output / "manifest.jsonl")] == ["a", "b"]
    assert refused(output) == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "a"))
        with pytest.raises(ValueError, match="out"), Conversion(tmp_path / "out", SETTINGS):
            pass
        assert conversion.close()["train"]["kept"] == 1


def test_an_id_that_is_kept_cannot_be_kept_again_but_its_second_row_refused(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "a"))
        with pytest.raises(ValueError, match="'a'"):
            conversion.keep(study(tmp_path, "a"))
        for _ in range(2):  # as a resumed run does
            conversion.refuse("a", "train", "id 'a' stands on row 2 too", "row 3", report="Another text.")
            conversion.refuse("", "train", "no id", "row 4")
        conversion.refuse("", "train", "no id", "row 5")
        assert not conversion.done("")
        assert conversion.close() == {"train": {"read": 4, "kept": 1, "rendered": 0, "refused": 3}}
    assert [(row["id"], row["where"]) for row in refused(tmp_path / "out")] == [
        ("a", "row 3"),
        ("", "row 4"),
        ("", "row 5"),
    ]
    assert read_reports_csv(tmp_path / "out" / "reports.csv") == {"a": study(tmp_path, "a").report}


def test_refusals_that_a_resumed_run_repeats_stand_once(tmp_path: Path) -> None:
    for last in (False, True):
        with Conversion(tmp_path / "out", SETTINGS) as conversion:
            if not conversion.done("a"):
                conversion.keep(study(tmp_path, "a"))
            conversion.refuse("a", "train", "id 'a' stands on row 2 too", "row 3")
            conversion.refuse("", "train", "no id", "row 4")
            assert conversion.found == (3 if last else 0)
            if last:
                assert conversion.close()["train"]["refused"] == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"report": " \n"}, "field `report`: empty"),
        ({"images": ()}, "field `images`"),
        ({"said": (7, *[None] * 13)}, "field `labels.said`"),
        ({"findings": "half \ud83d"}, "field `findings`"),
        ({"split": "../train"}, "field `split`: '../train'"),
    ],
)
def test_what_the_trainer_would_not_read_is_refused_and_the_rest_kept(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    bad = Study(**{**vars(study(tmp_path, "bad")), **changes})
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        assert not conversion.keep(bad, "list.csv, line 2")
        assert conversion.done("bad")
        assert conversion.keep(study(tmp_path, "good"))
        conversion.close()
    assert [item.id for item in read_manifest(tmp_path / "out" / "manifest.jsonl")] == ["good"]
    (row,) = refused(tmp_path / "out")
    assert expected in row["reason"] and row["where"] == "list.csv, line 2"
    assert not (tmp_path / "reports_train.csv").exists()


def test_a_report_that_is_no_text_is_written_with_its_escape(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "good"))
        assert not conversion.keep(study(tmp_path, "bad", report="half \ud83d"))
        conversion.close()
    assert read_reports_csv(tmp_path / "out" / "reports.csv")["bad"] == "half \\ud83d"


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        ("b", "'b' was refused"),
        ("x", "'x' was not read"),
        ("a", "its own prior"),
        ("q", "'q' is of patient 'p2', not 'p1'"),
    ],
)
def test_a_prior_that_was_not_kept_stops_the_whole_and_changes_no_file(
    tmp_path: Path, prior: str, expected: str
) -> None:
    output = tmp_path / "out"
    with Conversion(output, SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "q", patient_id="p2"))
        conversion.refuse("b", "train", "no image")
        conversion.keep(study(tmp_path, "a", prior=prior))
        with pytest.raises(ManifestError) as error:
            conversion.close()
    assert (
        "study 'a', field `prior`" in str(error.value)
        and expected in str(error.value)
        and JOURNAL_FILE in str(error.value)
    )
    assert files(output) == {"prepare.json", JOURNAL_FILE}


def test_a_prior_may_come_later(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "b", prior="a"))
        conversion.keep(study(tmp_path, "a"))
        conversion.close()
    assert read_manifest(tmp_path / "out" / "manifest.jsonl")[0].prior == "a"


def test_nothing_kept_names_the_first_reason_and_leaves_the_list_and_the_reports(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Conversion(output, SETTINGS) as conversion:
        conversion.refuse("a", "train", "no image; fetch it", "list.csv, line 2", report="Clear.")
        conversion.refuse("b", "test", "another")
        with pytest.raises(
            ValueError,
            match=r"all 2 .*'a' \(list.csv, line 2\).*no image; fetch it",
        ):
            conversion.close()
    assert len(refused(output)) == 2
    assert read_reports_csv(output / "reports_train.csv") == {"a": "Clear."}
    assert not {"manifest.jsonl", JOURNAL_FILE} & files(output) and not any(
        name.endswith(".tmp") for name in files(output)
    )


def test_nothing_read_says_so(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion, pytest.raises(ValueError, match="no study"):
        conversion.close()


def test_a_manifest_that_stands_is_left_where_nothing_is_kept_any_more(tmp_path: Path) -> None:
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "a"))
        conversion.close()
    with Conversion(tmp_path / "out", SETTINGS) as conversion:
        conversion.refuse("a", "train", "the disk of images is not mounted")
        with pytest.raises(ValueError, match="all 1 "):
            conversion.close()
    assert [item.id for item in read_manifest(tmp_path / "out" / "manifest.jsonl")] == ["a"]


def test_a_close_that_is_interrupted_is_closed_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    replaced: list[str] = []
    replace = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if len(replaced) == 2:
            raise OSError("interrupted")
        replaced.append(target.name)
        replace(source, target)

    with Conversion(output, SETTINGS) as conversion:
        conversion.keep(study(tmp_path, "a"))
        conversion.refuse("b", "train", "no image", report="Read.")
        monkeypatch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="interrupted"):
            conversion.close()
        monkeypatch.undo()
    assert "manifest.jsonl" not in files(output) and not any(name.endswith(".tmp") for name in files(output))
    with Conversion(output, SETTINGS) as conversion:
        assert conversion.done("a") and conversion.done("b")
        conversion.close()
    assert [item.id for item in read_manifest(output / "manifest.jsonl")] == ["a"]
    with open(output / "reports.csv", newline="") as file:
        assert list(csv.reader(file)) == [["id", "report"], ["a", "Report of a, clear."], ["b", "Read."]]


def shown(counts: dict[str, dict[str, int]]) -> list[list[str]]:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(outcome_table("Title", counts))
    return [
        row.replace("│", " ").replace("┃", " ").split() for row in console.export_text().splitlines() if row[:1] in "│┃"
    ]


def test_the_closing_table_has_a_total_and_rendered_only_where_any_was() -> None:
    counts = {
        "train": {"read": 1200, "kept": 1000, "rendered": 0, "refused": 200},
        "": {"read": 1, "kept": 0, "rendered": 0, "refused": 1},
    }
    rows = [["train", "1,200", "1,000", "200"], ["(none)", "1", "0", "1"], ["total", "1,201", "1,000", "201"]]
    assert shown(counts) == [["split", "read", "kept", "refused"], *rows]
    counts["train"]["rendered"] = 3
    assert shown(counts)[0] == ["split", "read", "kept", "rendered", "refused"] and shown(counts)[-1][3] == "3"
