"""BERT's tokenizer: where it is read from, and texts to ids, whatever stands in them.

Texts enter, rows of word-piece ids leave.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PUBLISHED_VOCABULARY = "bert-base-uncased"
_PUBLISHED_VOCABULARY_SIZE = 30522
_PUBLISHED_SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: Python's strings may hold one, the tokenizer's may not
# more than a piece has on average, so that the first part of a long text is nearly always enough
_CHARACTERS_A_PIECE = 16


def clean(text: str) -> str:
    """The text as it is labelled: white space collapsed, lone surrogates replaced by U+FFFD (which BERT's normalizer
    takes out).
    """
    return " ".join(_SURROGATE.sub("\ufffd", text).split())


def encode_pieces(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[list[int]]:
    """The ids of each text's first `most` word pieces, without special ids.

    Trap 23: a BERT tokenizer handed a list of word pieces takes each piece for a report. Here only whole strings reach
    the tokenizer.

    A long text is read only as far as needed. BERT's pieces never cross white space, so those of a first part that ends
    at a space are the first of the whole; other pre-tokenizers get the whole text.

    Args:
        tokenizer: without truncation and padding.
        texts: after `clean`.
        most: 0 or more.
    """
    length = most * _CHARACTERS_A_PIECE
    splits = isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
    parts = [_first_part(text, length) if splits else text for text in texts]
    encoded = tokenizer.encode_batch(parts, is_pretokenized=False, add_special_tokens=False)
    rows = [encoding.ids[:most] for encoding in encoded]
    for row, (text, part) in enumerate(zip(texts, parts, strict=True)):
        while len(rows[row]) < most and len(part) < len(text):
            part = _first_part(text, 4 * len(part))
            rows[row] = tokenizer.encode(part, add_special_tokens=False).ids[:most]
    return rows


def _first_part(text: str, length: int) -> str:
    """The text up to its first space after `length` characters."""
    end = text.find(" ", length)
    return text if end < 0 else text[:end]


def read_tokenizer(source: str) -> Tokenizer:
    """A tokenizer from a directory (tokenizer.json, or vocab.txt read as BERT's uncased one) or from the hub."""
    folder = Path(source)
    for name in ("tokenizer.json", "vocab.txt"):
        file = str(folder / name)
        if not Path(file).is_file():
            continue
        try:
            if name == "tokenizer.json":
                return Tokenizer.from_file(file)
            return bert_tokenizer(models.WordPiece.from_file(file, unk_token="[UNK]"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file}: no tokenizer ({error}); copy the model's again") from error
    if folder.exists():
        raise FileNotFoundError(
            f"{folder}: neither tokenizer.json nor vocab.txt in it; give the directory of the model's tokenizer"
        )
    try:
        return Tokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:  # unreachable, or no name that the hub could know
        raise FileNotFoundError(
            f"tokenizer {source!r} is no directory here and could not be had from the Hugging Face hub "
            f"({type(error).__name__}); offline, give a directory with tokenizer.json or vocab.txt (for a "
            f"published CheXbert, {PUBLISHED_VOCABULARY}'s)"
        ) from error


def bert_tokenizer(words: models.WordPiece) -> Tokenizer:
    """BERT's lower-case WordPiece around a vocabulary: text cleaned, lower-cased, accents stripped, punctuation split
    off.
    """
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


def require_uncased(tokenizer: Tokenizer, embeddings: int, source: str) -> None:
    """Refuse the vocabularies that fit bert-base-uncased's embeddings in size and would label nonsense: cased or other
    ones.
    """
    vocabulary = tokenizer.get_vocab()
    cased = next((word for word in sorted(vocabulary) if word != word.lower() and not word.startswith("[")), None)
    if cased is not None or tokenizer.encode("Effusion").ids != tokenizer.encode("effusion").ids:
        evidence = f"it has {cased!r}" if cased is not None else "it keeps capitals"
        raise ValueError(
            f"tokenizer {source!r} is cased ({evidence}); a published CheXbert needs {PUBLISHED_VOCABULARY}'s"
        )
    if len(vocabulary) < embeddings:
        warnings.warn(
            f"tokenizer {source!r} has {len(vocabulary)} entries and the checkpoint {embeddings} embeddings; "
            f"labels are right only where its entries are {PUBLISHED_VOCABULARY}'s first",
            stacklevel=3,
        )
    if embeddings == _PUBLISHED_VOCABULARY_SIZE == len(vocabulary):
        for token, expected in _PUBLISHED_SPECIAL_IDS.items():
            if vocabulary.get(token) != expected:
                raise ValueError(
                    f"tokenizer {source!r} has {token} at {vocabulary.get(token)}, {PUBLISHED_VOCABULARY} at "
                    f"{expected}; another vocabulary of the same size labels nonsense"
                )
