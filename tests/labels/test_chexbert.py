"""CheXbert: one product for all heads, texts that are labelled one report at a time (docs/traps.md #23), and odd texts
and little memory.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import BertModel

from mrg_r1 import products
from mrg_r1.labels import inference
from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.observations import CLASSES_PER_OBSERVATION
from mrg_r1.labels.tokenizer import bert_tokenizer
from tests.labels.tiny import CLS, SEP, UNK, VOCABULARY, WORDS, tiny_config, tiny_model, tiny_tokenizer


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
    torch.testing.assert_close(together[finite], alone[finite], rtol=1e-5, atol=1e-4)  # of logits around 10
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
    assert (
        labeler.label([text, "lungs are clear"])[0].tolist() == labeler.label([" ".join(["edema"] * 510)])[0].tolist()
    )


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


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of every batch that is read from now on."""
    sizes: list[tuple[int, int]] = []
    read = inference.read

    def counting(model: CheXbert, packed: inference.Packed) -> torch.Tensor:
        sizes.append((len(packed.first), len(packed.ids)))
        return read(model, packed)

    monkeypatch.setattr(inference, "read", counting)
    return sizes


def test_equal_texts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = Labeler(tiny_model(), tiny_tokenizer(), name="tiny")
    sizes = watched(monkeypatch)
    classes = labeler.label(["mild edema", "lungs are clear", "mild  edema", " mild edema\n"])
    assert sum(rows for rows, _ in sizes) == 2
    assert classes[0].tolist() == classes[2].tolist() == classes[3].tolist()


def test_batches_keep_to_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = Labeler(tiny_model(), tiny_tokenizer(), name="tiny")
    texts = [" ".join(["edema"] * (1 + 7 * index % 50)) for index in range(40)] + [" ".join(["edema"] * 100)]
    whole = labeler.label(texts)
    labeler.tokens_per_batch = 64
    sizes = watched(monkeypatch)
    assert labeler.label(texts).tolist() == whole.tolist()
    assert all(tokens <= 64 or rows == 1 for rows, tokens in sizes) and len(sizes) > 5
    assert max(rows for rows, _ in sizes) > 1


def test_no_text_gives_no_row_and_a_bare_string_is_refused(labeler: Labeler) -> None:
    assert labeler.label([]).shape == (0, 14)
    with pytest.raises(TypeError):
        labeler.label("no effusion")
    with pytest.raises(TypeError, match="text 1 .*NoneType"):
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


# Inference: the module's numbers, another way


