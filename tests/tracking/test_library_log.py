"""What libraries say goes to a file beside the run; errors, and our own warnings, stay on the terminal."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from mrg_r1.tracking.library_log import LibraryLog


@pytest.fixture
def log():
    """A log that has taken over, and gives back what it took."""
    root = logging.getLogger()
    before, shown = list(root.handlers), warnings.showwarning
    library = logging.getLogger("somelibrary")
    library.propagate = False
    library.setLevel(logging.INFO)
    library.addHandler(logging.StreamHandler(sys.stdout))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        made = LibraryLog("rank 3")
        made.take_over()
        yield made
    root.handlers[:] = before
    warnings.showwarning = shown
    library.handlers.clear()


def test_lines_of_before_the_folder_are_kept_until_it_is_there(log, tmp_path, capsys):
    path = tmp_path / "run" / "launch.log"
    library = logging.getLogger("somelibrary")
    library.warning("first")
    log.write_to(path)
    warnings.warn_explicit("second", UserWarning, "/lib/site-packages/other.py", 1)
    assert not path.parent.exists()
    path.parent.mkdir()
    library.warning("third")
    lines = path.read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second", "third"]
    assert all("rank 3" in line for line in lines)
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_a_second_launch_goes_on_in_the_same_file(log, tmp_path):
    path = tmp_path / "launch.log"
    path.write_text("the launcher's own line\n")
    log.write_to(path)
    log.write("error: something\n")
    assert path.read_text() == "the launcher's own line\nerror: something\n"


def test_what_is_no_warning_is_not_kept(log, tmp_path):
    log.write_to(tmp_path / "launch.log")
    logging.getLogger("somelibrary").info("hello")
    assert not list(tmp_path.iterdir())


def test_errors_and_our_own_warnings_stay_on_the_terminal(log, tmp_path, capsys):
    log.write_to(tmp_path / "launch.log")
    logging.getLogger("somelibrary").error("broken")
    warnings.warn_explicit("ours", UserWarning, sys.modules[LibraryLog.__module__].__file__, 1)
    said = capsys.readouterr().err
    assert "broken" in said and "ours" in said and "broken" in (tmp_path / "launch.log").read_text()


def test_a_rank_that_fails_names_the_file_or_says_what_it_would_hold(log, tmp_path):
    logging.getLogger("somelibrary").warning("early")
    assert "early" in log.mention() and log.mention() == ""
    log.write_to(tmp_path / "launch.log")
    logging.getLogger("somelibrary").warning("later")
    assert str(tmp_path / "launch.log") in log.mention() and "later" not in log.mention()


def test_loggers_made_after_it_are_taken_over_by_a_second_call(log, tmp_path, capsys):
    late = logging.getLogger("latelibrary")
    late.propagate = False
    late.addHandler(logging.StreamHandler(sys.stderr))
    log.take_over()
    log.write_to(tmp_path / "launch.log")
    late.warning("hello")
    assert capsys.readouterr().err == "" and (tmp_path / "launch.log").read_text().count("hello") == 1
