"""Random draws and choices as pure functions of text, such as a sample's key; batch, worker and rank do not matter."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def text_hash(text: str, content: bytes = b"") -> int:
    """64 uniform bits from a text; sorting by them shuffles in the same way on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8)
    digest.update(content)
    return int.from_bytes(digest.digest(), "little")


def text_generator(text: str) -> torch.Generator:
    """A new CPU generator, seeded by a text."""
    return torch.Generator().manual_seed(text_hash(text) >> 1)


def key_hash(key: str, purpose: str = "") -> int:
    """63 uniform bits from a sample key, independent for each purpose."""
    return text_hash(f"{purpose}\0{key}") >> 1


def sample_generators(keys: Sequence[str], seed: int, purpose: str = "noise") -> list[torch.Generator]:
    """One CPU generator per sample, seeded by (seed, key): the same draws at every budget and on every device."""
    return [text_generator(f"{purpose} {seed}\0{key}") for key in keys]


def choose_fraction(keys: Sequence[str], fraction: float, purpose: str) -> Tensor:
    """A fixed choice, (B,) bool, of about this fraction of all keys; 1 or more chooses all."""
    limit = int(fraction * 2**63)
    return torch.tensor([fraction >= 1 or key_hash(key, purpose) < limit for key in keys], dtype=torch.bool)


def images_hash(images: Tensor, keys: Sequence[str], start: int = 0) -> int:
    """64 signed bits from B keys and (B, 3, H, W) uint8 images, to identify a data set in any order and batches.

    `start` is the hash of the other samples: hashes add up modulo 2**64, as int64 tensors do.
    """
    pairs = zip(keys, images.cpu().contiguous().numpy(), strict=True)
    total = start + sum(text_hash(key, image.tobytes()) for key, image in pairs)
    return (total + 2**63) % 2**64 - 2**63
