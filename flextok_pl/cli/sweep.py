"""`flextok sweep` and `flextok sweep status`: search over the options of an experiment."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from jsonargparse import ArgumentParser, Namespace, strip_meta
from optuna.trial import TrialState
from rich.console import Console
from rich.live import Live

from flextok_pl.cli.plan import KINDS, batches_of_an_epoch, training_sets
from flextok_pl.cli.training import ParsingCLI, launch_of, run_cli
from flextok_pl.config import config_from_dict
from flextok_pl.errors import UserError, told_to_the_user
from flextok_pl.progress import announced
from flextok_pl.sweeps.driver import Driver, find_study
from flextok_pl.sweeps.files import load_yaml
from flextok_pl.sweeps.results import status_table, write_results
from flextok_pl.sweeps.runner import TrialFolder
from flextok_pl.sweeps.space import Params
from flextok_pl.sweeps.sweep import FLEXTOK, Sweep, as_arguments

ONE_STEP = {
    "trainer.max_steps": 1,
    "trainer.limit_train_batches": 1,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.val_check_interval": 1.0,
    "trainer.accumulate_grad_batches": 1,
    "global_batch_size": None,
    "model.warmup_steps": 0,
}
"""Options that make an experiment as short as possible: one step, one batch of each set, and all logs after it."""


class CheckCLI(ParsingCLI):
    """Parses the options of `flextok fit`, and checks network, global batch and that a validation takes place."""

    def run(self) -> None:
        """Check."""
        options = self.config
        kind = KINDS.get(options.model.class_path.rsplit(".", 1)[-1])
        if kind is not None:
            net = strip_meta(options.model.init_args).as_dict().get("net")
            if net is not None:
                config_from_dict(kind[0], net)
        launch_of(options).require_global_batch(options.global_batch_size)
        steps, warmup = options.trainer.max_steps, options.model.init_args.get("warmup_steps", 0)
        if 0 < steps <= warmup:
            raise ValueError(f"model.warmup_steps={warmup} must be below trainer.max_steps={steps}")
        first = _steps_to_validation(options)
        if 0 < steps < first:
            raise ValueError(
                f"trainer.max_steps={steps} ends before the first validation, which comes after "
                f"{first} steps; set trainer.check_val_every_n_epoch to null and trainer.val_check_interval to a "
                "number of steps"
            )


@dataclass
class SweepOptions:
    """Options of this start of a sweep.

    Args:
        dry_run: print the commands of the trials, and stop.
        check: first check all values, and train a step if local.
    """

    dry_run: bool = False
    check: bool = True


@dataclass
class StatusOptions:
    """Options of `flextok sweep status`.

    Args:
        watch: keep showing the trials until all have ended.
    """

    watch: bool = False


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok sweep`."""
    sweep, rest = parse_sweep(sweep_parser(command, SweepOptions), arguments)
    if rest["dry_run"]:
        if rest["check"]:
            check_points(sweep)
        _print_trials(sweep)
        return
    driver = Driver(sweep, lambda line: print(line, flush=True), check if rest["check"] else lambda sweep: None)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C
    try:
        driver.run()
    finally:
        signal.signal(signal.SIGTERM, before)
        write_results(sweep, driver.study)
    if not driver.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        raise UserError(f"no trial has finished; see `flextok sweep status` and {sweep.root}/*/log.txt for the reasons")
    print(f"results: {sweep.root / 'results.csv'}, and pictures beside it; `make tensorboard` shows the runs")


