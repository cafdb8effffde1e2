"""Will a training fit, and how long will it take: the arithmetic over a workload and a machine.

Memory is that of the moment with most of it. Parameters, gradients, optimizer states and averages are there at all
times: Lightning clears the gradients of a step only after the next forward pass. With them are either the activations,
at the end of the forward pass, or what a frozen network holds while it works, or the optimizer's own working memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flextok_pl.cost.count import FULL, Flops, Numerics
from flextok_pl.cost.machines import Machine
from flextok_pl.cost.workload import Workload

USABLE = 0.9  # of a device's memory; the rest is for the driver, libraries, communication and fragmentation
ADAM_STATES = 2
# What compiled blocks keep of what eager ones do, in float32 and under autocast: the compiler computes cheap parts
# again in the backward pass. Measured by benchmarks/plan.py.
COMPILED, COMPILED_AUTOCAST = 0.82, 0.70
SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class Setup:
    """How a workload is run.

    Attributes:
        machine: the devices.
        devices: their number, over all nodes.
        numerics: how numbers are stored.
        num_nodes: over which they are spread.
        strategy: `ddp` copies the model to each device, `fsdp` spreads it over them.
        checkpointing: whether blocks are computed again in the backward pass.
        compiled: whether blocks are compiled.
        averaged: whether an averaged copy is on the device.
    """

    machine: Machine
    devices: int
    numerics: Numerics
    num_nodes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    checkpointing: bool = False
    compiled: bool = False
    averaged: bool = True


@dataclass(frozen=True)
class Recipe:
    """What an experiment says of its steps.

    Attributes:
        batch_size: samples on a device at a time.
        devices: over all nodes.
        accumulate: batches of an optimizer step on each device.
        max_steps: optimizer steps of the training; -1 where it does not say.
        global_batch: samples of an optimizer step, as stated, or else those of its own devices.
    """

    batch_size: int
    devices: int
    accumulate: int
    max_steps: int
    global_batch: int

    @property
    def own_batch(self) -> int:
        """Samples of an optimizer step on its own devices, which a fit compares with what is stated."""
        return self.batch_size * self.devices * self.accumulate


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they hold.

    Attributes:
        weights: parameters and buffers of the model.
        gradients: of its trained parameters.
        gradient_buckets: the copy of the gradients that ddp sends.
        optimizer: AdamW's two states.
        averaged: the averaged copy of the model.
        frozen: networks that are used and not trained.
        cast_weights: half-precision copies that autocast makes.
        gathered: what fsdp holds of its blocks while it computes with them.
        activations: kept for the backward pass.
        recomputed: one block's activations, computed again in the backward pass.
        loss: logits and other buffers of the loss.
        frozen_work: the most that a frozen network holds at work, before the activations are there.
        optimizer_work: working memory of the update, after the activations are gone.
    """

    weights: float
    gradients: float
    gradient_buckets: float
    optimizer: float
    averaged: float
    frozen: float
    cast_weights: float
    gathered: float
    activations: float
    recomputed: float
    loss: float
    frozen_work: float
    optimizer_work: float

    @property
    def lasting(self) -> float:
        """What is there at all times."""
        return self.weights + self.gradients + self.gradient_buckets + self.optimizer + self.averaged + self.frozen

    @property
    def total(self) -> float:
        """The most at one time."""
        computing = self.cast_weights + self.gathered + self.activations + max(self.loss, self.recomputed)
        return self.lasting + max(computing, self.frozen_work, self.optimizer_work)


def memory(workload: Workload, setup: Setup, batch_size: int) -> Memory:
    """What a training step needs on one device with B samples."""
    numerics, alone = setup.numerics, setup.devices == 1
    shares = setup.devices if setup.strategy == "fsdp" else 1
    size = workload.parameters
    trained, model = FULL * size.trained / shares, FULL * size.total / shares
    outside = size.total - size.in_blocks
    # Two blocks, as the next one is fetched meanwhile; what is in no block is never given back within a step.
    whole = numerics.compute * (outside + 2 * size.largest_block)
    sharded = shares > 1
    activations, kept = workload.activations(batch_size), 1.0
    if setup.compiled:
        kept = COMPILED_AUTOCAST if numerics.autocast else COMPILED
    return Memory(
        weights=model,
        gradients=trained,
        gradient_buckets=0.0 if alone or setup.strategy == "fsdp" else trained,
        optimizer=ADAM_STATES * trained,
        averaged=model if setup.averaged else 0.0,
        frozen=float(FULL * sum(network.parameters for network in workload.frozen.values())),
        cast_weights=float(numerics.compute * size.cast) if numerics.autocast and not sharded else 0.0,
        gathered=whole + numerics.compute * size.largest_block if sharded else 0.0,
        activations=activations.inputs if setup.checkpointing else activations.kept * kept,
        recomputed=activations.largest_block * kept if setup.checkpointing else 0.0,
        loss=workload.loss_bytes(batch_size),
        frozen_work=batch_size * max((network.working_bytes for network in workload.frozen.values()), default=0.0),
        optimizer_work=trained if setup.machine.foreach else 0.0,
    )


