"""A dashboard is layout alone, made by calls that the real package takes, in the groups of docs/metrics.md."""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import wandb
import yaml

from mrg_r1.config.sections import TrackingSection
from mrg_r1.tracking import dashboard
from mrg_r1.tracking.log import RunLog
from mrg_r1.tracking.page.curves import read_curves, sections
from mrg_r1.tracking.panels import GROUPS, HIGHER_IS_BETTER, group_of, plots
from tests.cli.command import refused
from tests.cli.command import run as command
from tests.tracking.page_runs import write_metrics

# What each object of wandb-workspaces 0.4.13 takes, by inspect.signature; ! where it has to be given.
SIGNATURES = {
    "workspaces": {
        "Workspace": "entity! project! name sections settings runset_settings auto_generate_panels",
        "Section": "name! panels is_open pinned layout_settings panel_settings",
        "WorkspaceSettings": "x_axis x_min x_max smoothing_type smoothing_weight ignore_outliers "
        "sort_panels_alphabetically group_by_prefix remove_legends_from_panels tooltip_number_of_runs "
        "tooltip_color_run_names max_runs point_visualization_method panel_search_query "
        "auto_expand_panel_search_results",
        "RunsetSettings": "query regex_query filters groupby order run_settings group_colors pinned_columns "
        "baseline_run pinned_runs",
    },
    "reports.v2": {
        "Report": "project! entity title description blocks width",
        "H1": "text collapsed_blocks",
        "P": "text",
        "PanelGrid": "runsets hide_run_sets panels active_runset custom_run_colors",
        "Runset": "entity project name query filters groupby order custom_run_colors run_settings pinned_columns "
        "visible_columns hidden_columns column_order column_widths lock_columns",
        "LinePlot": "title x y range_x range_y log_x log_y title_x title_y ignore_outliers groupby groupby_aggfunc "
        "groupby_rangefunc smoothing_factor smoothing_type smoothing_show_original max_runs_to_show "
        "custom_expressions plot_type font_size legend_position legend_template aggregate xaxis_expression "
        "xaxis_format legend_fields metric_regex point_visualization_method line_titles line_colors line_widths "
        "line_marks layout",
        "BarPlot": "title metrics orientation range_x title_x title_y groupby groupby_aggfunc groupby_rangefunc "
        "max_runs_to_show max_bars_to_show custom_expressions legend_template font_size line_titles line_colors "
        "aggregate layout",
        "RunComparer": "diff_only layout",
    },
}
METRICS = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")


class Stand:
    """A stand-in for wandb-workspaces: keeps what is made and saved, and takes nothing that the package would not."""

    def __init__(self):
        self.saved, self.fails, self.modules = [], None, {}
        for path in ("", "workspaces", "reports", "reports.v2", "expr"):
            self.modules[f"wandb_workspaces.{path}".rstrip(".")] = ModuleType(path)
        for path, classes in SIGNATURES.items():
            for name, arguments in classes.items():
                setattr(self.modules[f"wandb_workspaces.{path}"], name, self._class(name, arguments.split()))
        for path in ("workspaces", "expr", "reports", "reports.v2"):  # as importing them does
            parent, _, name = f"wandb_workspaces.{path}".rpartition(".")
            setattr(self.modules[parent], name, self.modules[f"wandb_workspaces.{path}"])
        self.modules["wandb_workspaces.expr"].Metric = lambda name: SimpleNamespace(
            isin=lambda values: f"{name} in {values}"
        )

    def _class(self, name, arguments):
        known = {argument.rstrip("!") for argument in arguments}
        needed = {argument.rstrip("!") for argument in arguments if argument.endswith("!")}

        def make(**given):
            assert given.keys() <= known and needed <= given.keys(), f"{name}: {sorted(given)}"
            made = SimpleNamespace(kind=name, **given)
            made.save, made.url = lambda: self._save(made), f"https://wandb.example/{name}"
            return made

        return make

    def _save(self, made):
        if self.fails is not None:
            raise self.fails
        self.saved.append(made)


