"""Break-evens: against a loop over the reward's own functions, IU's published numbers, and what the scale leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mrg_r1 import cli
from mrg_r1.data.study import write_manifest
from mrg_r1.labels.observations import OBSERVATIONS, read_labels_csv, signed_vector, write_labels_csv
from mrg_r1.reward.additive import FINDINGS, attainable_f1
from mrg_r1.reward.card.after_scale import after_scale, say_rates
from mrg_r1.reward.card.break_even_tables import break_even_card, break_evens_json, wanted_by_f1, words
from mrg_r1.reward.card.break_evens import ACTIONS, RESTS, break_evens, label_terms, ranges
from mrg_r1.types import Study, StudyImage
from tests.reward.card.constants import best_constant
from tests.shared_data import shared_data

CONSTANT = (0, -1, 0, 0, 0, 0, 0, 0, -1, -1, 0, 0, 0)  # denies Cardiomegaly, Pneumothorax and Effusion


def drawn(size: int, seed: int) -> NDArray[np.int64]:
    """[N, 14] classes; the last observation but No Finding is never said."""
    classes = np.random.default_rng(seed).choice(4, p=[0.4, 0.2, 0.35, 0.05], size=(size, 14))
    classes[:, 12:] = 0
    return classes


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("term", range(4))
def test_the_action_of_each_range_is_the_one_that_earns_most_there(rest: str, term: int) -> None:
    classes = drawn(60, 1)
    one_term = label_terms([0.2], 0.35)[term]
    (found,) = break_evens(classes, [one_term], CONSTANT)
    fixed = [{1: 1, -1: 2, 0: 0}[sign] for sign in CONSTANT] + [0]
    for column, name in enumerate(FINDINGS[:12]):
        there = np.isin(classes[:, column], one_term.present)

        def earns(action: str, p: float, column: int = column, there: NDArray[np.bool_] = there) -> float:
            total = 0.0
            for rows, chance in ((there, p), (~there, 1 - p)):
                rewards = []
                for reference in classes[rows]:
                    report = np.array(reference if rest == "right" else fixed)
                    report[column] = ACTIONS[action]
                    rewards.append(float(one_term.score(report[None], reference[None])[0]))
                total += chance * float(np.mean(rewards))
            return total

        break_even = found.by_rest[rest][name]
        for p in (0.03, 0.2, 0.4, 0.5, 0.62, 0.8, 0.97):
            earned = {action: earns(action, p) for action in ACTIONS}
            best = max(earned.values())
            for action, value in earned.items():
                span = getattr(break_even, action)
                inside = span is not None and span[0] - 1e-4 <= p <= span[1] + 1e-4
                if abs(value - best) > 1e-5:
                    assert not (span is not None and span[0] + 1e-4 < p < span[1] - 1e-4), (name, action, p)
                else:
                    assert inside, (name, action, p)
    assert found.by_rest[rest]["Support Devices"] is None  # never said, so that nothing is known of it


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.05, 0.95), st.permutations(CONSTANT))
def test_the_additive_term_has_the_threshold_for_break_even_on_any_labels(
    seed: int, threshold: float, constant: list[int]
) -> None:
    term = label_terms([], threshold)[-1]
    (found,) = break_evens(drawn(40, seed), [term], constant)
    for rest in RESTS:
        for one in found.by_rest[rest].values():
            assert one is None or one.say_from == pytest.approx(threshold, abs=1e-4)


def test_what_makes_no_difference_is_never_to_be_said() -> None:
    assert ranges({action: (0.5, 0.2) for action in ACTIONS}).say_from is None
    wrong = ranges({"say": (0.1, 0.0), "deny": (0.2, 0.3), "silence": (0.3, 0.1)})
    assert wrong.say_from is None and wrong.say is None
    assert wrong.deny == (0.0, pytest.approx(2 / 3)) and wrong.silence == (pytest.approx(2 / 3), 1.0)


def test_iu_x_ray_has_the_break_evens_that_were_measured_before() -> None:
    """MCCS at 0.5 of the 2,365 train and val reports; another program found them first."""
    classes = np.array(list(read_labels_csv(shared_data() / "iu_xray/chexbert_labels_train_val.csv").values()))
    constant, _ = best_constant(signed_vector(classes), 0.0)
    found, *_ = break_evens(classes, label_terms([0.5], 0.3), constant.tolist())
    expected = {
        "Cardiomegaly": (0.61, 0.53),
        "Pneumothorax": (0.69, 0.63),
        "Pleural Effusion": (0.70, 0.68),
        "Consolidation": (0.62, 0.70),
        "Edema": (0.54, 0.70),
        "Lung Opacity": (0.55, 0.49),
    }
    for name, pair in expected.items():
        for rest, value in zip(RESTS, pair, strict=True):
            assert found.by_rest[rest][name].say_from == pytest.approx(value, abs=0.011), (name, rest)


def test_the_groups_std_leaves_one_half_of_any_threshold_and_the_batchs_leaves_it_as_it_is() -> None:
    classes = drawn(300, 2)
    terms = [label_terms([], threshold)[-1] for threshold in (0.2, 0.4, 0.7)]
    for threshold, after in zip((0.2, 0.4, 0.7), after_scale(classes, terms, CONSTANT), strict=True):
        for name in FINDINGS[:12]:
            assert after.unscaled["right"][name] == pytest.approx(threshold, abs=0.02)
            assert after.unscaled["drawn"][name] == pytest.approx(threshold, abs=0.08)
            assert after.group["right"][name] == pytest.approx(0.5, abs=0.02)
            assert after.group["constant"][name] == pytest.approx(0.5, abs=0.02)
            # where the rest differs too it hides some of the std
            between = sorted((threshold, 0.5))
            assert between[0] - 0.05 < after.group["drawn"][name] < between[1] + 0.05
        assert after.group["right"]["Support Devices"] is None


def test_before_and_after_without_a_scale_are_the_same_break_even() -> None:
    classes = drawn(300, 3)
    terms = label_terms([0.3], 0.3)
    for before, after in zip(
        break_evens(classes, terms, CONSTANT), after_scale(classes, terms, CONSTANT, group_size=4), strict=True
    ):
        for rest in RESTS:
            for name, one in before.by_rest[rest].items():
                assert (one is None) == (after.unscaled[rest][name] is None)
                if one is not None:
                    assert after.unscaled[rest][name] == pytest.approx(one.say_from, abs=0.04), (before.term, name)


def test_the_policys_say_rates_decide_what_the_groups_std_leaves() -> None:
    """Reports alike but for the finding: one half. Reports that differ much leave some of the threshold."""
    classes = drawn(300, 4)
    terms = label_terms([], 0.2)[-1:]
    silent = np.zeros((50, 14), dtype=np.int64)
    assert say_rates(silent).tolist() == [0] * 13
    (alike,), (varied,) = after_scale(classes, terms, CONSTANT, policy=silent), after_scale(classes, terms, CONSTANT)
    for name in FINDINGS[:12]:
        assert alike.group["drawn"][name] == pytest.approx(0.5, abs=0.02)
        assert varied.group["drawn"][name] < 0.42
    with pytest.raises(ValueError, match="at least 2"):
        after_scale(classes, terms, CONSTANT, group_size=1)


def test_the_words_name_where_a_reward_teaches_something_else() -> None:
    classes = drawn(300, 5)
    wanted = wanted_by_f1(classes, "disease_micro13", 0.5)
    assert (wanted.say_from, wanted.given) == (0.25, True)
    card = break_even_card(classes, CONSTANT, margins=[0.5], wanted=wanted)
    said = words(card)
    mccs = card.before[0].by_rest["right"]["Cardiomegaly"]
    line = next(one for one in said if one.startswith("mccs 0.5: this reward"))
    assert f"Cardiomegaly between {max(mccs.silence[0], 0.25):.2f} and {mccs.say_from:.2f}" in line
    assert "teaches silence about" in line or "; silence about" in line
    assert any(one.startswith("additive 0.25: this reward too wants every finding") for one in said)
    high = break_even_card(classes, CONSTANT, margins=[], threshold=0.1, wanted=wanted)
    assert any("to say Enlarged Cardiomediastinum already between 0.10 and 0.25" in one for one in words(high))
    content = json.loads(json.dumps(break_evens_json(card)))
    assert content["terms"].keys() == {"mccs 0.5", "ccs", "ce_f1", "additive 0.25"}
    assert content["terms"]["ce_f1"]["after"]["batch"] == content["terms"]["ce_f1"]["after"]["none"]
    assert content["terms"]["mccs 0.5"]["before"]["constant"].keys() == set(FINDINGS)


def test_the_f1_within_reach_is_taken_from_the_labels_or_given() -> None:
    classes = drawn(100, 6)
    assert wanted_by_f1(classes, "disease_micro13", None).f1 == attainable_f1(classes)
    for f1 in (0.0, 1.1):
        with pytest.raises(ValueError, match="F1"):
            wanted_by_f1(classes, "disease_micro13", f1)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A manifest of 40 studies beside the labels of its reports."""
    rows = drawn(40, 7)
    made = [Study(f"s{row}", f"p{row}", (StudyImage(tmp_path / "x.png"),), f"text {row}", "train") for row in range(40)]
    write_manifest(tmp_path / "manifest.jsonl", made)
    write_labels_csv(tmp_path / "labels.csv", {study.id: row.tolist() for study, row in zip(made, rows, strict=True)})
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    return cli.main(["reward-card", str(folder / "manifest.jsonl"), "--labels", str(folder / "labels.csv"), *arguments])


