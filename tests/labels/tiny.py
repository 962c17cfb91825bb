"""A CheXbert of a few words and two thin layers, and files in the published layout."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig

from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.labels.tokenizer import bert_tokenizer

WORDS = (
    "no evidence of pleural effusion or pneumothorax the heart is enlarged lungs are clear left right mild edema "
    ". , ##s ##ion"
).split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PAD, UNK, CLS, SEP = range(4)


def tiny_config(**changes: int) -> BertConfig:
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 96,
    }
    # large, so that different texts get different classes
    return BertConfig(**{**sizes, **changes}, initializer_range=0.3)


def tiny_tokenizer() -> Tokenizer:
    return bert_tokenizer(models.WordPiece({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))


def tiny_model(seed: int = 0, **changes: int) -> CheXbert:
    torch.manual_seed(seed)
    model = CheXbert(tiny_config(**changes))
    for head in model.linear_heads:
        torch.nn.init.normal_(head.get_parameter("weight"))
    return model.eval()


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