@pytest.fixture
def stand(monkeypatch):
    stand = Stand()
    for name, module in stand.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dashboard, "find_spec", lambda name: name)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="me"))
    return stand


@pytest.fixture
def runs(tmp_path):
    """Two runs that wandb has, one of them with a metric of its own."""
    made = []
    for name in ("smith_john", "two"):
        folder = tmp_path / name
        write_metrics(folder, 30)
        (folder / "wandb_run.json").write_text(json.dumps({"id": f"id-{name[-3:]}", "last_step": 29}))
        recipe = {
            "output_dir": str(folder),
            "steps": 1,
            "data": {"manifest": "m.jsonl"},
            "policy": {"path": "policy"},
            "reward": {"labeler": "labeler"},
            "tracking": {"wandb": "online", "wandb_project": "p"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
        made.append(folder)
    with open(made[1] / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "reward/my_terms:length": 0.5, "validation/disease_macro13": null}\n')
    return made


def line_plots(section_or_block):
    return [panel for panel in section_or_block.panels if panel.kind == "LinePlot"]


def test_a_workspace_has_the_groups_of_the_page_and_only_these_runs(stand, runs, capsys):
    code, output, _ = command(capsys, "dashboard", *runs, "--project", "p")
    [workspace] = stand.saved
    assert code == 0 and "https://wandb.example/Workspace" in output
    assert (workspace.entity, workspace.project) == ("me", "p")
    assert workspace.runset_settings.filters == ["ID in ['id-ohn', 'id-two']"]
    assert [section.name for section in workspace.sections] == [
        section["title"] for section in sections([read_curves(run) for run in runs])
    ]
    drawn = {panel.title: panel.y for section in workspace.sections for panel in line_plots(section)}
    assert drawn["mean reward, beside one constant report"] == ["reward/total", "reward/constant"]
    assert drawn["reward terms, before weights"] == ["reward/my_terms:length"]
    logged = {
        name
        for run in runs
        for line in (run / "metrics.jsonl").read_text().splitlines()
        for name, value in json.loads(line).items()
        if value is not None
    }
    assert {name for names in drawn.values() for name in names} == logged - {"step"}


def test_a_report_compares_the_runs(stand, runs, capsys):
    assert command(capsys, "dashboard", *runs, "--project", "p", "--entity", "team", "--report")[0] == 0
    workspace, report = stand.saved
    assert workspace.entity == report.entity == "team"
    grids = [block for block in report.blocks if block.kind == "PanelGrid"]
    assert all(grid.runsets[0].filters == workspace.runset_settings.filters for grid in grids)
    assert [panel.metrics for panel in grids[0].panels if panel.kind == "BarPlot"] == [
        ["reward/total.max"],
        ["validation/disease_micro13.max"],
    ]
    assert "summary:reward/total.max" in workspace.runset_settings.pinned_columns
    assert [panel.kind for panel in grids[0].panels][-1] == "RunComparer"
    headings = [block.text for block in report.blocks if block.kind == "H1"]
    assert headings[1:] == [section.name for section in workspace.sections]


def test_runs_are_compared_by_what_wandb_keeps_of_them(tmp_path, runs):
    """wandb's own summary, of a run offline."""
    (tmp_path / "tracked").mkdir()
    log = RunLog(tmp_path / "tracked", active=True, steps=2, options=TrackingSection(wandb="offline"), config={})
    for step, value in enumerate((0.9, 0.1)):
        log.log(step, {"reward/total": value})
    kept = log._backends[1]._run.summary
    deadline = time.monotonic() + 60
    while "reward/total" not in kept.keys() and time.monotonic() < deadline:  # wandb's own process may be behind
        time.sleep(0.1)
    assert dict(kept["reward/total"]) == {"max": 0.9}
    log.close()
    assert "reward/total.max" in dashboard.read_layout(runs, entity="me", project="p").compared


def test_layout_alone_is_sent(stand, runs, capsys):
    """No name of a folder, no number of a metric."""
    command(capsys, "dashboard", *runs, "--project", "p", "--report")
    sent = repr(stand.saved)
    assert "smith_john" not in sent and not re.search(r"0\.\d", sent)


def test_what_keeps_a_dashboard_from_being_made_is_named(stand, runs, capsys, monkeypatch):
    make = ["dashboard", *runs, "--project", "p"]
    stand.fails = wandb.errors.UsageError("No API key configured.")
    message = refused(capsys, *make)
    assert "No API key configured" in message and "wandb login" in message and "me/p" in message
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity=None))
    assert "--entity" in refused(capsys, *make)
    (runs[0] / "wandb_run.json").unlink()
    assert "smith_john: no wandb_run.json" in refused(capsys, *make)
    (runs[0] / "metrics.jsonl").unlink()
    assert "smith_john: no metrics.jsonl" in refused(capsys, *make)
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    assert "pip install 'wandb-workspaces>=0.4.13'" in refused(capsys, *make)
    assert stand.saved == []


