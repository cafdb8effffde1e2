"""Distances of reconstructions from their originals, without a trainer."""

import pytest
import torch
import torch.nn.functional as F

from flextok_pl.evaluation.reconstruction_statistics import ReconstructionStatistics
from flextok_pl.metrics.kernel import kernel_distance


class Colours:
    """Features are the mean colours of the four quarters."""

    metric_name, kernel_metric_name, dim = "fd_colours", "kd_colours", 12

    def __call__(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def test_the_kernel_distance_takes_originals_and_reconstructions_as_pairs():
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (9, 3, 16, 16), generator=generator, dtype=torch.uint8)
    keys = [str(i) for i in range(9)]
    statistics = ReconstructionStatistics([2], Colours())
    statistics.update_real(originals, keys)
    statistics.update_reconstructions(2, originals, originals // 2, keys)
    a, b = Colours()(originals), Colours()(originals // 2)
    value = statistics.values()[2]["kd_colours"]
    assert value == pytest.approx(kernel_distance(a, b, paired=True)[0], rel=1e-9)
    assert value != pytest.approx(kernel_distance(a, b)[0], rel=1e-3)
