"""When a training saves itself."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Save the training as Lightning's `ModelCheckpoint` does, but never within an accumulation of gradients.

    They would be lost. Lightning's own puts off the save of an epoch's last step until after the validation that mostly
    comes then. Where none does, as `trainer.val_check_interval` may have it, it saves after the next batch.
    """

    @property
    def state_key(self) -> str:
        """That of Lightning's, whose place in checkpoints this takes."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if this batch ended an optimizer step and its number is one to save at."""
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
