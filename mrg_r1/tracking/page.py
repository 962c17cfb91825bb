"""The run to look at: one HTML file without any network, opened from disk.

Every text on it is escaped by the template engine: a report may contain anything that a policy can sample.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mrg_r1.data.images import load_image
from mrg_r1.labels.observations import NO_FINDING, OBSERVATIONS
from mrg_r1.types import Study

_CURVES = {
    "reward": ("reward/total", "reward/mccs", "reward/format", "validation/mean_reward"),
    "clinical, validation F1": ("validation/disease_micro13", "validation/disease_macro13", "validation/disease_micro13_truth"),
    "loss": ("loss",),
    "KL and entropy": ("policy/kl", "policy/entropy"),
    "groups": ("groups/zero_signal", "groups/distinct", "groups/truncated", "groups/malformed"),
    "seconds a step": ("time/rollout", "time/update", "time/reference", "time/reward_exposed"),
}
_IMAGE_SIDE = 224  # pixels of a radiograph on the page


def write_page(run: Path, studies: Sequence[Study], *, shown: int = 60) -> Path:
    """Write RUN/page/index.html.

    Args:
        run: a run's folder, finished or not.
        studies: the evaluated studies, for their images; only those with a prediction are shown.
        shown: study cards at most.

    Returns:
        The file.

    Raises:
        ValueError: no metrics in the folder.
    """
    metrics = _lines(run / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{run}: no metrics.jsonl with a whole step in it; give the output_dir of a run")
    summary = _json(run / "summary.json")
    before, after = _json(run / "evaluation" / "test_before.json"), _json(run / "evaluation" / "test.json")
    predictions = _lines(run / "evaluation" / "test_predictions.jsonl")[:shown]
    by_id = {study.id: study for study in studies}
    environment = Environment(loader=PackageLoader("mrg_r1.tracking"), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("page.html.j2").render(
        name=run.name,
        steps=len(metrics),
        summary=summary,
        rendered_only=bool(predictions) and all(row["id"] in by_id and by_id[row["id"]].rendered for row in predictions),
        definitions=_definitions(before, after) if after else [],
        plots=[Markup(svg) for svg in _plots(metrics)],
        studies=[_card(row, by_id[row["id"]]) for row in predictions if row["id"] in by_id],
    )
    path = run / "page" / "index.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _definitions(before: dict[str, Any] | None, after: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name, score in after["definitions"].items():
        low, high = score["f1_ci"]
        compared = {key: after["baselines"][key] for key in ("constant_normal", "blank", "random_train")}
        rows.append(
            {
                "name": name,
                "before": "-" if before is None else f"{before['definitions'][name]['f1']:.3f}",
                "after": f"{score['f1']:.3f}",
                "interval": f"{low:.3f} to {high:.3f}",
                **{key: "-" if entry is None else f"{entry[name]['f1']:.3f}" for key, entry in compared.items()},
            }
        )
    return rows


def _card(row: dict[str, Any], study: Study) -> dict[str, Any]:
    positive = {OBSERVATIONS[i] for i, value in enumerate(row["labels"][:NO_FINDING]) if value == 1}
    wanted = {OBSERVATIONS[i] for i, value in enumerate(row["reference_labels"][:NO_FINDING]) if value == 1}
    return {
        "id": row["id"],
        "total": row["total"],
        "reference": row["reference"],
        "text": row["text"],
        "images": [_thumbnail(image.path, study.id) for image in study.images],
        "agree": sorted(positive & wanted),
        "missed": sorted(wanted - positive),
        "invented": sorted(positive - wanted),
    }


def _thumbnail(path: Path, study_id: str) -> str:
    small = load_image(path, study_id).convert("L")
    small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _plots(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """One SVG a group of curves that the run has."""
    from matplotlib.figure import Figure  # slow to import, and only a page needs it

    plots = []
    for title, names in _CURVES.items():
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for name in names:
            points = [(row["step"] + 1, row[name]) for row in metrics if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 20 else None)
        if not axes.lines:
            continue
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        plots.append(buffer.getvalue()[buffer.getvalue().index("<svg") :])
    return plots


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a running run may be in the middle of its last one."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
