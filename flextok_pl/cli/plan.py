"""`flextok plan`: will an experiment fit, and how long will it take."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace, strip_meta
from lightning.pytorch.cli import LightningArgumentParser

from flextok_pl.cli import UserError
from flextok_pl.cli.plan_report import describe, record
from flextok_pl.cli.training import ParsingCLI, run_cli
from flextok_pl.cost.activations import Numerics
from flextok_pl.cost.machines import MACHINES, Machine, machine
from flextok_pl.cost.plan import Plan, Recipe, Setup, largest_split, memory, speed
from flextok_pl.cost.workload import Inputs, Workload, prior_workload, tokenizer_workload, vae_workload
from flextok_pl.data.index import ShardIndex
from flextok_pl.data.sources import load_indices
from flextok_pl.models.config import FlexTokConfig, PriorConfig, VAEConfig, config_from_dict

# Module -> its network's configuration, its workload, and what it is trained on where nothing says otherwise.
KINDS: dict[str, tuple[type[Any], Callable[..., Workload], Inputs]] = {
    "TokenizerModule": (FlexTokConfig, tokenizer_workload, "images"),
    "PriorModule": (PriorConfig, prior_workload, "tokens"),
    "VAEModule": (VAEConfig, vae_workload, "images"),
}
EXAMPLE = "experiments/tokenizer/d18_d28_imagenet.yaml"
FIELDS: dict[str, Inputs] = {"tokens": "tokens", "latent": "latents", "image": "images"}


class PlanCLI(ParsingCLI):
    """Parses what `flextok fit` takes, builds nothing of it, and plans."""

    command = "plan"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the plan to those of a fit."""
        super().add_arguments_to_parser(parser)
        known = ", ".join(MACHINES)
        parser.add_argument("--devices", type=int | None, default=None, help="How many; default the experiment's own.")
        parser.add_argument("--machine", type=str, default="h100", help=f"Each of them: {known}.")
        parser.add_argument("--mfu", type=float, default=0.4, help="Share of the peak at which operations run.")
        parser.add_argument(
            "--strategy", type=Literal["ddp", "fsdp"] | None, default=None, help="In place of trainer.strategy."
        )
        parser.add_argument(
            "--inputs",
            type=Literal["images", "latents", "tokens"] | None,
            default=None,
            help="What the training shards hold; default: see data.train, or else images, for a prior tokens.",
        )
        parser.add_argument("--peak_tflops", type=float | None, default=None, help="In place of the machine's.")
        parser.add_argument("--memory_gib", type=float | None, default=None, help="In place of the machine's.")
        parser.add_argument("--json", type=str | None, default=None, help="File to write the plan to.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is missing is mostly an experiment."""
        try:
            super().parse_arguments(parser, args)
        except UserError as error:
            raise UserError(f"{error}; give an experiment by --config, such as {EXAMPLE}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        options = self.config[subcommand]
        plan = make_plan(options, self._experiment)
        print(describe(plan))
        if options.json is not None:
            target = Path(options.json).expanduser()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(record(plan), indent=2) + "\n")


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok plan`."""
    run_cli(PlanCLI, "fit", arguments)


def make_plan(options: Namespace, experiment: str) -> Plan:
    """The plan of a parsed experiment.

    Args:
        options: what `flextok plan` was given.
        experiment: its name.

    Raises:
        ValueError: an option is out of range, or the experiment is not one of ours.
    """
    name = options.model.class_path.rsplit(".", 1)[-1]
    if name not in KINDS:
        raise ValueError(f"model={options.model.class_path}: only {', '.join(KINDS)} can be planned")
    indices = training_sets(options.data.train)
    recipe = _recipe(options, indices)
    devices = recipe.devices if options.devices is None else options.devices
    if devices < 1:
        raise ValueError(f"devices={devices} must be at least 1")
    device = _device(options)
    numerics = _numerics(options.trainer.precision, fused_norms=options.machine != "cpu")
    arguments = strip_meta(options.model.init_args).as_dict()
    config, workload_of, usual = KINDS[name]
    net = config_from_dict(config, arguments.pop("net"))
    inputs = options.inputs or next(
        (kind for field, kind in FIELDS.items() if indices and field in indices[0].fields), usual
    )
    workload = workload_of(arguments, net, options.data.image_size, inputs, numerics)
    setup = Setup(
        machine=device,
        devices=devices,
        numerics=numerics,
        strategy=options.strategy or _strategy(options.trainer.strategy),
        checkpointing=bool(arguments.get("activation_checkpointing")),
        compiled=bool(arguments.get("compile_blocks")),
        averaged=options.ema is not None,
    )
    split = largest_split(workload, setup, recipe.global_batch, recipe.batch_size)
    batch_size = 1 if split is None else split.batch_size
    peak = options.peak_tflops or device.peak_tflops(numerics.autocast)
    switched = dataclasses.replace(setup, checkpointing=not setup.checkpointing)
    return Plan(
        experiment=experiment,
        machine_name=options.machine,
        inputs=inputs,
        recipe=recipe,
        setup=setup,
        workload=workload,
        own=memory(workload, setup, recipe.batch_size),
        switched=memory(workload, switched, recipe.batch_size),
        split=split,
        needed=memory(workload, setup, batch_size),
        speed=speed(workload, setup, batch_size, recipe.global_batch, options.mfu, peak),
        utilisation=options.mfu,
        peak_tflops=peak,
    )


def _device(options: Namespace) -> Machine:
    device = machine(options.machine)
    for name in ("peak_tflops", "memory_gib"):
        if options[name] is not None and options[name] <= 0:
            raise ValueError(f"{name}={options[name]} must be positive")
    return device if options.memory_gib is None else dataclasses.replace(device, memory_gib=options.memory_gib)


def training_sets(source: str | list[str] | None) -> list[ShardIndex]:
    """The training shards' indices, where they are on this machine already."""
    here = isinstance(source, str) and Path(source).expanduser().exists()
    return load_indices(source) if here and source is not None else []


def devices_of(trainer: Namespace) -> int:
    """Devices on all nodes; 0 for `auto` and -1, as many as there are."""
    each = trainer.devices
    if isinstance(each, list):
        each = len(each)
    elif not isinstance(each, int):
        each = int(each) if str(each).isdecimal() else 0
    return max(each, 0) * int(trainer.num_nodes)


def _recipe(options: Namespace, indices: Sequence[ShardIndex]) -> Recipe:
    trainer, batch_size = options.trainer, options.data.batch_size
    devices = devices_of(trainer) or options.devices or 1
    accumulate, steps = trainer.accumulate_grad_batches, trainer.max_steps
    if steps < 0 and trainer.max_epochs is not None and indices:
        batches = sum(index.num_samples for index in indices) // (batch_size * devices)
        steps = trainer.max_epochs * -(-batches // accumulate)
    return Recipe(batch_size, devices, accumulate, steps)


def _numerics(precision: Any, fused_norms: bool) -> Numerics:
    sizes = {"32-true": 4, "32": 4, "None": 4, "bf16-mixed": 2, "16-mixed": 2}
    if str(precision) not in sizes:
        raise ValueError(f"trainer.precision={precision!r} cannot be planned; use 32-true, bf16-mixed or 16-mixed")
    return Numerics(sizes[str(precision)], fused_norms)


def _strategy(strategy: Any) -> Literal["ddp", "fsdp"]:
    name = strategy.class_path if isinstance(strategy, Namespace) else str(strategy)
    return "fsdp" if re.search("fsdp|fullysharded|modelparallel", name, re.IGNORECASE) else "ddp"
