"""What launchers add to the command line of the scripts in launch/ is taken in either spelling."""

from __future__ import annotations

import sys

import pytest

from mrg_r1.cli import launch


@pytest.mark.parametrize("arguments", [["--local-rank=0"], ["--local_rank=1"], ["--local-rank", "3"], []])
def test_both_spellings_of_the_local_rank_are_taken(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    class ReadError(Exception):
        pass

    def read(path, overrides):
        assert str(path) == "recipe.yaml" and overrides == ["steps=3"]
        raise ReadError

    monkeypatch.setattr(launch, "load_recipe", read)
    monkeypatch.setattr(launch.LibraryLog, "take_over", lambda log: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "recipe.yaml", "steps=3"])
    with pytest.raises(ReadError):
        launch.run_on_ranks(lambda recipe, ranks: None, "")
