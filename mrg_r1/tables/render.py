"""A table as Markdown, CSV, LaTeX and JSON; the layout is tabulate's."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tabulate import tabulate

from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.metrics.clinical import DEFINITIONS
from mrg_r1.tables.build import BuiltTable, Cell, Gain, as_json
from mrg_r1.tables.plan import Plan
from mrg_r1.tracking.control import CONTROLS

_AGAINST = {"truth": "drawn truth", "labeler": "rewarded labeler", "held_out": "held-out labeler"}
_WORDS = {
    "evaluation:distinct_share": "distinct reports, share",
    "evaluation:format_rate": "format reward",
    "evaluation:mean_words": "words a report",
    "evaluation:no_finding_rate": "No Finding, share",
    "evaluation:repeated_sentence": "reports with a sentence twice, share",
    "evaluation:repetition": "repetition",
    "evaluation:contradiction": "contradicting reports, share",
    "step:groups/zero_signal": "zero-signal groups, share",
    "step:groups/all_zero_mccs": "groups without any MCCS, share",
    "step:groups/length": "tokens a completion, training",
    "step:reward/std": "std of rewards in a group",
}


def write_table(folder: Path, table: BuiltTable) -> None:
    """Write `table.md`, `table.csv`, `table.tex` and `table.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "table.md", table_as_markdown(table))
    write_text_atomically(folder / "table.csv", table_as_csv(table))
    write_text_atomically(folder / "table.tex", table_as_latex(table))
    write_text_atomically(folder / "table.json", as_json(table))


def column_title(column: str) -> str:
    """What a column holds, its definition named."""
    kind, _, name = column.partition(":")
    if kind in _AGAINST:
        return f"{name} F1, {_AGAINST[kind]}"
    return _WORDS.get(
        column,
        {"lexical": f"{name} (raw texts)", "radeval": f"{name} (RadEval)", "step": f"{name}, mean over training"}.get(
            kind, name
        ),
    )


def table_as_markdown(table: BuiltTable) -> str:
    """Values, differences from the reference row, published values and the notes without which a number says little."""
    parts = [f"# {table.title}", table.question, _values(table, "github"), *_notes(table)]
    if any(row.gains for row in table.rows):
        parts += [f"## Differences from {table.reference}", _gains(table, "github"), _GAIN_NOTE]
    if table.published:
        parts += [
            "## Published",
            _published(table, "github"),
            "Not run here; numbers of different definitions cannot be compared.",
        ]
    return "\n\n".join(parts) + "\n"


def table_as_text(table: BuiltTable) -> str:
    """For the terminal: values and the differences of the first column."""
    text = [f"{table.title} ({_made_on(table)})", _values(table, "simple")]
    if any(row.gains for row in table.rows):
        text += [f"differences from {table.reference}", _gains(table, "simple", columns=table.columns[:1])]
    return "\n\n".join([*text, *_notes(table)])


def table_as_latex(table: BuiltTable) -> str:
    """The values in a booktabs tabular, published ones below them; every text is escaped by tabulate."""
    comment = "".join(f"% {line}\n" for line in [table.title, *_notes(table)])
    published = f"\n% published, not run here\n{_published(table, 'latex_booktabs')}" if table.published else ""
    return f"{comment}{_values(table, 'latex_booktabs')}{published}\n"


def table_as_csv(table: BuiltTable) -> str:
    """One line a row and column, with every seed's value, so that nothing is lost to rounding."""
    seeds = sorted(table.studies)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = [
        "row",
        "column",
        "title",
        "made_on",
        "source",
        "definition_of_published",
        *(f"seed_{seed}" for seed in seeds),
    ]
    head += ["mean", "std", "least", "most", "low", "high"]
    head += ["difference", "difference_low", "difference_high", "studies_low", "studies_high"]
    writer.writerow(head)
    for row in table.rows:
        for column in table.columns:
            cell, gain = row.cells[column], row.gains.get(column)
            numbers = [cell.mean, cell.std, cell.least, cell.most, *(cell.interval or (None, None))]
            nothing = (None, None)
            against = (
                [None] * 5
                if gain is None
                else [gain.mean, *(gain.interval or nothing), *(gain.studies_interval or nothing)]
            )
            line = [
                row.name,
                column,
                column_title(column),
                table.made_on,
                "run here",
                None,
                *(cell.values.get(seed) for seed in seeds),
            ]
            writer.writerow([*line, *numbers, *against])
    for number in table.published:
        named = [
            number["system"],
            number["column"],
            column_title(number["column"]),
            None,
            number["source"],
            number["definition"],
        ]
        writer.writerow([*named, *(None for _ in seeds), number["value"], *[None] * 10])
    return out.getvalue()


def plan_as_table(plan: Plan) -> str:
    """The runs that a table asks for, and how far they are."""
    rows = [
        (
            run.row,
            run.seed,
            run.task,
            "finished" if run.finished else "begun" if run.folder.is_dir() else "to run",
            run.folder,
        )
        for run in plan.runs.values()
    ]
    return tabulate(rows, headers=("row", "seed", "task", "state", "folder"), disable_numparse=True)


def _values(table: BuiltTable, layout: str) -> str:
    rows = [[row.name, len(row.seeds), *(_cell(row.cells[column]) for column in table.columns)] for row in table.rows]
    heads = ["", "seeds", *(column_title(column) for column in table.columns)]
    return tabulate(rows, headers=heads, tablefmt=layout, disable_numparse=True)


def _gains(table: BuiltTable, layout: str, columns: list[str] | None = None) -> str:
    shown = table.columns if columns is None else columns
    rows = [
        [row.name, *(_gain(row.gains.get(column)) for column in shown)]
        for row in table.rows
        if row.name != table.reference and row.gains
    ]
    return tabulate(
        rows, headers=["", *(column_title(column) for column in shown)], tablefmt=layout, disable_numparse=True
    )


def _published(table: BuiltTable, layout: str) -> str:
    rows = [
        [one["system"], column_title(one["column"]), one["value"], one["definition"], one["source"]]
        for one in table.published
    ]
    return tabulate(
        rows, headers=("system", "column", "published", "definition", "source"), tablefmt=layout, disable_numparse=True
    )


def _cell(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    if cell.least == cell.most:
        return f"{cell.mean:.3f}"
    return f"{cell.mean:.3f} ({cell.least:.3f} to {cell.most:.3f})"


def _gain(gain: Gain | None) -> str:
    if gain is None:
        return "-"
    text = f"{gain.mean:+.3f}"
    if gain.interval is not None:
        text += f" [{gain.interval[0]:+.3f}, {gain.interval[1]:+.3f}]"
    if gain.studies_interval is not None:
        text += f" {{{gain.studies_interval[0]:+.3f}, {gain.studies_interval[1]:+.3f}}}"
    return text


_GAIN_NOTE = (
    "Mean over seeds of the row minus the reference row of the same seed; [ ]: its 95 % t interval over seeds, "
    "which is what speaks of the method; { }: 95 % paired bootstrap interval over all seeds' studies together, "
    "which speaks of these trained policies alone. Intervals are not corrected for the number of rows and columns."
)


def _made_on(table: BuiltTable) -> str:
    return "made on phantoms" if table.made_on == "phantoms" else "made on reports"


def _notes(table: BuiltTable) -> list[str]:
    named = [column.partition(":")[2] for column in table.columns if column.partition(":")[0] in _AGAINST]
    notes = [f"All numbers are {_made_on(table)}. Mean over seeds (least to most)."]
    if table.studies:
        notes.append(
            "Studies evaluated: "
            + ", ".join(f"seed {seed}: {count:,}" for seed, count in sorted(table.studies.items()))
            + "."
        )
    for name in dict.fromkeys(named):
        if name in DEFINITIONS:
            one = DEFINITIONS[name]
            uncertain = one.described()["uncertain"]
            notes.append(
                f"{name}: {one.average} over {len(one.labels)} observations, uncertain {uncertain}, 0/0 = 0 "
                f"({one.source})."
            )
    observations = [name for name in dict.fromkeys(named) if name in OBSERVATIONS]
    if observations:
        notes.append(f"F1 of one observation ({', '.join(observations)}): class 1 is positive.")
    controls = [f"{row.name} ({CONTROLS[row.control]})" for row in table.rows if row.control]
    if controls:
        notes.append("Controls: " + ", ".join(controls) + ".")
    if table.missing:
        notes.append("Not finished: " + "; ".join(table.missing) + ".")
    if table.protocol and table.off_protocol:
        notes.append(
            f"The protocol, {table.protocol}, was changed after these runs were started, or is not known to have stood "
            f"before them: {'; '.join(table.off_protocol)}."
        )
    elif table.protocol:
        notes.append(f"Every finished run was started under the protocol as it stands in {table.protocol}.")
    if table.commits:
        notes.append("Run at commit " + ", ".join(commit[:12] for commit in table.commits) + ".")
    return notes
