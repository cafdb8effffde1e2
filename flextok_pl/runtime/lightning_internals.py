"""All uses of Lightning's private names: the parts that training replaces to resume exactly.

No other file uses them. `tests/unit/test_lightning_internals.py` lists each one with its signature, so that an upgrade
of Lightning shows what changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from flextok_pl.contracts import run_folder
from flextok_pl.runtime.checkpoint_files import AtomicCheckpointIO, find_checkpoint, newest_intact

LAST = "last"
"""`ckpt_path` for the newest whole checkpoint of the run's folder."""


def replace_internals(trainer: pl.Trainer) -> None:
    """Give a trainer that has not run the loop and the connector of this file."""
    trainer.fit_loop = FitLoop(trainer)
    trainer._checkpoint_connector = CheckpointConnector(trainer)


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The trainer of a module, if it has one."""
    return module._trainer


def goes_on(trainer: pl.Trainer) -> bool:
    """Whether a run loads a checkpoint, for a module's `setup`; all processes must call this.

    Lightning's own trainer knows this too late: there the answer is no, and a checkpoint replaces the weights later.
    """
    connector = trainer._checkpoint_connector
    return isinstance(connector, CheckpointConnector) and connector.found() is not None


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Put all processes in one data-parallel group; call it once their number is known."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def send_gradients_in_place(strategy: Strategy) -> None:
    """Let ddp send gradients in place instead of copies, unless its own option says otherwise."""
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


def step_ends(module: pl.LightningModule) -> bool:
    """Whether the current batch ends an optimizer step, and is not an earlier part of an accumulation."""
    return not module.trainer.fit_loop._should_accumulate()


def logs_at(trainer: pl.Trainer, step: int) -> bool:
    """Whether a trainer writes its logs after an optimizer step; with `log_every_n_steps=0` it never does."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def checkpoint_folder(trainer: pl.Trainer) -> Path:
    """The folder of a run's checkpoints. All processes must call this."""
    return Path(getattr(trainer.checkpoint_callback, "dirpath", None) or run_folder(trainer) / "checkpoints")


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop, which also finishes what was pending when a checkpoint was saved at the end of a batch.

    Such a checkpoint, of `checkpoint.every_n_train_steps` or of `Preemption`, precedes the validation of its step.
    Lightning counts that validation as done, and also the epoch, if the batch was its last. This loop runs the
    validation and ends the epoch as in any training. Only a time-based `val_check_interval` starts from zero, with
    nothing due. A checkpoint that was saved within a validation counts as one before it.

    A validation that is due within an accumulation comes after its step, so that no checkpoint loses gradients.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)
        self.at_batch_end = False  # whether it resumes from such a checkpoint
        self._validation_put_off = False

    @property
    def done(self) -> bool:
        """Whether the epoch has ended."""
        return not self.at_batch_end and super().done

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a batch, unless the checkpoint's batch or epoch has still to be finished."""
        if self.at_batch_end:
            self.at_batch_end = self.val_loop.restarting = False
        elif self.restarting and self._is_training_done:
            self._skip_next_val = not self.val_loop.restarted_mid_evaluation
        else:
            super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if that is due, or postpone it."""
        super().on_advance_end(data_fetcher)
        self._validation_put_off = self._should_accumulate() and self._validation_due(data_fetcher)

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        return (self.trainer.should_stop or not self._should_accumulate()) and self._validation_due(data_fetcher)

    def _validation_due(self, data_fetcher: _DataFetcher) -> bool:
        return self._validation_put_off or super()._should_check_val_fx(data_fetcher)

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state, and whether a validation is due: one that was postponed, or is under way."""
        batches: Any = self.val_loop.batch_progress.current
        under_way = self.trainer.validating and batches.ready > batches.completed
        due = self._validation_put_off or under_way
        return {**super().on_save_checkpoint(), "validation_put_off": due, "validating": under_way}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Restore it, and count the checkpoint's batch as trained on."""
        super().on_load_checkpoint(state_dict)
        self._validation_put_off = state_dict.get("validation_put_off", False)
        total: Any = self.batch_progress.total
        if total.ready == total.processed == total.completed + 1:
            self.batch_progress.increment_completed()
            self.at_batch_end = True
        else:
            self.at_batch_end = state_dict.get("validating", False)


