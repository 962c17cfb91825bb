"""Break-evens as the reward card's third panel: by observation, where each term wants a finding said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mrg_r1.reward.additive import FINDINGS
from mrg_r1.reward.card.break_even_tables import BreakEvenCard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # after Okabe and Ito
_DASHES = (0, (4, 2))


def draw_break_evens(axes: Axes, card: BreakEvenCard) -> None:
    """A row an observation, a line a term: where silence pays, and at its right end the p from which saying does. Full:
    the rest of the report is right. Open: after the group's std, where the rest is another report.
    """
    terms = len(card.before)
    handles = []
    for number, (before, after) in enumerate(zip(card.before, card.after, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        offset = (number - (terms - 1) / 2) * 0.8 / max(terms, 1)
        for row, name in enumerate(FINDINGS):
            one, scaled = before.by_rest["right"][name], after.group["drawn"][name]
            if one is not None and one.silence is not None:
                axes.plot(one.silence, [row + offset] * 2, color=colour, linewidth=1.6, alpha=0.45)
            if one is not None and one.say_from is not None:
                axes.plot([one.say_from], [row + offset], color=colour, marker="o", markersize=4.5, linestyle="")
            if scaled is not None:
                axes.plot(
                    [scaled],
                    [row + offset],
                    color=colour,
                    marker="o",
                    markersize=4.5,
                    markerfacecolor="white",
                    linestyle="",
                )
        handles += axes.plot([], [], color=colour, marker="o", markersize=4.5, linestyle="")
    labels = [before.term for before in card.before]
    handles += axes.plot([], [], color="#555555", linewidth=1.6, alpha=0.45)
    labels.append("silence pays")
    handles += axes.plot([], [], color="#555555", marker="o", markerfacecolor="white", markersize=4.5, linestyle="")
    labels.append("after the group's std")
    if card.wanted is not None:
        axes.axvline(card.wanted.say_from, color="black", linestyle=_DASHES, linewidth=1.2, zorder=0)
        handles += axes.plot([], [], color="black", linestyle=_DASHES, linewidth=1.2)
        labels.append(f"{card.wanted.score} wants")
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8.5, frameon=False)
    axes.set_yticks(range(len(FINDINGS)), FINDINGS)
    axes.invert_yaxis()
    axes.set_title("From which probability a finding\nis to be said", fontsize=10.5)
    axes.set(xlabel="probability p that the reference says it", xlim=(0, 1))
    axes.grid(axis="x", alpha=0.25)
    axes.margins(y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
