"""The streaming inception score."""

import math

import pytest
import torch

from flextok_pl.metrics.inception_score import InceptionScore


def _score(probabilities, ids, splits=1):
    score = InceptionScore(probabilities.shape[1], splits)
    score.update(probabilities, ids)
    return score.compute()


def test_extremes():
    """Certain and even over C classes scores C; the same answer for all scores 1, whatever the answer."""
    assert _score(torch.eye(7), torch.arange(7)) == pytest.approx((7, 0))
    assert _score(torch.full((5, 7), 1 / 7), torch.arange(5)) == pytest.approx((1, 0))
    assert _score(torch.eye(7)[[2, 2, 2]], torch.arange(3)) == pytest.approx((1, 0))


def test_two_samples_by_hand():
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert _score(p, torch.tensor([4, 8]))[0] == pytest.approx(math.exp(divergence), rel=1e-12)


def test_splits_follow_the_ids():
    """Ids 0, 3, 6 are one split and 1, 4 another; the third is empty and does not count."""
    p = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)
    ids = torch.tensor([0, 1, 3, 4, 6])
    parts = [_score(p[ids % 3 == split], ids[ids % 3 == split])[0] for split in (0, 1)]
    mean, std = sum(parts) / 2, abs(parts[0] - parts[1]) / 2
    assert std > 1e-4
    assert _score(p, ids, splits=3) == pytest.approx((mean, std), rel=1e-9)


def test_order_and_batches_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(60, 5, generator=generator, dtype=torch.float64).softmax(1)
    ids = torch.randint(0, 2**62, (60,), generator=generator)
    streamed = InceptionScore(5, 4)
    for batch in torch.randperm(60, generator=generator).split(7):
        streamed.update(p[batch], ids[batch])
    assert streamed.count == 60
    assert streamed.compute() == pytest.approx(_score(p, ids, splits=4), rel=1e-12)
    assert _score(p, ids.flip(0), splits=4)[0] != pytest.approx(streamed.compute()[0], rel=1e-6)


def test_what_it_refuses():
    for bad in (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.5, -0.5, 0.0]]), torch.full((1, 3), math.nan)):
        score = InceptionScore(3)
        for probabilities in (torch.full((1, 3), 1 / 3), bad, torch.full((1, 3), 1 / 3)):
            score.update(probabilities, torch.tensor([0]))
        for read in (score.compute, score.all_reduce, score.state_dict):
            with pytest.raises(ValueError, match="softmax"):
                read()
    score = InceptionScore(3)
    with pytest.raises(ValueError, match=r"\(1, 2\); this score takes \(B, 3\)"):
        score.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="at least one sample"):
        score.compute()
    with pytest.raises(ValueError, match="splits=0"):
        InceptionScore(3, splits=0)
