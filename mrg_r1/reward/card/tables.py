"""A reward card as tables on the terminal, as plain words and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.markup import escape
from rich.table import Table

from mrg_r1 import __version__
from mrg_r1.console import wide_console
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.reward.card.card import SUGGESTION, AtMargin, RewardCard

RULES = {
    "signed_vector": "positive +1, negative -1, uncertain +1, blank 0 over the first 13 observations; No Finding is "
    "left out",
    "ccs": "cos(v_generated, v_reference); both vectors zero: 1; one zero: 0",
    "mccs": "max((CCS - m) / (1 - m), 0)",
    "total": "0.75 MCCS + 0.25 format; a constant report always keeps the format",
    "best_constant": "the best of all 3^13 signed vectors, given to every study",
    "best_real": "the best of the references' own signed vectors, given to every study",
    "random": "the expectation over all ordered pairs of different studies, one's reference given to the other",
    "zeros": "the share of references, or of pairs, that earn zero",
    "suggested_margin": SUGGESTION,
}
LabelSource = Literal["labeler", "file", "said"]
_SHORT = {"Enlarged Cardiomediastinum": "Mediastinum", "Pleural Effusion": "Effusion", "Support Devices": "Devices"}


@dataclass(frozen=True)
class Source:
    """Where a card's labels are from.

    Attributes:
        manifest: the manifest, as it was named.
        split: the split that was read, or None for all.
        labels: what the labels were taken from.
        name: the labeler's or the file's; None for the manifest's own.
        fingerprint: the labeler's; None where there is none.
        rendered: how many of the studies have rendered images (phantoms).
    """

    manifest: str
    split: str | None
    labels: LabelSource
    rendered: int
    name: str | None = None
    fingerprint: str | None = None


def title(card: RewardCard, source: Source) -> str:
    """Whose card it is, in one line; says where images are phantoms."""
    split = "" if source.split is None else f", split {source.split}"
    phantoms = (
        ""
        if not source.rendered
        else f"; {'all' if source.rendered == card.n else f'{source.rendered:,}'} rendered phantoms"
    )
    return f"Reward card of {source.manifest}{split}: {card.n:,} studies{phantoms}"


def summary(card: RewardCard, margin: float) -> str:
    """In plain words what not looking earns at a margin."""
    row = card.at(margin)
    constant = row.constant
    said = f"one constant report ({', '.join(constant.says)})" if constant.says else "a report that says nothing"
    random = "" if row.random_mean is None else f" A random report earns {row.random_mean:.3f}."
    return (
        f"Margin {margin:g}: {said} earns a mean MCCS of {constant.mean:.3f} without looking, and zero on "
        f"{constant.zeros:.1%} of the references; with the format kept its mean total reward is "
        f"{constant.total:.3f}.{random} A run whose reward/mccs does not rise above {constant.mean:.3f} has "
        "learned nothing from the images."
    )


def labels_in_words(source: Source) -> str:
    """Where the labels are from: "labeler chexbert.pth (0123456789abcdef)"."""
    if source.labels == "said":
        return "the manifest's own (`labels.said`)"
    return f"{source.labels} {source.name}" + ("" if source.fingerprint is None else f" ({source.fingerprint})")


def suggestion(card: RewardCard) -> str:
    """The suggested margin and its rule."""
    if card.suggested_margin is None:
        return (
            f"No margin is suggested: no multiple of 0.05 meets the rule ({SUGGESTION}). These references hardly "
            "differ."
        )
    return f"Suggested margin {card.suggested_margin:g}: {SUGGESTION}."


def card_json(card: RewardCard, source: Source, margin: float) -> dict[str, Any]:
    """The card with where it is from, the rules it was made by, and the words of `summary`; `margin` is the one asked
    for.
    """
    content = asdict(card)
    content["prevalence"] = {
        name: {state: {"count": count, "share": count / card.n} for state, count in states.items()}
        for name, states in card.prevalence.items()
    }
    return {
        "project": {"name": "mrg-r1", "version": __version__},
        "source": asdict(source),
        "rendered": source.rendered > 0,
        "rules": RULES,
        "margin": margin,
        "summary": summary(card, margin),
        "observations": list(OBSERVATIONS[:NO_FINDING]),
        **content,
    }


def print_card(card: RewardCard, source: Source, margin: float) -> None:
    """The card on the terminal."""
    console = wide_console()
    console.print(_margins(card, source, margin))
    console.print(_prevalence(card))
    pairs = (
        ""
        if card.random_ccs is None
        else f"; a random report's CCS is {card.random_ccs:.3f}, both say nothing in {card.both_silent:.2%}"
    )
    lines = [
        f"labels: {labels_in_words(source)}",
        f"{card.distinct:,} different signed vectors; {card.silent:.2%} of the references say nothing (zero "
        f"vectors){pairs}",
        suggestion(card),
        *(summary(card, shown) for shown in dict.fromkeys((margin, card.suggested_margin)) if shown is not None),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _margins(card: RewardCard, source: Source, asked: float) -> Table:
    table = Table(
        title=escape(title(card, source)),
        box=box.SIMPLE,
        caption="constant: the best of all, real: the best of the references; total: 0.75 MCCS + 0.25 format; ″: as "
        "above",
    )
    for column in ("margin", "constant", "zeros", "total", "real", "random", "zeros"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("the constant says")
    above: AtMargin | None = None
    for row in card.margins:
        same = above is not None and above.constant.says == row.constant.says
        mark = " <" if row.margin == asked else ""
        table.add_row(
            f"{row.margin:g}{mark}",
            f"{row.constant.mean:.3f}",
            f"{row.constant.zeros:.1%}",
            f"{row.constant.total:.3f}",
            f"{row.real.mean:.3f}",
            "-" if row.random_mean is None else f"{row.random_mean:.3f}",
            "-" if row.random_zeros is None else f"{row.random_zeros:.1%}",
            "″" if same else _shortened(row.constant.says),
            style="bold" if row.margin in (asked, card.suggested_margin) else None,
        )
        above = row
    return table


def _shortened(says: tuple[str, ...]) -> str:
    """ "no Cardiomegaly", "Pleural Effusion" -> "-Cardiomegaly +Effusion"."""
    names = [(name.removeprefix("no "), "-" if name.startswith("no ") else "+") for name in says]
    return " ".join(f"{sign}{_SHORT.get(name, name)}" for name, sign in names) or "(nothing)"


def _prevalence(card: RewardCard) -> Table:
    table = Table("observation", title="What the references say", box=box.SIMPLE)
    for state in ("positive", "negative", "uncertain", "blank"):
        table.add_column(state, justify="right", no_wrap=True)
    for name, states in card.prevalence.items():
        table.add_row(name, *(f"{count:,} ({count / card.n:.1%})" for count in states.values()))
    return table
