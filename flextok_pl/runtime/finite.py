"""Stops a training whose gradients or weights are no longer finite, on all ranks at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from flextok_pl.distributed import gather_objects
from flextok_pl.runtime.lightning_internals import checkpoint_folder
from flextok_pl.transfer import Arrival

SHOWN_KEYS = 8


class StopIfNotFinite(Callback):
    """Stop all ranks together if a gradient is NaN or infinite, as when one rank's loss is.

    A rank that stopped alone would leave the others waiting in their next collective. The gradient's norm, which
    clipping needs anyway, is the same on all ranks. They check it at the next optimizer step, so that the host does not
    wait for a device. No checkpoint, validation or export comes in between. With scaled losses (16-mixed) gradients
    overflow now and then, and their step is left out: there the ranks sum their losses instead.
    """

    def __init__(self) -> None:
        self._current = _Step()
        self._asked: _Step | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._current, self._asked = _Step(), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch."""
        self._current.keys += batch.get("key") or [] if isinstance(batch, Mapping) else []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss, summed over an accumulation of gradients."""
        self._current.loss = self._current.loss + loss.detach()

    def ask(self, trainer: Trainer, norm: Tensor) -> None:
        """Note a step, whose gradient has this `norm` on all ranks, and check the previous step.

        Raises:
            RuntimeError: the previous one was not finite; the error names step, rank, samples and checkpoint.
        """
        self._look(trainer)
        step, self._current = self._current, _Step()
        step.number, step.epoch = trainer.global_step, trainer.current_epoch
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        told = trainer.strategy.reduce(step.loss.clone(), reduce_op="sum") if scaled else norm
        step.told = Arrival(cast(Tensor, told))
        self._asked = step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint after such a step, and one of weights that are not finite."""
        self._look(trainer)
        trained = [p.to_local() if isinstance(p, DTensor) else p for p in pl_module.parameters() if p.requires_grad]
        bad = ~torch.stack([weights.isfinite().all() for weights in trained]).all()
        if trainer.strategy.reduce(bad.float(), reduce_op="max"):
            raise RuntimeError(
                f"weights are not finite after step {trainer.global_step}, though the gradients are; {_remedy(trainer)}"
            )

    def _look(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        asked, self._asked = self._asked, None
        if asked is None or asked.told is None or math.isfinite(asked.told.read()):
            return
        told = gather_objects((asked.loss.item(), asked.samples()))
        where = f"step {asked.number} (epoch {asked.epoch}"
        bad = [rank for rank, (loss, _) in enumerate(told) if not math.isfinite(loss)]
        found = [f"the loss is {told[rank][0]} at {where}, rank {rank}); {told[rank][1]}" for rank in bad]
        if not bad:
            loss, rank = max((loss, rank) for rank, (loss, _) in enumerate(told))
            found = [
                f"the gradient is not finite at {where}), though the losses are; the largest, {loss:.4g}, is that of "
                f"rank {rank}; {told[rank][1]}"
            ]
        raise RuntimeError("; ".join([*found, _remedy(trainer)]))

    on_validation_start = on_train_end = _look  # no validation and no export after such a step


class _Step:
    """One optimizer step of this rank."""

    def __init__(self) -> None:
        self.number = self.epoch = 0
        self.keys: list[str] = []
        self.loss: Tensor = torch.zeros(())
        self.told: Arrival | None = None  # a number over all ranks that is finite if the step is

    def samples(self) -> str:
        """The keys of the batch, as text."""
        more = f", ... ({len(self.keys)} in all)" if len(self.keys) > SHOWN_KEYS else ""
        return f"samples of the batch: {', '.join(self.keys[:SHOWN_KEYS]) + more or 'without keys'}"


def _remedy(trainer: Trainer) -> str:
    written = [file.resolve() for file in checkpoint_folder(trainer).glob("*.ckpt")]
    newest = max(written, key=lambda file: file.stat().st_mtime_ns, default=None)
    return (
        f"last good checkpoint: {newest or 'none was written yet'}. Look at the samples, or resume "
        "from the checkpoint with a lower learning rate or gradient_clip_val"
    )
