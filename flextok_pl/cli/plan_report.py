"""Formats a plan as text, from what `--json` writes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from flextok_pl.cost.plan import SECONDS_PER_DAY, USABLE

GIB = 2**30
LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW states",
    "averaged": "averaged copy (ema)",
    "frozen": "frozen networks",
    "cast_weights": "weights in half precision",
    "gathered": "gathered by fsdp",
    "activations": "activations",
    "recomputed": "a block that is computed again",
    "loss": "loss and logits",
}


def describe(plan: dict[str, Any]) -> str:
    """Format a plan for a terminal."""
    machine = plan["machine"]
    peak = "an unknown peak" if machine["peak_tflops"] is None else f"{machine['peak_tflops']:g} TFLOP/s"
    lines = [
        f"{plan['experiment']} on {plan['devices']} x {machine['name']} "
        f"({machine['memory_gib']:.0f} GiB, {peak}), {plan['strategy']}, from {plan['inputs']}",
        "",
        *_parameters(plan["parameters"]),
        "",
        *_memory(plan),
        "",
        *_split(plan),
        "",
        *_time(plan),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan["notes"])])


def _row(label: str, value: str, remark: str = "") -> str:
    return f"  {label:<34}{value:>12}  {remark}".rstrip()


def _parameters(counts: dict[str, Any]) -> Iterator[str]:
    yield "parameters"
    yield _row("trained", f"{counts['trained']:,}")
    for name, label in (("fixed", "fixed"), ("averaged", LABELS["averaged"])):
        if counts[name]:
            yield _row(label, f"{counts[name]:,}")
    for name, number in counts["frozen"].items():
        yield _row(f"frozen {name}", f"{number:,}")


def _memory(plan: dict[str, Any]) -> Iterator[str]:
    needed = plan["recipe"]["memory"]
    yield f"memory of a device in GiB, batch_size {plan['recipe']['batch_size']}"
    for name, label in LABELS.items():
        if needed[name]:
            yield _row(label, _gib(needed[name]), _activation_remark(plan) if name == "activations" else "")
    for name, when in (("frozen_work", "frozen networks at work"), ("scattered", "last gradients of fsdp")):
        if needed[name]:
            yield _row(when, _gib(needed[name]), "not at the same time as what a backward pass needs")
    share = needed["total"] / (plan["machine"]["memory_gib"] * GIB)
    verdict = "fits" if needed["fits"] else "does not fit"
    yield _row("at the peak", _gib(needed["total"]), f"{share:.0%} of the device: {verdict} ({USABLE:.0%} are usable)")


def _activation_remark(plan: dict[str, Any]) -> str:
    this, other = ("with", "without") if plan["activation_checkpointing"] else ("without", "with")
    switched = plan["recipe_with_checkpointing_switched"]["memory"]
    if switched["activations"] == plan["recipe"]["memory"]["activations"]:
        return ""
    compiled = ", compiled" if plan["compile_blocks"] else ""
    bytes_switched = _gib(switched["activations"] + switched["recomputed"])
    return f"{this} activation checkpointing{compiled}; {bytes_switched} {other} it"


def _split(plan: dict[str, Any]) -> Iterator[str]:
    recipe, split, nodes = plan["recipe"], plan["split"], plan["num_nodes"]
    own, stated = recipe["batch_size"] * recipe["devices"] * recipe["accumulate"], recipe["global_batch"]
    spread = f"{recipe['batch_size']} x {recipe['devices']} devices x {recipe['accumulate']}"
    other = "" if own == stated else f" are {own}, which a fit refuses"
    yield f"global batch {stated}: {spread}{other}"
    if split is None:
        lasting = f"{_gib(recipe['memory']['lasting'])} GiB are always in use"
        ways = ["--strategy fsdp"] if plan["strategy"] == "ddp" else []
        ways += [] if plan["activation_checkpointing"] else ["--model.activation_checkpointing true"]
        remedies = " or ".join([*ways, "devices with more memory"])
        yield f"  not even one sample fits a device: {lasting}; {remedies}"
        return
    devices = f"{plan['devices']} devices" + (f" of {nodes} nodes" if nodes > 1 else "")
    spread = f"{split['batch_size']} x {plan['devices']} x {split['accumulate']}"
    yield f"  on {devices}: {spread} ({_gib(split['memory']['total'])} GiB), by"
    yield f"  {shlex.join(['flextok', 'fit', *plan['fit']])}"
    if nodes > 1:
        yield "  which srun (experiments/cluster/train.sbatch) or torchrun (docs/reliability.md) starts on each node"


def _time(plan: dict[str, Any]) -> Iterator[str]:
    flops, seconds, steps = plan["flops_per_sample"], plan["seconds_per_step"], plan["recipe"]["max_steps"]
    yield "operations"
    for name in ("forward", "backward", "recomputed"):
        if flops[name]:
            yield _row(f"per sample, {name}", _tera(flops[name]))
    for name, value in flops["frozen"].items():
        yield _row(f"per sample, frozen {name}", _tera(value))
    yield _row("per step of the global batch", _tera(plan["flops_per_step"]), "forward, backward, frozen networks")
    yield ""
    if seconds is None:
        yield f"time: the peak of {plan['machine']['name']} is unknown; give --peak_tflops"
        return
    yield f"time, if all operations run at {plan['mfu']:.0%} of the peak"
    yield _row("steps/s", f"{1 / seconds:.3g}")
    yield _row("images/s", f"{plan['images_per_s']:,.0f}")
    yield _row("train/mfu", f"{plan['train_mfu']:.2f}", "as logged: without frozen networks and recomputation")
    if plan["days"] is None:
        unknown = "number of steps unknown: set trainer.max_steps, or epochs and --num_samples"
        yield _row("days per 100,000 steps", f"{1e5 * seconds / SECONDS_PER_DAY:.3g}", unknown)
    else:
        yield _row(f"days for {steps:,} steps", f"{plan['days']:.3g}")


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def _tera(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.4g} {unit}FLOP"
    return f"{value / 1e6:.4g} MFLOP"
