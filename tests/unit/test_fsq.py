"""Finite scalar quantisation."""

import pytest
import torch

from flextok_pl.models.fsq import FSQ


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (2, 3), (99, 99), (16, 4, 7)])
def test_every_index_survives_a_round_trip(levels: tuple[int, ...]) -> None:
    quantizer = FSQ(levels)
    tokens = torch.arange(min(quantizer.vocab_size, 64000))
    codes = quantizer.tokens_to_codes(tokens)
    assert codes.abs().max() <= 1
    assert torch.equal(quantizer.codes_to_tokens(codes), tokens)


@pytest.mark.parametrize("level", [2, 3, 5, 8, 999, 1000])
def test_number_of_levels(level: int) -> None:
    values = FSQ((level,))(torch.linspace(-50, 50, 100001)[:, None]).unique()
    assert len(values) == level


def test_first_dimension_is_fastest() -> None:
    quantizer = FSQ((8, 5))
    step = quantizer.tokens_to_codes(torch.tensor([0, 1, 8]))
    assert (step[1] - step[0]).tolist() == pytest.approx([0.25, 0])
    assert (step[2] - step[0]).tolist() == pytest.approx([0, 0.5])


def test_gradient_passes_the_rounding() -> None:
    quantizer = FSQ((8, 5))
    codes = torch.tensor([[0.3, -0.2]], requires_grad=True)
    quantizer(codes).sum().backward()
    bounded = torch.autograd.functional.jacobian(lambda c: quantizer.bound(c) / torch.tensor([4, 2]), codes.detach())
    torch.testing.assert_close(codes.grad[0], bounded[0, :, 0].diagonal())


def test_tokens_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"0\.\.39.*fsq_levels"):
        FSQ((8, 5)).tokens_to_codes(torch.tensor([3, 40]))