def fits(needed: Memory, machine: Machine) -> bool:
    """Whether a step's memory is at most the usable part of a device's."""
    return needed.total <= USABLE * machine.memory_gib * 2**30


@dataclass(frozen=True)
class Split:
    """How a global batch is spread: batch_size x devices x accumulate."""

    batch_size: int
    accumulate: int


def largest_split(workload: Workload, setup: Setup, global_batch: int, most: int | None = None) -> Split | None:
    """The split with the largest batch on a device that fits; None where not even one sample does.

    Args:
        workload: the training step.
        setup: how it is run.
        global_batch: samples of an optimizer step.
        most: largest batch on a device to consider.

    Raises:
        ValueError: the devices cannot share the global batch evenly.
    """
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


@dataclass(frozen=True)
class Speed:
    """What a step costs and how long it takes.

    Attributes:
        flops: of the trained model, per sample.
        frozen: of frozen networks, per sample, by name.
        seconds: of an optimizer step; None where the peak is unknown.
        reported_mfu: what `train/mfu` then shows: without frozen networks and what is recomputed.
    """

    flops: Flops
    frozen: dict[str, float]
    seconds: float | None
    reported_mfu: float | None

    def images_per_s(self, global_batch: int) -> float | None:
        """Samples per second over all devices."""
        return None if self.seconds is None else global_batch / self.seconds

    def days(self, steps: int) -> float | None:
        """Duration of a training."""
        return None if self.seconds is None or steps < 1 else steps * self.seconds / SECONDS_PER_DAY


def speed(
    workload: Workload, setup: Setup, batch_size: int, global_batch: int, utilisation: float, peak_tflops: float | None
) -> Speed:
    """The time of a step in which every operation that is computed runs at a share of the peak.

    Args:
        workload: the training step.
        setup: how it is run.
        batch_size: B, samples on a device at a time.
        global_batch: samples of an optimizer step.
        utilisation: share of the peak, in (0, 1].
        peak_tflops: of one device.

    Raises:
        ValueError: the share is out of range.
    """
    if not 0.0 < utilisation <= 1.0:
        raise ValueError(f"mfu={utilisation} must be in (0, 1], a share of the device's peak")
    flops = workload.flops(batch_size)
    frozen = {name: network.flops for name, network in workload.frozen.items() if network.flops}
    computed = flops.training + flops.recomputed + sum(frozen.values())
    if peak_tflops is None:
        return Speed(flops, frozen, None, None)
    seconds = computed * global_batch / (setup.devices * peak_tflops * 1e12 * utilisation)
    return Speed(flops, frozen, seconds, utilisation * flops.training / computed)


@dataclass(frozen=True)
class TrainingPlan:
    """What `flextok plan` finds out.

    Attributes:
        experiment: its name.
        machine_name: the machine's.
        inputs: what the training shards hold.
        recipe: the experiment's steps.
        setup: how it is run.
        workload: what is run.
        own: memory of a device with the experiment's own batch.
        switched: the same, were activation checkpointing switched.
        split: how the global batch fits on these devices; None where it does not.
        needed: memory with that split, or with one sample where there is none.
        speed: time of its steps.
        utilisation: share of the peak.
        peak_tflops: of a device.
        advice: arguments of a fit with this split; empty where there is none.
    """

    experiment: str
    machine_name: str
    inputs: str
    recipe: Recipe
    setup: Setup
    workload: Workload
    own: Memory
    switched: Memory
    split: Split | None
    needed: Memory
    speed: Speed
    utilisation: float
    peak_tflops: float | None
    advice: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int:
        """Samples on a device at a time, as planned."""
        return 1 if self.split is None else self.split.batch_size
