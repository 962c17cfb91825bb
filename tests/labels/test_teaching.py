"""Teachers: what they answer, what a model that they teach learns, and when a training has them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from mrg_r1.labels import fitting, teaching, training
from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.fitting import TrainingBar, label_loss
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.teaching import LABELS_SHARE, average_answer, taught_loss
from mrg_r1.labels.training import train_labeler
from tests.labels.test_training import toy_study, write_toy
from tests.labels.tiny import tiny_model

ROWS = [[2, 8, 3], [2, 5, 6, 7, 3]]
CPU = torch.device("cpu")
IDS = torch.tensor([[2, 8, 3, 0, 0], [2, 5, 6, 7, 3]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare command's regime, of two passes and two teachers."""
    regime = dataclasses.replace(training.RANDOM_START, passes=2, fewest_read=1, teachers=2, taught_below=100)
    monkeypatch.setattr(training, "RANDOM_START", regime)


def test_the_answer_is_the_mean_of_probabilities_without_dropout() -> None:
    teachers = [tiny_model(seed).train() for seed in (0, 1)]
    answer = average_answer(teachers, ROWS, pad=0, device=CPU)
    each = [teacher.eval()(IDS, MASK).softmax(dim=-1) for teacher in teachers]
    assert torch.allclose(answer, (each[0] + each[1]) / 2, atol=1e-5)
    assert not torch.allclose(each[0], each[1], atol=0.01)
    assert torch.allclose(answer.sum(dim=-1), torch.ones(2, 14)) and not answer.requires_grad
    assert (answer[:, 13, 2:] == 0).all()


def test_the_taught_loss_by_hand() -> None:
    logits = torch.zeros(1, 14, 4)
    logits[:, 13, 2:] = float("-inf")
    logits[0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    classes = torch.zeros(1, 14, dtype=torch.long)
    answer = logits.softmax(dim=-1)
    answer[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    first = -LABELS_SHARE * torch.tensor(0.1).log() - (1 - LABELS_SHARE) * torch.tensor(0.2).log()
    expected = first + 12 * torch.tensor(4.0).log() + torch.tensor(2.0).log()
    assert taught_loss(logits, classes, answer).item() == pytest.approx(expected.item())
    assert taught_loss(logits.repeat(3, 1, 1), classes.repeat(3, 1), answer.repeat(3, 1, 1)).item() == pytest.approx(
        expected.item()
    )


def test_where_the_teachers_agree_with_the_labels_it_is_the_plain_loss_with_its_gradient() -> None:
    model = tiny_model()
    classes = torch.tensor([[0, 1, 2, 3] * 3 + [1, 1], [3, 2, 1, 0] * 3 + [0, 0]])
    gradients = []
    for loss in (
        label_loss,
        lambda logits, true: taught_loss(logits, true, torch.nn.functional.one_hot(true, 4).float()),
    ):
        model.zero_grad()
        loss(model(IDS, MASK), classes).backward()
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        )
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0.01
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_the_bare_training_has_teachers_and_repeats_itself(tmp_path: Path, quick: None) -> None:
    reports, labels = write_toy(tmp_path, 60)
    before = torch.random.get_rng_state()
    first, second = (train_labeler(reports, labels, tmp_path / name, size="tiny", seed=3) for name in ("a", "b"))
    other = train_labeler(reports, labels, tmp_path / "c", size="tiny", seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first["fingerprint"] == second["fingerprint"] != other["fingerprint"]
    assert first["teachers"] == 2 and len(first["curve"]) == 2
    assert json.loads((tmp_path / "a" / "training.json").read_text()) == first
    assert Labeler.load(tmp_path / "a").fingerprint == first["fingerprint"]


def test_many_reports_and_asked_passes_or_minutes_need_no_teachers(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, labels = write_toy(tmp_path, 60)
    assert train_labeler(reports, labels, tmp_path / "a", size="tiny", passes=2)["teachers"] == 0
    assert train_labeler(reports, labels, tmp_path / "b", size="tiny", max_minutes=60)["teachers"] == 0
    assert train_labeler(reports, labels, tmp_path / "c", start=tmp_path / "a", passes=1)["teachers"] == 0
    monkeypatch.setattr(training, "RANDOM_START", dataclasses.replace(training.RANDOM_START, taught_below=57))
    assert train_labeler(reports, labels, tmp_path / "d", size="tiny")["teachers"] == 0  # 57 are trained on


def test_each_teacher_starts_elsewhere_is_trained_and_then_left_alone(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, answered = [], []
    random_model = training.random_model

    def started(config: BertConfig) -> CheXbert:
        model = random_model(config)
        starts.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        return model

    def answer(
        teachers: Sequence[CheXbert], rows: Sequence[Sequence[int]], *, pad: int, device: torch.device
    ) -> torch.Tensor:
        answered.append(
            [torch.cat([parameter.detach().flatten() for parameter in teacher.parameters()]) for teacher in teachers]
        )
        return average_answer(teachers, rows, pad=pad, device=device)

    monkeypatch.setattr(training, "random_model", started)
    monkeypatch.setattr(fitting, "average_answer", answer)
    reports, labels = write_toy(tmp_path, 40)
    train_labeler(reports, labels, tmp_path / "labeler", size="tiny")
    assert len(starts) == 2 and not torch.equal(starts[0], starts[1])
    for start, first, last in zip(starts, answered[0], answered[-1], strict=True):
        assert torch.equal(first, last) and not torch.equal(start, first)


def test_a_model_learns_what_only_its_teachers_say(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, labels = write_toy(tmp_path, 90)

    def fracture(teachers: object, rows: Sequence[object], **_: object) -> torch.Tensor:  # in every report
        answer = torch.zeros(len(rows), 14, 4)
        answer[:, :, 0] = 1
        answer[:, 11] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        return answer

    monkeypatch.setattr(fitting, "average_answer", fracture)
    monkeypatch.setattr(training, "RANDOM_START", dataclasses.replace(training.RANDOM_START, passes=12, teachers=1))
    train_labeler(reports, labels, tmp_path / "labeler", size="tiny")
    rng = random.Random(1)
    said = Labeler.load(tmp_path / "labeler").label([toy_study(rng)[0] for _ in range(20)])
    assert (said[:, 11] == 1).all()  # against the labels, which have none


def test_the_bar_runs_once_over_all_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = TrainingBar([1.0, 1.0, 2.0])
    shown = []
    monkeypatch.setattr(bar._progress, "update", lambda task, **changes: shown.append(changes.get("completed")))
    with bar:
        for _ in range(3):
            bar.begin("training")
            bar.update(0.5)
            bar.update(1.5)  # time may run over
    assert [value for value in shown if value is not None] == [0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0]
    assert teaching.TEACHER_COST > 0