@pytest.mark.parametrize("slack", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("onednn", "activation"), [(True, "gelu"), (False, "gelu"), (True, "relu")])
def test_inference_gives_the_modules_logits(
    slack: float, onednn: bool, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(num_attention_heads=2, num_hidden_layers=3, hidden_act=activation)
    if not onednn:
        monkeypatch.setattr(products, "ONEDNN", None)
    labeler = Labeler(model, tiny_tokenizer(), name="tiny")
    rng = np.random.default_rng(0)
    lengths = sorted([2, 2, 3, 5, 5, 8, 9, 30, 31, 40], reverse=True)
    rows = [[CLS, *rng.integers(5, len(VOCABULARY), length - 2).tolist(), SEP] for length in lengths]
    packed = inference.pack(rows, pad=0, slack=slack, device=torch.device("cpu"))
    assert len(packed.blocks) == {0.0: 8, 0.25: 5, 1.0: 1}[slack]
    assert all((block.mask is None) == (slack == 0.0) or block.length < 40 for block in packed.blocks)
    with torch.no_grad():
        expected = model(*labeler.pad(rows))
    torch.testing.assert_close(inference.read(model, packed), expected, rtol=1e-4, atol=1e-4)


def test_labels_follow_weights_that_are_trained_between_calls() -> None:
    model = tiny_model()
    labeler = Labeler(model, tiny_tokenizer(), name="in training")
    text = "no pleural effusion"
    before = labeler.logits([text])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model.train()
    model(*labeler.pad(labeler.encode([text])))[:, :13].sum().backward()
    optimiser.step()
    model.eval()
    with torch.no_grad():
        expected = model(*labeler.pad(labeler.encode([text])))
    torch.testing.assert_close(labeler.logits([text]), expected, rtol=1e-4, atol=1e-4)
    assert (labeler.logits([text])[:, :13] - before[:, :13]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_labels_on_a_cpu(labeler: Labeler, tmp_path: Path, dtype: torch.dtype) -> None:
    labeler.save(tmp_path / "mine")
    half = Labeler.load(tmp_path / "mine", dtype=dtype)
    assert half.model.bert.embeddings.word_embeddings.weight.dtype == dtype and half.fingerprint == labeler.fingerprint
    texts = [f"{a} {b} lungs" for a in WORDS[:6] for b in WORDS[:6]]
    assert (half.label(texts) == labeler.label(texts)).mean() > 0.95


# Odd texts


@given(
    st.lists(
        st.text(st.characters(), max_size=60) | st.text(" \t\n\x00\x1f\u2028\ud800\udc00\ufffdeé漢ع😀.", max_size=60),
        max_size=6,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_text_is_labelled(labeler: Labeler, texts: list[str]) -> None:
    classes = labeler.label(texts)
    assert classes.shape == (len(texts), 14) and ((classes >= 0) & (classes < 4)).all()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t ",
        "\x00\x00",
        "\ud83d",
        "\x01\x02\x7f",
        "心影增大。",
        "صدر",
        "\u0301" * 50,
        "[CLS] [SEP] [PAD]",
        "\ufeff\u200b",
    ],
)
def test_an_odd_text_leaves_the_others_alone(labeler: Labeler, text: str) -> None:
    others = ["no pleural effusion", "the heart is enlarged"]
    assert labeler.label([others[0], text, others[1]])[[0, 2]].tolist() == labeler.label(others).tolist()


def test_half_a_character_reads_as_nothing(labeler: Labeler) -> None:
    assert labeler.encode(["no\ud800 effusion", "\udfff"]) == labeler.encode(["no effusion", ""])


LONG = {
    "words": "no effusion " * 9_000,
    "a piece a character": "." * 100_000,
    "one word": "e" * 100_000,
    "long unknown words": ("q" * 180 + " ") * 560,
    "nothing for most of it": "\u0301 " * 60_000 + "edema " * 700,
    "other scripts": "漢" * 100_000,
    "literal special tokens": "[SEP] " * 17_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_has_the_ids_of_the_whole_and_costs_little(name: str, labeler: Labeler) -> None:
    began = time.process_time()
    whole = tiny_tokenizer().encode(" ".join(LONG[name].split()), add_special_tokens=False).ids
    between = time.process_time()
    (row,) = labeler.encode([LONG[name]])
    assert time.process_time() - between < 3 * (between - began)  # beside the whole, whatever else the machine does
    assert row == [CLS, *whole[:510], SEP]


def test_where_pieces_may_cross_white_space_a_long_text_is_read_whole() -> None:
    word = "e" * 31
    words = bert_tokenizer(
        models.WordPiece({entry: index for index, entry in enumerate([*VOCABULARY, word])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Punctuation()  # what stands between two points is one word, spaces and all
    labeler = Labeler(tiny_model(vocab_size=len(VOCABULARY) + 1), words, name="other")
    # 509 pieces, and as the last one a word whose first space is where a long text would be cut: up to there it is a
    # known one
    (row,) = labeler.encode([("q" * 31 + ".") * 254 + "." + word + " no"])
    assert len(row) == 512 and row[510] == UNK


# Little memory


def only(most: int, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of more than `most` tokens fail from now on; returns the sizes of those that were tried."""
    tried: list[int] = []
    read = inference.read

    def failing(model: CheXbert, packed: inference.Packed) -> torch.Tensor:
        tried.append(len(packed.ids))
        if len(packed.ids) > most:
            raise error(message)
        return read(model, packed)

    monkeypatch.setattr(inference, "read", failing)
    return tried


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (
            RuntimeError,
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 9 bytes.",
        ),
        (RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        (MemoryError, "std::bad_alloc"),
    ],
)
def test_batches_shrink_when_memory_runs_out_and_stay_small(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labeler = Labeler(tiny_model(), tiny_tokenizer(), name="tiny")
    texts = [" ".join([WORDS[index % 19]] * (3 + index % 8)) for index in range(60)]
    expected = labeler.logits(texts)
    tried = only(100, error, message, monkeypatch)
    with pytest.warns(UserWarning, match=r"tiny: .* 2048 tokens.* \d+ ") as said:
        torch.testing.assert_close(labeler.logits(texts), expected, rtol=1e-4, atol=1e-4)
    assert len(said) == 1 and 50 <= labeler.tokens_per_batch <= 100 and tried[0] > 100
    tried.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labeler.logits(texts)
    assert max(tried) <= labeler.tokens_per_batch


def test_a_batch_far_below_the_budget_is_halved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = Labeler(tiny_model(), tiny_tokenizer(), name="tiny")
    tried = only(100, MemoryError, "", monkeypatch)
    with pytest.warns(UserWarning, match="84 "):
        labeler.label([" ".join([word] * 40) for word in WORDS[:4]])
    assert tried == [168, 84, 84]


def test_a_single_report_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = Labeler(tiny_model(), tiny_tokenizer(), name="tiny")
    only(10, torch.OutOfMemoryError, "CUDA out of memory", monkeypatch)
    with pytest.raises(MemoryError, match=r"tiny: .* 42 tokens .*cpu"):
        labeler.label([" ".join(["edema"] * 40), "edema", "no edema"])


def test_another_error_is_passed_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = Labeler(tiny_model(), tiny_tokenizer(), name="tiny")
    tried = only(0, RuntimeError, "mat1 and mat2 shapes cannot be multiplied", monkeypatch)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        labeler.label(["edema", "no edema"])
    assert len(tried) == 1 and labeler.tokens_per_batch == 2048
