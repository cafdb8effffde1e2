"""Shared contracts: batches, protocols, defaults and checks of options, the identity of a model.

Shapes: B batch, H x W image, C x h x w latent, K registers, L text positions, E text width, F teacher
width.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn

GuidanceScale = float | Callable[[float], float]
"""A constant guidance scale, or a function of the flow time t in (0, 1]."""

ImageSize = int | tuple[int, int]
"""Size of images in pixels: the side of a square, or (H, W)."""

PositionScale = float | Sequence[float] | Callable[[int], float]
"""Guidance scale over token positions: a constant; numbers that are interpolated linearly from the first position
to the last; or a function of the position 0..K-1."""


class Batch(TypedDict, total=False):
    """One collated batch of a `ShardDataModule`; the keys present depend on the shards."""

    image: Tensor  # (B, 3, H, W) float32 in [-1, 1]; 3 channels unless the data module sets another number
    latent: Tensor  # (B, 2C, h, w) float32, the VAE posterior's mean and log-variance, unscaled
    teacher_features: Tensor  # (B, F, h', w') float32, precomputed patch features of the REPA teacher, as a map
    tokens: Tensor  # (B, K) int64
    label: Tensor  # (B,) int64 class index
    text: list[str]  # B captions
    text_states: Tensor  # (B, L, E) float32, the captions' states under a text encoder, padded
    text_mask: Tensor  # (B, L) bool, False for padding
    key: list[str]  # B sample keys, unique in the data set


@runtime_checkable
class Reconstructor(Protocol):
    """The tokenizer interface that reconstruction metrics use; `FlexTok` satisfies it."""

    @property
    def num_registers(self) -> int:
        """K, the largest token budget."""

    def tokenize(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, K') int64, deterministic."""

    def detokenize(self, tokens: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """(B, K') int64 -> (B, 3, H, W), not clamped, with the options of `FlexTok.detokenize`."""


@runtime_checkable
class GenerationModule(Protocol):
    """The LightningModule interface that generation callbacks use."""

    @property
    def reconstructor(self) -> Reconstructor:
        """The tokenizer that decodes generated tokens."""

    @property
    def condition_kind(self) -> Literal["class", "text", "none"]:
        """The kind of condition that generation takes."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for other conditions."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or empty."""

    def generate_tokens(self, condition: Tensor | Sequence[str] | None, *args: Any, **kwargs: Any) -> Tensor:
        """Generate (B, K) int64 tokens for (B,) classes, B texts or None with the current weights.

        See `Prior.generate`.
        """


def default_budgets(num_registers: int) -> list[int]:
    """The default budgets: powers of two below `num_registers`, and that number itself: 1, 2, 4, ..., K."""
    powers = [2**i for i in range(num_registers.bit_length()) if 2**i < num_registers]
    return [*powers, num_registers]


def class_difference(one: Sequence[str], other: Sequence[str]) -> str | None:
    """Describe the difference between two lists of class names; None if they are the same.

    Names that only repeat the class numbers match any list of the same length, except another order of themselves.
    """
    unnamed = any(tuple(names) == tuple(map(str, range(len(names)))) for names in (one, other))
    unnamed = unnamed and set(one) != set(other)
    if tuple(one) == tuple(other) or (unnamed and len(one) == len(other)):
        return None
    facts = [f"{len(one)} and {len(other)} classes"] if len(one) != len(other) else []
    for names, rest, side in ((one, other, "former"), (other, one, "latter")):
        if missing := sorted(set(names) - set(rest)):
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            facts.append(f"only the {side} has {', '.join(map(repr, missing[:5]))}{more}")
    numbers = {name: number for number, name in enumerate(other)}
    moved = [(name, number) for number, name in enumerate(one) if numbers.get(name, number) != number]
    facts += [f"{name!r} is number {number} and {numbers[name]}" for name, number in moved[:1]]
    return "; ".join(facts)


def is_whole(number: object) -> bool:
    """Whether this is a Python or NumPy integer, and not a bool."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def checked_size(size: int | Sequence[int], option: str = "image_size") -> ImageSize:
    """Normalise a size for records: one number for squares, (H, W) for others; raise `ValueError` if it is invalid."""
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
        raise ValueError(f"{option}={size} must be a side of at least 1 pixel, or two of them, [height, width]")
    return sides[0] if sides[0] == sides[1] else sides


def height_width(size: ImageSize) -> tuple[int, int]:
    """(H, W) of a size."""
    return size if isinstance(size, tuple) else (size, size)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for sampling options out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (the most likely token) or more, and finite")
    if top_k is not None and (not is_whole(top_k) or top_k < 1):
        raise ValueError(f"top_k={top_k} must be a whole number of at least 1, or None to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p={top_p} must be a share in (0, 1]; to take only the most likely token, set temperature=0 or top_k=1"
        )


def run_folder(trainer: Any) -> Path:
    """The folder for a run's results: that of a logger that has one, else the trainer's `default_root_dir`.

    Call it in all processes: rank 0 decides.
    """
    folders = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    folder = next((each for each in folders if isinstance(each, str)), trainer.default_root_dir)
    return Path(trainer.strategy.broadcast(folder))


def weights_hash(network: nn.Module) -> str:
    """Hash all weights of a network, to identify a model."""
    return tensors_hash(network.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor], facts: str = "") -> str:
    """First 16 hexadecimal digits of the SHA-256 of `facts` and of the tensors in the order of their names."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def same_maker(one: Mapping[str, Any] | str, other: Mapping[str, Any] | str) -> bool:
    """Whether two records describe models that make the same tokens, or the same latents.

    A record is what a shard set states about its maker, or the hash in a prior or a checkpoint. `sha256` is the hash of
    the weights that determine the tokens, `model_sha256` that of all weights. `same_as` lists the `model_sha256` of
    other models that make the same tokens. In records of earlier versions `sha256` is the hash of all weights.
    """
    first, second = ({"sha256": each} if isinstance(each, str) else each for each in (one, other))
    if "model_sha256" in first and "model_sha256" in second:
        return bool(first["sha256"] == second["sha256"])
    return not _hashes(first).isdisjoint(_hashes(second))


def _hashes(record: Mapping[str, Any]) -> set[str]:
    found = {record["sha256"], record.get("model_sha256", record["sha256"]), *record.get("same_as", ())}
    return {each for each in found if each}


def by_all_weights(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a model in the form of earlier versions, to compare arguments with theirs."""
    whole = {"sha256": record["model_sha256"]} if "model_sha256" in record else {}
    return {**{name: value for name, value in record.items() if name not in ("model_sha256", "same_as")}, **whole}
