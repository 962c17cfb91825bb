"""`mrg-r1` from the outside: it teaches in --help, refuses bad input in one message, and writes what the specification
fixes.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrg_r1 import cli
from mrg_r1.data.study import read_manifest, write_manifest
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS, read_labels_csv, write_labels_csv
from mrg_r1.labels.reports import read_reports_csv, write_reports_csv
from mrg_r1.metrics import lexical
from mrg_r1.metrics.clinical import DEFINITIONS
from tests.cli.command import refused, run, usage_error
from tests.labels.tiny import published_file, published_state, tiny_model, tiny_tokenizer
from tests.world import few_texts

EFFUSION = OBSERVATIONS.index("Pleural Effusion")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "prepare phantom",
        "prepare iu-xray",
        "prepare tiny-policy",
        "labeler train",
        "labeler convert",
        "label",
        "score",
        "reward-card",
        "report",
        "summary",
        "page",
        "export",
        "doctor",
    ],
)
def test_help_teaches_by_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert f"examples:\n  mrg-r1 {command}".rstrip() in capsys.readouterr().out


LIGHT = """
import sys
from mrg_r1 import cli

def loaded(*names):
    return [name for name in names if name in sys.modules]

for command in ([], ["prepare", "phantom"], ["prepare", "iu-xray"], ["prepare", "manifest"], ["reward-card"]):
    try:
        cli.main([*command, "--help"])
    except SystemExit:
        pass
