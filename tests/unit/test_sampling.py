"""Drawing a token, and guidance over positions."""

import pytest
import torch
from model_helpers import sample_tokens

from flextok_pl.contracts import check_sampling
from flextok_pl.models.sampling import (
    draw_distinct,
    draw_tokens,
    filter_logits,
    scale_at_positions,
    token_log_probs,
)


def draw(logits: list[float], count: int = 4000, **options: object) -> torch.Tensor:
    """Frequencies of each token."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = sample_tokens(torch.tensor([logits]).expand(count, -1), uniform, **options)
    return torch.bincount(tokens, minlength=len(logits)) / count


def test_frequencies_are_probabilities() -> None:
    logits = [0.0, 1.0, -1.0, 2.0]
    for temperature in (1.0, 0.5, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(0)
        torch.testing.assert_close(draw(logits, temperature=temperature), expected, rtol=0, atol=0.02)


def test_the_number_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(4, -1)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.999999999999], dtype=torch.float64)
    assert sample_tokens(logits, uniform).tolist() == [0, 0, 1, 2]
    shut = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for number in (0.0, 1 - 2**-53):
        assert sample_tokens(shut, torch.tensor([number], dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 1000])
def test_large_vocabularies_are_inverted_like_small_ones(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, vocabulary, generator=generator)
    logits[:, ::3] = float("-inf")
    logits[:, vocabulary // 2 :] -= 30 * torch.rand(500, 1, generator=generator)
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 1 - 2**-53, 2**-60, 0.5], dtype=torch.float64)
    cumulative = logits.softmax(1).double().cumsum(1)
    expected = (cumulative <= uniform[:, None] * (1 - 2**-40) * cumulative[:, -1:]).sum(1)
    tokens = sample_tokens(logits, uniform)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert (tokens == expected).float().mean() > 0.99  # where a number falls between two roundings, they differ
    assert cumulative.gather(1, tokens[:, None])[:, 0].sub(uniform).min() > -1e-6


def test_filters_that_leave_the_most_likely_token() -> None:
    uniform = torch.tensor([0.1, 0.99], dtype=torch.float64)
    logits = torch.tensor([[0.0, 2.0, 1.9], [3.0, 2.0, 1.0]])
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        assert sample_tokens(logits, uniform, **options).tolist() == [1, 0]


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    assert (draw(logits, top_k=2) > 0).tolist() == [False, True, False, True]
    assert (draw(logits, top_k=9) > 0).all()
    assert (draw(logits, top_p=0.4) > 0).tolist() == [False, True, False, False]
    assert (draw(logits, top_p=0.41) > 0).tolist() == [False, True, False, True]
    assert (draw(logits, top_p=0.75) > 0).tolist() == [False, True, True, True]
    assert (draw(logits, top_p=1.0) > 0).all()
    torch.testing.assert_close(draw(logits, top_k=3, top_p=0.5)[1].item(), 4 / 7, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "set temperature=0 or top_k=1"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_impossible_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(**{"temperature": 1.0, "top_k": None, "top_p": None, **options})


def test_scales() -> None:
    assert scale_at_positions(1.5, 3) == [1.5] * 3
    assert scale_at_positions([1.0, 3.0], 5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert scale_at_positions([1.0, 3.0, 1.0], 5) == [1.0, 2.0, 3.0, 2.0, 1.0]
    assert scale_at_positions([2.0], 2) == [2.0, 2.0]
    assert scale_at_positions([1.0, 2.0], 1) == [1.0]
    assert scale_at_positions(lambda i: 1 + i, 3) == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="cfg_scale"):
        scale_at_positions([], 3)


def test_many_draws_from_one_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(3, 600, generator=generator), torch.rand(3, 50, generator=generator)
    tokens = draw_tokens(logits, uniform)
    for i in range(50):
        assert torch.equal(tokens[:, i], sample_tokens(logits, uniform[:, i]))


def test_draws_without_replacement() -> None:
    """Each draw is one from what is left, so that probabilities follow the formula of two draws."""
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(2, 600, generator=generator), torch.rand(2, 300, generator=generator)
    tokens = draw_distinct(logits, uniform)
    assert torch.equal(tokens[:, 0], sample_tokens(logits, uniform[:, 0]))
    assert all(len(set(row)) == 300 for row in tokens.tolist())
    for i in (1, 7, 299):
        left = logits.scatter(1, tokens[:, :i], float("-inf"))
        assert torch.equal(tokens[:, i], sample_tokens(left, uniform[:, i]))
    p = torch.tensor([0.5, 0.3, 0.2])
    pairs = draw_distinct(p.log().expand(8000, -1), torch.rand(8000, 2, generator=generator))
    for a, b in ((0, 1), (1, 0), (2, 1)):
        share = ((pairs[:, 0] == a) & (pairs[:, 1] == b)).float().mean()
        assert share.item() == pytest.approx((p[a] * p[b] / (1 - p[a])).item(), abs=0.02)


def test_tokens_come_again_where_none_is_left() -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0], [0.0, 0.0, 0.0, 0.0]])
    tokens = draw_distinct(logits, torch.rand(2, 7, generator=torch.Generator().manual_seed(0)))
    assert sorted(tokens[0, :3].tolist()) == sorted(tokens[0, 3:6].tolist()) == [0, 1, 3]
    assert sorted(tokens[1, :4].tolist()) == [0, 1, 2, 3] and len(set(tokens[1, 4:].tolist())) == 3


def test_log_probs() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for sampling in ((0.5, None, None), (1.0, 2, None), (1.0, None, 0.7)):
        filtered = filter_logits(logits, *sampling)
        expected = filtered.double().log_softmax(-1)
        torch.testing.assert_close(token_log_probs(filtered, torch.tensor([[0, 1, 2]])), expected)
    assert torch.equal(filter_logits(logits, 0.0, 1, 0.1), logits)
