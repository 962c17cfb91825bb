"""A judge over HTTP: a server of the user's that is handed reports and references and answers with a number each, such
as an LLM on a device of its own (docs/your-reward-term.md).

    POST URL  {"reports": [TEXT, …], "references": [TEXT, …]}
    200       {"scores": [NUMBER, …]}

Reports are patient data: a host other than this machine is asked only where the recipe names it, redirects are
refused, and no proxy of the environment is used. What is late, fails or answers something else is asked again, and then
an error; never a 0.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from mrg_r1.files import parse_json

# invented, to see whether a judge answers
TRIAL = [
    ("There is a small left pleural effusion.", "Small pleural effusion on the left."),
    ("No acute cardiopulmonary abnormality.", "Small pleural effusion on the left."),
]
_LONGEST_ANSWER = 16 * 1024**2  # bytes
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds before a judge is asked again; doubled each time
_AGAIN = (408, 425, 429)  # and all from 500 on


class JudgeError(ValueError):
    """A judge that gave no numbers; the message names its URL and what it did, and quotes no report."""


class _Problem(Exception):
    """One attempt has failed, and another may not."""


@dataclass(frozen=True)
class HttpSettings:
    """How a judge is asked.

    Attributes:
        batch_size: reports of one request.
        parallel: requests at a time.
        timeout: seconds in which a request must be answered whole.
        retries: times that a request is sent again.
    """

    batch_size: int = 16
    parallel: int = 4
    timeout: float = 60.0
    retries: int = 3

    @property
    def longest(self) -> float:
        """Seconds that one request can take, with all that is sent again."""
        pauses = sum(min(_FIRST_PAUSE * 2**again, _LONGEST_PAUSE) for again in range(self.retries))
        return self.timeout * (self.retries + 1) + pauses


def is_url(name: str) -> bool:
    """Whether a term is a judge."""
    return name.lower().startswith(("http://", "https://"))


def require_url(url: str, send_text_to: Iterable[str] | None = None) -> SplitResult:
    """Refuse what is no URL of a judge.

    Args:
        send_text_to: hosts other than this machine that reports may be sent to; None does not look at that.

    Raises:
        ValueError: names it.
    """
    if any(not "!" <= letter <= "~" for letter in url):  # HTTP carries no other, and `urlsplit` drops line breaks
        raise ValueError(
            f"reward term {url!r}: a URL is written in ASCII without spaces; write other letters of its path as "
            "%XX (urllib.parse.quote), those of its host in its xn-- form"
        )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"reward term {url!r}: not a URL ({error})") from error
    if not host or parts.fragment:
        raise ValueError(f"reward term {url!r}: write http://HOST:PORT/PATH, such as http://127.0.0.1:8000/score")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "a reward term's URL has a user or a password in it, which a recipe would publish; leave it out"
        )
    if send_text_to is not None and not is_here(host) and host not in send_text_to:
        raise ValueError(
            f"reward term {url!r}: reports and references, patient data, would be sent to {host}; where they may go "
            f"there, the recipe says so: reward.send_text_to=[{host}]"
        )
    return parts


def is_here(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Judge:
    """One URL.

    Args:
        url: of the judge.
        send_text_to: hosts other than this machine that reports may be sent to.

    Raises:
        ValueError: a host that is not among them.
    """

    def __init__(self, url: str, settings: HttpSettings, send_text_to: Sequence[str] = ()) -> None:
        self._parts = require_url(url, send_text_to)
        self.url, self.settings = url, settings
        self._threads = ThreadPoolExecutor(settings.parallel)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One number for each pair of report and reference; NaN where the judge says that.

        Raises:
            JudgeError: after every retry.
        """
        size = self.settings.batch_size
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        return [value for batch in self._threads.map(self._scores, batches) for value in batch]

    def try_out(self) -> None:
        """Ask it about two invented reports.

        Raises:
            JudgeError: it does not answer as it should.
        """
        self.scores(TRIAL)

    def _scores(self, batch: Sequence[tuple[str, str]]) -> list[float]:
        problems = []
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
            try:
                return _numbers(self._post(batch), len(batch))
            except _Problem as problem:
                problems.append(str(problem))
        said = "; then ".join(dict.fromkeys(problems))
        raise JudgeError(f"{self.url}: asked {len(problems)} times about {len(batch)} reports: {said}")

    def _post(self, batch: Sequence[tuple[str, str]]) -> bytes:
        """The body of an answer 200."""
        parts, deadline = self._parts, time.monotonic() + self.settings.timeout
        sides = [[pair[side].encode("utf-8", "replace").decode("utf-8") for pair in batch] for side in (0, 1)]
        body = json.dumps({"reports": sides[0], "references": sides[1]}).encode()
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        assert parts.hostname is not None
        connection = kind(parts.hostname, parts.port, timeout=self.settings.timeout)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.connect()
            self._require_here(connection.sock)
            connection.request("POST", path, body, {"Content-Type": "application/json", "Accept": "application/json"})
            connection.sock.settimeout(max(0.001, deadline - time.monotonic()))
            answer = connection.getresponse()
            if answer.status != 200:
                self._refuse(answer)
            content = b""
            while part := answer.read1(1 << 16):
                content += part
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if len(content) > _LONGEST_ANSWER:
                    raise _Problem(f"an answer of more than {_LONGEST_ANSWER:,} bytes")
                if connection.sock is not None:
                    connection.sock.settimeout(left)
            if answer.length:
                raise _Problem(f"an answer that ends {answer.length} bytes before its length")
            return content
        except TimeoutError as error:
            raise _Problem(f"no answer in {self.settings.timeout:g} s") from error
        # UnicodeError: a host's name that no look-up takes
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise _Problem(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _require_here(self, sock: socket.socket) -> None:
        """A name of this machine's can lead elsewhere."""
        assert self._parts.hostname is not None
        peer = sock.getpeername()[0]
        if is_here(self._parts.hostname) and not is_here(peer):
            raise JudgeError(
                f"{self.url}: {self._parts.hostname} is {peer} here, which is not this machine: nothing sent"
            )

    def _refuse(self, answer: http.client.HTTPResponse) -> None:
        what = f"HTTP {answer.status} {answer.reason}"
        if 300 <= answer.status < 400:
            raise JudgeError(f"{self.url}: {what}, a redirect, which reports do not follow; give the URL it leads to")
        if answer.status < 500 and answer.status not in _AGAIN:
            raise JudgeError(f"{self.url}: {what}; it must answer a POST with 200")
        raise _Problem(what)


def _numbers(body: bytes, count: int) -> list[float]:
    """`scores` of an answer; NaN and infinities are numbers, for the caller to name the studies."""
    try:
        content = parse_json(body)
    except ValueError as error:
        raise _Problem(f"an answer of {len(body):,} bytes that is not JSON") from error
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list):
        raise _Problem('an answer without {"scores": [NUMBER, …]}')
    if len(scores) != count:
        raise _Problem(f"{len(scores)} scores for {count} reports")
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in scores):
        raise _Problem("scores that are no numbers")
    return [float(one) for one in scores]
