"""What a table's file asks for, and what is wrong with one."""

from __future__ import annotations

import pytest

from mrg_r1.config.recipe import RecipeError
from mrg_r1.tables.build import check_columns
from mrg_r1.tables.plan import TableError, check_inputs, plan_table, read_table
from tests.ranks.conftest import ROOT

TABLES = sorted(
    path for path in (ROOT / "launch" / "recipes" / "tables").glob("*.yaml") if "columns:" in path.read_text()
)


def test_a_row_is_a_run_for_each_seed_with_the_seed_s_own_values(table, tmp_path):
    plan = plan_table(table(), rows_folder=tmp_path / "rows")
    assert list(plan.runs) == [
        ("Four", 0),
        ("Four", 1),
        ("Eight & more", 0),
        ("Eight & more", 1),
        ("SFT", 0),
        ("SFT", 1),
    ]
    run = plan.runs["Four", 1]
    assert "seed=1" in run.overrides and f'data.manifest="{tmp_path}/d1/manifest.jsonl"' in run.overrides
    assert run.overrides[-1] == f"output_dir={run.folder}"
    sft = plan.runs["SFT", 0]
    assert sft.waits_for == (plan.runs["Eight & more", 0].folder, plan.runs["Four", 0].folder)
    assert f'policy.adapter="{plan.runs["Eight & more", 0].folder}/adapter"' in sft.overrides


def test_a_run_s_folder_depends_on_its_recipe_and_not_on_its_row_s_name_or_its_table(table, tmp_path):
    first = plan_table(table(), rows_folder=tmp_path)
    renamed = table(rows=[{"name": "Another name", "set": {"grpo.group_size": 4}}], reference="Another name")
    assert plan_table(renamed, rows_folder=tmp_path).runs["Another name", 0].folder == first.runs["Four", 0].folder
    changed = plan_table(table(), rows_folder=tmp_path, overrides=["grpo.beta=0.5"])
    assert changed.runs["Four", 0].folder != first.runs["Four", 0].folder
    tracked = plan_table(table(), rows_folder=tmp_path, overrides=["tracking.completions_every=7"])
    assert tracked.runs["Four", 0].folder == first.runs["Four", 0].folder


def test_a_finished_run_whose_recipe_means_something_else_today_is_not_taken_for_the_row_s(table, tmp_path):
    path = table()
    plan = plan_table(path, rows_folder=tmp_path / "rows")
    run = plan.runs["Four", 0]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(
        f"output_dir: {run.folder}\nsteps: 1\nseed: 0\ndata: {{manifest: {tmp_path}/d0/manifest.jsonl}}\n"
        f"policy: {{path: {tmp_path}}}\nreward: {{labeler: {tmp_path}}}\n"
        "optimizer: {learning_rate: 0.01}\ngrpo: {group_size: 4, beta: 0.03}\n"
    )
    with pytest.raises(TableError, match=r"grpo\.beta.*0\.03.*0\.02"):
        plan_table(path, rows_folder=tmp_path / "rows")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "Nine"}, "reference 'Nine'"),
        ({"rows": [{"name": "Four"}, {"name": "Four"}]}, "'Four'"),
        ({"rows": [{"name": "Four", "set": {"policy.adapter": "{run:Five}/adapter"}}]}, "'Five'"),
        ({"rows": [{"name": "Four", "cpu_seconds_of": "Four", "task": "sft"}]}, "'Four'"),
        ({"rows": [{"name": "Four"}, {"name": "Five", "cpu_seconds_of": "Four"}]}, "'Five'.*SFT"),
        ({"rows": [{"name": "Four", "before": "Five"}]}, "before 'Five'"),
        ({"rows": [{"name": "Four", "recipe": "other"}]}, "recipes.*'other'"),
        ({"rows": [{"name": "Four", "set": {"policy.path": "{model}"}}]}, r"\{model\}"),
        ({"rows": [{"name": "Four", "sett": {}}]}, "rows.0.sett"),
        ({"seeds": {}}, "seeds"),
        (
            {"published": [{"system": "S", "column": "truth:x", "value": 1, "definition": "?", "source": "?"}]},
            "truth:x",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_named(table, changes, message):
    with pytest.raises(TableError, match=message):
        read_table(table(**changes))


def test_a_wrong_recipe_key_names_the_table_the_row_and_the_seed(table, tmp_path):
    path = table(rows=[{"name": "Four", "set": {"grpo.group": 4}}])
    with pytest.raises(RecipeError, match="grpo.group_size") as refused:
        plan_table(path, rows_folder=tmp_path)
    assert "table.yaml, row 'Four', seed 0" in str(refused.value)


def test_what_the_rows_read_must_be_there_before_any_is_started(table, tmp_path):
    path = table(set={"data.manifest": "{data}/manifest.jsonl", "reward.labeler": "nowhere/labeler"})
    plan = plan_table(path, rows_folder=tmp_path / "rows")
    with pytest.raises(TableError, match="reward.labeler nowhere/labeler") as refused:
        check_inputs(plan)
    assert str(refused.value).count("nowhere") == 1
    check_inputs(plan_table(table(), rows_folder=tmp_path / "rows"))  # the SFT row's adapter is made by another row


@pytest.mark.parametrize("column", ["disease_micro13", "truth:disease_micro14", "judged:example14", "step:"])
def test_a_column_that_is_none_is_refused(column):
    with pytest.raises(TableError, match="column"):
        check_columns([column])


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_that_comes_along_can_be_planned(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = plan_table(path, rows_folder=tmp_path)
    check_columns(plan.spec.columns)
    assert len(plan.spec.seeds) >= 3 and plan.runs
    assert plan.spec.made_on == ("phantoms" if path.stem.endswith("-phantom") else "reports")
