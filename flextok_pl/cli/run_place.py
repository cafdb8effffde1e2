"""Chooses where a run's results go: `<save_dir>/<experiment>/version_<n>`, whichever loggers it has."""

from __future__ import annotations

import inspect
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from flextok_pl.contracts import run_folder
from flextok_pl.errors import UserError
from flextok_pl.files import write_file
from flextok_pl.progress import say
from flextok_pl.sharing.run import TRAINING

IN_FOLDERS = (TensorBoardLogger, CSVLogger)
"""Loggers that write into the run's folder."""

IDENTITY = {"WandbLogger": "id", "MLFlowLogger": "run_id", "CometLogger": "experiment_key"}
"""Logger of a service -> its option that continues a run of the service."""

NUMBERED = r"version_(\d+)"
"""Numbered folder of a run."""

IDENTITIES = "loggers.json"
"""File in a run's folder: class of a logger -> the service's name of the run."""

OF_A_START = re.compile(r"config\.yaml|hparams\.yaml|metrics\.csv|loggers\.json|events\.out\.tfevents\..*")
"""Contents of a run's folder before its first batch."""


class RunPlace:
    """The folder of a run.

    Loggers that write into a folder (TensorBoard's and the CSV logger) get this one. Their options choose it:
    `save_dir`, `name` (default the experiment's) and `version` (default the next free number). With other loggers it is
    below their `save_dir`; without a logger, below `trainer.default_root_dir`, default `runs`.

    `trainer` holds the parsed options of the trainer; its loggers without a name get the experiment's. `run` names the
    run with any logger; None leaves that to `version`. `parent` is the experiment's folder. `version` is the number or
    name of the run, or None for a new one, which `settle` then numbers.
    """

    def __init__(self, trainer: Namespace, experiment: str, run: str | None = None) -> None:
        self._trainer = trainer
        if trainer.logger in (True, None):
            options = Namespace(save_dir=trainer.default_root_dir or "runs", name=experiment, version=None)  # type: ignore[no-untyped-call]
            trainer.logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=options)  # type: ignore[no-untyped-call]
        given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        self._loggers = [each for each in given if isinstance(each, Namespace)]
        filed = [each.init_args for each in self._loggers if issubclass(resolve_name(each.class_path), IN_FOLDERS)]
        for options in filed:
            if options.get("name") == "lightning_logs":
                options.name = experiment
        dirs = [_chosen_folder(each) for each in self._loggers]
        save_dir = next((each for each in dirs if each is not None), trainer.default_root_dir or "runs")
        self._save_dir, self._name = os.path.expanduser(save_dir), (filed[0].get("name") or "") if filed else experiment
        self.parent = Path(self._save_dir, self._name)
        self.version: int | str | None = filed[0].get("version") if filed else None
        if run is not None:
            if run in ("", ".", "..") or "/" in run:
                raise UserError(f"run={run!r} must be the name of a folder, without a slash")
            if self.version is not None:
                raise UserError(f"--run {run} and trainer.logger.init_args.version={self.version} both name the run")
            self.version = run

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.version is not None
        return self.parent / (f"version_{self.version}" if isinstance(self.version, int) else self.version)

    def last_checkpoints(self, goes_on: bool) -> str | None:
        """The checkpoints' folder of this run, or, if it has no name, of the run that wrote the newest checkpoint.

        If it goes on, this run becomes that one; else it gets a new number. Prints a line if there is no checkpoint.
        """
        runs = self.parent.glob("*") if self.version is None else [self.folder]
        files = [file for run in runs for file in run.glob("checkpoints/*.ckpt") if file.exists()]
        if not files:
            without = f"no run in {self.parent} has a" if self.version is None else f"{self.folder} has no"
            print(f"{without} checkpoint yet: starting from the beginning", flush=True)
            return None
        run = max((file.stat().st_mtime_ns, file.parents[1]) for file in files)[1]
        number = re.fullmatch(NUMBERED, run.name)
        self.version = None if not goes_on else run.name if number is None else int(number[1])
        return str(run / "checkpoints")

    def settle(self, go_on: bool) -> None:
        """Choose the folder; refuse one that already holds a run, unless this one may go on with it."""
        if self.version is None:
            found = [re.fullmatch(NUMBERED, folder.name) for folder in self.parent.glob("version_*")]
            self.version = max((int(match[1]) for match in found if match is not None), default=-1) + 1
        if not go_on and (self.folder / "config.yaml").exists():
            raise UserError(
                f"{self.folder} already holds a run; go on with it (--ckpt_path last), or give another --run (or "
                "trainer.logger.init_args.version)"
            )

    @contextmanager
    def told_to_the_trainer(self) -> Iterator[None]:
        """Let the trainer's options name the folder and the services' runs for a while, then restore them."""
        trainer, before = self._trainer, deepcopy((self._trainer.logger, self._trainer.default_root_dir))
        file = self.folder / IDENTITIES
        known = json.loads(file.read_text()) if file.is_file() else {}
        for logger in self._loggers:
            kind, options = resolve_name(logger.class_path), logger.init_args
            if issubclass(kind, IN_FOLDERS):
                options.save_dir, options.name, options.version = self._save_dir, self._name, self.version
            elif kind.__name__ in known:
                options[IDENTITY[kind.__name__]] = known[kind.__name__]
            elif kind.__name__ == "WandbLogger" and options.get("name") is None:
                options.name = f"{self._name}/{self.folder.name}"
            elif kind.__name__ == "MLFlowLogger":
                if options.get("experiment_name") == "lightning_logs":
                    options.experiment_name = self._name
                options.run_name = options.get("run_name") or self.folder.name
            if issubclass(kind, CSVLogger):
                self._keep_earlier_metrics()
        trainer.default_root_dir = str(self.folder)
        try:
            yield
        finally:
            trainer.logger, trainer.default_root_dir = before

    @rank_zero_only
    def _keep_earlier_metrics(self) -> None:
        """Move the CSV logger's file of a run that goes on aside: the logger starts with an empty one."""
        file = self.folder / "metrics.csv"
        if file.is_file():
            number = len(list(self.folder.glob("metrics_*.csv")))
            file.rename(file.with_name(f"metrics_{number}.csv"))

    @contextmanager
    def left_clean(self, record: RunRecord | None) -> Iterator[None]:
        """Remove a new folder again if the run fails before its first batch."""
        existed = self.folder.exists()
        try:
            yield
        except BaseException:
            if record is not None and not existed and not record.used and self.folder.exists():
                self._remove_a_start()
            raise

    @rank_zero_only
    def _remove_a_start(self) -> None:
        files = [path for path in self.folder.rglob("*") if not path.is_dir()]
        if not all(path.parent == self.folder and OF_A_START.fullmatch(path.name) for path in files):
            return
        for path in files:
            path.unlink()
        for folder in (self.folder, *self.folder.parents):
            if not folder.is_relative_to(self._save_dir) or any(folder.iterdir()):
                break
            folder.rmdir()


