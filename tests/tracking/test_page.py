"""The page: every text escaped, readable while a run runs, refused where there is nothing to show."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mrg_r1.evaluate import summarise, write_evaluation
from mrg_r1.labels.observations import values_of_classes
from mrg_r1.tracking.page import write_page
from tests.conftest import make_study

EVIL = "<script>alert('x')</script> the heart & <b>lungs"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        assert not any(value and value.startswith(("http:", "//")) for name, value in attrs if name in {"src", "href"})

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    steps = [{"step": s, "reward/total": 0.1 * s, "loss": 1.0, "validation/mean_reward": 0.3 if s == 2 else None} for s in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 3, "rew')  # a line being written
    return run


def evaluated(run: Path, study):
    labels = values_of_classes([1, 0] + [0] * 12)
    row = {
        "id": study.id,
        "text": EVIL,
        "report": EVIL,
        "reference": EVIL,
        "ended": True,
        "total": 0.5,
        "terms": {"mccs": 0.5, "format": 1.0},
        "constant": {"total": 0.25},
        "labels": labels,
        "reference_labels": values_of_classes([0, 1] + [0] * 12),
        "drawn": None,
    }
    result = summarise([row], [study], train=None, seed=0, bootstrap_samples=100)
    write_evaluation(run / "evaluation", "test", result, [row])
    return result


def test_generated_text_is_shown_as_text(run, tmp_path):
    study = make_study(tmp_path, "s<1>", [(84, 84)])
    evaluated(run, study)
    html = write_page(run, [study]).read_text()
    tags = Tags()
    tags.feed(html)
    assert "script" not in tags.found and "b" not in tags.found
    assert EVIL in tags.text and "s<1>" in tags.text
    assert "Cardiomegaly" in tags.text and "Enlarged Cardiomediastinum" in tags.text
    assert "contains patient data" in tags.text
    assert tags.found.count("img") == 1 and tags.found.count("svg") >= 2


def test_a_run_without_evaluation_has_curves_only(run):
    tags = Tags()
    tags.feed(write_page(run, []).read_text())
    assert "3 steps" in tags.text and "Test split" not in tags.text


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        write_page(tmp_path, [])
