"""A table's file: its rows are recipes over seeds. What it holds, what is wrong with it, and the runs that it asks for.

A row's run has a folder of its own, named after a hash of the recipe that it resolves to: a finished run is kept, is
shared by all tables that ask for the same one, and is no longer the same when a value of its recipe changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mrg_r1.config.control import as_sft
from mrg_r1.config.recipe import Recipe, RecipeError, load_recipe, load_run
from mrg_r1.files import write_text_atomically

Task = Literal["grpo", "sft"]
SCRIPTS: dict[Task, str] = {"grpo": "launch/train.py", "sft": "launch/sft.py"}
PROTOCOL_FILE = "protocol.json"
_RUN_OF = re.compile(r"\{run:([^{}]+)\}")
# What changes nothing of what a run learns or of the reports that it leaves; lexical metrics are computed by the table
# itself, RadEval's by launch/evaluate.py where a finished run lacks them
_BESIDE: Any = {
    "output_dir": True,
    "tracking": True,
    "resume": True,
    "evaluation": {"lexical", "radeval"},
    "radeval": True,
}
_NAME = re.compile(r"\{([a-z_]+)\}")


class TableError(ValueError):
    """A table's file that cannot be used; the message names the file, the row, the value and the remedy."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RowSpec(_Part):
    """One row: a recipe with changes, or another row's evaluation before its training."""

    name: str = Field(min_length=1)
    task: Task = "grpo"
    recipe: str | None = None  # a key of `recipes`; None: the task's name
    set: dict[str, Any] = {}  # recipe key -> value, beside and over the table's own `set`
    cpu_seconds_of: str | None = None  # SFT stops after the processor seconds that this row's training took
    before: str | None = None  # no run: the policy as this row found it


class Published(_Part):
    """A number that somebody published, which no run here has made."""

    system: str
    column: str  # of `columns`
    value: float
    definition: str  # or "definition not stated"
    source: str


class TableSpec(_Part):
    """The content of a table's file."""

    title: str
    made_on: Literal["phantoms", "reports"]
    question: str
    recipes: dict[str, Path]  # grpo, sft, …: files beside the table's
    seeds: dict[int, dict[str, str]] = Field(min_length=1)  # seed -> names and what they stand for at that seed
    # recipe key -> value, for every row. In a text {name} stands for what `seeds` says, {run:ROW} for the folder of
    # that row's run
    set: dict[str, Any] = {}
    rows: list[RowSpec] = Field(min_length=1)
    reference: str  # the row that the others are compared with
    columns: list[str] = Field(min_length=1)
    published: list[Published] = []
    protocol: Path | None = None  # what was to be done and what would count, written before; beside the table's file

    @model_validator(mode="after")
    def _consistent(self) -> TableSpec:
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"rows: the name {name!r} stands twice; a row is known by its name")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is no row; the rows are {', '.join(names)}")
        for place, row in enumerate(self.rows):
            trained = [earlier.name for earlier in self.rows[:place] if earlier.before is None]
            wanted = [row.cpu_seconds_of] if row.cpu_seconds_of else []
            wanted += _RUN_OF.findall(json.dumps(row.set, ensure_ascii=False))
            for name in wanted:
                if name not in trained:
                    raise ValueError(f"row {row.name!r} waits for {name!r}, which is no row with a run above it")
            if row.before is not None:
                if row.before not in [other.name for other in self.rows if other.before is None]:
                    raise ValueError(f"row {row.name!r}: before {row.before!r} is no row with a run")
                if row.set or row.cpu_seconds_of or row.recipe:
                    raise ValueError(
                        f"row {row.name!r}: `before` takes another row's evaluation, so it has no run to set "
                        "anything of"
                    )
            elif (row.recipe or row.task) not in self.recipes:
                raise ValueError(
                    f"row {row.name!r}: recipes has no {row.recipe or row.task!r}; it has {', '.join(self.recipes)}"
                )
            used = _NAME.findall(json.dumps({**self.set, **row.set}))
            unknown = sorted(name for name in used if any(name not in names for names in self.seeds.values()))
            if unknown:
                raise ValueError(f"row {row.name!r}: {{{unknown[0]}}} is not said for every seed under `seeds`")
            if row.cpu_seconds_of and row.task != "sft":
                raise ValueError(f"row {row.name!r}: cpu_seconds_of with task {row.task}; only SFT can stop by time")
        return self


