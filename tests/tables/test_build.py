"""The numbers of a table, against values worked out by hand, and its four layouts."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from scipy import stats

from mrg_r1.cli import main
from mrg_r1.config.control import as_sft
from mrg_r1.config.recipe import dump_recipe, load_recipe
from mrg_r1.metrics.seeds import t_interval
from mrg_r1.tables.build import build_table
from mrg_r1.tables.plan import TableError, keep_protocol, plan_table
from mrg_r1.tables.render import table_as_csv, table_as_latex, table_as_markdown
from tests.ranks.conftest import ROOT
from tests.tables.conftest import FAKE
from tests.tables.fake_launch import leave_evaluation


def _finish(run, hits: int, *, zero_signal=(0.2, 0.4)) -> None:
    (run.folder / "evaluation").mkdir(parents=True)
    leave_evaluation(run.folder, "test_before", 2)
    leave_evaluation(run.folder, "test", hits)
    (run.folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": 0, "groups/zero_signal": value}) + "\n" for value in zero_signal)
    )
    (run.folder / "environment.json").write_text(json.dumps({"commit": "abc"}))
    (run.folder / "summary.json").write_text(json.dumps({"status": "complete"}))


def _f1(hits: int, *, truth: bool) -> float:
    """Ten reports of which the first `hits` say effusion; the labeler reads one in all ten references, the truth has it
    in nine.
    """
    true, positives = min(hits, 9 if truth else 10), 9 if truth else 10
    return 2 * true / (hits + positives)


@pytest.fixture
def plan(table, tmp_path):
    return plan_table(table(), rows_folder=tmp_path / "rows")


def test_cells_are_the_mean_and_spread_of_the_seeds(plan):
    _finish(plan.runs["Four", 0], 4)
    _finish(plan.runs["Four", 1], 10)
    built = build_table(plan)
    rows = {row.name: row for row in built.rows}
    cell = rows["Four"].cells["truth:disease_micro13"]
    a, b = _f1(4, truth=True), _f1(10, truth=True)
    assert cell.values == pytest.approx({0: a, 1: b})
    assert (cell.mean, cell.least, cell.most) == pytest.approx(((a + b) / 2, a, b))
    assert rows["Four"].cells["labeler:Pleural Effusion"].values == pytest.approx({0: _f1(4, truth=False), 1: 1.0})
    assert rows["Four"].cells["step:groups/zero_signal"].mean == pytest.approx(0.3)
    start = rows["Start"].cells
    assert start["truth:disease_micro13"].values == pytest.approx({0: _f1(2, truth=True), 1: _f1(2, truth=True)})
    assert start["step:groups/zero_signal"].mean is None
    assert built.missing == ["Eight & more, seed 0", "Eight & more, seed 1", "SFT, seed 0", "SFT, seed 1"]


def test_differences_are_paired_by_seed(plan):
    for seed, (four, eight) in enumerate(((4, 6), (5, 6))):
        _finish(plan.runs["Four", seed], four)
        _finish(plan.runs["Eight & more", seed], eight)
    gain = next(row for row in build_table(plan).rows if row.name == "Eight & more").gains["labeler:Pleural Effusion"]
    differences = [_f1(6, truth=False) - _f1(4, truth=False), _f1(6, truth=False) - _f1(5, truth=False)]
    # of an observation there is no bootstrap
    assert gain.mean == pytest.approx(np.mean(differences)) and gain.studies_interval is None
    truth = next(row for row in build_table(plan).rows if row.name == "Eight & more").gains["truth:disease_micro13"]
    pooled = [2 * hits / (hits + 18) for hits in (9, 12)]
    assert truth.studies_difference == pytest.approx(pooled[1] - pooled[0])
    low, high = truth.studies_interval
    assert low <= truth.studies_difference <= high and low >= 0  # no study got worse


def test_the_interval_over_seeds_is_student_s(plan):
    values = [0.1, 0.25, 0.4]
    low, high = t_interval(values)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values)))
    assert t_interval([0.3]) is None


def test_rows_evaluated_on_other_references_are_not_compared(plan):
    _finish(plan.runs["Four", 0], 4)
    _finish(plan.runs["Eight & more", 0], 4)
    path = plan.runs["Eight & more", 0].folder / "evaluation" / "test_predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(TableError, match="references"):
        build_table(plan)


def test_a_column_that_the_runs_cannot_give_says_why(table, tmp_path):
    plan = plan_table(table(columns=["held_out:example14"]), rows_folder=tmp_path / "rows")
    _finish(plan.runs["Four", 0], 4)
    with pytest.raises(TableError, match="evaluation.held_out_labeler"):
        build_table(plan)


def test_a_run_of_version_0_1_0_with_a_judge_is_to_be_run_again(table, tmp_path):
    plan = plan_table(table(columns=["held_out:example14"]), rows_folder=tmp_path / "rows")
    _finish(plan.runs["Four", 0], 4)
    path = plan.runs["Four", 0].folder / "evaluation" / "test_predictions.jsonl"
    rows = [json.loads(line) | {"judge_labels": [None] * 14} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TableError, match=r"0\.1\.0.*run the row again"):
        build_table(plan)


def test_every_layout_names_definition_origin_and_what_is_missing(table, tmp_path):
    paper = {
        "system": "A paper",
        "column": "truth:disease_micro13",
        "value": 0.5,
        "definition": "definition not stated",
        "source": "X",
    }
    plan = plan_table(table(published=[paper]), rows_folder=tmp_path / "rows")
    for seed in (0, 1):
        _finish(plan.runs["Four", seed], 4 + seed)
        _finish(plan.runs["Eight & more", seed], 8)
    built = build_table(plan)
    text = table_as_markdown(built)
    assert (
        "disease_micro13 F1, drawn truth" in text
        and "made on phantoms" in text
        and "Not finished: SFT, seed 0; SFT, seed 1" in text
    )
    assert "micro over 13 observations, uncertain not positive" in text and "definition not stated" in text
    lines = list(csv.DictReader(io.StringIO(table_as_csv(built))))
    eight = next(line for line in lines if line["row"] == "Eight & more" and line["column"] == "truth:disease_micro13")
    assert float(eight["seed_1"]) == pytest.approx(_f1(8, truth=True)) and eight["made_on"] == "phantoms"
    assert (
        next(line for line in lines if line["row"] == "A paper")["definition_of_published"] == "definition not stated"
    )
    latex = table_as_latex(built)
    assert "Eight \\& more" in latex and "disease\\_micro13" in latex and "\\toprule" in latex


def test_a_row_can_be_a_control_and_the_table_says_which(table, tmp_path, monkeypatch):
    """Further SFT waits for the run whose time it gets, and its folder is known again though it holds what SFT made of
    the recipe.
    """
    path = table(
        rows=[
            {"name": "Four", "set": {"grpo.group_size": 4}},
            {"name": "Best of four", "set": {"grpo.group_size": 4, "control": "rft"}},
            {"name": "SFT", "set": {"control": "sft", "control_of": "{run:Four}"}},
        ]
    )
    plan = plan_table(path, rows_folder=tmp_path / "rows", seeds=[0])
    four, sft = plan.runs["Four", 0], plan.runs["SFT", 0]
    assert sft.waits_for == (four.folder,) and plan.runs["Best of four", 0].folder != four.folder
    recipe = as_sft(load_recipe(sft.recipe_file, sft.overrides))
    timed = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"max_cpu_seconds": 3.0})})
    _finish(sft, 4)
    (sft.folder / "config.yaml").write_text(dump_recipe(timed))
    again = plan_table(path, rows_folder=tmp_path / "rows", seeds=[0])
    assert again.runs["SFT", 0].finished
    assert "Controls: Best of four (rejection fine-tuning), SFT (further SFT)." in table_as_markdown(build_table(again))


def test_the_command_runs_and_writes_a_table_and_a_failure_still_leaves_the_others(
    table, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    path, out = table(), tmp_path / "out"
    assert main(["table", str(path), "-o", str(out), "--launch", FAKE, "--parallel", "2", "--seeds", "0"]) == 0
    assert (out / "table" / "table.md").is_file() and json.loads((out / "table" / "table.json").read_text())[
        "missing"
    ] == []
    assert "Eight & more" in capsys.readouterr().out
    (out / "table" / "table.md").unlink()
    assert main(["table", str(path), "grpo.beta=0.9", "-o", str(out), "--launch", FAKE, "--seeds", "1"]) == 2
    assert "the labeler has died" in capsys.readouterr().err and (out / "table" / "table.md").is_file()
    assert main(["table", str(path), "-o", str(out), "--plan"]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_protocol_that_changed_after_runs_were_started_is_said(table, tmp_path):
    with pytest.raises(TableError, match=r"protocol PLAN.md: no such file"):
        plan_table(table(protocol="PLAN.md"), rows_folder=tmp_path / "rows")
    protocol = tmp_path / "PLAN.md"
    protocol.write_text("F1 decides.")
    plan = plan_table(table(protocol="PLAN.md"), rows_folder=tmp_path / "rows")
    for seed in (0, 1):
        _finish(plan.runs["Four", seed], 4)
        keep_protocol(plan.runs["Four", seed])
    assert "under the protocol as it stands in PLAN.md" in table_as_markdown(build_table(plan))
    protocol.write_text("Reward decides.")
    keep_protocol(plan.runs["Four", 0])  # started again, it keeps the text that it was begun under
    _finish(plan.runs["Eight & more", 0], 8)
    keep_protocol(plan.runs["Eight & more", 0])
    _finish(plan.runs["Eight & more", 1], 8)
    built = build_table(plan)
    assert built.off_protocol == [
        "Four, seed 0 (changed)",
        "Four, seed 1 (changed)",
        "Eight & more, seed 1 (not known)",
    ]
    assert "PLAN.md, was changed after these runs were started" in table_as_markdown(built)


def _add_radeval(run, values, package="radeval 2.2.1") -> None:
    folder = run.folder / "evaluation"
    rows = [json.loads(line) for line in (folder / "test_predictions.jsonl").read_text().splitlines()]
    for row, value in zip(rows, values, strict=True):
        row["radeval"] = None if value is None else {"ratescore": value}
    (folder / "test_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = {
        "package": package,
        "metrics": {"ratescore": {"variant": "v", "weights_sha256": "f"}},
        "metric_of": {"ratescore": "ratescore"},
    }
    (folder / "test.json").write_text(json.dumps({"distinct_share": 0.1, "radeval": described}))


def test_a_column_of_radevals_is_the_mean_over_reports_and_of_one_package(table, tmp_path):
    file = table(columns=["radeval:ratescore"], rows=[{"name": "Four"}, {"name": "Eight", "set": {"grpo.beta": 0.5}}])
    plan = plan_table(file, rows_folder=tmp_path / "rows")
    for seed in (0, 1):
        for row, hits, value in (("Four", 4, 0.25), ("Eight", 8, 0.5)):
            _finish(plan.runs[row, seed], hits)
            _add_radeval(plan.runs[row, seed], [value] * 9 + [None])
    built = build_table(plan)
    rows = {row.name: row for row in built.rows}
    assert rows["Four"].cells["radeval:ratescore"].mean == 0.25
    gain = rows["Eight"].gains["radeval:ratescore"]
    assert (gain.mean, gain.studies_difference, gain.studies_interval) == (0.25, 0.25, (0.25, 0.25))
    assert "ratescore (RadEval)" in table_as_markdown(built)
    _add_radeval(plan.runs["Eight", 1], [0.5] * 10, package="radeval 2.3.0")
    with pytest.raises(TableError, match="Four, seed 0 was scored by .*2.2.1.*Eight, seed 1 by .*2.3.0"):
        build_table(plan)
    leave_evaluation(plan.runs["Four", 0].folder, "test", 4)
    with pytest.raises(TableError, match="predictions have no ratescore; evaluate it again with radeval.python"):
        build_table(plan)
    with pytest.raises(TableError, match="RadEval gives no such value; there are radgraph_partial"):
        build_table(plan_table(table(columns=["radeval:spice"]), rows_folder=tmp_path / "rows"))
