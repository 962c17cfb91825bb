"""Two nodes on this machine: the documented batch script with stubs for SLURM, and a run that goes from trouble to
trouble.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mrg_r1.engine.faults import REQUEUE
from tests.launches.test_launch import BIN, command, environment, steps_of
from tests.ranks.conftest import ROOT

# ---- the documented batch script, with stubs for SLURM

SRUN = """#!{python}
# srun: the tasks of two nodes on this one; a signal goes to all of them, and the highest exit code is its own
import os, signal, subprocess, sys
command = sys.argv[next(i for i, word in enumerate(sys.argv) if word == "bash"):]
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
for task in range(int(os.environ["SLURM_NTASKS"])):
    node, local = divmod(task, int(os.environ["SLURM_NTASKS_PER_NODE"]))
    own = dict(SLURM_PROCID=task, SLURM_LOCALID=local, SLURM_NODEID=node, NODE=node)
    own["SLURM_STEP_NUM_TASKS"] = os.environ["SLURM_NTASKS"]
    tasks.append(subprocess.Popen(command, env=os.environ | {{name: str(value) for name, value in own.items()}}))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


def batch(
    folder: Path, recipe: Path, run: Path, overrides: str = "", *, srun: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """The script of docs/multi-node.md for `recipe`, and an environment with an srun and an scontrol."""
    text = (ROOT / "docs/multi-node.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)
    for old, new in {"my_recipe.yaml": str(recipe), "runs/mine": str(run), "reward.device=cuda:7": overrides}.items():
        assert old in script
        script = script.replace(old, new)
    (folder / "job.sh").write_text(script)
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    for name, content in {"srun": srun or SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (bin / name).write_text(content)
        (bin / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": str(random.randint(1, 19999)), "SLURM_JOB_NODELIST": "x[1-2]", "SLURM_NTASKS": "4"}
    variables |= {
        "SLURM_NTASKS_PER_NODE": "2",
        "SCONTROL_LOG": str(folder / "scontrol"),
        "PATH": f"{bin}:{BIN}:{os.environ['PATH']}",
    }
    return ["bash", str(folder / "job.sh")], environment() | variables


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (3, False), (4, False), (75, True), (137, True)]
)
def test_the_batch_script_asks_for_another_start_where_that_can_help(tmp_path, code, requeued):
    command, env = batch(tmp_path, tmp_path / "recipe.yaml", tmp_path / "run", srun=f"#!/bin/bash\nexit {code}\n")
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if requeued else code), done.stderr
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"


def test_the_batch_script_gives_up_where_nothing_comes_further(tmp_path):
    latest = tmp_path / "run/checkpoints/latest"
    latest.parent.mkdir(parents=True)

    def starts() -> int:
        command, env = batch(tmp_path, tmp_path / "recipe.yaml", tmp_path / "run", srun="#!/bin/bash\nexit 75\n")
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True).returncode

    assert [starts(), starts()] == [0, 0]
    latest.write_text("step_2")  # it has come further, and has three starts again
    assert [starts(), starts(), starts()] == [0, 0, 75]


# ---- real launches: two nodes of two ranks on the loopback


