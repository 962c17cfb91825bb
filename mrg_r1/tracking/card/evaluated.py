"""A run's evaluations on its card: every definition with its interval and baselines, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mrg_r1.tracking.card.facts import CardFacts
from mrg_r1.tracking.card.markdown import code, table, text
from mrg_r1.tracking.evaluation_tables import evaluation_notes, reference_sources
from mrg_r1.tracking.page import clinical

Evaluation = Mapping[str, Any]


def evaluation_parts(facts: CardFacts) -> list[str]:
    """Paragraphs and tables; one sentence where the run was not evaluated."""
    if not facts.evaluations:
        return ["**Not evaluated**: the run has no evaluation on record, so nothing is known of these weights."]
    parts = []
    for name, (before, after) in facts.evaluations.items():
        parts += [f"### {code(name)}, {after['n']:,} studies", *_one(before, dict(after))]
    return parts


def _one(before: Evaluation | None, after: dict[str, Any]) -> list[str]:
    rows = clinical.definition_rows(before, after)
    labeler = after.get("labeler")
    said = ["Greedy reports."]
    if after.get("rendered"):
        said.append(f"{after['rendered']:,} of the studies are rendered phantoms.")
    if labeler is not None:
        said.append(f"Reports read by the labeler {code(labeler['name'])}, {code(labeler['fingerprint'])}.")
    sources = reference_sources(after)
    said.append(f"The references' labels: {'not on record' if sources is None else text(sources)}.")
    said.append(f"Study ids {code(after['ids_sha256'])}, reference labels {code(after['reference_labels_sha256'])}.")
    parts = [" ".join(said), _definitions(rows), _meanings(rows)]
    # the labels' source stands above
    parts += ["\n".join(f"- {text(note)}" for note in evaluation_notes(after) if not note.startswith("references'"))]
    if truth := clinical.truth_rows(before, after):
        cells = [[code(row["name"]), *_scores(row["last"])] for row in truth]
        parts += ["Against what the phantoms were drawn from:", table(["definition", "P", "R", "F1"], cells)]
    if held_out := after.get("held_out"):
        reader = held_out["labeler"]
        own = clinical.definition_rows((before or {}).get("held_out"), held_out)
        parts += [
            f"By the labeler {code(reader['name'])}, {code(reader['fingerprint'])}, which was never rewarded:",
            _definitions(own, baselines=False),
        ]
    others = [*clinical.scalar_rows(before, after), *clinical.lexical_rows(before, after)]
    if others:
        cells = [[text(row["name"]), _number(row["before"]), _number(row["last"])] for row in others]
        parts += ["What else was measured:", table(["of all studies", "before", "after"], cells)]
    return [*parts, *_radeval(before, after)]


def _radeval(before: Evaluation | None, after: Evaluation) -> list[str]:
    """RadEval's means with what makes them comparable. Why a metric was left out may name studies and folders, which
    are not for others: that it was is said.
    """
    found = clinical.radeval_of(after)
    parts = []
    if rows := clinical.radeval_rows(before, after):
        cells = [
            [
                code(row["name"]),
                _number(row["before"]),
                _number(row["last"]),
                "–".join(_number(bound) for bound in row["ci"]),
            ]
            for row in rows
        ]
        parts += [
            f"By {text(found['package'])}, means over {found['studies']:,} reports:",
            table(["RadEval", "before", "after", "95 % of it"], cells),
            "\n".join(f"- {code(name)}: {_variant(metric)}" for name, metric in found["metrics"].items()),
        ]
    if found["left_out"]:
        parts.append(f"Asked of RadEval and not scored: {', '.join(code(name) for name in found['left_out'])}.")
    return parts


def _variant(metric: Mapping[str, Any]) -> str:
    weights = metric["weights_sha256"]
    return f"{text(metric['variant'])}; " + ("no weights" if weights is None else f"weights' SHA-256 {code(weights)}")


def _definitions(rows: list[dict[str, Any]], *, baselines: bool = True) -> str:
    shown = {
        key: title
        for key, title in clinical.BASELINES.items()
        if any(row["baselines"][key] is not None for row in rows)
    }
    shown = shown if baselines else {}
    head = ["definition", "P", "R", "F1", "95 % of F1", "F1 before", *shown.values()]
    cells = [
        [
            code(row["name"]),
            *_scores(row["last"]),
            "–".join(_number(bound) for bound in row["last"]["f1_ci"]),
            _number((row["before"] or {}).get("f1")),
            *(_number(row["baselines"][key]) for key in shown),
        ]
        for row in rows
    ]
    return table(head, cells)


def _meanings(rows: list[dict[str, Any]]) -> str:
    return "\n".join(f"- {code(row['name'])}: {text(row['means'])}" for row in rows if row["means"])


def _scores(score: Evaluation) -> list[str]:
    return [_number(score[key]) for key in ("precision", "recall", "f1")]


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"
