"""Processes of a training: their number, who starts them, and the samples of an optimizer step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

INTERACTIVE = ("bash", "interactive")
"""Names of Slurm jobs in which Lightning takes no process for one of several tasks."""


@dataclass(frozen=True)
class Launch:
    """The processes of a training and their batches."""

    num_nodes: int
    devices: int | None  # per node; None if not known yet
    batch_size: int  # samples per process and batch
    accumulate: int  # batches per optimizer step

    def require_global_batch(self, stated: int | None) -> None:
        """Refuse any other number of samples per step than `stated`, and suggest options; None accepts all."""
        if stated is None or self.devices is None or self.global_batch == stated:
            return
        processes = self.num_nodes * self.devices
        if stated % processes:
            remedy = f"{processes} processes cannot share it evenly: take a number of them that divides it"
        else:
            share = stated // processes
            sizes = range(1, min(share, self.batch_size) + 1)
            fitting = max((size for size in sizes if share % size == 0), default=1)
            batch = "" if fitting == self.batch_size else f"--data.batch_size {fitting} "
            remedy = f"give {batch}--trainer.accumulate_grad_batches {share // fitting}"
        raise ValueError(
            f"global_batch_size={stated}, but this is {self}: {remedy}; or change --global_batch_size, null for any"
        )

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""
        assert self.devices is not None
        return self.batch_size * self.num_nodes * self.devices * self.accumulate

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = batch_size {self.batch_size} x {self.devices} devices x "
            f"{self.num_nodes} nodes x {self.accumulate} accumulated"
        )


def require_processes(num_nodes: int, devices: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse another number of processes than a launcher has started, and several nodes without a launcher."""
    found = _started(environment)
    if found is None:
        by_hand = "MASTER_ADDR" in environment and {"NODE_RANK", "GROUP_RANK"} & set(environment)
        if num_nodes > 1 and not by_hand:
            raise ValueError(
                f"trainer.num_nodes={num_nodes}, but no launcher has started this command on each node: "
                "use srun (experiments/cluster/train.sbatch) or torchrun (docs/reliability.md); for this "
                "machine alone give --trainer.num_nodes 1"
            )
        return
    launcher, started = found
    wanted = None if devices is None else num_nodes * devices
    if started == wanted or (wanted is None and started >= num_nodes):
        return
    by_devices = "" if devices is None else f" x trainer.devices={devices}"
    raise ValueError(
        f"trainer.num_nodes={num_nodes}{by_devices} needs {wanted or num_nodes} processes, but {launcher} "
        f"has started {started}: let it start one for each device, or change trainer.num_nodes and trainer.devices"
    )


def _started(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The launcher and its number of processes, as Lightning finds them; None if the training starts its own."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun", int(environment["WORLD_SIZE"])
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in INTERACTIVE:
        if "SLURM_STEP_NUM_TASKS" in environment:
            return "srun", int(environment["SLURM_STEP_NUM_TASKS"])
        return "Slurm (without srun)", 1
    if "LOCAL_RANK" in environment and "WORLD_SIZE" in environment:  # any other, and Lightning for its own processes
        return "the launcher", int(environment["WORLD_SIZE"])
    return None


def devices_per_node(devices: int | str | list[int]) -> int | None:
    """Number of devices in `trainer.devices`; None for `auto` and -1, which take all."""
    if isinstance(devices, str):
        parts = [part for part in devices.split(",") if part.strip()]
        if "," in devices:
            return len(parts)
        devices = int(devices) if devices.strip().lstrip("-").isdecimal() else -1
    number = len(devices) if isinstance(devices, list) else devices
    return number if number > 0 else None
