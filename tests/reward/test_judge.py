"""A judge over HTTP: batches, retries, each way to fail by name, and that reports reach nobody who was not named."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from mrg_r1.reward import judge as module
from mrg_r1.reward.judge import HttpSettings, Judge, JudgeError, require_url
from mrg_r1.reward.outside import is_own
from tests.reward.judge_server import Judging, judging

PAIRS = [("one two", "x"), ("one", "y"), ("one two three", "z")]
SETTINGS = HttpSettings(batch_size=2, parallel=1, timeout=60, retries=1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judging]:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    with judging() as started:
        yield started


def test_reports_are_scored_in_batches_in_order(server: Judging) -> None:
    assert Judge(server.url, SETTINGS).scores(PAIRS) == [0.2, 0.1, 0.3]
    assert server.asked == [["one two", "one"], ["one two three"]]
    assert Judge(server.url, HttpSettings(batch_size=1, parallel=3)).scores(PAIRS) == [0.2, 0.1, 0.3]
    assert Judge(server.url, SETTINGS).scores([("half \udc80", "x")]) == [0.2]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("prose", "an answer of 40 bytes that is not JSON"),
        ("500", "HTTP 500"),
        ("429", "HTTP 429"),
        ("fewer", "1 scores for 2 reports"),
        ("null", "scores that are no numbers"),
        ("words", "scores that are no numbers"),
        ("nested", "an answer of 100,000 bytes that is not JSON"),
        ("large", "that is not JSON"),
        ("larger", "that is not JSON"),
        ("bare", 'an answer without {"scores"'),
        ("cut", "an answer that ends 10 bytes before its length"),
    ],
)
def test_what_goes_wrong_once_is_asked_again_and_then_named(server: Judging, fault: str, message: str) -> None:
    server.faults = [fault]
    assert Judge(server.url, SETTINGS).scores(PAIRS[:2]) == [0.2, 0.1]
    server.faults = [fault, fault]
    with pytest.raises(JudgeError) as caught:
        Judge(server.url, SETTINGS).scores(PAIRS[:2])
    assert f"{server.url}: asked 2 times about 2 reports: " in str(caught.value) and message in str(caught.value)
    assert "one two" not in str(caught.value)


@pytest.mark.parametrize("fault", ["late", "dribble"])
def test_a_judge_that_is_late_is_named(server: Judging, fault: str) -> None:
    server.faults = [fault, fault]
    with pytest.raises(JudgeError, match=r"asked 2 times about 2 reports: no answer in 0.2 s"):
        Judge(server.url, HttpSettings(timeout=0.2, retries=1)).scores(PAIRS[:2])


def test_a_judge_that_is_away_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    with pytest.raises(JudgeError, match="asked 1 times about 2 reports: ConnectionRefusedError"):
        Judge(url, HttpSettings(retries=0)).try_out()


def test_nan_is_what_the_judge_says(server: Judging) -> None:
    server.faults = ["nan"]
    assert all(score != score for score in Judge(server.url, SETTINGS).scores(PAIRS[:2]))


@pytest.mark.parametrize("fault", ["302", "404"])
def test_redirects_and_refusals_are_not_asked_again(server: Judging, fault: str) -> None:
    server.faults = [fault, ""]
    with pytest.raises(JudgeError, match=f"HTTP {fault}"):
        Judge(server.url, SETTINGS).scores(PAIRS[:2])
    assert len(server.asked) == 1


def test_proxies_of_the_environment_are_not_used(server: Judging, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.1:3128")
    assert Judge(server.url, SETTINGS).scores(PAIRS[:1]) == [0.2]


def test_a_host_other_than_this_machine_must_be_named() -> None:
    url = "https://judge.example.org/score"
    with pytest.raises(
        ValueError, match=r"would be sent to judge.example.org.*reward.send_text_to=\[judge.example.org"
    ):
        require_url(url, [])
    require_url(url, ["judge.example.org"])
    for here in ("http://127.0.0.1:80/", "http://localhost/", "http://[::1]:8000/score", "http://127.3.2.1/x"):
        require_url(here, [])
    for elsewhere in ("http://0.0.0.0/", "http://127.0.0.1.example.org/", "http://10.0.0.1/", "http://localhost.x/"):
        with pytest.raises(ValueError, match="would be sent to"):
            require_url(elsewhere, [])


def test_a_name_of_this_machine_that_leads_elsewhere_is_sent_nothing(
    server: Judging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_here", lambda host: host == "localhost")  # 127.0.0.1 plays another machine
    judge = Judge(f"http://localhost:{server.server_port}/score", SETTINGS)
    with pytest.raises(JudgeError, match="localhost is 127.0.0.1 here, which is not this machine: nothing sent"):
        judge.try_out()
    assert not server.asked


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http:///score", "write http://HOST:PORT"),
        ("http://h:port/", "not a URL"),
        ("http://h/#a", "write http://HOST"),
        ("http://h/s\u00e4", "'http://h/s\u00e4': a URL is written in ASCII"),
        ("http://h\u00f6st/", "xn--"),
        ("http://h/?q=\u00e4", "%XX"),
        ("http://h/a b", "without spaces"),
        ("http://h/a\nb", "without spaces"),
    ],
)
def test_what_is_no_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_url(url)


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_a_name_that_no_look_up_takes_is_named(host: str) -> None:
    with pytest.raises(JudgeError, match=f"http://{host}/: asked 1 times about 2 reports: Unicode"):
        Judge(f"http://{host}/", HttpSettings(retries=0), [host]).try_out()


def test_a_scheme_in_capitals_is_the_same_judge(server: Judging) -> None:
    url = server.url.replace("http", "HTTP")
    assert module.is_url(url) and not is_own(url)
    assert Judge(url, SETTINGS).scores(PAIRS[:1]) == [0.2]
    with pytest.raises(ValueError, match="would be sent to h.example"):
        require_url("Https://H.example/", [])


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="has a user or a password in it") as caught:
        require_url("http://me:secret@127.0.0.1/score")
    assert "secret" not in str(caught.value)
