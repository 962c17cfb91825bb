"""A bar stands where somebody watches, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from mrg_r1.console import progress, progress_bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, ci: str = "", quiet: bool = False) -> str:
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress(iter("ab"), "items", total=2, quiet=quiet)) == ["a", "b"]
    with progress_bar(quiet=quiet) as bar:
        bar.advance(bar.add_task("moved", total=1))
    return screen.getvalue()


def test_a_terminal_shows_bars_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(Screen(), monkeypatch)
    assert "items" in written and "moved" in written
    assert written.endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("how", [{"ci": "true"}, {"quiet": True}])
def test_ci_and_the_caller_silence_them(monkeypatch: pytest.MonkeyPatch, how: dict[str, object]) -> None:
    assert shown(Screen(), monkeypatch, **how) == ""  # type: ignore[arg-type]


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch) == ""
