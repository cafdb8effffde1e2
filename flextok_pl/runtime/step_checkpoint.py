"""When a training saves itself."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from flextok_pl.contracts import run_folder
from flextok_pl.runtime.fit_loop import step_ends


class StepCheckpoint(ModelCheckpoint):
    """Save the training as Lightning's `ModelCheckpoint` does, but never within an accumulation of gradients.

    They would be lost. Lightning's own also puts off the save of an epoch's last step until a validation, though none
    need come then; here it is put off only for a monitored value that the validation after this step measures.
    """

    @property
    def state_key(self) -> str:
        """That of Lightning's, whose place in checkpoints this takes."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save into the run's folder, unless another is given."""
        if self.dirpath is None:
            self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step from which training goes on."""
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if this batch ended an optimizer step and its number is one to save at."""
        if not step_ends(pl_module):
            return
        awaited = self._defer_save_until_validation
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        values = self._monitor_candidates(trainer)
        if awaited or not self._defer_save_until_validation or self.monitor not in values:
            return
        loop: Any = trainer.fit_loop
        if self.monitor == "step" or not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._defer_save_until_validation = False
            self._save_topk_checkpoint(trainer, values)
            self._save_last_checkpoint(trainer, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See to it that there is a `last`, unless no step was made since the checkpoint that training went on from."""
        if trainer.global_step > self._first_step:
            super().on_train_end(trainer, pl_module)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or not step_ends(trainer.lightning_module)

    def _should_save_on_exception(self, trainer: Trainer) -> bool:
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        within_a_batch = batches.ready != batches.processed
        return super()._should_save_on_exception(trainer) and not within_a_batch and step_ends(trainer.lightning_module)
