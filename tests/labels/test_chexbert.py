"""CheXbert: one product for all heads, strict loading, and texts that are labelled one report at a time (trap 23)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel

from mrg_r1.labels import chexbert
from mrg_r1.labels.chexbert import CheXbert, Labeler, bert_tokenizer
from mrg_r1.labels.observations import CLASSES_PER_OBSERVATION

WORDS = "no evidence of pleural effusion or pneumothorax the heart is enlarged lungs are clear left right mild edema . , ##s ##ion".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PAD, UNK, CLS, SEP = range(4)


def tiny_config(**changes: int) -> BertConfig:
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96}
    return BertConfig(**{**sizes, **changes}, initializer_range=0.3)  # large, so that different texts get different classes


def tiny_tokenizer() -> Tokenizer:
    return bert_tokenizer(models.WordPiece({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))


def tiny_model(seed: int = 0, **changes: int) -> CheXbert:
    torch.manual_seed(seed)
    model = CheXbert(tiny_config(**changes))
    for head in model.linear_heads:
        torch.nn.init.normal_(head.get_parameter("weight"))
    return model.eval()


@pytest.fixture(scope="module")
def labeler() -> Labeler:
    return Labeler(tiny_model(), tiny_tokenizer(), name="tiny")


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


def published_state(model: CheXbert) -> dict[str, torch.Tensor]:
    """As the authors saved it: DataParallel's prefix, BERT's pooler, and a buffer of older transformers."""
    width, positions = model.bert.config.hidden_size, model.bert.config.max_position_embeddings
    extra = {
        "bert.pooler.dense.weight": torch.randn(width, width),
        "bert.pooler.dense.bias": torch.randn(width),
        "bert.embeddings.position_ids": torch.arange(positions)[None],
    }
    return {f"module.{name}": tensor.clone() for name, tensor in {**model.state_dict(), **extra}.items()}


def published_file(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    path = folder / "chexbert.pth"
    torch.save({"epoch": 3, "model_state_dict": state}, path)
    return path


def test_heads_equal_the_published_formulation() -> None:
    model = tiny_model()
    bert = BertModel(tiny_config())
    bert.load_state_dict(model.bert.state_dict(), strict=False)  # it has a pooler of its own, unused here too
    ids = torch.randint(4, len(VOCABULARY), (5, 9))
    mask = torch.ones_like(ids)
    mask[1:, 6:] = 0
    cls = bert.eval()(ids, attention_mask=mask)[0][:, 0]
    logits = model(ids, mask)
    assert logits.shape == (5, 14, 4)
    for index, classes in enumerate(CLASSES_PER_OBSERVATION):
        torch.testing.assert_close(logits[:, index, :classes], model.linear_heads[index](cls), rtol=1e-5, atol=1e-5)
    assert torch.isneginf(logits[:, 13, 2:]).all() and torch.isfinite(logits[:, :13]).all()


def test_no_finding_is_never_negative_or_uncertain(labeler: Labeler) -> None:
    model = tiny_model(seed=1)
    classes = Labeler(model, tiny_tokenizer(), name="other").label([f"{word} lungs" for word in WORDS])
    assert set(classes[:, 13].tolist()) <= {0, 1}


@given(st.lists(st.lists(st.sampled_from(WORDS[:-2]), max_size=30).map(" ".join), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_a_batch_equals_one_by_one(labeler: Labeler, texts: list[str]) -> None:
    together = labeler.logits(texts)
    alone = torch.cat([labeler.logits([text]) for text in texts])
    finite = torch.isfinite(alone)
    torch.testing.assert_close(together[finite], alone[finite], rtol=1e-3, atol=5e-3)
    assert (finite == torch.isfinite(together)).all()


def test_a_text_is_one_report_whatever_stands_beside_it(labeler: Labeler) -> None:
    texts = ["no pleural effusion", "the heart is enlarged .", "lungs are clear", "", "mild edema , left"]
    classes = labeler.label(texts)
    assert classes.shape == (5, 14) and classes.dtype == np.int64
    assert len({tuple(row) for row in classes.tolist()}) > 1
    for text, row in zip(texts, classes, strict=True):
        assert labeler.label([text]).tolist() == [row.tolist()]
    assert labeler.label(texts[::-1])[::-1].tolist() == classes.tolist()


def test_ids_are_the_words_between_cls_and_sep(labeler: Labeler) -> None:
    of = {word: index for index, word in enumerate(VOCABULARY)}
    rows = labeler.encode(["No  pleural\n\teffusions.", "", " \n "])
    assert rows[0] == [CLS, of["no"], of["pleural"], of["effusion"], of["##s"], of["."], SEP]
    assert rows[1] == rows[2] == [CLS, SEP]


def test_a_long_report_is_cut_at_512_with_sep_last(labeler: Labeler) -> None:
    of = {word: index for index, word in enumerate(VOCABULARY)}
    (row,) = labeler.encode([" ".join(WORDS[index % 10] for index in range(600))])
    assert len(row) == 512
    assert row == [CLS, *(of[WORDS[index % 10]] for index in range(510)), SEP]
    (exact,) = labeler.encode([" ".join(["edema"] * 510)])
    assert exact == [CLS, *[of["edema"]] * 510, SEP]
    text = " ".join(["edema"] * 600)
    assert labeler.label([text, "lungs are clear"])[0].tolist() == labeler.label([" ".join(["edema"] * 510)])[0].tolist()


def test_a_model_of_fewer_positions_cuts_at_its_own(tmp_path: Path) -> None:
    small = Labeler(tiny_model(max_position_embeddings=16), tiny_tokenizer(), name="short")
    assert small.max_tokens == 16
    (row,) = small.encode([" ".join(["edema"] * 40)])
    assert len(row) == 16 and row[-1] == SEP
    assert small.label([" ".join(["edema"] * 40)]).shape == (1, 14)


def test_stored_truncation_and_padding_are_not_followed(tmp_path: Path) -> None:
    words = tiny_tokenizer()
    words.enable_truncation(8)
    words.enable_padding(length=128)
    rows = Labeler(tiny_model(), words, name="tiny").encode([" ".join(["edema"] * 40), "edema"])
    assert [len(row) for row in rows] == [42, 3]


def test_equal_texts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    labeler = Labeler(model, tiny_tokenizer(), name="tiny")
    rows: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, mask: (rows.append(len(ids)), forward(ids, mask))[1])
    classes = labeler.label(["mild edema", "lungs are clear", "mild  edema", " mild edema\n"])
    assert sum(rows) == 2
    assert classes[0].tolist() == classes[2].tolist() == classes[3].tolist()


def test_batches_keep_to_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chexbert, "TOKENS_PER_BATCH", 64)
    model = tiny_model()
    labeler = Labeler(model, tiny_tokenizer(), name="tiny")
    texts = [" ".join(["edema"] * (1 + 7 * index % 50)) for index in range(40)] + [" ".join(["edema"] * 100)]
    shapes: list[torch.Size] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, mask: (shapes.append(ids.shape), forward(ids, mask))[1])
    classes = labeler.label(texts)
    assert all(rows * length <= 64 or rows == 1 for rows, length in shapes) and len(shapes) > 5
    monkeypatch.setattr(chexbert, "TOKENS_PER_BATCH", 8192)
    assert labeler.label(texts).tolist() == classes.tolist()


def test_no_text_gives_no_row_and_a_bare_string_is_refused(labeler: Labeler) -> None:
    assert labeler.label([]).shape == (0, 14)
    with pytest.raises(TypeError, match="one string"):
        labeler.label("no effusion")
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        labeler.label(["no effusion", None])  # type: ignore[list-item]


def test_a_saved_labeler_loads_with_the_same_answers_and_fingerprint(labeler: Labeler, tmp_path: Path) -> None:
    labeler.save(tmp_path / "mine")
    random_state = torch.random.get_rng_state()
    loaded = Labeler.load(tmp_path / "mine")
    assert torch.equal(torch.random.get_rng_state(), random_state)
    texts = ["no pleural effusion", "the heart is enlarged", ""]
    assert loaded.name == "mine" and loaded.fingerprint == labeler.fingerprint
    torch.testing.assert_close(loaded.logits(texts), labeler.logits(texts), rtol=0, atol=0)
    assert {path.suffix for path in (tmp_path / "mine").iterdir()} == {".json", ".safetensors"}
    half = Labeler.load(tmp_path / "mine", dtype=torch.bfloat16)
    assert half.fingerprint == loaded.fingerprint and half.logits(texts).dtype == torch.float32


def test_other_weights_have_another_fingerprint() -> None:
    model = tiny_model()
    before = Labeler(model, tiny_tokenizer(), name="a").fingerprint
    with torch.no_grad():
        model.linear_heads[3].get_parameter("bias")[0] += 1e-3
    assert Labeler(model, tiny_tokenizer(), name="a").fingerprint != before
    assert len(before) == 16 and int(before, 16) >= 0


def test_fingerprint_is_the_weights_sha256(tmp_path: Path) -> None:
    model = tiny_model()
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert Labeler(model, tiny_tokenizer(), name="a").fingerprint == digest.hexdigest()[:16]


def test_a_published_checkpoint_loads_and_labels(labeler: Labeler, tmp_path: Path, tokenizer_directory: Path) -> None:
    path = published_file(tmp_path, published_state(labeler.model))
    loaded = Labeler.load(path, tokenizer=str(tokenizer_directory))
    assert loaded.fingerprint == labeler.fingerprint
    texts = ["No pleural effusion.", "the heart is enlarged", ""]
    torch.testing.assert_close(loaded.logits(texts), labeler.logits(texts), rtol=0, atol=0)
    assert loaded.name == "chexbert.pth"


def test_a_tokenizer_of_fewer_entries_than_embeddings_is_warned_of(tmp_path: Path, tokenizer_directory: Path) -> None:
    path = published_file(tmp_path, published_state(tiny_model(vocab_size=40)))
    with pytest.warns(UserWarning, match="27 entries and the checkpoint 40 embeddings"):
        Labeler.load(path, tokenizer=str(tokenizer_directory))


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(name)


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("module.linear_heads.4.bias"), r"missing linear_heads\.4\.bias"),
        (without("module.bert.encoder.layer.0.output.dense.weight"), r"missing bert\.encoder\.layer\.0\.output\.dense\.weight"),
        (without("module.bert.embeddings.word_embeddings.weight"), r"missing bert\.embeddings\.word_embeddings\.weight"),
        (replaced("module.linear_heads.14.bias", torch.zeros(4)), r"unexpected linear_heads\.14\.bias"),
        (replaced("module.classifier.weight", torch.zeros(4)), r"unexpected classifier\.weight"),
        (replaced("module.linear_heads.13.weight", torch.zeros(4, 64)), r"linear_heads\.13\.weight has shape \(4, 64\), expected \(2,"),
        (replaced("module.linear_heads.0.weight", torch.zeros(3, 64)), r"linear_heads\.0\.weight has shape \(3, 64\), expected \(4, 64\)"),
        (replaced("bert.embeddings.word_embeddings.weight", torch.zeros(4, 64)), r"stands twice"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    labeler: Labeler, tmp_path: Path, tokenizer_directory: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    state = published_state(labeler.model)
    change(state)
    with pytest.raises(ValueError, match=message):
        Labeler.load(published_file(tmp_path, state), tokenizer=str(tokenizer_directory))


class Payload:
    """What a hostile checkpoint does: a command runs as soon as it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_a_pickled_object_is_refused_and_never_run(labeler: Labeler, tmp_path: Path, tokenizer_directory: Path) -> None:
    witness = tmp_path / "ran"
    path = tmp_path / "chexbert.pth"
    torch.save({"model_state_dict": published_state(labeler.model), "note": Payload(witness)}, path)
    with pytest.raises(ValueError, match=r"chexbert\.pth: refused: .*mkdir") as refusal:
        Labeler.load(path, tokenizer=str(tokenizer_directory))
    assert not witness.exists()
    assert "weights_only" not in str(refusal.value)  # torch's own message tells the user how to run it all the same


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chexbert.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"chexbert\.pth: refused"):
        Labeler.load(path)


