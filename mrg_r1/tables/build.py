"""From what the rows' runs left to the numbers of a table: mean and spread over seeds, and differences from the
reference row.

Everything clinical and lexical is computed here from RUN/evaluation/*_predictions.jsonl, so that all rows are measured
alike, whatever their recipes logged.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrg_r1.labels.observations import OBSERVATIONS, classes_of_values
from mrg_r1.metrics.bootstrap import Difference, paired_differences, paired_mean_differences
from mrg_r1.metrics.clinical import DEFINITIONS, clinical_scores, known_truth, per_observation
from mrg_r1.metrics.lexical import NAMES, SCORERS, lexical_scores
from mrg_r1.metrics.radeval_names import METRICS
from mrg_r1.metrics.seeds import t_interval
from mrg_r1.tables.plan import Plan, RowRun, TableError, protocol_changed

Classes = NDArray[np.int64]
SAMPLES = 1000  # of a bootstrap interval
_CLINICAL = ("truth", "labeler", "held_out")
_OUTPUTS = [output for metric in METRICS.values() for output in metric.outputs]


@dataclass(frozen=True)
class Cell:
    """A row's values of a column over its finished seeds. What cannot be computed, as of no seed or of one, is None."""

    values: dict[int, float]  # by seed
    mean: float | None
    std: float | None  # over seeds, unbiased
    least: float | None
    most: float | None
    interval: tuple[float, float] | None  # 95 % t interval of the mean over seeds


@dataclass(frozen=True)
class Gain:
    """A row against the reference row, seed by seed: both have the same start, studies and labeler."""

    mean: float
    interval: tuple[float, float] | None  # 95 % t interval of the mean over seeds
    studies_difference: float | None  # of the F1 over all seeds' studies together
    # 95 % paired bootstrap over those studies: of these very policies, not of the method
    studies_interval: tuple[float, float] | None


@dataclass(frozen=True)
class BuiltRow:
    """One row."""

    name: str
    seeds: list[int]  # finished
    control: str | None  # a key of `tracking.control.CONTROLS`
    cells: dict[str, Cell]  # by column
    gains: dict[str, Gain]  # by column; none for the reference


@dataclass(frozen=True)
class BuiltTable:
    """A table with its numbers. `missing` names the runs that are not finished."""

    title: str
    question: str
    made_on: str
    reference: str
    columns: list[str]
    rows: list[BuiltRow]
    published: list[dict[str, Any]]
    missing: list[str]
    studies: dict[int, int]  # evaluated, by seed
    commits: list[str]  # that the rows were run at
    protocol: str | None  # the name of its file
    off_protocol: list[str]  # runs that were started under another text of it, or under none that is known


@dataclass(frozen=True)
class _Read:
    """What one run left of one evaluation."""

    classes: dict[str, tuple[Classes, Classes]]  # truth, labeler, held_out -> predicted and reference [N, 14]
    predictions: list[dict[str, Any]]
    evaluation: dict[str, Any]
    steps: list[dict[str, Any]]  # of metrics.jsonl; none for an evaluation before training


def check_columns(columns: Sequence[str]) -> None:
    """Raise TableError for a column that is none.

    A column is KIND:NAME. `truth`, `labeler` and `held_out`: F1 of a definition, or of one observation (class 1 as
    positive), against the drawn truth, the rewarded labeler's reading or the held-out labeler's. `lexical`: of the raw
    texts. `radeval`: the mean of what a metric of RadEval's gave each report. `evaluation`: a number of the evaluation
    file. `step`: a metric's mean over all training steps.
    """
    for column in columns:
        kind, _, name = column.partition(":")
        if kind not in (*_CLINICAL, "lexical", "radeval", "evaluation", "step") or not name:
            raise TableError(
                f"column {column!r}: write KIND:NAME with truth, labeler, held_out, lexical, radeval, evaluation or "
                "step for KIND"
            )
        if kind == "radeval" and name not in _OUTPUTS:
            raise TableError(f"column {column!r}: RadEval gives no such value; there are {', '.join(_OUTPUTS)}")
        if kind in _CLINICAL and name not in (*DEFINITIONS, *OBSERVATIONS):
            raise TableError(
                f"column {column!r}: no definition and no observation; there are "
                f"{', '.join((*DEFINITIONS, *OBSERVATIONS))}"
            )
        if kind == "lexical" and name not in NAMES:
            raise TableError(f"column {column!r}: no lexical metric; there are {', '.join(NAMES)}")


