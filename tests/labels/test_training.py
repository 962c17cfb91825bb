"""Training a labeler: the joined CSVs, the vocabulary, and a small model that learns to read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import BertConfig

from mrg_r1.labels import training
from mrg_r1.labels.chexbert import CheXbert, Labeler
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, classes_of_values, read_labels_csv, write_labels_csv
from mrg_r1.labels.training import observation_scores, read_reports_csv, start_local, train_labeler, train_tokenizer, write_reports_csv
from mrg_r1.phantom.sampler import sample_study

SAID = {  # of an effusion (9) and of a pneumothorax (8)
    1: ["There is a {}.", "{} is seen.", "Large {}."],
    2: ["No {}.", "There is no {}.", "No evidence of {}."],
    3: ["Possible {}.", "There may be a {}."],
}


def toy_study(rng: random.Random) -> tuple[str, list[int]]:
    classes = [0] * 14
    sentences = ["Heart size is normal."]
    for observation, noun in ((9, "pleural effusion"), (8, "pneumothorax")):
        classes[observation] = rng.choice([0, 1, 1, 2, 2, 3])
        if classes[observation]:
            sentences.append(rng.choice(SAID[classes[observation]]).format(noun))
    classes[1] = 2
    classes[NO_FINDING] = int(classes[8] not in (1, 3) and classes[9] not in (1, 3))
    rng.shuffle(sentences)
    return " ".join(sentences), classes


def write_toy(folder: Path, studies: int, seed: int = 0) -> tuple[Path, Path]:
    rng = random.Random(seed)
    drawn = {f"s{index}": toy_study(rng) for index in range(studies)}
    write_reports_csv(folder / "reports.csv", {name: text for name, (text, _) in drawn.items()})
    write_labels_csv(folder / "labels.csv", {name: classes for name, (_, classes) in drawn.items()})
    return folder / "reports.csv", folder / "labels.csv"


def test_a_small_labeler_learns_to_read_and_is_written_whole(tmp_path: Path) -> None:
    reports, labels = write_toy(tmp_path, 500)
    summary = train_labeler(reports, labels, tmp_path / "labeler", size="tiny", passes=16)
    assert json.loads((tmp_path / "labeler" / "training.json").read_text()) == summary
    assert summary["training_reports"] == 450 and summary["validation_reports"] == 50
    assert summary["best"]["micro_f1"] == max(entry["micro_f1"] for entry in summary["curve"])
    assert [entry["pass"] for entry in summary["curve"]] == list(range(1, 17))
    loaded = Labeler.load(tmp_path / "labeler")
    assert loaded.fingerprint == summary["fingerprint"] and loaded.name == "labeler"
    rng = random.Random(1)
    texts, classes = zip(*(toy_study(rng) for _ in range(200)), strict=True)
    assert (loaded.label(texts) == np.array(classes)).mean() > 0.97


def test_the_same_seed_gives_the_same_labeler_and_leaves_the_callers_seeds(tmp_path: Path) -> None:
    reports, labels = write_toy(tmp_path, 40)
    before = torch.random.get_rng_state()
    first = train_labeler(reports, labels, tmp_path / "a", size="tiny", passes=1, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    second = train_labeler(reports, labels, tmp_path / "b", size="tiny", passes=1, seed=3)
    other = train_labeler(reports, labels, tmp_path / "c", size="tiny", passes=1, seed=4)
    assert first["fingerprint"] == second["fingerprint"] != other["fingerprint"]


def test_the_best_pass_is_kept_and_the_lower_loss_decides_between_equals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([(0.2, 1.0), (0.9, 3.0), (0.9, 2.0), (0.9, 2.5), (0.1, 0.5)])
    seen: list[torch.Tensor] = []

    def validate(run: training._Run, texts: object, classes: object) -> dict[str, float]:
        seen.append(run.model.linear_heads[0].get_parameter("weight").detach().clone())
        micro_f1, loss = next(scores)
        return {"micro_f1": micro_f1, "validation_loss": loss, "classes_right": 0.0}

    monkeypatch.setattr(training._Run, "_validate", validate)
    reports, labels = write_toy(tmp_path, 40)
    summary = train_labeler(reports, labels, tmp_path / "labeler", size="tiny", passes=5)
    kept = Labeler.load(tmp_path / "labeler").model.linear_heads[0].get_parameter("weight")
    assert [torch.equal(kept, weight) for weight in seen] == [False, False, True, False, False]
    assert summary["best"]["pass"] == 3


def test_time_ends_the_training_with_a_labeler_that_loads(tmp_path: Path) -> None:
    reports, labels = write_toy(tmp_path, 60)
    summary = train_labeler(reports, labels, tmp_path / "labeler", size="tiny", passes=100_000, max_minutes=0.02)
    assert summary["seconds"] < 30
    assert Labeler.load(tmp_path / "labeler").label(["No pneumothorax."]).shape == (1, 14)


def test_nothing_is_unknown_to_the_vocabulary_which_is_the_same_every_time() -> None:
    reports = [toy_study(random.Random(seed))[0] for seed in range(50)] + ["Größe: 3 cm, Erguß möglich."]
    tokenizer = train_tokenizer(reports, 200)
    unknown = tokenizer.token_to_id("[UNK]")
    for text in [*reports, "Zyxwvut (qqq) 12-34/56 & <report> don't; jab!"]:
        assert unknown not in tokenizer.encode(text).ids
    assert tokenizer.encode("EFFUSION").tokens == tokenizer.encode("effusion").tokens == ["effusion"]
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == list(range(5))
    for _ in range(3):  # the library numbers the characters in another order each time unless they are given to it
        assert train_tokenizer(reports, 200).get_vocab() == tokenizer.get_vocab()


def test_first_layer_starts_at_the_neighbours() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, intermediate_size=64)
    config._attn_implementation = "eager"
    model = CheXbert(config).eval()
    start_local(model)
    ids = torch.randint(5, 50, (1, 60))
    attention = model.bert(input_ids=ids, output_attentions=True).attentions[0][0]  # [heads, 60, 60]
    for head, offset in enumerate((-1, 1, -2, 2, -4, 4, -6, 6)):
        peaks = attention[head, 10:50].argmax(dim=-1) - torch.arange(10, 50)
        assert peaks.float().median() == offset


def test_observation_scores_count_positives_by_hand() -> None:
    reference = np.zeros((4, 14), dtype=np.int64)
    predicted = reference.copy()
    reference[:, 9] = [1, 1, 3, 2]
    predicted[:, 9] = [1, 2, 1, 2]
    scores = observation_scores(predicted, reference)
    assert scores["Pleural Effusion"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert scores["Edema"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert list(scores) == list(OBSERVATIONS)


def test_reports_survive_the_csv(tmp_path: Path) -> None:
    reports = {"1": 'Heart is "large",\nlungs clear.', "2": "", "3": "Erguß"}
    write_reports_csv(tmp_path / "reports.csv", reports)
    assert read_reports_csv(tmp_path / "reports.csv") == reports


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,clear\n", "`id` and `report` are needed"),
        ("id,report\n1,clear\n1,clear\n", r"reports\.csv, line 3: id '1' stands twice"),
        ("id,report\n,clear\n", r"reports\.csv, line 2: empty id"),
        ("id,report\n1,clear\n2\n", r"reports\.csv, line 3, id '2': the row ends before its last column"),
        ("id,report\n1,clear, and dry\n", r"reports\.csv, line 2, id '1': .*quotes"),
    ],
)
def test_a_bad_reports_file_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "reports.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_reports_csv(tmp_path / "reports.csv")


@pytest.mark.parametrize(
    ("lost", "emptied", "message"),
    [
        ("labels", False, r"reports\.csv, line 9: id 's7' is not in .*labels\.csv \(1 such ids\)"),
        ("reports", False, r"labels\.csv, line 9: id 's7' is not in .*reports\.csv \(1 such ids\)"),
        (None, True, r"reports\.csv, line 9: the report of id 's7' is empty"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_line(tmp_path: Path, lost: str | None, emptied: bool, message: str) -> None:
    reports, labels = write_toy(tmp_path, 30)
    if lost:
        path = {"reports": reports, "labels": labels}[lost]
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("s7,")))
    if emptied:
        write_reports_csv(reports, {**read_reports_csv(reports), "s7": "  "})
    with pytest.raises(ValueError, match=message):
        train_labeler(reports, labels, tmp_path / "labeler", size="tiny")
    assert not (tmp_path / "labeler").exists()


def test_too_few_reports_and_unknown_sizes_are_refused(tmp_path: Path) -> None:
    reports, labels = write_toy(tmp_path, 5)
    with pytest.raises(ValueError, match="5 reports; at least 20"):
        train_labeler(reports, labels, tmp_path / "labeler")
    with pytest.raises(ValueError, match="size 'huge'; allowed are tiny, small"):
        train_labeler(reports, labels, tmp_path / "labeler", size="huge")


@pytest.mark.slow
def test_phantom_reports_of_unseen_wording_are_read(tmp_path: Path) -> None:
    for wording, studies in (("train", 3000), ("heldout", 1000)):
        drawn = {f"s{index}": sample_study("five", len(wording), index, wording=wording) for index in range(studies)}
        write_reports_csv(tmp_path / f"{wording}.csv", {name: study.report for name, study in drawn.items()})
        write_labels_csv(tmp_path / f"{wording}-labels.csv", {name: classes_of_values(study.said) for name, study in drawn.items()})
    train_labeler(tmp_path / "train.csv", tmp_path / "train-labels.csv", tmp_path / "labeler")
    said = Labeler.load(tmp_path / "labeler").label(list(read_reports_csv(tmp_path / "heldout.csv").values()))
    true = np.array(list(read_labels_csv(tmp_path / "heldout-labels.csv").values()))
    assert f1_score(true == 1, said == 1, average="micro") > 0.98
