"""What was sampled, each report with its terms and labels: patient data, which never leaves the machine."""

from __future__ import annotations

import json
from pathlib import Path

from mrg_r1.files import atomically
from mrg_r1.labels.observations import values_of_classes
from mrg_r1.types import Completions, Prompts, Rewards


def write_completions(
    directory: Path, *, step: int, rank: int, prompts: Prompts, completions: Completions, rewards: Rewards
) -> None:
    """Write this rank's completions of a step to `directory/step_NNNNNN_rankR.jsonl`, one report a line.

    A step that is repeated after a resume writes the same file again, and clears what a kill left half-written of it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lengths = completions.lengths.tolist()
    path = directory / f"step_{step:06d}_rank{rank}.jsonl"
    for leftover in directory.glob(f".{path.name}.*.tmp"):  # this rank alone writes it, so its writer is gone
        leftover.unlink(missing_ok=True)
    # a lone surrogate comes out as JSON escapes it
    with (
        atomically(path, synced=False) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for b, study_id in enumerate(prompts.study_ids):
            for g, text in enumerate(completions.texts[b]):
                labels = rewards.labels[b, g].tolist()
                line = {
                    "step": step,
                    "study": study_id,
                    "member": g,
                    "text": text,
                    "report": rewards.report_texts[b][g],
                    "ended": bool(completions.ended[b, g]),
                    "tokens": lengths[b][g],
                    "total": round(float(rewards.total[b, g]), 6),
                    "terms": {name: round(float(values[b, g]), 6) for name, values in rewards.terms.items()},
                    "labels": values_of_classes(labels) if labels[0] >= 0 else None,
                }
                if rewards.contradictions is not None and labels[0] >= 0:
                    line["contradictions"] = int(rewards.contradictions[b, g])
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
