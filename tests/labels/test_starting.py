"""Starting points: random weights that look at neighbours, a BERT as transformers writes it, ours, and the published
file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertModel

from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.starting import read_start, start_local, train_tokenizer
from mrg_r1.labels.training import train_labeler
from tests.labels.test_training import toy_study, write_toy
from tests.labels.tiny import VOCABULARY, published_file, published_state, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def bert(tmp_path: Path) -> BertModel:
    """A plain BERT, and in the folder `bert` what transformers writes of it, with a vocab.txt."""
    torch.manual_seed(1)
    model = BertModel(tiny_config())
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return model


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The BERT of `folder` with other tensors."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_encoder_of(model: CheXbert, bert: BertModel) -> None:
    expected = {name: tensor for name, tensor in bert.state_dict().items() if not name.startswith("pooler.")}
    assert model.bert.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.bert.state_dict().items())


def test_a_plain_bert_gives_its_encoder_and_its_words(tmp_path: Path, bert: BertModel) -> None:
    model, words = read_start(tmp_path / "bert")
    assert_encoder_of(model, bert)
    assert words.encode("Large EFFUSION", add_special_tokens=False).tokens[-1] == "effusion"
    assert Labeler(model, words, name="started").label(["No effusion."]).shape == (1, 14)


def test_pretraining_heads_prefix_old_names_and_old_buffers_are_taken_off(tmp_path: Path, bert: BertModel) -> None:
    whole = BertForPreTraining(tiny_config())
    whole.bert.load_state_dict(bert.state_dict())
    # as bert-base-uncased is stored: a pickle, TensorFlow's names for the layer norms, and a buffer
    stored = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for name, tensor in whole.state_dict().items():
        end = name[name.find("LayerNorm") :] if "LayerNorm" in name else ""
        state[name.removesuffix(end) + stored[end] if end in stored else name] = tensor.clone()
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save(
        {**state, "bert.embeddings.position_ids": torch.arange(512)[None]}, tmp_path / "bert" / "pytorch_model.bin"
    )
    assert any(name.startswith("cls.") for name in state) and any("gamma" in name for name in state)
    assert_encoder_of(read_start(tmp_path / "bert")[0], bert)


def test_weights_in_half_precision_are_trained_in_float32(tmp_path: Path, bert: BertModel) -> None:
    rewritten(tmp_path / "bert", lambda state: {name: tensor.half() for name, tensor in state.items()})
    assert {parameter.dtype for parameter in read_start(tmp_path / "bert")[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {k: v for k, v in state.items() if "layer.1.output.dense.b" not in k},
            r"missing bert\.encoder\.layer\.1\.output",
        ),
        (
            lambda state: {**state, "encoder.adapter.weight": torch.ones(2)},
            r"unexpected bert\.encoder\.adapter\.weight",
        ),
        (
            lambda state: {**state, "embeddings.LayerNorm.bias": torch.ones(3)},
            r"LayerNorm\.bias has shape \(3,\), expected \(64,\)",
        ),
        (
            lambda state: {**state, "embeddings.LayerNorm.gamma": state["embeddings.LayerNorm.weight"] + 1},
            r"embeddings\.LayerNorm\.weight stands twice",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, bert: BertModel, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_start(rewritten(tmp_path / "bert", change))


def test_what_is_no_bert_is_refused(tmp_path: Path, bert: BertModel) -> None:
    folder = tmp_path / "bert"
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_start(tmp_path / "nothing")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    with pytest.raises(ValueError, match="model_type.*'roberta'"):
        read_start(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_start(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*pytorch_model\.bin"):
        read_start(folder)
    torch.save({"weights": tmp_path}, folder / "pytorch_model.bin")  # a pickled object
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        read_start(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_start(folder)


def test_a_bare_cased_vocabulary_keeps_capitals(tmp_path: Path, bert: BertModel) -> None:
    cased = ["Heart" if word == "heart" else word for word in VOCABULARY]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(cased) + "\n", encoding="utf-8")
    words = read_start(tmp_path / "bert")[1]
    assert words.encode("Heart", add_special_tokens=False).tokens == ["Heart"]


def test_ours_and_the_published_file_start_with_their_heads(tmp_path: Path) -> None:
    model = tiny_model(seed=4)
    Labeler(model, tiny_tokenizer(), name="ours").save(tmp_path / "ours")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    published = published_file(tmp_path, published_state(model))
    for started in (read_start(tmp_path / "ours"), read_start(published, str(tmp_path / "words"))):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in started[0].state_dict().items())
        assert started[1].get_vocab() == tiny_tokenizer().get_vocab()


def test_training_from_a_start_improves_it_and_repeats_itself(tmp_path: Path) -> None:
    reports, labels = write_toy(tmp_path, 120)
    train_labeler(reports, labels, tmp_path / "ours", size="tiny", passes=4)
    first = train_labeler(reports, labels, tmp_path / "a", start=tmp_path / "ours", passes=6, seed=2)
    second = train_labeler(reports, labels, tmp_path / "b", start=tmp_path / "ours", passes=6, seed=2)
    assert first["fingerprint"] == second["fingerprint"]
    assert first["curve"][-1]["training_loss"] < first["curve"][0]["training_loss"]
    assert first["size"] is None and first["start"] == str(tmp_path / "ours")
    assert Labeler.load(tmp_path / "a").fingerprint == first["fingerprint"]


def test_a_plain_bert_is_trained_whole_into_a_labeler_that_loads(tmp_path: Path, bert: BertModel) -> None:
    reports, labels = write_toy(tmp_path, 40)
    train_labeler(reports, labels, tmp_path / "labeler", start=tmp_path / "bert", passes=1)
    trained = Labeler.load(tmp_path / "labeler").model.bert.state_dict()
    assert not torch.equal(
        trained["encoder.layer.0.output.dense.weight"], bert.state_dict()["encoder.layer.0.output.dense.weight"]
    )
    assert (
        trained["embeddings.position_embeddings.weight"][400:]
        == bert.state_dict()["embeddings.position_embeddings.weight"][400:]
    ).all()


def test_a_size_or_a_tokenizer_that_would_be_passed_over_is_refused(tmp_path: Path, bert: BertModel) -> None:
    reports, labels = write_toy(tmp_path, 40)
    with pytest.raises(ValueError, match="size 'tiny'"):
        train_labeler(reports, labels, tmp_path / "labeler", size="tiny", start=tmp_path / "bert")
    with pytest.raises(ValueError, match="tokenizer 'words'"):
        train_labeler(reports, labels, tmp_path / "labeler", tokenizer="words")
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        maskless = [word if word != "[MASK]" else "masked" for word in VOCABULARY]
        (tmp_path / "bert" / "vocab.txt").write_text("\n".join(maskless) + "\n", encoding="utf-8")
        train_labeler(reports, labels, tmp_path / "labeler", start=tmp_path / "bert")
    assert not (tmp_path / "labeler").exists()


def test_nothing_is_unknown_to_the_vocabulary_which_is_the_same_every_time() -> None:
    reports = [toy_study(random.Random(seed))[0] for seed in range(50)] + ["Größe: 3 cm, Erguß möglich."]
    tokenizer = train_tokenizer(reports, 200)
    unknown = tokenizer.token_to_id("[UNK]")
    for text in [*reports, "Zyxwvut (qqq) 12-34/56 & <report> don't; jab!"]:
        assert unknown not in tokenizer.encode(text).ids
    assert tokenizer.encode("EFFUSION").tokens == tokenizer.encode("effusion").tokens == ["effusion"]
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == list(range(5))
    for _ in range(3):  # the library numbers the characters in another order each time unless they are given to it
        assert train_tokenizer(reports, 200).get_vocab() == tokenizer.get_vocab()


def test_first_layer_starts_at_the_neighbours() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, intermediate_size=64
    )
    config._attn_implementation = "eager"
    model = CheXbert(config).eval()
    start_local(model)
    ids = torch.randint(5, 50, (1, 60))
    attention = model.bert(input_ids=ids, output_attentions=True).attentions[0][0]  # [heads, 60, 60]
    for head, offset in enumerate((-1, 1, -2, 2, -4, 4, -6, 6)):
        peaks = attention[head, 10:50].argmax(dim=-1) - torch.arange(10, 50)
        assert peaks.float().median() == offset
