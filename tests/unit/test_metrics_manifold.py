"""Precision, recall, density and coverage on samples whose neighbours are known."""

import numpy as np
import pytest
import torch

from flextok_pl.metrics import manifold
from flextok_pl.metrics.manifold import manifold_scores


def precision_recall(real, generated, k):
    """Density and coverage need no more samples than these two."""
    scores = manifold_scores(real, generated, k, density_k=1)
    return scores["precision"], scores["recall"]


def _line(*places):
    return torch.tensor(places, dtype=torch.float64)[:, None]


def test_precision_and_recall_by_hand():
    """The balls of the real samples cover [-1, 5], those of the generated ones [1.5, 10.5]."""
    real, generated = _line(0, 1, 3), _line(2, 2.5, 6.5)
    assert precision_recall(real, generated, k=1) == (2 / 3, 1 / 3)
    assert precision_recall(generated, real, k=1) == (1 / 3, 2 / 3), "the roles are exchanged"


def test_density_and_coverage_by_hand():
    """The real balls are [-1, 1], [0, 2], [1, 5] and [4, 12], without their ends."""
    real, generated = _line(0, 1, 3, 8), _line(0.5, 2, 2.5, 3, 20)
    scores = manifold_scores(real, generated, k=1, density_k=1)
    assert scores["density"] == pytest.approx((2 + 1 + 1 + 1 + 0) / 5)
    assert scores["coverage"] == 3 / 4


def test_density_and_coverage_as_their_paper_states_them():
    generator = torch.Generator().manual_seed(2)
    real, generated = torch.randn(90, 5, generator=generator), 0.8 * torch.randn(70, 5, generator=generator) + 0.4
    x, y = real.double().numpy(), generated.double().numpy()
    radii = np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, 5]
    inside = np.linalg.norm(x[:, None] - y[None], axis=2) < radii[:, None]
    scores = manifold_scores(real, generated)
    assert scores["density"] == pytest.approx(inside.sum() / (5 * 70), rel=1e-12)
    assert scores["coverage"] == pytest.approx(inside.any(1).mean(), rel=1e-12)
    assert 0 < scores["coverage"] < 1


def test_a_part_of_the_modes_is_precise_but_recalls_a_part():
    generator = torch.Generator().manual_seed(0)
    first, second, other_first, other_second, noise = torch.randn(5, 200, 6, generator=generator)
    real = torch.cat([first, second + 30])
    one_mode, all_and_noise = other_first, torch.cat([other_first, other_second + 30, 20 * noise.repeat(2, 1) - 200])
    precision, recall = precision_recall(real, one_mode, 3)
    assert precision > 0.8 and 0.4 < recall < 0.5
    precision, recall = precision_recall(real, all_and_noise, 3)
    assert 0.4 < precision <= 0.5 and recall > 0.7
    assert precision_recall(real, real, 3) == (1, 1)


def test_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    real, generated = (count / 40 * torch.randn(count, 4, generator=generator) for count in (37, 60))
    whole = manifold_scores(real, generated)
    assert all(0 < whole[name] < 1 for name in ("precision", "recall", "coverage")) and whole["density"] > 0
    for block in (1, 7, 37):
        monkeypatch.setattr(manifold, "BLOCK", block)
        assert manifold_scores(real, generated) == whole


@pytest.mark.parametrize(("count", "dim"), [(30, 2048), (300, 64), (1100, 1280)])
def test_a_set_against_itself_is_exactly_one(count, dim):
    """In sum every ball holds its centre and all neighbours but the last, which lies on its edge."""
    features = torch.randn(count, dim, generator=torch.Generator().manual_seed(3)).abs() + 10
    shuffled = features[torch.randperm(count, generator=torch.Generator().manual_seed(4))]
    for other in (features, shuffled):
        assert set(manifold_scores(features, other).values()) == {1.0}
    copies = manifold_scores(features, features[:1].expand(8, -1), density_k=7)
    assert copies["precision"] == 1 and copies["recall"] == 1 / count, "balls of copies hold copies only"


def test_too_few_samples():
    for sizes in ((5, 9), (9, 5)):
        with pytest.raises(ValueError, match=f"density_k=5 .* {sizes[0]} real and {sizes[1]} generated"):
            manifold_scores(*(torch.zeros(size, 2) for size in sizes))
    with pytest.raises(ValueError, match="k=0"):
        manifold_scores(torch.zeros(9, 2), torch.zeros(9, 2), k=0)
    with pytest.raises(ValueError, match="one extractor"):
        manifold_scores(torch.zeros(9, 2), torch.zeros(9, 3))
