"""The clinical table and the bars: an evaluation before and after as rows of text, tolerant of keys that a run does not
have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.metrics.clinical import DEFINITIONS, STRICT

BASELINES = {"constant_normal": "normal", "blank": "blank", "random_train": "random", "reference": "itself"}
_SCALARS = {  # of an evaluation -> in words
    "mean_reward": "mean reward",
    "format_rate": "well-formed reports, share",
    "distinct_share": "distinct reports, share",
    "no_finding_rate": "reports that say No Finding, share",
    "repeated_sentence": "reports in which a whole sentence stands twice, share",
    "repetition": "repetition: share of sentences or phrases said before",
    "contradiction": "reports that affirm and deny one observation, share",
    "mean_words": "words a report",
    "labeler_gap": "labeler gap: disease_micro13 by the labeler less by the drawn truth",
    "hacking_gap": "hacking gap: disease_micro13 by the rewarded labeler less by the held-out labeler",
}

Evaluation = Mapping[str, Any]


def definition_rows(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """A row a definition: F1 and interval before and after, precision and recall of the later one, the gain and the
    baselines.
    """
    last = after or before
    if not last:
        return []
    rows = []
    for name, score in last["definitions"].items():
        old = (before or {}).get("definitions", {}).get(name) if after else None
        baselines = {key: (last.get("baselines", {}).get(key) or {}).get(name) for key in BASELINES}
        rows.append(
            {
                "name": name,
                "means": _in_words(name),
                "before": old,
                "last": score,
                "gain": None if old is None else score["f1"] - old["f1"],
                "baselines": {key: None if entry is None else entry["f1"] for key, entry in baselines.items()},
            }
        )
    return rows


def _in_words(name: str) -> str:
    definition = DEFINITIONS.get(name)
    if definition is None:
        return ""
    uncertain = "uncertain is not positive" if definition.positive == STRICT else "uncertain is positive"
    return f"{len(definition.labels)} observations, {uncertain}, {definition.average} average. {definition.source}"


def truth_rows(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """The same against the labels that phantoms were drawn from, where there are any."""
    last, first = (after or before or {}).get("truth") or {}, (before or {}).get("truth") or {}
    return [{"name": name, "before": first.get(name) if after else None, "last": score} for name, score in last.items()]


def scalar_rows(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """What else an evaluation says in one number, with what one constant training report would have."""
    last, first = after or before or {}, before or {}
    rows = [
        {
            "name": words,
            "before": first.get(key) if after else None,
            "last": last.get(key),
            "constant": (last.get("constant") or {}).get("total") if key == "mean_reward" else None,
        }
        for key, words in _SCALARS.items()
    ]
    for term in last.get("terms") or {}:
        rows.append(
            {
                "name": f"reward term {term}",
                "before": (first.get("terms") or {}).get(term) if after else None,
                "last": last["terms"][term],
                "constant": (last.get("constant") or {}).get(term),
            }
        )
    return [row for row in rows if _is_number(row["last"])]


def lexical_rows(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Every number under the key `lexical`, whatever it is called."""
    last, first = dict(_numbers((after or before or {}).get("lexical"))), dict(_numbers((before or {}).get("lexical")))
    return [{"name": name, "before": first.get(name) if after else None, "last": value} for name, value in last.items()]


def radeval_rows(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """A row an output of RadEval's metrics: its mean over reports before and after, and the later one's interval."""
    last, first = radeval_of(after or before), radeval_of(before)
    return [
        {
            "name": name,
            "before": first["scores"].get(name, {}).get("mean") if after else None,
            "last": score["mean"],
            "ci": score["ci"],
        }
        for name, score in last["scores"].items()
    ]


def radeval_of(evaluation: Evaluation | None) -> dict[str, Any]:
    """What an evaluation has of RadEval: `scores`, `metrics` and `left_out`, empty where it was not asked."""
    return {"scores": {}, "metrics": {}, "left_out": {}} | ((evaluation or {}).get("radeval") or {})


def _numbers(value: Any, name: str = "") -> Iterable[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name} {key}".strip())
    elif _is_number(value):
        yield name, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def observation_rows(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """A row an observation that the references have: support, and precision, recall and F1 before and after; the most
    frequent first.
    """
    last, first = after or before or {}, before or {}
    rows = []
    for name in OBSERVATIONS:
        count, score = (last.get("support") or {}).get(name), (last.get("observations") or {}).get(name)
        if not count and not (score and any(score.values())):
            continue
        rows.append(
            {
                "name": name,
                "support": count,
                "last": score,
                "before": (first.get("observations") or {}).get(name) if after else None,
            }
        )
    return sorted(rows, key=lambda row: -(row["support"] or 0))


def silent_observations(before: Evaluation | None, after: Evaluation | None) -> list[str]:
    """The observations that `observation_rows` leaves out."""
    shown = {row["name"] for row in observation_rows(before, after)}
    return [name for name in OBSERVATIONS if name not in shown]
