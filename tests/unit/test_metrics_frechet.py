"""Streaming statistics and the distances on them."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from flextok_pl.metrics import kernel
from flextok_pl.metrics.frechet import FeatureStatistics, features_to_statistics, frechet_distance
from flextok_pl.metrics.kernel import KernelReference, draw_subsets, kernel_distance


def _features(count, dim, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing * scale + shift


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_streaming_is_the_covariance_of_all(batch_size):
    features = _features(500, 12, shift=1e4)  # a mean that a sum of squares in float32, or even float64, would feel
    statistics = FeatureStatistics(12)
    for batch in features.split(batch_size):
        statistics.update(batch)
    np.testing.assert_allclose(statistics.mean.numpy(), features.numpy().mean(0), rtol=1e-12)
    reference = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance.numpy(), reference, rtol=1e-9, atol=1e-9)


def test_distance_of_one_dimension_by_hand():
    a = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
    b = torch.tensor([[1.0], [5.0]])  # mean 3, variance 8
    expected = 4 + 2 + 8 - 2 * math.sqrt(16)
    assert frechet_distance(features_to_statistics(a), features_to_statistics(b)) == pytest.approx(expected, rel=1e-12)


def test_distance_agrees_with_the_matrix_square_root():
    a, b = features_to_statistics(_features(300, 16)), features_to_statistics(_features(400, 16, seed=1, shift=0.5))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    difference = (a.mean - b.mean).numpy()
    expected = difference @ difference + np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_fewer_samples_than_features():
    """tr (C_a C_b)^(1/2) is the nuclear norm of X_a X_b^T / sqrt((n - 1)(m - 1)) for centred data."""
    x, y = _features(20, 50), _features(30, 50, seed=3, shift=0.2)
    a, b = features_to_statistics(x), features_to_statistics(y)
    assert not a.full_rank
    assert features_to_statistics(_features(51, 50)).full_rank
    x, y = x - x.mean(0), y - y.mean(0)
    nuclear = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt(19 * 29)
    difference = a.mean - b.mean
    expected = difference @ difference + a.covariance.trace() + b.covariance.trace() - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8 * float(a.covariance.trace()))


def test_features_that_never_vary():
    """A constant feature makes the covariance singular whatever N is; all of them leave the means only."""
    a, b = _features(300, 6), _features(300, 6, seed=1, shift=0.3)
    widened = [torch.cat([x, torch.full((300, 3), 2.0, dtype=torch.float64)], 1) for x in (a, b)]
    expected = frechet_distance(features_to_statistics(a), features_to_statistics(b))
    assert frechet_distance(*map(features_to_statistics, widened)) == pytest.approx(expected, rel=1e-9)
    constant = features_to_statistics(torch.full((300, 6), 1.0))
    moved = features_to_statistics(torch.full((300, 6), 3.0))
    assert frechet_distance(constant, moved) == pytest.approx(24)


def test_a_later_update_is_not_answered_from_the_kept_factor():
    a, b = features_to_statistics(_features(60, 4)), features_to_statistics(_features(60, 4, seed=1))
    before = frechet_distance(a, b)
    a.update(_features(60, 4, seed=2, scale=3))
    whole = features_to_statistics(torch.cat([_features(60, 4), _features(60, 4, seed=2, scale=3)]))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(whole, b), rel=1e-10)
    assert abs(frechet_distance(a, b) - before) > 1e-3


def test_bad_features_are_refused():
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        statistics.update(torch.zeros(2, 4))
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(statistics, statistics)
    with pytest.raises(ValueError, match="one extractor"):
        frechet_distance(features_to_statistics(torch.zeros(4, 2)), features_to_statistics(torch.zeros(4, 3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_found_when_statistics_are_read(bad):
    statistics = FeatureStatistics(3)
    rows = torch.ones(2, 3)
    rows[1, 2] = bad
    for features in (torch.ones(4, 3), rows, torch.ones(4, 3)):
        statistics.update(features)
    for read in (statistics.all_reduce, statistics.state_dict, lambda: statistics.covariance):
        with pytest.raises(ValueError, match="features hold NaN or infinite values"):
            read()


def test_kernel_distance_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    # Unbiased: within x k(0, 1) = 1, within y k(2, 3) = 343, across the mean of 1, 1, 27, 64.
    assert kernel_distance(x, y)[0] == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    generator = torch.Generator().manual_seed(5)
    values = [
        kernel_distance(torch.randn(30, 8, generator=generator), torch.randn(30, 8, generator=generator))[0]
        for _ in range(300)
    ]
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    assert abs(mean) < 4 * error
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("paired", [False, True])
def test_a_kernel_reference_is_the_features(paired):
    a, *others = torch.randn(3, 60, 8, generator=torch.Generator().manual_seed(0))
    reference = KernelReference(a)
    for b in others:
        options = {"subsets": 5, "subset_size": 20, "paired": paired}
        assert kernel_distance(reference, b, **options) == kernel_distance(a, b, **options)


@pytest.mark.parametrize("paired", [False, True])
def test_kernels_of_subsets_are_parts_of_the_whole(monkeypatch, paired):
    a, b = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    whole = kernel_distance(a, b, subsets=5, subset_size=20, paired=paired)
    monkeypatch.setattr(kernel, "WHOLE", 59)
    assert kernel_distance(a, b, subsets=5, subset_size=20, paired=paired) == pytest.approx(whole, rel=1e-12)


def test_statistics_from_moments_are_those_of_the_features():
    a, b = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, other = features_to_statistics(a), features_to_statistics(b)
    given = FeatureStatistics.from_moments(a.mean(0), a.T.cov())
    assert given.full_rank and frechet_distance(given, other) == pytest.approx(frechet_distance(ours, other), rel=1e-10)
    with pytest.raises(ValueError, match=r"they must be \(D,\) and \(D, D\)"):
        FeatureStatistics.from_moments(torch.zeros(3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics.from_moments(torch.zeros(2), torch.full((2, 2), float("nan")))


def test_kernel_subsets_are_a_function_of_the_seed():
    a, b = _features(50, 6), _features(70, 6, seed=1)
    first = kernel_distance(a, b, subsets=5, subset_size=20, seed=3)
    assert kernel_distance(a, b, subsets=5, subset_size=20, seed=3) == first
    assert kernel_distance(a, b, subsets=5, subset_size=20, seed=4) != first
    assert first[1] > 0
    assert kernel_distance(a, b[:40], subset_size=50)[1] == 0
    for i, j in draw_subsets(50, 70, 5, 20, 3):
        assert len(i.unique()) == len(j.unique()) == 20
        assert int(i.max()) < 50 and int(j.max()) < 70


def test_kernel_distance_of_pairs():
    """A reconstruction that differs by independent noise must not look closer than an independent sample."""
    generator = torch.Generator().manual_seed(5)
    paired, unpaired = [], []
    for _ in range(300):
        common = torch.randn(20, 8, generator=generator)
        a, b = common, 0.95 * common + (1 - 0.95**2) ** 0.5 * torch.randn(20, 8, generator=generator)
        paired.append(kernel_distance(a, b, paired=True)[0])
        unpaired.append(kernel_distance(a, b)[0])
    assert abs(np.mean(paired)) < 4 * np.std(paired) / math.sqrt(300)  # both sides have the same distribution
    assert np.mean(unpaired) < -10 * np.std(unpaired) / math.sqrt(300)
    with pytest.raises(ValueError, match="cannot be paired"):
        kernel_distance(torch.zeros(4, 2), torch.zeros(5, 2), paired=True)
