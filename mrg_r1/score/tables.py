"""Score cards and comparisons on the terminal. Every number stands under its definition's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mrg_r1.console import wide_console
from mrg_r1.metrics.lexical import TITLES

_COMPARED = {"constant_normal": "normal", "blank": "blank", "random_train": "random", "reference": "itself"}
_HASH = 12  # digits shown; the card has them all
UNCERTAIN = "uncertain counts as positive in chexbert_*, as not positive in all others; 0/0 = 0"


def print_card(card: Mapping[str, Any]) -> None:
    """A card of `score_files`: clinical efficacy by definition, by observation, lexical metrics, and what they
    are of.
    """
    console = wide_console()
    table = _table("definition")
    for column in ("P", "R", "F1", "95 % of F1", *_COMPARED.values()):
        table.add_column(column, justify="right", no_wrap=True)
    for name, score in card["definitions"].items():
        entries = [card["baselines"][baseline] for baseline in _COMPARED]
        table.add_row(
            name,
            *(f"{score[part]:.3f}" for part in ("precision", "recall", "f1")),
            "{:.3f}-{:.3f}".format(*score["f1_ci"]),
            *("-" if entry is None else f"{entry[name]['f1']:.3f}" for entry in entries),
        )
    _print_table(console, f"Clinical efficacy, {card['n']:,} studies; right: the F1 of baselines", table)
    lines = [
        UNCERTAIN,
        "normal: every report No Finding; random: a random training report; itself: the references against themselves",
    ]
    if card["random_train_reason"]:
        lines.append(f"random is missing: {card['random_train_reason']}")
    _print_lines(console, lines)
    _print_table(console, f"By observation: {card['observations_are']}", _observations(card))
    if card["lexical"] is not None:
        lexical = card["lexical"]
        table = _table("metric", "value", "what it is")
        for name, value in lexical["scores"].items():
            table.add_row(TITLES[name], f"{value:.4f}", lexical["scores_are"][name])
        _print_table(console, f"Lexical metrics, cleaning {lexical['cleaning']}, {lexical['package']}", table)
        lines = [f"cleaning {lexical['cleaning']}: {lexical['cleaning_is']}", *lexical["left_out"].values()]
        if "studies" in lexical:
            lines.append(f"over {lexical['studies']:,} of {card['n']:,} studies: the other references have labels only")
        if lexical["empty_predictions"]:
            lines.append(f"{lexical['empty_predictions']:,} predicted reports are empty; they count")
        _print_lines(console, lines)
    else:
        _print_lines(console, [f"lexical metrics are missing: {card['lexical_reason']}"])
    _print_radeval(console, card)
    _print_wording(console, card["wording"])
    _print_lines(console, _origin(card))


def _print_radeval(console: Console, card: Mapping[str, Any]) -> None:
    found = card.get("radeval")
    if found is None:
        return
    table = _table("metric")
    for column in ("mean", "95 % of mean", "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, score in found["scores"].items():
        weights = found["metrics"][found["metric_of"][name]]["weights_sha256"]
        low, high = score["ci"]
        table.add_row(
            name, f"{score['mean']:.4f}", f"{low:.4f}-{high:.4f}", "-" if weights is None else weights[:_HASH]
        )
    _print_table(console, f"{found['package']}, Python {found['python']}, {found['studies']:,} studies", table)
    lines = [f"{name}: {metric['variant']}" for name, metric in found["metrics"].items()]
    if found["package"] != found["variants_of"]:
        lines.append(f"warning: said of {found['variants_of']}, and this is {found['package']}")
    _print_lines(console, [*lines, *found["left_out"].values()])


def _print_wording(console: Console, wording: Mapping[str, Any]) -> None:
    sides = {side: wording[side] for side in ("predicted", "reference") if wording[side] is not None}
    if not sides:
        return
    table = _table("wording", *sides, "what it is")
    for name, what in wording["are"].items():
        values = [side[name] for side in sides.values()]
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values), what)
    _print_table(console, "Wording: what no clinical score sees", table)
    if all(side["contradiction"] is None for side in sides.values()):
        _print_lines(console, ["contradictions are missing: sentences are read with --labeler"])


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """The result of `compare_cards`: every definition's difference with its interval."""
    console = wide_console()
    cards = comparison["cards"]
    table = _differences(comparison["definitions"], digits=3)
    _print_table(console, f"F1 by definition, {comparison['n']:,} studies, paired; difference: second - first", table)
    if comparison["lexical"] is not None:
        lexical = comparison["lexical"]
        table = _table("metric", "first", "second", "difference")
        for name, found in lexical["scores"].items():
            table.add_row(
                TITLES[name], f"{found['first']:.4f}", f"{found['second']:.4f}", f"{found['difference']:+.4f}"
            )
        _print_table(
            console, f"Lexical metrics, cleaning {lexical['cleaning']}, {lexical['package']}; without intervals", table
        )
    if comparison["radeval"] is not None:
        table = _differences(comparison["radeval"]["scores"], digits=4)
        _print_table(console, f"{comparison['radeval']['package']}, mean over reports, paired", table)
    if comparison["wording"] is not None:
        table = _table("wording", "first", "second", "difference")
        for name, found in comparison["wording"].items():
            table.add_row(name, f"{found['first']:.3f}", f"{found['second']:.3f}", f"{found['difference']:+.3f}")
        _print_table(console, "Wording of the predicted reports; without intervals", table)
    bootstrap = comparison["bootstrap"]
    lines = [
        *(f"{which}: {card['file']}, mrg-r1 {card['version']}" for which, card in cards.items()),
        UNCERTAIN,
        f"{bootstrap['samples']:,} resamples, seed {bootstrap['seed']}, {bootstrap['method']}",
        f"p: {bootstrap['p']}",
        f"labelers: predicted {_labeler(comparison['predicted']['labeler'])}, reference "
        f"{_labeler(comparison['reference']['labeler'])}",
    ]
    _print_lines(console, lines)


