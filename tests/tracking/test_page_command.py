"""`mrg-r1 page`: a run's folder is enough, references' labels are the run's labeler's, and it follows a run that goes
on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from mrg_r1 import cli
from mrg_r1.data.study import write_manifest
from mrg_r1.reward.references import reference_labels
from tests.conftest import make_study
from tests.tracking.page_runs import completion, labels, prediction, write_completions, write_evaluated, write_metrics
from tests.tracking.test_page import Page

LABELER = {"name": "reader", "fingerprint": "abc"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at its third step: evaluated before training, one training study sampled, its reference read by a labeler
    as Edema.
    """
    run, manifest = tmp_path / "run", tmp_path / "manifest.jsonl"
    said = tuple(labels(Fracture=1))
    test, train = (replace(make_study(tmp_path, name, [(84, 84)]), split=name, said=said) for name in ("test", "train"))
    write_manifest(manifest, [test, train])
    classes = np.zeros((1, 14), dtype=np.int64)
    classes[0, 4] = 1
    reference_labels([train], manifest=manifest, labeler=LABELER, label=lambda texts: classes, fallback=run)
    write_metrics(run, 3)
    write_evaluated(run, "test_before", [prediction(test, "Clear.", labels(), labels())], [test], labeler=LABELER)
    write_completions(run, 0, [completion(0, train, 0, "Oedema.", labels(Edema=1))])
    recipe = {
        "output_dir": str(run),
        "steps": 4,
        "data": {"manifest": str(manifest)},
        "policy": {"path": "p"},
        "reward": {"labeler": "reader"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    return run


def test_a_folder_is_enough(run, tmp_path, capsys):
    assert cli.main(["page", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "page" / "index.html")
    page = Page(run / "page" / "index.html")
    assert list(page.cards("Test studies")) == ["test"]
    # the labeler's reading, not the manifest's
    assert page.cards("Training studies")["train"]["said"] == "....+........."
    assert len(page.json["pictures"]) == 2


def test_labels_of_a_manifest_that_has_changed_since_are_not_taken(run, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + "\n")
    assert cli.main(["page", str(run)]) == 0
    assert Page(run / "page" / "index.html").cards("Training studies")["train"]["said"] == "...........+.."


def test_watching_ends_with_the_run(run, tmp_path, monkeypatch, capsys):
    def step(seconds: float) -> None:
        assert seconds == 7
        write_metrics(run, 4)
        (run / "summary.json").write_text('{"steps": 4, "status": "complete"}')

    monkeypatch.setattr("time.sleep", step)
    assert cli.main(["page", str(run), "--watch", "7", "-o", str(tmp_path / "page.html")]) == 0
    assert "4 of 4 steps" in Page(tmp_path / "page.html").text


def test_what_is_missing_is_named_with_the_remedy(run, tmp_path, capsys):
    (tmp_path / "manifest.jsonl").unlink()
    assert cli.main(["page", str(run)]) == 2
    assert "manifest.jsonl: no such file (data.manifest of" in capsys.readouterr().err
    assert cli.main(["page", str(tmp_path)]) == 2
    assert "no config.yaml in it" in capsys.readouterr().err