def test_the_command_shows_and_writes_them(capsys: pytest.CaptureFixture[str], studies: Path) -> None:
    chosen = ["--margin", "0.5", "--margin", "0.2", "--threshold", "0.4", "--for", "disease_micro13", "--f1", "0.6"]
    policy = ["--policy-labels", str(studies / "labels.csv"), "--group-size", "4", "-o", str(studies / "card")]
    assert run(studies, *chosen, *policy) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "disease_micro13 wants a finding said from the probability 0.30 on" in out and "as given" in out
    assert "Margin 0.5:" in out and "grpo.advantage_scale group, G 4" in out
    card = json.loads((studies / "card" / "reward_card.json").read_text())
    found = card["break_evens"]
    assert card["margin"] == 0.5 and found["group_size"] == 4 and found["policy"].endswith("labels.csv")
    assert found["terms"].keys() == {"mccs 0.5", "mccs 0.2", "ccs", "ce_f1", "additive 0.4"}
    assert found["terms"]["additive 0.4"]["before"]["right"]["Edema"]["say_from"] == pytest.approx(0.4, abs=1e-4)
    assert found["wanted"]["say_from"] == 0.3 and card["observations"] == list(OBSERVATIONS[:13])


def test_what_cannot_be_shown_is_refused(capsys: pytest.CaptureFixture[str], studies: Path) -> None:
    assert run(studies, "--f1", "0.6") == 2 and "--for disease_micro13" in capsys.readouterr().err
    assert run(studies, "--group-size", "1") == 2 and "at least 2" in capsys.readouterr().err
    for wrong in (["--threshold", "1"], ["--f1", "x"], ["--for", "accuracy"]):
        with pytest.raises(SystemExit) as stopped:
            run(studies, *wrong)
        assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err
    write_labels_csv(studies / "labels.csv", {f"s{row}": [0] * 14 for row in range(40)})
    assert run(studies) == 0  # nothing positive: the rest of the card stands
    capsys.readouterr()
    assert run(studies, "--for", "disease_micro13") == 2
    assert "no reference has a positive finding" in capsys.readouterr().err