def _differences(found: Mapping[str, Any], *, digits: int) -> Table:
    """Two systems by definition or metric, and their difference with its interval."""
    table = _table("definition")
    for column in ("first", "second", "difference", "95 % of difference", "excludes 0", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in found.items():
        low, high = one["ci"]
        table.add_row(
            name,
            f"{one['first']:.{digits}f}",
            f"{one['second']:.{digits}f}",
            f"{one['difference']:+.{digits}f}",
            f"{low:+.{digits}f} to {high:+.{digits}f}",
            "yes" if one["excludes_zero"] else "no",
            f"{one['p']:.3f}",
        )
    return table


def _observations(card: Mapping[str, Any]) -> Table:
    table = _table("observation")
    for column in ("P", "R", "F1", "support"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, score in card["observations"].items():
        table.add_row(
            name, *(f"{score[part]:.3f}" for part in ("precision", "recall", "f1")), f"{card['support'][name]:,}"
        )
    return table


def _origin(card: Mapping[str, Any]) -> list[str]:
    predicted, reference = card["predicted"]["labeler"], card["reference"]["labeler"]
    bootstrap, studies = card["bootstrap"], card["studies"]
    lines = [
        f"labelers: predicted {_labeler(predicted)}, reference {_labeler(reference)}",
        f"studies: {card['n']:,} by {studies['identified_by']}, hash {studies['ids_sha256'][:_HASH]}; mrg-r1 "
        f"{card['version']}",
        f"intervals: {bootstrap['samples']:,} resamples, seed {bootstrap['seed']}, {bootstrap['method']}",
    ]
    if predicted != reference:
        lines.append(
            "warning: predicted and reference labels are not known to be by one labeler; their differences count "
            "as errors"
        )
    return lines


def _labeler(labeler: Mapping[str, str | None] | None) -> str:
    if labeler is None:
        return "not named (label file; --labels-by NAME names it)"
    fingerprint = labeler["fingerprint"]
    return f"{labeler['name']}, fingerprint {'unknown' if fingerprint is None else fingerprint[:_HASH]}"


def _print_table(console: Console, title: str, table: Table) -> None:
    # a table's own title wraps at its width
    console.print(f"\n{title}", style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def _table(*columns: str) -> Table:
    """As narrow as its cells: 80 columns hold every definition's name whole."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column)
    return table


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
