"""The grammar of completions: what is a report, what may be labelled, what format earns."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrg_r1.report_format import PLAIN_RULES, THINK_RULES, format_score, parse, target_text

# text -> (report, think, rules broken)
THINK_CASES = {
    "<think>heart</think><report>Large heart.</report>": ("Large heart.", "heart", set()),
    "\n <think>\nheart\n</think>\n\n<report> Large\nheart. </report>\n": ("Large\nheart.", "heart", set()),
    "": (None, None, set(THINK_RULES)),
    "Large heart.": (None, None, set(THINK_RULES)),
    "<report>Large heart.</report>": ("Large heart.", None, {"one_think", "think_first", "think_not_empty"}),
    "<think>heart</think>": (None, "heart", {"one_report", "think_first", "report_not_empty"}),
    "<think>heart</think><report>  </report>": (None, "heart", {"report_not_empty"}),
    "<think> </think><report>Large heart.</report>": ("Large heart.", None, {"think_not_empty"}),
    "<report>Large heart.</report><think>heart</think>": ("Large heart.", "heart", {"think_first"}),
    "Sure! <think>heart</think><report>Large heart.</report>": ("Large heart.", "heart", {"nothing_around"}),
    "<think>heart</think> so <report>Large heart.</report>": ("Large heart.", "heart", {"nothing_around"}),
    "<think>heart</think><report>Large heart.</report> Done.": ("Large heart.", "heart", {"nothing_around"}),
    # two reports: none of them is the report, or the policy could answer everything at once
    "<think>a</think><report>x</report><report>y</report>": (
        None,
        "a",
        {"one_report", "think_first", "report_not_empty", "nothing_around"},
    ),
    # cut off inside the report
    "<think>a</think><report>Large hea": (
        None,
        "a",
        {"one_report", "think_first", "report_not_empty", "nothing_around"},
    ),
    # nested and stray tags inside the report
    "<think>a</think><report>x<report>y</report>": (
        None,
        "a",
        {"one_report", "think_first", "report_not_empty", "nothing_around"},
    ),
    "<think>a</think><report>x</think>y</report>": (None, None, set(THINK_RULES)),
    "<report><think>a</think>x</report>": (
        None,
        "a",
        {"one_report", "think_first", "report_not_empty", "nothing_around"},
    ),
    # a report inside an open think block is think text
    "<think>a <report>x</report> b</think>": (
        "inside",
        None,
        {"one_think", "think_first", "think_not_empty", "nothing_around"},
    ),
    "<think>a <report>x</report>": ("inside", None, {"one_think", "think_first", "think_not_empty", "nothing_around"}),
    # malformed think blocks that are closed cost format, not the report
    "a</think><report>x</report>": ("x", None, {"one_think", "think_first", "think_not_empty", "nothing_around"}),
    "<think>a</think><think>b</think><report>x</report>": (
        "x",
        None,
        {"one_think", "think_first", "think_not_empty", "nothing_around"},
    ),
    "<THINK>a</THINK><report>x</report>": (
        "x",
        None,
        {"one_think", "think_first", "think_not_empty", "nothing_around"},
    ),
}


@pytest.mark.parametrize("text", THINK_CASES)
def test_think_mode_takes_completions_apart(text: str) -> None:
    report, think, broken = THINK_CASES[text]
    parsed = parse(text, "think")
    assert parsed.report == (None if report == "inside" else report)
    assert parsed.think == think
    assert {rule for rule, kept in parsed.rules.items() if not kept} == broken
    assert tuple(parsed.rules) == THINK_RULES


@pytest.mark.parametrize("text", THINK_CASES)
def test_think_format_is_all_rules_or_their_share(text: str) -> None:
    broken = THINK_CASES[text][2]
    for ended in (True, False):  # </report> says that the report is whole, the EOS is not asked
        assert format_score(parse(text, "think"), "binary", ended=ended) == (0.0 if broken else 1.0)
        assert format_score(parse(text, "think"), "graded", ended=ended) == pytest.approx((6 - len(broken)) / 6)


@pytest.mark.parametrize(
    ("text", "ended", "report", "binary", "graded"),
    [
        ("  Large heart.\n", True, "Large heart.", 1.0, 1.0),
        ("Large hea", False, "Large hea", 0.0, 0.5),
        (" \n", True, None, 0.0, 0.5),
        ("", False, None, 0.0, 0.0),
        ("<report>x</report>", True, "<report>x</report>", 1.0, 1.0),  # plain mode knows no tags
    ],
)
def test_plain_mode_is_the_whole_text_and_asks_for_its_end(
    text: str, ended: bool, report: str | None, binary: float, graded: float
) -> None:
    parsed = parse(text, "plain")
    assert (parsed.report, parsed.think, tuple(parsed.rules)) == (report, None, PLAIN_RULES)
    assert format_score(parsed, "binary", ended=ended) == binary
    assert format_score(parsed, "graded", ended=ended) == graded


TAGS = ["<think>", "</think>", "<report>", "</report>"]
EVERY_SHORT_COMPLETION = [pieces for count in range(7) for pieces in itertools.product([*TAGS, "heart"], repeat=count)]


def test_think_text_never_becomes_the_report() -> None:
    """Words that stand while a think block is open are marked; no mark and no tag may reach the labeler."""
    reports = 0
    for pieces in EVERY_SHORT_COMPLETION:
        opened = False
        text = ""
        for piece in pieces:
            opened = piece == "<think>" or (opened and piece != "</think>")
            text += "THOUGHT" if opened and piece == "heart" else piece
        report = parse(text, "think").report
        assert report is None or ("THOUGHT" not in report and "<" not in report), text
        reports += report is not None
    assert reports > 100  # the test is not vacuous


def test_full_format_means_a_think_text_then_a_report_and_nothing_else() -> None:
    full = {
        pieces
        for pieces in EVERY_SHORT_COMPLETION
        if format_score(parse("".join(pieces), "think"), "binary", ended=True) == 1.0
    }
    assert full == {("<think>", "heart", "</think>", "<report>", "heart", "</report>")}


TEXTS = st.text(alphabet="abc .\n<>/", min_size=1, max_size=40).filter(lambda text: text.strip() != "")


@settings(deadline=None)
@given(report=TEXTS, think=TEXTS)
def test_targets_are_read_back_with_full_format(report: str, think: str) -> None:
    parsed = parse(target_text(report, think, "think"), "think")
    assert (parsed.report, parsed.think) == (report.strip(), think.strip())
    assert format_score(parsed, "binary", ended=True) == 1.0
    assert parse(target_text(report, None, "plain"), "plain").report == report.strip()


def test_targets_are_the_bare_report_or_both_blocks() -> None:
    assert target_text(" No effusion. ", None, "plain") == "No effusion."
    assert (
        target_text(" No effusion. ", " lungs clear ", "think")
        == "<think>lungs clear</think><report>No effusion.</report>"
    )


@pytest.mark.parametrize(
    ("report", "think", "mode", "message"),
    [
        ("a <report> b", "t", "think", "report.*<report>"),
        ("a </think> b", None, "plain", "report.*</think>"),
        ("a", "t </think>", "think", "think.*</think>"),
        ("", "t", "think", "report: empty"),
        (" \n", None, "plain", "report: empty"),
        ("a", None, "think", "think: empty"),
        ("a", " ", "think", "think: empty"),
        ("a", "t", "json", "mode 'json'"),
    ],
)
def test_targets_that_could_not_be_read_back_are_refused(
    report: str, think: str | None, mode: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        target_text(report, think, mode)  # type: ignore[arg-type]


def test_unknown_mode_and_style_are_refused() -> None:
    with pytest.raises(ValueError, match="mode 'json'"):
        parse("a", "json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="style 'soft'"):
        format_score(parse("a", "plain"), "soft", ended=True)  # type: ignore[arg-type]