class Nodes:
    """A process that starts each node, its log, and everything that runs on the node."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, commands: list[list[str]], extra: dict[str, str], *, nodes: bool = True) -> None:
        for node, words in enumerate(commands):
            env = environment() | {"NODE_LOG": str(self.folder / "texts"), "NODE_RUN": self.name} | extra
            env |= {"NODE": str(node)} if nodes else {}
            with open(self.log(node), "wb") as output:
                self.processes.append(
                    subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)
                )

    def log(self, node: int) -> Path:
        return self.folder / f"{self.name}.{node}.log"

    def running(self, node: int, word: str = "") -> list[int]:
        """Process ids of what was started on a node, by a variable that everything inherits."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                words = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:
                continue
            if {f"NODE_RUN={self.name}".encode(), f"NODE={node}".encode()} <= set(variables) and word in words:
                found.append(int(entry.name))
        return found

    def kill(self, node: int) -> None:
        for process in self.running(node):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def until(self, condition: Callable[[], bool], *, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * len(ended) and time.monotonic() < deadline, (
                ended,
                self.log(0).read_text()[-3000:],
            )
            time.sleep(0.05)


def deepspeed_nodes(folder: Path, recipe: Path, overrides: list[str]) -> list[list[str]]:
    (folder / "hosts").write_text("localhost slots=2\n127.0.0.1 slots=2\n")
    port = str(random.randint(20000, 40000))
    start = [
        str(BIN / "deepspeed"),
        "--hostfile",
        str(folder / "hosts"),
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
    ]
    return [[*start, "--node_rank", str(node), "launch/train.py", str(recipe), *overrides] for node in range(2)]


def torchrun_nodes(recipe: Path, overrides: list[str]) -> list[list[str]]:
    port = str(random.randint(20000, 40000))
    start = [
        str(BIN / "torchrun"),
        "--nnodes",
        "2",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
    ]
    return [[*start, "--node_rank", str(node), "launch/train.py", str(recipe), *overrides] for node in range(2)]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def reports(run: Path, ranks: tuple[int, int]) -> set[str]:
    paths = [path for rank in ranks for path in (run / "completions").glob(f"step_*_rank{rank}.jsonl")]
    return {json.loads(line)["report"] for path in paths for line in path.read_text().splitlines()}


@pytest.mark.slow
@pytest.mark.ranks
def test_nodes_that_die_are_named_and_the_run_ends_as_one_launch_on_one_node(world, tmp_path):
    """One run: on two DeepSpeed nodes until node 1 dies, again until node 0 does, as a SLURM job until it is warned,
    and under torchrun to its end. To the last bit it is what one launch of four ranks gives.
    """
    overrides = [
        "steps=12",
        "evaluation.test=false",
        "evaluation.before=false",
        "checkpoint.every=1",
        "checkpoint.keep=2",
    ]
    overrides += ["reward.weights={mccs: 0.75, length: 0.25, 'tests.launches.node_terms:notes_node': 0.0}"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    recipe = world.recipe(run, name="run.yaml")
    one = Nodes(tmp_path, "straight")
    one.start([command("train", world.recipe(straight, name="straight.yaml"), *overrides, ranks=4)], {})
    assert one.processes[0].wait(timeout=600) == 0, one.log(0).read_text()[-3000:]
    (tmp_path / "texts.0").unlink()

    everything = [one]
    try:
        for dying, name in ((1, "ranks 2, 3 (all of node 1 ("), (0, "rank 0 (node 0 (")):
            two, done = Nodes(tmp_path, f"without{dying}"), lines(run)
            everything.append(two)
            two.start(deepspeed_nodes(tmp_path, recipe, overrides), {})
            two.until(lambda done=done: lines(run) >= done + 2)
            assert [len(two.running(node, "mrg_r1.reward.service.server")) for node in range(2)] == [1, 1], (
                "one service a node"
            )
            two.kill(dying)
            left = two.processes[1 - dying]
            assert left.wait(timeout=200) == REQUEUE, two.log(1 - dying).read_text()[-5000:]
            assert (
                f"error: {name}" in two.log(1 - dying).read_text() and "exit code 75" in two.log(1 - dying).read_text()
            )
            assert "Traceback" not in two.log(1 - dying).read_text()
            settled = time.monotonic() + 30
            while (still := two.running(0) + two.running(1)) and time.monotonic() < settled:
                time.sleep(0.2)
            assert not still, "nothing is left over, on either node"
            assert done + 2 <= lines(run) < 12
        assert {path.name for path in run.glob("reward_service_*")} == {"reward_service_0.log", "reward_service_2.log"}
        scored = [
            {json.loads(line) for line in (tmp_path / f"texts.{node}").read_text().splitlines()} for node in range(2)
        ]
        for node, mine, other in ((0, (0, 1), (2, 3)), (1, (2, 3), (0, 1))):
            assert len(reports(run, mine) & scored[node]) >= 6, "a node's ranks speak to its own service"
            assert not (reports(run, mine) - reports(run, other)) & scored[1 - node], "and to no other"

        words, env = batch(tmp_path, recipe, run, " ".join(f'"{word}"' for word in overrides))
        job, done = Nodes(tmp_path, "job"), lines(run)
        everything.append(job)
        job.start([words], env, nodes=False)
        job.until(lambda: lines(run) >= done + 2)
        (srun,) = [process for process in children_of(job.processes[0].pid) if "/bin/srun" in words_of(process)]
        os.kill(srun, signal.SIGUSR1)
        assert job.processes[0].wait(timeout=120) == 0
        assert (tmp_path / "scontrol").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
        assert job.log(0).read_text().count("stopped by SIGUSR1 on rank 0, SIGUSR1 on rank 1, ") >= 1
        assert (run / "checkpoints/latest").read_text() == f"step_{lines(run)}" and lines(run) < 12

        end = Nodes(tmp_path, "torchrun")
        everything.append(end)
        end.start(torchrun_nodes(recipe, overrides), {})
        assert [process.wait(timeout=600) for process in end.processes] == [0, 0], end.log(0).read_text()[-3000:]
    finally:
        for started in everything:
            started.kill(0), started.kill(1)
            for process in started.processes:
                process.kill()
                process.wait()

    assert steps_of(run) == steps_of(straight)
    for folder in ("completions", "adapter"):
        names = sorted(path.name for path in (straight / folder).iterdir())
        assert names == sorted(path.name for path in (run / folder).iterdir())
        for name in names:
            assert (run / folder / name).read_bytes() == (straight / folder / name).read_bytes(), name


def words_of(process: int) -> str:
    return (Path("/proc") / str(process) / "cmdline").read_bytes().decode().replace("\0", " ")


def children_of(process: int) -> list[int]:
    return [
        int(word) for word in (Path("/proc") / str(process) / "task" / str(process) / "children").read_text().split()
    ]


@pytest.mark.slow
@pytest.mark.ranks
def test_nodes_with_other_command_lines_end_with_one_message_each(world, tmp_path):
    recipe = world.recipe(tmp_path / "run")
    commands = deepspeed_nodes(tmp_path, recipe, [])
    commands[0].append("steps=3")
    commands[1].append("steps=5")
    two = Nodes(tmp_path, "other")
    two.start(commands, {})
    assert [process.wait(timeout=300) for process in two.processes] == [2, 2]
    for node in range(2):
        assert (
            two.log(node).read_text().count("error: steps: 3 on node 0 (") == 1
            and "Traceback" not in two.log(node).read_text()
        )
