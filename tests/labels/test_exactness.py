"""The published checkpoint's layout and size over real reports: our labels are those of the plainest implementation
there is.

The published weights themselves may not be passed on, so these are random ones with fitted heads. Heads drawn at random
would not do: either a constant offset decides every class, whatever the report, or classes are ties within the rounding
of bfloat16, as a trained labeler's are not. So the heads are fitted (ridge) to words of the reports: logits spread over
10, and labels differ between reports.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from mrg_r1.labels.convert import convert
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.observations import CLASSES_PER_OBSERVATION
from tests.shared_data import shared_data

SIZE, HIDDEN = 30522, 768  # bert-base-uncased's
GAP = 1e-4  # logits nearer than this may fall either way
WORDS = (
    "heart enlarged opacity granuloma mediastinal focal disease atelectasis pneumothorax effusion calcified spine "
    "size normal"
).split()


@dataclass(frozen=True)
class Published:
    """A checkpoint, its tokenizer's directory, and what the plain implementation makes of reports."""

    path: Path
    vocabulary: Path
    texts: list[str]
    logits: list[Tensor]  # 14 of [N, 4 or 2] float32

    @property
    def classes(self) -> np.ndarray:
        return np.stack([part.argmax(1).numpy() for part in self.logits], axis=1)

    @property
    def clear(self) -> np.ndarray:
        """[N, 14]: where the best class leads by more than `GAP`."""
        best = [part.topk(2, dim=1).values for part in self.logits]
        return np.stack([(two[:, 0] - two[:, 1] > GAP).numpy() for two in best], axis=1)


def real_reports(count: int) -> list[str]:
    """Reports of every length: so many, evenly drawn from all of IU X-Ray's in order of length, the longest
    among them.
    """
    splits = json.loads((shared_data() / "iu_xray" / "annotation.json").read_text(encoding="utf-8"))
    reports = sorted(
        {study["report"] for studies in splits.values() for study in studies}, key=lambda text: (len(text), text)
    )
    return [reports[round(place)] for place in np.linspace(0, len(reports) - 1, count)]


def write_vocabulary(folder: Path, texts: list[str]) -> None:
    """As many entries as bert-base-uncased, special tokens where it has them."""
    words = sorted({word for text in texts for word in re.findall(r"[a-z0-9]+|[^\w\s]", text.lower())})
    known = words[::8] + [
        piece for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for piece in (letter, f"##{letter}")
    ]
    # seven words of eight: whole where they are frequent, else spelled
    rare = [word for word in words if word not in set(known)]
    entries = ["[PAD]", *(f"[unused{index}]" for index in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries += dict.fromkeys(known + [word for word in rare if sum(word in text.lower() for text in texts) > 1])
    entries += [f"filler{index}" for index in range(SIZE - len(entries))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")


def word_class(text: str, observation: int) -> int:
    """The class that an observation's head is fitted to: what word stands in the report, and where."""
    words = re.findall(r"[a-z]+", text.lower())
    if WORDS[observation] not in words:
        return 0
    return 1 + words.index(WORDS[observation]) % (CLASSES_PER_OBSERVATION[observation] - 1)


def fitted_head(cls: Tensor, classes: list[int], width: int) -> nn.Linear:
    """Ridge regression of 10 x one-hot classes on [CLS]'s hidden states [N, H]."""
    aims = 10.0 * nn.functional.one_hot(torch.tensor(classes), width)
    centre, mean = cls.mean(0), aims.mean(0)
    x = cls - centre
    head = nn.Linear(cls.shape[1], width)
    with torch.no_grad():
        head.weight.copy_((x.T @ torch.linalg.solve(x @ x.T + torch.eye(len(x)), aims - mean)).T)
        head.bias.copy_(mean - head.weight @ centre)
    return head


@torch.no_grad()
def publish(folder: Path, count: int) -> Published:
    """Write a checkpoint in the published layout, and label `count` reports plainly: one at a time, 14 heads, no batch,
    no padding.
    """
    texts = ["", *real_reports(count - 1)]
    write_vocabulary(folder / "words", texts)
    words = BertTokenizer.from_pretrained(str(folder / "words"))
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=SIZE)).eval()
    cls = torch.cat(
        [
            bert(**words(text, truncation=True, max_length=512, return_tensors="pt")).last_hidden_state[:, 0]
            for text in texts
        ]
    )
    heads = [
        fitted_head(cls, [word_class(text, index) for text in texts], width)
        for index, width in enumerate(CLASSES_PER_OBSERVATION)
    ]
    state = {f"module.bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    for index, head in enumerate(heads):
        state |= {f"module.linear_heads.{index}.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}}, folder / "chexbert.pth")
    return Published(folder / "chexbert.pth", folder / "words", texts, [head(cls) for head in heads])


# Of bert-base's size, since that is what is loaded: seconds, once.
@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published"), 24)


def check(one: Published, logits: Tensor, *, agreement: float) -> None:
    """Classes of logits [N, 14, 4] against the plain ones: all of the clear ones, or a share of all."""
    said = logits.argmax(2).numpy()
    usual = np.array([np.bincount(column).argmax() for column in one.classes.T])
    assert (one.classes != usual).mean() > 0.1 and one.clear.mean() > 0.99  # else agreement would say nothing
    if agreement == 1.0:
        assert (said == one.classes)[one.clear].all()
    else:
        assert (said == one.classes).mean() >= agreement


@pytest.mark.slow
def test_labels_and_logits_are_the_plain_implementations(published: Published) -> None:
    labeler = Labeler.load(published.path, tokenizer=str(published.vocabulary))
    assert labeler.model.bert.config.num_hidden_layers == 12 and labeler.model.bert.config.vocab_size == SIZE
    logits = labeler.logits(published.texts)
    check(published, logits, agreement=1.0)
    for index, expected in enumerate(published.logits):
        torch.testing.assert_close(logits[:, index, : expected.shape[1]], expected, rtol=1e-5, atol=GAP / 2)


@pytest.mark.slow
def test_more_than_a_hundred_reports_in_every_dtype_and_format(tmp_path: Path) -> None:
    one = publish(tmp_path, 120)
    said = convert(one.path, tmp_path / "chexbert.safetensors")
    assert convert(one.path, tmp_path / "directory", tokenizer=str(one.vocabulary)) == said
    check(one, Labeler.load(one.path, tokenizer=str(one.vocabulary)).logits(one.texts), agreement=1.0)
    loaded = Labeler.load(tmp_path / "chexbert.safetensors", tokenizer=str(one.vocabulary), dtype=torch.float16)
    assert loaded.fingerprint == said
    check(one, loaded.logits(one.texts), agreement=0.995)
    check(one, Labeler.load(tmp_path / "directory", dtype=torch.bfloat16).logits(one.texts), agreement=0.995)
