"""Labeler files: strict loading in every format, and nothing unpickled but tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from mrg_r1.labels import loading, tokenizer
from mrg_r1.labels.convert import convert
from mrg_r1.labels.labeler import Labeler
from tests.labels.tiny import VOCABULARY, published_file, published_state, tiny_model


def test_a_published_checkpoint_loads_and_labels(labeler: Labeler, tmp_path: Path, tokenizer_directory: Path) -> None:
    path = published_file(tmp_path, published_state(labeler.model))
    loaded = Labeler.load(path, tokenizer=str(tokenizer_directory))
    assert loaded.fingerprint == labeler.fingerprint
    texts = ["No pleural effusion.", "the heart is enlarged", ""]
    torch.testing.assert_close(loaded.logits(texts), labeler.logits(texts), rtol=0, atol=0)
    assert loaded.name == "chexbert.pth"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_safetensors_copy_loads_and_labels(
    labeler: Labeler, tmp_path: Path, tokenizer_directory: Path, prefix: str
) -> None:
    state = {name.replace("module.", prefix): tensor for name, tensor in published_state(labeler.model).items()}
    save_file(state, tmp_path / "chexbert.safetensors")
    loaded = Labeler.load(tmp_path / "chexbert.safetensors", tokenizer=str(tokenizer_directory))
    assert loaded.fingerprint == labeler.fingerprint and loaded.name == "chexbert.safetensors"
    texts = ["No pleural effusion.", "the heart is enlarged", ""]
    torch.testing.assert_close(loaded.logits(texts), labeler.logits(texts), rtol=0, atol=0)


def test_a_tokenizer_of_fewer_entries_than_embeddings_is_warned_of(tmp_path: Path, tokenizer_directory: Path) -> None:
    path = published_file(tmp_path, published_state(tiny_model(vocab_size=40)))
    with pytest.warns(UserWarning, match="27 .* 40 "):
        Labeler.load(path, tokenizer=str(tokenizer_directory))


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(name)


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("module.linear_heads.4.bias"), r"linear_heads\.4\.bias"),
        (
            without("module.bert.encoder.layer.0.output.dense.weight"),
            r"bert\.encoder\.layer\.0\.output\.dense\.weight",
        ),
        (
            without("module.bert.embeddings.word_embeddings.weight"),
            r"bert\.embeddings\.word_embeddings\.weight",
        ),
        (replaced("module.linear_heads.14.bias", torch.zeros(4)), r"linear_heads\.14\.bias"),
        (replaced("module.classifier.weight", torch.zeros(4)), r"classifier\.weight"),
        (
            replaced("module.linear_heads.13.weight", torch.zeros(4, 64)),
            r"linear_heads\.13\.weight .*\(4, 64\).*\(2,",
        ),
        (
            replaced("module.linear_heads.0.weight", torch.zeros(3, 64)),
            r"linear_heads\.0\.weight .*\(3, 64\).*\(4, 64\)",
        ),
        (
            replaced("bert.embeddings.word_embeddings.weight", torch.zeros(4, 64)),
            r"bert\.embeddings\.word_embeddings\.weight.*twice",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    labeler: Labeler,
    tmp_path: Path,
    tokenizer_directory: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    state = published_state(labeler.model)
    change(state)
    with pytest.raises(ValueError, match=message):
        Labeler.load(published_file(tmp_path, state), tokenizer=str(tokenizer_directory))
    save_file(state, tmp_path / "copy.safetensors")
    with pytest.raises(ValueError, match=rf"copy\.safetensors.*{message}"):
        Labeler.load(tmp_path / "copy.safetensors", tokenizer=str(tokenizer_directory))
    if "twice" in message:
        return  # in a directory of ours no key has the prefix, so there it is unexpected
    labeler.save(tmp_path / "mine")
    save_file(
        {
            name.removeprefix("module."): tensor
            for name, tensor in state.items()
            if "pool" not in name and "position_ids" not in name
        },
        tmp_path / "mine" / "model.safetensors",
    )
    with pytest.raises(ValueError, match=rf"mine: .*{message}"):
        Labeler.load(tmp_path / "mine")


def test_a_tensor_of_integers_is_refused(labeler: Labeler, tmp_path: Path, tokenizer_directory: Path) -> None:
    state = published_state(labeler.model)
    state["module.linear_heads.2.weight"] = torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"linear_heads\.2\.weight .*int8"):
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
    with pytest.raises(ValueError, match=r"chexbert\.pth: .*mkdir") as refusal:
        Labeler.load(path, tokenizer=str(tokenizer_directory))
    assert not witness.exists()
    assert "weights_only" not in str(refusal.value)  # torch's own message tells the user how to run it all the same


def test_a_pickle_under_a_safetensors_name_is_refused_and_never_run(labeler: Labeler, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    labeler.save(tmp_path / "mine")
    for path in (tmp_path / "chexbert.safetensors", tmp_path / "mine" / "model.safetensors"):
        torch.save({"model_state_dict": published_state(labeler.model), "note": Payload(witness)}, path)
    for path in (tmp_path / "chexbert.safetensors", tmp_path / "mine"):
        with pytest.raises(ValueError, match=r"\.safetensors: "):
            Labeler.load(path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chexbert.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"chexbert\.pth: "):
        Labeler.load(path)


def test_a_dict_without_model_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state": {}}, path)
    with pytest.raises(ValueError, match=r"weights\.pth: .*`model_state_dict`.*\['state'\]"):
        Labeler.load(path)


def test_our_directory_is_read_as_strictly(labeler: Labeler, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    labeler.save(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != "linear_heads.7.weight"},
        folder / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"linear_heads\.7\.weight"):
        Labeler.load(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"mine.*model\.safetensors"):
        Labeler.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"mine"):
        Labeler.load(folder)
    (folder / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    with pytest.raises(ValueError, match=r"mine"):
        Labeler.load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Labeler.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ([*VOCABULARY[:-1], "Effusion"], "cased"),
        ([*VOCABULARY, *(f"word{index}" for index in range(9))], "entries"),
        ([*VOCABULARY[:2], "word1", *VOCABULARY[3:]], r"\[CLS\]"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(
    labeler: Labeler, tmp_path: Path, vocabulary: list[str], message: str
) -> None:
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
    with pytest.raises(ValueError, match="words"):
        Labeler.load(path, tokenizer=str(folder))


def unreachable(name: str) -> Tokenizer:
    raise ConnectionError("no route to the hub")


class Offline:
    from_file = Tokenizer.from_file
    from_pretrained = staticmethod(unreachable)


def test_offline_a_published_checkpoint_asks_for_a_tokenizer_directory(
    labeler: Labeler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published_file(tmp_path, published_state(labeler.model))
    monkeypatch.setattr(tokenizer, "Tokenizer", Offline)
    with pytest.raises(FileNotFoundError, match=r"'bert-base-uncased' .*tokenizer\.json.*vocab\.txt"):
        Labeler.load(path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*vocab\.txt"):
        Labeler.load(path, tokenizer=str(tmp_path))


# Converting


def test_a_checkpoint_becomes_a_directory_of_the_same_labels(
    labeler: Labeler, tmp_path: Path, tokenizer_directory: Path
) -> None:
    path = published_file(tmp_path, published_state(labeler.model))
    said = convert(path, tmp_path / "new" / "mine", tokenizer=str(tokenizer_directory))
    loaded = Labeler.load(tmp_path / "new" / "mine")
    assert said == loaded.fingerprint == labeler.fingerprint
    texts = ["No pleural effusion.", "the heart is enlarged", ""]
    torch.testing.assert_close(loaded.logits(texts), labeler.logits(texts), rtol=0, atol=0)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["mine"]


def test_a_checkpoint_becomes_one_file_without_a_tokenizer(
    labeler: Labeler, tmp_path: Path, tokenizer_directory: Path
) -> None:
    state = {
        name: tensor.half() if "heads" in name else tensor for name, tensor in published_state(labeler.model).items()
    }
    path = published_file(tmp_path, state)
    said = convert(path, tmp_path / "copy.safetensors")
    stored = load_file(tmp_path / "copy.safetensors")
    assert set(stored) == set(labeler.model.state_dict()) and {tensor.dtype for tensor in stored.values()} == {
        torch.float32
    }
    assert said == Labeler.load(path, tokenizer=str(tokenizer_directory)).fingerprint
    assert said == Labeler.load(tmp_path / "copy.safetensors", tokenizer=str(tokenizer_directory)).fingerprint
    # and the copy a directory
    convert(tmp_path / "copy.safetensors", tmp_path / "mine", tokenizer=str(tokenizer_directory))
    assert Labeler.load(tmp_path / "mine").fingerprint == said


@pytest.mark.parametrize("name", ["mine", "copy.safetensors"])
def test_nothing_is_overwritten_and_a_failure_leaves_nothing(
    labeler: Labeler, tmp_path: Path, tokenizer_directory: Path, name: str
) -> None:
    output, words = tmp_path / "out" / name, None if name.endswith(".safetensors") else str(tokenizer_directory)
    good = published_file(tmp_path, published_state(labeler.model))
    convert(good, output, tokenizer=words)
    files = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")}
    with pytest.raises(FileExistsError, match=f"{name}"):
        convert(good, output, tokenizer=words)
    assert {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")} == files

    state = published_state(labeler.model)
    del state["module.linear_heads.4.bias"]
    with pytest.raises(ValueError, match=r"linear_heads\.4\.bias"):
        convert(published_file(tmp_path, state), tmp_path / "other" / name, tokenizer=words)
    assert list((tmp_path / "other").iterdir()) == []


def test_a_writing_that_breaks_off_leaves_no_labeler(
    labeler: Labeler, tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published_file(tmp_path, published_state(labeler.model))

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(loading, "save_tensors", full)
    for name in ("mine", "copy.safetensors"):
        with pytest.raises(OSError, match="space"):
            convert(path, tmp_path / "out" / name, tokenizer=str(tokenizer_directory) if name == "mine" else None)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_converted_is_refused(labeler: Labeler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = published_file(tmp_path, published_state(labeler.model))
    labeler.save(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="mine"):
        convert(tmp_path / "mine", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        convert(tmp_path / "no.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="tokenizer"):
        convert(path, tmp_path / "out.safetensors", tokenizer="bert-base-uncased")
    monkeypatch.setattr(tokenizer, "Tokenizer", Offline)
    with pytest.raises(FileNotFoundError, match="'bert-base-uncased'"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
