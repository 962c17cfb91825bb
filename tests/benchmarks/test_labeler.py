"""The labeler's contenders on a tiny model: all of them give the same labels, of the same texts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from benchmarks import labeler as bench
from benchmarks.cases import CASES
from benchmarks.labeler import drawn, find_reports, make_labeler, make_unit
from benchmarks.task import Task
from benchmarks.workers import WORKER_ENVIRONMENT, Worker
from mrg_r1.labels import inference
from mrg_r1.labels.labeler import Labeler


@pytest.fixture(scope="module")
def reports() -> list[str]:
    return find_reports()[0]


@pytest.fixture(scope="module")
def labeler(reports: list[str]) -> Labeler:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    return make_labeler(reports, BertConfig(vocab_size=4000, initializer_range=0.3, **sizes))


def test_every_contender_gives_the_same_labels(labeler: Labeler, reports: list[str]) -> None:
    texts = drawn(reports, 21) * 2
    with torch.no_grad():
        classes = {name: unit(labeler, texts) for name, unit in bench.UNITS.items()}
    assert set(classes) == {
        contender.task.unit for case in CASES for contender in case.contenders if contender.side == "labeler"
    }
    assert len({tuple(row) for row in classes["label"].tolist()}) > 5
    for name, found in classes.items():
        assert torch.equal(found, classes["label"]), name


def test_contenders_compute_what_they_are_named_for(
    labeler: Labeler, reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = drawn(reports, 5) * 3
    read, bert = inference.read, labeler.model.bert.forward
    rows: list[int] = []
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        inference, "read", lambda model, packed: (rows.append(len(packed.first)), read(model, packed))[1]
    )
    monkeypatch.setattr(
        labeler.model.bert, "forward", lambda **inputs: (shapes.append(inputs["input_ids"].shape), bert(**inputs))[1]
    )
    counts = {}
    for name in ("label", "label_every"):
        make_unit(labeler, texts, name)()
        counts[name] = sum(rows)
        rows.clear()
    assert counts == {"label": 5, "label_every": 15} and not shapes
    make_unit(labeler, texts, "label_singly")()
    assert len(shapes) == 15 and all(shape[0] == 1 for shape in shapes)
    shapes.clear()
    make_unit(labeler, texts, "label_padded")()
    assert [tuple(shape) for shape in shapes] == [(8, 512), (7, 512)]


def test_any_number_of_reports_has_the_same_spread_of_lengths(reports: list[str]) -> None:
    means = [sum(map(len, drawn(reports, count))) / count for count in (12, 16, 128)]
    assert max(means) / min(means) < 1.1 and drawn(reports, len(reports)) == reports


def test_without_real_reports_phantoms_are_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRG_R1_SHARED_DATA", str(tmp_path))
    found, source = find_reports()
    assert source == "phantoms" and len(found) > 1000
    with pytest.raises(ValueError, match="'step'"):
        make_unit(
            make_labeler(
                found, BertConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
            ),
            found,
            "step",
        )


@pytest.mark.slow
def test_the_worker_labels_at_full_size(tmp_path: Path) -> None:
    task = Task(unit="label", reports=3)
    worker = Worker(
        [sys.executable, "-m", "benchmarks.labeler", str(tmp_path), task.to_json()],
        log=tmp_path / "log",
        environment=WORKER_ENVIRONMENT,
    )
    try:
        ready = worker.wait_ready(180)
        answer = worker.run(60)
    finally:
        worker.close()
    assert ready["settings"]["parameters"] > 108e6 and ready["settings"]["mean_tokens"] > 16 and answer["seconds"] > 0
