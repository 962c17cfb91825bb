"""Who stands where: ranks and the nodes they stand on."""

from __future__ import annotations

import pytest
import torch

from mrg_r1.engine.ranks import Node, Ranks, nodes_of, on_one_node, start_ranks

CPU = torch.device("cpu")


def test_ranks_are_cut_into_nodes_by_what_each_says_of_its_own():
    assert nodes_of([("a", 3)] * 3 + [("b", 2)] * 2) == (Node(0, "a", 0, 3), Node(1, "b", 3, 2))
    assert nodes_of([("a", 2)] * 4) == (Node(0, "a", 0, 2), Node(1, "a", 2, 2)), "two launchers on one machine"
    ranks = Ranks(4, 5, CPU, nodes_of([("a", 3)] * 3 + [("b", 2)] * 2))
    assert ranks.node.host == "b" and not ranks.leads_node and Ranks(3, 5, CPU, ranks.nodes).leads_node
    assert ranks.name([1, 4, 3]) == "rank 1 (node 0 (a)), ranks 3, 4 (all of node 1 (b))"
    assert Ranks(0, 3, CPU, nodes_of([("a", 3)] * 3)).name([2, 1]) == "ranks 1, 2"


@pytest.mark.parametrize(
    "described", [[("a", 2), ("b", 2), ("a", 2), ("b", 2)], [("a", 1), ("a", 2), ("a", 2), ("b", 2)], [("a", 2)]]
)
def test_ranks_that_are_not_numbered_node_by_node_are_refused(described):
    with pytest.raises(ValueError, match="rank 0 on a.*--distribution=block"):
        nodes_of(described)


def test_one_of_many_processes_that_nobody_numbered_is_refused(monkeypatch):
    """`srun python launch/train.py` without the variables would be as many runs in one output_dir."""
    for name in ("RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert on_one_node()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS.*RANK"):
        start_ranks(0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="LOCAL_SIZE.*LOCAL_WORLD_SIZE"):
        start_ranks(0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not on_one_node()


class Other(Ranks):
    """A rank that is told what rank 0 has agreed on."""

    def __init__(self, rank, told=None):
        super().__init__(rank, 2, CPU)
        object.__setattr__(self, "told", told)

    def agree(self, value):
        return value if self.is_main else self.told


def test_what_rank_0_finds_is_everybodys_and_so_is_what_it_refuses():
    def refuse():
        raise KeyError("a")

    assert Other(0).from_main(lambda: 3, KeyError) == 3
    assert Other(1, told=(3, None)).from_main(lambda: pytest.fail("rank 1 looked"), KeyError) == 3
    with pytest.raises(KeyError):
        Other(0).from_main(refuse, KeyError)
    with pytest.raises(KeyError):
        Other(1, told=(None, KeyError("a"))).from_main(lambda: pytest.fail("rank 1 looked"), KeyError)
    with pytest.raises(KeyError):  # not named: rank 0's own failure, and nothing is agreed on
        Other(0).from_main(refuse, OSError)
