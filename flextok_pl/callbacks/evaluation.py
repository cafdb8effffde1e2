"""Base of callbacks that evaluate between batches: in some validations of a training, and in any other evaluation.

All work is done between the batches, because Lightning's weight averaging swaps the raw weights back at the end of the
epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from flextok_pl.callbacks.ema import EMA
from flextok_pl.callbacks.trainer_facts import require_images
from flextok_pl.runtime.sharding import CURRENT_STATE

Split = Literal["val", "test"]


class EvaluationCallback(Callback):
    """Takes part in every n-th validation of a training, counted over interruptions, and in any other evaluation."""

    every_n_validations: int  # n; 0 for none of a training
    _validations = 0  # number that the training has finished
    _takes_part = False  # in the current evaluation
    _loaded_step = 0  # of the loaded checkpoint, if any
    _loaded_average: bool | None = None  # whether its weights are averaged ones

    @abstractmethod
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before the first step, whatever would stop the first validation."""

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Start an evaluation, and forget one that was interrupted."""

    @abstractmethod
    def measure(self, pl_module: LightningModule, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Measure a batch with images and keys."""

    @abstractmethod
    def report(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Sum over all processes, log, and write files."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        self._loaded_step, self._loaded_average = 0, None
        if stage == "fit":
            self._validations = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember which weights are evaluated, and at which step."""
        self._loaded_step, self._loaded_average = int(checkpoint.get("global_step", 0)), CURRENT_STATE in checkpoint

    def step_of(self, trainer: Trainer) -> int:
        """The training step whose weights are evaluated; 0 if unknown."""
        return trainer.global_step or self._loaded_step

    def weights_of(self, trainer: Trainer) -> str:
        """Name the weights of the module while batches are evaluated: `ema`, `raw`, `initial` or `loaded`.

        `initial` is an average without an update, which holds the initial weights of the training; the trainer knows
        nothing about the origin of `loaded` weights.
        """
        average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        if trainer.state.fn == TrainerFn.FITTING:
            return "raw" if average is None else "ema" if average.num_updates else "initial"
        in_place = average is not None and average.in_place
        return "ema" if (in_place if self._loaded_average is None else self._loaded_average) else "loaded"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find before the first step whatever would stop the first validation."""
        if self.every_n_validations:
            self.check(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, if this validation is one of every n."""
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
