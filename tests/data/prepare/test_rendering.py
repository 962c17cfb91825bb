"""Rendered images: each file whole or absent, the same bytes whoever renders them, and one folder one set of
settings.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrg_r1.data.prepare import rendering
from mrg_r1.data.prepare.rendering import SETTINGS_FILE, Rendering, claim_folder, render_files
from mrg_r1.phantom.findings import render
from mrg_r1.phantom.views import render_view

DRAWN = (0, 1, *[0] * 7, 1, 0, 0, 0, None)


def jobs(folder: Path, count: int) -> list[Rendering]:
    return [Rendering(folder / f"{index}.png", DRAWN, index) for index in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_holds_the_pixels_that_were_rendered(tmp_path: Path) -> None:
    assert render_files(jobs(tmp_path, 2), seed=5, side=48, workers=1) == 2
    for index in range(2):
        with Image.open(tmp_path / f"{index}.png") as image:
            assert np.array_equal(np.asarray(image), render(DRAWN, seed=5, index=index, side=48))


def test_a_view_of_full_is_rendered_for_its_patient(tmp_path: Path) -> None:
    work = [Rendering(tmp_path / f"{view}.png", DRAWN, 5, view, 4) for view in ("frontal", "lateral")]
    assert render_files(work, seed=5, side=48, workers=1) == 2
    for rendering_ in work:
        with Image.open(rendering_.path) as image:
            assert np.array_equal(
                np.asarray(image), render_view(DRAWN, str(rendering_.view), seed=5, index=5, patient=4, side=48)
            )


def test_several_processes_write_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render_files(jobs(tmp_path / "one", 6), seed=0, side=32, workers=1)
    started: list[int] = []
    pool = rendering.ProcessPoolExecutor

    def counted(workers: int, **keywords: Any) -> Any:
        started.append(workers)
        return pool(workers, **keywords)

    monkeypatch.setattr(rendering, "ProcessPoolExecutor", counted)
    monkeypatch.setattr(rendering, "_WORTH_A_WORKER", 3)
    render_files(jobs(tmp_path / "two", 6), seed=0, side=32, workers=8)
    assert started == [2]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


KILLED = """
import sys
from pathlib import Path
from mrg_r1.data.prepare import rendering
from tests.data.prepare.test_rendering import jobs
if __name__ == "__main__":
    rendering._WORTH_A_WORKER = 1
    rendering.render_files(jobs(Path(sys.argv[1]), 100_000), seed=0, side=32, workers=2)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script, folder = tmp_path / "killed.py", tmp_path / "images"
    script.write_text(KILLED)
    root = str(Path(__file__).resolve().parents[3])
    # the workers inherit the writing end: the reading end ends when the last of them is gone
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE
    ) as parent:
        waited = time.monotonic() + 60
        while not folder.is_dir() or not any(folder.glob("*.png")):
            assert time.monotonic() < waited and parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
        assert parent.communicate(timeout=30)[0] == b""


def test_only_missing_files_are_rendered(tmp_path: Path) -> None:
    render_files(jobs(tmp_path, 3), seed=0, side=32, workers=1)
    before = contents(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"mine")
    assert render_files(jobs(tmp_path, 3), seed=0, side=32, workers=1) == 1
    assert contents(tmp_path) == {**before, "2.png": b"mine"}


def test_an_interrupted_write_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"\x89PNG half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left"):
        render_files(jobs(tmp_path, 1), seed=0, side=32, workers=1)
    assert contents(tmp_path) == {}


def claim(output: Path, **changes: Any) -> None:
    claim_folder(output, {"seed": 0, "labels": None, **changes}, images=10, seed=0, side=32)


def test_the_same_settings_may_come_back_and_others_are_refused(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "folder")
    claim(tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match=r"folder: .*`seed`.* 0.* 1"):
        claim(tmp_path / "new" / "folder", seed=1)


def test_a_setting_that_nothing_depended_on_yet_may_be_settled_once(tmp_path: Path) -> None:
    claim(tmp_path)
    claim(tmp_path, labels="abc")
    with pytest.raises(ValueError, match="`labels`.*'abc'"):
        claim(tmp_path, labels="def")


def test_images_of_another_version_of_the_renderer_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(tmp_path)
    monkeypatch.setattr(rendering, "__version__", "99.0")
    with pytest.raises(ValueError, match="`mrg_r1`.*'99.0'"):
        claim(tmp_path)


@pytest.mark.parametrize("name", ["manifest.jsonl", "images"])
def test_a_dataset_of_someone_else_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=SETTINGS_FILE):
        claim(tmp_path)


def test_a_broken_settings_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        claim(tmp_path)


def test_settings_that_cannot_be_written_leave_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        claim(tmp_path)
    assert contents(tmp_path) == {}


def free(amount: int) -> Callable[[Path], SimpleNamespace]:
    return lambda _: SimpleNamespace(free=amount)


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", free(10_000))
    with pytest.raises(OSError, match=r" MB.* MB"):
        claim_folder(tmp_path, {}, images=1000, seed=0, side=32)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/data: .*Not a directory"):
        claim(tmp_path / "file" / "data")
