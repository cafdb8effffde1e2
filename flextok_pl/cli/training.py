"""`flextok fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.distributed import DistError

import flextok_pl.modules  # noqa: F401  makes the modules known by their bare class names
from flextok_pl.callbacks import Predictions
from flextok_pl.callbacks.progress import progress
from flextok_pl.cli import base_config, load
from flextok_pl.cli.commands import FIT_ONLY, GIVEN_BY_THE_SUITE, GROUPS
from flextok_pl.cli.front import given_files, read
from flextok_pl.cli.run_place import RunPlace, RunRecord
from flextok_pl.data import ShardDataModule
from flextok_pl.errors import UserError
from flextok_pl.modules.resume import ResumableModule
from flextok_pl.modules.saved import SavedPrior, SavedTokenizer
from flextok_pl.precision import check_training_precision
from flextok_pl.progress import announced, say
from flextok_pl.runtime import Preemption, Trainer, find_checkpoint, without_tensors
from flextok_pl.runtime.launch import Launch, devices_per_node, require_processes

CALLBACKS: dict[str, type[Callback]] = {name: load(target) for name, target in GROUPS.items()}
"""The callbacks of the groups of options."""

LOST_CONTACT = "Connection closed by peer|Connection reset by peer|Timed out waiting|caused pair closure|Broken pipe"
"""Gloo's messages about a process that is gone; NCCL has its own error class."""

HUSHED = (
    ".*LeafSpec",  # Lightning's own, at every batch
    "The `srun` command is available",  # `require_processes` refuses what needs it
    "Checkpoint directory .* exists and is not empty",  # that of the run that goes on
    "Experiment logs directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",  # logs come by steps, not by epochs
    "MLFlow only allows .* special characters in metric name",  # of each budget: `k=001` is logged as `k001`
)
"""Warnings that nobody can act on."""


@dataclass
class RunOptions:
    """Options of the whole run.

    Args:
        run: name of the run and its folder; default the next number.
        global_batch_size: samples of an optimizer step over all devices; a fit with any other number is refused.
    """

    run: str | None = None
    global_batch_size: int | None = None


@dataclass
class FinishedModels:
    """Finished models to evaluate in place of the experiment's model.

    Args:
        tokenizer: tokenizer to evaluate: a .safetensors file, a folder or a Hub id.
        prior: prior to evaluate with that tokenizer: a .safetensors file, a folder or a Hub id. Without --tokenizer,
            the tokenizer is the one that a published prior names.
    """

    tokenizer: str | None = None
    prior: str | None = None


class FlexTokCLI(LightningCLI):
    """LightningCLI for any of our modules on a `ShardDataModule`, with the callback groups of `CALLBACKS`.

    Runs a method of the Trainer: `fit`, `validate`, `test` or `predict`. Runs of an experiment go to the folder of its
    name below the logger's `save_dir`.
    """

    command: str | None = None  # its name, if it is not the method's

    def __init__(self, method: str, arguments: Sequence[str], experiment: str) -> None:
        self.method, self.experiment = method, experiment
        self.record: RunRecord | None = None
        super().__init__(
            LightningModule,
            ShardDataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"enable_model_summary": False},
            parser_kwargs={"usage": f"flextok {self.command or method} --config FILE [--OPTION VALUE ...]"},
            args=[*arguments],
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback groups, and the options of the whole run."""
        parser.add_class_arguments(RunOptions, None)
        for name, callback in CALLBACKS.items():
            parser.add_argument(f"--{name}", type=callback | None, default=None)
        self.method_options = parser.add_method_arguments(Trainer, self.method, skip={*GIVEN_BY_THE_SUITE})
        if self.method != "fit":
            parser.add_class_arguments(FinishedModels, None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments of `flextok`, which need not be `sys.argv`."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Refuse impossible trainings before anything is built, and find the run's folder and its checkpoint."""
        config = self.config
        check_precision(config)
        launch = launch_of(config)
        require_processes(launch.num_nodes, launch.devices)
        if self.method == "fit":
            launch.require_global_batch(config.global_batch_size)
        else:
            self._use_finished_models()
        self.place = RunPlace(config.trainer, self.experiment, config.run)
        config.run = None  # so that the saved configuration can be given again, for another run
        goes_on = str(config.ckpt_path) == "last"  # which may be parsed as a path
        if goes_on:
            config.ckpt_path = self.place.last_checkpoints(self.method == "fit")
        path = Path(config.ckpt_path or "")
        self.checkpoint = find_checkpoint(path, contents=False) if path.name and path.exists() else None
        self.place.settle(goes_on and self.method == "fit")

    def _use_finished_models(self) -> None:
        """Put the models of `--tokenizer` and `--prior` in the place of the experiment's."""
        config, tokenizer, prior = self.config, self.config.tokenizer, self.config.prior
        if tokenizer is None and prior is None:
            options = config.model.get("init_args", {})
            if config.ckpt_path is None and "init_from" in options and options["init_from"] is None:
                raise UserError(
                    f"there are no trained weights to {self.method}: give --tokenizer or --prior FILE, --ckpt_path "
                    "last (the experiment's newest checkpoint) or FILE, or --model.init_from FILE"
                )
            return
        if config.ckpt_path is not None:
            name = "tokenizer" if prior is None else "prior"
            raise UserError(f"--{name} and --ckpt_path both name weights; give one of them")
        saved: type[LightningModule] = SavedTokenizer
        options = {"path": tokenizer, "vae_config": None}
        if prior is not None:
            saved, options = SavedPrior, {"path": prior, "tokenizer": tokenizer, "text_encoder": None}
        config.model = Namespace(  # type: ignore[no-untyped-call]
            class_path=f"{saved.__module__}.{saved.__name__}",
            init_args=Namespace(**options),  # type: ignore[no-untyped-call]
        )

    def instantiate_classes(self) -> None:
        """Build everything."""
        if self.config.model.get("init_args", {}).get("compile_blocks"):
            say("the blocks are compiled at their first use: the first steps take minutes")
        try:
            with announced("building the model"), self.place.told_to_the_trainer():
                super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps the constructor's message for an optional type into a list of what else it tried.
            said = error.__cause__
            if said is None or "Union subtypes" not in str(error):
                raise
            raise said from said.__cause__
        if isinstance(self.model, SavedPrior) and self.model.tokenizer is None:
            raise UserError(
                f"--prior {self.config.prior} names no tokenizer: give --tokenizer, the one of its tokens, to decode "
                "images"
            )

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """Build the trainer with the callbacks of the groups, and the command's own messages and files."""
        options = {**self.config_init.trainer}
        callbacks: list[Callback] = [*(options["callbacks"] or [])]
        if options["enable_progress_bar"] is not False and not any(isinstance(e, ProgressBar) for e in callbacks):
            callbacks.append(progress())
        for name in CALLBACKS:
            callback = self.config_init[name]
            if name == "lr_monitor" and not options["logger"]:  # it refuses to do without
                continue
            if callback is not None and (self.method == "fit" or name not in FIT_ONLY):
                callbacks.append(callback)
        if self.config_init.preemption is None:
            callbacks.append(Preemption(signals=[]))
        if self.method == "predict":
            callbacks.append(Predictions())
        if not options["fast_dev_run"]:
            self.record = RunRecord(self.parser, self.config, self.experiment)
            callbacks.append(self.record)
        return Trainer(**{**options, "callbacks": callbacks})

    def after_instantiate_classes(self) -> None:
        """Compare the model's options with the checkpoint's before anything runs."""
        if self.checkpoint is not None and isinstance(self.model, ResumableModule):
            max_steps = self.trainer.max_steps if self.method == "fit" else None
            found = without_tensors(self.checkpoint)
            self.model.accepted_changes(found, max_steps, f"ckpt_path={self.checkpoint}")

    def run(self) -> None:
        """Run the trainer's method."""
        if self.method == "fit":
            launch = launch_of(self.config, self.trainer.num_devices)
            launch.require_global_batch(self.config.global_batch_size)
            if self.trainer.is_global_zero:
                print(launch, flush=True)
        given = {name: self.config_init[name] for name in self.method_options}
        with self.place.left_clean(self.record):
            getattr(self.trainer, self.method)(self.model, datamodule=self.datamodule, **given)