after_help = loaded("torch", "transformers", "numpy", "PIL")
cli.main(["score", *sys.argv[1:], "--samples", "2"])
print(after_help, loaded("torch", "deepspeed", "peft", "transformers"))
"""


def test_help_and_scores_of_labels_wait_for_no_heavy_import(tmp_path: Path) -> None:
    files = [str(path) for path in label_files(tmp_path)]
    command = [sys.executable, "-c", LIGHT, *files]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert ended.stdout.splitlines()[-1] == "[] []"


def test_it_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "mrg_r1.cli", "score", "nowhere.csv", "nowhere.csv"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 2 and ended.stderr.startswith("mrg-r1: nowhere.csv: ") and ended.stderr.count("\n") == 1


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in usage_error(capsys)


@pytest.mark.parametrize("splits", ["train", "train=", "train=x", "train=0", "train=-1", "=4", "train=1,train=2", ""])
def test_splits_that_cannot_be_read_are_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, splits: str
) -> None:
    assert "--splits" in usage_error(capsys, "prepare", "phantom", "-o", tmp_path / "out", "--splits", splits)
    assert not (tmp_path / "out").exists()


def test_a_bad_seed_or_side_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--seed" in usage_error(capsys, "prepare", "phantom", "-o", tmp_path, "--seed", "x")
    assert "--side" in usage_error(capsys, "prepare", "phantom", "-o", tmp_path, "--side", "0")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("phantoms") / "five"
    command = ["prepare", "phantom", "-o", str(output), "--splits", "train=40,val=2", "--side", "32", "--seed", "7"]
    with few_texts():
        assert cli.main(command) == 0
    return output


def test_prepare_phantom_writes_a_manifest_that_can_be_read(phantoms: Path) -> None:
    studies = read_manifest(phantoms / "manifest.jsonl")
    assert [study.split for study in studies] == ["train"] * 40 + ["val"] * 2


def test_another_preset_or_seed_in_the_same_folder_is_refused(
    capsys: pytest.CaptureFixture[str], phantoms: Path
) -> None:
    same = ("prepare", "phantom", "-o", phantoms, "--splits", "train=40,val=2", "--side", "32")
    assert "`seed`" in refused(capsys, *same)
    assert "five, full" in refused(capsys, "prepare", "phantom", "-o", phantoms, "--preset", "six")


def test_prepare_tiny_policy_learns_its_words_from_the_train_reports(phantoms: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert (
        cli.main(
            ["prepare", "tiny-policy", "-o", str(tmp_path / "policy"), "--manifest", str(phantoms / "manifest.jsonl")]
        )
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    report = read_manifest(phantoms / "manifest.jsonl", split="train")[0].report
    ids = tokenizer(report)["input_ids"]
    assert tokenizer.decode(ids) == report
    assert len(ids) < 2 * len(report.split())


def test_prepare_tiny_policy_passes_over_studies_without_a_report_and_refuses_where_there_is_none(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies = read_manifest(phantoms / "manifest.jsonl")
    for count in (1, len(studies)):
        bare = [replace(study, report=None) if n < count else study for n, study in enumerate(studies)]
        write_manifest(tmp_path / f"{count}.jsonl", bare)
    arguments = ("prepare", "tiny-policy", "-o", tmp_path / "policy", "--manifest")
    train = sum(study.split == "train" for study in studies)
    assert cli.main([*map(str, arguments), str(tmp_path / "1.jsonl")]) == 0
    assert f"learned from {train - 1:,} reports" in capsys.readouterr().out
    assert "no train study has a report" in refused(capsys, *arguments, tmp_path / f"{len(studies)}.jsonl")


@pytest.fixture(scope="module")
def labeler(phantoms: Path) -> Path:
    output = phantoms.parent / "labeler"
    command = ["labeler", "train", str(phantoms / "reports.csv"), str(phantoms / "labels.csv"), "-o", str(output)]
    assert cli.main([*command, "--size", "tiny", "--passes", "1"]) == 0
    return output


def test_label_writes_one_row_a_report_in_order(phantoms: Path, labeler: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "labels.csv"
    assert cli.main(["label", str(phantoms / "heldout_reports.csv"), "--labeler", str(labeler), "-o", str(output)]) == 0
    assert list(read_labels_csv(output)) == list(read_reports_csv(phantoms / "heldout_reports.csv"))


def test_convert_writes_labelers_that_read_as_the_published_file_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = published_file(tmp_path, published_state(tiny_model()))
    words = tmp_path / "words"
    words.mkdir()
    tiny_tokenizer().save(str(words / "tokenizer.json"))
    reports = tmp_path / "reports.csv"
    reports.write_text("id,report\na,no evidence of pleural effusion\nb,the heart is enlarged .\nc,\n")
    formats = {
        "file": (source, words),
        "folder": (tmp_path / "chexbert", None),
        "copy": (tmp_path / "chexbert.safetensors", words),
    }
    said = run(capsys, "labeler", "convert", source, "-o", formats["folder"][0], "--tokenizer", words)[1]
    said += run(capsys, "labeler", "convert", source, "-o", formats["copy"][0])[1]
    assert len({line.rpartition(" ")[2] for line in said.splitlines()}) == 1 and len(said.splitlines()) == 2
    labels = []
    for name, (path, tokenizer) in formats.items():
        more = [] if tokenizer is None else ["--tokenizer", tokenizer]
        assert run(capsys, "label", reports, "--labeler", path, *more, "-o", tmp_path / f"{name}.csv")[0] == 0
        labels.append((tmp_path / f"{name}.csv").read_text())
    assert labels[0] == labels[1] == labels[2] and len(set(labels[0].splitlines())) == 4
    half = run(
        capsys, "label", reports, "--labeler", formats["folder"][0], "--dtype", "bfloat16", "-o", tmp_path / "half.csv"
    )
    assert half[0] == 0 and (tmp_path / "half.csv").read_text().count("\n") == 4
    assert "chexbert.safetensors" in refused(capsys, "labeler", "convert", source, "-o", formats["copy"][0])


def test_score_labels_reports_where_it_is_given_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, phantoms: Path, labeler: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(lexical, "why_no_meteor", lambda: "starting Java takes seconds")
    reports = phantoms / "heldout_reports.csv"
    code, out, _ = run(
        capsys, "score", reports, reports, "--labeler", labeler, "--train", reports, "--json", tmp_path / "scores.json"
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert code == 0 and scores["n"] == 40 and scores["labeler"]["name"] == labeler.name
    # a file against itself: whatever the labeler reads, micro F1 is 1 (or 0 if it reads no positive at all)
    assert scores["definitions"]["r2gen_micro14"]["f1"] in (0.0, 1.0)
    assert scores["baselines"]["random_train"].keys() == DEFINITIONS.keys() and scores["random_train_reason"] is None


def test_reports_without_a_labeler_are_refused(capsys: pytest.CaptureFixture[str], phantoms: Path) -> None:
    message = refused(capsys, "score", phantoms / "reports.csv", phantoms / "reports.csv")
    assert "reports.csv" in message and "--labeler" in message


def label_files(folder: Path) -> tuple[Path, Path]:
    """Four studies by hand: the references have an effusion in two; the predictions find one of them and invent one."""
    effusion = [0] * 14
    effusion[EFFUSION] = 1
    normal = [0] * 14
    normal[NO_FINDING] = 1
    reference = {"a": effusion, "b": effusion, "c": normal, "d": normal}
    predicted = {"d": normal, "c": effusion, "b": normal, "a": effusion}  # joined on the id, not on the row
    write_labels_csv(folder / "reference.csv", reference)  # type: ignore[arg-type]
    write_labels_csv(folder / "predicted.csv", predicted)  # type: ignore[arg-type]
    return folder / "predicted.csv", folder / "reference.csv"


def test_score_writes_the_layout_that_scripts_rely_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    predicted, reference = label_files(tmp_path)
    code, out, _ = run(capsys, "score", predicted, reference, "--json", tmp_path / "out" / "scores.json")
    assert code == 0
    scores: dict[str, Any] = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["n"] == 4
    assert scores["definitions"].keys() == DEFINITIONS.keys()
    for score in scores["definitions"].values():
        assert score.keys() == {"precision", "recall", "f1", "f1_ci"}
        assert len(score["f1_ci"]) == 2 and 0 <= score["f1_ci"][0] <= score["f1_ci"][1] <= 1
    assert scores["definitions"]["disease_micro13"] | {"f1_ci": 0} == {
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "f1_ci": 0,
    }
    assert scores["support"].keys() == set(OBSERVATIONS)
    assert scores["support"]["Pleural Effusion"] == scores["support"]["No Finding"] == 2
    assert scores["baselines"].keys() == {"constant_normal", "blank", "random_train", "reference"}
    for baseline in ("constant_normal", "blank", "reference"):
        assert scores["baselines"][baseline].keys() == DEFINITIONS.keys()
    assert scores["baselines"]["constant_normal"]["example14"]["f1"] == 0.5
    assert scores["baselines"]["reference"]["disease_micro13"]["f1"] == 1.0
    assert scores["baselines"]["random_train"] is None and "--train" in scores["random_train_reason"]
    for name in DEFINITIONS:
        assert name in out


def test_a_study_missing_on_either_side_is_an_error_that_names_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    predicted, reference = label_files(tmp_path)
    for path, gone in ((predicted, "b"), (reference, "c")):
        labels = read_labels_csv(path)
        del labels[gone]
        write_labels_csv(path, labels)  # type: ignore[arg-type]
    message = refused(capsys, "score", predicted, reference, "--json", tmp_path / "scores.json")
    assert re.search(r"predicted\.csv: 1 .*: b\b", message)
    assert re.search(r"reference\.csv: 1 .*: c\b", message)
    assert not (tmp_path / "scores.json").exists()


def test_a_label_file_short_of_a_column_is_not_taken_for_reports(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with open(tmp_path / "short.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", *OBSERVATIONS[:-1]], ["a", *[1] * 13]])
    assert "['No Finding']" in refused(capsys, "score", tmp_path / "short.csv", tmp_path / "short.csv")


def test_files_that_are_not_there_are_named_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    write_reports_csv(tmp_path / "reports.csv", {"a": "Clear."})
    for arguments in (
        ("score", nowhere, nowhere),
        ("label", nowhere, "--labeler", nowhere, "-o", tmp_path / "out.csv"),
        ("label", tmp_path / "reports.csv", "--labeler", nowhere, "-o", tmp_path / "out.csv"),
        ("labeler", "train", nowhere, nowhere, "-o", tmp_path / "out"),
        ("prepare", "iu-xray", nowhere, "-o", tmp_path / "out"),
        ("prepare", "tiny-policy", "-o", tmp_path / "out", "--manifest", nowhere),
        ("summary", nowhere),
    ):
        assert str(nowhere) in refused(capsys, *arguments)
    assert not (tmp_path / "out.csv").exists()


def test_a_control_that_cannot_be_shown_is_refused_and_not_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "nowhere" in refused(capsys, "summary", tmp_path, "--control", tmp_path / "nowhere")
    assert "--control" in refused(capsys, "summary", tmp_path, tmp_path, "--control", tmp_path)


def test_a_fault_of_ours_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("fault")

    monkeypatch.setattr(cli.prepare.phantom, "_prepare_phantom", broken)
    with pytest.raises(KeyError):
        cli.main(["prepare", "phantom", "-o", str(tmp_path)])


def test_scores_do_not_depend_on_the_order_of_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    classes: dict[str, Sequence[int]] = {
        f"s{i}": [*rng.integers(0, 4, 13).tolist(), int(rng.integers(0, 2))] for i in range(20)
    }
    guesses: dict[str, Sequence[int]] = {
        f"s{i}": [*rng.integers(0, 4, 13).tolist(), int(rng.integers(0, 2))] for i in range(20)
    }
    write_labels_csv(tmp_path / "reference.csv", classes)
    write_labels_csv(tmp_path / "predicted.csv", guesses)
    write_labels_csv(tmp_path / "turned.csv", dict(reversed(guesses.items())))
    for name in ("predicted", "turned"):
        assert (
            run(
                capsys,
                "score",
                tmp_path / f"{name}.csv",
                tmp_path / "reference.csv",
                "--json",
                tmp_path / f"{name}.json",
            )[0]
            == 0
        )
    assert (tmp_path / "predicted.json").read_text() == (tmp_path / "turned.json").read_text()
