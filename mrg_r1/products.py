"""Matrix products in float32 on a CPU by oneDNN: a tenth to a fifth faster than torch's own, which are MKL's.

On one core of an AMD EPYC with AVX-512 products of 2,200 x 256 x 512 reach 107 to 112 GFLOP/s here and 90 to 92 there,
by turns in one process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# A private name of torch, so it may go; then these products are torch's own and nothing else changes.
ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Multiplications from which it is asked: it compiles a kernel for each shape, and passes differ in theirs
WORTH = 2**26


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without a gradient: for the insides of an autograd function, and where none is wanted.

    Args:
        x: [T, in].
        weight: [out, in]; of a transposed view the product is as fast.
        bias: [out].

    Returns:
        [T, out].
    """
    if onednn_takes(x) and len(x) * weight.numel() >= WORTH and _lies_close(x) and _lies_close(weight):
        result: Tensor = ONEDNN(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def onednn_takes(x: Tensor) -> bool:
    """Whether oneDNN's products are there for it: float32 on a CPU."""
    return ONEDNN is not None and x.device.type == "cpu" and x.dtype == torch.float32


def _lies_close(matrix: Tensor) -> bool:
    """Row behind row or column behind column: of other views oneDNN's products may take a hundred times as long."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()
