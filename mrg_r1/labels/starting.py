"""What a labeler's training starts from: random weights, a pretrained BERT, a labeler of ours, or the published
CheXbert.

Reports and a size, or a path, enter; CheXbert and its tokenizer leave. From a plain BERT only the heads are random;
everything else is the checkpoint's, key by key.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from torch import Tensor
from transformers import BertConfig

from mrg_r1.labels.chexbert import MAX_TOKENS, CheXbert
from mrg_r1.labels.labeler import Labeler
from mrg_r1.labels.loading import bert_config, load_strictly, read_pickled, read_safetensors, read_settings
from mrg_r1.labels.tokenizer import SPECIAL_TOKENS, bert_tokenizer, read_tokenizer

# What a checkpoint may hold beside BERT's encoder: its pooler and pre-training heads, which CheXbert lacks, and an old
# buffer.
_DROPPED = ("pooler.", "cls.", "embeddings.position_ids")
# the layer norms' names in checkpoints that began in TensorFlow, bert-base-uncased's among them
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class LabelerSize:
    """BERT's sizes; the feed-forward width is twice `hidden`, which reads as well as BERT's four times and takes two
    thirds of the time.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int  # learned pieces at most, besides the characters; a small corpus has fewer


SIZES: dict[str, LabelerSize] = {
    "tiny": LabelerSize(layers=2, hidden=64, heads=4, vocabulary=2000),
    "small": LabelerSize(layers=2, hidden=128, heads=8, vocabulary=4000),
}


def random_start(reports: Sequence[str], size: LabelerSize) -> tuple[CheXbert, Tokenizer]:
    """A model of `size` with first weights from torch's global seed, and a tokenizer learned from the reports."""
    tokenizer = train_tokenizer(reports, size.vocabulary)
    return random_model(_config(size, tokenizer.get_vocab_size())), tokenizer


def random_model(config: BertConfig) -> CheXbert:
    """A model with first weights from torch's global seed."""
    model = CheXbert(config)
    start_local(model)
    return model


def read_start(start: Path, tokenizer: str | None = None) -> tuple[CheXbert, Tokenizer]:
    """The model that a training starts from, in float32 on the CPU, and its tokenizer.

    The heads of a plain BERT are drawn from torch's global seed.

    Args:
        start: a directory of a BERT as transformers writes it (config.json, model.safetensors or pytorch_model.bin), a
            directory of ours, or a published CheXbert checkpoint file.
        tokenizer: a directory with tokenizer.json or vocab.txt, or a name on the Hugging Face hub. None: the
            directory's own, or bert-base-uncased's for a published file, as in `Labeler.load`.

    Raises:
        FileNotFoundError: nothing at `start`, a missing file of the directory, or a tokenizer that cannot be had.
        ValueError: another architecture than BERT, a missing, unexpected or wrongly shaped tensor, or a pickled object.
    """
    start = Path(start)
    stored = _read_bert_config(start / "config.json") if start.is_dir() else {}
    if not start.is_dir() or stored.get("architectures") == ["CheXbert"]:
        labeler = Labeler.load(start, tokenizer=tokenizer)
        return labeler.model, labeler.tokenizer
    weights: dict[str, Tensor] = {}
    for name, tensor in _read_weights(start).items():
        if _plain(name) in weights:
            raise ValueError(f"{start}: {_plain(name)} stands twice, also as {name}; save the model again")
        weights[_plain(name)] = tensor
    model = CheXbert(bert_config(stored, start / "config.json"))
    state = {f"bert.{name}": tensor for name, tensor in weights.items() if not name.startswith(_DROPPED)}
    load_strictly(
        model,
        state | {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("bert.")},
        start,
    )
    return model, _read_words(tokenizer if tokenizer is not None else str(start))


def _read_bert_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a BERT directory has config.json, model.safetensors and tokenizer files"
        )
    stored = read_settings(path)
    if stored.get("model_type") != "bert":
        raise ValueError(
            f"{path}: model_type is {stored.get('model_type')!r}, not 'bert'; a labeler starts from a BERT only"
        )
    return dict(stored)


def _read_weights(folder: Path) -> Mapping[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: neither model.safetensors nor pytorch_model.bin in it; a sharded checkpoint is saved again "
            "whole"
        )
    stored = read_pickled(path)
    if not isinstance(stored, Mapping) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise ValueError(f"{path}: not a state dict of tensors; save the model with transformers' save_pretrained")
    return stored


