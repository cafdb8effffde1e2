"""Linear layers for few rows compute what `nn.Linear` computes."""

import pytest
import torch
from torch import nn

from flextok_pl.layers.few_rows import MOST_ROWS, Linear, few_rows_product


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, MOST_ROWS])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 64), (40, 7), (3, 1), (4, 8200)])
def test_the_same_products(rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    found = few_rows_product(x, weight)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1, 5), (4, 1, 5), (3, 4, 5), (6, 7, 5), (0, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_with_and_without_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(5, 12, bias=bias)
    plain = nn.Linear(5, 12, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    with torch.no_grad():
        assert layer(x).shape == (*shape[:-1], 12)
        torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_only_few_rows_take_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return few_rows_product(rows, weight)

    monkeypatch.setattr("flextok_pl.layers.few_rows.few_rows_product", product)
    layer = Linear(5, 12)
    layer(torch.randn(2, 5))
    with torch.no_grad():
        for rows in (1, MOST_ROWS, MOST_ROWS + 1):
            layer(torch.randn(rows, 5))
        layer.double()(torch.randn(2, 5, dtype=torch.float64))
    assert asked == [1, MOST_ROWS]
