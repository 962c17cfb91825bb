"""A heading that is misspelt opens the section that it means; one that is not known is counted and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrg_r1.cli import main
from mrg_r1.data.prepare.headings import nearest
from mrg_r1.data.prepare.iu_xray.open_i import read_open_i
from mrg_r1.data.prepare.mimic_cxr.sections import read_report
from tests.data.prepare.mimic_cxr.mimic_tree import ONE, TWO, TreeStudy, kept, write_tree

LUNGS, NORMAL = "The lungs are clear. No effusion.", "No acute process."
IMPRESSIONS = [
    *("IMPRESION", "IMPRESSON", "IMPRSSION", "IMPRESSIOM", "IMPRESSSION", "IMRPESSION", "INPRESSION", "MPRESSION"),
    *("IMPRESIONS", "IMPRESIION", "IMPRE SSION", "CONCLUSON", "IMPPRESION"),
]
FINDINGS = ["FINDNGS", "FINDIGNS", "FINDINS", "FIDNINGS", "FINDINGGS", "FNDINGS", "FIINDNGS", "INDINGS", "FINDIN GS"]


@pytest.mark.parametrize("layout", ["{}: ", "{}:\n\n", "  {} : ", "{}\n", "{}; ", "{}.: ", "{}\uff1a"])
@pytest.mark.parametrize("heading", [*IMPRESSIONS, *FINDINGS])
def test_a_misspelt_heading_opens_its_section(heading: str, layout: str) -> None:
    findings, impression = ("FINDINGS", heading) if heading in IMPRESSIONS else (heading, "IMPRESSION")
    text = f"HISTORY: Cough.\n\n{layout.format(findings)}{LUNGS}\n\n{layout.format(impression)}{NORMAL}\n"
    report = read_report(text)
    assert (report.indication, report.findings, report.impression) == ("Cough.", LUNGS, NORMAL)
    assert report.misspelt == ((heading, "impression" if heading in IMPRESSIONS else "findings"),)
    assert report.unknown == ()


def test_other_headings_and_other_places() -> None:
    report = read_report(f"INDCATION: Cough. COMPARSION: None. FINDNGS: {LUNGS[:-1]}.  IMPRESION: {NORMAL}")
    assert (report.indication, report.comparison, report.findings) == ("Cough.", "None.", LUNGS)
    assert report.impression == NORMAL
    merged = read_report(f"FINDINGS AND IMPRESION: {LUNGS}")
    assert merged.combined and merged.findings == LUNGS
    assert read_report(f"Findings: {LUNGS}\nImpresion: {NORMAL}").impression == NORMAL
    with_technique = read_report(f"FINDINGS: {LUNGS}\nTECHNIQE: PA.\nRECOMENDATION(S): CT.\nADENDUM: The side.")
    assert with_technique.findings == LUNGS


@pytest.mark.parametrize("layout", ["{} ", "{} - ", "{}. ", "{}-", "{} \u2013 ", "{}; "])
@pytest.mark.parametrize("headings", [("FINDINGS", "IMPRESSION"), ("FINDNGS", "IMPRESION"), ("FINDINGS", "CONCLUSON")])
def test_a_heading_without_a_colon_opens_its_section_right_or_misspelt(headings: tuple[str, str], layout: str) -> None:
    report = read_report(f"{layout.format(headings[0])}{LUNGS}\n{layout.format(headings[1])}{NORMAL}")
    assert (report.findings, report.impression) == (LUNGS, NORMAL)
    assert [word for word, _ in report.misspelt] == [
        word for word in headings if word in ("FINDNGS", "IMPRESION", "CONCLUSON")
    ]


@pytest.mark.parametrize(
    "heading", ["IMPRESSION AND PLAN", "IMPRESSION/PLAN", "IMPRESION & ADVICE", "CONCLUSION, ADVICE"]
)
@pytest.mark.parametrize("before", ["\n", "  "])
def test_an_impression_beside_a_word_that_is_no_heading_is_one(heading: str, before: str) -> None:
    report = read_report(f"FINDINGS: {LUNGS}{before}{heading}: {NORMAL}")
    assert (report.findings, report.impression) == (LUNGS, NORMAL)
    assert report.misspelt == ((heading, "impression"),) and report.unknown == ()


@pytest.mark.parametrize("text", ["INDICATED by this.", "COMPRESSION Fracture.", "Findings are.", "FINDNGS ARE CLEAR"])
def test_capitals_in_running_text_open_nothing(text: str) -> None:
    assert read_report(f"IMPRESSION: {NORMAL}\n{text}").impression == f"{NORMAL} {text}"


@pytest.mark.parametrize(
    "layout", ["\n{}: Fine.", "  {}: Fine.", " {}: Fine.", "\n{}\nFine.", "\n{}:\nFine.", "\n{}; Fine."]
)
@pytest.mark.parametrize("heading", ["SUMMARY", "X-RAY RESULT", "OPINION/ADVICE"])
def test_an_unknown_heading_is_named_wherever_it_stands(heading: str, layout: str) -> None:
    report = read_report(f"FINDINGS: Clear.{layout.format(heading)}\nIMPRESSION: {NORMAL}")
    assert report.unknown == (heading,) and report.impression == NORMAL


def test_titles_of_views_and_reports_in_capitals_are_not_named() -> None:
    assert (
        read_report(f"FINAL REPORT\nPORTABLE AP CHEST\nWET READ\nFINDINGS: {LUNGS}\nABC\nHeart is fine.").unknown == ()
    )
    assert read_report("THE LUNGS ARE CLEAR\nNO EFFUSION\nNO PNEUMOTHORAX\nIMPRESSION: NORMAL").unknown == ()


@pytest.mark.parametrize(
    "heading",
    [
        *("SUMMARY", "OPINION", "INTERPRETATION", "LUNGS", "COMPRESSION", "DEPRESSION", "CONTUSION", "CONCUSSION"),
        *("OCCLUSION", "MEDICATIONS", "LUNGS AND PLEURA", "HEART/MEDIASTINUM", "STURDY", "DIAGNOSIS"),
    ],
)
def test_an_unknown_heading_stays_where_it_is_and_is_named(heading: str) -> None:
    report = read_report(f"FINDINGS: {LUNGS}\n{heading}: Something.\n{heading}: Again.\nIMPRESSION: {NORMAL}")
    assert report.findings == f"{LUNGS} {heading}: Something. {heading}: Again."
    assert report.impression == NORMAL and report.unknown == (heading,) and report.misspelt == ()


def test_known_headings_titles_and_running_text_are_not_named() -> None:
    report = read_report(
        f"FINAL REPORT\nEXAMINATION: CHEST\nRECOMMENDATION(S): CT.\nPORTABLE CHEST: Rotated.\nFINDINGS: {LUNGS}\n"
        f"Of note: nothing. Impressions\nof the trachea: none.\nIMPRESSION: {NORMAL}\nADDENDUM #2: The side."
    )
    assert report.unknown == () and report.misspelt == () and report.impression == NORMAL


@pytest.mark.parametrize("before", ["\n", "\n  ", " "])
@pytest.mark.parametrize(
    "heading",
    [
        *(
            "**IMPRESSION:**",
            "**IMPRESSION**:",
            "<b>IMPRESSION:</b>",
            "<b>IMPRESSION</b>:",
            "[IMPRESSION]:",
            "## IMPRESSION:",
        ),
        *("IMPRESSI0N:", "IMPRESSION=", "IMPRESSION (PRELIMINARY):", "IMPRESSION (preliminary, read by ___):"),
        *(
            "1. IMPRESSION:",
            "2) IMPRESSION:",
            "- IMPRESSION:",
            "1. **IMPRESSION:**",
            "**IMPRESION:**",
            "1. <b>IMPRESSION:</b>",
        ),
    ],
)
def test_marks_numbers_and_notes_around_a_heading_belong_to_it(heading: str, before: str) -> None:
    report = read_report(f"FINDINGS: {LUNGS}{before}{heading} {NORMAL}")
    assert (report.findings, report.impression, report.unknown) == (LUNGS, NORMAL, ())


@pytest.mark.parametrize(
    "heading",
    [
        *(
            "[IMPRESSION]\n",
            "[IMPRESSION] ",
            "# IMPRESSION\n",
            "# Impression\n",
            "**Impression**\n",
            "**Impression:** ",
        ),
        *("Impression (preliminary): ", "Impression= ", "> IMPRESSION: ", "<b>Impression:</b> "),
    ],
)
def test_marks_around_a_heading_at_the_start_of_its_line_belong_to_it(heading: str) -> None:
    report = read_report(f"# FINDINGS\n{LUNGS}\n{heading}{NORMAL}")
    assert (report.findings, report.impression, report.unknown) == (LUNGS, NORMAL, ())


@pytest.mark.parametrize(
    "text",
    [
        *("1. Findings: as above.", "- Study: limited.", "[COMPARISON: ___] The lungs.", "2. Comparison is made."),
        *("#1 pneumonia.", "* no effusion", "(Study limited.)", "** IMPRESSION of a mass"),
    ],
)
def test_points_of_a_list_and_comments_open_nothing(text: str) -> None:
    assert read_report(f"IMPRESSION: {NORMAL}\n{text}").impression == f"{NORMAL} {text}"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        *((f"{word}: Normal.", word) for word in ("Summary", "Opinion", "Interpretation", "Diagnosis", "Result")),
        *(
            ("OPINION - Normal.", "OPINION"),
            ("OPINION Normal chest is seen.", "OPINION"),
            ("Opinion\nNormal.", "Opinion"),
        ),
        *(("Results = none.", "Results"), ("LUNGS - no change.", "LUNGS"), ("[SUMMARY] Normal.", "SUMMARY")),
        *(("**SUMMARY:** Normal.", "SUMMARY"), ("RADIOLOGIST'S IMPRESSION: Normal.", "RADIOLOGIST'S IMPRESSION")),
        *(("COVID19 SCORE: 2.", "COVID19 SCORE"), ("It is clear. Impression: Normal.", "Impression")),
        ("It is clear. Summary: Normal.", "Summary"),
    ],
)
def test_what_may_open_an_impression_is_named(line: str, named: str) -> None:
    report = read_report(f"FINDINGS: {LUNGS}\n{line}")
    assert report.unknown == (named,) and report.findings == " ".join(f"{LUNGS} {line}".split())


@pytest.mark.parametrize(
    "line",
    [
        *("Results of the CT are known.", "Diagnosis is unclear.", "Seen AT 10:30 AM.", "At 10:30 seen.", "PA - fine."),
        *("LUNGS CLEAR - NO CHANGE.", "CT-guided biopsy.", "AP VIEW - rotated.", "RESULTS ARE KNOWN.", "summary: none"),
    ],
)
def test_running_text_is_not_named(line: str) -> None:
    assert read_report(f"FINDINGS: {LUNGS}\n{line}").unknown == ()


@pytest.mark.parametrize("text", ["*" * 9999, ". " + "* " * 9999, "<b>" * 9999, ".  " + "[" * 9999, "1. " * 9999])
def test_a_line_of_marks_is_read(text: str) -> None:
    assert read_report(text).findings is None  # and soon: patterns that try every way to read them would not end


@pytest.mark.parametrize("word", ["EXAN", "STUDI", "", "LUNGS", "COMPRESSION", "FINDINGS"])
def test_short_right_and_distant_words_mean_nothing(word: str) -> None:
    assert nearest(word, ("EXAM", "STUDY", "FINDINGS", "IMPRESSION"), twice=("FINDINGS", "IMPRESSION")) is None


def test_mimic_cxr_closes_with_the_headings_that_are_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = TreeStudy(10000999, 50000003, report=f"FINDINGS: {LUNGS}\nSUMMARY: {NORMAL}")
    two = TreeStudy(TWO.subject, TWO.study, report=f"FINDNGS: {LUNGS}\nIMPRESION: {NORMAL}\nOPINION: None.")
    four = TreeStudy(10001999, 50000004, report=f"FINDINGS: {LUNGS}\nSUMMARY: {NORMAL}")
    write_tree(tmp_path / "mimic", [ONE, two, three, four])
    assert main(["prepare", "mimic-cxr", str(tmp_path / "mimic"), "-o", str(tmp_path / "out")]) == 0
    rows = {
        tuple(cell.strip() for cell in line.split("│")[1:-1])
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    }
    assert {("FINDNGS", "findings", "1"), ("IMPRESION", "impression", "1")} <= rows
    found = {row[0]: row[2] for row in rows}
    assert (found["SUMMARY"], found["OPINION"]) == ("2", "1") and "LUNGS" not in found
    study = kept(tmp_path)[two.name]
    assert (study.findings, study.impression) == (LUNGS, f"{NORMAL} OPINION: None.")


def test_nothing_is_said_where_every_heading_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "mimic", [ONE])
    assert main(["prepare", "mimic-cxr", str(tmp_path / "mimic"), "-o", str(tmp_path / "out")]) == 0
    assert "heading" not in capsys.readouterr().out


def test_labels_of_open_i_are_read_alike(tmp_path: Path) -> None:
    def section(label: str, text: str) -> str:
        return f'<AbstractText Label="{label}">{text}</AbstractText>'

    sections = section("FINDNGS", LUNGS) + section("IMPRESION", NORMAL) + section("SUMMARY", "x") + section("LUNGS", "")
    (tmp_path / "7.xml").write_text(
        f'<eCitation><uId id="CXR7"/><Abstract>{sections}</Abstract><parentImage id="CXR7_IM-1-1"/></eCitation>'
    )
    collection = read_open_i(tmp_path)
    (study,) = collection.studies
    assert (study.findings, study.impression) == (LUNGS, NORMAL)
    assert dict(collection.headings.unknown) == {"SUMMARY": 1}
    assert set(collection.headings.misspelt) == {("FINDNGS", "findings"), ("IMPRESION", "impression")}
