"""Runs made by code for the page: a small one, and one of thousands of studies with texts that try to break out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrg_r1.evaluation.evaluate import summarise, write_evaluation
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.types import Study, StudyImage

EVIL = "<script>alert('x')</script> the heart & <b>lungs"
Values = Sequence[int | None]


def labels(**said: int) -> list[int | None]:
    """14 file values: `labels(Cardiomegaly=1, Lung_Lesion=0)`."""
    return [said.get(name.replace(" ", "_")) for name in OBSERVATIONS]


def write_metrics(run: Path, steps: int, *, tail: str = "") -> None:
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": step,
            "reward/total": 0.4 + 0.002 * step,
            "reward/constant": 0.3,
            "loss": 1.0 / (step + 1),
            "policy/kl": 0.001 * step,
            "novel/thing": float(step % 3),
            "validation/disease_micro13": 0.5 + 0.01 * step if step % 25 == 24 else None,
            "time/rollout": 0.25 + 0.01 * (step % 2),
        }
        for step in range(steps)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")


def prediction(
    study: Study, text: str, said: Values, wanted: Values, *, total: float = 0.5, report: str | None = "as the text"
) -> dict[str, Any]:
    return {
        "id": study.id,
        "text": text,
        "report": text if report == "as the text" else report,
        "reference": study.report,
        "ended": True,
        "total": total,
        "terms": {"mccs": total, "format": 1.0},
        "constant": {"total": 0.25},
        "labels": list(said),
        "reference_labels": list(wanted),
        "drawn": None,
    }


def write_evaluated(
    run: Path, name: str, rows: list[dict[str, Any]], studies: Sequence[Study], **more: Any
) -> dict[str, Any]:
    result = summarise(rows, studies, train=None, seed=0, bootstrap_samples=20) | more
    write_evaluation(run / "evaluation", name, result, rows)
    return result


def completion(
    step: int, study: Study, member: int, text: str, said: Values | None, *, total: float = 0.5
) -> dict[str, Any]:
    return {
        "step": step,
        "study": study.id,
        "member": member,
        "text": text,
        "report": None if said is None else text,
        "ended": True,
        "tokens": 7,
        "total": total,
        "terms": {"mccs": total, "format": 1.0},
        "labels": said,
    }


def write_completions(run: Path, step: int, rows: list[dict[str, Any]], *, rank: int = 0) -> Path:
    path = run / "completions" / f"step_{step:06d}_rank{rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def noise_study(
    folder: Path, name: str, image: Path, *, report: str, rendered: bool = False, split: str = "test"
) -> Study:
    return Study(
        id=name,
        patient_id=f"p-{name}",
        images=(StudyImage(image, "frontal"),),
        report=report,
        split=split,
        rendered=rendered,
    )


def large_run(folder: Path, *, studies: int = 2000) -> tuple[Path, list[Study]]:
    """A run of `studies` test studies, most with a text that tries to break out, one of them far too long; and 40
    training studies, one of which is sampled in each of 12 steps. Noise does not compress: the radiographs and the
    texts each would pass the page's bound.
    """
    rng = np.random.default_rng(0)
    images = []
    for number in range(70):
        path = folder / f"noise-{number}.bmp"
        Image.fromarray(rng.integers(0, 255, (384, 384), dtype=np.uint8)).save(path)
        images.append(path)
    hostile = (
        EVIL,
        "</script><img src=x onerror=alert(1)>",
        "<!-- <script> unclosed <i",
        "naïve ☃ 胸部 \u2028 \ud83d\ude00 {{ 7 * 7 }}",
        "plain words",
    )
    filler = "The lungs are clear & the heart is < 15 cm wide. No pneumothorax is seen. " * 14
    run, test = folder / "large", []
    before, after = [], []
    for number in range(studies):
        study = noise_study(folder, f"study-{number:05d}", images[number % 70], report=f"Reference {number}. {filler}")
        wanted = labels(Cardiomegaly=1, Pneumothorax=0, **({"Edema": 1} if number % 2 else {}))
        said = labels(Cardiomegaly=1, Edema=1, Fracture=1) if number % 3 else labels(Cardiomegaly=0)
        text = f"{hostile[number % 5]} {'z' * 60_000 if number == 7 else ''} number-{number}-after {filler}"
        before.append(prediction(study, f"before {number} {filler}", labels(), wanted, total=0.1))
        after.append(prediction(study, text, said, wanted, total=(number % 100) / 100))
        test.append(study)
    write_metrics(run, 3000, tail='{"step": 3000, "rew')
    write_evaluated(run, "test_before", before, test)
    write_evaluated(run, "test", after, test)
    train = [noise_study(folder, f"train-{n:03d}", images[n], report="No effusion.", split="train") for n in range(40)]
    for step in range(12):
        here = [train[0], *train[1 + 3 * step : 4 + 3 * step]]
        rows = [
            completion(step, s, g, f"<b>step {step} member {g}</b>", labels(Pleural_Effusion=g % 2), total=g / 4)
            for s in here
            for g in range(4)
        ]
        write_completions(run, step, rows)
    thought = completion(
        12, train[37], 0, "<think>the angle is blunted</think><report>Effusion.</report>", labels(Pleural_Effusion=1)
    )
    write_completions(run, 12, [thought | {"report": "Effusion."}])
    return run, [*test, *train]


def by_radeval(mean: float, *, name: str = "radgraph_simple", **more: Any) -> dict[str, Any]:
    """What an evaluation holds of RadEval's metrics."""
    return {
        "package": "radeval 2.2.1",
        "python": "3.11.2",
        "variants_of": "radeval 2.2.1",
        "metrics": {
            "radgraph": {"variant": "RadGraph-XL & <simple>", "weights_sha256": "5eed" * 16},
            "bleu": {"variant": "sacreBLEU", "weights_sha256": None},
        },
        "scores": {
            name: {"mean": mean, "ci": [mean - 0.01, mean + 0.01]},
            "bleu": {"mean": 0.0625, "ci": [0.0125, 0.1875]},
        },
        "metric_of": {name: "radgraph", "bleu": "bleu"},
        "left_out": {},
        "studies": 1234,
        "references_sha256": "0" * 64,
        **more,
    }
