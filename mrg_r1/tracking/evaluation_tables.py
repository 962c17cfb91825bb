"""An evaluation as tables: every definition with its interval and baselines, and who else has read the reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mrg_r1.metrics import lexical

_BASELINES = {"normal": "constant_normal", "blank": "blank", "random": "random_train", "itself": "reference"}


def print_evaluation(console: Console, result: dict[str, Any], title: str) -> None:
    """A closing evaluation's tables, and what each number is.

    Args:
        result: the content of evaluation/SPLIT.json.
    """
    rendered = ", rendered phantoms" if result["rendered"] else ""
    console.print(f"\n{title}: F1 by definition, {result['n']} studies{rendered}", markup=False, highlight=False)
    console.print(evaluation_table(result))
    others = other_readers_table(result)
    if others is not None:
        console.print()
        console.print(others)
    console.print()
    for line in evaluation_notes(result):
        console.print(line, markup=False, highlight=False)
    words = lexical_table(result)
    if words is not None:
        console.print(words)
    others = radeval_table(result)
    if others is not None:
        console.print(others)


def evaluation_table(result: dict[str, Any]) -> Table:
    """Every definition by the rewarded labeler, with its interval, beside the baselines that there are."""
    baselines = {title: result["baselines"][name] for title, name in _BASELINES.items()}
    baselines = {title: scores for title, scores in baselines.items() if scores is not None}
    table = _table("definition", "P", "R", "F1", "95 % of F1", *baselines)
    for name, score in result["definitions"].items():
        compared = [f"{scores[name]['f1']:.3f}" for scores in baselines.values()]
        table.add_row(name, *_scores(score), _interval(score), *compared)
    return table


def other_readers_table(result: dict[str, Any]) -> Table | None:
    """The same reports against what phantoms were drawn from, and as the held-out labeler reads them; None where
    there is neither.
    """
    truth, held_out = result.get("truth", {}), result.get("held_out")
    if not truth and held_out is None:
        return None
    table = _table("not rewarded", "P", "R", "F1", *(["95 % of F1"] if held_out is not None else []))
    for name, score in truth.items():
        table.add_row(f"{name} (truth)", *_scores(score))
    for name, score in held_out["definitions"].items() if held_out is not None else ():
        table.add_row(f"{name} (held-out)", *_scores(score), _interval(score))
    return table


def evaluation_notes(result: dict[str, Any]) -> list[str]:
    """What stands under the tables, a line each."""
    titles = {
        "constant_normal": "normal = every report No Finding",
        "blank": "blank = every report blank",
        "random_train": "random = a random training report",
        "reference": "itself = the references",
    }
    shown = [title for name, title in titles.items() if result["baselines"][name] is not None]
    notes = [f"right, the F1 of other reports: {', '.join(shown)}"] if shown else []
    sources = reference_sources(result)
    notes += [f"references' labels: {sources}"] if sources is not None else []
    if result.get("truth"):
        notes.append("truth = what the phantoms were drawn from, in place of the labeler's reading of the references")
    if result["constant"]:
        constant = result["constant"]["total"]
        notes.append(f"mean reward {result['mean_reward']:.3f}; of the best constant training report {constant:.3f}")
    held_out = result.get("held_out")
    if held_out is not None:
        agreement = held_out["agreement_on_references"]
        agreed = "" if agreement is None else f"; they agree on {agreement:.1%} of the references' classes"
        notes.append(
            f"hacking gap {result['hacking_gap']:+.3f}: disease_micro13 by {result['labeler']['name']}, which is "
            f"rewarded, minus by the held-out labeler {held_out['labeler']['name']}{agreed}"
        )
    return notes


def reference_sources(result: Mapping[str, Any]) -> str | None:
    """Where the references' labels are from, in words; None in a file that is older than this."""
    found = result.get("reference_labels")
    if found is None:
        return None
    labeler = found["labeler"]
    by = None if labeler is None else f"the labeler {labeler['name']} ({labeler['fingerprint']})"
    if by is None:
        return f"what the manifest says (labels.said), of all {found['said']:,} studies"
    if not found["said"]:
        return f"read by {by}, of all {found['read']:,} studies"
    return f"what the manifest says (labels.said) of {found['said']:,} studies, read by {by} of {found['read']:,}"


def lexical_table(result: dict[str, Any]) -> Table | None:
    """The lexical metrics under their cleaning's name; None where there are none."""
    found = result.get("lexical")
    if found is None:
        return None
    studies = (
        f"{found['studies']} of {result['n']}" if "studies" in found else result["n"]
    )  # the others have labels only
    table = Table(title=f"Lexical metrics, cleaning {found['cleaning']}, {found['package']}, {studies} studies")
    for name in found["scores"]:
        table.add_column(lexical.TITLES[name], justify="right", no_wrap=True)
    table.add_row(*(f"{value:.4f}" for value in found["scores"].values()))
    lines = [f"cleaning {found['cleaning']}: {found['cleaning_is']}", *found["left_out"].values()]
    if found["empty_predictions"]:
        lines.append(f"{found['empty_predictions']} reports are empty or malformed; they count")
    table.caption = "\n".join(lines)
    return table


def radeval_table(result: dict[str, Any]) -> Table | None:
    """RadEval's metrics with their intervals, and those that were asked for and failed; None where none was asked."""
    found = result.get("radeval")
    if found is None:
        return None
    table = _table("RadEval", "mean", "95 % of mean")
    table.title = f"{found['package']}, {found['studies']} studies" if found["scores"] else "RadEval"
    for name, score in found["scores"].items():
        low, high = score["ci"]
        table.add_row(name, f"{score['mean']:.4f}", f"{low:.4f}-{high:.4f}")
    variants = [f"{name}: {metric['variant']}" for name, metric in found.get("metrics", {}).items()]
    table.caption = "\n".join([*variants, *found["left_out"].values()])
    return table


def _table(first: str, *others: str) -> Table:
    """Narrow enough for 80 columns: no lines between the columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _scores(score: dict[str, Any]) -> list[str]:
    return [f"{score[key]:.3f}" for key in ("precision", "recall", "f1")]


def _interval(score: dict[str, Any]) -> str:
    low, high = score["f1_ci"]
    return f"{low:.3f}-{high:.3f}"
