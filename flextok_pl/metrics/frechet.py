"""Frechet distance between two sets of features, from float64 statistics collected in one pass.

FD(a, b) = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al., arXiv 1706.08500, section 3).
N samples, D features.
"""

from typing import Self

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from flextok_pl.distributed import all_reduce_sum
from flextok_pl.precision import as_float64, summing_device

BLOCK = 512  # rows of a scatter matrix to update at a time


class FeatureStatistics:
    """Count, mean and covariance of features, updated batch by batch in float64 on the `summing_device` of `device`.

    The scatter around the running mean is updated as in Chan, Golub & LeVeque (1979), so nothing cancels if the mean is
    large against the spread. Memory is D x D for any N. Only the lower triangle of `scatter` is complete.

    Updates do not wait for a device. Reading the statistics therefore raises the ValueError for features that are not
    finite.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=summing_device(device))
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.mean.device)
        self._factor: Tensor | None = None

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Self:
        """Use published statistics: a (D,) mean and a (D, D) covariance, of enough samples for full rank."""
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)}: they must be (D,) and (D, D)"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean or covariance hold NaN or infinite values")
        statistics = cls(len(mean))
        statistics.count = statistics.dim + 1
        statistics.mean = mean.cpu().double()
        statistics.scatter = covariance.cpu().double() * statistics.dim
        return statistics

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, with the N - 1 divisor."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples, not {self.count}")
        self._check_finite()
        lower = self.scatter.tril() / (self.count - 1)
        return lower + lower.tril(-1).T

    @property
    def full_rank(self) -> bool:
        """Check that N > D. Otherwise the covariance is singular, and distances are comparable at equal N only."""
        return self.count > self.dim

    @property
    def rank(self) -> int:
        """Largest rank that the covariance can have: min(D, N - 1)."""
        return min(self.dim, max(self.count - 1, 0))

    def update(self, features: Tensor) -> None:
        """Add (B, D) features of any floating type."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape {tuple(features.shape)}; these statistics take (B, {self.dim})")
        if len(features) == 0:
            return
        rows = as_float64(features.detach()).to(self.mean.device)
        mean, total = rows.mean(0), self.count + len(rows)
        shift = mean - self.mean
        between = shift * (self.count * len(rows) / total) ** 0.5  # scatter between the two means, as one more row
        centred = torch.cat([rows - mean, between[None]])
        for start in range(0, self.dim, BLOCK):  # half the work: `covariance` mirrors the lower triangle
            columns = centred[:, : start + BLOCK]
            self.scatter[start : start + BLOCK, : start + BLOCK].addmm_(columns[:, start:].T, columns)
        self.mean += shift * (len(rows) / total)
        self.count = total
        self._factor = None

    def all_reduce(self) -> None:
        """Merge the statistics of all processes into these; does nothing outside torch.distributed."""
        self._check_finite()
        totals = all_reduce_sum(torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]))
        count = int(totals[-1].item())
        if count == 0:
            return
        mean = totals[:-1] / count
        shift = self.mean - mean
        self.scatter = all_reduce_sum(self.scatter.addr_(shift, shift, alpha=float(self.count)))
        self.count, self.mean, self._factor = count, mean, None

    def covariance_factor(self) -> Tensor:
        """L (D, R) with covariance = L L^T and R at most `rank`; kept until the next update.

        Cholesky with pivoting finds the rank and costs D R^2, far less than eigenvectors.
        """
        if self._factor is None:
            lower, pivots, rank, _ = dpstrf(self.covariance.cpu().numpy(), lower=1)
            rank = min(rank, self.rank)
            factor = torch.from_numpy(lower).tril()[:, :rank]
            rows = torch.empty_like(factor)
            rows[torch.from_numpy(pivots).long() - 1] = factor  # LAPACK counts from 1
            self._factor = rows.to(self.mean.device)
        return self._factor

    def _check_finite(self) -> None:
        """Check the mean's finiteness: a row that is not finite leaves its trace there for good."""
        if not self.mean.isfinite().all():
            raise ValueError("features hold NaN or infinite values")

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `from_state_dict` takes."""
        self._check_finite()
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device | str = "cpu") -> Self:
        """Restore statistics from their `state_dict`."""
        statistics = cls(len(state["mean"]), device)
        statistics.count = int(state["count"].item())
        statistics.mean, statistics.scatter = (state[name].to(statistics.mean.device) for name in ("mean", "scatter"))
        return statistics


def features_to_statistics(features: Tensor) -> FeatureStatistics:
    """Statistics of (N, D) features."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance between the Gaussians with these statistics.

    tr (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of L_a^T C_b L_a, which is symmetric, positive
    semi-definite and no larger than the rank of C_a. Singular covariances need no added diagonal: eigenvalues beyond
    the smaller of the two ranks are zero, and are left out because the root would magnify their rounding. Tiny negative
    distances are rounding too. The factorisation of `a` is kept, so comparing many sets with one `a` is cheap. All is
    computed on the device of `b`.
    """
    if a.dim != b.dim:
        raise ValueError(f"statistics of {a.dim} and {b.dim} features cannot be compared; use one extractor for both")
    covariance = b.covariance
    factor = a.covariance_factor().to(covariance.device)
    eigenvalues = torch.linalg.eigvalsh(factor.T @ covariance @ factor)  # ascending
    cross = eigenvalues[-min(a.rank, b.rank) :].clamp_min(0).sqrt().sum() if len(eigenvalues) else 0.0
    difference = a.mean.to(covariance.device) - b.mean
    trace = a.covariance.trace().to(covariance.device)
    return float(difference @ difference + trace + covariance.trace() - 2 * cross)
