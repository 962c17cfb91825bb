"""CheXbert's forward pass as labelling needs it: rows of ids enter, logits leave, and what cannot change them is not
computed.

The same numbers as the module's in evaluation mode, from the same parameters, read at each call: nothing is copied, so
nothing grows stale while a model trains. What is saved:
- hardly any padding: rows are packed one after another, and only attention sees which belong together;
- the last layer computes keys and values for every token, all else for [CLS] alone, the only one that the heads read;
- on a CPU in float32, oneDNN's products with bias, GELU and residual in them (107 GFLOP/s where torch's own do 96, on
  one core).

Source: CheXbert (arXiv 2004.09167), section 3; BERT (arXiv 1810.04805) with post-norm layers as in Vaswani et al.
(arXiv 1706.03762).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

from mrg_r1.labels.chexbert import CheXbert
from mrg_r1.products import ONEDNN, onednn_takes

# Padding that a row may get so that attention takes it together with longer ones: a CPU does as well with none, a GPU
# wants few kernels.
SLACK = {"cpu": 0.0, "cuda": 0.2}


@dataclass(frozen=True)
class Block:
    """Rows that attention takes together: a rectangle of tokens that follow one another.

    Attributes:
        rows: how many.
        length: of each in tokens, padding included.
        mask: [rows, 1, 1, length] bool, False on padding; None where there is none.
    """

    rows: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class Packed:
    """A batch of N rows as one line of T tokens.

    Attributes:
        ids: [T] int64.
        positions: [T] int64, of each token in its row.
        first: [N] int64, where each row's [CLS] stands.
        blocks: in the order of the tokens.
    """

    ids: Tensor
    positions: Tensor
    first: Tensor
    blocks: list[Block]


def rectangle(rows: Sequence[Sequence[int]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows of ids padded on the right: ids [N, L] and which of them are not padding [N, L]."""
    lengths = np.array([len(row) for row in rows])
    present: NDArray[np.bool_] = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(present.shape, pad, dtype=np.int64)
    ids[present] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return ids, present


def pack(rows: Sequence[Sequence[int]], *, pad: int, slack: float, device: torch.device) -> Packed:
    """Lay rows of ids one after another.

    Args:
        rows: N >= 1 rows, longest first.
        pad: id of the padding.
        slack: the share of a block's length by which a row in it may be shorter; 0: rows of equal length only, no
            padding.
        device: where the result lies.
    """
    groups: list[list[Sequence[int]]] = []
    for row in rows:
        if groups and len(row) >= (1 - slack) * len(groups[-1][0]):
            groups[-1].append(row)
        else:
            groups.append([row])
    rectangles = [rectangle(group, pad) for group in groups]
    positions = [np.broadcast_to(np.arange(ids.shape[1]), ids.shape).ravel() for ids, _ in rectangles]
    lengths = np.concatenate([np.full(len(ids), ids.shape[1]) for ids, _ in rectangles])
    return Packed(
        ids=_send(np.concatenate([ids.ravel() for ids, _ in rectangles]), device),
        positions=_send(np.concatenate(positions), device),
        first=_send(np.cumsum(lengths) - lengths, device),
        blocks=[
            Block(ids.shape[0], ids.shape[1], None if present.all() else _send(present, device)[:, None, None])
            for ids, present in rectangles
        ],
    )


@torch.no_grad()
def read(model: CheXbert, packed: Packed) -> Tensor:
    """Logits of a packed batch, without dropout whatever the model's mode.

    Returns:
        [N, 14, 4] float32, -inf for the two classes that No Finding lacks.
    """
    bert = model.bert
    x = _embed(bert.embeddings, packed)
    *layers, last = bert.encoder.layer
    for layer in layers:
        x = _layer(layer, x, packed, bert.config.num_attention_heads)
    cls = _layer(last, x, packed, bert.config.num_attention_heads, only=packed.first)
    return model.classify(cls).float()


def _embed(embeddings: Any, packed: Packed) -> Tensor:
    """Words, positions and the first of the two segments: [T, H]."""
    x = F.embedding(packed.ids, embeddings.word_embeddings.weight)
    x += F.embedding(packed.positions, embeddings.position_embeddings.weight)
    x += embeddings.token_type_embeddings.weight[0]
    return _norm(embeddings.LayerNorm, x)


def _layer(layer: Any, x: Tensor, packed: Packed, heads: int, only: Tensor | None = None) -> Tensor:
    """One layer over [T, H]; with `only` [N], the layer's output for those tokens, one of each row: [N, H]."""
    attention, after, inner, outer = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    keys, values = _linear(attention.key, x), _linear(attention.value, x)
    if only is not None:
        x = x[only]
    mixed = _attend(_linear(attention.query, x), keys, values, packed.blocks, heads, one_query=only is not None)
    x = _norm(after.LayerNorm, _linear_add(after.dense, mixed, x))
    return _norm(outer.LayerNorm, _linear_add(outer.dense, _activated(inner, x), x))


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, blocks: Sequence[Block], heads: int, *, one_query: bool
) -> Tensor:
    """Attention of each row to itself: [Q, H] of queries [Q, H] (all tokens, or one a row) and keys and values
    [T, H].
    """
    mixed = torch.empty_like(queries)
    asked = seen = 0
    for block in blocks:
        width = 1 if one_query else block.length
        ask, see = slice(asked, asked + block.rows * width), slice(seen, seen + block.rows * block.length)
        asked, seen = ask.stop, see.stop
        q, k, v = (
            part.view(block.rows, -1, heads, part.shape[1] // heads).transpose(1, 2)
            for part in (queries[ask], keys[see], values[see])
        )
        answer = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask)  # [rows, heads, width, D]
        mixed[ask].view(block.rows, width, heads, -1).copy_(answer.transpose(1, 2))
    return mixed


def _norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    if onednn_takes(x):
        return ONEDNN(x, module.weight, module.bias, "none", [], "")
    return F.linear(x, module.weight, module.bias)


def _linear_add(module: nn.Linear, x: Tensor, residual: Tensor) -> Tensor:
    if onednn_takes(x):
        return ONEDNN.binary(x, residual, module.weight, module.bias, "add")
    return F.linear(x, module.weight, module.bias).add_(residual)


def _activated(intermediate: Any, x: Tensor) -> Tensor:
    module, activation = intermediate.dense, intermediate.intermediate_act_fn
    if onednn_takes(x) and isinstance(activation, GELUActivation):
        return ONEDNN(x, module.weight, module.bias, "gelu", [], "none")
    return activation(F.linear(x, module.weight, module.bias))


def _send(array: NDArray[Any], device: torch.device) -> Tensor:
    """To the device; to a GPU from pinned memory, so that the copy runs beside the batch before."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
