"""Callbacks that take part in some of a training's validations."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class SomeValidations(Callback):
    """Takes part in every n-th validation of a training, counted over its interruptions, and in any outside a training.

    Args:
        every_n_validations: n; 0 for none of a training.
        every_n_epochs: the former name of `every_n_validations`.

    Raises:
        ValueError: n is negative.
    """

    def __init__(self, every_n_validations: int, every_n_epochs: int | None) -> None:
        if every_n_epochs is not None:
            warnings.warn(
                f"every_n_epochs={every_n_epochs} is now called every_n_validations, and counts validations; rename it",
                FutureWarning,
                stacklevel=2,
            )
            every_n_validations = every_n_epochs
        if every_n_validations < 0:
            raise ValueError(f"every_n_validations={every_n_validations} must be at least 0")
        self.every_n_validations = every_n_validations
        self._validations = 0  # that the training has finished

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training."""
        if stage == "fit":
            self._validations = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before the first step what would stop the first validation."""
        if self.every_n_validations:
            self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module, data or options with which a validation of a training cannot be taken part in.

        Raises:
            ValueError: an option does not fit the module, or names what is not there.
            MisconfigurationException: the module or the validation set lacks what is looked at.
        """

    def is_due(self, trainer: Trainer) -> bool:
        """Whether to take part in the evaluation that begins."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return not trainer.sanity_checking
        return self.every_n_validations > 0 and (self._validations + 1) % self.every_n_validations == 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the validation."""
        if not trainer.sanity_checking:
            self._validations += 1

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]