def build_table(plan: Plan) -> BuiltTable:
    """Compute a table from the finished runs of a plan.

    Raises:
        TableError: a column that is none or that a run cannot give, or a run whose files are not whole.
    """
    spec = plan.spec
    check_columns(spec.columns)
    seeds = sorted({seed for _, seed in plan.runs})
    read: dict[tuple[str, int], _Read] = {}
    missing: list[str] = []
    commits: set[str] = set()
    off_protocol: list[str] = []
    for row in spec.rows:
        for seed in seeds:
            run, evaluation = plan.evaluation(row.name, seed)
            if run.finished:
                read[row.name, seed] = _read(run, evaluation)
                commits.add(_commit(run))
                reason = protocol_changed(run)
                if reason is not None and row.before is None:
                    off_protocol.append(f"{row.name}, seed {seed} ({reason})")
            else:
                missing.append(f"{row.name}, seed {seed}")
    for column in spec.columns:
        _require_one_metric(column, read)
    values = {
        (row.name, column): {seed: _value(column, read[row.name, seed]) for seed in seeds if (row.name, seed) in read}
        for row in spec.rows
        for column in spec.columns
    }
    rows = []
    for row in spec.rows:
        done = [seed for seed in seeds if (row.name, seed) in read]
        cells = {column: _cell(values[row.name, column]) for column in spec.columns}
        gains = {}
        if row.name != spec.reference:
            compared = {
                column: [
                    seed
                    for seed in done
                    if None not in (values[row.name, column][seed], values[spec.reference, column].get(seed))
                ]
                for column in spec.columns
            }
            kinds = {column.partition(":")[0] for column in spec.columns if compared[column] and _is_definition(column)}
            pooled = {kind: _pooled(kind, spec.reference, row.name, done, read) for kind in sorted(kinds)}
            of_radeval = [one for one in spec.columns if compared[one] and one.startswith("radeval:")]
            pooled["radeval"] = {
                one.partition(":")[2]: _pooled_means(one, spec.reference, row.name, done, read) for one in of_radeval
            }
            for column, shared in compared.items():
                if shared:
                    gains[column] = _gain(
                        column, values[spec.reference, column], values[row.name, column], shared, pooled
                    )
        control = None if row.before else plan.runs[row.name, seeds[0]].control
        rows.append(BuiltRow(row.name, done, control, cells, gains))
    return BuiltTable(
        title=spec.title,
        question=spec.question,
        made_on=spec.made_on,
        reference=spec.reference,
        columns=spec.columns,
        rows=rows,
        published=[number.model_dump() for number in spec.published],
        missing=missing,
        studies={seed: len(one.predictions) for (_, seed), one in read.items()},
        commits=sorted(commits),
        protocol=None if spec.protocol is None else spec.protocol.name,
        off_protocol=off_protocol,
    )


def as_json(table: BuiltTable) -> str:
    """The table with every seed's values."""
    return json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n"


