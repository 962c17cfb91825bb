"""How many threads ranks get, of made affinity masks, cgroup files and wishes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mrg_r1.cores import Cores, asked_for, demo_ranks, labeler_threads, read_cores, share_cores


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("cores", "ranks", "labeler", "wish", "threads", "words"),
    [
        (8, 2, True, None, 3, []),  # two are left, of which the labeler takes what it needs
        (8, 2, False, None, 4, []),
        (8, 1, True, None, 7, []),
        (2, 2, True, None, 1, []),
        (1, 1, True, None, 1, []),
        (4, 2, True, None, 1, []),
        (8, 2, True, "4", 4, []),  # a user's wish comes before the labeler
        (8, 2, True, "1", 1, []),
        (8, 2, True, " 2,4 ", 2, []),  # of nested loops
        (8, 2, True, "16", 4, ["OMP_NUM_THREADS=16", "2 ranks on 8 cores", "4 threads a rank"]),
        (2, 2, True, "2", 1, ["OMP_NUM_THREADS=2", "1 thread a rank"]),
        (2, 4, True, None, 1, ["4 ranks on 2 cores", "one thread each"]),
        (1, 2, False, "8", 1, ["2 ranks on 1 core:"]),
    ],
)
def test_cores_are_shared_out_among_ranks(cores, ranks, labeler, wish, threads, words):
    environment = {} if wish is None else {"OMP_NUM_THREADS": wish}
    shared = share_cores(Cores(cores), ranks=ranks, labeler=labeler, environment=environment)
    assert shared.rank == threads and len(shared.notes) == bool(words)
    assert all(word in shared.notes[0] for word in words)


@pytest.mark.parametrize("wish", ["0", "-1", "many", "2.5", "²"])
def test_a_number_of_threads_that_is_none_is_refused(wish):
    with pytest.raises(ValueError, match="OMP_NUM_THREADS"):
        asked_for({"OMP_NUM_THREADS": wish})


def test_an_empty_wish_is_none():
    assert asked_for({"OMP_NUM_THREADS": ""}) is None and asked_for({}) is None


def test_without_a_limit_the_mask_counts(tmp_path, eight):
    assert read_cores(tmp_path) == Cores(8)  # no proc: not every system has one
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    cores = read_cores(tmp_path)
    assert cores == Cores(8) and cores.usable == 8 and cores.note is None


@pytest.mark.parametrize(
    ("limit", "usable"), [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 8)]
)
def test_a_limit_of_cgroup_v2_counts_where_it_is_below_the_mask(tmp_path, eight, limit, usable):
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", f"{limit}\n")
    cores = read_cores(tmp_path)
    assert cores.usable == usable
    shared = share_cores(cores, ranks=1, labeler=False, environment={})
    assert shared.rank == usable
    if usable < 8:
        assert f"of 8 cores: {usable} used" in shared.notes[0]
    else:
        assert not shared.notes


def test_the_lowest_limit_above_a_cgroup_counts(tmp_path, eight):
    write(tmp_path, "proc/self/cgroup", "0::/job/step\n")
    write(tmp_path, "sys/fs/cgroup/job/step/cpu.max", "600000 100000")
    write(tmp_path, "sys/fs/cgroup/job/cpu.max", "300000 100000")
    assert read_cores(tmp_path).limit == 3.0


@pytest.mark.parametrize("folder", ["cpu,cpuacct/docker/abc", "cpu,cpuacct", "cpu"])
def test_a_quota_of_cgroup_v1_counts_also_at_the_root_of_a_container(tmp_path, eight, folder):
    write(tmp_path, "proc/self/cgroup", "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/x:y\n")
    write(tmp_path, f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us", "200000\n")
    write(tmp_path, f"sys/fs/cgroup/{folder}/cpu.cfs_period_us", "100000\n")
    assert read_cores(tmp_path).limit == 2.0
    write(tmp_path, f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us", "-1\n")
    assert read_cores(tmp_path).limit is None


@pytest.mark.parametrize(("cores", "ranks"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 4), (8, 4), (9, 8), (64, 8)])
def test_a_tiny_policy_gets_ranks_before_threads(cores, ranks):
    assert demo_ranks(Cores(cores)) == ranks and 16 % ranks == 0


def test_the_labeler_gets_what_ranks_leave():
    assert labeler_threads(Cores(8), ranks=2, each=3) == 2
    assert labeler_threads(Cores(2), ranks=2, each=1) == 1
    assert labeler_threads(Cores(128), ranks=8, each=1) == 16
