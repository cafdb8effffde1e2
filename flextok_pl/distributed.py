"""Sums and rows over all processes; each function is the identity outside torch.distributed."""

import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""Variables in which torchrun and srun pass the rank and the number of processes."""


def launched() -> tuple[int, int]:
    """Rank and number of processes, as torchrun or srun set them; (0, 1) for a single process.

    For processes that do not communicate.
    """
    for number, count in VARIABLES:
        if number in os.environ and count in os.environ:
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1


def world_size() -> int:
    """Number of processes, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, 0 outside torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def _meeting_place() -> torch.device:
    """The device on which the process group communicates."""
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None or dist.get_backend() == "gloo" else accelerator


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over processes, on its device; shape and type must be the same on each."""
    if world_size() == 1:
        return tensor
    moved = tensor.to(_meeting_place(), copy=True)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def all_agree(flag: bool) -> bool:
    """Whether `flag` holds on every process."""
    return all(gather_objects(flag))


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all processes in the order of rank, on their device: (N_r, ...) -> (sum of N_r, ...)."""
    if world_size() == 1:
        return rows
    counts = gather_objects(len(rows))
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=_meeting_place())
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)


def gather_objects(value: T) -> list[T]:
    """Gather one picklable value per process, in the order of rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
