"""Kernel distance (KID on Inception features): squared maximum mean discrepancy with a cubic kernel.

Binkowski et al., https://arxiv.org/abs/1801.01401, section 4. Unlike the Frechet distance it is unbiased, so it also
holds for fewer samples than features. N samples, D features, S samples in a subset.
"""

from functools import cached_property

import torch
from torch import Tensor

from flextok_pl.precision import accumulation_dtype

SUBSETS, SUBSET_SIZE = 100, 1000
WHOLE = 6000  # most samples for which the kernel of all pairs is computed once, as subsets share most of them


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x . y / D + 1)^3 for all pairs: (N, D), (M, D) -> (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def unbiased_mmd(kernel_aa: Tensor, kernel_ab: Tensor, kernel_bb: Tensor, paired: bool = False) -> Tensor:
    """Unbiased squared maximum mean discrepancy: three (S, S) -> a scalar.

    With `paired` b_i was made from a_i, so in `kernel_ab` only i != j are independent.
    """
    size = len(kernel_aa)
    pairs = size * (size - 1)
    within = kernel_aa.sum() - kernel_aa.trace() + kernel_bb.sum() - kernel_bb.trace()
    between = (kernel_ab.sum() - kernel_ab.trace()) / pairs if paired else kernel_ab.mean()
    return within / pairs - 2 * between


class KernelReference:
    """(N, D) features to compare many others with; computes the kernel of their own pairs once."""

    def __init__(self, features: Tensor) -> None:
        self.features = features.to(accumulation_dtype(features.device))

    @cached_property
    def kernel(self) -> Tensor:
        """(N, N)."""
        return polynomial_kernel(self.features, self.features)


def draw_subsets(num_a: int, num_b: int, subsets: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Draw pairs of (S,) int64 indices without replacement, one for each side."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randperm(num_a, generator=generator)[:size], torch.randperm(num_b, generator=generator)[:size])
        for _ in range(subsets)
    ]


def kernel_distance(
    reference: Tensor | KernelReference,
    b: Tensor,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    paired: bool = False,
) -> tuple[float, float]:
    """Mean and standard deviation of the squared discrepancy over random subsets of (N, D) and (M, D) features.

    With at most `subset_size` samples on a side there is only one estimate, from as many samples as the smaller side
    has. Memory is float64 for three kernel matrices of S x S, or of N x N if N is at most `WHOLE`.

    With `paired`, row i of `b` was made from row i of `a`, such as a reconstruction. The usual estimate treats the two
    sides as independent; for pairs it is too small by about 2 / S of the kernel's range, and often negative.
    """
    if isinstance(reference, Tensor):
        reference = KernelReference(reference)
    a = reference.features
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} features cannot be compared; use one extractor for both")
    smaller = min(len(a), len(b))
    if smaller < 2:
        raise ValueError(f"a kernel distance needs at least two samples on each side, not {smaller}")
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} samples cannot be paired; give equally many")
    b = b.to(a)
    if smaller <= subset_size:
        subsets, subset_size = 1, smaller
    if max(len(a), len(b)) <= WHOLE:
        aa, ab, bb = reference.kernel, polynomial_kernel(a, b), polynomial_kernel(b, b)

        def estimate(i: Tensor, j: Tensor) -> Tensor:
            return unbiased_mmd(aa[i][:, i], ab[i][:, j], bb[j][:, j], paired)
    else:

        def estimate(i: Tensor, j: Tensor) -> Tensor:
            x, y = a[i], b[j]
            return unbiased_mmd(polynomial_kernel(x, x), polynomial_kernel(x, y), polynomial_kernel(y, y), paired)

    pairs = draw_subsets(len(a), len(b), subsets, subset_size, seed)
    values = torch.stack([estimate(i, i if paired else j) for i, j in pairs])
    return float(values.mean()), float(values.std(correction=0))


def kernel_facts(count: int) -> str:
    """The protocol that a record states for a distance whose smaller set has `count` samples."""
    subsets = f"all {count} samples at once" if count <= SUBSET_SIZE else f"{SUBSETS} subsets of {SUBSET_SIZE}"
    return f"cubic polynomial, {subsets}"
