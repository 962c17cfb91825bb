"""What the tests of the labeler share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrg_r1.labels.labeler import Labeler
from tests.labels.tiny import VOCABULARY, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def labeler() -> Labeler:
    return Labeler(tiny_model(), tiny_tokenizer(), name="tiny")


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder
