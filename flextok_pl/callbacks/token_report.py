"""Logs loss and accuracy by position in a sequence of tokens, which shows where the information is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from flextok_pl.callbacks.charts import Chart
from flextok_pl.callbacks.loggers import log_numbers, log_results
from flextok_pl.contracts import default_budgets
from flextok_pl.distributed import all_reduce_sum
from flextok_pl.evaluation.pictures import figure_to_image
from flextok_pl.precision import accumulation_dtype
from flextok_pl.runtime.lightning_internals import logs_at, step_ends

NAMES = ("bits", "accuracy")


class PositionSums:
    """Sums of nats, of correct tokens and of tokens at each position, over sequences."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (3, K), float64 if the device has it

    def update(self, outputs: Any) -> None:
        """Add the outputs of a step."""
        if not isinstance(outputs, Mapping) or "nll" not in outputs:
            raise MisconfigurationException(
                "the token report needs steps that return nll and correct by token, as those of a PriorModule; remove "
                "it for other modules (positions: null)"
            )
        nll, correct = outputs["nll"].detach(), outputs["correct"]  # (B, K)
        wide = accumulation_dtype(nll.device)
        sums = torch.stack([each.sum(0, dtype=wide) for each in (nll, correct, torch.ones_like(nll))])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self) -> tuple[Tensor, int]:
        """Return (2, K) bits and accuracy by position and the number of sequences, over all processes; then reset."""
        assert self._sums is not None
        nats, hits, count = all_reduce_sum(self._sums.cpu().double())
        self._sums = None
        return torch.stack([nats / count / math.log(2), hits / count]), int(count[0])


class TokenReport(Callback):
    """Log bits and accuracy by token position, as numbers at positions 1, 2, 4, ... K and as a curve over all.

    It covers every window of `log_every_n_steps` optimizer steps in training, and the whole set in validation:
    `train/bits/001`, `val/accuracy/001`, and the picture `val/tokens_by_position`. The information of the whole
    sequence is the sum of the bits: guessing takes log2 V at each position.
    """

    def __init__(self) -> None:
        self._train, self._val = PositionSums(), PositionSums()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a batch, and report at the end of a window."""
        self._train.update(outputs)
        if step_ends(pl_module) and logs_at(trainer, trainer.global_step):
            log_numbers(trainer, trainer.global_step, _chart("train", self._train.means()[0]).scalars)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a validation that was interrupted."""
        self._val = PositionSums()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        if not trainer.sanity_checking:
            self._val.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on all processes' sequences."""
        if trainer.sanity_checking:
            return
        means, sequences = self._val.means()
        pictures = {"val/tokens_by_position": plot_positions(means, f"{sequences} sequences")}
        chart = _chart("val", means)
        log_results(trainer, pl_module, trainer.global_step, chart.scalars, pictures, chart=chart)


def _chart(split: str, means: Tensor) -> Chart:
    """Make a chart with tags at positions 1, 2, 4, ... K, and values at all."""
    tags = {name: {k: f"{split}/{name}/{k:03d}" for k in default_budgets(means.shape[1])} for name in NAMES}
    curves = {name: dict(enumerate(row.tolist(), 1)) for name, row in zip(NAMES, means, strict=True)}
    return Chart("positions", f"{split}: tokens", "position", tags, curves)


def plot_positions(means: Tensor, title: str) -> Tensor:
    """Draw bits and accuracy (2, K) over positions, as (3, H, W) uint8."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, row, name in zip(figure.subplots(1, 2), means, ("bits per token", "accuracy"), strict=True):
        axes.plot(range(1, len(row) + 1), row.tolist(), marker=".", linewidth=1)
        axes.set_xlabel("token position")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    return figure_to_image(figure)
