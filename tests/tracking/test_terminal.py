"""The run on the terminal: one line that moves, plain lines where nobody watches."""

from __future__ import annotations

import io

import pytest

from mrg_r1.tracking.terminal import Budget, StepLine, where_time_went, wide_console

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
    stays = tty.getvalue().split(ERASE)[-1]
    assert stays.count("\n") == 1 and "validation" in stays and "disease_micro13 0.8" in stays
    line.step(3, {"reward/total": 0.7})
    line.say("something")
    assert tty.getvalue().endswith("something\n") and tty.getvalue().count("\n") == 2


def test_a_validation_says_how_sure_its_score_is_and_its_distance_to_the_best(screen_of):
    log = screen_of(io.StringIO())
    line = StepLine(active=True, steps=120)
    sure = {"validation/standard_error": 0.0141, "validation/over_best": None}
    line.step(0, {"validation/disease_micro13": 0.8, "validation/mean_reward": 0.65} | sure)
    sure |= {"validation/over_best": -0.007, "validation/over_best_standard_error": 0.0082}
    line.step(119, {"validation/disease_micro13": 0.8, "validation/mean_reward": 0.65} | sure)
    first, second = (text for text in log.getvalue().splitlines() if "validation" in text)
    assert first.endswith("mean_reward 0.650  ±0.014") and second.endswith("±0.014, over the best -0.007 ±0.008")


def test_a_run_that_a_time_ends_tells_how_much_of_it_is_spent_and_a_tenth_is_one_of_the_time(screen_of):
    log = screen_of(io.StringIO())
    line = StepLine(active=True, steps=1_000_000)
    for step, spent in enumerate([3.0, 6.0, 29.0, 31.0, 100.0, 299.0, 301.0]):
        line.step(step, {"loss": 2.0}, Budget("sft.max_cpu_seconds 300", spent, 300.0, "processor seconds"))
    shown = log.getvalue().splitlines()
    assert [text.split("%")[0].split()[1:] for text in shown] == [
        ["1", "1"],
        ["4", "10"],
        ["5", "33"],
        ["6", "100"],
        ["7", "100"],
    ]
    assert all("of 300 processor seconds" in text for text in shown)
    assert shown[2].endswith(" left") and int(shown[2].split()[-2].split(":")[0]) <= 3  # 200 seconds, or by the pace
    assert shown[-1].endswith("0:00 left")


ALL = {
    "reward/total": 0.123456,
    "reward/constant": 0.123456,
    "reward/mccs": -0.123456,
    "loss": -1.23e-09,
    "policy/kl": 1.23e-05,
    "groups/length": 123.4,
    "groups/zero_signal": 0.0625,
    "time/tokens_per_second": 12345.6,
    "validation/disease_micro13": 0.123456,
    "validation/mean_reward": 0.123456,
    "validation/held_out_disease_micro13": 0.123456,
    "validation/hacking_gap": -0.123456,
}


@pytest.mark.parametrize("columns", ["60", "80", "100", None])
def test_a_line_fits_its_screen_or_100_columns_of_a_pipe(columns, screen_of, monkeypatch):
    screen = screen_of(io.StringIO() if columns is None else Tty())
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    line = StepLine(active=True, steps=100000)
    for step in range(3):
        line.step(step, {name: value for name, value in ALL.items() if "validation" not in name})
    text = screen.getvalue().replace("\x1b[2K", "")
    lines = [one for one in text.replace("\r", "\n").splitlines() if one]
    assert lines and all(len(one) < int(columns or 101) for one in lines)
    assert all("reward 0.123" in one and one.endswith("left") for one in lines)
    line.step(3, ALL)
    assert "hacking_gap -0.123" in screen.getvalue()


def test_a_pipe_is_100_columns_wide_and_a_terminal_as_wide_as_it_is(screen_of, monkeypatch):
    screen_of(Tty())
    monkeypatch.setenv("COLUMNS", "70")
    assert wide_console(stderr=True).width == 70
    screen_of(io.StringIO())
    monkeypatch.delenv("COLUMNS")
    assert wide_console(stderr=True).width == 100


def test_a_bar_finds_the_line_cleared(screen_of):
    tty = screen_of(Tty())
    line = StepLine(active=True, steps=10)
    line.step(0, {"loss": 1.0})
    line.entering("rollout")
    assert ERASE not in tty.getvalue()
    line.entering("validation")
    assert ERASE in tty.getvalue()


@pytest.mark.parametrize("where", ["pipe", "CI"])
def test_piped_or_under_ci_about_ten_plain_lines_are_left(where, screen_of, monkeypatch):
    screen = screen_of(Tty() if where == "CI" else io.StringIO())
    if where == "CI":
        monkeypatch.setenv("CI", "true")
    line = StepLine(active=True, steps=200)
    for step in range(200):
        line.step(step, {"loss": 1.0} | ({"validation/disease_micro13": 0.5} if step == 104 else {}))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 12 and "\r" not in screen.getvalue()  # ten, the first and the validation
    assert lines[0].startswith("step   1/200") and lines[-1].startswith("step 200/200")
    assert [one for one in lines if "validation" in one and "disease_micro13 0.5" in one]


def test_other_ranks_are_silent(screen_of):
    tty = screen_of(Tty())
    line = StepLine(active=False, steps=2)
    line.step(0, {"loss": 1.0})
    line.say("hello")
    line.clear()
    assert tty.getvalue() == ""


def test_time_is_told_by_phase_the_longest_first():
    told = where_time_went({"load": 20.0, "update": 60.0, "vision": 0.001}, 2500.0)
    assert told.index("update 60") < told.index("load 20") and "vision" not in told and "2,500 tokens/s" in told
