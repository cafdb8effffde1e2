"""Lightning's Trainer, except that a training that was killed resumes as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from flextok_pl.runtime.checkpoint_files import AtomicCheckpointIO
from flextok_pl.runtime.failure import Failure
from flextok_pl.runtime.launch import require_processes
from flextok_pl.runtime.lightning_internals import StepCheckpoint, replace_internals, send_gradients_in_place
from flextok_pl.runtime.preemption import Preemption


class Trainer(pl.Trainer):
    """Lightning's Trainer with exact resume from checkpoints; `flextok fit` uses it, too.

        data = ShardDataModule(train="data/train", val="data/val", batch_size=64)
        trainer = flextok_pl.Trainer(max_steps=10_000, default_root_dir="runs/mine", callbacks=[EMA()])
        trainer.fit(module, data, ckpt_path="last")

    Run again after a kill, such a script resumes from the newest whole checkpoint. It ends with the same weights as
    without the kill, bit for bit on a CPU. Beyond Lightning's Trainer:

    - `fit`, `validate`, `test` and `predict` take as `ckpt_path` a file, which must be whole; a folder of checkpoints,
      for its newest whole one; or `last`, for the newest of the run's folder. If there is none yet, a fit starts from
      the beginning.
    - A checkpoint file is complete or does not exist, and none is written within an accumulation of gradients.
    - SIGTERM and SIGUSR1 save a checkpoint and end the process (`Preemption`).
    - An error that is not the user's mistake leaves `error_rank<n>.txt` in the run's folder, and ends all processes
      (`Failure`).
    - A start that would wait for processes that nobody has started is refused.
    - Under `ddp` gradients stay in the buckets that are sent, which saves a copy of them.

    The modules of this package also stop a training whose gradients are not finite, whichever Trainer runs them.

    Args:
        logger: as Lightning's. By default TensorBoard's logs are in `default_root_dir` itself, the folder of one run,
            also when the script runs again. A logger that numbers its runs starts a new one each time, in which `last`
            finds nothing: give it a fixed `version`.
        callbacks: as Lightning's. Without a checkpoint callback, `StepCheckpoint.of_newest()` saves after each epoch;
            without a `Preemption`, one with its defaults is added: `Preemption(signals=[])` switches it off.
        enable_checkpointing: as Lightning's.
        default_root_dir: the run's folder; default the working folder.
        barebones: as Lightning's, without checkpoints or logs.
        **options: all other options of Lightning's Trainer.

    Raises:
        ValueError: a launcher has started more or fewer processes than `devices` and `num_nodes` ask for.
    """

    def __init__(
        self,
        *,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        enable_checkpointing: bool | None = None,
        default_root_dir: str | Path | None = None,
        barebones: bool = False,
        **options: Any,
    ) -> None:
        all_callbacks = [Failure(), *([callbacks] if isinstance(callbacks, Callback) else callbacks or [])]
        has_checkpoint = any(isinstance(each, Checkpoint) for each in all_callbacks)
        if not (has_checkpoint or enable_checkpointing is False or barebones):
            all_callbacks.append(StepCheckpoint.of_newest())
        if not any(isinstance(each, Preemption) for each in all_callbacks):
            all_callbacks.append(Preemption())
        if logger in (None, True) and not barebones:
            logger = TensorBoardLogger(default_root_dir or ".", name="", version="")
        super().__init__(
            logger=logger,
            callbacks=all_callbacks,
            enable_checkpointing=enable_checkpointing,
            default_root_dir=default_root_dir,
            barebones=barebones,
            **options,
        )
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        replace_internals(self)
        send_gradients_in_place(self.strategy)
        require_processes(self.num_nodes, self.num_devices)
