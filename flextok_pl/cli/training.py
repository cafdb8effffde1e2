"""`flextok fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.distributed import DistError

import flextok_pl.modules  # noqa: F401  makes the modules known by their bare class names
from flextok_pl.callbacks import (
    EMA,
    CodebookReport,
    GenerationFID,
    HParams,
    MetricsLog,
    Predictions,
    ReconstructionFID,
    Throughput,
    TokenReport,
)
from flextok_pl.callbacks.progress import progress
from flextok_pl.cli import UserError, base_config, config_paths
from flextok_pl.cli.errors import is_for_the_user, told_to_the_user
from flextok_pl.cli.launch import launch_of
from flextok_pl.cli.run_place import RunPlace, RunRecord
from flextok_pl.data import ShardDataModule
from flextok_pl.modules.resume import ResumableModule, accepted_changes
from flextok_pl.modules.saved_prior import SavedPrior
from flextok_pl.modules.saved_tokenizer import SavedTokenizer
from flextok_pl.precision import check_training_precision
from flextok_pl.progress import announced, say
from flextok_pl.runtime import (
    Failure,
    FitLoop,
    Preempted,
    Preemption,
    Resume,
    StepCheckpoint,
    damage_of,
    without_tensors,
)

CALLBACKS: dict[str, type[Callback]] = {
    "rfid": ReconstructionFID,
    "gfid": GenerationFID,
    "codebook": CodebookReport,
    "positions": TokenReport,
    "metrics_log": MetricsLog,
    "throughput": Throughput,
    "lr_monitor": LearningRateMonitor,
    "hparams": HParams,
    "checkpoint": StepCheckpoint,
    "best": StepCheckpoint,
    # Last, so that it swaps the raw weights back after every other callback has evaluated the averaged ones.
    "ema": EMA,
    # After it, so that a checkpoint holds the step's average.
    "preemption": Preemption,
}
"""Optional callbacks, each a top-level group of options: `null` leaves it out, `{}` takes its defaults."""

LOST_CONTACT = "Connection closed by peer|Connection reset by peer|Timed out waiting|caused pair closure|Broken pipe"
"""What Gloo says of a process that is gone; NCCL's errors are of a class of their own."""

HUSHED = (
    ".*LeafSpec",  # Lightning's own, at every batch
    "The `srun` command is available",  # `Launch` refuses what needs it
    "Checkpoint directory .* exists and is not empty",  # that of the run that goes on
    "Experiment logs directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",  # logs come by steps, not by epochs
)
"""Warnings that nobody can act on."""

FIT_ONLY = frozenset({"throughput", "lr_monitor", "hparams", "checkpoint", "best", "ema", "preemption"})


