"""Run images of different budgets in one pass and compute only the positions that are kept.

- A position is a patch or a register. Patches are a dense (B, N, D) tensor. The registers that images keep are
  concatenated in one (R, D) tensor. Layers that treat each position separately take both directly.
- Only attention looks at whole images: see `flextok_pl.layers.attention`.
- The host knows all lengths. It makes all indices and sends them to the device without waiting.

Shapes: B images, N patches of each, K registers at most, R in all, M the most of an image, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.precision import accumulation_dtype
from flextok_pl.transfer import send

Sight = Literal["all", "earlier", "registers"]
"""Which positions see which. `all`: each sees all. Otherwise patches see patches, and registers see all patches and
the registers up to themselves (`earlier`) or all registers (`registers`)."""

Kind = Literal["patches", "registers"]

SIZES_PER_DOUBLING = 16
"""Number of sizes between n and 2 n registers to which their number is rounded up."""


class Positions(NamedTuple):
    """Values at the positions of a batch. None stands for a kind that a layer lacks or does not need."""

    patches: Tensor | None  # (B, N, ...)
    registers: Tensor | None  # (R, ...)

    def map(self, function: Callable[..., Tensor], *others: tuple[Any, Any]) -> Positions:
        """Apply a function to the values of each kind, with the entries of `others` for that kind."""
        pairs = zip(self, *others, strict=True)
        return Positions(*(None if values is None else function(values, *rest) for values, *rest in pairs))

    def only(self, kind: Kind | None) -> Positions:
        """The values of one kind; None for both."""
        return Positions(
            None if kind == "registers" else self.patches,
            None if kind == "patches" else self.registers,
        )


def both(values: Positions) -> tuple[Tensor, Tensor]:
    """Patches and registers, which must both exist."""
    patches, registers = values
    assert patches is not None and registers is not None
    return patches, registers


class Sequences(NamedTuple):
    """Concatenates each image's patches and registers, for attention over sequences of different lengths.

    A last sequence holds the registers that round up their number.
    """

    patches: Tensor  # (B N,) int64, the place of each patch in the sequences
    registers: Tensor  # (R,) int64, the place of each register in the sequences
    patch_ends: Tensor  # (B + 2,) int32, cumulative numbers of patches
    register_ends: Tensor  # (B + 2,) int32, cumulative numbers of registers
    ends: Tensor  # (B + 2,) int32, cumulative lengths
    longest: int  # no sequence is longer; the same for all budgets, so that nothing is compiled again

    def join(self, values: Positions) -> Tensor:
        """Concatenate values (B, N, ...) and (R, ...) in this order: (B N + R, ...)."""
        patches, registers = both(values)
        total = len(self.patches) + len(self.registers)
        return put(patches.flatten(0, 1), self.patches, total).index_copy(0, self.registers, registers)

    def split(self, values: Tensor, like: Positions) -> Positions:
        """The inverse of `join`."""
        patches, registers = both(like)
        return Positions(take(values, self.patches).view_as(patches), take(values, self.registers).view_as(registers))


class Packing(NamedTuple):
    """Where the registers of a batch are, and which positions see which."""

    num_images: int  # B
    owner: Tensor  # (R,) int64, the image of each register
    longest: int  # M
    padded: Tensor | None  # (R,) int64, its place in (B, M), flattened; None if these are 0, 1, 2, ..., B M - 1
    log_counts: Tensor | None  # (R,), log of the number of equal registers that each replaces; None for 1 each
    sequences: Sequences | None  # if attention takes sequences
    sight: Sight

    def fill(self, registers: Tensor) -> Tensor:
        """Pad registers at the end to the rounded-up number: (..., D) -> (R, D)."""
        return F.pad(registers, (0, 0, 0, len(self.owner) - len(registers)))


def places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Image and place in it, (R,) int64 each, of concatenated registers, `lengths` (B,) of each image."""
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    return owner, torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]


def pack(
    owner: Tensor,  # (R,) int64 on the CPU, the image of each register
    place: Tensor,  # (R,) int64 on the CPU, its place among those of its image
    num_images: int,
    num_patches: int,
    most: int,  # K
    sight: Sight,
    device: torch.device,
    counts: Tensor | None = None,  # (R,) on the CPU, number of equal registers that each replaces
) -> Packing:
    """Send the places of registers to a device; for sequences R is rounded up (`padded_size`)."""
    log_counts = None if counts is None or bool((counts == 1).all()) else counts.to(accumulation_dtype(device)).log()
    padded, sequences, longest = None, None, most
    if takes_sequences(device):
        more = padded_size(len(owner)) - len(owner)
        sequences = _sequences(owner, more, num_images, num_patches, most, device)
        owner = F.pad(owner, (0, more), value=num_images - 1)
        log_counts = None if log_counts is None else F.pad(log_counts, (0, more))
    else:
        longest = int(place.max()) + 1 if len(place) else 0
        padded = owner * longest + place
        in_order = torch.equal(padded, torch.arange(num_images * longest))
        padded = None if in_order else send(padded, device)
    log_counts = None if log_counts is None else send(log_counts, device)
    return Packing(num_images, send(owner, device), longest, padded, log_counts, sequences, sight)


def _sequences(
    owner: Tensor, more: int, num_images: int, num_patches: int, most: int, device: torch.device
) -> Sequences:
    images = torch.arange(num_images + 1)  # the last one holds the padding
    of_patches, of_registers = images[:-1].repeat_interleave(num_patches), F.pad(owner, (0, more), value=num_images)
    order = torch.cat([of_patches, of_registers]).argsort(stable=True)
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    patch_ends = F.pad((images + 1).clamp(max=num_images) * num_patches, (1, 0))
    register_ends = F.pad(of_registers.bincount(minlength=num_images + 1).cumsum(0), (1, 0))
    return Sequences(
        send(rank[: len(of_patches)], device),
        send(rank[len(of_patches) :], device),
        send(patch_ends.int(), device),
        send(register_ends.int(), device),
        send((patch_ends + register_ends).int(), device),
        max(num_patches + most, _step(num_images * most)),
    )


def padded_size(total: int) -> int:
    """Round `total` up to one of `SIZES_PER_DOUBLING` sizes, so that few shapes are compiled; multiples of 8."""
    step = _step(total)
    return -(-total // step) * step


def _step(total: int) -> int:
    """Distance between the sizes near `total`. Fewer registers than that round it up."""
    return max(8, (1 << max(total - 1, 0).bit_length()) // (2 * SIZES_PER_DOUBLING))


def takes_sequences(device: torch.device) -> bool:
    """Check that attention runs on concatenated sequences: on a GPU in half precision."""
    return device.type == "cuda" and torch.is_autocast_enabled("cuda")


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(values)
        return values.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return put(gradient, rows, ctx.total), None


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Take rows of values, (R, ...), each at most once, so that the backward pass copies gradients without adding."""
    return _Take.apply(values, rows)  # type: ignore[no-any-return]


def put(values: Tensor, rows: Tensor, total: int, fill: float = 0.0) -> Tensor:
    """Put (R, ...) values at these rows of (total, ...), with `fill` elsewhere."""
    return values.new_full((total, *values.shape[1:]), fill).index_copy(0, rows, values)
