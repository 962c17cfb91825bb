"""Reports as people dictate them: headings of every kind, merged, missing and repeated. All texts are of our own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrg_r1.data.prepare.mimic_cxr.sections import read_report, split_sections

LUNGS = "The lungs are clear. No effusion."
NORMAL = "No acute process."

CASES: dict[str, tuple[str, dict[str, str | None]]] = {
    "everything in its place": (
        f"""
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough  // pneumonia

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 {LUNGS}

 IMPRESSION:

 {NORMAL}
""",
        {
            "findings": LUNGS,
            "impression": NORMAL,
            "indication": "___ year old woman with cough // pneumonia",
            "comparison": "None.",
            "last_paragraph": None,
        },
    ),
    "text on the heading's line": (
        f"FINDINGS: {LUNGS}\nIMPRESSION: {NORMAL}",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "wrapped and indented": (
        "    FINDINGS:  The lungs\n        are   clear. No\n\teffusion.\n\n    IMPRESSION:\n      No acute\n      "
        "process.",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "windows line ends": (
        f"FINDINGS:\r\n{LUNGS}\r\n\r\nIMPRESSION:\r\n{NORMAL}\r\n",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "mixed case": (f"Findings: {LUNGS}\nImpression: {NORMAL}", {"findings": LUNGS, "impression": NORMAL}),
    "alone on their lines without a colon": (
        f"FINDINGS\n{LUNGS}\n\nImpression\n{NORMAL}",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "capitals without a colon before text": (
        f"FINDINGS {LUNGS}\nIMPRESSION  {NORMAL}",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "a blank before the colon": (
        f"FINDINGS : {LUNGS}\nIMPRESSION :\n{NORMAL}",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "a word of running text is no heading": (
        "FINDINGS: Two new\nfindings: a nodule and\nimpression on the trachea. History of\nhistory is "
        "unchanged.\nImpression A says so.",
        {
            "findings": "Two new findings: a nodule and impression on the trachea. History of history is unchanged. "
            "Impression A says so.",
            "impression": None,
            "indication": None,
        },
    ),
    "capitals throughout": (
        "FINDINGS: THE LUNGS SHOW\nFINDINGS CONSISTENT WITH EDEMA.\nIMPRESSION: EDEMA.",
        {"findings": "THE LUNGS SHOW FINDINGS CONSISTENT WITH EDEMA.", "impression": "EDEMA."},
    ),
    "all on one line": (
        f"HISTORY: Cough. COMPARISON: None. FINDINGS: {LUNGS} IMPRESSION: {NORMAL}",
        {"indication": "Cough.", "comparison": "None.", "findings": LUNGS, "impression": NORMAL},
    ),
    "a heading behind two blanks": (
        f"FINDINGS: {LUNGS[:-1]}  IMPRESSION: {NORMAL}",
        {"findings": LUNGS[:-1], "impression": NORMAL},
    ),
    "findings and impression as one": (
        f"FINDINGS AND IMPRESSION: {LUNGS}",
        {"findings": LUNGS, "impression": None, "combined": True},
    ),
    "findings/impression as one": (
        f"FINDINGS/IMPRESSION:\n\n{LUNGS}",
        {"findings": LUNGS, "impression": None, "combined": True},
    ),
    "impression & findings as one": (
        f"IMPRESSION & FINDINGS\n{LUNGS}",
        {"findings": LUNGS, "impression": None, "combined": True},
    ),
    "comparison and findings as one": (
        f"COMPARISON AND FINDINGS: {LUNGS}",
        {"findings": LUNGS, "comparison": None, "combined": False},
    ),
    "only an impression": (
        f"REASON FOR EXAM: Fever.\n\nIMPRESSION: {NORMAL}",
        {"findings": None, "impression": NORMAL, "indication": "Fever."},
    ),
    "only findings": (f"FINDINGS: {LUNGS}", {"findings": LUNGS, "impression": None}),
    "one finding": (
        f"FINDING: {LUNGS}\nIMPRESSION: {NORMAL}",
        {"findings": LUNGS, "impression": NORMAL, "combined": False},
    ),
    "letters that only look like a heading's": (
        "F\u0130ND\u0130NG\u017f: Clear.",
        {"findings": None, "impression": None},
    ),
    "an addendum alone": (
        "FINAL ADDENDUM\nThe side was given wrong in what was dictated.",
        {"findings": None, "last_paragraph": None},
    ),
    "a conclusion": (f"FINDINGS: {LUNGS}\nCONCLUSION: {NORMAL}", {"impression": NORMAL}),
    "an empty findings section": (f"FINDINGS:\n\nIMPRESSION: {NORMAL}", {"findings": None, "impression": NORMAL}),
    "findings in paragraphs": (
        "FINDINGS:\n\nThe lungs are clear.\n\nNo effusion.\n\nIMPRESSION:\n\n1.  One.\n\n2.  Two.",
        {"findings": LUNGS, "impression": "1. One. 2. Two."},
    ),
    "subheadings stay within findings": (
        "FINDINGS:\nLUNGS: Clear.\nHEART: Normal.\nPORTABLE CHEST: Rotated.\nIMPRESSION: Normal.",
        {"findings": "LUNGS: Clear. HEART: Normal. PORTABLE CHEST: Rotated.", "impression": "Normal."},
    ),
    "findings dictated twice": (
        "FINDINGS: The lungs are clear.\nTECHNIQUE: PA.\nFINDINGS: No effusion.",
        {"findings": LUNGS},
    ),
    "a line of underscores within findings": (
        f"FINDINGS: The lungs are clear.\n{'_' * 60}\nNo effusion.\nIMPRESSION: {NORMAL}",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "de-identified words stay": (
        "FINDINGS: In comparison with ___, Dr. ___ saw\n ___\nno change.\nIMPRESSION: ___.",
        {"findings": "In comparison with ___, Dr. ___ saw ___ no change.", "impression": "___."},
    ),
    "history, then a title of the view": (
        f"HISTORY: Cough.\n\nPORTABLE AP CHEST: {LUNGS}\n\nIMPRESSION: {NORMAL}",
        {"findings": LUNGS, "impression": NORMAL, "indication": "Cough."},
    ),
    "a title of the view with more words": (f"FRONTAL AND LATERAL VIEWS OF THE CHEST:\n{LUNGS}", {"findings": LUNGS}),
    "a title of the view and findings": (
        f"CHEST, PA AND LATERAL: Two films were taken this morning.\n\nFINDINGS: {LUNGS}",
        {"findings": LUNGS},
    ),
    "a title of the view that says nothing": (
        f"PORTABLE CHEST: ___ at 5:12\nIMPRESSION: {NORMAL}",
        {"findings": None, "impression": NORMAL},
    ),
    "a wet read before the final report": (
        f"WET READ: ___ SUN 9:43 PM\n FINDINGS: Maybe a nodule.\n IMPRESSION: Nodule?\n{'_' * 78}\n   FINAL REPORT\n"
        f" FINDINGS: {LUNGS}\n IMPRESSION: {NORMAL}",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "a wet read behind the final report": (
        f"FINAL REPORT\nFINDINGS: {LUNGS}\nIMPRESSION: {NORMAL}\nWET READ VERSION #1: No nodule.",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "a wet read without a final report": (f"WET READ: Clear.\nFINDINGS: {LUNGS}", {"findings": LUNGS}),
    "an addendum before": (
        f"          FINAL ADDENDUM\n The side was given wrong.\n\n          FINAL REPORT\n FINDINGS: {LUNGS}\n "
        f"IMPRESSION: {NORMAL}",
        {"findings": LUNGS, "impression": NORMAL, "last_paragraph": None},
    ),
    "numbered addenda behind": (
        f"FINDINGS: {LUNGS}\nIMPRESSION: {NORMAL}\nADDENDUM #1: Dr. ___ was told.\n\nADDENDUM 2\nAnd told again.",
        {"findings": LUNGS, "impression": NORMAL},
    ),
    "recommendations and notifications are not the impression": (
        f"IMPRESSION: {NORMAL}\n\nRECOMMENDATION(S): CT of the chest.\n\nNOTIFICATION: Dr. ___ was told at 9:00.",
        {"impression": NORMAL},
    ),
    "history and indication": (
        "INDICATION: Cough.\nCLINICAL HISTORY: Fever.\nFINDINGS: Clear.",
        {"indication": "Cough. Fever.", "findings": "Clear."},
    ),
    "text behind the history that no heading names": (
        f"HISTORY: Cough\nand fever.\n\n{LUNGS}\n\nIMPRESSION: {NORMAL}",
        {"indication": "Cough and fever.", "findings": None, "impression": NORMAL, "last_paragraph": None},
    ),
    "no headings": (
        f"CHEST X-RAY\n\nA title that is long enough here.\n\n{LUNGS}\n\nDr. ___",
        {"findings": None, "last_paragraph": LUNGS},
    ),
    "history and no other heading": (
        f"HISTORY: Cough.\n\n{LUNGS}",
        {"indication": "Cough.", "findings": None, "impression": None, "last_paragraph": LUNGS},
    ),
    "nothing": (
        "  \n \n",
        {"findings": None, "impression": None, "indication": None, "comparison": None, "last_paragraph": None},
    ),
    "only a banner": ("FINAL REPORT", {"findings": None, "last_paragraph": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_report_is_read_as_a_person_would(case: str) -> None:
    text, expected = CASES[case]
    report = vars(read_report(text))
    assert {key: report[key] for key in expected} == expected


def squeezed(text: str) -> str:
    return "".join(text.split())


PIECES = [
    *(
        "FINDINGS",
        "Findings",
        "IMPRESSION",
        "impression",
        "FINAL REPORT",
        "FINAL ADDENDUM",
        "ADDENDUM #2",
        "WET READ",
        "HISTORY",
        "COMPARISON",
        "IMPRESION",
        "FINDNGS",
        "SUMMARY",
    ),
    *(
        "AND",
        "/",
        "&",
        ",",
        ":",
        ".",
        "-",
        "(S)",
        "RECOMMENDATION(S)",
        "\n",
        "\n\n",
        " ",
        "  ",
        "_" * 12,
        "___",
        "1.",
        "#1",
        "clear",
        "Clear",
    ),
    *("PORTABLE CHEST", "TWO VIEWS", "\u2028", "\x1c", "\u212a", "\u017f", "\u0130", "\xa0", "\r", "é", "\0", "\ud800"),
]


@given(
    st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=30).map("".join))
)
def test_any_text_is_cut_without_losing_or_moving_a_letter(text: str) -> None:
    sections = split_sections(text)
    assert "".join(squeezed(section.heading + section.text) for section in sections) == squeezed(text)
    report = read_report(text)
    for value in (report.findings, report.impression, report.indication, report.comparison, report.last_paragraph):
        assert value is None or (value.strip() == value != "" and value == " ".join(value.split()))
    for section in sections:
        if section.name in ("findings", "impression", "indication", "comparison") and section.text:
            assert section.text in str(vars(report)[section.name])


SENTENCE = st.lists(st.text("abcdefghij", min_size=1, max_size=8), min_size=1, max_size=12).map(
    lambda words: " ".join(words).capitalize() + "."
)
SENTENCES = st.lists(SENTENCE, min_size=1, max_size=6)
BREAKS = st.sampled_from([" ", "\n", "\n ", "\n\n", "  ", "\n\n   "])


@given(SENTENCES, SENTENCES, SENTENCES, st.data())
def test_no_sentence_of_the_findings_is_lost_and_none_is_added(
    findings: list[str], impression: list[str], history: list[str], data: st.DataObject
) -> None:
    def told(sentences: list[str]) -> str:
        return "".join(
            re.sub(" ", lambda _: data.draw(st.sampled_from([" ", "\n "])), text) + data.draw(BREAKS)
            for text in sentences
        )

    mark = data.draw(st.sampled_from([":", ": ", ":\n", ":\n\n", " :  ", "\n"]))
    text = f"HISTORY{mark}{' '.join(history)}\n\nFINDINGS{mark}{told(findings)}\nIMPRESSION{mark}{told(impression)}"
    report = read_report(text)
    assert report.findings == " ".join(findings)
    assert report.impression == " ".join(impression)
    assert report.indication == " ".join(history)