class FlexTokCLI(LightningCLI):
    """LightningCLI for any of our modules on a `ShardDataModule`, with the callback groups of `CALLBACKS`.

    Args:
        subcommand: the one to run; only its parser is built.
        arguments: its arguments.
        experiment: name of the experiment: the folder below the logger's `save_dir` that receives its runs.

    Attributes:
        command: name of a command that takes the options of `subcommand` and does something else with them.
    """

    command: str | None = None

    def __init__(self, subcommand: str, arguments: Sequence[str], experiment: str) -> None:
        self._only, self._experiment = subcommand, experiment
        command = self.command or subcommand
        super().__init__(
            LightningModule,
            ShardDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=RunRecord,
            save_config_kwargs={"title": experiment},
            trainer_defaults={"enable_model_summary": False},
            parser_kwargs={subcommand: {"usage": f"flextok {command} --config FILE [--OPTION VALUE ...]"}},
            args=[subcommand, *arguments],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommand to run."""
        return {self._only: LightningCLI.subcommands()[self._only]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback groups, and what belongs to the whole training."""
        parser.add_argument(
            "--run", type=str | None, default=None, help="Name of the run and its folder; default: the next number."
        )
        parser.add_argument(
            "--global_batch_size",
            type=int | None,
            default=None,
            help="Samples of an optimizer step over all devices that a fit is meant for; it refuses any other number.",
        )
        for name, callback in CALLBACKS.items():
            parser.add_argument(f"--{name}", type=callback | None, default=None, help=_summary(callback))
            parser.callback_keys.append(name)
        if self._only != "fit":
            parser.add_argument(
                "--tokenizer",
                type=str | None,
                default=None,
                help="Evaluate this tokenizer (a .safetensors file, a folder or a Hub id) in place of the model.",
            )
            parser.add_argument(
                "--prior",
                type=str | None,
                default=None,
                help="Evaluate this prior (a .safetensors file) with that tokenizer in place of the model.",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what `flextok` was given, which need not be `sys.argv`."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Check the precision, name the runs of loggers that are not named, and put finished models in their place."""
        config = self.config[self._only]
        check_precision(config)
        launch = launch_of(config)
        launch.require_processes()
        if self._only == "fit":
            launch.require_global_batch(config.global_batch_size)
        tokenizer, prior = config.get("tokenizer"), config.get("prior")
        if tokenizer is not None or prior is not None:
            if config.ckpt_path is not None:
                name = "tokenizer" if prior is None else "prior"
                raise UserError(f"--{name} and --ckpt_path both name weights; give one of them")
            if tokenizer is None:
                raise UserError(f"--prior {prior} needs --tokenizer, the one whose tokens it knows, to decode images")
            saved: type[LightningModule] = SavedTokenizer
            options = {"path": tokenizer, "vae_config": None}
            if prior is not None:
                saved, options = SavedPrior, {"path": prior, "tokenizer": tokenizer, "text_encoder": None}
            config.model = Namespace(  # type: ignore[no-untyped-call]
                class_path=f"{saved.__module__}.{saved.__name__}",
                init_args=Namespace(**options),  # type: ignore[no-untyped-call]
            )
        self._place = RunPlace(config.trainer, self._experiment, config.run)
        config.run = None  # the saved configuration may be given again, for another run
        self._goes_on = str(config.get("ckpt_path")) == "last"  # which may be parsed as a path
        if self._goes_on:
            config.ckpt_path = self._go_on_with_the_last()
        elif config.get("ckpt_path") is not None and Path(config.ckpt_path).exists():
            damage = damage_of(Path(config.ckpt_path), contents=False)
            if damage is not None:
                raise UserError(
                    f"ckpt_path={config.ckpt_path} is damaged ({damage}); give another file of its folder, or `last` "
                    "for the newest whole one"
                )
        self._place.settle(self._goes_on and self._only == "fit")

    def _go_on_with_the_last(self) -> str | None:
        """The newest whole checkpoint of the run, or of the experiment's newest run that has any."""
        found = self._place.newest_checkpoint()
        if found is None:
            place = self._place
            without = f"no run in {place.parent} has a" if place.version is None else f"{place.folder} has no"
            print(f"{without} checkpoint yet: starting from the beginning", flush=True)
            return None
        if self._only != "fit":
            self._place.version = None
        return str(found)

    def _parse_ckpt_path(self) -> None:
        """Leave the options as they are given: Lightning puts the checkpoint's in their place, without a word."""

    def after_instantiate_classes(self) -> None:
        """Compare the model's options with the checkpoint's.

        Raises:
            ValueError: some of them must be the same.
        """
        config = self.config[self._only]
        path = Path(config.get("ckpt_path") or "")
        if not path.name or not path.exists() or not isinstance(self.model, ResumableModule):
            return
        checkpoint = without_tensors(path)
        changes = accepted_changes(self.model, checkpoint, self._only == "fit", f"ckpt_path={path}")
        if changes and 0 <= self.trainer.max_steps <= checkpoint["global_step"]:
            raise ValueError(
                f"the training of ckpt_path={path} has ended after {checkpoint['global_step']} steps, and takes no "
                f"other options: {'; '.join(map(str, changes))}. Give the former ones, or raise trainer.max_steps"
            )
        if self._record is not None:
            self._record.changes = changes

    @property
    def _record(self) -> RunRecord | None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((each for each in callbacks if isinstance(each, RunRecord)), None)

    def instantiate_classes(self) -> None:
        """Build everything."""
        if self.config[self._only].model.get("init_args", {}).get("compile_blocks"):
            say("the blocks are compiled at their first use: the first steps take minutes")
        try:
            with announced("building the model"), self._place.told_to_the_trainer():
                super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what an optional type's constructor said into a list of what else it tried.
            said = error.__cause__
            if said is None or "Union subtypes" not in str(error):
                raise
            raise said from said.__cause__

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        names = self._parser(self._only).callback_keys
        wanted = [
            callback
            for name, callback in zip(names, callbacks, strict=True)
            if callback is not None and (self._only == "fit" or name not in FIT_ONLY)
            if config["logger"] or not isinstance(callback, LearningRateMonitor)  # which refuses to do without
        ]
        own_bar = any(isinstance(each, ProgressBar) for each in config["callbacks"] or [])
        if config["enable_progress_bar"] is not False and not own_bar:
            wanted.append(progress())
        if self._only == "predict":
            wanted.append(Predictions())
        failure = Failure(lambda error: not (isinstance(error, Preempted) or is_for_the_user(error)))
        trainer = super()._instantiate_trainer(config, [failure, *wanted])
        trainer.fit_loop = FitLoop(trainer)
        trainer._checkpoint_connector = Resume(trainer, or_older=self._goes_on)
        launch_of(self.config[self._only], trainer.num_devices).require_processes()
        return trainer

    def before_fit(self) -> None:
        """Say how many samples a step takes, now that the devices are known."""
        config = self.config[self._only]
        launch = launch_of(config, self.trainer.num_devices)
        launch.require_global_batch(config.global_batch_size)
        if self.trainer.is_global_zero:
            print(launch, flush=True)

    def _run_subcommand(self, subcommand: str) -> None:
        with self._place.left_clean(self._record):
            super()._run_subcommand(subcommand)


class ParsingCLI(FlexTokCLI):
    """Parses what `flextok fit` takes, and builds nothing of it; a subclass's `_run_subcommand` uses the outcome."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say what is wrong in the words of this command."""
        for each in (parser, self._parser(self._only)):
            each.exit_on_error = False
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(str(error).replace(f"{self._only}.", "")) from error

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        """Nothing is instantiated."""

    def instantiate_classes(self) -> None:
        """Nothing is instantiated."""

    def after_instantiate_classes(self) -> None:
        """Nothing is compared."""


def check_precision(config: Namespace) -> str:
    """The full name of the trainer's precision.

    Raises:
        UserError: it does not suit the model.
    """
    adversarial = bool(config.model.get("init_args", {}).get("gan_weight"))
    try:
        return check_training_precision(config.trainer.precision, adversarial)
    except ValueError as error:
        raise UserError(str(error)) from error


def run(subcommand: str, arguments: Sequence[str]) -> None:
    """Run `flextok SUBCOMMAND`, with `base.yaml` under the experiment that `--config` names.

    Raises:
        UserError: an option, a shard or a file is wrong.
    """
    run_cli(FlexTokCLI, subcommand, arguments)


def run_cli(cli: Callable[[str, Sequence[str], str], FlexTokCLI], subcommand: str, arguments: Sequence[str]) -> None:
    """`run` with a CLI of one's own."""
    # Options of a callback can then be given directly: `rfid: {num_steps: 10}`, without class_path and init_args.
    for message in HUSHED:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):  # whose news are of their own insides, and advertisements
        logging.getLogger(name).setLevel(logging.WARNING)
    set_parsing_settings(subclasses_disabled=list(CALLBACKS.values()))
    given = [path.resolve() for path in config_paths(arguments)]
    base = base_config(given[0]) if given else None
    if base is not None and base not in given:
        arguments = ["--config", str(base), *arguments]
    try:
        with told_to_the_user():
            cli(subcommand, arguments, _experiment_name(given[-1], base) if given else "unnamed")
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from None
    except RuntimeError as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        raise UserError(f"{remedy}; go on with --ckpt_path last ({error})") from error


def _remedy(error: RuntimeError) -> str | None:
    """What to do about a process that is gone, or None for any other error."""
    if "DataLoader worker" in str(error):
        return "a process that loads data died, mostly for want of memory; lower data.num_workers or data.batch_size"
    if isinstance(error, DistError) or re.search(LOST_CONTACT, str(error)):
        return (
            "another process of this training died or hangs, and its own output says why; one that is only slow needs "
            "a larger timeout of trainer.strategy"
        )
    return None


def _experiment_name(file: Path, base: Path | None) -> str:
    """`tokenizer/demo` for a file below the base's folder, else its bare name."""
    if base is not None and file.is_relative_to(base.parent):
        return str(file.relative_to(base.parent).with_suffix(""))
    return file.stem


def _summary(callback: type) -> str:
    return (callback.__doc__ or callback.__name__).strip().split("\n")[0]
