"""The README's picture: one test study of a run, its film, its reference, and what the policy wrote before and after.

The study is chosen by a rule and not by eye: test studies whose reward changed, in the order of the change, and of
their ids where that is equal; the one in the middle. How many changed, and how many rose, stands beneath.

    python -m benchmarks.readme_picture runs/demo -o docs/images/before_after.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mrg_r1.data.images import load_image
from mrg_r1.data.study import read_manifest
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.types import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES, _DPI = (10.0, 5.6), 160  # 1600 x 896 pixels; a README shows it at about half of that
_INK, _GREY, _LINE, _CARD = "#1f2328", "#57606a", "#d0d7de", "#f6f8fa"
_MARKS = {"agreed": ("✓", "#0b6b3a"), "missed": ("○", "#8a5300"), "invented": ("✚", "#b3261e")}
_SAID = {1: "present", -1: "uncertain", 0: "absent", None: "not said"}
# shares of the figure: the edges of film and cards, the first line of the findings, and the cards' columns
_LEFT, _TOP, _BOTTOM, _FINDINGS = 0.02, 0.905, 0.50, 0.45
_COLUMNS, _WIDTH = (0.277, 0.518, 0.759), 0.221  # reference, before, after
_TEXT = 9.6  # points of a report


@dataclass(frozen=True)
class Chosen:
    """The study of the picture: its lines in the predictions before and after, and its rank among the changed."""

    before: dict[str, Any]
    after: dict[str, Any]
    rank: int  # from 1
    changed: int  # studies whose reward changed
    rose: int  # of them
    studies: int


def choose(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Chosen:
    """The median of the studies whose reward changed: the lower middle one of an even number, ties in the order of ids.
    Where none changed, of all.

    Args:
        before, after: lines of `test_before_predictions.jsonl` and `test_predictions.jsonl`, of the same studies.

    Raises:
        ValueError: the two files do not hold the same studies, or none.
    """
    at_start = {row["id"]: row for row in before}
    at_end = {row["id"]: row for row in after}
    if at_start.keys() != at_end.keys() or not at_start:
        raise ValueError("the predictions before and after training are not of the same studies; evaluate the run anew")
    # rounded, so that a last bit of floating point does not order what is equal
    change = {name: round(at_end[name]["total"] - at_start[name]["total"], 9) for name in at_start}
    moved = [name for name in change if change[name] != 0]
    order = sorted(moved or change, key=lambda name: (change[name], name))
    middle = (len(order) - 1) // 2
    rose = sum(change[name] > 0 for name in moved)
    return Chosen(at_start[order[middle]], at_end[order[middle]], middle + 1, len(moved), rose, len(change))


def verdict(wanted: int | None, said: int | None) -> str | None:
    """What became of a finding: `agreed`, `missed` or `invented`; None where the two neither agree nor name it.

    Args:
        wanted, said: label values of reference and report: 1, 0, -1 or None. Uncertain counts as positive.
    """
    there, named = wanted in (1, -1), said in (1, -1)
    if there and named or wanted == said == 0:
        return "agreed"
    if there:
        return "missed"
    return "invented" if named else None


def draw(path: Path, chosen: Chosen, study: Study, summary: dict[str, Any]) -> None:
    """Write the PNG; `summary` is the run's `summary.json`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only drawing needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, facecolor="white")
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, 1), ylim=(0, 1))
    page.set_axis_off()
    film = figure.add_axes((_LEFT, _BOTTOM, (_TOP - _BOTTOM) * _INCHES[1] / _INCHES[0], _TOP - _BOTTOM))
    film.imshow(load_image(study.images[0].path, study.id).convert("L"), cmap="gray", interpolation="bicubic")
    film.set_axis_off()
    page.text(_LEFT, 0.945, "Film", fontsize=11.5, fontweight="bold", color=_INK, va="center")
    _cards(page, chosen)
    _findings(page, chosen)
    _numbers(page, chosen, study, summary)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def _cards(page: Axes, chosen: Chosen) -> None:
    from matplotlib.patches import FancyBboxPatch

    texts = (
        ("Reference", chosen.after["reference"], ""),
        ("Before", chosen.before["text"], f"reward {chosen.before['total']:.2f}"),
        ("After", chosen.after["text"], f"reward {chosen.after['total']:.2f}"),
    )
    for left, (title, text, reward) in zip(_COLUMNS, texts, strict=True):
        box = (left, _BOTTOM), _WIDTH, _TOP - _BOTTOM
        page.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=0.008", fc=_CARD, ec=_LINE))
        page.text(left, 0.945, title, fontsize=11.5, fontweight="bold", color=_INK, va="center")
        page.text(left + _WIDTH, 0.945, reward, fontsize=10, color=_GREY, va="center", ha="right")
        shown = _wrapped(text, (_WIDTH - 0.022) * _INCHES[0] * 72)
        page.text(left + 0.011, _TOP - 0.022, shown, fontsize=_TEXT, color=_INK, va="top", linespacing=1.4)


