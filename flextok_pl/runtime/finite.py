"""A training whose loss or weights are no longer finite stops, on all ranks at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from flextok_pl.distributed import gather_objects
from flextok_pl.runtime.lightning_internals import checkpoint_folder

SHOWN_KEYS = 8


class StopIfNotFinite(Callback):
    """Stop all ranks together where the loss of one is NaN or infinite.

    A rank that stopped alone would leave the others waiting in their next collective. So the ranks ask each other at
    every optimizer step, and look at the answer at the next one: the host waits for no device meanwhile. No checkpoint,
    validation or export comes between, and no checkpoint holds weights that an overflowing gradient made not finite.
    """

    def __init__(self) -> None:
        self._current = _Step()
        self._asked: _Step | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._current, self._asked = _Step(), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what is trained on."""
        self._current.keys += batch.get("key") or [] if isinstance(batch, Mapping) else []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss, which adds up over an accumulation of gradients."""
        self._current.loss = self._current.loss + loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Ask about this step, and stop if the last was not finite: the error names rank, samples and checkpoint."""
        self._look(trainer)
        self._asked, self._current = self._current, _Step()
        self._asked.ask(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let no checkpoint be written after such a step, nor one of weights that are not finite."""
        self._look(trainer)
        trained = [p.to_local() if isinstance(p, DTensor) else p for p in pl_module.parameters() if p.requires_grad]
        bad = ~torch.stack([weights.isfinite().all() for weights in trained]).all()
        if trainer.strategy.reduce(bad.float(), reduce_op="max"):
            raise RuntimeError(
                f"weights are not finite after step {trainer.global_step}, though the loss is: a gradient overflowed; "
                + _remedy(trainer)
            )

    def _look(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        asked, self._asked = self._asked, None
        if asked is None or not asked.is_bad():
            return
        told = gather_objects(asked.complaint(trainer.global_rank))
        raise RuntimeError("; ".join(text for text in told if text is not None) + "; " + _remedy(trainer))

    on_validation_start = on_train_end = _look  # no validation and no export after such a step


class _Step:
    """One optimizer step of this rank."""

    def __init__(self) -> None:
        self.number = self.epoch = 0
        self.keys: list[str] = []
        self.loss: Tensor = torch.zeros(())
        self._bad: Tensor | None = None
        self._answered: torch.cuda.Event | None = None

    def ask(self, trainer: Trainer) -> None:
        """Let the ranks tell each other, and the device tell the host, when they get there."""
        self.number, self.epoch = trainer.global_step, trainer.current_epoch
        self._bad = bad = cast(Tensor, trainer.strategy.reduce((~self.loss.isfinite()).float(), reduce_op="max"))
        if bad.is_cuda:
            self._bad = torch.empty((), pin_memory=True).copy_(bad, non_blocking=True)
            self._answered = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._answered.record()

    def is_bad(self) -> bool:
        """The answer, the same on all ranks."""
        if self._answered is not None:
            self._answered.synchronize()
        return bool(self._bad)

    def complaint(self, rank: int) -> str | None:
        """What is wrong on this rank, or None."""
        if self.loss.isfinite():
            return None
        more = f", ... ({len(self.keys)} in all)" if len(self.keys) > SHOWN_KEYS else ""
        samples = ", ".join(self.keys[:SHOWN_KEYS]) + more or "without keys"
        where = f"step {self.number} (epoch {self.epoch}, rank {rank})"
        return f"the loss is {self.loss.item()} at {where}; samples of the batch: {samples}"


def _remedy(trainer: Trainer) -> str:
    written = [file.resolve() for file in checkpoint_folder(trainer).glob("*.ckpt")]
    newest = max(written, key=lambda file: file.stat().st_mtime_ns, default=None)
    return (
        f"last good checkpoint: {newest or 'none was written yet'}. Look at the samples, or resume "
        "from the checkpoint with a lower learning rate or gradient_clip_val"
    )
