"""BLEU, ROUGE-L, CIDEr and METEOR of texts whose scores are known by hand, and the cleaning that goes with them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mrg_r1.metrics import lexical
from mrg_r1.metrics.lexical import NAMES, SOURCES, clean, lexical_scores, why_no_meteor


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def test_bleu_and_rouge_are_those_of_the_formulas(no_java: None) -> None:
    predicted, reference = ["the heart is large", "a b c"], ["the heart is not large", "a x c d"]
    scores = lexical_scores(predicted, reference).scores
    # unigrams 4/4 + 2/3; bigrams "the heart", "heart is" of 3, none of 2; 7 words against 9
    brevity = math.exp(1 - 9 / 7)
    assert scores["bleu_1"] == pytest.approx(brevity * 6 / 7)
    assert scores["bleu_2"] == pytest.approx(brevity * math.sqrt(6 / 7 * 2 / 5))
    assert scores["bleu_3"] == pytest.approx(brevity * (6 / 7 * 2 / 5 * 1 / 3) ** (1 / 3))
    f = [(1 + 1.44) * p * r / (r + 1.44 * p) for p, r in ((4 / 4, 4 / 5), (2 / 3, 2 / 4))]
    assert scores["rouge_l"] == pytest.approx(sum(f) / 2)


def test_a_text_against_itself_has_the_highest_scores(no_java: None) -> None:
    texts = ["the heart is large today .", "no effusion is seen at all .", "both lungs are clear again ."]
    result = lexical_scores(texts, texts)
    assert list(result.scores) == [name for name in NAMES if name != "meteor"]
    assert [result.scores[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1] * 4)
    assert result.scores["rouge_l"] == pytest.approx(1) and result.scores["cider"] == pytest.approx(10)


def test_empty_texts_score_nothing_and_break_nothing(no_java: None) -> None:
    scores = lexical_scores(["", "", "clear"], ["", "x", ""]).scores
    assert all(value == pytest.approx(0, abs=1e-6) for name, value in scores.items() if name != "meteor")


def test_cider_is_left_out_where_its_weights_are_nothing(no_java: None) -> None:
    result = lexical_scores(["clear"], ["clear"])
    assert "cider" not in result.scores and result.left_out["cider"].startswith("CIDEr left out: ")


def test_meteor_is_left_out_with_its_reason(no_java: None) -> None:
    result = lexical_scores(["clear"], ["clear"])
    assert "meteor" not in result.scores and result.left_out["meteor"] == "METEOR left out: no java on PATH"


def test_a_java_that_does_not_run_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert why_no_meteor() == f"{tmp_path}/java does not run (exit status 3)"


def test_a_java_that_ends_while_it_scores_costs_meteor_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "java").write_text('#!/bin/sh\n[ "$1" = -version ]\n')
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    result = lexical_scores(["a b", "c"], ["a b", "d"])
    assert result.left_out["meteor"].startswith("METEOR left out: java ended") and result.scores[
        "rouge_l"
    ] == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.skipif(why_no_meteor() is not None, reason=f"METEOR: {why_no_meteor()}")
def test_meteor_is_that_of_its_own_program(capfd: pytest.CaptureFixture[str]) -> None:
    predicted, reference = ["the heart is large", "no effusion", ""], ["the heart is large", "no effusion", "clear"]
    result = lexical_scores(predicted, reference)
    assert not result.left_out and list(result.scores) == list(NAMES)
    # printed by `java -jar meteor-1.5.jar ... -l en -norm -q`
    assert result.scores["meteor"] == pytest.approx(0.8247422680412372)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed(no_java: None, capfd: pytest.CaptureFixture[str]) -> None:
    lexical_scores(["a b c", "d"], ["a b d", "d"])
    assert capfd.readouterr() == ("", "")


def test_every_metric_says_what_it_is() -> None:
    assert tuple(SOURCES) == NAMES and lexical.package().startswith("pycocoevalcap ")


@pytest.mark.parametrize(("cleaning", "kept"), [("raw", 200), ("r2gen-iu", 59), ("r2gen-mimic", 99)])
def test_references_are_cut_where_r2gen_cuts_them(cleaning: lexical.Cleaning, kept: int) -> None:
    long = " ".join(["word"] * 200)
    assert len(clean(long, cleaning, reference=True).split()) == kept
    assert len(clean(long, cleaning, reference=False).split()) == (kept if cleaning == "raw" else kept + 1)


@pytest.mark.parametrize(
    ("text", "iu", "mimic"),
    [
        ("The Heart, is normal. Lungs: clear.", "the heart is normal . lungs clear .", None),
        ("1. Normal heart.  2. Clear (lungs).", "normal heart . . clear lungs .", "normal heart . clear lungs ."),
        ("Well-aerated; T10/T11 <3 cm> \"x\" it's", "well-aerated t10t11 3 cm x its .", None),
        ("Stable... No change", "stable . no change .", None),
        ("Seen by ___ on ____.\nStable", "seen by on stable .", "seen by on . stable ."),
        ("A. . B", "a . . b .", None),
        ("", ".", None),
    ],
)  # fmt: skip
def test_the_r2gen_cleanings_by_hand(text: str, iu: str, mimic: str | None) -> None:
    assert clean(text, "r2gen-iu", reference=True) == iu
    assert clean(text, "r2gen-mimic", reference=True) == (iu if mimic is None else mimic)


def test_raw_keeps_all_but_white_space() -> None:
    assert clean(" The  Heart,\n\nis\tnormal. ", "raw", reference=True) == "The Heart, is normal."


def test_texts_that_do_not_align_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predicted.*2 reference"):
        lexical_scores(["a"], ["a", "b"])
    with pytest.raises(ValueError):
        lexical_scores([], [])


def test_only_the_scorers_asked_for_are_run():
    said, true = ["no effusion", "the heart is large"], ["no effusion", "the heart is normal"]
    result = lexical_scores(said, true, scorers=["rouge_l"])
    assert set(result.scores) == {"rouge_l"} and result.left_out == {}
    assert result.scores["rouge_l"] == lexical_scores(said, true, scorers=["cider", "rouge_l"]).scores["rouge_l"]
