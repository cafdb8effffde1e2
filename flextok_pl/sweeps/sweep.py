"""Reads and checks a sweep's file, and makes the commands of its trials."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from flextok_pl.sweeps.files import load_yaml
from flextok_pl.sweeps.runner import TEST, TrialFolder
from flextok_pl.sweeps.space import Params, Space, as_text, require_plain

FIXED = ("experiment", "space", "overrides", "metric", "direction", "seeds", "test")
"""Options that cannot change during a sweep: its trials would no longer be comparable."""

FLEXTOK = (sys.executable, "-m", "flextok_pl")


@dataclass
class Sweep:
    """A search over the options of an experiment.

    Args:
        experiment: experiment file, or several, which are read in order as by `flextok fit --config`.
        metric: logged name of the metric to compare: its last value, averaged over the seeds.
        space: option -> its values; see `flextok_pl.sweeps.space.Space`.
        direction: `minimize` or `maximize` the metric.
        search: `grid` takes all points in order; `random`, `tpe` (a tree-structured Parzen estimator) or any sampler of
            Optuna's draws them.
        trials: number of trials; null with `grid` for all points.
        seeds: each trial trains once with each of these seeds, for model, data order and initialisation.
        overrides: option -> value for all trials.
        test: run `flextok test` after each fit, and use its metrics, too.
        curves: logged names up to `/k=`, such as `val/psnr`, to draw against the token budget.
        pruner: a pruner of Optuna's, which stops trials whose first seed does badly at a validation.
        scaling: name of a parameter without `when`. The metric, which must be one to minimize, is drawn against the
            operations of the training: a line for each value of the parameter, with a power law fitted to the best
            trials. Each run must log `train/flops`, as a fit does.
        retries: how often a failed trial is run again, from its last checkpoint.
        launcher: `local` starts processes here; `slurm` submits job arrays.
        workers: number of trials at a time.
        gpus_per_trial: with `local`, GPUs that a trial sees; 0 leaves them as they are.
        slurm: with `slurm`, parameters of submitit: `slurm_partition`, `timeout_min`, `cpus_per_task`, `gpus_per_node`,
            `mem_gb`, ...
        storage: URL of a database for Optuna's trials; null for a journal in the sweep's folder.
        folder: parent folder of sweeps.
        name: name of this sweep; null for that of the file.
        seed: seed of the search.
    """

    experiment: str | list[str]
    metric: str
    space: dict[str, Any]
    direction: Literal["minimize", "maximize"] = "minimize"
    search: Literal["grid", "random", "tpe"] | BaseSampler = "tpe"
    trials: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: dict[str, Any] = field(default_factory=dict)
    test: bool = False
    curves: list[str] = field(default_factory=list)
    scaling: str | None = None
    pruner: BasePruner | None = None
    retries: int = 1
    launcher: Literal["local", "slurm"] = "local"
    workers: int = 1
    gpus_per_trial: int = 0
    slurm: dict[str, Any] = field(default_factory=dict)
    storage: str | None = None
    folder: str = "runs/sweeps"
    name: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in {"trials": 1, "retries": 0, "workers": 1, "gpus_per_trial": 0}.items():
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"{option}={value} must be at least {least}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be different numbers, at least one")
        if self.trials is None and self.search != "grid":
            raise ValueError(f"trials=null: search={self.search} draws points without end; give the number of trials")
        if self.slurm and self.launcher != "slurm":
            raise ValueError("slurm=... has no effect with launcher=local; choose --launcher slurm, or --slurm {}")
        if self.scaling is not None and self.scaling not in self.space:
            raise ValueError(f"scaling={self.scaling} is not a parameter of space; use one of {sorted(self.space)}")
        if self.scaling is not None and self.points.parameters[self.scaling].when:
            raise ValueError(f"scaling={self.scaling} has a `when`; name a parameter of space that each trial has")
        if self.scaling is not None and self.direction == "maximize":
            raise ValueError(
                f"scaling={self.scaling} fits how a metric falls, but direction=maximize; leave scaling out, or "
                "choose a metric to minimize"
            )
        require_plain("overrides", self.overrides)
        searched = {option for point in self.points.corners() for option in self.points.options(point)}
        if both := searched & set(self.overrides):
            raise ValueError(f"{min(both)!r} is in space and in overrides; leave it in one of them")
        if taken := (searched | set(self.overrides)) & set(_own_options("", 0, "")):
            raise ValueError(f"{min(taken)!r} is set by the sweep itself: it gives each trial its seeds and its folder")
        if self.search == "grid":
            self.points.grid()
        for file in self.experiments:
            if not Path(file).is_file():
                raise ValueError(
                    f"experiment={file} is not a file; give one relative to the sweep's, or to {Path.cwd()}"
                )

    @property
    def experiments(self) -> list[str]:
        """The experiment files, in the order in which they are read."""
        return [self.experiment] if isinstance(self.experiment, str) else self.experiment

    @cached_property
    def points(self) -> Space:
        """The search space."""
        return Space(self.space)

    @property
    def num_trials(self) -> int:
        """The number of trials."""
        if self.search != "grid":
            assert self.trials is not None
            return self.trials
        points = len(self.points.grid())
        return points if self.trials is None else min(self.trials, points)

    @property
    def root(self) -> Path:
        """Folder of the sweep."""
        assert self.name is not None
        return Path(self.folder).expanduser() / self.name

    def fixed(self) -> dict[str, Any]:
        """Options that cannot change while the sweep goes on; for experiments, a checksum without their comments."""
        said = json.dumps([load_yaml(Path(file)) for file in self.experiments], default=str)
        options = json.loads(json.dumps({option: getattr(self, option) for option in FIXED}))
        return {**options, "content of experiment": hashlib.sha256(said.encode()).hexdigest()[:12]}

    def trial_folder(self, number: int, point: Mapping[str, Any]) -> TrialFolder:
        """The folder of a trial, named after its number and its point."""
        title = re.sub(r"[^\w.,=+-]+", "-", self.title(point))[:120].strip("-,")
        return TrialFolder(self.root / f"{number:04d}_{title}")

    def trial_plan(self, number: int, point: Params, name: str) -> dict[str, Any]:
        """The instructions for the runner of a trial, whose folder has that name."""
        return {
            "number": number,
            "params": point,
            "metric": self.metric,
            "retries": self.retries,
            "cwd": str(Path.cwd()),
            "runs": [f"version_{seed}" for seed in self.seeds],
            "commands": [[*FLEXTOK, *arguments] for arguments in self.commands(point, name, str(self.root))],
        }

    def script(self, point: Params, name: str) -> str:
        """A shell script that trains a trial again from the beginning."""
        commands = [shlex.join([*FLEXTOK, *arguments]) for arguments in self.commands(point, name, "$out")]
        lines = [
            "#!/bin/bash",
            "# Trains this trial again from the beginning, into the given folder, or `again` in this one.",
            "set -e",
            'out=$(realpath -m "${1:-$(dirname "$0")/again}")',
            f"cd {shlex.quote(str(Path.cwd()))}",
            *(command.replace("=$out", "='\"$out\"'") for command in commands),  # between quotes of the shell
        ]
        return "\n".join(lines) + "\n"

    def commands(self, point: Params, name: str, root: str) -> list[list[str]]:
        """Arguments of `flextok`: for each seed a fit, and a test of its last checkpoint if the sweep asks for one.

        They write into the trial's folder, `name` below `root`; a test into a folder of its own in that of the fit.
        """
        found = []
        for seed in self.seeds:
            commands = {"fit": _own_options(name, seed, root)}
            if self.test:
                run = f"{name}/version_{seed}"
                commands["test"] = _own_options(f"{run}/{TEST}", seed, root) | {
                    "trainer.logger.init_args.version": None,
                    "ckpt_path": f"{root}/{run}/checkpoints",
                }
            for command, own in commands.items():
                options = {**self.overrides, **self.points.options(point), **own}
                found.append([command, *(f"--config={file}" for file in self.experiments), *as_arguments(options)])
        return found

    def title(self, point: Mapping[str, Any]) -> str:
        """The text that distinguishes a point from others: `lr=0.003,width=64`."""
        last = [name.rsplit(".", 1)[-1] for name in self.space]
        short = {name: part if last.count(part) == 1 else name for name, part in zip(self.space, last, strict=True)}
        return ",".join(f"{short[name]}={value}" for name, value in self.points.shown(point).items())


def _own_options(name: str, seed: int, root: str) -> dict[str, Any]:
    """Options that a sweep sets in each training; a run's version is its seed."""
    return {
        **dict.fromkeys(("seed_everything", "model.seed", "data.seed"), seed),
        "metrics_log": {},
        "trainer.logger.init_args.save_dir": root,
        "trainer.logger.init_args.name": name,
        "trainer.logger.init_args.version": seed,
        "ckpt_path": "last",
    }


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """`--option=value` of each."""
    return [f"--{option}={as_text(value)}" for option, value in options.items()]
