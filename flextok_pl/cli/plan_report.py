"""A plan as text and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flextok_pl.cost.plan import USABLE, Memory, TrainingPlan, fits

GIB = 2**30
LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "gradient_buckets": "gradients, as ddp sends them",
    "optimizer": "AdamW states",
    "averaged": "averaged copy (ema)",
    "frozen": "frozen networks",
    "cast_weights": "weights in half precision",
    "gathered": "blocks that fsdp has gathered",
    "activations": "activations",
    "recomputed": "a block that is computed again",
    "loss": "loss and logits",
}


def describe(plan: TrainingPlan) -> str:
    """The plan for a terminal."""
    setup = plan.setup
    peak = "an unknown peak" if plan.peak_tflops is None else f"{plan.peak_tflops:g} TFLOP/s"
    lines = [
        f"{plan.experiment} on {setup.devices} x {plan.machine_name} "
        f"({setup.machine.memory_gib:.0f} GiB, {peak}), {setup.strategy}, from {plan.inputs}",
        "",
        *_parameters(plan),
        "",
        *_memory(plan),
        "",
        *_split(plan),
        "",
        *_time(plan),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.workload.notes)])


def _row(label: str, value: str, remark: str = "") -> str:
    return f"  {label:<34}{value:>12}  {remark}".rstrip()


def _parameters(plan: TrainingPlan) -> Iterator[str]:
    size = plan.workload.parameters
    yield "parameters"
    yield _row("trained", f"{size.trained:,}")
    if size.fixed:
        yield _row("fixed", f"{size.fixed:,}")
    if plan.setup.averaged:
        yield _row("averaged copy (ema)", f"{size.total:,}")
    for name, network in plan.workload.frozen.items():
        yield _row(f"frozen {name}", f"{network.parameters:,}")


def _memory(plan: TrainingPlan) -> Iterator[str]:
    own, machine = plan.own, plan.setup.machine
    yield f"memory of a device in GiB, batch_size {plan.recipe.batch_size}"
    for name, label in LABELS.items():
        value = getattr(own, name)
        if value:
            yield _row(label, _gib(value), _activation_remark(plan) if name == "activations" else "")
    for name, when in (("frozen_work", "frozen networks at work"), ("optimizer_work", "update by AdamW")):
        if getattr(own, name):
            yield _row(when, _gib(getattr(own, name)), "not at the same time as what a backward pass needs")
    share = own.total / (machine.memory_gib * GIB)
    verdict = "fits" if fits(own, machine) else "does not fit"
    yield _row("at the peak", _gib(own.total), f"{share:.0%} of the device: {verdict} ({USABLE:.0%} are usable)")


def _activation_remark(plan: TrainingPlan) -> str:
    this, other = ("with", "without") if plan.setup.checkpointing else ("without", "with")
    if plan.switched.activations == plan.own.activations:
        return ""
    switched = plan.switched.activations + plan.switched.recomputed
    compiled = ", compiled" if plan.setup.compiled else ""
    return f"{this} activation checkpointing{compiled}; {_gib(switched)} {other} it"


def _split(plan: TrainingPlan) -> Iterator[str]:
    recipe, setup, split = plan.recipe, plan.setup, plan.split
    own = f"{recipe.batch_size} x {recipe.devices} devices x {recipe.accumulate}"
    other = "" if recipe.own_batch == recipe.global_batch else f" are {recipe.own_batch}, which a fit refuses"
    yield f"global batch {recipe.global_batch}: {own}{other}"
    if split is None:
        lasting = f"{_gib(plan.needed.lasting)} GiB are there at all times"
        yield f"  not even one sample fits a device: {lasting}; {_remedies(plan)}"
        return
    nodes = f" of {setup.num_nodes} nodes" if setup.num_nodes > 1 else ""
    spread = f"{split.batch_size} x {setup.devices} x {split.accumulate}"
    yield f"  on {setup.devices} devices{nodes}: {spread} ({_gib(plan.needed.total)} GiB), by"
    yield f"  {shlex.join(['flextok', 'fit', *plan.advice])}"
    if setup.num_nodes > 1:
        yield "  which srun (experiments/cluster/train.sbatch) or torchrun (docs/reliability.md) starts on each node"


def _remedies(plan: TrainingPlan) -> str:
    ways = []
    if plan.setup.strategy == "ddp":
        ways.append("--strategy fsdp")
    if not plan.setup.checkpointing:
        ways.append("--model.activation_checkpointing true")
    return " or ".join([*ways, "devices with more memory"])


def _time(plan: TrainingPlan) -> Iterator[str]:
    flops, total = plan.speed.flops, plan.recipe.global_batch
    yield "operations"
    yield _row("per sample, forward", _tera(flops.forward))
    yield _row("per sample, backward", _tera(flops.backward))
    if plan.setup.checkpointing:
        yield _row("per sample, recomputed", _tera(flops.recomputed))
    for name, value in plan.speed.frozen.items():
        yield _row(f"per sample, frozen {name}", _tera(value))
    step = (flops.training + sum(plan.speed.frozen.values())) * total
    yield _row("per step of the global batch", _tera(step), "forward, backward, frozen networks")
    yield ""
    seconds, images = plan.speed.seconds, plan.speed.images_per_s(total)
    if seconds is None or images is None:
        yield f"time: nobody states the peak of {plan.machine_name}; give --peak_tflops"
        return
    yield f"time, if all that is computed runs at {plan.utilisation:.0%} of the peak"
    yield _row("steps/s", f"{1 / seconds:.3g}")
    yield _row("images/s", f"{images:,.0f}")
    yield _row("train/mfu", f"{plan.speed.reported_mfu:.2f}", "as logged: without frozen networks and recomputation")
    days = plan.speed.days(plan.recipe.max_steps)
    if days is None:
        unknown = "trainer.max_steps is not set, nor epochs whose samples are known: --num_samples"
        yield _row("days per 100,000 steps", f"{1e5 * seconds / 86400:.3g}", unknown)
    else:
        yield _row(f"days for {plan.recipe.max_steps:,} steps", f"{days:.3g}")


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def _tera(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.4g} {unit}FLOP"
    return f"{value / 1e6:.4g} MFLOP"


def record(plan: TrainingPlan) -> dict[str, Any]:
    """The plan as plain JSON types; bytes and operations as they are."""
    flops, total, workload = plan.speed.flops, plan.recipe.global_batch, plan.workload
    frozen = plan.speed.frozen
    return {
        "experiment": plan.experiment,
        "machine": {"name": plan.machine_name, **asdict(plan.setup.machine), "peak_tflops": plan.peak_tflops},
        "devices": plan.setup.devices,
        "num_nodes": plan.setup.num_nodes,
        "strategy": plan.setup.strategy,
        "inputs": plan.inputs,
        "activation_checkpointing": plan.setup.checkpointing,
        "compile_blocks": plan.setup.compiled,
        "parameters": {
            "trained": workload.parameters.trained,
            "fixed": workload.parameters.fixed,
            "averaged": workload.parameters.total * plan.setup.averaged,
            "frozen": {name: network.parameters for name, network in workload.frozen.items()},
        },
        "recipe": {**asdict(plan.recipe), "memory": _bytes(plan, plan.own)},
        "recipe_with_checkpointing_switched": {"memory": _bytes(plan, plan.switched)},
        "split": None if plan.split is None else {**asdict(plan.split), "memory": _bytes(plan, plan.needed)},
        "fit": list(plan.advice),
        "flops_per_sample": {**asdict(flops), "frozen": frozen},
        "flops_per_step": (flops.training + sum(frozen.values())) * total,
        "mfu": plan.utilisation,
        "train_mfu": plan.speed.reported_mfu,
        "seconds_per_step": plan.speed.seconds,
        "images_per_s": plan.speed.images_per_s(total),
        "days": plan.speed.days(plan.recipe.max_steps),
        "notes": list(workload.notes),
    }


def _bytes(plan: TrainingPlan, needed: Memory) -> dict[str, float | bool]:
    return {**asdict(needed), "total": needed.total, "fits": fits(needed, plan.setup.machine)}
