"""Improved precision and recall on samples whose neighbours are known."""

import pytest
import torch

from flextok_pl.metrics import manifold
from flextok_pl.metrics.manifold import neighbour_distances, precision_recall


def _line(*places):
    return torch.tensor(places, dtype=torch.float64)[:, None]


def test_neighbours_by_hand():
    assert neighbour_distances(_line(0, 1, 3, 7), 1).tolist() == [1, 1, 2, 4]
    assert neighbour_distances(_line(0, 1, 3, 7), 2).tolist() == [3, 2, 3, 6]
    assert neighbour_distances(_line(5, 5, 5), 2).tolist() == [0, 0, 0], "copies are neighbours"


def test_precision_and_recall_by_hand():
    """The balls of the real samples cover [-1, 5], those of the generated ones [1.5, 10.5]."""
    real, generated = _line(0, 1, 3), _line(2, 2.5, 6.5)
    assert precision_recall(real, generated, k=1) == (2 / 3, 1 / 3)
    assert precision_recall(generated, real, k=1) == (1 / 3, 2 / 3), "the roles are exchanged"


def test_a_part_of_the_modes_is_precise_but_recalls_a_part():
    generator = torch.Generator().manual_seed(0)
    first, second, other_first, other_second, noise = torch.randn(5, 200, 6, generator=generator)
    real = torch.cat([first, second + 30])
    one_mode, all_and_noise = other_first, torch.cat([other_first, other_second + 30, 20 * noise.repeat(2, 1) - 200])
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.8 and 0.4 < recall < 0.5
    precision, recall = precision_recall(real, all_and_noise)
    assert 0.4 < precision <= 0.5 and recall > 0.7
    assert precision_recall(real, real) == (1, 1)


def test_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    real, generated = (torch.randn(count, 4, generator=generator) for count in (50, 37))
    whole = precision_recall(real, generated)
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1
    for block in (1, 7, 37):
        monkeypatch.setattr(manifold, "BLOCK", block)
        assert precision_recall(real, generated) == whole


def test_too_few_samples():
    for sizes in ((3, 9), (9, 3)):
        with pytest.raises(ValueError, match=f"k=3 .* {sizes[0]} real and {sizes[1]} generated"):
            precision_recall(*(torch.zeros(size, 2) for size in sizes))
    with pytest.raises(ValueError, match="k=0"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), k=0)
    with pytest.raises(ValueError, match="one extractor"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))
