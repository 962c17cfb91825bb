"""A report without a word, or with a missing value that is written out, is no report: wherever reports are read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mrg_r1.data.prepare.iu_xray.convert import convert_iu_xray, read_iu_xray
from mrg_r1.data.prepare.mimic_cxr.convert import Choices, prepare_mimic_cxr
from mrg_r1.data.prepare.own_studies import prepare_manifest
from mrg_r1.data.prepare.tabular import RowError, read_records, study_of_row
from mrg_r1.data.study import ManifestError, manifest_line, read_manifest
from mrg_r1.labels.missing import is_missing, report_fault
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.labels.reports import read_labelled_reports, read_reports_csv
from mrg_r1.score.reading import read_side
from mrg_r1.types import Study
from tests.data.prepare.mimic_cxr.mimic_tree import ONE, TWO, TreeStudy, write_tree
from tests.data.test_images import noise

EMPTY = [
    *("", "   ", "\n\t", "\xa0", "\u200b\u200b", "\ufeff", "\u2060\u200d", "\u00ad", "\u2028", "\x00", "\x1b"),
    *("\u3164", "\u2800", "\ue000", "\u202e\u202c"),
]
WORDLESS = [
    ".",
    "-",
    "--",
    "...",
    "?!",
    "•",
    "***",
    "12",
    "3.5",
    "___",
    "XXXX",
    "xxxx",
    "FINDINGS: IMPRESSION:",
    "XXXX. ___",
    "\u200b.\u200b",
    "🙂",
]
MISSING = [
    *("nan", "NaN", "NAN", "None", "NONE", "none.", "N/A", "n/a", "NA", "n.a.", "null", "NULL", "<NA>", "#N/A", "NaT"),
    *(
        "nan nan",
        "NaN\nNaN",
        "None, none",
        "nan|nan",
        "\\N",
        "(blank)",
        "n/a,",
        "*nan*",
        "{nan}",
        "-nan(ind)",
        "No data.",
    ),
    *("#SPILL!", "\uff2e\uff21\uff2e", "unknown", "-inf", "FINDINGS: nan IMPRESSION: nan", "Findings: N/A"),
    *("-nan", "nil", "#NAME?", "#REF!", "1.#IND", " nan ", "\ufeffNaN", "n\u200ban", "'None'", "(null)", "n / a"),
]
REPORTS = [
    "Clear.",
    "\ufeffClear.",
    "No nan.",
    "Normal",
    "NAD",
    "Nil acute.",
    "XXXX is normal.",
    "正常",
    "None seen.",
    "Ü",
    "Normal.",
    "NAD.",
    "No change.",
    "Unknown nodule.",
    "Nan Goldin line.",
    "Impression: Normal.",
    "None. Clear.",
]
PLAIN = {"id": "a", "images": "1.png", "report": "Clear.", "split": "train"}


@pytest.mark.parametrize("text", [*EMPTY, *WORDLESS, *MISSING])
def test_what_is_no_report(text: str) -> None:
    assert report_fault(text)


@pytest.mark.parametrize("text", REPORTS)
def test_what_is_a_report(text: str) -> None:
    assert report_fault(text) is None


def table(path: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_own_studies_without_a_report_are_refused_with_their_row(tmp_path: Path, kind: str) -> None:
    noise(8, 8).save(tmp_path / "1.png")
    texts = [text for text in [*EMPTY, *WORDLESS, *MISSING] if kind == "jsonl" or "\0" not in text]
    rows = [{**PLAIN, "id": f"s{place}", "report": text} for place, text in enumerate([*texts, *REPORTS])]
    source = table(tmp_path / f"mine.{kind}", rows, kind)
    where = {record.values["id"]: record.where for record in read_records(source)}
    prepare_manifest(source, None, tmp_path / "out")
    kept = {study.id: study.report for study in read_manifest(tmp_path / "out" / "manifest.jsonl")}
    assert list(kept.values()) == REPORTS
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert {row["id"]: row["where"] for row in refused} == {
        f"s{place}": where[f"s{place}"] for place in range(len(texts))
    }
    assert all("`report`" in row["reason"] for row in refused)
    assert list(read_reports_csv(tmp_path / "out" / "reports.csv").values()) == REPORTS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("id", text) for text in ("nan", "None", "<NA>")),
        *(("patient_id", text) for text in ("NaN", "N/A")),
        ("prior", "None"),
        *((field, "nan") for field in ("indication", "comparison", "findings", "impression")),
        ("indication", "NULL"),
    ],
)
def test_a_manifest_with_a_missing_value_as_a_name_or_in_a_context_is_refused(
    tmp_path: Path, field: str, value: str
) -> None:
    noise(8, 8).save(tmp_path / "1.png")
    line = json.loads(manifest_line(one(tmp_path), tmp_path))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**line, field: value}) + "\n")
    with pytest.raises(ManifestError, match=f"line 1.*field `{field}`: .*missing value written out"):
        read_manifest(tmp_path / "manifest.jsonl")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**line, "comparison": "None."}) + "\n")
    assert read_manifest(tmp_path / "manifest.jsonl")[0].comparison == "None."  # an answer


@pytest.mark.parametrize("text", ["\u200b", "nan", "."])
def test_a_manifest_with_such_a_report_is_refused(tmp_path: Path, text: str) -> None:
    noise(8, 8).save(tmp_path / "1.png")
    (study,) = (
        study_of_row(record, tmp_path, ("train",))
        for record in read_records(table(tmp_path / "one.csv", [PLAIN], "csv"))
    )
    line = json.loads(manifest_line(study, tmp_path))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**line, "report": text}) + "\n")
    with pytest.raises(ManifestError, match="line 1.*`report`"):
        read_manifest(tmp_path / "manifest.jsonl")


def one(tmp_path: Path, **values: Any) -> Study:
    (record,) = read_records(table(tmp_path / "one.csv", [{**PLAIN, **values}], "csv"))
    return study_of_row(record, tmp_path, ("train",))


@pytest.mark.parametrize("field", ["id", "patient_id"])
@pytest.mark.parametrize("value", ["nan", "None", "N/A", "<NA>"])
def test_a_name_that_is_a_missing_value_is_refused(tmp_path: Path, field: str, value: str) -> None:
    with pytest.raises(RowError, match=f"`{field}`"):
        one(tmp_path, **{field: value})


@pytest.mark.parametrize("field", ["id", "patient_id", "split", "prior"])
def test_a_name_with_what_cannot_be_seen_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(RowError, match=f"`{field}`"):
        one(tmp_path, **{field: "train\u200b"})


def test_a_context_that_is_missing_is_null_and_an_answer_is_not(tmp_path: Path) -> None:
    study = one(tmp_path, indication="nan", comparison="None.", findings="\u200b", impression="NULL", prior="None")
    assert (study.indication, study.findings, study.impression, study.prior) == (None, None, None, None)
    assert study.comparison == "None." and is_missing("None.") and not is_missing("None.", words=False)


@pytest.mark.parametrize("text", ["nan", "\u200b", "___"])
def test_kaggle_and_mimic_sections_without_a_word_are_not_learned(tmp_path: Path, text: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    noise(8, 8).save(images / "1_IM-0001-1001.dcm.png")
    noise(8, 8).save(images / "2_IM-0001-1001.dcm.png")
    columns = ["uid", "findings", "impression", "indication", "comparison"]
    rows = [dict(zip(columns, ["1", text, "Normal.", "nan", "NaN"], strict=True))]
    rows.append(dict(zip(columns, ["2", "Clear.", "Normal.", "", ""], strict=True)))
    table(tmp_path / "indiana_reports.csv", rows, "csv")
    projections = [
        {"uid": uid, "filename": f"{uid}_IM-0001-1001.dcm.png", "projection": "Frontal"} for uid in ("1", "2")
    ]
    table(tmp_path / "indiana_projections.csv", projections, "csv")
    collection = read_iu_xray(tmp_path / "indiana_reports.csv")
    for report, expected in (("findings", ["Clear."]), ("both", ["Normal.", "Clear.\nNormal."])):
        convert_iu_xray(collection, images, tmp_path / report, report=report)  # type: ignore[arg-type]
        studies = read_manifest(tmp_path / report / "manifest.jsonl")
        assert [study.report for study in studies] == expected
        assert all((study.indication, study.comparison) == (None, None) for study in studies)

    bad = TreeStudy(TWO.subject, TWO.study, report=f"FINDINGS: {text}\nIMPRESSION: Normal.")
    vague = TreeStudy(10000999, 50000003, report=f"INDICATION: {text}\nFINDINGS: Clear.\nIMPRESSION: {text}")
    write_tree(tmp_path / "mimic", [ONE, bad, vague])
    counts = prepare_mimic_cxr(tmp_path / "mimic", tmp_path / "mimic_out", choices=Choices()).counts
    assert sum(count["refused"] for count in counts.values()) == 1
    indications = {study.id: study.indication for study in read_manifest(tmp_path / "mimic_out" / "manifest.jsonl")}
    assert indications[f"s{vague.study}"] in (None, "___")


@pytest.mark.parametrize("text", ["nan", "\u200b", "-"])
def test_a_labeler_is_not_taught_such_a_report(tmp_path: Path, text: str) -> None:
    table(tmp_path / "reports.csv", [{"id": "a", "report": "Clear."}, {"id": "b", "report": text}], "csv")
    table(tmp_path / "labels.csv", [{"id": name, **dict.fromkeys(OBSERVATIONS, "")} for name in "ab"], "csv")
    with pytest.raises(ValueError, match="line 3.*'b'"):
        read_labelled_reports(tmp_path / "reports.csv", tmp_path / "labels.csv")


@pytest.mark.parametrize("text", ["nan", "None", "N/A"])
def test_a_csv_of_reports_with_a_missing_value_written_out_is_refused_with_its_row(tmp_path: Path, text: str) -> None:
    rows = [{"id": "a", "report": "Clear."}, {"id": "b", "report": ""}, {"id": "c", "report": text}]
    with pytest.raises(ValueError, match=r"line 4, id 'c', field `report`"):
        read_reports_csv(table(tmp_path / "reports.csv", rows, "csv"))
    with pytest.raises(ValueError, match=r"line 2, field `id`"):
        read_reports_csv(table(tmp_path / "reports.csv", [{"id": text, "report": "Clear."}], "csv"))
    assert read_reports_csv(table(tmp_path / "reports.csv", rows[:2], "csv")) == {"a": "Clear.", "b": ""}


@pytest.mark.parametrize("header", ["id,report,Report", "id,ID,report"])
def test_a_csv_of_reports_with_a_column_twice_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "reports.csv").write_text(f"{header}\na,Clear.,Effusion.\n")
    with pytest.raises(ValueError, match="line 1: columns .*twice"):
        read_reports_csv(tmp_path / "reports.csv")


@pytest.mark.parametrize("name", ["p.csv", "column.csv", "p.txt", "p.json", "p.jsonl"])
@pytest.mark.parametrize("role", ["predicted", "reference"])
def test_a_score_of_a_missing_value_written_out_is_refused(tmp_path: Path, name: str, role: Any) -> None:
    def side(text: str) -> Any:
        rows = [{"id": "a", "report": "Clear."}, {"id": "b", "report": text}]
        if name == "p.json":
            (tmp_path / name).write_text(json.dumps(rows))
        elif name in ("p.csv", "p.jsonl"):
            table(tmp_path / name, rows, name.rpartition(".")[2])
        else:
            (tmp_path / name).write_text(f"Clear.\n{text}\n")
        return read_side(tmp_path / name, role)

    with pytest.raises(ValueError, match="missing value written out"):
        side("nan")
    if role == "reference":
        with pytest.raises(ValueError, match="missing value written out"):
            side("N/A")
    else:
        assert "None." in side("None.").texts.values()  # which a policy may write
    assert "Normal." in side("Normal.").texts.values()


@pytest.mark.parametrize("study_id", ["nan", "None", "<NA>"])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "labels.csv"])
def test_a_score_of_a_study_without_a_name_is_refused(tmp_path: Path, name: str, study_id: str) -> None:
    row = (
        {"id": study_id, "report": "Clear."} if name != "labels.csv" else {"id": study_id} | dict.fromkeys(OBSERVATIONS)
    )
    path = table(tmp_path / name, [row], name.rpartition(".")[2]) if name != "p.json" else tmp_path / name
    if name == "p.json":
        path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="field `id`: .*missing value written out"):
        read_side(path, "predicted")


def test_what_a_run_wrote_is_scored_as_it_is(tmp_path: Path) -> None:
    row = {"id": "a", "prediction": "nan", "reference": "Clear."}
    side = read_side(table(tmp_path / "test_predictions.jsonl", [row], "jsonl"), "predicted")
    assert side.texts == {"a": "nan"}
