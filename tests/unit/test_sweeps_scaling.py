"""Power laws through the best trainings."""

import numpy as np
import pytest

from flextok_pl.sweeps.scaling import draw_scaling, fit_power_law, frontier


def test_the_frontier_is_what_nothing_cheaper_is_below():
    flops, values = np.array([4.0, 1, 2, 3, 2]), np.array([5.0, 9, 7, 8, 6])
    assert frontier(flops, values).tolist() == [1, 4, 0]


@pytest.mark.parametrize("floor, scale, exponent", [(2.0, 1.5, 0.3), (0.0, 3.0, 0.1), (5.0, 0.4, 0.8)])
def test_a_law_is_found_again(floor, scale, exponent):
    flops = np.geomspace(1e12, 1e16, 9)
    values = floor + scale * (flops / 1e14) ** -exponent
    worse = np.concatenate([values, values + 0.5])  # which do not count
    law = fit_power_law(np.concatenate([flops, flops]), worse)
    assert sorted(law.used) == list(range(9)) and law.unit == pytest.approx(1e14)
    assert (law.floor, law.scale, law.exponent) == pytest.approx((floor, scale, exponent), rel=2e-2, abs=2e-2)
    assert np.abs(law.residuals).max() < 1e-4 and law(flops) == pytest.approx(values, rel=1e-4)
    above, below = draw_scaling({"a": (flops, values)}, "loss", law).axes
    assert above.lines[0].get_label() == "a" and len(above.lines) == 2
    assert below.lines[0].get_ydata() == pytest.approx(100 * law.residuals)


def test_residuals_are_those_of_the_values():
    flops = np.geomspace(1, 1e4, 8)
    noise = np.array([1, -1, 1, -1, 1, -1, 1, -1]) * 0.01
    values = (1 + 2 * flops**-0.5) * (1 + noise)
    law = fit_power_law(flops, values)
    assert values[law.used] == pytest.approx(law(flops[law.used]) * (1 + law.residuals))
    assert 0.003 < np.abs(law.residuals).mean() < 0.02


def test_too_few_points():
    with pytest.raises(ValueError, match="2 of 3 trainings are the best at their cost; a fit needs 4"):
        fit_power_law(np.array([1.0, 2, 3]), np.array([3.0, 2, 2]))