def test_runs_that_may_not_be_there_are_said(stand, runs, capsys):
    recipe = yaml.safe_load((runs[0] / "config.yaml").read_text())
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(recipe | {"tracking": {"wandb": "offline"}}))
    _, _, notes = command(capsys, "dashboard", *runs, "--project", "p")
    assert f"wandb sync {runs[0]}/wandb/offline-run-*" in notes and "in the project mrg-r1" in notes
    assert str(runs[1]) not in notes


def test_the_page_of_metrics_has_the_groups_of_the_code():
    """docs/metrics.md's headings are the groups, and each metric stands under its own."""
    headed: dict[str, list[str]] = {}
    for part in METRICS.split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
        if names:
            headed[heading] = names
    assert headed.keys() == GROUPS.keys()
    assert [(name, heading) for heading, names in headed.items() for name in names if group_of(name) != heading] == []
    assert set(HIGHER_IS_BETTER) <= {name for names in headed.values() for name in names}


def test_seconds_are_drawn_with_seconds_alone():
    names = ["time/rollout", "time/update", "time/tokens_per_second", "time/update_tflops", "time/update_mfu"]
    drawn = [plot.names for plot in plots([*names, "time/labeler_cpu", "time/save"])["Time and memory"]]
    assert ["time/labeler_cpu", "time/rollout", "time/save", "time/update"] in drawn
    assert all([name] in drawn for name in names[2:])


def test_many_lines_of_several_runs_are_drawn_apart():
    names = [f"agreement/{name}" for name in "abcde"]
    assert [plot.names for plot in plots(names)["Rewards"]] == [names]
    assert [plot.names for plot in plots(names, runs=2)["Rewards"]] == [[name] for name in names]


def test_the_real_package_takes_what_the_stand_in_takes(runs, monkeypatch):
    """Where it is installed: the same signatures, and its own serialisation of what is made here; nothing is sent."""
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    reports = pytest.importorskip("wandb_workspaces.reports.v2")
    for module, classes in ((workspaces, "workspaces"), (reports, "reports.v2")):
        for name, arguments in SIGNATURES[classes].items():
            taken = inspect.signature(getattr(module, name)).parameters
            assert {argument.rstrip("!") for argument in arguments.split()} <= taken.keys(), name
    made = []
    monkeypatch.setattr(dashboard, "_saved", lambda one, *_: made.append(one))
    layout = dashboard.read_layout(runs, entity="me", project="p")
    dashboard.save_workspace(layout)
    dashboard.save_report(layout)
    interface = "wandb_workspaces.reports.v2.interface."
    with mock.patch(f"{interface}_get_api"), mock.patch(f"{interface}execute_graphql"):  # asks for the project's id
        view, report = (one._to_model().spec.model_dump_json(by_alias=True, exclude_none=True) for one in made)
    for spec in (view, report):
        assert '"value":["id-ohn","id-two"]' in spec and "reward/my_terms:length" in spec and "smith_john" not in spec
