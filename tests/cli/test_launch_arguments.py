"""What launchers add to the command line of the scripts in launch/ is taken in either spelling."""

from __future__ import annotations

import sys

import pytest
import torch

from mrg_r1.cli import launch
from mrg_r1.cores import Cores
from mrg_r1.engine.ranks import Node, Ranks
from mrg_r1.kernels import library


@pytest.mark.parametrize("place", [0, 1, 2], ids=["before the recipe", "after it", "at the end"])
@pytest.mark.parametrize("arguments", [["--local-rank=0"], ["--local_rank=1"], ["--local-rank", "3"], []])
def test_both_spellings_of_the_local_rank_are_taken_anywhere(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], place: int
) -> None:
    class ReadError(Exception):
        pass

    def read(path, overrides):
        assert str(path) == "recipe.yaml" and overrides == ["steps=3"]
        raise ReadError

    given = ["recipe.yaml", "steps=3"]
    monkeypatch.setattr(launch, "load_recipe", read)
    monkeypatch.setattr(launch.LibraryLog, "take_over", lambda log: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *given[:place], *arguments, *given[place:]])
    with pytest.raises(ReadError):
        launch.run_on_ranks(lambda recipe, ranks: None, "")


@pytest.mark.parametrize(
    ("masks", "limit", "wish", "threads", "words"),
    [
        ([range(8), range(8)], None, None, 3, ""),
        ([range(4), range(4, 8)], None, None, 3, ""),  # bound to cores of their own
        ([range(8), range(8)], 4.0, None, 1, "cores: this cgroup may take the time of 4 of 8 cores: 4 used"),
        ([range(8), range(8)], None, "8", 4, "cores: OMP_NUM_THREADS=8 with 2 ranks on 8 cores: 4 threads a rank"),
    ],
)
def test_a_rank_takes_its_share_of_the_cores_and_the_first_says_so(
    monkeypatch, capsys, masks, limit, wish, threads, words
):
    class Two(Ranks):
        def gather(self, value):
            return [list(mask) for mask in masks]

    if wish is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    taken = []
    monkeypatch.setattr(launch, "read_cores", lambda: Cores(len(masks[0]), limit))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(library, "state", lambda: library.State(None, "torch's own: no compiler", missing=not words))
    for rank in range(2):
        ranks = Two(rank, 2, torch.device("cpu"), (Node(0, "here", 0, 2),))
        said = launch._use_cores(ranks, labeler=True)
        assert said.startswith(f" x {threads} thread")
    assert taken == [threads, threads]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(words or "kernels: torch's own: no compiler")
