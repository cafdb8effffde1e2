"""Improved precision and recall, density and coverage: which images lie in the other set's manifold.

The manifold of a set is the union of balls, one around each sample, that reach to its k-th nearest neighbour in the
set. Precision and recall (Kynkaanniemi et al., arXiv 1904.06991) check whether a sample lies in any ball of the other
set. Density and coverage (Naeem et al., arXiv 2002.09797) count the real balls that hold a generated sample, and are
less sensitive to outliers. N real samples, M generated, D features.
"""

import math

import torch
from torch import Tensor

from flextok_pl.precision import as_float64

NEIGHBOURS = 3  # k of precision and recall in the paper's experiments
DENSITY_NEIGHBOURS = 5  # k of density and coverage in the paper's experiments
BLOCK = 1024  # rows of a distance matrix in memory at a time


def _on_grid(*sets: Tensor) -> list[Tensor]:
    """Round sets of (N, D) features to whole numbers in float64, on the `summing_device` of the last.

    Squared distances between such numbers are exact in float64, in any order of summation. So the distance from a
    sample to its k-th neighbour is the same from either end, and copies have distance zero. With 2,048 features the
    unit is 2^-20 of the largest, about the rounding of features in float32.
    """
    exact = [as_float64(each.to(sets[-1].device)) for each in sets]
    moved = [each - exact[0][0] for each in exact]
    bits = (51 - (sets[0].shape[1] - 1).bit_length()) // 2  # D (2 * 2^bits)^2 is at most 2^53
    _, exponent = math.frexp(max(float(each.abs().max()) for each in moved))
    return [(each / 2.0 ** (exponent - bits)).round() for each in moved]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (M, D) on one grid -> (N, M), exact."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)).addmm_(a, b.T, alpha=-2)


def _squared_radii(points: Tensor, *ks: int) -> list[Tensor]:
    """Squared distance of each sample to its k-th nearest neighbour: (N, D) on a grid -> one (N,) for each k."""
    nearest = [
        _squared_distances(rows, points).topk(max(ks) + 1, largest=False).values for rows in torch.split(points, BLOCK)
    ]
    return list(torch.cat(nearest)[:, list(ks)].unbind(1))


def manifold_scores(
    real: Tensor, generated: Tensor, k: int = NEIGHBOURS, density_k: int = DENSITY_NEIGHBOURS
) -> dict[str, float]:
    """Precision, recall, density and coverage of (N, D) real and (M, D) generated features.

    `precision` is the share of generated samples in the real manifold, `recall` the share of real samples in the
    generated one. `density` is the number of real balls that hold a generated sample, averaged over these samples and
    divided by `density_k`: about 1 for equal distributions. `coverage` is the share of real balls that hold a generated
    sample. All depend on N and M, so compare at equal numbers only. A larger k raises precision and recall.

    Memory is `BLOCK` x max(N, M) float64.
    """
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"{real.shape[1]} and {generated.shape[1]} features cannot be compared; use one extractor for both"
        )
    if min(k, density_k) < 1 or min(len(real), len(generated)) <= max(k, density_k):
        raise ValueError(
            f"k={k} and density_k={density_k} neighbours must be at least 1, and fewer than the samples on each side; "
            f"there are {len(real)} real and {len(generated)} generated"
        )
    real, generated = _on_grid(real, generated)
    real_radii, dense_radii = _squared_radii(real, k, density_k)
    (generated_radii,) = _squared_radii(generated, k)
    precise = held = 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for rows, radii in zip(torch.split(generated, BLOCK), torch.split(generated_radii, BLOCK), strict=True):
        distances = _squared_distances(rows, real)  # (BLOCK, N)
        precise += int((distances <= real_radii).any(1).sum())
        recalled |= (distances <= radii[:, None]).any(0)
        within = distances < dense_radii  # strictly, as in their paper's code
        held += int(within.sum())
        covered |= within.any(0)
    return {
        "precision": precise / len(generated),
        "recall": int(recalled.sum()) / len(real),
        "density": held / (density_k * len(generated)),
        "coverage": int(covered.sum()) / len(real),
    }
