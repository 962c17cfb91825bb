"""The run on the terminal: one line that moves, plain lines where nobody watches."""

from __future__ import annotations

import io

import pytest

from mrg_r1.tracking.terminal import StepLine, phase_table

ERASE = "\x1b[2K"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen_of(monkeypatch):
    """Puts a screen in stderr's place; called in the test itself, since pytest sets stderr anew before each."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    def place(screen: io.StringIO) -> io.StringIO:
        monkeypatch.setattr("sys.stderr", screen)
        return screen

    return place


def test_on_a_terminal_a_step_is_written_over_the_last_one_and_a_validation_stays(screen_of):
    tty = screen_of(Tty())
    line = StepLine(active=True, steps=10)
    line.step(0, {"reward/total": 0.5})
    line.step(1, {"reward/total": 0.6})
    assert "\n" not in tty.getvalue() and tty.getvalue().count(ERASE) == 1 and tty.getvalue().endswith("\r")
    line.step(2, {"reward/total": 0.7, "validation/disease_micro13": 0.8})
    assert tty.getvalue().count("\n") == 1 and "val disease_micro13 0.8" in tty.getvalue().splitlines()[-1]
    line.step(3, {"reward/total": 0.7})
    line.say("something")
    assert tty.getvalue().endswith("something\n") and tty.getvalue().count(ERASE) == 3


def test_a_bar_finds_the_line_cleared(screen_of):
    tty = screen_of(Tty())
    line = StepLine(active=True, steps=10)
    line.step(0, {"loss": 1.0})
    line.entering("rollout")
    assert ERASE not in tty.getvalue()
    line.entering("validation")
    assert ERASE in tty.getvalue()


@pytest.mark.parametrize("where", ["pipe", "CI"])
def test_piped_or_under_ci_about_twenty_plain_lines_are_left(where, screen_of, monkeypatch):
    screen = screen_of(Tty() if where == "CI" else io.StringIO())
    if where == "CI":
        monkeypatch.setenv("CI", "true")
    line = StepLine(active=True, steps=200)
    for step in range(200):
        line.step(step, {"loss": 1.0} | ({"validation/disease_micro13": 0.5} if step == 104 else {}))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 22 and "\r" not in screen.getvalue()  # twenty, the first and the validation
    assert (
        lines[0].startswith("step 1/200")
        and lines[-1].startswith("step 200/200")
        and any("val disease_micro13" in one for one in lines)
    )


def test_other_ranks_are_silent(screen_of):
    tty = screen_of(Tty())
    line = StepLine(active=False, steps=2)
    line.step(0, {"loss": 1.0})
    line.say("hello")
    line.clear()
    assert tty.getvalue() == ""


def test_the_phase_table_has_the_longest_first_and_shares_of_the_whole():
    table = phase_table({"load": 1.0, "update": 3.0}, 25.0)
    assert list(table.columns[0].cells) == ["update", "load"] and list(table.columns[2].cells) == ["75.0%", "25.0%"]
    assert "25 tokens/s" in str(table.title)
