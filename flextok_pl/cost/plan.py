"""Computes whether a training fits a machine, and how long it takes, from a workload.

Memory is the most at any one time. Parameters, gradients, optimizer states and averages are always there: Lightning
clears the gradients of a step only after the next forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flextok_pl.cost.count import FULL, Numerics
from flextok_pl.cost.machines import Machine
from flextok_pl.cost.workload import Workload

USABLE = 0.9  # of a device's memory; the rest is for the driver, libraries, communication and fragmentation
ADAM_STATES = 2
# Share of their activations that compiled blocks keep, in float32 and under autocast: the compiler recomputes cheap
# parts in the backward pass. Measured by benchmarks/plan.py.
COMPILED, COMPILED_AUTOCAST = 0.82, 0.70
SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class Setup:
    """How a workload is run."""

    machine: Machine
    devices: int  # over all nodes
    numerics: Numerics
    num_nodes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"  # ddp copies the model to each device, fsdp spreads it over them
    checkpointing: bool = False  # blocks are computed again in the backward pass
    compiled: bool = False  # blocks are compiled
    averaged: bool = True  # an averaged copy is on the device
    gathers_half: bool = True  # fsdp gathers matrices in the precision of autocast


@dataclass(frozen=True)
class Recipe:
    """The steps of an experiment and their batches."""

    batch_size: int  # samples on a device at a time
    devices: int  # over all nodes
    accumulate: int  # batches of an optimizer step on each device
    max_steps: int  # optimizer steps of the training; -1 if it does not state them
    global_batch: int  # samples of an optimizer step, as stated, or else those of its own devices


def memory(workload: Workload, setup: Setup, batch_size: int) -> dict[str, float]:
    """Bytes of a training step on one device with B samples, by what they hold.

    `lasting` is always there, `total` is the most at one time. The buffers of the loss and the activations of a
    recomputed block follow each other. So do the needs of the backward pass, the work of a frozen network, and the
    buffers of fsdp when it sends the last gradients. A network that is on the device in validations only counts among
    the frozen ones at work, without its outputs.
    """
    numerics, frozen = setup.numerics, list(workload.frozen.values())
    shares = setup.devices if setup.strategy == "fsdp" else 1
    size, sharded = workload.parameters, shares > 1
    trained, model = FULL * size.trained / shares, FULL * size.total / shares
    gathered = spread = 0.0  # weights, and gradients before each process has its share
    half = numerics.autocast and setup.gathers_half
    if sharded:
        # Two blocks, as the next one is fetched, or its gradients are sent, meanwhile. The rest stays gathered
        # throughout a step.
        whole = size.total - size.in_blocks + 2 * size.largest_block
        spread = float(FULL * whole)
        gathered = numerics.compute * whole + (FULL - numerics.compute) * size.others if half else spread
    activations, kept = workload.activations(batch_size), 1.0
    if setup.compiled:
        kept = COMPILED_AUTOCAST if numerics.autocast else COMPILED
    lasting = {
        "weights": model,
        "gradients": trained,
        "optimizer": ADAM_STATES * trained,
        "averaged": trained if setup.averaged else 0.0,
        "frozen": float(FULL * sum(network.parameters for network in frozen if network.resident)),
    }
    computing = {
        "cast_weights": float(numerics.compute * size.cast) if numerics.autocast and not (sharded and half) else 0.0,
        # When the backward pass begins, the shares of the gradients, which lasting counts, are not there yet.
        "gathered": gathered + max(0.0, spread - trained),
        "activations": activations.inputs if setup.checkpointing else activations.kept * kept,
    }
    last = {
        "recomputed": activations.largest_block * kept if setup.checkpointing else 0.0,
        "loss": workload.loss_bytes(batch_size),
    }
    apart = {
        "frozen_work": float(FULL * sum(network.parameters for network in frozen if not network.resident))
        + batch_size * max((network.working_bytes for network in frozen), default=0.0),
        "scattered": gathered + spread * (1 - 1 / shares),
    }
    always = sum(lasting.values())
    most = max(sum(computing.values()) + max(last.values()), *apart.values())
    return {**lasting, **computing, **last, **apart, "lasting": always, "total": always + most}


def fits(needed: Mapping[str, float], machine: Machine) -> bool:
    """Whether a step's memory is at most the usable part of a device's."""
    return needed["total"] <= USABLE * machine.memory_gib * 2**30


@dataclass(frozen=True)
class Split:
    """How a global batch is spread: batch_size x devices x accumulate."""

    batch_size: int
    accumulate: int


def largest_split(workload: Workload, setup: Setup, global_batch: int, most: int | None = None) -> Split | None:
    """The split with the largest batch on a device, up to `most`, that fits; None if not even one sample does."""
    if global_batch % setup.devices:
        raise ValueError(
            f"{setup.devices} devices cannot share the global batch of {global_batch} evenly; take a number of them "
            "that divides it (--devices, --num_nodes)"
        )
    share = global_batch // setup.devices
    for batch_size in range(min(share, most or share), 0, -1):
        if share % batch_size == 0 and fits(memory(workload, setup, batch_size), setup.machine):
            return Split(batch_size, share // batch_size)
    return None


def plan_training(
    workload: Workload, setup: Setup, recipe: Recipe, utilisation: float, peak_tflops: float | None
) -> dict[str, Any]:
    """All results of a plan as plain JSON types: bytes, operations, seconds; None if unknown.

    A step takes the time in which all operations run at a share, `utilisation`, of a device's peak. `train/mfu` counts
    neither those of frozen networks nor recomputation.
    """
    if not 0.0 < utilisation <= 1.0:
        raise ValueError(f"mfu={utilisation} must be in (0, 1], a share of the device's peak")
    split = largest_split(workload, setup, recipe.global_batch, recipe.batch_size)
    flops = workload.flops(1 if split is None else split.batch_size)
    frozen = {name: network.flops for name, network in workload.frozen.items() if network.flops}
    counted, total = flops.training + sum(frozen.values()), recipe.global_batch
    computed, seconds = counted + flops.recomputed, None
    if peak_tflops is not None:
        seconds = computed * total / (setup.devices * peak_tflops * 1e12 * utilisation)

    def needed(batch_size: int, setup: Setup = setup) -> dict[str, Any]:
        found = memory(workload, setup, batch_size)
        return {**found, "fits": fits(found, setup.machine)}

    return {
        "devices": setup.devices,
        "num_nodes": setup.num_nodes,
        "strategy": setup.strategy,
        "activation_checkpointing": setup.checkpointing,
        "compile_blocks": setup.compiled,
        "parameters": {
            "trained": workload.parameters.trained,
            "fixed": workload.parameters.fixed,
            "averaged": workload.parameters.trained * setup.averaged,
            "frozen": {name: network.parameters for name, network in workload.frozen.items()},
        },
        "recipe": {**asdict(recipe), "memory": needed(recipe.batch_size)},
        "recipe_with_checkpointing_switched": {
            "memory": needed(recipe.batch_size, replace(setup, checkpointing=not setup.checkpointing))
        },
        "split": None if split is None else {**asdict(split), "memory": needed(split.batch_size)},
        "flops_per_sample": {**asdict(flops), "frozen": frozen},
        "flops_per_step": counted * total,
        "mfu": utilisation,
        "train_mfu": None if seconds is None else utilisation * flops.training / computed,
        "seconds_per_step": seconds,
        "images_per_s": None if seconds is None else total / seconds,
        "days": None if seconds is None or recipe.max_steps < 1 else recipe.max_steps * seconds / SECONDS_PER_DAY,
        "notes": list(workload.notes),
    }