class FitLoop(_FitLoop):
    """Lightning's loop around an `EpochLoop`.

    After the last step Lightning does nothing at all, so that a training killed there would never be exported. This
    loop ends it like any other.
    """

    epoch_loop: EpochLoop

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = EpochLoop(trainer)

    @property
    def done(self) -> bool:
        """Whether the training has ended, including the checkpoint's epoch."""
        epochs: Any = self.epoch_progress.current
        within_an_epoch = self.is_resuming and epochs.processed < epochs.started
        return not within_an_epoch and super().done

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; a training that resumes after its last step must still end."""
        has_data = self.max_batches and self.trainer.limit_train_batches
        return (super().skip and not self.is_resuming) or not has_data


class CheckpointConnector(_CheckpointConnector):
    """Lightning's connector, which checks whether a checkpoint is whole before all processes load it.

    The check reads all of it. The first process does it and tells the others, which are connected by then.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self._asked: Any = None  # the checkpoint that a run asks for
        self._answer: tuple[str | Path | None] | None = None  # the checkpoint that exists, once found

    def _select_ckpt_path(self, *arguments: Any, **options: Any) -> str | Path | None:
        """Remember the checkpoint that a run asks for."""
        self._asked, self._answer = super()._select_ckpt_path(*arguments, **options), None
        return self._asked  # type: ignore[no-any-return]

    def _parse_ckpt_path(
        self, state_fn: TrainerFn, ckpt_path: Any, model_provided: bool, model_connected: bool
    ) -> str | Path | None:
        """Keep `last` for `found`, which knows the run's folder."""
        if str(ckpt_path) == LAST:
            return LAST
        return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)

    def found(self) -> str | Path | None:
        """The checkpoint that this run loads, or None; ValueError for a damaged one without an earlier whole one.

        All processes must call this, from a module's `setup` on.
        """
        if self._answer is None:
            path = self._asked
            if path is not None and "://" not in str(path):
                is_last = str(path) == LAST
                path = checkpoint_folder(self.trainer) if is_last else Path(path)
                answer: Any = self._find(path, is_last) if self.trainer.is_global_zero else None
                path, problem = self.trainer.strategy.broadcast(answer)
                if problem is not None:
                    raise ValueError(problem)
            self._answer = (path,)
        return self._answer[0]

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Load the checkpoint, if there is one."""
        if checkpoint_path != self._asked:
            self._asked, self._answer = checkpoint_path, None
        super().resume_start(self.found(), weights_only)

    def _find(self, path: Path, is_last: bool) -> tuple[str | None, str | None]:
        """The checkpoint to load, and the error that prevents it."""
        try:
            found = newest_intact(path) if is_last else find_checkpoint(path)
        except ValueError as error:
            return None, str(error)
        if found != path:
            where = f"going on with {found}" if found else f"no checkpoint in {path} yet: starting from the beginning"
            print(where, flush=True)
        return None if found is None else str(found), None


class StepCheckpoint(ModelCheckpoint):
    """Save the training as Lightning's `ModelCheckpoint` does, but never within an accumulation of gradients.

    A checkpoint there would lose them. Lightning also postpones the save of an epoch's last step to a validation, even
    if none comes. Here only a save for a monitored value is postponed, if the validation after this step measures it.
    """

    @classmethod
    def of_newest(cls, every_n_train_steps: int | None = None) -> StepCheckpoint:
        """Keep the newest two, in case a disk damages one; `last.ckpt` names the newest. Default: one an epoch."""
        return cls(
            filename="step{step:07d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=2,
            save_last="link",
            enable_version_counter=False,
            every_n_train_steps=every_n_train_steps,
        )

    @property
    def state_key(self) -> str:
        """Lightning's own key, whose place in checkpoints this takes."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save into the run's folder, unless another one is given."""
        if self.dirpath is None:
            self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step from which training resumes."""
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if this batch ended an optimizer step and its number is one to save at."""
        if not step_ends(pl_module):
            return
        awaited = self._defer_save_until_validation
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if awaited or not self._defer_save_until_validation:
            return
        values = self._monitor_candidates(trainer)
        if self.monitor not in values:
            return
        loop: Any = trainer.fit_loop
        if self.monitor == "step" or not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._defer_save_until_validation = False
            self._save_topk_checkpoint(trainer, values)
            self._save_last_checkpoint(trainer, values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that `last` exists, unless no step was made since the loaded checkpoint."""
        if trainer.global_step > self._first_step:
            super().on_train_end(trainer, pl_module)

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or not step_ends(trainer.lightning_module)

    def _should_save_on_exception(self, trainer: pl.Trainer) -> bool:
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        within_a_batch = batches.ready != batches.processed
        return super()._should_save_on_exception(trainer) and not within_a_batch and step_ends(trainer.lightning_module)


class AsyncAtomicCheckpointIO(AsyncCheckpointIO):
    """`AtomicCheckpointIO` in the background: training continues, with a second copy of its state in memory."""

    def __init__(self) -> None:
        super().__init__(AtomicCheckpointIO())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy a checkpoint and write it in the background; raises the error of an earlier write that failed."""
        if "://" not in str(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # `ModelCheckpoint` links to it at once
        super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint once all earlier writes, including its own, have ended."""
        self._ensure_setup()
        self._executor.submit(super().remove_checkpoint, path)  # type: ignore[union-attr]
