"""Products by oneDNN are torch's own, of whatever lies in memory in whatever way, and it is asked where that pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mrg_r1 import products


class Counted:
    """oneDNN's product, counted."""

    def __init__(self, product) -> None:
        self.product, self.calls = product, 0

    def __call__(self, *arguments) -> Tensor:
        self.calls += 1
        return self.product(*arguments)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Counted:
    if products.ONEDNN is None:
        pytest.skip("this torch has no oneDNN")
    counted = Counted(products.ONEDNN)
    monkeypatch.setattr(products, "ONEDNN", counted)
    monkeypatch.setattr(products, "WORTH", 5 * 6 * 7)
    return counted


def laid(matrix: Tensor, way: str) -> Tensor:
    """The same values, lying otherwise."""
    if way == "transposed":
        return matrix.t().contiguous().t()
    if way == "spread":
        return torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]]
    return matrix.contiguous()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("of_weight", ["whole", "transposed", "spread"])
@pytest.mark.parametrize("of_x", ["whole", "transposed", "spread"])
def test_a_product_is_torchs(onednn: Counted, of_x: str, of_weight: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, add = (torch.randn(shape, generator=generator) for shape in ((5, 6), (7, 6), (7,)))
    given = add if bias else None
    found = products.product(laid(x, of_x), laid(weight, of_weight), given)
    torch.testing.assert_close(found, F.linear(x, weight, given), atol=1e-6, rtol=1e-5)
    assert onednn.calls == ("spread" not in (of_x, of_weight))


@pytest.mark.parametrize(
    ("rows", "dtype", "asked"), [(5, torch.float32, 1), (4, torch.float32, 0), (50, torch.bfloat16, 0)]
)
def test_onednn_is_asked_for_large_products_in_float32(
    onednn: Counted, rows: int, dtype: torch.dtype, asked: int
) -> None:
    products.product(torch.ones(rows, 6, dtype=dtype), torch.ones(7, 6, dtype=dtype))
    assert onednn.calls == asked
