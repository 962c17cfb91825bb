"""The labeler, which reads the 14 observations out of report texts.

Texts enter, classes leave ([N, 14], docs/method.md §1). `labels.loading` reads the weights: a directory of ours
(`Labeler.save`, `labels.training`) or the checkpoint that CheXbert's authors published, which the user brings: its
licence forbids redistribution.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from mrg_r1.console import progress_bar
from mrg_r1.labels import inference, loading
from mrg_r1.labels.chexbert import MAX_TOKENS, CheXbert
from mrg_r1.labels.observations import OBSERVATIONS
from mrg_r1.labels.tokenizer import (
    PUBLISHED_VOCABULARY,
    clean,
    encode_pieces,
    read_tokenizer,
    require_uncased,
    special_id,
)

# In one pass; bounds memory. On a CPU the activations of few tokens stay near the cache, and a product of 1,000 rows is
# as fast as any.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}


class Labeler:
    """Reads the 14 observations out of texts.

    Attributes:
        name: the directory's or file's name, for logs and result files.
        fingerprint: the first 16 hexadecimal digits of the weights' SHA-256 (in float32, so the same for every dtype,
            device and file format): tells two labelers of one name apart.
        model: CheXbert in evaluation mode. Its parameters are read at each call, so they may be trained between calls.
        max_tokens: longest input in ids, [CLS] and [SEP] included.
        tokens_per_batch: of one pass; halved, and left so, when memory runs out.
    """

    def __init__(
        self,
        model: CheXbert,
        tokenizer: Tokenizer,
        *,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self.fingerprint = loading.fingerprint(model.state_dict())
        self.device = torch.device(device)
        self.model = model.to(device=self.device, dtype=dtype).eval()
        self.max_tokens = min(MAX_TOKENS, model.bert.config.max_position_embeddings)
        self.tokens_per_batch = TOKENS_PER_BATCH.get(self.device.type, TOKENS_PER_BATCH["cuda"])
        self._slack = inference.SLACK.get(self.device.type, inference.SLACK["cuda"])
        self.tokenizer = tokenizer
        # A stored tokenizer may carry its own truncation and padding (MiniLM's cuts at 128); both are done here
        # instead.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._cls, self._sep, self._pad = (special_id(tokenizer, token, name) for token in ("[CLS]", "[SEP]", "[PAD]"))
        rows = model.bert.config.vocab_size
        if tokenizer.get_vocab_size() > rows:
            raise ValueError(
                f"{name}: the tokenizer has {tokenizer.get_vocab_size()} entries and the model {rows} embeddings; "
                "give the tokenizer that the model was trained with"
            )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        tokenizer: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Labeler:
        """Load a directory of ours or a CheXbert checkpoint file. The weights must match the architecture key by key.

        Args:
            path: a directory with config.json, model.safetensors and tokenizer files, the published checkpoint, or a
                `.safetensors` copy of it.
            tokenizer: a directory with tokenizer.json or vocab.txt, or a name on the Hugging Face hub. A directory of
                ours carries its own; a checkpoint file, which has none, takes bert-base-uncased's from the hub or its
                cache unless told.
            device: where labelling runs.
            dtype: of the weights while labelling; they are stored and compared in float32.

        Raises:
            FileNotFoundError: nothing at `path`, a missing file of a directory, or a tokenizer that cannot be had
                (offline).
            ValueError: a missing, unexpected or wrongly shaped tensor, a pickled object, or a tokenizer that is not the
                model's.
        """
        path = Path(path)
        if path.is_dir():
            config, state = loading.read_directory(path)
            words = read_tokenizer(tokenizer if tokenizer is not None else str(path))
        elif path.is_file():
            config, state = loading.read_checkpoint(path)
            words = read_tokenizer(tokenizer if tokenizer is not None else PUBLISHED_VOCABULARY)
            require_uncased(words, config.vocab_size, tokenizer or PUBLISHED_VOCABULARY)
        else:
            raise FileNotFoundError(
                f"{path}: no labeler here; give a directory made by `labeler train` or a CheXbert checkpoint file"
            )
        # initialising weights that are about to be replaced must not move the caller's seeds
        with torch.random.fork_rng(devices=[]):
            model = CheXbert(config)
        loading.load_strictly(model, state, path)
        return cls(model, words, name=path.resolve().name, device=device, dtype=dtype)

    def save(self, directory: Path) -> None:
        """Write config.json, tokenizer files and model.safetensors (float32, last: a directory cut short does not
        load).
        """
        loading.write_directory(
            Path(directory), self.model.bert.config, self.tokenizer, self.model.state_dict(), max_tokens=self.max_tokens
        )

    def label(self, texts: Sequence[str], *, progress: bool = False) -> NDArray[np.int64]:
        """The classes of each text: [N, 14] int64, 0 blank, 1 positive, 2 negative, 3 uncertain.

        A text's classes do not depend on the other texts, on their number or on their order. Equal texts are computed
        once.

        Args:
            texts: N reports; whitespace is collapsed, an empty one is [CLS][SEP], a long one is cut at `max_tokens`
                with [SEP] last, and any characters are allowed.
            progress: show a bar while labelling, where somebody watches.

        Raises:
            TypeError: `texts` is one string, or an element is not a string.
            MemoryError: a single report does not fit into memory.
        """
        return self.logits(texts, progress=progress).argmax(dim=-1).numpy()

    @torch.no_grad()
    def logits(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """As `label`, before the choice of a class: [N, 14, 4] float32 on the CPU, -inf for the classes that No Finding
        lacks.
        """
        distinct, row_of_text = _distinct(texts)
        ids = self.encode(distinct)
        # the largest batch first: memory runs out at once or never
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        computed, done, allowed = [], 0, self.tokens_per_batch
        with progress_bar(quiet=not progress) as bar:
            task = bar.add_task(f"labelling with {self.name}", total=len(order))
            while done < len(order):
                batch = _first_batch(
                    [ids[row] for row in order[done : done + self.tokens_per_batch]], self.tokens_per_batch
                )
                answers = self._read(batch)
                if answers is None:
                    self._halve(batch)
                    continue
                computed.append(answers)
                done += len(batch)
                bar.update(task, completed=done)
        if self.tokens_per_batch < allowed:
            warnings.warn(
                f"{self.name}: out of memory with {allowed} tokens in a batch; {self.tokens_per_batch} from now on",
                stacklevel=2,
            )
        result = torch.empty(len(ids), len(OBSERVATIONS), 4)
        if computed:
            result[torch.tensor(order)] = torch.cat(computed).cpu()  # one transfer, after every batch is queued
        return result[torch.tensor(row_of_text, dtype=torch.long)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as one row of ids, `[CLS] words [SEP]`, at most `max_tokens` long."""
        pieces = encode_pieces(self.tokenizer, [clean(text) for text in texts], self.max_tokens - 2)
        return [[self._cls, *row, self._sep] for row in pieces]

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids [N, L] and mask [N, L], int64, on the labeler's device."""
        ids, present = inference.rectangle(rows, self._pad)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(present.astype(np.int64)).to(self.device)

    def _read(self, batch: list[list[int]]) -> Tensor | None:
        """Logits of rows of ids, longest first; None where memory does not suffice for several of them."""
        try:
            return inference.read(
                self.model, inference.pack(batch, pad=self._pad, slack=self._slack, device=self.device)
            )
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(
                    f"{self.name}: a single report of {len(batch[0])} tokens does not fit into the memory of "
                    f"{self.device}; free some, or run the labeler on another device or in a smaller dtype"
                ) from error
        return None  # outside the handler: the error's traceback holds the activations until it is gone

    def _halve(self, batch: list[list[int]]) -> None:
        self.tokens_per_batch = max(1, min(self.tokens_per_batch, sum(map(len, batch))) // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the batch had taken lies in blocks of its sizes, too large for smaller ones


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, or the plain RuntimeError of torch's CPU allocator (on Linux, on Windows)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory"))


def _distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct texts (cleaned) in order of appearance, and for each text the row of its own."""
    if isinstance(texts, str):
        raise TypeError("expected a sequence of texts, got one string; put it in a list")
    rows: dict[str, int] = {}
    row_of_text = []
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {position} is {type(text).__name__}, not a string")
        row_of_text.append(rows.setdefault(clean(text), len(rows)))
    return list(rows), row_of_text


def _first_batch(rows: list[list[int]], tokens: int) -> list[list[int]]:
    """The first rows, at least one, that together have at most so many tokens."""
    total = 0
    for count, row in enumerate(rows):
        total += len(row)
        if total > tokens and count > 0:
            return rows[:count]
    return rows
