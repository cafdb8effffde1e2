"""Lightning's training loop, which here goes on from a checkpoint exactly where that was saved."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


def step_ends(module: pl.LightningModule) -> bool:
    """Whether the current batch ends an optimizer step, and is no other part of an accumulation."""
    return not module.trainer.fit_loop._should_accumulate()


class EpochLoop(_TrainingEpochLoop):
    """Lightning's, which also does what its batch still lacked when a checkpoint was saved at the end of that.

    Such a checkpoint, of `checkpoint.every_n_train_steps` or of `Preemption`, precedes the validation of its step.
    Lightning counts that as done, and the epoch, too, if the batch was its last. Here the validation is run and the
    epoch ended as in any training. A time-based `val_check_interval` alone starts anew, and nothing is due. A
    checkpoint that was saved within a validation is one that precedes it.

    A validation due within an accumulation of gradients comes after its step, so that no checkpoint loses them.

    Attributes:
        at_batch_end: whether the training goes on from such a checkpoint, and has not yet.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)
        self.at_batch_end = False
        self._validation_put_off = False

    @property
    def done(self) -> bool:
        """Whether the epoch is."""
        return not self.at_batch_end and super().done

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a batch, unless the checkpoint's, or its epoch, is still to be ended."""
        if self.at_batch_end:
            self.at_batch_end = self.val_loop.restarting = False
        elif self.restarting and self._is_training_done:
            self._skip_next_val = not self.val_loop.restarted_mid_evaluation
        else:
            super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate, if that is due, or remember it."""
        super().on_advance_end(data_fetcher)
        self._validation_put_off = self._should_accumulate() and self._validation_due(data_fetcher)

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        return (self.trainer.should_stop or not self._should_accumulate()) and self._validation_due(data_fetcher)

    def _validation_due(self, data_fetcher: _DataFetcher) -> bool:
        return self._validation_put_off or super()._should_check_val_fx(data_fetcher)

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state, and whether a validation is due: one that was put off, or that is under way."""
        batches: Any = self.val_loop.batch_progress.current
        under_way = self.trainer.validating and batches.ready > batches.completed
        due = self._validation_put_off or under_way
        return {**super().on_save_checkpoint(), "validation_put_off": due, "validating": under_way}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Restore that, and count the checkpoint's batch as trained on."""
        super().on_load_checkpoint(state_dict)
        self._validation_put_off = state_dict.get("validation_put_off", False)
        total: Any = self.batch_progress.total
        if total.ready == total.processed == total.completed + 1:
            self.batch_progress.increment_completed()
            self.at_batch_end = True
        else:
            self.at_batch_end = state_dict.get("validating", False)


class FitLoop(_FitLoop):
    """Lightning's, around an `EpochLoop`.

    Going on after the last step, Lightning does nothing at all, so that a training killed there would never be
    exported. Here it is ended as any other.

    Args:
        trainer: whose loop to replace, before it has run.
    """

    epoch_loop: EpochLoop

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = EpochLoop(trainer)

    @property
    def done(self) -> bool:
        """Whether the training is, the checkpoint's epoch included."""
        epochs: Any = self.epoch_progress.current
        within_an_epoch = self.is_resuming and epochs.processed < epochs.started
        return not within_an_epoch and super().done

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; a training that goes on after its last step has still to end."""
        has_data = self.max_batches and self.trainer.limit_train_batches
        return (super().skip and not self.is_resuming) or not has_data
