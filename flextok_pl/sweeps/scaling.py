"""Fits a power law to the best trials at each cost: how a metric falls with the operations of a training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import least_squares

FEWEST = 4
"""Least number of points for a fit, which has three parameters."""


class PowerLaw(NamedTuple):
    """value = floor + scale * (flops / unit) ** -exponent."""

    floor: float
    scale: float
    exponent: float
    unit: float  # operations, the geometric mean of those of the fit
    residuals: NDArray[np.float64]  # value over fit, less one, of each point of the fit
    used: NDArray[np.int64]  # numbers of those points

    def __call__(self, flops: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values at these numbers of operations."""
        return np.asarray(self.floor + self.scale * (flops / self.unit) ** -self.exponent)


def frontier(flops: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices, by operations, of the points that no other point with as few operations lies below."""
    order = np.lexsort((values, flops))
    best = np.minimum.accumulate(values[order])
    first = np.concatenate([[True], best[1:] < best[:-1]])
    return np.asarray(order[first])


def fit_power_law(flops: NDArray[np.float64], values: NDArray[np.float64]) -> PowerLaw:
    """Fit the frontier of trainings, (n,) operations and positive values, by least squares of the logarithms.

    Each point is a complete training: with a learning-rate schedule, values before the end are worse than those of a
    training of that length (https://arxiv.org/abs/2203.15556, section 3).

    Raises:
        ValueError: too few points lie on the frontier.
    """
    used = frontier(flops, values)
    if len(used) < FEWEST:
        raise ValueError(f"{len(used)} of {len(flops)} trainings are the best at their cost; a fit needs {FEWEST}")
    x, y = flops[used], values[used]
    unit = float(np.exp(np.log(x).mean()))

    def law(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        floor, scale, exponent = parameters
        return np.asarray(floor + scale * (x / unit) ** -exponent)

    # From several starts, as the floor and the exponent can replace each other.
    fits = [
        least_squares(
            lambda parameters: np.log(y) - np.log(law(parameters)),
            [share * y.min(), (1 - share) * y.min() + np.ptp(y) / 2 + 1e-9, 0.3],
            bounds=([0, 1e-12, 1e-3], [y.min(), np.inf, 3]),
            x_scale=[y.min(), y.min(), 1],
        )
        for share in (0.1, 0.5, 0.9)
    ]
    floor, scale, exponent = min(fits, key=lambda fit: fit.cost).x
    return PowerLaw(floor, scale, exponent, unit, y / law(np.array([floor, scale, exponent])) - 1, used)


def draw_scaling(
    series: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]], metric: str, law: PowerLaw | None
) -> Figure:
    """Value against operations, a line for each series, with the fit and its residuals below."""
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, (flops, values) in series.items():
        order = np.argsort(flops)
        above.plot(flops[order], values[order], marker="o", label=name)
    everything = np.concatenate([flops for flops, _ in series.values()])
    if law is not None:
        x = np.geomspace(everything.min(), everything.max(), 100)
        formula = f"{law.floor:.3g} + {law.scale:.3g} (C / {law.unit:.2g})$^{{-{law.exponent:.2f}}}$"
        above.plot(x, law(x), color="black", linestyle="--", label=formula)
        below.plot(everything[law.used], 100 * law.residuals, "ko")
    above.set(ylabel=metric, xscale="log")
    above.legend(fontsize=7)
    above.grid(alpha=0.3)
    below.axhline(0, color="black", linewidth=0.5)
    below.set(xlabel="operations of the training (C)", ylabel="residual, %")
    below.grid(alpha=0.3)
    return figure
