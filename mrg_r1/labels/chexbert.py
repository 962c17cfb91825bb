"""CheXbert's architecture at any size, and the labeler that reads the 14 observations out of report texts.

Texts enter, classes leave ([N, 14], spec section 1). Two kinds of weights are read: a directory of ours (`Labeler.save`,
`labels.training`) and the checkpoint file that CheXbert's authors published, which the user brings: its licence forbids
redistribution.

Source: CheXbert (arXiv 2004.09167), section 3: BERT, the last hidden state of [CLS], 14 linear heads.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mrg_r1.labels.observations import CLASSES_PER_OBSERVATION, OBSERVATIONS

MAX_TOKENS = 512  # BERT's positions, [CLS] and [SEP] included
TOKENS_PER_BATCH = 8192  # padded tokens; bounds memory, and on a CPU keeps the activations near the cache
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
HEAD_DIM = 64  # of every BERT published by its authors; a checkpoint's tensors do not tell the number of attention heads
PUBLISHED_VOCABULARY = "bert-base-uncased"
_PUBLISHED_VOCABULARY_SIZE = 30522
_PUBLISHED_SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
# in the published file but in no part of CheXbert's forward pass: BERT's pooler, and a buffer that older versions stored
_UNUSED_KEYS = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.embeddings.position_ids")


class CheXbert(nn.Module):
    """BERT and 14 linear heads on the last hidden state of [CLS]: 13 of 4 classes, the last (No Finding) of 2."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(0.1)
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, classes) for classes in CLASSES_PER_OBSERVATION)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of every observation's classes.

        Args:
            input_ids: [N, L] int64, [CLS] first, padded on the right.
            attention_mask: [N, L] int64, 0 on padding.

        Returns:
            [N, 14, 4] logits in the model's dtype; the two classes that No Finding lacks are -inf.
        """
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [N, L, H]
        cls = self.dropout(hidden[:, 0])  # [N, H]
        weight = torch.cat([head.get_parameter("weight") for head in self.linear_heads])  # [54, H]: all heads as one product
        bias = torch.cat([head.get_parameter("bias") for head in self.linear_heads])  # [54]
        logits = nn.functional.linear(cls, weight, bias)  # [N, 54]
        missing = 4 * len(OBSERVATIONS) - logits.shape[1]  # only the last head is short, so the padding stands at the end
        return nn.functional.pad(logits, (0, missing), value=float("-inf")).view(-1, len(OBSERVATIONS), 4)


class Labeler:
    """Reads the 14 observations out of texts.

    Attributes:
        name: the directory's or file's name, for logs and result files.
        fingerprint: the first 16 hexadecimal digits of the weights' SHA-256 (in float32, so the same for every dtype, device and file
            format): tells two labelers of one name apart.
        model: CheXbert in evaluation mode.
        max_tokens: longest input in ids, [CLS] and [SEP] included.
    """

    def __init__(
        self, model: CheXbert, tokenizer: Tokenizer, *, name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.name = name
        self.fingerprint = _fingerprint(model.state_dict())
        self.device = torch.device(device)
        self.model = model.to(device=self.device, dtype=dtype).eval()
        self.max_tokens = min(MAX_TOKENS, model.bert.config.max_position_embeddings)
        self._tokenizer = tokenizer
        # A stored tokenizer may carry its own truncation and padding (MiniLM's cuts at 128); both are done here instead.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._cls, self._sep, self._pad = (special_id(tokenizer, token, name) for token in ("[CLS]", "[SEP]", "[PAD]"))
        rows = model.bert.config.vocab_size
        if tokenizer.get_vocab_size() > rows:
            raise ValueError(
                f"{name}: the tokenizer has {tokenizer.get_vocab_size()} entries and the model {rows} embeddings; give the tokenizer "
                "that the model was trained with"
            )

    @classmethod
    def load(
        cls, path: Path, *, tokenizer: str | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Labeler:
        """Load a directory of ours or a published CheXbert checkpoint file. The weights must match the architecture key by key.

        Args:
            path: a directory with config.json, model.safetensors and tokenizer files, or the published checkpoint.
            tokenizer: a directory with tokenizer.json or vocab.txt, or a name on the Hugging Face hub. A directory of ours carries its
                own; a published file, which has none, takes bert-base-uncased's from the hub or its cache unless told.
            device: where labelling runs.
            dtype: of the weights while labelling; they are stored and compared in float32.

        Raises:
            FileNotFoundError: nothing at `path`, a missing file of a directory, or a tokenizer that cannot be had (offline).
            ValueError: a missing, unexpected or wrongly shaped tensor, a pickled object, or a tokenizer that is not the model's.
        """
        path = Path(path)
        if path.is_dir():
            config = _read_config(path / "config.json")
            state = _read_safetensors(path / "model.safetensors")
            words = _read_tokenizer(tokenizer if tokenizer is not None else str(path))
        elif path.is_file():
            state = _read_published(path)
            config = _config_of_tensors(state, path)
            words = _read_tokenizer(tokenizer if tokenizer is not None else PUBLISHED_VOCABULARY)
            _require_uncased(words, config.vocab_size, tokenizer or PUBLISHED_VOCABULARY)
        else:
            raise FileNotFoundError(f"{path}: no labeler here; give a directory made by `labeler train` or a CheXbert checkpoint file")
        with torch.random.fork_rng(devices=[]):  # initialising weights that are about to be replaced must not move the caller's seeds
            model = CheXbert(config)
        _load_strictly(model, state, path)
        return cls(model, words, name=path.resolve().name, device=device, dtype=dtype)

    def save(self, directory: Path) -> None:
        """Write config.json, tokenizer files and model.safetensors (float32, last: a directory cut short does not load)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.safetensors").unlink(missing_ok=True)
        config = {**self.model.bert.config.to_dict(), "architectures": ["CheXbert"], "observations": list(OBSERVATIONS)}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self._tokenizer.save(str(directory / "tokenizer.json"))
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_tokens, **special}
        (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    def label(self, texts: Sequence[str], *, progress: bool = False) -> NDArray[np.int64]:
        """The classes of each text: [N, 14] int64, 0 blank, 1 positive, 2 negative, 3 uncertain.

        A text's classes do not depend on the other texts, on their number or on their order. Equal texts are computed once.

        Args:
            texts: N reports; whitespace is collapsed, an empty one is [CLS][SEP], a long one is cut at `max_tokens` with [SEP] last.
            progress: show a bar while labelling (on a terminal, outside CI).

        Raises:
            TypeError: `texts` is one string, or an element is not a string.
        """
        return self.logits(texts, progress=progress).argmax(dim=-1).numpy()

    @torch.no_grad()
    def logits(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """As `label`, before the choice of a class: [N, 14, 4] float32 on the CPU, -inf for the classes that No Finding lacks."""
        distinct, row_of_text = _distinct(texts)
        ids = self.encode(distinct)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # the largest batch first: memory runs out at once or never
        batches = list(_batches(order, ids))
        quiet = not progress or "CI" in os.environ or not sys.stderr.isatty()
        computed = [
            self.model(*self.pad([ids[row] for row in batch])).float()
            for batch in track(batches, description=f"labelling with {self.name}", console=Console(stderr=True), disable=quiet)
        ]
        result = torch.empty(len(ids), len(OBSERVATIONS), 4)
        if computed:
            result[torch.tensor(order)] = torch.cat(computed).cpu()  # one transfer, after every batch is queued
        return result[torch.tensor(row_of_text, dtype=torch.long)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as one row of ids, `[CLS] words [SEP]`, at most `max_tokens` long.

        Trap 23: a BERT tokenizer handed a list of word pieces takes each piece for a report. Here only whole strings reach the
        tokenizer, and the two special ids are put around what it returns.
        """
        collapsed = [" ".join(text.split()) for text in texts]
        encoded = self._tokenizer.encode_batch(collapsed, is_pretokenized=False, add_special_tokens=False)
        return [[self._cls, *encoding.ids[: self.max_tokens - 2], self._sep] for encoding in encoded]

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids [N, L] and mask [N, L], int64, on the labeler's device."""
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]  # [N, L]
        ids = np.full(mask.shape, self._pad, dtype=np.int64)
        ids[mask] = np.concatenate([np.array(row, dtype=np.int64) for row in rows])
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask.astype(np.int64)).to(self.device)


def _distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct texts (whitespace collapsed) in order of appearance, and for each text the row of its own."""
    if isinstance(texts, str):
        raise TypeError("expected a sequence of texts, got one string; put it in a list")
    rows: dict[str, int] = {}
    row_of_text = []
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {position} is {type(text).__name__}, not a string")
        row_of_text.append(rows.setdefault(" ".join(text.split()), len(rows)))
    return list(rows), row_of_text


def _batches(order: Sequence[int], ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Cut rows, longest first, into batches of at most TOKENS_PER_BATCH padded tokens."""
    start = 0
    while start < len(order):
        rows = max(1, TOKENS_PER_BATCH // len(ids[order[start]]))
        yield list(order[start : start + rows])
        start += rows


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


def _load_strictly(model: CheXbert, state: Mapping[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: not the weights of this CheXbert: {'; '.join(problems[:8])}{more}")
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()}, strict=True)


# Our own directory


def _read_config(path: Path) -> BertConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a labeler directory has config.json, model.safetensors and tokenizer files")
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("architectures") != ["CheXbert"]:
        raise ValueError(f"{path}: architectures is {stored.get('architectures')}, not ['CheXbert']; this directory holds another model")
    if stored.get("observations") != list(OBSERVATIONS):
        raise ValueError(f"{path}: observations are {stored.get('observations')}; expected, in this order, {list(OBSERVATIONS)}")
    return BertConfig.from_dict(stored)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the directory is incomplete, train or copy the labeler again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); train or copy the labeler again") from error


# The published checkpoint


def _read_published(path: Path) -> dict[str, Tensor]:
    """The state of a published checkpoint, `module.` and what CheXbert never uses taken out."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        # torch's own message recommends loading such a file without the safeguard, so it is not passed on
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds the pickled object {found.group(1)}" if found else f"it cannot be read as tensors ({type(error).__name__})"
        raise ValueError(f"{path}: refused: {what}; a checkpoint may hold tensors only, because unpickling runs code") from None
    state = stored.get("model_state_dict") if isinstance(stored, dict) else None
    if not isinstance(state, Mapping):
        found_keys = sorted(map(str, stored))[:8] if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f"{path}: no `model_state_dict` (found {found_keys}); a published CheXbert checkpoint is a dict that has one")
    stripped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key} is {type(tensor).__name__}, not a tensor")
        name = str(key).removeprefix("module.")
        if name in stripped:
            raise ValueError(f"{path}: {name} stands twice, with and without `module.`")
        stripped[name] = tensor
    return {name: tensor for name, tensor in stripped.items() if name not in _UNUSED_KEYS}


def _config_of_tensors(state: Mapping[str, Tensor], path: Path) -> BertConfig:
    """BERT's sizes as the tensors have them (bert-base-uncased's in the published file)."""

    def rows_and_columns(name: str) -> tuple[int, int]:
        if name not in state:
            raise ValueError(f"{path}: missing {name}; not a CheXbert checkpoint")
        if state[name].ndim != 2:
            raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, expected two dimensions")
        return state[name].shape[0], state[name].shape[1]

    vocabulary, hidden = rows_and_columns("bert.embeddings.word_embeddings.weight")
    layers = {int(found.group(1)) for name in state if (found := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))}
    if hidden % HEAD_DIM:
        raise ValueError(f"{path}: hidden size {hidden} is not a multiple of {HEAD_DIM}, so the attention heads cannot be told")
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=max(layers, default=0) + 1,
        num_attention_heads=hidden // HEAD_DIM,
        intermediate_size=rows_and_columns("bert.encoder.layer.0.intermediate.dense.weight")[0],
        max_position_embeddings=rows_and_columns("bert.embeddings.position_embeddings.weight")[0],
        type_vocab_size=rows_and_columns("bert.embeddings.token_type_embeddings.weight")[0],
    )


# Tokenizers


def _read_tokenizer(source: str) -> Tokenizer:
    """A tokenizer from a directory (tokenizer.json, or vocab.txt read as BERT's uncased one) or from the hub."""
    folder = Path(source)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.txt").is_file():
        return bert_tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    if folder.exists():
        raise FileNotFoundError(f"{folder}: neither tokenizer.json nor vocab.txt in it; give the directory of the model's tokenizer")
    try:
        return Tokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:  # unreachable, or no name that the hub could know
        raise FileNotFoundError(
            f"tokenizer {source!r} is no directory here and could not be had from the Hugging Face hub ({type(error).__name__}); offline, "
            f"give a directory with tokenizer.json or vocab.txt (for a published CheXbert, {PUBLISHED_VOCABULARY}'s)"
        ) from error


def bert_tokenizer(words: models.WordPiece) -> Tokenizer:
    """BERT's lower-case WordPiece around a vocabulary: text cleaned, lower-cased, accents stripped, punctuation split off."""
    tokenizer = Tokenizer(words)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None])
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str, name: str) -> int:
    """The id of `token`; ValueError, naming the labeler, where the vocabulary has none."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"{name}: the tokenizer has no {token}; a BERT vocabulary is needed")
    return int(found)


def _require_uncased(tokenizer: Tokenizer, embeddings: int, source: str) -> None:
    """Refuse the vocabularies that fit bert-base-uncased's embeddings in size and would label nonsense: cased or other ones."""
    vocabulary = tokenizer.get_vocab()
    cased = next((word for word in sorted(vocabulary) if word != word.lower() and not word.startswith("[")), None)
    if cased is not None or tokenizer.encode("Effusion").ids != tokenizer.encode("effusion").ids:
        evidence = f"it has {cased!r}" if cased is not None else "it keeps capitals"
        raise ValueError(f"tokenizer {source!r} is cased ({evidence}); a published CheXbert needs {PUBLISHED_VOCABULARY}'s")
    if len(vocabulary) < embeddings:
        warnings.warn(
            f"tokenizer {source!r} has {len(vocabulary)} entries and the checkpoint {embeddings} embeddings; labels are right only where "
            f"its entries are {PUBLISHED_VOCABULARY}'s first",
            stacklevel=3,
        )
    if embeddings == _PUBLISHED_VOCABULARY_SIZE == len(vocabulary):
        for token, expected in _PUBLISHED_SPECIAL_IDS.items():
            if vocabulary.get(token) != expected:
                raise ValueError(
                    f"tokenizer {source!r} has {token} at {vocabulary.get(token)}, {PUBLISHED_VOCABULARY} at {expected}; another "
                    "vocabulary of the same size labels nonsense"
                )
