"""RUN/page/index.html out of what RUN holds at the moment: read, chosen to fit, rendered, written whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mrg_r1.console import progress
from mrg_r1.files import write_text_atomically
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.tracking.control import CONTROLS
from mrg_r1.tracking.evaluation_tables import reference_sources
from mrg_r1.tracking.page import clinical
from mrg_r1.tracking.page.cards import Pictures, prediction_cards, within
from mrg_r1.tracking.page.curves import Curves, read_curves, sections
from mrg_r1.tracking.page.embedding import embedded, size_of, source_hash
from mrg_r1.tracking.page.reading import read_json
from mrg_r1.tracking.page.sampled import Sampled, read_sampled
from mrg_r1.types import Study

_BYTES = 14_000_000  # of the whole page
_IMAGES_FIRST = 150, 50  # evaluated and training studies whose radiographs come first
_SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "templates/page.js",
    "templates/curves.js",
    "templates/words.js",
    "templates/card.js",
    "templates/studies.js",
)
_STYLES = ("vendor/uPlot.min.css", "templates/page.css")


def write_page(
    run: Path,
    studies: Sequence[Study],
    *,
    others: Sequence[Path] = (),
    references: Mapping[str, Sequence[int | None]] | None = None,
    output: Path | None = None,
) -> Path:
    """Write a run, finished or not, as one HTML file.

    Args:
        run: its folder.
        studies: evaluated and training studies, for radiographs and references.
        others: further runs, whose curves and results are shown beside.
        references: 14 label values (1, 0, -1, None) of training references, by study id, as the run's labeler read
            them; a study that is not among them has what the manifest says.
        output: the file; RUN/page/index.html where it is None.

    Returns:
        The file.

    Raises:
        ValueError: a folder with neither a step nor an evaluation, or a file that cannot be read; names file and line.
        OSError: the page cannot be written; an older one is untouched.
    """
    runs = [run, *others]
    curves = [read_curves(each, runs=len(runs)) for each in runs]
    evaluations = [_evaluation(each) for each in runs]
    for each, curve, (before, after) in zip(runs, curves, evaluations, strict=True):
        if not curve.steps and not before and not after:
            raise ValueError(
                f"{each}: no metrics.jsonl with a whole step in it and no evaluation; give the output_dir of a run"
            )
    data = {
        "runs": [{"name": curve.name, "columns": curve.columns} for curve in curves],
        "sections": sections(curves),
        "observations": OBSERVATIONS,
    }
    shown = _studies(
        run, {study.id: study for study in studies}, references or {}, room=_BYTES - size_of(data) - 300_000
    )
    before, after = evaluations[0]
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            runs=[_facts(*each) for each in zip(runs, curves, evaluations, strict=True)],
            has_before=before is not None and after is not None,
            baselines=clinical.BASELINES,
            definitions=clinical.definition_rows(before, after),
            held_out=clinical.definition_rows(_part(before, "held_out"), _part(after, "held_out")),
            truth=clinical.truth_rows(before, after),
            scalars=clinical.scalar_rows(before, after),
            lexical=clinical.lexical_rows(before, after),
            radeval=clinical.radeval_rows(before, after),
            about_radeval=clinical.radeval_of(after or before),
            bars=clinical.observation_rows(before, after),
            silent=clinical.silent_observations(before, after),
            evaluation=after or before,
            reference_sources=reference_sources(after or before or {}),
            sections=data["sections"],
            buckets=[curve for curve in curves if curve.bucket > 1],
            banner=_banner(shown["cards"], {study.id: study for study in studies}),
            notes=shown["notes"],
            sets=[{"title": part["title"], "count": len(part["cards"])} for part in shown["sets"]],
            data=Markup(embedded(data | {"sets": shown["sets"]})),
            pictures=Markup(embedded(shown["pictures"])),
            **_assets(),
        )
    )
    path = run / "page" / "index.html" if output is None else output
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, html)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mrg_r1.tracking.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = lambda value: "–" if value is None or math.isnan(value) else f"{value:.3f}"
    environment.filters["signed"] = lambda value: (
        "–" if value is None else f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")
    )
    return environment


def _assets() -> dict[str, Any]:
    """The page's own scripts and styles, and the policy that lets nothing else run and nothing be fetched."""
    folder = resources.files("mrg_r1.tracking.page")
    scripts = [folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS]
    styles = [folder.joinpath(name).read_text(encoding="utf-8") for name in _STYLES]
    allowed = f"script-src {' '.join(map(source_hash, scripts))}; style-src {' '.join(map(source_hash, styles))}"
    return {
        "scripts": [Markup(text) for text in scripts],
        "styles": [Markup(text) for text in styles],
        "policy": Markup(f"default-src 'none'; {allowed}; img-src data:; base-uri 'none'; form-action 'none'"),
        "licence": folder.joinpath("vendor/LICENSE.uPlot").read_text(encoding="utf-8"),
    }


