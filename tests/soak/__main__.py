"""`make soak`: training runs that are killed (kill -9) at random moments, started again, and must end as the run that
never was.

Two real ranks, a tiny policy, three settings that differ in ZeRO stage, precision and number of updates a rollout. For
each setting one run goes through undisturbed; others are killed a few times in a chosen phase, at a random moment of
it, and then go on to their end.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.jobs import LONGEST, Job, durations, facts
from tests.world import World, build_world

SETTINGS = {
    "zero2 fp32": ["engine.deepspeed=ds_configs/zero2.json"],
    "zero3 bf16 mu 3": ["engine.deepspeed=ds_configs/zero3.json", "policy.dtype=bfloat16", "grpo.inner_iterations=3"],
    "zero1 fp32 mu 2, groups sampled again": [
        "engine.deepspeed=ds_configs/zero1.json",
        "grpo.inner_iterations=2",
        "grpo.max_resample=1",
        "optimizer.schedule=cosine",
        "reward.margin_end=0.2",
        "reward.margin_steps=6",
    ],
}
STEPS = 8
COMMON = [f"steps={STEPS}", "checkpoint.every=2", "evaluation.every=3", "evaluation.max_studies=4"]
# `anywhere` is any moment from the launch on; the others begin with the phase and end with it
PHASES = (
    "rollout",
    "checkpoint",
    "update",
    "reward_exposed",
    "anywhere",
    "reference",
    "validation",
    "checkpoint",
    "evaluation",
    "start",
)
EVERY_STEP = ("rollout", "update", "reward_exposed", "reference")
# a node that vanishes; the kernel that takes one process where memory runs out; ranks gone, their service left alone
VICTIMS = ("all", "rank 0", "all", "rank 1", "rank")
KILLS_A_RUN = 5


@dataclass
class Tally:
    """Kills so far: of runs that ended as they should, and what was wrong with the others."""

    good: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many (default: 30), spread over the settings")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the moments (default: another one each time; it is printed)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("runs/soak"),
        help="a folder that is not there yet (default: runs/soak)",
    )
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    arguments.output.mkdir(parents=True)
    print(f"{arguments.kills} kills, seed {seed}, in {arguments.output}", flush=True)
    tally = soak(arguments.output.absolute(), kills=arguments.kills, seed=seed)
    for fault in tally.faults:
        print(fault)
    print(
        f"{tally.good} of {arguments.kills} kills: resumed to the adapter, metrics, completions and evaluations of "
        "the undisturbed run"
    )
    return 0 if tally.good == arguments.kills else 1


def soak(folder: Path, *, kills: int, seed: int) -> Tally:
    """Kill `kills` times in all, one setting after the other."""
    rng = random.Random(seed)
    world, tally, done = build_world(folder / "world"), Tally(), 0
    for number, (setting, overrides) in enumerate(SETTINGS.items()):
        share = kills * (number + 1) // len(SETTINGS)
        if done == share:
            continue
        place = folder / f"setting{number}"
        place.mkdir()
        wanted, spans = undisturbed(world, place, COMMON + overrides)
        print(
            f"{setting}: undisturbed; phases of "
            f"{', '.join(f'{name} {1000 * span:.0f}' for name, span in spans.items())} ms",
            flush=True,
        )
        part = 0
        while done < share:
            run = Disturbed(world, place / f"killed{part}", COMMON + overrides, spans, rng)
            made = run.kill_and_go_on(first=done, most=min(KILLS_A_RUN, share - done), of=kills)
            faults = run.faults + differences(wanted, run.directory)
            tally.good += 0 if faults else made
            tally.faults += [f"{setting}, {run.directory}: {fault}" for fault in faults]
            done, part = done + made, part + 1
            if faults and not made:
                raise RuntimeError("\n".join(tally.faults))
    return tally


def undisturbed(world: World, place: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """The run that all others are compared with; and how long each of its phases took, in seconds."""
    run = place / "undisturbed"
    job = Job(world.recipe(run, name="undisturbed.yaml"), overrides, log=place / "undisturbed.log")
    if job.process.wait(timeout=LONGEST) != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{job.log.read_text()[-3000:]}")
    return facts(run), durations(job.places())


@dataclass
class Disturbed:
    """A run that is killed and started again. `faults`: what went wrong."""

    world: World
    directory: Path
    overrides: list[str]
    spans: dict[str, float]
    rng: random.Random
    faults: list[str] = field(default_factory=list)

    def kill_and_go_on(self, *, first: int, most: int, of: int) -> int:
        """Kill up to `most` times, then let the run end. Returns how often it was killed: it may have ended before."""
        recipe = self.world.recipe(self.directory, name=f"{self.directory.name}.yaml")
        made = 0
        while made < most:
            number = first + made
            job = Job(recipe, self.overrides, log=self.directory.with_name(f"{self.directory.name}-{number}.log"))
            where = self._reach(job, PHASES[number % len(PHASES)])
            if where is None:  # it has ended
                if job.process.wait(timeout=LONGEST) != 0:
                    self.faults.append(f"it ended by itself; see {job.log}")
                return made
            # there may be no ranks yet
            victims = VICTIMS[number % len(VICTIMS)] if PHASES[number % len(PHASES)] != "start" else "all"
            job.kill(where[1] or job.members(), victims)
            left = job.leave()
            made += 1
            if left:
                self.faults.append(f"kill {number + 1}: still there a minute later: {sorted(left.values())}")
            if job.process.returncode == 0:
                self.faults.append(f"kill {number + 1}: the launcher says that all is well; see {job.log}")
            print(
                f"kill {number + 1} of {of}: {victims} {where[0]}; {self._standing()}, exit code "
                f"{job.process.returncode}",
                flush=True,
            )
        job = Job(recipe, self.overrides, log=self.directory.with_name(f"{self.directory.name}-last.log"))
        if job.process.wait(timeout=LONGEST) != 0:
            self.faults.append(f"it does not go on:\n{job.log.read_text()[-3000:]}")
        return made

    def _reach(self, job: Job, phase: str) -> tuple[str, dict[int, str]] | None:
        """Return at a random moment of the phase: where, in words, and who was there shortly before (empty: ask again).

        None where the run has ended instead.
        """
        launched = time.monotonic()
        if phase == "start":
            time.sleep(self.rng.uniform(0.5, 8.0))
            return f"{time.monotonic() - launched:.1f} s after the launch", {}
        if not job.wait_for("evaluation", 1):  # from here on the ranks and their service are there
            return None
        members = job.members()
        steps_left = STEPS - self._latest()
        if phase == "anywhere":
            in_a_step = sum(
                self.spans.get(name, 0.0)
                for name in ("vision", "rollout", "reward_exposed", "reference", "old", "update")
            )
            time.sleep(self.rng.uniform(0, self.spans["evaluation"] + steps_left * in_a_step))
            if job.process.poll() is not None:
                return None
            return f"{time.monotonic() - launched:.1f} s after the launch, in {job.places()[-1][1]}", {}
        occurrence = 1
        if steps_left and phase in EVERY_STEP:
            occurrence = self.rng.randint(1, min(3, steps_left))
        elif not steps_left and phase != "evaluation":
            phase, occurrence = "evaluation", 2  # nothing but the closing one is left
        delay = self.rng.uniform(0, self.spans[phase])
        if not job.wait_for(phase, occurrence):
            return None
        time.sleep(delay)
        return f"in its {occurrence}. {phase}, {1000 * delay:.0f} ms after it began", members

    def _latest(self) -> int:
        latest = self.directory / "checkpoints" / "latest"
        return int(latest.read_text().removeprefix("step_")) if latest.is_file() else 0

    def _standing(self) -> str:
        metrics = self.directory / "metrics.jsonl"
        steps = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        return f"{steps} steps logged, {self._latest()} in the checkpoint"


def differences(wanted: dict[str, Any], run: Path) -> list[str]:
    """What a run that was killed has come to, and the undisturbed one has not."""
    try:
        found = facts(run)
    except (OSError, AssertionError) as error:
        return [f"cannot be compared: {error}"]
    return [f"other {name} than the undisturbed run" for name in wanted if found[name] != wanted[name]]


if __name__ == "__main__":
    sys.exit(main())