def test_a_dict_without_model_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state": {}}, path)
    with pytest.raises(ValueError, match=r"weights\.pth: no `model_state_dict` \(found \['state'\]\)"):
        Labeler.load(path)


def test_our_directory_is_read_as_strictly(labeler: Labeler, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "mine"
    labeler.save(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "linear_heads.7.weight"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing linear_heads\.7\.weight"):
        Labeler.load(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Labeler.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        Labeler.load(folder)
    (folder / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    with pytest.raises(ValueError, match="another model"):
        Labeler.load(folder)
    with pytest.raises(FileNotFoundError, match="no labeler here"):
        Labeler.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ([*VOCABULARY[:-1], "Effusion"], "is cased"),
        ([*VOCABULARY, *(f"word{index}" for index in range(9))], "entries and the model"),
        ([*VOCABULARY[:2], "word1", *VOCABULARY[3:]], r"no \[CLS\]"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(labeler: Labeler, tmp_path: Path, vocabulary: list[str], message: str) -> None:
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    path = published_file(tmp_path, published_state(labeler.model))
    with pytest.raises(ValueError, match=message):
        Labeler.load(path, tokenizer=str(folder))


def test_an_uncased_vocabulary_of_the_same_size_but_another_order_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "words"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{index}" for index in range(30518))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    path = published_file(tmp_path, published_state(tiny_model(vocab_size=30522, num_hidden_layers=1)))
    with pytest.raises(ValueError, match="another vocabulary of the same size"):
        Labeler.load(path, tokenizer=str(folder))


def test_offline_a_published_checkpoint_asks_for_a_tokenizer_directory(
    labeler: Labeler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published_file(tmp_path, published_state(labeler.model))

    def unreachable(name: str) -> Tokenizer:
        raise ConnectionError("no route to the hub")

    class Offline:
        from_file = Tokenizer.from_file
        from_pretrained = staticmethod(unreachable)

    monkeypatch.setattr(chexbert, "Tokenizer", Offline)
    with pytest.raises(FileNotFoundError, match=r"'bert-base-uncased' .* offline, give a directory with tokenizer\.json or vocab\.txt"):
        Labeler.load(path)
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Labeler.load(path, tokenizer=str(tmp_path))