@dataclass(frozen=True)
class RowRun:
    """One run that a table asks for."""

    row: str
    seed: int
    task: Task
    recipe_file: Path
    overrides: tuple[str, ...]  # key=value, output_dir among them
    folder: Path
    waits_for: tuple[Path, ...]  # folders of runs that must be complete before this one starts
    cpu_seconds_of: Path | None
    inputs: tuple[tuple[str, Path], ...]  # recipe key and path, of what must be there and is not made by another row
    control: str | None = None  # the recipe's
    protocol: Path | None = None  # the table's

    @property
    def finished(self) -> bool:
        """Whether its summary says complete."""
        path = self.folder / "summary.json"
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("status") == "complete"


@dataclass(frozen=True)
class Plan:
    """A table and its runs."""

    spec: TableSpec
    runs: dict[tuple[str, int], RowRun]  # by row name and seed, in the order of the file

    def evaluation(self, row: str, seed: int) -> tuple[RowRun, str]:
        """The run, and the name of its evaluation, that a row's numbers come from."""
        spec = next(spec for spec in self.spec.rows if spec.name == row)
        return (self.runs[row, seed], "test") if spec.before is None else (self.runs[spec.before, seed], "test_before")


def read_table(path: Path) -> TableSpec:
    """Read and check a table's file.

    Raises:
        TableError: unreadable, not YAML, an unknown field, a row that names another which is not there, an unknown
            column.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TableError(f"{path}: no such table; launch/recipes/tables/ has those that come along") from None
    except yaml.YAMLError as error:
        raise TableError(f"{path}: not valid YAML: {error}") from error
    try:
        spec = TableSpec.model_validate(content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, p['loc'])) or 'table'}: {p['msg'].removeprefix('Value error, ')}"
            for p in error.errors()
        ]
        raise TableError(f"{path}: {error.error_count()} problem(s)\n" + "\n".join(lines)) from None
    for number in spec.published:
        if number.column not in spec.columns:
            raise TableError(f"{path}: published {number.system!r}: column {number.column!r} is not one of the table's")
    return spec


def plan_table(path: Path, *, rows_folder: Path, overrides: Sequence[str] = (), seeds: Sequence[int] = ()) -> Plan:
    """The runs that a table's file asks for.

    Args:
        rows_folder: where the runs of all tables lie.
        overrides: `key=value` for every run, after the file's own.
        seeds: only these; empty: all of the file's.

    Raises:
        TableError: as `read_table`, a protocol that is not there, or a seed that the file has not.
        RecipeError: a recipe or a value that is not valid.
    """
    spec = read_table(path)
    if spec.protocol is not None and not (path.parent / spec.protocol).is_file():
        raise TableError(
            f"{path}: protocol {spec.protocol}: no such file beside the table; write it before the rows run"
        )
    unknown = [seed for seed in seeds if seed not in spec.seeds]
    if unknown:
        raise TableError(f"{path}: no seed {unknown[0]}; it has {', '.join(map(str, spec.seeds))}")
    runs: dict[tuple[str, int], RowRun] = {}
    for seed in seeds or spec.seeds:
        for row in spec.rows:
            if row.before is None:
                runs[row.name, seed] = _row_run(
                    path, spec, row, seed, runs=runs, rows_folder=rows_folder, overrides=overrides
                )
    return Plan(spec, dict(sorted(runs.items(), key=lambda item: [row.name for row in spec.rows].index(item[0][0]))))


def _row_run(
    path: Path,
    spec: TableSpec,
    row: RowSpec,
    seed: int,
    *,
    runs: Mapping[tuple[str, int], RowRun],
    rows_folder: Path,
    overrides: Sequence[str],
) -> RowRun:
    waits_for: list[Path] = []

    def folder_of(match: re.Match[str]) -> str:
        waits_for.append(runs[match.group(1), seed].folder)
        return str(waits_for[-1])

    recipe_file = path.parent / spec.recipes[row.recipe or row.task]
    changes = [f"seed={seed}"]
    for key, value in {**spec.set, **row.set}.items():
        text = _NAME.sub(lambda match: spec.seeds[seed][match.group(1)], json.dumps(value, ensure_ascii=False))
        changes.append(f"{key}={_RUN_OF.sub(folder_of, text)}")
    changes += overrides
    try:
        recipe = load_recipe(recipe_file, [*changes, "output_dir=unnamed"])
    except RecipeError as error:
        raise RecipeError(f"{path}, row {row.name!r}, seed {seed}: {error}") from error
    timed = runs[row.cpu_seconds_of, seed].folder if row.cpu_seconds_of else None
    folder = rows_folder / f"{row.task}-seed{seed}-{_fingerprint(recipe, row.task, timed)}"
    _check_made_with(folder, recipe)
    given = (
        ("data.manifest", recipe.data.manifest),
        ("policy.path", recipe.policy.path),
        ("reward.labeler", recipe.reward.labeler),
    )
    return RowRun(
        row=row.name,
        seed=seed,
        task=row.task,
        recipe_file=recipe_file,
        overrides=(*changes, f"output_dir={folder}"),
        folder=folder,
        waits_for=(*waits_for, *([timed] if timed else [])),
        cpu_seconds_of=timed,
        inputs=tuple((key, given) for key, given in given if not given.is_relative_to(rows_folder)),
        control=recipe.control or ("sft" if timed else None),
        protocol=None if spec.protocol is None else path.parent / spec.protocol,
    )


def keep_protocol(run: RowRun) -> None:
    """Note beside a run which text of the protocol it was started under; a run that goes on keeps its first."""
    path = run.folder / PROTOCOL_FILE
    if run.protocol is not None and not path.exists():
        write_text_atomically(path, json.dumps({"file": run.protocol.name, "sha256": _sha256(run.protocol)}) + "\n")


def protocol_changed(run: RowRun) -> str | None:
    """What speaks against a run under the protocol as it is now; None where nothing does, or the table has none."""
    path = run.folder / PROTOCOL_FILE
    if run.protocol is None:
        return None
    if not path.is_file():
        return "not known"
    kept = json.loads(path.read_text(encoding="utf-8"))
    return None if kept["sha256"] == _sha256(run.protocol) else "changed"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_inputs(plan: Plan) -> None:
    """Refuse, before anything is started, a plan whose unfinished runs lack what they read.

    Raises:
        TableError: names every missing path once, the key that it is the value of, and the remedy.
    """
    missing = {
        (key, path) for run in plan.runs.values() if not run.finished for key, path in run.inputs if not path.exists()
    }
    if missing:
        lines = [f"  {key} {path}: no such file or folder" for key, path in sorted(missing)]
        raise TableError(
            "the table's rows lack what they read; give yours as key=value after the table's file\n" + "\n".join(lines)
        )


def _check_made_with(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder whose run had other values: a default may have changed since, which its name does not tell."""
    if not (folder / "config.yaml").is_file():
        return
    theirs, ours = (_flat(one.model_dump(mode="json", exclude=_BESIDE)) for one in (load_run(folder), as_sft(recipe)))
    for key, value in ours.items():
        if theirs.get(key) != value and key != "sft.max_cpu_seconds":  # which the scheduler or the run adds
            raise TableError(
                f"{folder}: was run with {key} {theirs.get(key)!r}, the row has {value!r} today; remove the folder "
                f"to run it again, or set {key} in the table's file"
            )


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and key != "weights"
            else {f"{prefix}{key}": value}
        )
    return flat


def _fingerprint(recipe: Recipe, task: Task, timed: Path | None) -> str:
    # without defaults, so that a field which a later version adds leaves the name as it was
    content = recipe.model_dump(mode="json", exclude=_BESIDE, exclude_defaults=True)
    text = json.dumps([task, content, None if timed is None else timed.name], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
