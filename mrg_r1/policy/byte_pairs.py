"""The byte-level BPE that a tiny policy's tokenizer learns, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def learn_byte_pairs(texts: Sequence[str], vocabulary: int, special_tokens: Sequence[str]) -> Tokenizer:
    """At most `vocabulary` tokens, the special ones first among them.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("create_tiny_policy: no texts to learn the tokenizer from")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no report is unknown
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe
