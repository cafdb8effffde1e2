"""Sums and rows from all processes; each function is the identity outside torch.distributed."""

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


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over processes, on the CPU, of a tensor that has the same shape and type on each."""
    if world_size() == 1:
        return tensor
    accelerator = torch.accelerator.current_accelerator()
    on_cpu = accelerator is None or dist.get_backend() == "gloo"
    moved = tensor.to("cpu" if on_cpu else accelerator, copy=True)  # where the process group communicates
    dist.all_reduce(moved)
    return moved.cpu()


def all_agree(flag: bool) -> bool:
    """Whether `flag` holds on every process."""
    return all(gather_objects(flag))


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in the order of rank: (N_r, ...) -> (sum of N_r, ...), on the CPU; some may have none."""
    if world_size() == 1:
        return rows
    return torch.cat(gather_objects(rows.cpu().clone()))  # pickled, a view would take its whole storage along


def gather_objects(value: T) -> list[T]:
    """One picklable value per process, in the order of rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
