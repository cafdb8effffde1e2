"""Draw normal noise from one seed for each sample, for a whole batch and on any device at once.

torch's generators have one seed each. A batch of samples with own seeds would take a launch for every sample, and the
host would have to set every seed.

Shapes: B batch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# SplitMix64 (https://doi.org/10.1145/2660193.2660195): every number adds the first constant, the others mix. int64 in
# two's complement.
_STEP, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def seeded_normal(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) float32 on the device of (B,) int64 `seeds`; a row depends on its seed only.

    Box and Muller's method makes pairs of numbers from the two halves of a 64-bit number.
    """
    total = math.prod(shape)
    counter: Tensor = torch.arange(1, (total + 1) // 2 + 1, device=seeds.device)
    bits = _mix(_mix(seeds)[:, None] + counter * _STEP)  # (B, total / 2)
    upper, lower = (bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF
    radius = (-2 * ((upper + 1).float() * 2**-32).log()).sqrt()
    angle = lower.float() * (2 * math.pi * 2**-32)
    values: Tensor = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)  # (B, total or total + 1)
    return values[:, :total].reshape(len(seeds), *shape)


def _mix(z: Tensor) -> Tensor:
    for bits, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        z = torch.mul(z ^ _shifted(z, bits), factor)
    return z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return torch.bitwise_and(z >> bits, 2 ** (64 - bits) - 1)
