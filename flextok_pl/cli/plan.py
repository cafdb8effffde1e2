"""`flextok plan`: check whether an experiment fits a machine, and how long it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace, strip_meta
from lightning.pytorch.cli import LightningArgumentParser

from flextok_pl.cli.front import read
from flextok_pl.cli.plan_report import describe
from flextok_pl.cli.training import ParsingCLI, check_precision, launch_of, run_cli
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig, config_from_dict
from flextok_pl.contracts import checked_size, height_width
from flextok_pl.cost.count import FULL, Numerics
from flextok_pl.cost.machines import machine
from flextok_pl.cost.plan import Recipe, Setup, plan_training
from flextok_pl.cost.workload import (
    Inputs,
    Workload,
    distillation_workload,
    prior_workload,
    tokenizer_workload,
    vae_workload,
)
from flextok_pl.data.shards.index import ShardIndex
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.errors import UserError
from flextok_pl.files import write_file
from flextok_pl.runtime.launch import devices_per_node
from flextok_pl.runtime.sharding import GATHERS_HALF

# Module -> its network's configuration, its workload, and its usual inputs.
KINDS: dict[str, tuple[type[Any], Callable[..., Workload], Inputs]] = {
    "TokenizerModule": (FlexTokConfig, tokenizer_workload, "images"),
    "DistillationModule": (FlexTokConfig, distillation_workload, "images"),
    "PriorModule": (PriorConfig, prior_workload, "tokens"),
    "VAEModule": (VAEConfig, vae_workload, "images"),
}
EXAMPLE = "experiments/tokenizer/d18_d28_imagenet.yaml"
FIELDS: dict[str, Inputs] = {"tokens": "tokens", "latent": "latents", "image": "images"}
STRATEGIES = {"ddp": "ddp", "fsdp": "fsdp2"}
"""Strategy of a plan -> its name for a fit."""


@dataclass
class PlanOptions:
    """Options that a fit does not take.

    Args:
        devices: devices per node; default the experiment's.
        num_nodes: number of nodes; default 1 with --devices, else the experiment's.
        machine: type of the devices, such as h100, a100-80g or cpu; any other name lists all types.
        mfu: assumed share of the peak at which all operations run.
        strategy: replaces trainer.strategy.
        inputs: what the training shards hold; default what data.train holds, else images, or tokens for a prior.
        num_samples: training samples per epoch; default those of data.train, if it is on this machine.
        peak_tflops: peak of a device in TFLOP/s; replaces the machine's.
        memory_gib: memory of a device in GiB; replaces the machine's.
        json: file to write the plan to.
    """

    devices: int | None = None
    num_nodes: int | None = None
    machine: str = "h100"
    mfu: float = 0.4
    strategy: Literal["ddp", "fsdp"] | None = None
    inputs: Inputs | None = None
    num_samples: int | None = None
    peak_tflops: float | None = None
    memory_gib: float | None = None
    json: str | None = None


class PlanCLI(ParsingCLI):
    """Parses the options of `flextok fit`, `given` by the user, and plans without building anything."""

    command = "plan"

    def __init__(self, given: Sequence[str], *parsed: Any) -> None:
        self._given = given
        super().__init__(*parsed)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the plan to those of a fit."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanOptions, None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; most errors mean that the experiment is missing."""
        try:
            super().parse_arguments(parser, args)
        except UserError as error:
            raise UserError(f"{error}; give an experiment by --config, such as {EXAMPLE}") from error

    def run(self) -> None:
        """Print the plan."""
        options = self.config
        plan = make_plan(options, self.experiment, self._given)
        print(describe(plan))
        if options.json is not None:
            write_file(Path(options.json), json.dumps(plan, indent=2) + "\n")


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok plan`."""
    run_cli(partial(PlanCLI, arguments), "fit", arguments)


def make_plan(options: Namespace, experiment: str, given: Sequence[str]) -> dict[str, Any]:
    """Make the plan of a parsed experiment, as `--json` writes it, from options and the arguments that gave them."""
    name = options.model.class_path.rsplit(".", 1)[-1]
    if name not in KINDS:
        raise ValueError(f"model={options.model.class_path}: only {', '.join(KINDS)} can be planned")
    for option in ("devices", "num_nodes", "num_samples"):
        if options[option] is not None and options[option] < 1:
            raise ValueError(f"{option}={options[option]} must be at least 1")
    for option in ("peak_tflops", "memory_gib"):
        if options[option] is not None and options[option] <= 0:
            raise ValueError(f"{option}={options[option]} must be positive")
    arguments = strip_meta(options.model.init_args).as_dict()
    setup, indices = _setup(options, arguments), training_sets(options.data.train)
    config, workload_of, usual = KINDS[name]
    net = config_from_dict(config, arguments.pop("net")) if "net" in arguments else None  # else a finished model's
    inputs = options.inputs or next(
        (kind for field, kind in FIELDS.items() if indices and field in indices[0].fields), usual
    )
    sizes = [checked_size(size) for size in options.data.get("shapes") or [options.data.image_size]]
    largest = max(map(height_width, sizes), key=prod)
    workload = workload_of(arguments, net, largest, inputs, setup.numerics)
    device, half = setup.machine, setup.numerics.autocast
    peak = options.peak_tflops or (device.half_tflops if half else device.full_tflops)
    plan = plan_training(workload, setup, _recipe(options, indices), options.mfu, peak)
    return {
        "experiment": experiment,
        "machine": {"name": options.machine, **asdict(device), "peak_tflops": peak},
        "inputs": inputs,
        "fit": [] if plan["split"] is None else _fit_arguments(options, given, setup, plan["split"]),
        **plan,
    }


def _setup(options: Namespace, arguments: dict[str, Any]) -> Setup:
    num_nodes = options.num_nodes or (1 if options.devices else options.trainer.num_nodes)
    whole, device = check_precision(options) == "32-true", machine(options.machine)
    return Setup(
        machine=device if options.memory_gib is None else replace(device, memory_gib=options.memory_gib),
        devices=num_nodes * (options.devices or devices_per_node(options.trainer.devices) or 1),
        numerics=Numerics(FULL if whole else FULL // 2, fused_norms=options.machine != "cpu"),
        num_nodes=num_nodes,
        strategy=options.strategy or _strategy(options.trainer.strategy),
        checkpointing=bool(arguments.get("activation_checkpointing")),
        compiled=bool(arguments.get("compile_blocks")),
        averaged=options.ema is not None,
        gathers_half=GATHERS_HALF,
    )


def _fit_arguments(options: Namespace, given: Sequence[str], setup: Setup, split: dict[str, Any]) -> list[str]:
    """The given arguments, and all that the plan decides."""
    decided = {
        "trainer.num_nodes": str(setup.num_nodes),
        "trainer.devices": str(setup.devices // setup.num_nodes),
        "data.batch_size": str(split["batch_size"]),
        "trainer.accumulate_grad_batches": str(split["accumulate"]),
    }
    if options.strategy not in (None, _strategy(options.trainer.strategy)):
        decided["trainer.strategy"] = STRATEGIES[options.strategy]
    kept = [(name, value) for name, value in read(given)[0] if name not in PlanOptions.__dataclass_fields__]
    return [part for name, value in [*kept, *decided.items()] for part in (f"--{name}", value) if part is not None]


def training_sets(source: str | list[str] | None) -> list[ShardIndex]:
    """The indices of training shards that are already on this machine."""
    here = isinstance(source, str) and Path(source).expanduser().exists()
    return load_indices(source) if here and source is not None else []


def batches_of_an_epoch(options: Namespace, processes: int, num_samples: int) -> int:
    """Batches of each process in an epoch of a fit."""
    together = options.data.batch_size * processes
    batches: int = num_samples // together if options.data.drop_last else -(-num_samples // together)
    limit = options.trainer.limit_train_batches
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _recipe(options: Namespace, indices: Sequence[ShardIndex]) -> Recipe:
    launch = launch_of(options, devices_per_node(options.trainer.devices) or options.devices or 1)
    assert launch.devices is not None
    devices, trainer = launch.num_nodes * launch.devices, options.trainer
    num_samples = options.num_samples or sum(index.num_samples for index in indices)
    steps = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and num_samples:
        batches = batches_of_an_epoch(options, devices, num_samples)
        steps.append(trainer.max_epochs * -(-batches // launch.accumulate))
    return Recipe(
        batch_size=launch.batch_size,
        devices=devices,
        accumulate=launch.accumulate,
        max_steps=min(steps, default=-1),
        global_batch=options.global_batch_size or launch.global_batch,
    )


def _strategy(strategy: Any) -> Literal["ddp", "fsdp"]:
    name = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    return "fsdp" if re.search("fsdp|fullysharded|modelparallel", name, re.IGNORECASE) else "ddp"
