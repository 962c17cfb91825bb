"""Images read by processes of their own: the same prompts, in the same order, and nobody left behind. A worker imports
torch: its start is what these tests take.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mrg_r1.data.images import ImageError
from mrg_r1.data.loader import PromptBuilder, StudyLoader
from mrg_r1.data.workers import ImageReader, WorkerError
from mrg_r1.types import Prompts, Study, StudyImage
from tests.conftest import make_study
from tests.data.processors import DIES, FAILS, SumProcessor
from tests.shared_data import shared_data


def sized(folder: Path, *sizes: tuple[int, int]) -> list[Study]:
    return [make_study(folder, f"s{number}", [(height, width)]) for number, (width, height) in enumerate(sizes)]


def is_alive(pid: int) -> bool:
    """A zombie has ended too."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def gone(pids: list[int], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def pids_of(reader: ImageReader) -> list[int]:
    return [worker.process.pid for worker in reader._workers if worker.process.pid is not None]


@pytest.fixture(scope="module")
def reader() -> Iterator[ImageReader]:
    """Two workers that the tests of this file share: starting them takes seconds."""
    shared = ImageReader(SumProcessor(), workers=2)
    yield shared
    pids = pids_of(shared)
    shared.close()
    assert gone(pids, 1)


def test_answers_come_in_order_from_several_processes(reader, tmp_path):
    """More studies than are in flight, of one to three images each."""
    studies = [
        make_study(tmp_path, f"s{number}", [(28 + number, 30 + view) for view in range(1 + number % 3)])
        for number in range(23)
    ]
    answers = reader.read(studies)
    plain = ImageReader(SumProcessor()).read(studies)
    assert [one["pixel_values"][:, :3].tolist() for one in answers] == [
        one["pixel_values"][:, :3].tolist() for one in plain
    ]
    assert [one["image_grid_thw"].tolist() for one in answers] == [one["image_grid_thw"].tolist() for one in plain]
    made_by = {int(pid) for one in answers for pid in one["pixel_values"][:, 3].tolist()}
    assert made_by == set(pids_of(reader)) and len(made_by) == 2 and os.getpid() not in made_by
    assert not any(tensor.is_shared() for one in answers for tensor in one.values())  # nothing stays in shared memory


def test_threads_that_read_at_once_get_their_own(reader, tmp_path):
    """Validation in the main thread, the next step's batch in the loader's."""
    batches = [
        [make_study(tmp_path, f"b{batch}-{number}", [(20 + batch, 20 + number)]) for number in range(7)]
        for batch in range(4)
    ]
    answers: dict[int, list[list[float]]] = {}

    def read(batch: int) -> None:
        answers[batch] = [one["pixel_values"][0, :2].tolist() for one in reader.read(batches[batch])]

    threads = [threading.Thread(target=read, args=(batch,)) for batch in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {batch: [[20 + number, 20 + batch] for number in range(7)] for batch in range(4)}


def test_a_workers_error_is_raised_here_with_study_and_file_and_the_next_batch_is_read(reader, tmp_path):
    good = sized(tmp_path, (20, 20), (21, 20), (22, 20), (23, 20), (24, 20))
    bad = make_study(tmp_path, "bad", [(30, 30)])
    bad.images[0].path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=f"study 'bad': {bad.images[0].path}: not an image"):
        reader.read([good[0], bad, *good[1:]])
    # none of the last batch's answers
    assert [one["pixel_values"][0, 0].item() for one in reader.read(good)] == [20, 21, 22, 23, 24]
    failing = sized(tmp_path, (40, 40), FAILS, (41, 40))
    with pytest.raises(
        WorkerError,
        match=rf"(?s)study 's1': image worker 1 \(process \d+\) failed on {failing[1].images[0].path}.*a fault of",
    ):
        reader.read(failing)


