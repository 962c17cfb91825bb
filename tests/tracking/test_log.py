"""The run's log and its backends through interruption, the clock, and the closing table."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from mrg_r1.cli import main
from mrg_r1.config.sections import TrackingSection
from mrg_r1.tracking import log as log_module
from mrg_r1.tracking.log import Clock, RunLog
from mrg_r1.tracking.report import print_report, read_summary, seeds_as_json, training_cpu_seconds, training_seconds
from mrg_r1.types import Study, StudyImage
from tests.tracking.page_runs import by_radeval

OFF = TrackingSection(wandb="off")


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def open_log(directory, *, start=0, active=True):
    return RunLog(directory, active=active, steps=5, options=OFF, config={}, start_step=start)


def test_a_resumed_run_writes_each_step_once(tmp_path):
    log = open_log(tmp_path)
    for step in range(3):
        log.log(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    log = open_log(tmp_path, start=2)
    log.log(2, {"loss": 20.0})
    log.close()
    assert lines(tmp_path) == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 20.0}]


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = open_log(tmp_path, active=False)
    log.log(0, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


class Recorded:
    """A backend, as somebody else would write one."""

    def __init__(self, run):
        self.run, self.told = run, []

    def log(self, step, metrics, shared):
        self.told.append((step, dict(metrics), list(shared)))

    def sync(self):
        self.told.append("sync")

    def close(self):
        self.told.append("close")


@pytest.fixture
def backend(monkeypatch):
    """The one backend of every log that is opened."""
    made = []

    def opened(run):
        made.append(Recorded(run))
        return made

    monkeypatch.setattr(log_module, "open_backends", opened)
    return made


def test_a_backend_is_told_everything_in_order(tmp_path, backend):
    log = open_log(tmp_path, start=2)
    log.log(2, {"loss": 1.0})
    log.sync()
    log.close()
    assert backend[0].told == [(2, {"loss": 1.0}, []), "sync", "close"]
    assert backend[0].run.start_step == 2 and backend[0].run.directory == tmp_path


def test_a_backend_is_given_nothing_of_a_patient_unless_the_recipe_shares_it(tmp_path, backend, study_and_row):
    study, row = study_and_row
    config = {"data": {"manifest": f"{tmp_path}/smith_john/manifest.jsonl"}}
    for options in (
        OFF,
        TrackingSection(wandb="off", share_text=True),
        TrackingSection(wandb="off", share_images=True),
    ):
        backend.clear()
        log = RunLog(tmp_path, active=True, steps=5, options=options, config=config)
        assert backend[0].run.config == {"data": {"manifest": "manifest.jsonl"}}
        log.log(0, {"loss": 1.0}, [(study, row)] * 20)  # a validation before training is no step's
        log.log(1, {"validation/mean_reward": 0.5}, [(study, row)] * 20)
        first, (_, _, shared) = backend[0].told
        assert first[2] == [] and len(shared) == (8 if options.share_text or options.share_images else 0)
        for one in shared:
            assert (one.report == row["text"], one.reference == study.report) == (options.share_text,) * 2
            assert one.has_image == options.share_images and study.id not in (one.report, one.reference, one.number)
            if one.has_image:
                assert max(one.image().size) <= 224
            else:
                with pytest.raises(ValueError, match="share_images"):
                    one.image()


@pytest.fixture
def study_and_row(tmp_path):
    path = tmp_path / "image.png"
    Image.linear_gradient("L").resize((300, 250)).save(path)
    study = Study("patient-17", "p", (StudyImage(path),), "Heart grossly enlarged.", "val")
    return study, {"text": "Lungs are clear zebra."}


def test_importing_the_project_does_not_import_wandb():
    code = "import sys, mrg_r1.training.grpo, mrg_r1.cli.launch; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_clock_adds_phases_and_counts_only_training(capsys):
    clock = Clock()
    for name in ("rollout", "rollout", "validation"):
        with clock.phase(name):
            time.sleep(0.01)
    assert clock.totals["rollout"] >= 0.02 and clock.training_seconds == clock.totals["rollout"]
    assert set(clock.end_step()) == {"time/rollout", "time/validation"} and clock.end_step() == {}
    clock.add({"rollout": 5.0})
    assert clock.training_seconds > 5


def test_clock_keeps_processor_seconds_of_training_through_an_interruption(monkeypatch):
    processor = iter([10.0, 13.0, 100.0, 20.0, 21.0])
    monkeypatch.setattr(time, "process_time", lambda: next(processor))
    clock = Clock()
    for name in ("update", "validation", "rollout"):
        with clock.phase(name):
            pass
    assert clock.training_cpu_seconds == 4.0  # 3 of update and 1 of rollout, nothing of validation
    clock.add({}, 6.5)
    assert clock.training_cpu_seconds == 10.5


def test_clock_counts_what_labelers_take_beside_this_process(monkeypatch):
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    clock, taken = Clock(), 3.0
    with clock.phase("start"):
        clock.count_labelers(lambda: taken, sharing=2)  # it has loaded for 3 seconds
    with clock.phase("rollout"):
        taken += 4.0
    taken += 1.0  # while no phase is open
    with clock.phase("update"):
        pass
    total, count = clock.costs(10, world_size=2)["time/labeler_cpu"]
    assert float(total / count) == 2 * 5.0  # two ranks that each keep such a labeler
    clock.end_step()
    with clock.phase("validation"):
        taken += 7.0
    assert float(clock.costs(10, world_size=1)["time/labeler_cpu"][0]) == 0.0
    assert clock.labeler_totals == {"start": 3.0, "rollout": 4.0, "update": 1.0, "validation": 7.0}
    assert clock.training_cpu_seconds == 2.5  # its share of 5 seconds beside training steps
    clock.add({}, 10.0, {"update": 2.0, "load": 1.0})  # of the run before it was interrupted
    assert clock.training_cpu_seconds == 12.5 and clock.labeler_totals["update"] == 3.0
    assert clock.labeler_totals["load"] == 1.0


def summary(before, after, **more):
    return {
        "before": {"f1": before},
        "after": {"f1": after},
        "seconds": {"rollout": 1},
        "training_seconds": 7.5,
        "training_cpu_seconds": 6.5,
        "labeler_cpu_seconds": {"start": 2.0, "rollout": 1.0},
        "world_size": 2,
    } | {
        "zero_stage": 2,
        "seed": 0,
        "note": "phantoms",
        **more,
    }


def test_report_prints_the_gain_beside_the_control(tmp_path, capsys):
    for seed, (before, after, other) in enumerate([(0.5, 0.6, 0.55), (0.4, 0.6, 0.3), (0.4, 0.4, 0.4)]):
        run = tmp_path / f"run{seed}"
        (run / "control").mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps(summary(before, after, seed=seed)))
        (run / "control" / "summary.json").write_text(json.dumps(summary(None, other)))
    runs = [tmp_path / "run0", tmp_path / "run1", tmp_path / "run2"]
    print_report(runs)
    text = capsys.readouterr().out
    # 0.1, 0.2 and 0: standard deviation 0.1, t of 2 degrees of freedom 4.303, so 4.303 * 0.1 / root 3 to either side
    assert "+0.100 ±0.248  2/3" in text
    assert "-0.017 ±0.190  1/3" in text  # control, from the same start: 0.05, -0.1, 0
    assert "+0.117 ±0.399  2/3" in text  # one minus the other: 0.05, 0.3, 0
    by_seed = seeds_as_json(runs)["seeds"]
    assert list(by_seed) == ["0", "1", "2"] and by_seed["1"]["control"] == {"f1": 0.3}
    assert by_seed["1"]["before"] == {"f1": 0.4} and by_seed["1"]["after"] == {"f1": 0.6}
    with pytest.raises(ValueError, match="second run of seed 0"):
        seeds_as_json([runs[0], runs[0]])
    assert "phantoms" in text
    assert training_seconds(tmp_path / "run0") == 7.5 and training_cpu_seconds(tmp_path / "run0") == 6.5
    assert " ".join(text.split()).count("3 s of processor time by labelers") == 3


def test_the_gain_over_seeds_stands_beside_every_arm_that_is_named(tmp_path, capsys):
    runs = [tmp_path / "run0", tmp_path / "run1"]
    for seed, (run, after) in enumerate(zip(runs, [0.6, 0.8], strict=True)):
        for folder, value in ((run, after), (run / "rft", after - 0.1), (run / "random", 0.5)):
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps(summary(0.5, value, seed=seed)))
    print_report(runs, arms=["rft", "random"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("gain over 2 seeds") == 2 and "rft the one minus the other" in text
    # GRPO, rft and the one minus the other: 0.1 and 0.3, 0 and 0.2, 0.1 and 0.1
    assert "f1 +0.200 ±1.271 2/2 +0.100 ±1.271 1/2 +0.100 ±0.000 2/2" in text
    assert "f1 +0.200 ±1.271 2/2 +0.000 ±0.000 0/2 +0.200 ±1.271 2/2" in text  # random stays at the start
    seeds = seeds_as_json(runs, ["rft", "random"])["seeds"]
    assert seeds["1"]["arms"] == {"rft": {"f1": pytest.approx(0.7)}, "random": {"f1": 0.5}}
    assert seeds["0"]["control"] is None
    with pytest.raises(ValueError, match=r"run0/sft: no summary.json"):
        print_report(runs, arms=["sft"])
    assert main(["summary", str(runs[0]), "--arm", "rft"]) != 0
    assert f"--control {runs[0]}/rft" in capsys.readouterr().err
    assert main(["summary", *map(str, runs), "--arm", "rft", "--json", str(tmp_path / "seeds.json")]) in (0, None)
    assert json.loads((tmp_path / "seeds.json").read_text())["seeds"]["0"]["arms"]["rft"] == {"f1": 0.5}


def test_report_names_the_control(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "control").mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps(summary(0.5, 0.6)))
    (run / "control" / "summary.json").write_text(json.dumps(summary(0.5, 0.55, control="rft")))
    print_report([run])
    assert "control: rejection fine-tuning" in " ".join(capsys.readouterr().out.split())
    print_report([run / "control"])
    assert "control: rejection fine-tuning, test split" in " ".join(capsys.readouterr().out.split())


def test_report_says_where_the_references_labels_are_from(tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps(summary(0.5, 0.6)))
    print_report([tmp_path])
    assert "references' labels" not in capsys.readouterr().out, "an older evaluation does not say"
    (tmp_path / "evaluation").mkdir()
    known = {"reference_labels": {"said": 3, "read": 0, "labeler": None}}
    (tmp_path / "evaluation/test.json").write_text(json.dumps(known))
    print_report([tmp_path])
    text = " ".join(capsys.readouterr().out.split())
    assert "references' labels: what the manifest says (labels.said), of all 3 studies" in text


def test_radevals_means_are_rows_of_a_run_its_control_and_the_gain_over_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # rows are not folded
    runs = [tmp_path / "run0", tmp_path / "run1"]
    for seed, run in enumerate(runs):
        for folder, mean in ((run, 0.5 + 0.2 * seed), (run / "control", 0.4)):
            (folder / "evaluation").mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps(summary(0.5, 0.6, seed=seed)))
            for name, value in (("test_before", 0.25), ("test", mean)):
                (folder / f"evaluation/{name}.json").write_text(json.dumps({"radeval": by_radeval(value)}))
    print_report(runs)
    text = " ".join(capsys.readouterr().out.split())
    assert "radeval:radgraph_simple 0.250 0.500 +0.250 0.400 +0.150" in text
    assert "radeval:radgraph_simple +0.350 ±1.271 2/2 +0.150 ±0.000 2/2 +0.200 ±1.271 2/2" in text
    assert text.count("radeval: means over reports") == 1
    seeds = seeds_as_json(runs)["seeds"]
    assert seeds["1"]["after"]["radeval:radgraph_simple"] == pytest.approx(0.7)
    assert seeds["1"]["control"]["radeval:radgraph_simple"] == pytest.approx(0.4)


def test_rows_in_which_nobody_has_a_number_are_left_out(tmp_path, capsys):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        content = summary(0.5, 0.6)
        content["before"]["hacking_gap"] = content["after"]["hacking_gap"] = None
        (tmp_path / name / "summary.json").write_text(json.dumps(content))
    print_report([tmp_path / "run", tmp_path / "other"])
    text = capsys.readouterr().out
    assert "hacking_gap" not in text and text.count("+0.100") == 3  # two tables, and the mean


def test_the_closing_table_says_whether_reports_repeat_themselves(tmp_path, capsys):
    content = summary(0.5, 0.6)
    content["after"] |= {"repeated_sentence": 0.26, "repetition": 0.1, "contradiction": None}
    content["before"] |= {"repeated_sentence": 0.0}  # an older file has fewer keys
    (tmp_path / "summary.json").write_text(json.dumps(content))
    print_report([tmp_path])
    text = " ".join(capsys.readouterr().out.split())
    assert "repeated_sentence 0.000 0.260 +0.260" in text and "repetition - 0.100 -" in text
    assert "reports in which a whole sentence stands twice" in text and "contradiction -" not in text


def test_report_fits_a_pipe(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    run = tmp_path / "run"
    (run / "control").mkdir(parents=True)
    for folder in (run, run / "control"):
        (folder / "summary.json").write_text(json.dumps(summary(0.5, 0.6)))
    print_report([run])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_report_of_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="summary.json"):
        read_summary(tmp_path)
