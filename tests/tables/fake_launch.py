"""Stands in for the DeepSpeed launcher: takes the command line of a row and leaves what a run leaves, or fails where it
is told to.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from mrg_r1.config.recipe import load_recipe


def main() -> None:
    port, script, recipe_file, *overrides = sys.argv[2:]
    assert sys.argv[1] == "--master_port" and int(port) > 0
    recipe = load_recipe(Path(recipe_file), overrides)
    run = recipe.output_dir
    with open(run.parent / "started.txt", "a") as log:
        log.write(f"{time.monotonic()} begin {run.name}\n")
    time.sleep(recipe.optimizer.learning_rate)  # seconds, in the tests
    if recipe.grpo.beta == 0.9:
        print("the labeler has died")
        sys.exit(3)
    right = recipe.grpo.group_size  # so many of ten studies get the right report
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    for name, hits in (("test_before", 2), ("test", right)):
        leave_evaluation(run, name, hits)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": k, "groups/zero_signal": 0.1 * k}) + "\n" for k in range(3))
    )
    (run / "environment.json").write_text(json.dumps({"commit": "abc"}))
    asked = {"sft.max_cpu_seconds": recipe.sft.max_cpu_seconds, "script": script, "adapter": str(recipe.policy.adapter)}
    (run / "summary.json").write_text(json.dumps({"status": "complete", "training_cpu_seconds": 12.5, "asked": asked}))
    with open(run.parent / "started.txt", "a") as log:
        log.write(f"{time.monotonic()} end {run.name}\n")


def leave_evaluation(run: Path, name: str, hits: int) -> None:
    """Ten studies with an effusion each, of which the first `hits` reports say so; the truth of the last one is that
    there is none.
    """
    effusion, nothing = [None] * 9 + [1] + [None] * 4, [None] * 14
    rows = [
        {
            "labels": effusion if study < hits else nothing,
            "reference_labels": effusion,
            "drawn": effusion if study < 9 else [0] * 14,
            "report": "Pleural effusion." if study < hits else None,
            "reference": "Pleural effusion.",
        }
        for study in range(10)
    ]
    (run / "evaluation" / f"{name}_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "evaluation" / f"{name}.json").write_text(json.dumps({"distinct_share": 0.1}))


if __name__ == "__main__":
    main()
