"""Metrics of a child process: what it answers, and each way in which it can fail, named."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mrg_r1.metrics.bootstrap import mean_intervals, paired_mean_differences
from mrg_r1.metrics.radeval import CHILD, RadEval, RadEvalDied, RadEvalError, RadEvalSettings, described_scores
from mrg_r1.metrics.radeval_names import DEFAULT, METRICS, metric_of, require_metrics
from tests.metrics.radeval_stand_in import PYTHON, change_version, install

SAID = {"a": "left effusion", "b": "clear \udc80 lungs", "c": ""}
TRUE = {"a": "left effusion", "b": "clear lungs today there", "c": "edema"}


def child(python: str, *metrics: str, **more: object) -> RadEval:
    return RadEval(RadEvalSettings(python, metrics, **more))  # type: ignore[arg-type]


def scored(one: RadEval) -> dict:
    return described_scores(one, SAID, TRUE, samples=50, seed=0)[0]


def test_a_child_gives_each_report_its_values_whatever_the_package_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = install(tmp_path, monkeypatch)
    beats: list[int] = []
    one = child(python, "radgraph", "bertscore")
    described, values = described_scores(one, SAID, TRUE, samples=50, seed=0, beat=lambda: beats.append(1))
    assert values["radgraph_partial"].tolist() == values["bertscore"].tolist() == [1.0, 0.5, 0.0]
    assert described["package"] == "radeval 2.2.1" and described["studies"] == 3 and not described["left_out"]
    assert described["scores"]["bertscore"]["mean"] == 0.5
    assert described["metrics"]["bertscore"] == {"variant": METRICS["bertscore"].variant, "weights_sha256": None}
    assert described["metric_of"]["radgraph_complete"] == "radgraph"
    again = described_scores(child(python, "bertscore"), SAID, TRUE, samples=50, seed=0)[0]
    assert again["scores"]["bertscore"] == described["scores"]["bertscore"]
    assert again["references_sha256"] == described["references_sha256"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kill", "was killed by SIGKILL while radgraph scored 3 reports"),
        ("exit", "ended with exit code 3 while radgraph scored 3 reports"),
        ("garbage", "wrote a line that is no answer while radgraph scored 3 reports"),
        ("deep", "wrote a line that is no answer while radgraph scored 3 reports"),
        ("raise", "RadEval's radgraph raised KeyError"),
        ("fewer", "gave 2 values of radgraph_simple for 3 reports"),
        ("nan", "not finite for studies b (radgraph_simple), b (radgraph_partial), b (radgraph_complete)"),
        ("none", "not finite for studies b (radgraph_simple)"),
    ],
)
def test_what_fails_is_named_and_the_other_metrics_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    described = scored(child(install(tmp_path, monkeypatch, fault=f"{fault}:radgraph"), "radgraph", "bertscore"))
    assert list(described["left_out"]) == ["radgraph"] and message in described["left_out"]["radgraph"]
    assert list(described["scores"]) == ["bertscore"] and list(described["metrics"]) == ["bertscore"]
    assert "Cardiomegaly" not in json.dumps(described)  # the package's own words may quote a report


def test_the_last_words_of_a_child_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = child(install(tmp_path, monkeypatch, fault="exit:bertscore"), "bertscore")
    with pytest.raises(RadEvalDied, match="ended with exit code 3 .*CUDA out of memory"):
        one.score("bertscore", ["a"], ["a"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("weights:bertscore", "metric bertscore: OSError: not found in the local cache, HF_HUB_OFFLINE=1; no weights"),
        ("network:bertscore", "a connection to 192.0.2.1 was refused: nobody allowed the network"),
        ("name:bertscore", "a connection to huggingface.co was refused: nobody allowed the network"),
    ],
)
def test_nothing_is_fetched_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(RadEvalError) as caught:
        child(install(tmp_path, monkeypatch, fault=fault), "radgraph", "bertscore")
    assert message in str(caught.value)


def test_what_is_asked_for_may_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RadEvalError, match="HF_HUB_OFFLINE=0$"):
        child(install(tmp_path, monkeypatch, fault="weights:bertscore"), "bertscore", download=True)


def test_an_interpreter_that_cannot_serve_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RadEvalError, match="/nowhere/python: no interpreter there"):
        child("/nowhere/python", "bleu")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RadEvalError, match="has no package radeval; `make radeval`"):
        child(PYTHON, "bleu")
    install(tmp_path, monkeypatch)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\necho "Activating environment"\nexec {PYTHON} "$@"\n')
    wrapper.chmod(0o755)
    with pytest.raises(RadEvalError, match=r"no answer \('Activating environment'\) while it was started"):
        child(str(wrapper), "bleu")
    (tmp_path / "radeval/__init__.py").write_text("import medspacy_of_which_there_is_none")
    with pytest.raises(RadEvalError, match="No module named 'medspacy_of_which_there_is_none'"):
        child(PYTHON, "bleu")


def test_another_child_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = child(install(tmp_path, monkeypatch, fault="kill:radgraph"), "radgraph", "bertscore")
    change_version(tmp_path, "2.3.0")
    described = scored(one)
    assert "version was 2.2.1 and is 2.3.0 by now" in described["left_out"]["bertscore"] and not described["scores"]


def test_metrics_that_send_reports_must_be_named_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = install(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="crimson sends the reports to an API of somebody's"):
        child(python, "crimson")
    child(python, "crimson", send_text_to=("crimson",)).close()
    require_metrics(DEFAULT)
    with pytest.raises(ValueError, match="no metric 'radgraf'; there are radgraph"):
        require_metrics(["radgraf"])


def test_a_name_is_a_metric_or_what_it_gives() -> None:
    assert metric_of("radeval:radgraph") == ("radgraph", "radgraph_partial")
    assert metric_of("radeval:radgraph_simple") == ("radgraph", "radgraph_simple")
    with pytest.raises(ValueError, match="'radeval:spice': RadEval has no metric 'spice'"):
        metric_of("radeval:spice")


def test_the_child_leaves_with_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = install(tmp_path, monkeypatch)
    monkeypatch.setenv("RADEVAL_SECONDS", "0.0")
    process = subprocess.Popen([python, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b'{"metrics": ["bleu"], "network": false}\n')
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["version"] == "2.2.1"
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_the_child_imports_the_standard_library_and_the_package_alone() -> None:
    names = {line.split()[1].split(".")[0] for line in CHILD.read_text().splitlines() if line.strip()[:7] == "import "}
    assert names - {"radeval"} <= set(sys.stdlib_module_names)


def test_the_child_is_python_3_9() -> None:
    ast.parse(CHILD.read_text(encoding="utf-8"), feature_version=(3, 9))


def test_weights_are_told_apart_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = install(tmp_path, monkeypatch)
    module = tmp_path / "radeval/__init__.py"
    plain = module.read_text()

    def weights(seed: int, name: str = "model") -> str:
        made = f"torch.manual_seed({seed}); self.parts = [dict({name}=torch.nn.Linear(2, 2))]; self.loop = self"
        module.write_text("import torch\n" + plain.replace("self.calls = 0", f"self.calls = 0; {made}"))
        one = child(python, "bleu")
        one.close()
        return str(one.about["metrics"]["bleu"]["weights_sha256"])

    first = weights(0)
    assert len(first) == 64 and weights(0) == first != weights(1)


def test_means_have_intervals_over_the_same_studies() -> None:
    values = np.array([[0.0, 1.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0]])
    intervals = mean_intervals(values, samples=200, seed=1)
    assert intervals[1] == (2.0, 2.0) and intervals[0][0] <= values[0].mean() <= intervals[0][1]
    ours, none = paired_mean_differences(values, values + np.array([[0.25], [0.0]]), samples=200, seed=1)
    assert ours.difference == pytest.approx(0.25) and ours.ci == pytest.approx((0.25, 0.25))
    assert ours.p == pytest.approx(2 / 201) and none.p == 1.0 and not none.excludes_zero