def _chosen_folder(logger: Namespace) -> str | None:
    """The `save_dir` of a logger, unless it is the default of its class, such as `./mlruns`."""
    given = logger.get("init_args", {}).get("save_dir")
    usual = inspect.signature(resolve_name(logger.class_path)).parameters.get("save_dir")
    return None if given is None or (usual is not None and str(given) == usual.default) else str(given)


class RunRecord(SaveConfigCallback):
    """Writes a run's `config.yaml` and the services' names for it, and prints what starts."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, title: str) -> None:
        super().__init__(parser, config)
        self.title = title
        # Whether the run has reached its first batch, in any process of this machine.
        self.used = torch.zeros((), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._started: tuple[float, int, Path] | None = None  # clock, step and folder of the training's start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the files."""
        folder = run_folder(trainer)
        if self.already_saved or not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = str(folder / self.config_filename)
        self.parser.save(self.config, file, skip_none=False, overwrite=True, multifile=False)
        names = {type(each).__name__: each.version for each in trainer.loggers if type(each).__name__ in IDENTITY}
        if names:
            write_file(folder / IDENTITIES, json.dumps(names))
        self.already_saved = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is trained, where, and where its results go."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        print(
            f"{self.title}: {type(pl_module).__name__}, {trained / 1e6:.3g} M trained parameters\n"
            f"results in {folder}\n"
            f"on {trainer.world_size} x {name}, precision {trainer.precision}",
            flush=True,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count the cost of the training."""
        self._started = (time.monotonic(), trainer.global_step, run_folder(trainer))

    @rank_zero_only
    def _note_cost(self, trainer: Trainer) -> None:
        """Add the cost of this start of the training to `training.json`, for the model card."""
        if self._started is None or not self.used:
            return
        (began, first, folder), self._started = self._started, None
        root = trainer.strategy.root_device
        attempt = {
            "from_step": first,
            "to_step": trainer.global_step,
            "seconds": round(time.monotonic() - began, 1),
            "devices": trainer.world_size,
            "device": torch.cuda.get_device_name(root) if root.type == "cuda" else root.type,
        }
        file = folder / TRAINING
        try:
            known = json.loads(file.read_text())["attempts"] if file.is_file() else []
            write_file(file, json.dumps({"attempts": [*known, attempt]}, indent=1) + "\n")
        except (OSError, ValueError, LookupError) as error:  # this must not end a training
            say(f"{file}: the cost of this training cannot be added: {error}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the cost."""
        self._note_cost(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record the cost until now."""
        self._note_cost(trainer)

    def _use(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if not trainer.sanity_checking:
            self.used.fill_(True)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _use
