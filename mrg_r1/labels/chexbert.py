"""CheXbert's architecture at any size: BERT and a head for each of the 14 observations.

Ids enter, logits leave. The weights come from `labels.loading`, the texts from `labels.labeler`.

Source: CheXbert (arXiv 2004.09167), section 3: BERT, the last hidden state of [CLS], 14 linear heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mrg_r1.labels.observations import CLASSES_PER_OBSERVATION, OBSERVATIONS

MAX_TOKENS = 512  # BERT's positions, [CLS] and [SEP] included


class CheXbert(nn.Module):
    """BERT and 14 linear heads on the last hidden state of [CLS]: 13 of 4 classes, the last (No Finding) of 2."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(0.1)
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, classes) for classes in CLASSES_PER_OBSERVATION)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of every observation's classes, as training needs them; labelling takes the shorter way of
        `labels.inference`.

        The last layer asks for [CLS] alone, the only token that the heads read: the module's own numbers and gradients
        to rounding, without half of the work of two layers.

        Args:
            input_ids: [N, L] int64, [CLS] first, padded on the right.
            attention_mask: [N, L] int64, 0 on padding.

        Returns:
            [N, 14, 4] logits in the model's dtype; the two classes that No Finding lacks are -inf.
        """
        present = attention_mask.bool()[:, None, None]  # [N, 1, 1, L]
        x = self.bert.embeddings(input_ids=input_ids)  # [N, L, H]
        *layers, last = self.bert.encoder.layer
        for layer in layers:
            x = _layer(layer, x, x, present)
        cls = _layer(last, x[:, :1], x, present)  # [N, 1, H]
        return self.classify(self.dropout(cls[:, 0]))

    def classify(self, cls: Tensor) -> Tensor:
        """The heads on [CLS]'s hidden states [N, H]: [N, 14, 4], -inf for the two classes that No Finding lacks."""
        # [54, H]: all heads as one product
        weight = torch.cat([head.get_parameter("weight") for head in self.linear_heads])
        bias = torch.cat([head.get_parameter("bias") for head in self.linear_heads])  # [54]
        logits = nn.functional.linear(cls, weight, bias)  # [N, 54]
        # only the last head is short, so the padding stands at the end
        missing = 4 * len(OBSERVATIONS) - logits.shape[1]
        return nn.functional.pad(logits, (0, missing), value=float("-inf")).view(-1, len(OBSERVATIONS), 4)


def _layer(layer: Any, asking: Tensor, seen: Tensor, present: Tensor) -> Tensor:
    """One layer of BERT for the tokens `asking` [N, A, H], which see all those `seen` [N, L, H] that are `present`."""
    attention = layer.attention.self
    queries, keys, values = (
        projection(tokens).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)  # [N, heads, A or L, D]
        for projection, tokens in ((attention.query, asking), (attention.key, seen), (attention.value, seen))
    )
    dropped = attention.dropout.p if layer.training else 0.0
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=present, dropout_p=dropped)
    attended = layer.attention.output(mixed.transpose(1, 2).flatten(2), asking)
    return layer.output(layer.intermediate(attended), attended)
