"""The reward service as a process of its own: what it answers, and what happens when it, its parent or a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest
import torch

import mrg_r1.reward.service.client as client_module
from mrg_r1.labels.labeler import Labeler
from mrg_r1.reward.compute import RewardContext, RewardError, RewardFunction
from mrg_r1.reward.reading import LabelError
from mrg_r1.reward.service import server
from mrg_r1.reward.service.client import OUTSTANDING, ServiceRewards
from mrg_r1.reward.service.interface import RewardServiceError, Ticket
from mrg_r1.reward.service.supervisor import ServiceState, Supervisor, socket_of, visible_device
from mrg_r1.types import Rewards
from tests.reward.in_process import InProcessRewards
from tests.reward.keyword_labeler import KeywordLabeler
from tests.reward.service.rank import FUNCTION, SETTINGS, FaultySupervisor

ROOT = Path(__file__).parents[3]
ENDED = torch.ones(2, 2, dtype=torch.bool)
TEXTS = [
    ["<think>a</think><report>edema, no effusion</report>", "<think>b</think><report>effusion \udc80 \x00</report>"],
    ["<report>edema", "<think>c</think><report>maybe pneumothorax</report>"],
]
REFERENCES = ["edema. no effusion", "pneumothorax"]
BATCH = (TEXTS, ENDED, ["CXR1", "CXR2"], REFERENCES)


Start = Callable[..., Supervisor]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts services, with a fault or without, and ends them."""
    monkeypatch.setattr(client_module, "_PING_EVERY", 0.2)
    monkeypatch.chdir(ROOT)
    started: list[Supervisor] = []

    def make(kind: str = "", times: int = 1, tokens: int = 0, **changes: object) -> Supervisor:
        fault = {"kind": kind, "times": times, "tokens": tokens, "counter": str(tmp_path / "counter")}
        monkeypatch.setenv("FAULT", json.dumps(fault))
        started.append(FaultySupervisor(replace(SETTINGS, **changes), log=tmp_path / "service.log"))
        started[-1].wait()
        return started[-1]

    yield make
    for supervisor in started:
        supervisor.close()
        assert not supervisor.directory.exists()


def connected(supervisor: Supervisor, *, timeout: float = 60.0) -> ServiceRewards:
    return ServiceRewards(supervisor.directory, keeper=os.getpid(), timeout=timeout)


def expected(context: RewardContext = RewardContext()) -> Rewards:  # noqa: B008 (frozen)
    """What the same function makes of the batch in this process."""
    service = InProcessRewards(RewardFunction(KeywordLabeler(), **FUNCTION))  # type: ignore[arg-type]
    return service.result(service.submit(*BATCH, context))


def same(one: Rewards, two: Rewards) -> bool:
    tensors = [(one.total, two.total), (one.labels, two.labels), (one.reference_labels, two.reference_labels)]
    for mine, others in ((one.terms, two.terms), (one.constant, two.constant)):
        assert mine.keys() == others.keys()
        tensors += [(mine[name], others[name]) for name in mine]
    assert (one.contradictions is None) == (two.contradictions is None)
    if one.contradictions is not None and two.contradictions is not None:
        tensors.append((one.contradictions, two.contradictions))
    equal = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in tensors)
    return equal and one.report_texts == two.report_texts and one.weights == two.weights


