"""RadGraph, RaTEScore, BERTScore, RadCliQ and what else the package `radeval` has, asked of a child process that runs
`radeval_child.py` in an interpreter of the user's: those packages pin other worlds than ours.

`RadEval` is the child, `described_scores` what a score card and an evaluation hold; what each metric is stands in
`radeval_names`.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mrg_r1.cores import visible_device
from mrg_r1.files import parse_json
from mrg_r1.metrics.bootstrap import mean_intervals
from mrg_r1.metrics.radeval_names import DESCRIBED, METRICS, require_metrics

CHILD = Path(__file__).with_name("radeval_child.py")
Values = dict[str, NDArray[np.float64]]
_SHOWN = 8  # studies in a message
_LAST_LINES = 4  # of what a child said before it died


class RadEvalError(ValueError):
    """A metric that gave no numbers; the message names the metric, the interpreter and what it did.

    Attributes:
        text: the message without the package's own words, which may quote a report.
    """

    def __init__(self, text: str, words: str = "") -> None:
        super().__init__(f"{text}: {words}" if words else text)
        self.text = text


class RadEvalDied(RadEvalError):
    """The child is gone, or of no use any more; another can be started."""


@dataclass(frozen=True)
class RadEvalSettings:
    """How a child is started.

    Attributes:
        python: an interpreter whose environment has RadEval.
        metrics: of `METRICS`.
        device: physical: `cpu`, `cuda:N` in nvidia-smi's count, or a UUID.
        threads: that torch may run on a CPU.
        download: weights that are not there yet may be fetched from the hub.
        send_text_to: metrics that may send the reports to their API.
    """

    python: str
    metrics: tuple[str, ...]
    device: str = "cpu"
    threads: int = 1
    download: bool = False
    send_text_to: tuple[str, ...] = ()


class RadEval:
    """A child that has loaded its metrics and answers.

    Args:
        log: where its stderr goes, what the package prints and tracebacks: a file that is appended to, or this
            process's own. None: a file that is gone with it, whose end is said where the child dies.

    Attributes:
        about: the handshake: `package`, `version`, `python`, and by metric `outputs` and `weights_sha256`.

    Raises:
        RadEvalError: no such interpreter, no package there, a metric that cannot be loaded (as where its weights are
            not in the hub's cache), or an interpreter that answers something else.
    """

    def __init__(self, settings: RadEvalSettings, *, log: Path | Literal["stderr"] | None = None) -> None:
        require_metrics(settings.metrics, settings.send_text_to)
        self.settings, self.log = settings, log
        python = shutil.which(settings.python)
        if python is None:
            raise RadEvalError(
                f"{settings.python}: no interpreter there that can be run; name the python of an environment that has "
                "RadEval (`make radeval` sets one up, docs/scores.md)"
            )
        environment = os.environ | visible_device(settings.device)
        environment |= {"OMP_NUM_THREADS": str(settings.threads), "TOKENIZERS_PARALLELISM": "false"}
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "0" if settings.download else "1")
        self._words: IO[bytes] = tempfile.TemporaryFile() if not isinstance(log, Path) else open(log, "ab")
        self._process = subprocess.Popen(
            [python, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if log == "stderr" else self._words,
            env=environment | offline,
        )
        self._buffer = b""
        self._asked = 0
        network = settings.download or any(METRICS[name].sends for name in settings.metrics)
        self._send({"metrics": list(settings.metrics), "network": network}, "while it was started")
        self.about = self._handshake()

    def ask(self, metric: str, predicted: Sequence[str], references: Sequence[str]) -> int:
        """Hand in N pairs of texts; `answer` waits for them. Returns N."""
        self._asked += 1
        texts = [[_encodable(text) for text in side] for side in (predicted, references)]
        request = {"id": self._asked, "metric": metric, "predicted": texts[0], "references": texts[1]}
        self._send(request, f"before {metric}")
        return len(predicted)

    def answer(self, metric: str, count: int, beat: Callable[[], None] = lambda: None) -> Values:
        """What the last `ask` has come to: by output, [N] float64, in which NaN stands for what the metric did not say.

        Args:
            count: N.
            beat: called once a second meanwhile.

        Raises:
            RadEvalError: the metric failed, or gave another number of values. RadEvalDied where the child ended, or
                wrote what is no answer.
        """
        during = f"while {metric} scored {count:,} reports"
        message = self._receive(during, beat)
        if message.get("id") != self._asked:
            raise self._useless(f"wrote the answer of another request {during}")
        if "error" in message:
            kind, _, words = str(message["error"]).partition(": ")
            raise RadEvalError(f"RadEval's {metric} raised {kind}", words)
        found, expected = message.get("values"), self.about["metrics"][metric]["outputs"]
        if not isinstance(found, dict) or sorted(found) != sorted(expected):
            raise self._useless(f"wrote an answer without {', '.join(expected)} {during}")
        try:
            values = {name: np.array(column, dtype=np.float64) for name, column in found.items()}
        except (TypeError, ValueError) as error:
            raise self._useless(f"wrote values that are no numbers {during}") from error
        for name, column in values.items():
            if column.shape != (count,):
                raise RadEvalError(f"RadEval's {metric} gave {len(column):,} values of {name} for {count:,} reports")
        return values

    def score(
        self,
        metric: str,
        predicted: Sequence[str],
        references: Sequence[str],
        beat: Callable[[], None] = lambda: None,
    ) -> Values:
        """`ask`, then `answer`."""
        return self.answer(metric, self.ask(metric, predicted, references), beat)

    def again(self, metrics: Sequence[str]) -> RadEval:
        """Another child for these metrics, which must be what this one was.

        Raises:
            RadEvalError: it cannot be started, or another version or other weights answer by now.
        """
        self.close()
        other = RadEval(replace(self.settings, metrics=tuple(metrics)), log=self.log)
        for what, was, now in (
            ("version", self.about["version"], other.about["version"]),
            *((name, self.about["metrics"][name], other.about["metrics"][name]) for name in metrics),
        ):
            if was != now:
                other.close()
                raise RadEvalError(f"{self.settings.python}: {what} was {was} and is {now} by now: something else")
        return other

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._words):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass  # what it was not given any more

    def _send(self, message: Mapping[str, Any], when: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died(when) from error

    def _handshake(self) -> dict[str, Any]:
        settings = self.settings
        about = self._receive("while it was started", lambda: None, quote=True)
        if "error" in about:
            self.close()
            if about.get("missing") == "radeval":
                raise RadEvalError(
                    f"{settings.python}: its environment has no package radeval; `make radeval` sets one up that has"
                )
            remedy = (
                "" if settings.download else "; no weights are downloaded unless that is asked for (docs/scores.md)"
            )
            raise RadEvalError(f"{settings.python}: {about['error']}{remedy}")
        metrics = about.get("metrics")
        if not isinstance(metrics, dict) or set(metrics) != set(settings.metrics) or "version" not in about:
            raise self._useless("answered something else than a handshake")
        return about

    def _receive(self, when: str, beat: Callable[[], None], *, quote: bool = False) -> dict[str, Any]:
        """One line of its answers, as an object."""
        assert self._process.stdout is not None
        parts = [self._buffer]
        while b"\n" not in parts[-1]:
            ready, _, _ = select.select([self._process.stdout], [], [], 1.0)
            if not ready:
                beat()
                continue
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            if not part:
                raise self._died(when)
            parts.append(part)
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        try:
            message = parse_json(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            # of a child that has been given reports, what it writes may be one of them
            words = f" ({line[:80].decode('utf-8', 'replace')!r})" if quote else ""
            raise self._useless(f"wrote a line that is no answer{words} {when}")
        return message

    def _useless(self, what: str) -> RadEvalDied:
        self.close()
        return RadEvalDied(f"{self.settings.python}: RadEval's process {what}")

    def _died(self, when: str) -> RadEvalDied:
        try:
            code = self._process.wait(timeout=10)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its output"
        words = ""
        if self.log is None:
            self._words.seek(0)
            words = " / ".join(self._words.read().decode("utf-8", "replace").split("\n")[-_LAST_LINES:]).strip(" /")
        self.close()
        return RadEvalDied(f"{self.settings.python}: RadEval's process {how} {when}", words)


def described_scores(
    child: RadEval,
    predicted: Mapping[str, str],
    reference: Mapping[str, str],
    *,
    samples: int,
    seed: int,
    beat: Callable[[], None] = lambda: None,
    shown: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> tuple[dict[str, Any], Values]:
    """All metrics of a child, over the reports of some studies, with everything that makes the numbers comparable.

    A metric that fails is left out and named, and the others are kept; so is one that is not finite for some study.

    Args:
        child: is closed at the end.
        predicted, reference: study id -> text as it was written, the same studies in the same order.
        samples, seed: of the bootstrap, which draws the same studies as that of the F1 of a definition.
        beat: called once a second.
        shown: wraps the metrics' names, such as in a progress bar.

    Returns:
        JSON values: `package`, `python`, by metric `variant` and `weights_sha256`, by output `scores` (the mean over
        reports, and its interval) and `scores_are`, `left_out`, and a hash of the references; and by output [N] values.
    """
    about, ids = child.about, list(reference)
    said, true = list(predicted.values()), list(reference.values())
    values: Values = {}
    left_out: dict[str, str] = {}
    names = list(child.settings.metrics)
    alive = True
    for number, name in enumerate(shown(names)):
        try:
            if not alive:
                child, alive = child.again(names[number:]), True
            found = child.score(name, said, true, beat)
        except RadEvalError as error:
            alive = alive and not isinstance(error, RadEvalDied)
            left_out[name] = f"{name} left out: {error.text}"
            if error.text != str(error):  # its words stay on this machine's terminal, and out of what may be published
                print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        bad = [f"{ids[row]} ({output})" for output, v in found.items() for row in np.flatnonzero(~np.isfinite(v))]
        if bad:
            more = f" and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
            left_out[name] = f"{name} left out: not finite for studies {', '.join(bad[:_SHOWN])}{more}"
            continue
        values |= found
    child.close()
    rows = np.array([values[output] for output in values]).reshape(len(values), len(said))
    intervals = mean_intervals(rows, samples=samples, seed=seed) if len(values) else []
    scores = {
        output: {"mean": float(values[output].mean()), "ci": list(interval)}
        for output, interval in zip(values, intervals, strict=True)
    }
    texts = "".join(f"{study} {' '.join(text.split())}\n" for study, text in zip(ids, true, strict=True))
    described = {
        "package": f"{about['package']} {about['version']}",
        "python": about["python"],
        "variants_of": f"{about['package']} {DESCRIBED}",
        "metrics": {
            name: {"variant": METRICS[name].variant, "weights_sha256": about["metrics"][name]["weights_sha256"]}
            for name in names
            if name not in left_out
        },
        "scores": scores,
        "metric_of": {
            output: name for name in names if name not in left_out for output in about["metrics"][name]["outputs"]
        },
        "left_out": left_out,
        "studies": len(said),
        "references_sha256": hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest(),
    }
    return described, values


def _encodable(text: str) -> str:
    """A sampled report can hold half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
