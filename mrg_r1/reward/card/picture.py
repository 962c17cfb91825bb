"""A reward card as one picture: what not looking earns by margin, what the references say, and from which probability a
finding is to be said.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrg_r1.files import atomically
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.reward.card.break_even_picture import draw_break_evens
from mrg_r1.reward.card.break_even_tables import BreakEvenCard
from mrg_r1.reward.card.card import RewardCard
from mrg_r1.reward.card.tables import Source, labels_in_words, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# after Okabe and Ito: told apart by colour-blind readers, and light enough for black figures on the bars
_CONSTANT, _REAL, _RANDOM = "#0072B2", "#D55E00", "#555555"
_DASHES = (0, (4, 2))
_STATES = {"positive": "#E07B39", "uncertain": "#F0C400", "negative": "#56B4E9", "blank": "#E6E6E6"}


def write_picture(path: Path, card: RewardCard, source: Source, margin: float, pays: BreakEvenCard) -> None:
    """Write the PNG.

    Args:
        path: the file; its folder must exist.
        card: the numbers.
        source: for the title, which says where images are phantoms.
        margin: the one asked for, marked by a line.
        pays: where saying a finding pays.

    Raises:
        ValueError: a margin that is not on the card.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only the picture needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    earned, said, wanted = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.15))
    figure.suptitle(title(card, source).replace("$", r"\$"), fontsize=12.5, fontweight="bold", wrap=True)
    _draw_earned(earned, card, margin)
    _draw_prevalence(said, card)
    draw_break_evens(wanted, pays)
    figure.supxlabel(f"labels: {labels_in_words(source)}".replace("$", r"\$"), fontsize=8, color="#555555")
    with atomically(path, synced=False) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None}, format="png")


def _draw_earned(axes: Axes, card: RewardCard, margin: float) -> None:
    """Mean MCCS (solid) of the three ways of not looking by margin, and how often two of them earn zero (dashed)."""
    at = [row.margin for row in card.margins]
    handles = axes.plot(
        at, [row.constant.mean for row in card.margins], color=_CONSTANT, marker="o", markersize=5, linewidth=2.2
    )
    axes.plot(at, [row.constant.zeros for row in card.margins], color=_CONSTANT, linestyle=_DASHES, linewidth=1.5)
    # often the best constant itself, so its markers are open and no second line of zeros lies on the first
    handles += axes.plot(
        at,
        [row.real.mean for row in card.margins],
        color=_REAL,
        marker="s",
        markersize=8,
        markerfacecolor="none",
        linewidth=0.9,
    )
    names = ["best constant", "best real report"]
    pairs = [
        (row.random_mean, row.random_zeros)
        for row in card.margins
        if row.random_mean is not None and row.random_zeros is not None
    ]
    if pairs:
        means, zeros = zip(*pairs, strict=True)
        handles += axes.plot(at, means, color=_RANDOM, marker="^", markersize=5, linewidth=1.6)
        axes.plot(at, zeros, color=_RANDOM, linestyle=_DASHES, linewidth=1.5)
        names.append("random report")
    handles += axes.plot([], [], color="black", linewidth=1.5)
    handles += axes.plot([], [], color="black", linestyle=_DASHES, linewidth=1.5)
    _below(axes, handles, [*names, "solid: mean MCCS", "dashed: share that earns zero"], columns=3)

    constant = card.at(margin).constant
    axes.axvline(margin, color="#999999", linewidth=1, zorder=0)
    axes.plot(
        [margin],
        [constant.mean],
        marker="o",
        markersize=14,
        markerfacecolor="none",
        markeredgecolor="black",
        linestyle="",
    )
    axes.set_title(
        f"At m = {margin:g} one constant report earns {constant.mean:.3f} without looking,\n"
        f"and zero on {constant.zeros:.0%} of the references",
        fontsize=10.5,
    )
    axes.set(xlabel="margin m", ylabel="mean MCCS; share of references or pairs", xlim=(-0.02, 0.97), ylim=(0, 1.01))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_prevalence(axes: Axes, card: RewardCard) -> None:
    """A bar an observation: the shares of the references that affirm it, doubt it, deny it and do not name it."""
    names = list(OBSERVATIONS)
    left = [0.0] * len(names)
    handles = []
    for state, colour in _STATES.items():
        shares = [card.prevalence[name][state] / card.n for name in names]
        handles.append(axes.barh(names, shares, left=left, color=colour, height=0.78, edgecolor="white", linewidth=0.4))
        for y, (start, share) in enumerate(zip(left, shares, strict=True)):
            if state != "blank" and share >= 0.06:
                axes.text(start + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    _below(axes, handles, list(_STATES), columns=4)
    axes.invert_yaxis()
    axes.set_title("What the references say,\nobservation by observation", fontsize=10.5)
    axes.set(xlabel="share of the references", xlim=(0, 1))
    axes.margins(y=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _below(axes: Axes, handles: list[Any], names: list[str], *, columns: int) -> None:
    """The legend under the panel: inside, there is no corner that no curve ever crosses."""
    where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": columns}
    axes.legend(handles, names, fontsize=9, frameon=False, columnspacing=1.1, handlelength=1.8, **where)
