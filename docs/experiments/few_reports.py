"""Of a prepared IU X-Ray manifest, 300 train reports that keep their words; all others get labels alone (PLAN.md, the
fifth part again). `make iu-labels` calls it.

few_reports.py DATA GRAMMAR OUT SEED: DATA/manifest.jsonl and GRAMMAR/manifest.jsonl are read, and written are

OUT/manifest.jsonl: split `sft`, the films of 300 patients with their reports; split `train`, the other train films with
`labels.said` and no word; val and test as they are.
OUT/mixed.jsonl: the same, and in `sft` as many studies of the grammar beside the real ones.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

REPORTS = 300  # patients of IU's train split have one report each
WORDS = ("report", "findings", "impression", "indication", "comparison")


def read(folder: Path, out: Path) -> list[dict[str, Any]]:
    """The studies of a manifest, their images as seen from `out`."""
    with (folder / "manifest.jsonl").open(encoding="utf-8") as lines:
        studies: list[dict[str, Any]] = [json.loads(line) for line in lines]
    for study in studies:
        for image in study["images"]:
            image["path"] = os.path.relpath(folder / image["path"], out)
    return studies


def main(data: Path, grammar: Path, out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    studies = read(data, out)
    patients = sorted({study["patient_id"] for study in studies if study["split"] == "train"})
    with_words = set(random.Random(seed).sample(patients, REPORTS))
    for study in studies:
        if study["split"] != "train":
            continue
        if study["patient_id"] in with_words:
            study["split"] = "sft"
        else:
            study.update(dict.fromkeys(WORDS))
    real = sum(study["split"] == "sft" for study in studies)
    others = [study for study in read(grammar, out) if study["split"] == "train"]
    beside = [study | {"split": "sft"} for study in random.Random(seed).sample(others, real)]
    for name, content in (("mixed", [*studies, *beside]), ("manifest", studies)):
        text = "".join(json.dumps(study) + "\n" for study in content)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{out}: {REPORTS} reports over {real} films keep their words; {len(beside)} of the grammar beside them")


if __name__ == "__main__":
    data_folder, grammar_folder, output, chosen_seed = sys.argv[1:]
    main(Path(data_folder), Path(grammar_folder), Path(output), int(chosen_seed))
