"""Check what users give to the models and convert it, or raise a `ValueError` with a remedy.

Functions that read values wait for a GPU. Call them where a model is used, not in a training step.

Shapes: B batch, H x W image, k tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig
from flextok_pl.config.checks import nearest_multiples
from flextok_pl.contracts import is_whole

IMAGE_LIMIT = 2.0
"""Largest absolute value in an image. Bicubic resizing overshoots [-1, 1] by up to 0.9; 0..255 is far beyond."""


def as_images(images: Tensor | np.ndarray[Any, Any], channels: int = 3) -> Tensor:
    """Convert any floating type, also NumPy, to (B, channels, H, W) float32; does not read the values."""
    if isinstance(images, np.ndarray) and images.dtype.kind == "f":
        images = torch.from_numpy(images.astype(np.float32))
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = getattr(images, "dtype", type(images).__name__)
        raise ValueError(f"images are {kind}; give floating point in [-1, 1], such as uint8 pixels / 127.5 - 1")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; they must be (B, {channels}, H, W), as data.channels={channels} "
            "gives them"
        )
    return images.float()


def check_image_values(images: Tensor) -> None:
    """Refuse images that hold NaN or infinity, or reach beyond `IMAGE_LIMIT`."""
    check_finite(images, "images", "look at the files or the model that they come from")
    largest = float(images.detach().abs().amax()) if images.numel() else 0.0
    if largest > IMAGE_LIMIT:
        raise ValueError(
            f"images reach {largest:g}, far outside [-1, 1]: turn pixels in 0..255 into pixels / 127.5 - 1, and clamp "
            "images that a model decoded"
        )


def check_finite(values: Tensor, name: str, remedy: str) -> Tensor:
    """Return the values; refuse NaN and infinity."""
    if not values.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinite values; {remedy}")
    return values


def as_ids(ids: Any, name: str = "tokens") -> Tensor:
    """Convert ids of any shape and integer type, such as the uint16 of token shards, NumPy or lists, to int64."""
    if not isinstance(ids, Tensor):
        array = np.asarray(ids)
        ids = torch.from_numpy(array.astype(np.int64)) if array.dtype.kind in "iu" else array
    kind = ids.dtype
    if not isinstance(ids, Tensor) or kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise ValueError(f"{name} must be ids of an integer type, such as int64, not {kind}")
    return ids.long()


TOKEN_SHAPES = "give (B, k), or a list with a tensor (k,) or (1, k) for each sample"


def as_token_batch(tokens: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Split a (B, k) tensor, or a list of B rows (k,) or (1, k), into B rows of int64 tokens."""
    if isinstance(tokens, Tensor | np.ndarray):
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; {TOKEN_SHAPES}")
        return list(as_ids(tokens))
    rows = [as_ids(row) for row in tokens]
    for row in rows:
        if tuple(row.shape[:-1]) not in ((), (1,)) or row.ndim == 0:
            raise ValueError(f"tokens holds a sample of shape {tuple(row.shape)}; {TOKEN_SHAPES}")
    return [row.view(-1) for row in rows]


def as_budgets(num_tokens: Any, lengths: Sequence[int], most: int) -> Tensor:
    """The budget of each sample, capped at the number of its tokens: (B,) int64 on the CPU.

    `num_tokens` is one number in 1..K for all, one for each, or None for all tokens.
    """
    for length in set(lengths):
        check_budget(length, most, "number of tokens given")
    if num_tokens is None:
        return torch.tensor(lengths, dtype=torch.int64)
    if isinstance(num_tokens, int | float):
        check_budget(num_tokens, most)
    budgets = as_ids(num_tokens, "num_tokens")
    wanted: list[int] = budgets.expand(len(lengths)).tolist() if budgets.ndim == 0 else budgets.flatten().tolist()
    if len(wanted) != len(lengths):
        raise ValueError(f"num_tokens has {len(wanted)} entries for {len(lengths)} samples; give one each")
    for budget in set(wanted):
        check_budget(budget, most)
    return torch.tensor([min(pair) for pair in zip(wanted, lengths, strict=True)], dtype=torch.int64)


def check_budget(budget: Any, most: int, name: str = "num_tokens") -> None:
    """Refuse anything except a number of tokens in 1..K."""
    if not is_whole(budget) or not 1 <= budget <= most:
        raise ValueError(f"{name}={budget} is not in 1..{most}, the budgets of this model")


def check_latents(latents: Tensor, config: FlexTokConfig, name: str = "latents") -> None:
    """Refuse latents (B, C, h, w) that a tokenizer cannot cut into patches."""
    channels, patch = config.latent_channels, config.patch_size
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(latents.shape)}; this tokenizer takes (B, {channels}, h, w)")
    (h, w), (rows, columns) = latents.shape[2:], config.grid_size
    if h % patch or w % patch:
        raise ValueError(
            f"{name} of {h} x {w} positions cannot be cut into patches of {patch} x {patch}; resize or crop images: "
            f"the nearest numbers are {nearest_multiples(h, patch)} by {nearest_multiples(w, patch)} positions"
        )
    if config.layout == "grid" and (h, w) != (rows * patch, columns * patch):
        raise ValueError(
            f"{name} of {h} x {w} positions: layout='grid' has one token for each patch, so they must be "
            f"{rows * patch} x {columns * patch}; resize or crop the images"
        )


def as_size(size: Any, name: str) -> tuple[int, int]:
    """Convert to (height, width), two positive integers."""
    pair = list(size) if isinstance(size, Sequence) else []
    if len(pair) != 2 or not all(is_whole(side) and side > 0 for side in pair):
        raise ValueError(f"{name}={size!r} must be two whole numbers, (height, width), such as (32, 32)")
    return int(pair[0]), int(pair[1])


def as_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int
) -> list[torch.Generator | None]:
    """One generator for each sample, or the same one for all."""
    generators: list[torch.Generator | None]
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * batch_size
    if len(generators) != batch_size:
        raise ValueError(f"generator has {len(generators)} entries for {batch_size} samples; give one each")
    return generators


def as_noise(
    noise: Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    batch_size: int,
    latent_size: Any,
    config: FlexTokConfig,
) -> Tensor:
    """The state at t = 1, (B, C, h, w) float32: the given one, or one (1, C, h, w) draw for each sample in order."""
    if noise is None:
        shape = (1, config.latent_channels, *as_size(latent_size, "latent_size"))
        generators = as_generators(generator, batch_size)
        draws = [torch.randn(shape, generator=g, device=g.device if g else None) for g in generators]
        noise = torch.cat(draws) if draws else torch.empty(0, *shape[1:])
    check_latents(noise, config, "noise")
    if len(noise) != batch_size:
        raise ValueError(f"noise has {len(noise)} entries for {batch_size} samples; give one each")
    return check_finite(noise, "noise", "draw it again").float()
