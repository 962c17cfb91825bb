"""The reward of a batch: what is labelled, what each term gives, how they add up, and that no failure becomes a
zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mrg_r1.reward.compute import (
    DEFAULT_MARGIN,
    DEFAULT_WEIGHTS,
    RewardContext,
    RewardError,
    RewardFunction,
)
from mrg_r1.reward.terms import BUILT_IN
from tests.reward.keyword_labeler import KeywordLabeler

CUSTOM = "tests.reward.custom_terms:"


def think(report: str, thought: str = "looking") -> str:
    return f"<think>{thought}</think><report>{report}</report>"


TEXTS = [
    [think("cardiomegaly. no effusion"), think("cardiomegaly. effusion"), "cardiomegaly. no effusion"],
    [think("no edema"), "<report>edema</report>", think("no edema", "edema edema")],
]
REFERENCES = ["cardiomegaly. no effusion", "edema. no pneumothorax"]
ENDED = torch.ones(2, 3, dtype=torch.bool)


def function_of(labeler: Any = None, **arguments: Any) -> RewardFunction:
    return RewardFunction(labeler or KeywordLabeler(), **arguments)


def test_the_default_reward_by_hand() -> None:
    assert (DEFAULT_WEIGHTS, DEFAULT_MARGIN) == ({"mccs": 0.75, "format": 0.25}, 0.5)
    rewards = function_of().score(TEXTS, ENDED, REFERENCES)
    # study 1: equal; one of two flipped, CCS 0; no tags, no report. Study 2: -1 / sqrt 2; 1 / sqrt 2; -1 / sqrt 2.
    half = (1 / math.sqrt(2) - 0.5) / 0.5
    assert rewards.terms["mccs"].flatten().tolist() == pytest.approx([1, 0, 0, 0, half, 0])
    assert rewards.terms["format"].tolist() == [[1, 1, 0], [1, 0, 1]]
    assert rewards.total.flatten().tolist() == pytest.approx([1.0, 0.25, 0.0, 0.25, 0.75 * half, 0.25])
    assert rewards.total.dtype == torch.float32 and rewards.weights == DEFAULT_WEIGHTS
    assert rewards.report_texts[0] == ["cardiomegaly. no effusion", "cardiomegaly. effusion", None]


def test_labels_are_kept_and_unlabelled_rows_are_marked() -> None:
    rewards = function_of().score(TEXTS, ENDED, REFERENCES)
    assert rewards.labels.shape == (2, 3, 14) and rewards.labels.dtype == torch.int64
    assert rewards.labels[0, 2].tolist() == [-1] * 14
    assert rewards.labels[0, 1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert rewards.labels[1, 0, 4].item() == 2
    assert rewards.reference_labels.tolist()[1] == [0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0]


def test_every_term_by_hand() -> None:
    weights = {name: 1.0 for name in BUILT_IN} | {CUSTOM + "brevity": -0.5}
    texts = [[think("cardiomegaly. no effusion"), think("cardiomegaly"), "", "<think>a</think><report> </report>"]]
    ended = torch.tensor([[True, False, True, True]])
    rewards = function_of(weights=weights, margin=0.2, format_style="graded").score(
        texts, ended, ["cardiomegaly. no effusion"], RewardContext(thresholds=np.full(13, 0.3))
    )
    cosine = 1 / math.sqrt(2)
    expected: dict[str, list[float]] = {
        "ccs": [1, cosine, 0, 0],
        "mccs": [1, (cosine - 0.2) / 0.8, 0, 0],
        "additive": [(0.7 + 0.1 * 0.3) / 13, 0.7 / 13, 0, 0],
        "ce_f1": [1, 1, 0, 0],
        "bleu4": [1, math.exp(1 - 4 / 1), 0, 0],  # 13a: "cardiomegaly", ".", "no", "effusion"
        "rouge_l": [1, 0, 0, 0],  # words keep their full stop: "cardiomegaly" is not "cardiomegaly."
        "length": [1, 1 / 3, 0, 0],
        "repetition": [1, 1, 0, 0],
        "contradiction": [1, 1, 0, 0],
        "format": [1, 1, 0, 5 / 6],
        CUSTOM + "brevity": [1 / 3, 1, -1, -1],  # a user's term scores malformed reports itself
    }
    assert set(rewards.terms) == set(expected)
    for name, values in expected.items():
        assert rewards.terms[name][0].tolist() == pytest.approx(values, rel=1e-5), name
    totals = [sum((-0.5 if ":" in name else 1.0) * values[g] for name, values in expected.items()) for g in range(4)]
    assert rewards.total[0].tolist() == pytest.approx(totals, rel=1e-5)


def test_terms_are_reported_before_their_weights_and_with_weight_zero() -> None:
    """Trap 24: format saturates while findings stand still; only terms that are logged apart show it."""
    texts = [[think("no edema"), think("no effusion")], [think("cardiomegaly"), think("edema")]]
    rewards = function_of(weights={"mccs": 0.75, "format": 0.25, "ccs": 0.0}, margin=0.0).score(
        texts, torch.ones(2, 2, dtype=torch.bool), ["edema", "edema"]
    )
    assert rewards.terms["format"].mean().item() == 1.0
    assert rewards.terms["mccs"].tolist() == [[0, 0], [0, 1]]
    assert rewards.terms["ccs"].tolist() == [[-1, 0], [0, 1]]
    assert rewards.total.tolist() == [[0.25, 0.25], [0.25, 1.0]]


def test_one_call_labels_each_text_once_and_never_the_thoughts() -> None:
    labeler = KeywordLabeler()
    function = function_of(labeler)
    function.score(TEXTS, ENDED, REFERENCES)
    assert len(labeler.calls) == 1
    generated = ["cardiomegaly. effusion", "cardiomegaly. no effusion", "edema", "no edema"]
    # the first reference is one of them
    assert sorted(labeler.calls[0]) == sorted([*generated, "edema. no pneumothorax"])
    function.score([[think("effusion"), think("effusion")]], torch.ones(1, 2, dtype=torch.bool), REFERENCES[:1])
    assert labeler.calls[1:] == [["effusion"]]  # the reference is remembered


def test_nothing_is_labelled_when_nothing_is_there() -> None:
    labeler = KeywordLabeler()
    known = np.zeros((1, 14), dtype=np.int64)
    rewards = function_of(labeler).score(
        [["a", "b"]], torch.ones(1, 2, dtype=torch.bool), ["x"], RewardContext(reference_labels=known)
    )
    assert labeler.calls == [] and rewards.total.tolist() == [[0, 0]]


def test_known_reference_labels_take_the_labelers_place() -> None:
    labeler = KeywordLabeler()
    known = np.zeros((1, 14), dtype=np.int64)
    known[0, 9] = 1
    texts = [[think("effusion"), think("edema")]]
    rewards = function_of(labeler).score(
        texts, torch.ones(1, 2, dtype=torch.bool), ["edema"], RewardContext(reference_labels=known)
    )
    assert rewards.terms["mccs"].tolist() == [[1, 0]]
    assert labeler.calls == [["effusion", "edema"]]
    assert rewards.reference_labels.tolist() == known.tolist()


def test_plain_mode_labels_the_whole_text_and_wants_its_end() -> None:
    function = function_of(mode="plain")
    rewards = function.score([[" edema ", "edema", "  "]], torch.tensor([[True, False, True]]), ["edema"])
    assert rewards.terms["mccs"].tolist() == [[1, 1, 0]]
    assert rewards.terms["format"].tolist() == [[1, 0, 0]]
    assert rewards.report_texts == [["edema", "edema", None]]


def test_rows_stay_with_their_own_study() -> None:
    words = ["cardiomegaly", "edema", "consolidation", "pneumothorax"]
    texts = [[think(word) for word in words] for _ in words]
    rewards = function_of(weights={"mccs": 1.0, "rouge_l": 1.0}).score(texts, torch.ones(4, 4, dtype=torch.bool), words)
    assert torch.equal(rewards.terms["mccs"], torch.eye(4)) and torch.equal(rewards.terms["rouge_l"], torch.eye(4))


def test_the_step_decides_the_margin_and_the_weights() -> None:
    texts, ended, references = (
        [[think("edema. no effusion"), think("edema")]],
        torch.ones(1, 2, dtype=torch.bool),
        ["edema. effusion"],
    )
    scored = [
        function_of().score(texts, ended, references, RewardContext(margin=margin)).terms["mccs"][0, 1].item()
        for margin in (0.0, 0.5, 0.9)
    ]
    cosine = 0.5**0.5
    assert scored == pytest.approx([cosine, (cosine - 0.5) / 0.5, 0.0])
    weights = np.ones((13, 2))
    weights[4, 0] = 9.0  # edema
    heavy = (
        function_of(weights={"ccs": 1.0, "mccs": 1.0})
        .score(texts, ended, references, RewardContext(margin=0.2, ccs_weights=weights))
        .terms
    )
    cosines = [(9 - 1) / 10, 3 / 10**0.5]
    assert heavy["ccs"][0].tolist() == pytest.approx(cosines)
    assert heavy["mccs"][0].tolist() == pytest.approx([(cosine - 0.2) / 0.8 for cosine in cosines])


def test_a_constant_report_is_scored_beside_every_study() -> None:
    weights = {"mccs": 0.75, "format": 0.25, "rouge_l": 0.0, CUSTOM + "brevity": 0.5}
    known = function_of(weights=weights).score(TEXTS, ENDED, REFERENCES, RewardContext(constant=REFERENCES[1]))
    alone = function_of(weights=weights).score(TEXTS, ENDED, REFERENCES)
    as_completion = function_of(weights=weights, mode="plain").score([[REFERENCES[1]]] * 2, ENDED[:, :1], REFERENCES)
    assert torch.equal(known.total, alone.total) and not alone.constant
    assert torch.equal(known.constant["total"], as_completion.total[:, 0]) and known.constant.keys() == {
        "total",
        *weights,
    }
    assert known.constant["mccs"][1] == 1 and known.constant["format"].tolist() == [1, 1]


# --- a failure stops the run (docs/traps.md #22)
# --------------------------------------------------------------------------------


class BrokenLabeler:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def label(self, texts: list[str]) -> NDArray[np.int64]:
        if isinstance(self.answer, Exception):
            raise self.answer
        rows: NDArray[np.int64] = self.answer(len(texts))
        return rows


def classes_with(value: int, column: int) -> Any:
    def answer(count: int) -> NDArray[np.int64]:
        rows = np.zeros((count, 14), dtype=np.int64)
        rows[-1, column] = value
        return rows

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ConnectionError("device lost"), "CXR7, CXR8.*ConnectionError: device lost"),
        (lambda count: np.zeros((count - 1, 14), dtype=np.int64), "CXR7.*shape"),
        (lambda count: np.zeros((count, 14)), "CXR7.*float64"),
        (lambda count: np.full((count, 14), np.nan), "CXR7.*float64"),
        (classes_with(4, 2), "CXR7.*class 4 for Lung Opacity"),
        (classes_with(-1, 0), "CXR7.*class -1 for Enlarged Cardiomediastinum"),
        (classes_with(2, 13), "CXR7.*class 2 for No Finding"),
    ],
)
def test_a_failing_labeler_stops_the_run_and_names_the_studies(answer: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        function_of(BrokenLabeler(answer)).score(TEXTS, ENDED, REFERENCES, study_ids=["CXR7", "CXR8"])


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("raises", "raises'.*CXR7, CXR8.*no server"),
        ("too_short", "too_short'.*CXR7, CXR8.*shape"),
        ("not_numbers", "not_numbers'.*CXR7"),
        ("not_a_number", r"not_a_number'.* CXR8 \(member 0: nan\)"),
    ],
)
def test_a_failing_term_stops_the_run_and_names_itself_and_the_studies(term: str, message: str) -> None:
    function = function_of(weights={"mccs": 1.0, CUSTOM + term: 0.0})
    texts = [[think("edema")], [think("broken")]]
    with pytest.raises(RewardError, match=message):
        function.score(texts, torch.ones(2, 1, dtype=torch.bool), REFERENCES, study_ids=["CXR7", "CXR8"])


def test_a_users_term_cannot_change_what_the_others_see() -> None:
    weights = {CUSTOM + "spoils_its_inputs": 1.0, "mccs": 1.0, CUSTOM + "agreement": 0.0}
    rewards = function_of(weights=weights).score(TEXTS, ENDED, REFERENCES)
    assert rewards.terms["mccs"][0].tolist() == [1, 0, 0]
    assert rewards.terms[CUSTOM + "agreement"][0].tolist() == pytest.approx([1, 13 / 14, 0])
    assert rewards.report_texts[0][2] is None and rewards.labels[0, 2, 0].item() == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"mcss": 1.0}}, "'mcss'"),
        ({"weights": {}}, "term"),
        ({"weights": {"mccs": 0.0}}, "term"),
        ({"weights": {"mccs": math.nan}}, "weight nan"),
        ({"weights": {"no_such_module:f": 1.0}}, "no_such_module"),
        ({"margin": 1.0}, "margin 1.0"),
        ({"mode": "json"}, "mode 'json'"),
        ({"format_style": "soft"}, "format_style 'soft'"),
        ({"normalise": "batch"}, "normalise 'batch'"),
    ],
)
def test_settings_that_make_no_reward_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function_of(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": [["a", "b"], ["c"]]}, "group"),
        ({"texts": []}, "study"),
        ({"ended": torch.ones(3, 2, dtype=torch.bool)}, "ended"),
        ({"references": ["one"]}, "1 references"),
        ({"study_ids": ["one"]}, "1 study ids"),
        ({"context": RewardContext(reference_labels=np.zeros((2, 13), dtype=np.int64))}, "reference_labels"),
        (
            {"context": RewardContext(reference_labels=np.full((2, 14), -1, dtype=np.int64))},
            "reference_labels.* -1",
        ),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str) -> None:
    batch: dict[str, Any] = {"texts": TEXTS, "ended": ENDED, "references": REFERENCES} | change
    with pytest.raises(ValueError, match=message):
        function_of().score(**batch)


def test_a_reference_without_words_is_scored_by_its_labels_and_by_no_term_that_reads_words() -> None:
    known = KeywordLabeler().label(REFERENCES)
    bare: list[str | None] = [REFERENCES[0], None]
    labeler = KeywordLabeler()
    rewards = function_of(labeler).score(TEXTS, ENDED, bare, RewardContext(reference_labels=known))
    assert torch.equal(rewards.total, function_of().score(TEXTS, ENDED, REFERENCES).total)
    assert not any(None in call for call in labeler.calls)
    for term in ("bleu4", "rouge_l", "length", f"{CUSTOM}brevity"):
        weights = {"mccs": 1.0, term: 0.0}
        with pytest.raises(ValueError, match=f"{term} read the reference's words; studies b have labels alone"):
            context = RewardContext(reference_labels=known)
            function_of(weights=weights).score(TEXTS, ENDED, bare, context, study_ids=["a", "b"])
    with pytest.raises(ValueError, match="studies b have neither a reference text nor known reference labels"):
        function_of().score(TEXTS, ENDED, bare, study_ids=["a", "b"])


def test_repetition_and_contradiction_are_paid_for_their_absence() -> None:
    reports = ["effusion. edema.", "effusion. effusion.", "effusion. no effusion.", "effusion. maybe effusion.", ""]
    texts = [[*(think(report) for report in reports[:4]), "effusion. no effusion."]]  # the last without its tags
    labeler = KeywordLabeler()
    rewards = function_of(labeler, weights={"repetition": 0.5, "contradiction": 0.5}).score(
        texts, torch.ones(1, 5, dtype=torch.bool), ["edema."], RewardContext(constant="no edema. edema. edema.")
    )
    assert rewards.terms["repetition"][0].tolist() == [1, 0.5, 1, 1, 0]
    assert rewards.terms["contradiction"][0].tolist() == [1, 1, 0.5, 1, 0]
    assert rewards.total[0].tolist() == [1, 0.75, 0.75, 1, 0]
    assert rewards.contradictions is not None and rewards.contradictions.tolist() == [[0, 0, 1, 0, -1]]
    assert rewards.constant["repetition"].tolist() == pytest.approx([2 / 3])
    assert rewards.constant["contradiction"].tolist() == [0.5]
    assert len(labeler.calls) == 1  # sentences in the same call as reports


def test_sentences_are_read_only_where_they_are_wanted() -> None:
    texts, ended = [[think("effusion. no effusion.")]], torch.ones(1, 1, dtype=torch.bool)
    labeler = KeywordLabeler()
    rewards = function_of(labeler, weights={"repetition": 1.0}).score(texts, ended, ["edema."])
    assert rewards.contradictions is None
    assert sorted(labeler.calls[0]) == ["edema.", "effusion. no effusion."]
    function = function_of(weights={"format": 1.0})
    asked = function.score(texts, ended, ["edema."], RewardContext(contradictions=True))
    assert asked.contradictions is not None and asked.contradictions.tolist() == [[1]]
    assert "contradiction" not in asked.terms
    watched = function_of(weights={"format": 1.0, "contradiction": 0.0}).score(texts, ended, ["edema."])
    assert watched.contradictions is not None and watched.total.tolist() == [[1.0]]


def test_what_is_announced_to_the_labeler_is_what_it_is_asked() -> None:
    text = think("effusion. no effusion.")
    whole, parts = ["effusion. no effusion."], ["effusion.", "no effusion."]
    assert function_of(weights={"format": 1.0}).reports_of([text, "effusion."]) == whole
    assert function_of(weights={"contradiction": 1.0}).reports_of([text, "effusion."]) == whole + parts
    assert function_of().reports_of([text], RewardContext(contradictions=True)) == whole + parts


@pytest.mark.parametrize("name", ["repetition", "contradiction"])
def test_a_negative_weight_that_would_pay_for_it_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*negative weight would pay for it"):
        function_of(weights={"mccs": 1.0, name: -0.1})
