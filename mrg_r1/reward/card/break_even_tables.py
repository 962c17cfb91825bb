"""Break-evens on a reward card: as tables on the terminal, in words, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from mrg_r1.console import wide_console
from mrg_r1.labels.observations import POSITIVE
from mrg_r1.reward.additive import FINDINGS, attainable_f1, blind_f1, f1_threshold
from mrg_r1.reward.card.after_scale import GROUP_RESTS, METHOD, AfterScale, after_scale
from mrg_r1.reward.card.break_evens import (
    RESTS,
    BreakEven,
    BreakEvens,
    Classes,
    Range,
    Rest,
    break_evens,
    label_terms,
)

_REST_IN_WORDS = {
    "right": "the rest of the report is right",
    "constant": "the rest is the best constant report",
    "drawn": "the rest is another report",
}
_NEAR = 0.05  # two probabilities that lie this close are not told apart in words
RULES = {
    "p": "the probability that the reference says the observation: then it is one of those that do, else one of those "
    "that do not, which deny it or do not name it as often as in the data; earnings are means over them",
    "say_from": "the p from which saying earns more than denying and than silence; null where it never does, or where "
    "no reference says it, or all do",
    "ranges": "the p between which an action earns the most; where two earn the same, each has the range",
    "right": "of every other observation the report says what its reference says",
    "constant": "of every other observation the report says what the best constant report at margin 0 says",
    "after_scale": METHOD,
}


@dataclass(frozen=True)
class Wanted:
    """From which probability a score wants a finding said: half of the F1 that is within reach.

    Attributes:
        score: its name.
        f1: that was taken to be within reach.
        given: whether it was named; else it is midway between the best answer without looking and 1.
        blind: what that answer reaches.
        say_from: half of `f1`.
    """

    score: str
    f1: float
    given: bool
    blind: float
    say_from: float


@dataclass(frozen=True)
class BreakEvenCard:
    """Everything about break-evens on one card.

    Attributes:
        before, after: one a term, in the same order.
        wanted: of the score that was asked for, or None.
        group_size: G of `after`.
        policy: where the say-rates of `after` are from, or None: the references'.
    """

    before: list[BreakEvens]
    after: list[AfterScale]
    wanted: Wanted | None
    group_size: int
    policy: str | None


def wanted_by_f1(classes: Classes, score: str, f1: float | None) -> Wanted:
    """What `disease_micro13` wants of these references.

    Args:
        classes: [N, 14] of the references.
        score: its name.
        f1: the F1 within reach; None: taken from the labels (`additive.attainable_f1`).

    Raises:
        ValueError: an F1 outside (0, 1], or no positive finding to take it from.
    """
    if f1 is not None and not 0 < f1 <= 1:
        raise ValueError(f"F1 {f1}; expected a number above 0 and at most 1")
    reached = attainable_f1(classes) if f1 is None else f1
    return Wanted(score, reached, f1 is not None, blind_f1(classes), f1_threshold(reached))


def break_even_card(
    classes: Classes,
    constant: Sequence[int],
    *,
    margins: Sequence[float],
    threshold: float | None = None,
    wanted: Wanted | None = None,
    policy: tuple[str, Classes] | None = None,
    group_size: int = 8,
) -> BreakEvenCard:
    """Break-evens of MCCS at each margin, CCS, CE-F1 and additive, before and after the scale.

    Args:
        classes: [N, 14] of the references.
        constant: 13 signs of the constant report.
        threshold: t of additive; None: what `wanted` asks for or, without it, half of the F1 that these labels leave
            within reach (0.25 where nothing is positive).
        policy: name and [M, 14] classes of reports of a policy, for `after`; None: the references.

    Raises:
        ValueError: no studies, wrong shapes or classes, a threshold outside (0, 1), or a group below 2.
    """
    if threshold is None:
        reached = attainable_f1(classes) if (classes[:, : len(FINDINGS)] == POSITIVE).any() else 0.5
        threshold = f1_threshold(reached) if wanted is None else wanted.say_from
    terms = label_terms(margins, threshold)
    return BreakEvenCard(
        before=break_evens(classes, terms, constant),
        after=after_scale(
            classes, terms, constant, policy=None if policy is None else policy[1], group_size=group_size
        ),
        wanted=wanted,
        group_size=group_size,
        policy=None if policy is None else policy[0],
    )


def break_evens_json(card: BreakEvenCard) -> dict[str, Any]:
    """For `reward_card.json`: `terms` -> term -> `before` and `after`, by rest and observation; `wanted`, `words`."""
    return {
        "rules": RULES,
        "group_size": card.group_size,
        "policy": card.policy,
        "wanted": None if card.wanted is None else asdict(card.wanted),
        "terms": {
            before.term: {
                "before": {
                    rest: {name: None if one is None else asdict(one) for name, one in by_name.items()}
                    for rest, by_name in before.by_rest.items()
                },
                "after": {"group": after.group, "batch": after.unscaled, "none": after.unscaled},
            }
            for before, after in zip(card.before, card.after, strict=True)
        },
        "words": words(card),
    }


def words(card: BreakEvenCard) -> list[str]:
    """Where a reward teaches something else than the score wants, a line a term, with the rest right; and what the
    group's std makes of it.
    """
    lines = []
    wanted = card.wanted
    if wanted is not None:
        source = "as given" if wanted.given else f"taken to be midway between {wanted.blind:.2f} without looking and 1"
        lines.append(
            f"{wanted.score} wants a finding said from the probability {wanted.say_from:.2f} on: half of the F1 "
            f"within reach, {wanted.f1:.2f} ({source})."
        )
        for before in card.before:
            taught: dict[str, list[str]] = {}
            for name, one in before.by_rest["right"].items():
                for what, where in _taught(one, wanted.say_from):
                    taught.setdefault(what, []).append(f"{name} {where}".strip())
            said = "; ".join(f"{what} {', '.join(names)}" for what, names in taught.items())
            lines.append(
                f"{before.term}: this reward teaches {said}."
                if said
                else f"{before.term}: this reward too wants every finding said from there on."
            )
    for after in card.after:
        shown = [
            f"{_spread(list(after.group[rest].values()))} where {_REST_IN_WORDS[rest]}" for rest in ("right", "drawn")
        ]
        lines.append(
            f"{after.term}: with grpo.advantage_scale group saying pays from {' and '.join(shown)}; with batch or none "
            "from where it did before."
        )
    return lines


def print_break_evens(card: BreakEvenCard) -> None:
    """The tables and the words."""
    console = wide_console()
    for rest in RESTS:
        console.print(_before(card, rest))
    console.print(_after(card))
    for line in words(card):
        console.print(line, highlight=False, markup=False)


def _taught(one: BreakEven | None, wanted: float) -> list[tuple[str, str]]:
    """What a reward teaches of an observation between its own break-even and the wanted one, and between which p; empty
    where they agree.
    """
    if one is None:
        return []
    if one.say_from is None:
        return [("never to say", "")]
    if one.say_from < wanted - _NEAR:
        return [("to say", f"already between {one.say_from:.2f} and {wanted:.2f}")]
    if one.say_from <= wanted + _NEAR:
        return []
    silence, denial = (_within(part, wanted, one.say_from) for part in (one.silence, one.deny))
    parts = [("denial of", denial), ("silence about", silence)]
    if silence == denial:
        parts = [("silence about or denial of", silence)]
    return [(what, f"between {part[0]:.2f} and {part[1]:.2f}") for what, part in parts if part is not None]


def _within(part: Range | None, low: float, high: float) -> Range | None:
    if part is None:
        return None
    inside = (max(part[0], low), min(part[1], high))
    return inside if inside[1] - inside[0] > 0.005 else None


def _spread(values: Sequence[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "nowhere"
    low, high = f"{known[0]:.2f}", f"{known[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def _before(card: BreakEvenCard, rest: Rest) -> Table:
    table = Table(
        title=f"Where saying pays, {_REST_IN_WORDS[rest]}",
        box=box.SIMPLE,
        caption="p of the finding: denying pays up to the first, saying from the second on, silence between; -: never",
    )
    table.add_column("observation")
    for before in card.before:
        table.add_column(before.term, justify="right", no_wrap=True)
    if card.wanted is not None:
        table.add_column(f"{card.wanted.score} wants", justify="right", no_wrap=True)
    for name in FINDINGS:
        cells = [_range(before.by_rest[rest][name]) for before in card.before]
        table.add_row(name, *cells, *([] if card.wanted is None else [f"{card.wanted.say_from:.2f}"]))
    return table


def _range(one: BreakEven | None) -> str:
    if one is None:
        return "-"
    deny, say = (None if one.deny is None else one.deny[1]), one.say_from
    return f"{'-' if deny is None else f'{deny:.2f}'}  {'-' if say is None else f'{say:.2f}'}"


def _after(card: BreakEvenCard) -> Table:
    source = "the references'" if card.policy is None else f"{card.policy}'s"
    table = Table(
        title=f"Where saying pays after grpo.advantage_scale group, G {card.group_size}, say-rates {source}",
        box=box.SIMPLE,
        caption="the rest of the group's reports: right, the constant report, another report each; batch and none: as "
        "before",
    )
    table.add_column("observation")
    for after in card.after:
        table.add_column(after.term, justify="right", no_wrap=True)
    for name in FINDINGS:
        cells = []
        for after in card.after:
            values = [after.group[rest][name] for rest in GROUP_RESTS]
            cells.append("  ".join("-" if value is None else f"{value:.2f}" for value in values))
        table.add_row(name, *cells)
    return table
