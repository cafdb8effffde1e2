"""Decisions about a sample as pure functions of its key, so that they do not depend on batches, workers or ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key_hash(key: str, purpose: str = "") -> int:
    """63 uniform bits from a sample key, independent for each purpose."""
    digest = hashlib.blake2b(f"{purpose}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_generators(keys: Sequence[str], seed: int, purpose: str = "noise") -> list[torch.Generator]:
    """One fresh CPU generator per sample, seeded by (seed, key): the same draws at every budget and on every device."""
    return [torch.Generator().manual_seed(key_hash(key, f"{purpose} {seed}")) for key in keys]


def choose_fraction(keys: Sequence[str], fraction: float, purpose: str) -> Tensor:
    """(B,) bool: a fixed choice of about this fraction of all keys; all of them from 1 on."""
    limit = int(fraction * 2**63)
    return torch.tensor([fraction >= 1 or key_hash(key, purpose) < limit for key in keys], dtype=torch.bool)


def images_hash(images: Tensor, keys: Sequence[str], start: int = 0) -> int:
    """64 signed bits from keys and pixels, which identify a data set whatever its order and batches.

    Args:
        images: (B, 3, H, W) uint8.
        keys: B sample keys.
        start: the hash of other samples of the set.

    Returns:
        The sum modulo 2**64, as tensors sum up int64.
    """
    total = start
    for key, image in zip(keys, images.cpu(), strict=True):
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8)
        digest.update(image.contiguous().numpy().tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return (total + 2**63) % 2**64 - 2**63