class ParsingCLI(FlexTokCLI):
    """Parses the options of `flextok fit` without building anything; a subclass's `run` uses the result."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and report errors in the name of this command."""
        parser.exit_on_error = False
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(str(error)) from error

    def _build_nothing(self) -> None:
        pass

    before_instantiate_classes = instantiate_classes = after_instantiate_classes = _build_nothing


def launch_of(options: Namespace, devices: int | None = None) -> Launch:
    """The processes and batches of a fit with these options; `devices` per node, if known by now."""
    trainer = options.trainer
    devices = devices_per_node(trainer.devices) if devices is None else devices
    return Launch(int(trainer.num_nodes), devices, options.data.batch_size, trainer.accumulate_grad_batches)


def check_precision(config: Namespace) -> str:
    """The full name of the trainer's precision; refuses one that does not suit the model."""
    adversarial = bool(config.model.get("init_args", {}).get("gan_weight"))
    return check_training_precision(config.trainer.precision, adversarial)


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok fit`, `validate`, `test` or `predict`."""
    run_cli(FlexTokCLI, command, arguments)


def run_cli(cli: Callable[[str, Sequence[str], str], FlexTokCLI], method: str, arguments: Sequence[str]) -> None:
    """Run a CLI with `base.yaml` under the experiment that `--config` names."""
    for message in HUSHED:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):  # which log their own internals, and advertisements
        logging.getLogger(name).setLevel(logging.WARNING)
    # Options of a callback can then be given directly: `rfid: {num_steps: 10}`, without class_path and init_args.
    set_parsing_settings(subclasses_disabled=list(CALLBACKS.values()))
    given = [path.resolve() for path in given_files(read(arguments)[0])]
    base = base_config(given[0]) if given else None
    if base is not None and base not in given:
        arguments = ["--config", str(base), *arguments]
    try:
        cli(method, arguments, _experiment_name(given[-1], base) if given else "unnamed").run()
    except RuntimeError as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        raise UserError(f"{remedy}; resume with --ckpt_path last ({error})") from error


def _remedy(error: RuntimeError) -> str | None:
    """What to do about a process that is gone, or None for any other error."""
    if "DataLoader worker" in str(error):
        return "a data-loading process died, most likely out of memory; lower data.num_workers or data.batch_size"
    if isinstance(error, DistError) or re.search(LOST_CONTACT, str(error)):
        return (
            "another process of this training died or hangs; its own output shows the reason. If it is only slow, "
            "raise the timeout of trainer.strategy"
        )
    return None


def _experiment_name(file: Path, base: Path | None) -> str:
    """`tokenizer/demo` for a file below the base's folder, else its bare name."""
    if base is not None and file.is_relative_to(base.parent):
        return str(file.relative_to(base.parent).with_suffix(""))
    return file.stem
