"""Stops a training cleanly when the machine is about to be taken away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flextok_pl.runtime.lightning_internals import checkpoint_folder, step_ends
from flextok_pl.transfer import Arrival, send


class Preempted(SystemExit):
    """Raised after a signal, once the run has saved itself. Uncaught it ends the process with 128 + the signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


class Preemption(Callback):
    """After a signal, save a checkpoint at the next optimizer step, and stop; under Slurm queue the job again.

    `--ckpt_path last` then resumes as if nothing had happened. It is enough if one process gets the signal; a second
    signal changes nothing. A validation stops after its current batch, and runs again later. Only the work before its
    first batch and after its last one is not interrupted.

    Lightning's own handlers are not used: under Slurm they write a checkpoint into the working folder, whichever run it
    belongs to, and elsewhere they stop without one.

    Args:
        signals: names of the signals that announce it; empty leaves every signal its usual effect.
        check_every_n_steps: optimizer steps between the questions of the processes to each other, which are answered
            one step later; a single process checks at every step.
        requeue: in a Slurm job, run `scontrol requeue` for it, unless it was cancelled.
    """

    def __init__(
        self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), check_every_n_steps: int = 10, requeue: bool = True
    ) -> None:
        known = {each.name for each in signal.Signals}
        for name in signals:
            if name not in known or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(f"signals: {name!r} cannot be handled; give names such as SIGTERM and SIGUSR1")
        if check_every_n_steps < 1:
            raise ValueError(f"check_every_n_steps={check_every_n_steps} must be at least 1")
        self.signals = [signal.Signals[name] for name in signals]
        self.check_every_n_steps, self.requeue = check_every_n_steps, requeue
        self._received = 0
        self._asked: Arrival | None = None
        self._shared_batches, self._can_leave = 0.0, False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        self._received, self._asked = 0, None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Check for a signal."""
        if not step_ends(pl_module):  # a checkpoint would lose the gradients
            return
        asked, self._asked = self._asked, None
        if trainer.world_size == 1 or asked is not None:
            self._stop(trainer, self._received if asked is None else int(asked.read()))
        if trainer.world_size > 1 and trainer.global_step % self.check_every_n_steps == 0 and self.signals:
            self._asked = Arrival(self._ask(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find how many batches all processes have: some may have one more, in which the others no longer answer."""
        batches = torch.tensor(float(sum(trainer.num_val_batches)), device=trainer.strategy.root_device)
        self._shared_batches = float(trainer.strategy.reduce(batches, reduce_op="min"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Allow a signal to stop the validation of a training."""
        self._can_leave = trainer.state.fn == TrainerFn.FITTING and batch_idx < self._shared_batches

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Check for a signal, as after an optimizer step."""
        if self._can_leave:
            self._stop_if_asked(trainer)
        self._can_leave = False

    def look(self, trainer: Trainer) -> None:
        """Check within the work of a validation batch; other processes follow by the end of theirs."""
        if self._can_leave and self._received:
            self._stop_if_asked(trainer)

    def _ask(self, trainer: Trainer) -> Tensor:
        """The number of a signal that any process got, or 0; all must call this."""
        received = send(torch.tensor(self._received), trainer.strategy.root_device)
        return cast(Tensor, trainer.strategy.reduce(received, reduce_op="max"))

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self.signals:
            self._stop(trainer, self._received if trainer.world_size == 1 else int(self._ask(trainer)))

    def _stop(self, trainer: Trainer, number: int) -> None:
        """Save and stop, if the number is a signal's."""
        if not number:
            return
        path = checkpoint_folder(trainer) / "last.ckpt"
        trainer.save_checkpoint(path)
        trainer.strategy.checkpoint_io.teardown()  # waits for checkpoints that are still being written
        within = ", within a validation that will run again," if trainer.validating else ","
        stopped = Preempted(
            f"{signal.Signals(number).name}: stopped at step {trainer.global_step}{within} with {path} to resume from "
            "(--ckpt_path last)",
            number,
        )
        if trainer.is_global_zero:
            print(stopped, file=sys.stderr, flush=True)
            if self.requeue:
                _requeue()
        trainer.strategy.barrier()
        raise stopped

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    on_exception = teardown


def stop_if_preempted(trainer: Trainer) -> None:
    """Stop the work of a long validation batch, in a training that has been asked to stop."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Preemption):
            callback.look(trainer)


def _requeue() -> None:
    """Put this Slurm job in the queue again, unless it was cancelled."""
    job = os.environ.get("SLURM_JOB_ID")
    if os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return
    try:
        if "JobState=CANCELLED" in _scontrol("show", "job", "--oneliner", job):  # by scancel: it must not run again
            return
        print(f"putting job {job} in the queue again", flush=True)  # now, as Slurm then ends this process
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        problem = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"scontrol requeue {job} failed: {problem.strip()}; submit the job again", stacklevel=2)


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
