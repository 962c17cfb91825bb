"""How many threads a process may run, by the cores it may use and the processor time its cgroup is allowed; and which
GPU a child of it sees.

A machine's count of cores says little in a container or a batch job: the affinity mask and the cgroup's limit do. Ranks
that each take every core slow one another down, and ranks of one thread leave cores idle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_ENV = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Cores:
    """What this process may use.

    Attributes:
        allowed: cores in its affinity mask.
        limit: processor seconds a second that its cgroup may take; None without a limit.
    """

    allowed: int
    limit: float | None = None

    @property
    def usable(self) -> int:
        """Cores that can be kept busy, at least 1."""
        return self.allowed if self.limit is None else max(1, min(self.allowed, int(self.limit)))

    @property
    def note(self) -> str | None:
        """What to say where the cgroup allows less than the mask; None where it does not."""
        if self.limit is None or self.usable == self.allowed:
            return None
        return f"this cgroup may take the time of {self.limit:g} of {self.allowed} cores: {self.usable} used"


@dataclass(frozen=True)
class Threads:
    """How the cores of a machine are shared out.

    Attributes:
        rank: threads of each rank.
        notes: a line for each wish that could not be met, with what is used instead.
    """

    rank: int
    notes: tuple[str, ...]


def read_cores(root: Path = _ROOT) -> Cores:
    """The cores of this process.

    Args:
        root: where proc and sys are mounted; tests make their own.

    Raises:
        ValueError: a cgroup file that is no limit as the kernel writes it.
    """
    return Cores(len(affinity()), _cgroup_limit(root))


def affinity() -> set[int]:
    """The cores that this process may run on; all of them on a system without affinity masks."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def share_cores(cores: Cores, *, ranks: int, labeler: bool, environment: Mapping[str, str] = os.environ) -> Threads:
    """Threads of each rank on this machine.

    One core is left to the labeler, the rest is divided among the ranks; with no core to spare, the labeler shares
    theirs. A user's OMP_NUM_THREADS comes first, as far as there are cores for it.

    Args:
        ranks: on this machine.
        labeler: whether a labeler works on the CPU beside them.

    Raises:
        ValueError: OMP_NUM_THREADS is no positive number.
    """
    usable, notes = cores.usable, [cores.note] if cores.note else []
    most = max(1, usable // ranks)
    if ranks > usable:
        notes.append(f"{ranks} ranks on {_counted(usable, 'core')}: one thread each, and they take turns")
    wish = asked_for(environment)
    if wish is None:
        rank = max(1, (usable - labeler) // ranks)
    else:
        rank = min(wish, most)
        if rank < wish and ranks <= usable:
            on = f"{_counted(ranks, 'rank')} on {_counted(usable, 'core')}"
            notes.append(f"{_ENV}={wish} with {on}: {_counted(rank, 'thread')} a rank instead")
    return Threads(rank, tuple(notes))


def demo_ranks(cores: Cores) -> int:
    """How many ranks suit a tiny policy: a power of two, so that it divides a batch, at most 8, with a core left to the
    labeler where there are more than two.

    Ranks come before threads there: its products are small, and threads that wait for one another cost more than they
    bring as soon as anything else runs.
    """
    return next((ranks for ranks in (8, 4) if ranks < cores.usable), min(2, cores.usable))


def labeler_threads(cores: Cores, *, ranks: int, each: int) -> int:
    """Threads of a labeler on the CPU: the cores that `ranks` of `each` threads leave, at most 16."""
    return max(1, min(16, cores.usable - ranks * each))


def visible_device(device: str) -> dict[str, str]:
    """The environment in which `device` is the only GPU that CUDA sees; for `cpu` there is none."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    # numbers as nvidia-smi counts them: CUDA's own order puts the fastest first
    return {"CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:"), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def physical_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device that torch calls `device` here, as `visible_device` and nvidia-smi call it."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu" or not visible:
        return "cuda:0" if device == "cuda" else device
    seen = visible.split(",")
    number = int(device.partition(":")[2] or 0)
    if number >= len(seen):
        raise ValueError(f"device {device}: CUDA_VISIBLE_DEVICES={visible} shows {len(seen)}")
    return f"cuda:{seen[number].strip()}" if seen[number].strip().isdigit() else seen[number].strip()


def asked_for(environment: Mapping[str, str] = os.environ) -> int | None:
    """The user's OMP_NUM_THREADS (of a list for nested loops, the first); None where it is not set.

    Raises:
        ValueError: it is no positive number.
    """
    said = environment.get(_ENV, "").strip()
    if not said:
        return None
    first = said.split(",")[0].strip()
    if not first.isascii() or not first.isdigit() or int(first) < 1:
        raise ValueError(f"{_ENV}={said}: give a number of threads, as in {_ENV}=4, or leave it unset")
    return int(first)


def _cgroup_limit(root: Path) -> float | None:
    """The lowest limit on the way from this process's cgroup to the root of what is mounted; None without one.

    In a container the path that /proc names may lie outside of what is mounted; the container's own limit then stands
    at the root.
    """
    file = root / "proc/self/cgroup"
    if not file.is_file():
        return None
    mounted, limits = root / "sys/fs/cgroup", []
    for line in file.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        for above in (PurePosixPath(path), *PurePosixPath(path).parents):
            inside = str(above).lstrip("/")
            if not controllers:
                limits.append(_limit_v2(mounted / inside / "cpu.max"))
            elif "cpu" in controllers.split(","):
                # one mount for the joined controllers, and as a rule a link for each
                limits += [_limit_v1(mounted / name / inside) for name in {controllers, "cpu"}]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _limit_v2(file: Path) -> float | None:
    """cpu.max: `QUOTA PERIOD` in microseconds, or `max PERIOD`."""
    if not file.is_file():
        return None
    quota, _, period = file.read_text(encoding="utf-8").strip().partition(" ")
    return None if quota == "max" else int(quota) / int(period or 100_000)


def _limit_v1(folder: Path) -> float | None:
    """cpu.cfs_quota_us over cpu.cfs_period_us; a quota of -1 is none."""
    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    if not quota.is_file() or not period.is_file():
        return None
    allowed = int(quota.read_text(encoding="utf-8"))
    return None if allowed < 0 else allowed / int(period.read_text(encoding="utf-8"))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