def _read(run: RowRun, name: str) -> _Read:
    folder = run.folder / "evaluation"
    try:
        evaluation = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        predictions = [
            json.loads(line) for line in (folder / f"{name}_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        log = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TableError(
            f"{error.filename}: not there, though the run of row {run.row!r}, seed {run.seed} is complete; does "
            "its recipe evaluate (evaluation.test, and evaluation.before for a row that is `before` another)?"
        ) from error
    except json.JSONDecodeError as error:
        raise TableError(
            f"{folder}: {name}: not whole JSON ({error}); remove {run.folder} to run the row again"
        ) from error
    if any(row.get("judge_labels") is not None for row in predictions):
        raise TableError(
            f"{folder}: {name}: written by mrg-r1 0.1.0, in which the held-out labeler was called the judge; remove "
            f"{run.folder} to run the row again"
        )
    predicted = _classes(predictions, "labels")
    classes = {"labeler": (predicted, _classes(predictions, "reference_labels"))}
    if all(row["drawn"] is not None for row in predictions):
        classes["truth"] = known_truth(predicted, [row["drawn"] for row in predictions])
    if all(row.get("held_out_labels") is not None for row in predictions):
        classes["held_out"] = (
            _classes(predictions, "held_out_labels"),
            _classes(predictions, "held_out_reference_labels"),
        )
    steps = [json.loads(line) for line in log.splitlines()] if name == "test" else []
    return _Read(classes, predictions, evaluation, steps)


def _classes(predictions: Sequence[Mapping[str, Any]], key: str) -> Classes:
    return np.array([classes_of_values(row[key]) for row in predictions], dtype=np.int64)


def _value(column: str, read: _Read) -> float | None:
    """A run's value; None where a run of its kind has none, as the training steps of the policy before training."""
    kind, _, name = column.partition(":")
    if kind in _CLINICAL:
        if kind not in read.classes:
            raise TableError(f"column {column!r}: the predictions have no {kind}; {_WHY_NOT[kind]}")
        pair = read.classes[kind]
        return clinical_scores(*pair)[name].f1 if name in DEFINITIONS else per_observation(*pair)[name].f1
    if kind == "lexical":
        scorer = next(one for one in SCORERS if name.startswith(one))
        worded = [row for row in read.predictions if row["reference"] is not None]
        if not worded:
            raise TableError(f"column {column!r}: the studies have labels and no report to compare words with")
        said, true = [row["report"] or "" for row in worded], [row["reference"] for row in worded]
        result = lexical_scores(said, true, scorers=[scorer])
        if name not in result.scores:
            raise TableError(f"column {column!r}: {'; '.join(result.left_out.values())}")
        return result.scores[name]
    if kind == "radeval":
        return float(_radeval(column, read).mean())
    if kind == "evaluation":
        if not isinstance(read.evaluation.get(name), int | float):
            raise TableError(f"column {column!r}: no number {name!r} in the evaluation")
        return float(read.evaluation[name])
    logged = [step[name] for step in read.steps if step.get(name) is not None]
    return statistics.fmean(logged) if logged else None


def _radeval(column: str, read: _Read) -> NDArray[np.float64]:
    """[N] what a metric of RadEval's gave each report whose reference has words."""
    name = column.partition(":")[2]
    rows = [row["radeval"] for row in read.predictions if row.get("radeval") is not None]
    if not rows or any(name not in row for row in rows):
        raise TableError(
            f"column {column!r}: a run's predictions have no {name}; evaluate it again with radeval.python and "
            "evaluation.radeval (launch/evaluate.py RUN/config.yaml), or set them for all rows"
        )
    return np.array([row[name] for row in rows], dtype=np.float64)


def _require_one_metric(column: str, read: Mapping[tuple[str, int], _Read]) -> None:
    """
    Raises:
        TableError: rows that another version of a metric of RadEval's, or other weights, have scored.
    """
    kind, _, name = column.partition(":")
    if kind != "radeval":
        return
    first: tuple[str, Any] | None = None
    for (row, seed), one in read.items():
        _radeval(column, one)  # it is there
        found = one.evaluation["radeval"]
        metric = (found["package"], found["metrics"][found["metric_of"][name]])
        if first is not None and first[1] != metric:
            raise TableError(
                f"column {column!r}: {first[0]} was scored by {first[1]}, {row}, seed {seed} by {metric}; evaluate "
                "them again in one environment"
            )
        first = first or (f"{row}, seed {seed}", metric)


def _pooled_means(
    column: str, reference: str, row: str, seeds: Sequence[int], read: Mapping[tuple[str, int], _Read]
) -> Difference:
    """The row against the reference row over all seeds' studies together."""
    shared = [seed for seed in seeds if (reference, seed) in read]
    first, second = (
        np.concatenate([_radeval(column, read[name, seed]) for seed in shared]) for name in (reference, row)
    )
    if any(_ids(read[reference, seed]) != _ids(read[row, seed]) for seed in shared):
        raise TableError(f"{row!r} and {reference!r}: other studies; they cannot be compared")
    return paired_mean_differences(first[None], second[None], samples=SAMPLES)[0]


def _ids(read: _Read) -> list[Any]:
    """The studies whose references have words."""
    return [row.get("id") for row in read.predictions if row.get("radeval") is not None]


_WHY_NOT = {
    "truth": "only phantoms have a drawn truth",
    "held_out": "only a recipe with evaluation.held_out_labeler has a held-out labeler's reading",
    "labeler": "the run was not evaluated",
}


def _cell(by_seed: Mapping[int, float | None]) -> Cell:
    values = {seed: value for seed, value in by_seed.items() if value is not None}
    numbers = list(values.values())
    if not numbers:
        return Cell({}, None, None, None, None, None)
    return Cell(
        values,
        statistics.fmean(numbers),
        statistics.stdev(numbers) if len(numbers) > 1 else None,
        min(numbers),
        max(numbers),
        t_interval(numbers),
    )


def _gain(
    column: str,
    reference: Mapping[int, float | None],
    values: Mapping[int, float | None],
    shared: Sequence[int],
    pooled: Mapping[str, Mapping[str, Difference]],
) -> Gain:
    """Of the seeds that both rows have."""
    differences = [float(values[seed] or 0.0) - float(reference[seed] or 0.0) for seed in shared]
    kind, _, name = column.partition(":")
    if not _is_definition(column) and kind != "radeval":
        return Gain(statistics.fmean(differences), t_interval(differences), None, None)
    of_studies = pooled[kind][name]
    return Gain(statistics.fmean(differences), t_interval(differences), of_studies.difference, of_studies.ci)


def _is_definition(column: str) -> bool:
    kind, _, name = column.partition(":")
    return kind in _CLINICAL and name in DEFINITIONS


def _pooled(
    kind: str, reference: str, row: str, seeds: Sequence[int], read: Mapping[tuple[str, int], _Read]
) -> dict[str, Difference]:
    """The row against the reference row over all seeds' studies together, by definition."""
    pairs = []
    for seed in seeds:
        if (reference, seed) in read:
            of_reference, of_row = read[reference, seed].classes[kind], read[row, seed].classes[kind]
            if not np.array_equal(of_reference[1], of_row[1]):
                raise TableError(
                    f"{row!r} and {reference!r}, seed {seed}: other studies or references; they cannot be compared"
                )
            pairs.append((of_reference[0], of_row[0], of_row[1]))
    first, second, truth = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return paired_differences(first, second, truth, samples=SAMPLES)


def _commit(run: RowRun) -> str:
    path = Path(run.folder / "environment.json")
    commit: str = json.loads(path.read_text(encoding="utf-8")).get("commit") or "unknown"
    return commit
