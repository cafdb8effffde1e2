"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991): which images lie in the other set's manifold.

The manifold of a set is the union of balls, one around each sample, that reach to its k-th nearest neighbour in the
set. N real samples, M generated, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the paper's experiments."""

BLOCK = 1024
"""Rows of a distance matrix that are in memory at a time."""


def neighbour_distances(features: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th nearest neighbour, not counting itself: (N, D) -> (N,)."""
    return torch.cat([torch.cdist(rows, features).kthvalue(k + 1).values for rows in torch.split(features, BLOCK)])


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated samples in the real manifold, and of real samples in the generated one.

    Memory is `BLOCK` x max(N, M) float64.

    Args:
        real: (N, D) features.
        generated: (M, D) features.
        k: neighbours that a ball reaches; more make both values larger.

    Returns:
        Precision and recall; they depend on N and M, so compare at equal numbers only.

    Raises:
        ValueError: different numbers of features, or a side of no more than k samples.
    """
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"{real.shape[1]} and {generated.shape[1]} features cannot be compared; use one extractor for both"
        )
    if k < 1 or min(len(real), len(generated)) <= k:
        raise ValueError(
            f"k={k} neighbours need k of at least 1 and more than k samples on each side; there are {len(real)} real "
            f"and {len(generated)} generated"
        )
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = neighbour_distances(real, k), neighbour_distances(generated, k)
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(torch.split(generated, BLOCK), torch.split(generated_radii, BLOCK), strict=True):
        distances = torch.cdist(rows, real)  # (BLOCK, N)
        precise += int((distances <= real_radii).any(1).sum())
        recalled |= (distances <= radii[:, None]).any(0)
    return precise / len(generated), float(recalled.double().mean())