def status(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok sweep status`."""
    sweep, rest = parse_sweep(sweep_parser(command, StatusOptions), arguments)
    study = find_study(sweep)
    if study is None:
        raise UserError(f"{sweep.root} holds no sweep yet; start one by `flextok sweep FILE`")
    console = Console()
    if not rest["watch"]:
        console.print(status_table(sweep, study))
        return
    with Live(status_table(sweep, study), console=console, refresh_per_second=1) as live:
        while sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)) < sweep.num_trials:
            time.sleep(2)
            live.update(status_table(sweep, study))


def check(sweep: Sweep) -> None:
    """Find errors that would stop every trial, before the first one starts.

    Parses every value of every option together with the others' first values, and checks the networks' options. With
    launcher=local the first point then trains one step and evaluates one batch, to check that the metric is logged. A
    machine that submits jobs may lack the devices and the memory for that.
    """
    points = check_points(sweep)
    found = f"{len(points)} points of the space can be parsed"
    if sweep.launcher == "slurm":
        print(f"{found}; launcher=slurm: no test step here", flush=True)
        return
    print(f"{found}; training the first one for a step", flush=True)
    with tempfile.TemporaryDirectory(prefix="flextok-check-") as place:
        for arguments in sweep.commands(points[0], "check", place)[: 1 + sweep.test]:
            command = [*FLEXTOK, *arguments, *as_arguments(ONE_STEP)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(
                    f"one training step of the first point failed:\n{(done.stdout + done.stderr)[-3000:]}\n"
                    f"the command was: {shlex.join(command)}"
                )
        logged: dict[str, Any] = {}
        for entry in TrialFolder(Path(place) / "check").measured(f"version_{sweep.seeds[0]}"):
            logged |= entry["metrics"]
    if sweep.metric not in logged:
        raise UserError(
            f"metric={sweep.metric} is not logged; there are {', '.join(sorted(logged))}. If it is logged only later "
            "in a training, give --check false"
        )


def check_points(sweep: Sweep) -> list[Params]:
    """Parse every value of every option, and return the points that were parsed."""
    points = list(sweep.points.corners())
    with announced(f"parsing {len(points)} points of the space"):
        for point in points:
            try:
                with told_to_the_user():
                    run_cli(CheckCLI, "fit", sweep.commands(point, "check", str(sweep.root))[0][1:])
            except UserError as error:
                raise UserError(f"space: {point} cannot be trained: {error}") from error
    return points


def _steps_to_validation(options: Namespace) -> int:
    """Optimizer steps before the first validation; 0 if the options do not determine them."""
    trainer, interval, launch = options.trainer, options.trainer.val_check_interval, launch_of(options)
    indices, batches = training_sets(options.data.train), 0
    if indices:
        processes = launch.num_nodes * (launch.devices or torch.cuda.device_count() or 1)
        batches = batches_of_an_epoch(options, processes, sum(index.num_samples for index in indices))
    elif trainer.check_val_every_n_epoch is not None or not isinstance(interval, int):
        return 0
    first = interval if isinstance(interval, int) else int(batches * (1.0 if interval is None else interval))
    return int(((trainer.check_val_every_n_epoch or 1) - 1) * batches + first) // launch.accumulate


def sweep_parser(command: str, *own: type) -> ArgumentParser:
    """Make the parser of a sweep's options, and of a command's own."""
    parser = ArgumentParser(prog=f"flextok {command}", usage=f"flextok {command} FILE [...]")
    parser.add_argument("--config", action="config")
    for options in (Sweep, *own):
        parser.add_class_arguments(options, None)
    return parser


def parse_sweep(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Sweep, dict[str, Any]]:
    """Read the sweep of a file, and all options that were given."""
    file = Path(arguments[0])
    load_yaml(file)
    given = parser.instantiate_classes(parser.parse_args([f"--config={file}", *arguments[1:]])).as_dict()
    options = {option.name: given[option.name] for option in dataclasses.fields(Sweep)}
    named = options["experiment"] if isinstance(options["experiment"], list) else [options["experiment"]]
    beside = {each: os.path.normpath(file.parent / each) for each in named}  # or else relative to the working folder
    options["experiment"] = [beside[each] if Path(beside[each]).is_file() else each for each in named]
    options["name"] = options["name"] or _name(file)
    try:
        return Sweep(**options), given
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _name(file: Path) -> str:
    """`full/budget_law` for a file below a folder `sweeps`, else its bare name."""
    above = [part.name for part in file.absolute().parents]
    below = above[: above.index("sweeps")] if "sweeps" in above else []
    return "/".join([*reversed(below), file.stem])


def _print_trials(sweep: Sweep) -> None:
    """Print the commands of each trial, seed by seed, and where they would run; points are drawn without results."""
    if sweep.launcher == "slurm":
        asked = " ".join(f"{name}={value}" for name, value in sweep.slurm.items()) or "the cluster's defaults"
        print(f"# each trial is a Slurm job, at most {sweep.workers} at a time, with {asked}")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sweep.seed))
    grid = sweep.points.grid() if sweep.search == "grid" else []
    for number in range(sweep.num_trials):
        point = grid[number] if grid else sweep.points.suggest(study.ask())
        for arguments in sweep.commands(point, sweep.trial_folder(number, point).path.name, str(sweep.root)):
            print(shlex.join(["flextok", *arguments]))
