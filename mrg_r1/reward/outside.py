"""Reward terms that others score: RadEval's metrics, in processes of an interpreter of the user's, and judges that are
asked over HTTP (`judge`). Each is called like a term of the user's own.

A report and its reference are asked for once: groups hold equal reports, and the constant report comes again each step.
No failure is a number: it is raised, with what failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1.metrics.radeval import RadEval, RadEvalDied, RadEvalSettings
from mrg_r1.metrics.radeval_names import METRICS, PREFIX, metric_of, require_metrics
from mrg_r1.reward.judge import HttpSettings, Judge, is_url, require_url

RESTARTS = 3  # of all workers of a run together; what dies again and again is not mended by another start
_REMEMBERED = 100_000  # pairs of texts, of each metric and judge
Pairs = list[tuple[str, str]]
Said = Mapping[str, float]  # by output
Term = Callable[[Sequence[str | None], Sequence[str], Any, Any], NDArray[np.float32]]


@dataclass(frozen=True)
class OutsideSettings:
    """How others are asked.

    Attributes:
        radeval: how a worker is started, without its metrics; None where no term is RadEval's.
        workers: processes of it.
        http: how a judge is asked.
        send_text_to: hosts other than this machine that may be sent reports and references.
    """

    radeval: RadEvalSettings | None = None
    workers: int = 1
    http: HttpSettings = HttpSettings()  # noqa: RUF009 (frozen)
    send_text_to: tuple[str, ...] = ()

    @staticmethod
    def of(content: Mapping[str, Any]) -> OutsideSettings:
        """From what JSON has made of one."""
        started = content["radeval"]
        return OutsideSettings(
            radeval=None if started is None else RadEvalSettings(**{**started, "metrics": tuple(started["metrics"])}),
            workers=content["workers"],
            http=HttpSettings(**content["http"]),
            send_text_to=tuple(content["send_text_to"]),
        )


def is_outside(name: str) -> bool:
    """Whether a term is one of these, and not `module:function`."""
    return name.startswith(PREFIX) or is_url(name)


def is_own(name: str) -> bool:
    """Whether a term is the user's own, `module:function`."""
    return ":" in name and not is_outside(name)


def parts_of_own(name: str) -> tuple[str, str]:
    """Module and function of a term of the user's own.

    Raises:
        ValueError: not `module:function`.
    """
    module_name, _, function_name = name.partition(":")
    if not all(part and part == part.strip() for part in module_name.split(".")) or not function_name.isidentifier():
        raise ValueError(f"reward term {name!r}: expected 'module:function', such as 'my_terms:brevity'")
    return module_name, function_name


def require_outside(name: str) -> None:
    """Refuse a metric that is none, one that no report can be rewarded by, and a URL that is none.

    Raises:
        ValueError: names it and what is wrong.
    """
    if is_url(name):
        require_url(name)
        return
    metric, _ = metric_of(name)
    require_metrics([metric], how=" as a reward; a judge of your own is asked over HTTP (docs/your-reward-term.md)")
    if METRICS[metric].of_all:
        raise ValueError(
            f"reward term {name!r}: what it says of a report depends on the references that come with it "
            "(its BERTScore weighs words by their IDF), so that it is none of the report; score evaluations with it"
        )


