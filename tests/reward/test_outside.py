"""Terms that others score: inside the reward function, with each failure an error that names term and studies."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mrg_r1.metrics.radeval import RadEvalSettings
from mrg_r1.reward import outside as module
from mrg_r1.reward.compute import NotFiniteError, RewardContext, RewardError, RewardFunction
from mrg_r1.reward.judge import HttpSettings
from mrg_r1.reward.outside import OutsideSettings
from tests.metrics.radeval_stand_in import install
from tests.reward.judge_server import judging
from tests.reward.keyword_labeler import KeywordLabeler

TEXTS = [["left effusion", "edema"], ["clear lungs", "clear lungs"]]
REFERENCES = ["left effusion", "clear lungs today there"]
ENDED = torch.ones(2, 2, dtype=torch.bool)
IDS = ["s1", "s2"]


def function(weights: dict[str, float], python: str = "", *, workers: int = 1, **http: object) -> RewardFunction:
    settings = OutsideSettings(
        radeval=RadEvalSettings(python, ()) if python else None,
        workers=workers,
        http=HttpSettings(**{"timeout": 60.0, "retries": 0, **http}),  # type: ignore[arg-type]
    )
    made = RewardFunction(KeywordLabeler(), weights=weights, mode="plain", outside=asdict(settings))
    return made


def scored(one: RewardFunction, context: RewardContext = RewardContext()) -> dict[str, list[list[float]]]:  # noqa: B008
    rewards = one.score(TEXTS, ENDED, REFERENCES, context, study_ids=IDS)
    return {name: values.tolist() for name, values in {**rewards.terms, "total": rewards.total}.items()}


@pytest.mark.parametrize("workers", [1, 3])
def test_radevals_metrics_are_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    python = install(tmp_path, monkeypatch)
    one = function({"radeval:radgraph": 0.5, "radeval:radgraph_simple": 0.0, "ccs": 0.5}, python, workers=workers)
    assert one.workers is not None
    found = scored(one)
    assert found["radeval:radgraph"] == found["radeval:radgraph_simple"] == [[1.0, 0.0], [0.5, 0.5]]
    assert found["total"][0][0] == 1.0 and one.workers.about["version"] == "2.2.1"
    rewards = one.score(TEXTS, ENDED, REFERENCES, RewardContext(constant="clear lungs"), study_ids=IDS)
    assert rewards.constant["radeval:radgraph"].tolist() == [0.0, 0.5]
    one.workers.close()


def test_equal_pairs_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with judging() as server:
        one = function({server.url: 1.0})
        server.asked.clear()  # what it was tried out with
        assert sum(scored(one)[server.url], []) == pytest.approx([0.2, 0.1, 0.2, 0.2])
        scored(one)
        assert server.asked == [["left effusion", "edema", "clear lungs"]]


def test_a_malformed_report_is_shown_to_nobody_and_earns_nothing() -> None:
    with judging() as server:
        one = RewardFunction(KeywordLabeler(), weights={server.url: 1.0})
        server.asked.clear()
        texts = [["<think>a</think><report>edema</report>", "edema"]]
        rewards = one.score(texts, ENDED[:1], ["edema"], study_ids=["s"])
        assert rewards.terms[server.url].tolist() == [[pytest.approx(0.1), 0.0]] and server.asked == [["edema"]]


def test_a_worker_that_dies_is_started_again_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADEVAL_ONCE", str(tmp_path / "once"))
    python = install(tmp_path, monkeypatch, fault="kill:ratescore")
    one = function({"radeval:ratescore": 1.0}, python)
    assert one.workers is not None
    assert scored(one)["radeval:ratescore"] == [[1.0, 0.0], [0.5, 0.5]] and (tmp_path / "once").exists()
    one.workers.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kill", "it has died 2 times; the last time: .* was killed by SIGKILL while ratescore scored 3 reports"),
        ("raise", "RadEval's ratescore raised KeyError"),
        ("fewer", "gave 2 values of ratescore for 3 reports"),
        ("garbage", "wrote a line that is no answer"),
    ],
)
def test_a_metric_that_fails_is_an_error_with_the_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setattr(module, "RESTARTS", 1)
    one = function({"radeval:ratescore": 1.0}, install(tmp_path, monkeypatch, fault=f"{fault}:ratescore"))
    assert one.workers is not None
    with pytest.raises(RewardError, match=f"reward term 'radeval:ratescore' failed on studies s1, s2: .*{message}"):
        scored(one)
    one.workers.close()


@pytest.mark.parametrize("fault", ["nan", "none"])
def test_what_is_not_finite_is_said_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    one = function({"radeval:ratescore": 1.0}, install(tmp_path, monkeypatch, fault=f"{fault}:ratescore"))
    assert one.workers is not None
    for _ in range(2):  # it is not remembered
        with pytest.raises(NotFiniteError, match=r"not finite for studies s1 \(member 1: nan\)"):
            scored(one)
    one.workers.close()


def test_a_judge_that_fails_is_an_error_with_the_studies() -> None:
    with judging() as server:
        one = function({server.url: 1.0})
        server.faults = ["500"]
        with pytest.raises(RewardError, match="failed on studies s1, s2: JudgeError: .*HTTP 500"):
            scored(one)
        server.faults = ["nan"]
        with pytest.raises(NotFiniteError, match=r"s1 \(member 0: nan\)"):
            scored(one)


def test_what_cannot_reward_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("radeval:radcliq", "depends on the references that come with it"),
        ("radeval:radcliq_v1", "depends on the references that come with it"),
        ("radeval:crimson", "sends the reports to an API of somebody's.*refused as a reward"),
        ("radeval:spice", "RadEval has no metric 'spice'"),
        ("http://judge.example.org/", r"reward.send_text_to=\[judge.example.org\]"),
        ("spice", "'radeval:METRIC' and 'http://HOST:PORT/PATH'"),
    ):
        with pytest.raises(ValueError, match=message):
            function({name: 1.0})
    with pytest.raises(ValueError, match="no interpreter that has RadEval; set radeval.python"):
        function({"radeval:ratescore": 1.0})
    with pytest.raises(ValueError, match="metric ratescore: OSError: not found in the local cache"):
        function({"radeval:ratescore": 1.0}, install(tmp_path, monkeypatch, fault="weights:ratescore"))
