"""A callback that evaluates while batches are evaluated, in some of a training's validations and in any outside it.

All work is done between the batches, because Lightning's weight averaging swaps the raw weights back at the end of the
epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from flextok_pl.callbacks.trainer_facts import checkpoint_facts, require_images

Split = Literal["val", "test"]


class EvaluationCallback(Callback):
    """Takes part in every n-th validation of a training, counted over its interruptions, and in any outside a training.

    Attributes:
        every_n_validations: n; 0 for none of a training.
    """

    every_n_validations: int
    _validations = 0  # that the training has finished
    _takes_part = False  # in the evaluation that runs
    _loaded: dict[str, Any] | None = None  # `checkpoint_facts` of the checkpoint that the run has loaded

    @abstractmethod
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before the first step, what would stop the first validation.

        Raises:
            ValueError: an option does not fit the module, or names what is not there.
            MisconfigurationException: the module or the validation set lacks what is looked at.
        """

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Start an evaluation, and forget one that was interrupted."""

    @abstractmethod
    def measure(self, pl_module: LightningModule, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Measure a batch with images and keys."""

    @abstractmethod
    def report(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Add up all processes, log, and leave files."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        self._loaded = None
        if stage == "fit":
            self._validations = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what says which weights are evaluated, and at which step."""
        self._loaded = checkpoint_facts(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before the first step what would stop the first validation."""
        if self.every_n_validations:
            self.check(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, if this validation is one to take part in."""
        n = self.every_n_validations
        is_due = trainer.state.fn != TrainerFn.FITTING or (n > 0 and (self._validations + 1) % n == 0)
        self._takes_part = is_due and not trainer.sanity_checking
        if self._takes_part:
            self.begin(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._takes_part = True
        self.begin(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure one batch."""
        if self._takes_part:
            require_images(batch, dataloader_idx)
            self.measure(pl_module, batch, batch_idx)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and count the validation."""
        if not trainer.sanity_checking:
            self._validations += 1
        if self._takes_part:
            self.report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self.report(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """The count of validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]