def metrics_of(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics of RadEval's that these terms need, each once."""
    return tuple(dict.fromkeys(metric_of(name)[0] for name in names if name.startswith(PREFIX)))


def open_terms(names: Sequence[str], settings: OutsideSettings) -> tuple[dict[str, Term], Workers | None]:
    """Those of the terms that others score, started and tried, and RadEval's workers.

    Raises:
        ValueError: a worker that cannot be started, or a judge that does not answer.
    """
    outside = [name for name in names if is_outside(name)]
    found: dict[str, Term] = {}
    for url in outside:
        if is_url(url):
            judge = Judge(url, settings.http, settings.send_text_to)
            judge.try_out()
            found[url] = _Remembering(_Memory(partial(_judged, judge)), "")
    metrics = metrics_of(outside)
    if not metrics:
        return found, None
    if settings.radeval is None:
        raise ValueError(f"reward terms {', '.join(outside)}: no interpreter that has RadEval; set radeval.python")
    workers = Workers(replace(settings.radeval, metrics=metrics), settings.workers)
    memories = {metric: _Memory(partial(workers.values, metric)) for metric in metrics}
    for name in outside:
        if name.startswith(PREFIX):
            metric, output = metric_of(name)
            found[name] = _Remembering(memories[metric], output)
    return found, workers


def _judged(judge: Judge, pairs: Pairs) -> list[Said]:
    return [{"": value} for value in judge.scores(pairs)]


class _Memory:
    """What was said of pairs of texts; finite answers are kept, the oldest are forgotten first."""

    def __init__(self, ask: Callable[[Pairs], list[Said]]) -> None:
        self._ask = ask
        self._known: dict[tuple[str, str], Said] = {}

    def __call__(self, pairs: Pairs) -> list[Said]:
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self._known))
        said = dict(zip(new, self._ask(new), strict=True)) if new else {}
        answers = [said[pair] if pair in said else self._known[pair] for pair in pairs]
        self._known |= {pair: one for pair, one in said.items() if np.isfinite(list(one.values())).all()}
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return answers


class _Remembering:
    """A term: one output of what is said of each report; a malformed one is not shown to anybody and earns 0."""

    def __init__(self, ask: _Memory, output: str) -> None:
        self._ask, self._output = ask, output

    def __call__(
        self, generated: Sequence[str | None], references: Sequence[str], labels: Any, reference_labels: Any
    ) -> NDArray[np.float32]:
        rows = [row for row, report in enumerate(generated) if report is not None]
        values = np.zeros(len(generated), dtype=np.float32)
        values[rows] = [
            one[self._output] for one in self._ask([(generated[row] or "", references[row]) for row in rows])
        ]
        return values


class Workers:
    """RadEval's processes, which share the reports of a batch.

    Args:
        count: of them; each has models of its own.

    Attributes:
        about: what they are, all alike.

    Raises:
        ValueError: one cannot be started, or they are not alike.
    """

    def __init__(self, settings: RadEvalSettings, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)
        self._workers = list(self._threads.map(lambda _: RadEval(settings, log="stderr"), range(count)))
        self.about = self._workers[0].about
        self._restarts = 0
        self._lock = threading.Lock()

    def values(self, metric: str, pairs: Pairs) -> list[Said]:
        """What a metric says of pairs of report and reference. A worker that dies is started again, and asked again.

        Raises:
            ValueError: the metric failed, or workers have died too often; names it.
        """
        count = min(len(self._workers), len(pairs))
        shares = [pairs[worker::count] for worker in range(count)]
        futures = [self._threads.submit(self._share, worker, metric, share) for worker, share in enumerate(shares)]
        problems = [problem for future in futures if (problem := future.exception()) is not None]  # waits for all
        if problems:
            raise problems[0]
        said: list[Said] = [{}] * len(pairs)
        for worker, future in enumerate(futures):
            said[worker::count] = future.result()
        return said

    def _share(self, worker: int, metric: str, pairs: Pairs) -> list[Said]:
        while True:
            try:
                child = self._workers[worker]
                values = child.score(metric, [report for report, _ in pairs], [reference for _, reference in pairs])
            except RadEvalDied as error:
                with self._lock:
                    self._restarts += 1
                    if self._restarts > RESTARTS:
                        raise ValueError(f"it has died {self._restarts} times; the last time: {error}") from error
                print(f"RadEval is started again ({self._restarts} of {RESTARTS}): {error}", flush=True)
                self._workers[worker] = child.again(child.settings.metrics)
                continue
            return [{name: float(column[row]) for name, column in values.items()} for row in range(len(pairs))]

    def close(self) -> None:
        """End them."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()