def _evaluation(run: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The evaluation before and after; of a folder that `launch/evaluate.py` filled, its only split."""
    folder = run / "evaluation"
    last = _last_name(folder)
    found = read_json(folder / "test_before.json"), read_json(folder / f"{last}.json")
    for path, content in zip((folder / "test_before.json", folder / f"{last}.json"), found, strict=True):
        for key in ("n", "definitions"):
            if content is not None and key not in content:
                raise ValueError(
                    f"{path}: no field `{key}`: no evaluation of this project; remove it and evaluate again"
                )
    return found


def _last_name(folder: Path) -> str:
    names = sorted(path.stem for path in folder.glob("*.json") if not path.stem.endswith("_before"))
    return "test" if "test" in names or not names else names[0]


def _part(evaluation: dict[str, Any] | None, key: str) -> dict[str, Any] | None:
    part = None if evaluation is None else evaluation.get(key)
    return part if isinstance(part, dict) and "definitions" in part else None


def _facts(
    run: Path, curves: Curves, evaluations: tuple[dict[str, Any] | None, dict[str, Any] | None]
) -> dict[str, Any]:
    """What the head of the page says of a run."""
    summary = read_json(run / "summary.json") or {}
    environment = read_json(run / "environment.json") or {}
    before, after = evaluations
    steps = f"{curves.steps:,}" + (f" of {summary['steps']:,}" if summary.get("steps") else "")
    facts = [f"{steps} steps"] if curves.steps else ["an evaluation without steps"]
    ranks = summary.get("world_size") or environment.get("world_size")
    facts += [f"{ranks} rank{'s' * (ranks != 1)}"] if ranks else []
    facts += [f"ZeRO-{summary['zero_stage']}"] if summary.get("zero_stage") else []
    targets = summary.get("lora_targets")
    facts += [f"LoRA on {targets}"] if targets not in (None, "language") else []
    facts += [f"seed {summary.get('seed', environment.get('seed'))}"] if environment or summary else []
    facts += [f"{summary['training_seconds'] / 60:,.1f} minutes of training"] if summary.get("training_seconds") else []
    if best := summary.get("best"):
        facts.append(f"best validation at step {best['step']}{_over_last(best)}")
    return {
        "name": curves.name,
        "facts": facts,
        "status": summary.get("status") or ("unfinished" if curves.steps else "evaluated"),
        "note": summary.get("note"),
        "control": CONTROLS.get(_control(run) or ""),
        "before": before,
        "last": after or before,
    }


def _over_last(best: Mapping[str, Any]) -> str:
    """What choosing it gained over the last adapter, on the validation studies."""
    gain = best.get("over_last")
    if gain is None or gain["step"] == best["step"]:
        return ""
    error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.3f}"
    return f" ({gain['difference']:+.3f}{error} over the last, step {gain['step']})"


def _control(run: Path) -> str | None:
    """Of RUN/config.yaml, which is there from the start."""
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    control: str | None = content.get("control")
    return control


def _studies(
    run: Path, studies: Mapping[str, Study], references: Mapping[str, Sequence[int | None]], *, room: int
) -> dict[str, Any]:
    """The two sets of cards, their radiographs and what had to stay out, in at most `room` bytes."""
    folder = run / "evaluation"
    last = _last_name(folder)
    files = [
        ("before training", folder / "test_before_predictions.jsonl"),
        ("after training", folder / f"{last}_predictions.jsonl"),
    ]
    evaluated = prediction_cards(files, studies)
    sampled = read_sampled(run, studies, references)
    for (
        study_id,
        own,
    ) in sampled.cards.items():  # a study that was both evaluated and trained on is followed from before to after
        if study_id in evaluated:
            versions = {version["name"]: version for version in evaluated[study_id]["at"]}
            own["at"] = [versions[name] for name, _ in files[:1] if name in versions] + own["at"]
            own["at"] += [versions[name] for name, _ in files[1:] if name in versions]
    training = within(sampled.cards.values(), room // 5)
    pictures = Pictures(budget=room // 3)
    candidates = list(evaluated.values())
    at, of = _IMAGES_FIRST
    wanted = [*candidates[:at], *training[:of], *candidates[at:], *training[of:]]
    for own in progress([own for own in wanted if own["id"] in studies], "page: radiographs"):
        own["images"] = pictures.add(studies[own["id"]])
    test = within(candidates, room - size_of(training) - size_of(pictures.data))
    sets = [
        {"title": "Test studies", "order": "as evaluated", "cards": test},
        {"title": "Training studies", "order": "by first step", "cards": training},
    ]
    return {
        "sets": [part for part in sets if part["cards"]],
        "cards": [*test, *training],
        "pictures": pictures.data,
        "notes": _notes(test, len(evaluated), training, sampled, pictures),
    }


def _notes(
    test: Sequence[dict[str, Any]],
    evaluated: int,
    training: Sequence[dict[str, Any]],
    sampled: Sampled,
    pictures: Pictures,
) -> list[str]:
    """What is not on the page, and how much of it."""
    notes = []
    if evaluated > len(test):
        notes.append(f"{evaluated - len(test):,} of {evaluated:,} evaluated studies: no room; all are in evaluation/.")
    if sampled.studies > len(training):
        notes.append(
            f"{sampled.studies - len(training):,} of {sampled.studies:,} sampled training studies; all are in "
            "completions/."
        )
    if sampled.steps > sampled.steps_read:
        notes.append(f"{sampled.steps - sampled.steps_read:,} of {sampled.steps:,} steps of completions were not read.")
    without = sum(not own["images"] for own in (*test, *training))
    if without:
        notes.append(f"the radiographs of {without:,} of the {len(test) + len(training):,} studies shown.")
    if pictures.unreadable:
        notes.append(
            f"{len(pictures.unreadable):,} radiographs that could not be read, the first {pictures.unreadable[0]}."
        )
    if training:
        notes.append("of a training study, steps beyond 12 and samples beyond 8 a step.")
    return notes


def _banner(cards: Sequence[dict[str, Any]], studies: Mapping[str, Study]) -> str:
    """Whose data it is: `patient`, `phantoms` or `none`."""
    if not cards:
        return "none"
    return "phantoms" if all(own["id"] in studies and studies[own["id"]].rendered for own in cards) else "patient"