def _wrapped(text: str, points: float, *, most: int = 11) -> str:
    """The text in lines of at most `points`; beyond `most` lines it is cut, which "…" says."""
    from matplotlib.textpath import TextPath

    lines = [""]
    for word in text.replace("$", r"\$").split():
        longer = f"{lines[-1]} {word}".strip()
        if TextPath((0, 0), longer, size=_TEXT).get_extents().width <= points:
            lines[-1] = longer
        else:
            lines.append(word)
        if len(lines) > most:
            break
    return "\n".join(lines if len(lines) <= most else [*lines[: most - 1], "…"])


def _findings(page: Axes, chosen: Chosen) -> None:
    wanted = chosen.after["reference_labels"]
    said = (chosen.before["labels"], chosen.after["labels"])
    rows = [
        place
        for place in range(NO_FINDING)
        if any(labels is not None and labels[place] is not None for labels in (wanted, *said))
    ]
    step = min(0.052, 0.26 / max(len(rows), 1))
    style: dict[str, Any] = {"fontsize": min(10.0, step * 190), "va": "center"}
    for number, place in enumerate(rows):
        height = _FINDINGS - number * step
        page.text(_LEFT, height, OBSERVATIONS[place], color=_INK, **style)
        page.text(_COLUMNS[0] + 0.011, height, _SAID[wanted[place]], color=_INK, **style)
        for left, labels in zip(_COLUMNS[1:], said, strict=True):
            value = None if labels is None else labels[place]  # a malformed report has no labels
            name = verdict(wanted[place], value)
            sign, colour = _MARKS[name] if name else ("", _GREY)
            page.text(left + 0.011, height, _SAID[value], color=colour, **style)
            page.text(left + 0.095, height, f"{sign} {name}" if name else "", color=colour, weight="bold", **style)


def _numbers(page: Axes, chosen: Chosen, study: Study, summary: dict[str, Any]) -> None:
    before, after = summary["before"], summary["after"]
    means = "      ".join(
        f"{title} {before[key]:.3f} → {after[key]:.3f}"
        for title, key in (("mean reward", "mean_reward"), ("disease_micro13", "disease_micro13"))
    )
    whose = "a rendered phantom, no patient" if study.rendered else "a radiograph"
    rule = (
        f"{study.id}, {whose}. The reward of {chosen.changed:,} of {chosen.studies:,} test studies changed, of "
        f"{chosen.rose:,} it rose; this is the median."
    )
    page.plot([_LEFT, 0.98], [0.145, 0.145], color=_LINE, linewidth=1)
    numbers = f"All {chosen.studies:,} test studies, {summary['steps']:,} GRPO steps:      {means}"
    page.text(_LEFT, 0.1, numbers, fontsize=10.5, color=_INK, va="center", fontweight="bold")
    page.text(_LEFT, 0.045, rule, fontsize=9, color=_GREY, va="center")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished GRPO run")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/before_after.png"))
    arguments = parser.parse_args()
    evaluation = arguments.run / "evaluation"
    chosen = choose(_lines(evaluation / "test_before_predictions.jsonl"), _lines(evaluation / "test_predictions.jsonl"))
    recipe = yaml.safe_load((arguments.run / "config.yaml").read_text(encoding="utf-8"))
    studies = {study.id: study for study in read_manifest(Path(recipe["data"]["manifest"]))}
    summary = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))
    draw(arguments.output, chosen, studies[chosen.after["id"]], summary)
    change = chosen.after["total"] - chosen.before["total"]
    print(f"{arguments.output}: {chosen.after['id']}, {chosen.rank} of {chosen.changed} changed, reward {change:+.3f}")


if __name__ == "__main__":
    main()