def _plain(name: str) -> str:
    """A tensor's name in BertModel: without `bert.`, and with the layer norm's weight and bias by these names."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name.removeprefix("bert.")


def _read_words(source: str) -> Tokenizer:
    """As `Labeler.load` reads a tokenizer, and a bare vocab.txt with capitals in it as a cased one."""
    tokenizer = read_tokenizer(source)
    bare = (Path(source) / "vocab.txt").is_file() and not (Path(source) / "tokenizer.json").is_file()
    if bare and any(
        word != word.lower() for word in tokenizer.get_vocab().keys() - set(SPECIAL_TOKENS) if not word.startswith("[")
    ):
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    return tokenizer


# Random weights


def train_tokenizer(reports: Sequence[str], vocabulary: int) -> Tokenizer:
    """A lower-case WordPiece tokenizer of at most `vocabulary` learned pieces (a large alphabet may add to them).

    Every printable ASCII character, and every character of the reports, is a piece at a word's start and inside one: no
    such word is ever unknown.
    """
    tokenizer = bert_tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    seen = {
        character
        for report in reports
        for character in tokenizer.normalizer.normalize_str(report)
        if not character.isspace()
    }
    alphabet = sorted(seen | set(string.printable.lower()) - set(string.whitespace))
    # The trainer breaks ties by id and numbers the characters in a hash table's order; numbering them first makes it
    # repeatable.
    first = [*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary + len(first), min_frequency=2, special_tokens=first, show_progress=False
    )
    tokenizer.train_from_iterator(reports, trainer)
    return bert_tokenizer(models.WordPiece(tokenizer.get_vocab(with_added_tokens=False), unk_token="[UNK]"))


def start_local(model: CheXbert) -> None:
    """First weights with which the first layer's heads look at a token's neighbours, in place.

    A negation and its noun stand a few tokens apart anywhere in a report. BERT's random position embeddings give no
    notion of "next to", which a few thousand reports are too few to teach: on phantom reports of unseen wording six
    passes reach a micro-F1 of 0.80 from random weights and of 0.94 from these. So positions start as sinusoids in the
    first H / heads dimensions, which the words leave free, and head h's query is the position o(h) away: scores peak
    there, sharply for the near neighbours, broadly (slow sinusoids only) for the far ones. Everything is trained from
    there on.

    Source: sinusoids and the rotation between two positions, Vaswani et al. (arXiv 1706.03762), section 3.5; starting
    attention from a convolution, ConViT (arXiv 2103.10697), section 3.
    """
    config = model.bert.config
    width = config.hidden_size // config.num_attention_heads  # dimensions of the positions, and of a head
    spread = 0.1  # of the embeddings before their layer norm, which makes it 1
    periods = torch.logspace(math.log10(4), math.log10(400), width // 2)  # in tokens
    frequencies = 2 * math.pi / periods
    angles = torch.arange(config.max_position_embeddings)[:, None] * frequencies  # [positions, width / 2]
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.word_embeddings.weight.normal_(0.0, spread)[:, :width] = 0.0
        embeddings.position_embeddings.weight.zero_()
        embeddings.position_embeddings.weight[:, 0:width:2] = math.sqrt(2) * spread * angles.sin()
        embeddings.position_embeddings.weight[:, 1:width:2] = math.sqrt(2) * spread * angles.cos()
        attention = model.bert.encoder.layer[0].attention.self
        for projection in (attention.query, attention.key):
            projection.weight.normal_(0.0, 0.02)
        for head in range(config.num_attention_heads):
            offset, slowest_left_out = _GAZES[head % len(_GAZES)]
            for pair in range(width // 2):
                if periods[pair] < slowest_left_out:
                    continue
                row, column = head * width + 2 * pair, 2 * pair
                cosine, sine = math.cos(frequencies[pair] * offset), math.sin(frequencies[pair] * offset)
                attention.key.weight[row : row + 2, column : column + 2] += torch.eye(2)
                attention.query.weight[row : row + 2, column : column + 2] += torch.tensor(
                    [[cosine, sine], [-sine, cosine]]
                )


# where each head of the first layer looks, and the period in tokens below which sinusoids are left out
_GAZES = ((-1, 0), (1, 0), (-2, 0), (2, 0), (-4, 10), (4, 10), (-6, 14), (6, 14))


def _config(size: LabelerSize, vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=2 * size.hidden,
        # the augmentation is enough, and learning is twice as fast; [CLS] keeps CheXbert's 0.1
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=size.hidden**-0.5,  # BERT's 0.02 is made for 768 dimensions
    )
