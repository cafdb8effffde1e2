"""Sums and rows from all processes; each function is the identity outside torch.distributed."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 outside torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce_sum(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over processes, of the same shape, on the CPU.

    Args:
        tensor: of equal shape and type on every process.
        device: where the process group communicates.
    """
    if world_size() == 1:
        return tensor
    moved = tensor.to(device, copy=True)
    dist.all_reduce(moved)
    return moved.cpu()


def all_agree(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on every process."""
    return int(all_reduce_sum(torch.tensor(int(flag)), device).item()) == world_size()


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of all processes in the order of rank: (N_r, ...) -> (sum of N_r, ...), on the CPU.

    Args:
        rows: any number of rows, also none; the other dimensions equal on every process.
        device: where the process group communicates.
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=device))
    sizes = [int(count.item()) for count in counts]
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=device)  # collectives need equal shapes
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size].cpu() for part, size in zip(parts, sizes, strict=True)])


def gather_objects(value: T) -> list[T]:
    """One picklable value per process, in the order of rank; for small things."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