def test_a_worker_that_is_killed_is_named_with_what_it_was_at(reader, tmp_path):
    studies = sized(tmp_path, (20, 20), (21, 20), (22, 20), DIES, (23, 20))
    with pytest.raises(
        WorkerError,
        match=r"study 's3': image worker 1 \(process \d+\) was killed by SIGKILL at .*s3-0.png; .*lower data.workers",
    ):
        reader.read(studies)
    first = reader.read(studies[:2])
    os.kill(pids_of(reader)[0], signal.SIGKILL)  # between two batches
    with pytest.raises(WorkerError, match="study 's0': image worker 0 .*was killed by SIGKILL"):
        reader.read(studies[:2])
    again = reader.read(studies[:2])  # with new workers
    assert [one["pixel_values"][0, :3].tolist() for one in again] == [
        one["pixel_values"][0, :3].tolist() for one in first
    ]


def test_signals_to_the_whole_job_do_not_end_a_worker(reader, tmp_path):
    """The rank finishes its step and needs its images."""
    studies = sized(tmp_path, (20, 20), (21, 20))
    reader.read(studies)
    before = pids_of(reader)
    for pid in before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    assert len(reader.read(studies)) == 2 and pids_of(reader) == before


RANK = """
import signal, sys, time
from pathlib import Path
from mrg_r1.data.workers import ImageReader
from mrg_r1.types import Study, StudyImage
from tests.data.processors import SumProcessor

if __name__ == "__main__":
    reader = ImageReader(SumProcessor(), workers=1)
    def study(path):
        return Study("s", "p", (StudyImage(Path(path)),), "r", "train")
    reader.read([study(sys.argv[1])] * 2)
    print(*(worker.process.pid for worker in reader._workers), flush=True)
    if sys.argv[2] == "slow":
        reader.read([study(sys.argv[3])] * 2)
    elif sys.argv[2] == "wait":
        time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["wait", "exit"])
def test_no_worker_outlives_its_rank(tmp_path, ending):
    """Killed with -9, or at its end without `close`."""
    (study,) = sized(tmp_path, (20, 20))
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(study.images[0].path), ending]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as rank:
        assert rank.stdout is not None
        pids = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(pids) == 1
        if ending == "wait":
            assert all(map(is_alive, pids))
            rank.kill()
        assert rank.wait(30) == (-signal.SIGKILL if ending == "wait" else 0)
        assert gone(pids)


def builder_of(policy, image_processor, words, workers: int) -> PromptBuilder:
    return PromptBuilder(
        tokenizer=policy.tokenizer,
        image_processor=image_processor,
        layout=policy.layout,
        words=words,
        workers=workers,
    )


def equal(one: Prompts, other: Prompts) -> bool:
    tensors = ("input_ids", "attention_mask", "positions", "next_position")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    images = (one.images.tensors, other.images.tensors)
    same = same and one.images.rows == other.images.rows and images[0].keys() == images[1].keys()
    same = same and all(torch.equal(images[0][name], images[1][name]) for name in images[0])
    return same and all(
        getattr(one, name) == getattr(other, name) for name in ("study_ids", "references", "images_per_study")
    )


def test_prompts_are_the_same_to_the_last_bit_with_and_without_workers(policy, studies, build):
    """The checkpoint's own processor, several views, real radiographs where there are some, through a loader, in the
    same order.
    """
    try:
        paths = sorted(path for path in (shared_data() / "radiographs").iterdir() if path.suffix != ".csv")[:12]
    except pytest.skip.Exception:
        paths = []
    real = [
        Study(f"r{n}", "p", tuple(map(StudyImage, paths[3 * n : 3 * n + 1 + n % 3])), "r", "train")
        for n in range(len(paths) // 3)
    ]
    plain = build(policy)
    working = builder_of(policy, plain.image_processor, plain.words, 1)
    loaders = [StudyLoader(studies + real, one, seed=0, batch_size=3, rank=0, world_size=1) for one in (plain, working)]
    for step in range(4):
        one, other = (loader.batch(step) for loader in loaders)
        assert equal(one, other) and len(one) == 3
    assert not equal(one, plain(studies[:3]))  # the comparison can fail
    for loader in loaders:
        loader.close()
    pids = pids_of(working.images)
    assert len(pids) == 1 and all(map(is_alive, pids))
    working.images.close()
    assert gone(pids, 1)
