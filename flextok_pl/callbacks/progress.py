"""Shows how far a training is: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from flextok_pl.runtime.lightning_internals import logs_at, step_ends


def progress() -> ProgressBar:
    """The display for the place that this process writes to."""
    return StepBar() if sys.stdout.isatty() and sys.stderr.isatty() else StepLines()


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole training; None if it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps >= 0 else None


class StepBar(TQDMProgressBar):
    """Lightning's bar over the optimizer steps of a training, whatever its epochs and accumulation."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the bar at the step from which a training goes on."""
        super().on_train_start(trainer, *_)
        self.train_progress_bar.total = total_steps(trainer)
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description("Training")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keep the bar of the epochs before."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Show an optimizer step."""
        bar, step = self.train_progress_bar, trainer.global_step
        if step_ends(pl_module) and self.is_enabled and (step % self.refresh_rate == 0 or step == bar.total):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The module's values for the bar, without the number of the run."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class StepLines(ProgressBar):
    """Prints step, loss, speed and remaining time, and the results of validations.

    A line may come after every `trainer.log_every_n_steps` optimizer steps; one always comes after the last. Speed
    counts since the last line, without validations. The remaining time follows from all steps of this process.

    Args:
        every_seconds: least time between two lines.
        clock: seconds since any fixed moment.
    """

    def __init__(self, every_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._every, self._clock = every_seconds, clock
        self._enabled = True
        self._images = 0
        self._first_step = 0
        self._began = self._window = self._validating = 0.0
        self._shown = -math.inf

    def enable(self) -> None:
        """Print."""
        self._enabled = True

    def disable(self) -> None:
        """Print nothing: this is not the first process."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = self._window = self._clock()
        self._images, self._first_step, self._shown = 0, trainer.global_step, -math.inf

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the clock of the speed."""
        self._validating = self._clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation's values for the bar."""
        self._window += self._clock() - self._validating
        shown = [f"{name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items() if name[:4] == "val/"]
        if self._enabled and shown and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            print(f"step {trainer.global_step}  {'  '.join(shown)}", flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Print a line, if it is time."""
        self._images += len(next(value for value in batch.values() if value is not None)) * trainer.world_size
        if not (self._enabled and step_ends(pl_module)):
            return
        step, now, total = trainer.global_step, self._clock(), total_steps(trainer)
        due = logs_at(trainer, step) and now - self._shown >= self._every
        if not due and step != total:
            return
        loss = trainer.callback_metrics.get("train/loss", outputs["loss"])
        parts = [f"step {step}" if total is None else f"step {step}/{total}", f"loss {float(loss):.4g}"]
        if now > self._window:
            parts.append(f"{self._images / (now - self._window):.3g} images/s")
        if total is not None and step > self._first_step:
            left = (now - self._began) / (step - self._first_step) * (total - step)
            parts.append(f"{timedelta(seconds=round(left))} left")
        print("  ".join(parts), flush=True)
        self._images, self._window, self._shown = 0, now, now
