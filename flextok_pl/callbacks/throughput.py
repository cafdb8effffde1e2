"""Logs images and operations per second, the share of time spent waiting for data, and skipped samples."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from flextok_pl.callbacks.loggers import log_numbers
from flextok_pl.precision import HALF
from flextok_pl.runtime.lightning_internals import step_ends


class Throughput(Callback):
    """Log `train/images_per_s` (all ranks) and `train/data_share` over every window of training steps.

    With a module that states `flops_per_sample` it also logs `train/tflops_per_s` and, if Lightning knows the device's
    peak, their ratio `train/mfu`. With a data module that skips broken samples it also logs `train/skipped_samples`,
    their number on all ranks since the training began.

    Data loading is the time between the end of a batch and the start of the next. Hooks that run there, such as saving
    a checkpoint, count too; validation does not. The clock is the CPU's: waiting for a GPU counts as computing, and
    loading while a GPU is still busy counts as loading. Lightning's `ThroughputMonitor` has no data share, takes a
    Python function for the batch size, which a YAML file cannot give, and synchronises the GPU at every step.

    Args:
        every_n_steps: optimizer steps in a window; None takes the trainer's `log_every_n_steps`.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.latest: dict[str, float] = {}  # what was logged last
        self._ended: float | None = None
        self._started = 0.0
        self._clear()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time between epochs, and the time of a validation."""
        self._ended = None

    on_validation_start = on_train_epoch_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the time spent waiting for the batch."""
        self._started = self.clock()
        self._waited += self._started - (self._started if self._ended is None else self._ended)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the time of the step, and log at the end of a window."""
        self._ended = self.clock()
        self._computed += self._ended - self._started
        self._images += len(next(value for value in batch.values() if value is not None))
        if not step_ends(pl_module):
            return
        self._steps += 1
        window: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if 0 < window <= self._steps:
            total = self._waited + self._computed
            metrics = {
                "train/images_per_s": self._images * trainer.world_size / total,
                "train/data_share": self._waited / total,
            }
            flops = getattr(pl_module, "flops_per_sample", None)
            if flops is not None:
                metrics["train/tflops_per_s"] = flops * metrics["train/images_per_s"] / 1e12
                peak = _peak_flops(trainer)
                if peak is not None:
                    metrics["train/mfu"] = metrics["train/tflops_per_s"] * 1e12 / (peak * trainer.world_size)
            skipped = getattr(trainer.datamodule, "skipped_samples", None)  # type: ignore[attr-defined]
            if skipped is not None:
                number = torch.tensor(float(skipped), device=trainer.strategy.root_device)
                metrics["train/skipped_samples"] = float(trainer.strategy.reduce(number, reduce_op="sum"))
            # Not by the module's log(), which drops values between the trainer's own logging steps.
            self.latest = metrics
            log_numbers(trainer, trainer.global_step, metrics)
            self._clear()

    def _clear(self) -> None:
        self._waited = self._computed = 0.0
        self._images = self._steps = 0


def _peak_flops(trainer: Trainer) -> float | None:
    """Operations per second of one device in the precision of the training, if Lightning knows them."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    return get_available_flops(device, HALF.get(str(trainer.precision), torch.float32))
