"""The processes of a parsed `flextok fit`, and their batches."""

from __future__ import annotations

from jsonargparse import Namespace

from flextok_pl.runtime.launch import Launch


def launch_of(options: Namespace, devices: int | None = None) -> Launch:
    """What the options of a fit ask for.

    Args:
        options: of the subcommand.
        devices: on a node, where that is known by now; None for what the options say.
    """
    trainer = options.trainer
    return Launch(
        int(trainer.num_nodes),
        devices_per_node(trainer.devices) if devices is None else devices,
        options.data.batch_size,
        trainer.accumulate_grad_batches,
    )


def devices_per_node(devices: int | str | list[int]) -> int | None:
    """How many `trainer.devices` names; None for `auto` and -1, as many as there are."""
    if isinstance(devices, str):
        parts = [part for part in devices.split(",") if part.strip()]
        if "," in devices:
            return len(parts)
        devices = int(devices) if devices.strip().lstrip("-").isdecimal() else -1
    number = len(devices) if isinstance(devices, list) else devices
    return number if number > 0 else None
