"""What Lightning's training loop leaves out when it goes on from a checkpoint."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.loops.fit_loop import _FitLoop


class FitLoop(_FitLoop):
    """Lightning's, which also does what the checkpoint's own step still lacked when the training was killed.

    A checkpoint of `checkpoint.every_n_train_steps` or of `Preemption` is written before the validation of its step.
    Going on from it, Lightning counts that validation as done; and after the last step it does nothing at all, so that
    the training would never be exported. Here the validation is run, and the training ended as any other.

    Args:
        trainer: whose loop to replace, before it has run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = trainer.fit_loop.epoch_loop
        self._validation_due = False

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; a training that goes on after its last step has still to end."""
        has_data = self.max_batches and self.trainer.limit_train_batches
        return super().skip and not (self.is_resuming and has_data)

    def reset(self) -> None:
        """Find out whether a validation is due, before the progress of the checkpoint's step is forgotten."""
        self.epoch_loop.update_restart_stage()
        assert self._data_fetcher is not None
        saved_in_a_step = self.epoch_loop.restarted_on_train_batch_end
        self._validation_due = saved_in_a_step and self.epoch_loop._should_check_val_fx(self._data_fetcher)
        super().reset()

    def on_run_start(self) -> None:
        """Begin, with the validation that is due."""
        super().on_run_start()
        if self._validation_due:
            validation = self.epoch_loop.val_loop
            validation.restarting = False
            self.trainer.validating = True
            validation.run()
            self.trainer.training = True