def rank(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process of its own, to be killed."""
    command = [sys.executable, "-m", "tests.reward.service.rank", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def gone(pid: int, *, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_service_answers_what_the_function_in_this_process_answers(start: Start) -> None:
    """Lone surrogates and control characters too, to the bit; in any order; for two ranks at once; more batches than
    may wait.
    """
    supervisor = start()
    one, two = connected(supervisor), connected(supervisor)
    context = RewardContext(
        np.ones((2, 14), dtype=np.int64), 0.25, np.full((13, 2), 2.0), "no pneumothorax", np.full(13, 0.3)
    )
    assert same(one.result(one.submit(*BATCH, context)), expected(context))
    by_sentence = replace(context, contradictions=True)
    assert expected(by_sentence).contradictions is not None
    assert same(one.result(one.submit(*BATCH, by_sentence)), expected(by_sentence))
    first, second = one.submit(*BATCH), one.submit(*BATCH, context)
    assert same(one.result(second), expected(context)) and same(one.result(first), expected())
    for ticket in (first, Ticket(("CXR9",)), two.submit(*BATCH)):
        with pytest.raises(ValueError, match="CXR"):
            one.result(ticket)

    wrong: list[str] = []

    def ask(service: ServiceRewards, word: str) -> None:
        texts = [[f"<think>a</think><report>{word}</report>"] * 2] * 2
        tickets = [service.submit(texts, ENDED, ["CXR1", "CXR2"], REFERENCES) for _ in range(3 * OUTSTANDING)]
        for ticket in tickets:
            if len(service._unanswered) > OUTSTANDING:
                wrong.append("too many at once")
            rewards = service.result(ticket)
            if rewards.report_texts != [[word] * 2] * 2:
                wrong.append(word)

    ranks = [
        threading.Thread(target=ask, args=(service, word)) for service, word in ((one, "edema"), (two, "effusion"))
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert not wrong
    assert one.label(["edema", "no effusion"] * 300).shape == (600, 14) and one.label([]).shape == (0, 14)
    assert one.labeler == {"name": "keywords", "fingerprint": "0123456789abcdef"}
    one.close()
    assert same(two.result(two.submit(*BATCH)), expected())  # a farewell is no death
    two.close()


def test_hints_are_read_before_their_batch(start: Start) -> None:
    service = connected(start())
    context = RewardContext(np.ones((2, 14), dtype=np.int64))
    service.hint([text for group in TEXTS for text in group])
    deadline = time.monotonic() + 10
    read = 0
    while read < 3 + 1:  # the three reports in the hint, and the one of this batch
        service.result(service.submit([["<think>a</think><report>x</report>"]], ENDED[:1, :1], ["CXR3"], ["x"]))
        read += service.health().computed
        assert time.monotonic() < deadline
    assert same(service.result(service.submit(TEXTS, ENDED, ["CXR1", "CXR2"], REFERENCES, context)), expected(context))
    health = service.health()
    assert (health.asked, health.computed, health.restarts) == (3, 0, 0) and health.busy > 0
    service.close()


def test_killed_in_the_middle_of_a_batch_it_is_started_again_and_the_rewards_are_the_same(start: Start) -> None:
    supervisor = start("die")
    one, two = connected(supervisor), connected(supervisor)
    tickets = [(one, one.submit(*BATCH)), (two, two.submit(*BATCH)), (one, one.submit(*BATCH))]
    for service, ticket in tickets:
        assert same(service.result(ticket), expected())
    assert one.health().restarts == two.health().restarts == 1
    one.close()
    two.close()


@pytest.mark.slow
def test_after_three_restarts_it_gives_up_and_names_the_cause(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    service = connected(start("die", times=100))
    ticket = service.submit(*BATCH)
    with pytest.raises(RewardServiceError, match=r"4 .*SIGKILL.*service\.log"):
        service.result(ticket)
    assert [f"({number} of 3)" in line for number, line in enumerate(capfd.readouterr().err.splitlines(), 1)] == [
        True
    ] * 3
    with pytest.raises(RewardServiceError, match="4"):
        service.submit(*BATCH)


def test_a_labeler_that_raises_stops_its_batch_and_not_the_service(start: Start) -> None:
    """Trap 22: an error, never a zero; where two batches were read together, each is tried alone and the next one is
    fine.
    """
    service = connected(start("raise"))
    ticket = service.submit(*BATCH)
    with pytest.raises(RewardError, match="CXR1, CXR2.*RuntimeError: device lost"):
        service.result(ticket)
    assert same(service.result(service.submit(*BATCH)), expected())
    with pytest.raises(RewardError, match="ended"):
        service.result(service.submit(TEXTS, ENDED[:1], ["CXR1", "CXR2"], REFERENCES))
    assert service.health().restarts == 0
    service.close()


def test_an_answer_that_is_lost_is_asked_for_again(start: Start) -> None:
    service = connected(start("lose"))
    assert same(service.result(service.submit(*BATCH)), expected())
    assert service.health().restarts == 0
    service.close()


@pytest.mark.slow
def test_processor_seconds_of_a_service_that_was_killed_are_not_lost(start: Start) -> None:
    supervisor = start()
    service, first = connected(supervisor), supervisor.cpu_seconds
    assert first > 0.1  # it has imported torch
    os.kill(ServiceState.read(supervisor.directory).pid, signal.SIGKILL)
    service.result(service.submit(*BATCH))  # of the next process
    both = supervisor.cpu_seconds
    assert both > first + 0.1
    service.close()
    supervisor.close()
    assert supervisor.cpu_seconds >= both


def test_a_service_that_hangs_is_killed_and_started_again(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    service = connected(start("hang"), timeout=1.0)
    assert same(service.result(service.submit(*BATCH)), expected())
    assert service.health().restarts == 1
    assert "reward.timeout is 1 s" in capfd.readouterr().err
    service.close()


@pytest.mark.slow
def test_a_service_that_is_frozen_is_killed_and_started_again(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = start()
    service = connected(supervisor, timeout=1.0)
    os.kill(ServiceState.read(supervisor.directory).pid, signal.SIGSTOP)
    assert same(service.result(service.submit(*BATCH)), expected())
    assert service.health().restarts == 1 and "it did not answer" in capfd.readouterr().err
    service.close()


def test_it_leaves_when_a_rank_dies(start: Start) -> None:
    supervisor = start()
    survivor = connected(supervisor)
    dying = rank("join", supervisor.directory, os.getpid())
    dying.stdout.readline()  # type: ignore[union-attr]
    assert same(survivor.result(survivor.submit(*BATCH)), expected())
    dying.kill()
    dying.wait()
    assert gone(ServiceState.read(supervisor.directory).pid, within=10)
    with pytest.raises(RewardServiceError, match="rank"):
        survivor.result(survivor.submit(*BATCH))


def test_it_dies_with_its_parent_and_leaves_nothing_behind(tmp_path: Path) -> None:
    parent = rank("keep", tmp_path / "log")
    pid, directory = parent.stdout.readline().split()  # type: ignore[union-attr]
    survivor = ServiceRewards(Path(directory), keeper=parent.pid, timeout=60)
    parent.kill()
    parent.wait()
    assert gone(int(pid), within=10) and not Path(directory).exists()
    with pytest.raises(RewardServiceError, match=f"process {parent.pid}"):
        survivor.result(survivor.submit(*BATCH))


def test_nobody_without_the_key_is_served(start: Start) -> None:
    supervisor = start()
    assert (
        supervisor.directory.stat().st_mode & 0o077 == 0 and (supervisor.directory / "key").stat().st_mode & 0o077 == 0
    )
    with pytest.raises(AuthenticationError):
        Client(socket_of(supervisor.directory, 1), "AF_UNIX", authkey=b"guessed")
    service = connected(supervisor)
    assert same(service.result(service.submit(*BATCH)), expected())
    service.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"labeler": "/no/such/labeler"}, "/no/such/labeler"),
        ({"reward_function": {"weights": {"mcss": 1.0}}}, "mcss"),
        ({"device": "cuda:7"}, "reward.device cuda:7"),
    ],
)
def test_what_cannot_be_loaded_is_named_and_never_replaced(
    world: object, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], named: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    labeler = str(world.folder / "labeler")  # type: ignore[attr-defined]
    with pytest.raises((ValueError, OSError)) as error:
        server._load(asdict(replace(SETTINGS, **{"labeler": labeler, **changes})))
    assert named in str(error.value)


def test_what_cannot_be_loaded_in_the_service_ends_its_start(start: Start) -> None:
    with pytest.raises(ValueError, match="no labeler of this name"):
        start("refuse")


def test_the_real_labeler_in_the_service_labels_as_here(tmp_path: Path, world: object) -> None:
    folder = world.folder / "labeler"  # type: ignore[attr-defined]
    here = Labeler.load(folder)
    supervisor = Supervisor(replace(SETTINGS, labeler=str(folder)), log=tmp_path / "log")
    supervisor.wait()
    service = connected(supervisor)
    texts = ["The heart is enlarged.", "", "No pleural effusion. " * 200, "\ud800 \x00 \u202e نص 报告"]
    assert np.array_equal(service.label(texts), here.label(texts))
    assert service.labeler == {"name": here.name, "fingerprint": here.fingerprint}
    service.close()
    supervisor.close()


def test_out_of_memory_the_batch_halves_and_says_so_and_a_report_too_large_is_an_error(
    start: Start, world: object, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "labeler"  # type: ignore[attr-defined]
    texts = [f"No pleural effusion. The heart is enlarged, {number}." for number in range(40)]
    service = connected(start("memory", tokens=100, labeler=str(folder)))
    assert np.array_equal(service.label(texts), Labeler.load(folder).label(texts))
    assert "2048 tokens" in capfd.readouterr().err
    with pytest.raises(RewardError, match="CXR1.* [0-9]+ tokens .*cpu"):
        service.result(
            service.submit(
                [["<think>a</think><report>" + "edema " * 200 + "</report>"]], ENDED[:1, :1], ["CXR1"], ["x"]
            )
        )
    assert same(service.result(service.submit(*BATCH)), service.result(service.submit(*BATCH)))  # it lives on
    service.close()


def test_the_devices_of_the_ranks_are_replaced() -> None:
    assert visible_device("cuda:7") == {"CUDA_VISIBLE_DEVICES": "7", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_device("GPU-8f6e")["CUDA_VISIBLE_DEVICES"] == "GPU-8f6e"
    assert visible_device("cpu") == {"CUDA_VISIBLE_DEVICES": ""}


def test_a_failure_while_labelling_reaches_the_caller(start: Start) -> None:
    service = connected(start("raise"))
    with pytest.raises(RewardError, match="device lost"):
        service.label(["edema"])
    assert issubclass(LabelError, RuntimeError)
    service.close()


@pytest.mark.slow
def test_folders_of_runs_that_were_killed_are_swept(start, tmp_path, monkeypatch):
    """A run and its service are killed at once: nobody is left to remove their folder, until the next run starts. A
    living run's stays.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    living = start()
    killed = rank("keep", "/dev/null", TMPDIR=str(tmp_path / "tmp"))
    pid, folder = killed.stdout.readline().split()
    assert Path(folder).parent == living.directory.parent
    os.kill(int(pid), signal.SIGSTOP)  # it would see that its parent has gone
    killed.kill()
    killed.wait()
    os.kill(int(pid), signal.SIGKILL)
    assert (Path(folder) / "key").exists()
    another = start()
    assert not Path(folder).exists() and living.directory.exists() and another.directory.exists()
    assert connected(living).health().restarts == 0
