"""The worker of the labeler's cases: labelling by this project, and the plain ways of it, with one random checkpoint of
BERT-base's size.

`python -m benchmarks.labeler FOLDER TASK` serves one unit of TASK (JSON of `benchmarks.task.Task`) a line; see
`benchmarks.workers`. The published weights may not be passed on; random ones cost the same. Every contender of a case
labels the same texts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import models
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig

from benchmarks import task as same
from benchmarks.task import Task
from benchmarks.workers import Channel, Phases, serve
from mrg_r1.labels import labeler as labelers
from mrg_r1.labels.chexbert import MAX_TOKENS, CheXbert
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.tokenizer import bert_tokenizer
from mrg_r1.phantom.sampler import sample_study

VOCABULARY = 30522  # bert-base-uncased's
PADDED_BATCH = 8  # reports in a batch that is padded to 512; more are no faster


def find_reports() -> tuple[list[str], str]:
    """Distinct reports in order of length, and where they are from: IU X-Ray where it is at hand, else phantoms."""
    folder = Path(os.environ.get("MRG_R1_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    annotation = folder / "iu_xray" / "annotation.json"
    if annotation.is_file():
        splits = json.loads(annotation.read_text(encoding="utf-8"))
        reports, source = {study["report"] for studies in splits.values() for study in studies}, "IU X-Ray"
    else:
        reports, source = {sample_study("five", same.SEED, index).report for index in range(2000)}, "phantoms"
    return sorted(reports, key=lambda text: (len(text), text)), source


def drawn(reports: Sequence[str], count: int) -> list[str]:
    """So many reports, evenly drawn from the ordered ones: any number of them has the same spread of lengths."""
    return [reports[int(place)] for place in (np.arange(count) + 0.5) * len(reports) / count]


def make_labeler(reports: Sequence[str], config: BertConfig | None = None) -> Labeler:
    """CheXbert with random weights and a vocabulary in which every word of the reports is one piece, filled up to the
    model's size.
    """
    torch.manual_seed(same.SEED)
    model = CheXbert(config or BertConfig(vocab_size=VOCABULARY))
    words = sorted({word for text in reports for word in re.findall(r"[a-z0-9]+|[^\w\s]", text.lower())})
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words][: model.bert.config.vocab_size]
    tokenizer = bert_tokenizer(
        models.WordPiece({entry: index for index, entry in enumerate(entries)}, unk_token="[UNK]")
    )
    return Labeler(model, tokenizer, name="random BERT-base")


def label_singly(labeler: Labeler, texts: Sequence[str]) -> Tensor:
    """One report a pass through transformers' module, without padding, and 14 heads one after another: classes
    [N, 14].
    """
    classes = []
    for row in labeler.encode(texts):
        ids = torch.tensor([row])
        cls = labeler.model.bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
        classes.append(torch.stack([head(cls).argmax(1) for head in labeler.model.linear_heads], dim=1))
    return torch.cat(classes)


def label_padded(labeler: Labeler, texts: Sequence[str], length: int = MAX_TOKENS) -> Tensor:
    """Batches padded to `length` whatever they hold: classes [N, 14]."""
    rows, classes = labeler.encode(texts), []
    for start in range(0, len(rows), PADDED_BATCH):
        ids, mask = labeler.pad(rows[start : start + PADDED_BATCH])
        ids, mask = (F.pad(part, (0, length - part.shape[1])) for part in (ids, mask))  # [PAD] is 0
        cls = labeler.model.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        classes.append(torch.stack([head(cls).argmax(1) for head in labeler.model.linear_heads], dim=1))
    return torch.cat(classes)


def label_every(labeler: Labeler, texts: Sequence[str]) -> Tensor:
    """As this project labels, but each text anew however often it stands there: classes [N, 14]."""
    with patch.object(labelers, "_distinct", lambda texts: (list(texts), list(range(len(texts))))):
        return torch.from_numpy(labeler.label(texts))


UNITS: dict[str, Callable[[Labeler, Sequence[str]], Tensor]] = {
    "label": lambda labeler, texts: torch.from_numpy(labeler.label(texts)),
    "label_singly": label_singly,
    "label_padded": label_padded,
    "label_every": label_every,
}


def make_unit(labeler: Labeler, texts: Sequence[str], name: str) -> Callable[[], Phases]:
    """The unit of that name over `texts`.

    Raises:
        ValueError: no such unit.
    """
    if name not in UNITS:
        raise ValueError(f"unit {name!r}; known are {', '.join(UNITS)}")

    @torch.no_grad()
    def unit() -> Phases:
        classes = UNITS[name](labeler, texts)
        if classes.shape != (len(texts), 14):
            raise RuntimeError(f"classes of shape {tuple(classes.shape)} for {len(texts)} texts")
        return {}

    return unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the bench's; nothing in it is used")
    parser.add_argument("task", type=Task.from_json, help="JSON of a Task")
    arguments = parser.parse_args()
    channel, task = Channel(), arguments.task
    torch.set_num_threads(1)
    reports, source = find_reports()
    labeler = make_labeler(reports)
    texts = drawn(reports, task.reports) * task.copies
    settings = {
        "reports": task.reports,
        "copies": task.copies,
        "reports_from": source,
        "mean_tokens": round(float(np.mean([len(row) for row in labeler.encode(texts)])), 1),
        "parameters": sum(parameter.numel() for parameter in labeler.model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in ("mrg-r1", "torch", "transformers")},
    }
    serve(channel, make_unit(labeler, texts, task.unit), settings)


if __name__ == "__main__":
    main()
