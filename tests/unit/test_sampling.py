"""Drawing a token, and guidance over positions."""

import pytest
import torch

from flextok_pl.contracts import check_sampling
from flextok_pl.models.sampling import sample_tokens, scale_at_positions


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


def test_greedy() -> None:
    uniform = torch.tensor([0.1, 0.99], dtype=torch.float64)
    logits = torch.tensor([[0.0, 2.0, 1.9], [3.0, 2.0, 1.0]])
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}):
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
