"""The loader of an epoch: it tells its stream where to start, and a run goes on within an epoch as if never stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader

from flextok_pl.contracts import Batch
from flextok_pl.data.stream import EpochStream


class HasEpochs(Protocol):
    """What the loader asks of its data module."""

    epoch: int
    trainer: Any


class EpochLoader(DataLoader[Batch]):
    """A loader that tells its stream, workers included, which epoch begins, and resumes within one.

    Lightning stores `state_dict` in its checkpoints and hands it back. The position is a number of samples, so that a
    run may go on with other numbers of processes, workers and samples per batch.
    """

    def __init__(self, module: HasEpochs, stream: EpochStream, num_workers: int, pin_memory: bool) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_outlive_warnings,
        )
        self.module, self.stream = module, stream
        self.position: dict[str, int] | None = None
        self.resume_from: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so that the start is decided when the first batch is asked for: a resumed Trainer makes its
        # iterators before it has restored its progress.
        epoch, samples = self._next_start()
        self.stream.start_at(epoch, samples)
        self.position = {"epoch": epoch, "samples": samples}
        for batch in super().__iter__():
            self.position["samples"] += self.stream.plan.together
            yield batch

    def _next_start(self) -> tuple[int, int]:
        """Epoch at which the next pass starts, and how many of its samples have been seen.

        Under a Trainer the passes are counted here: Lightning's own count runs ahead when `max_steps` ended a run
        within an epoch.
        """
        state, self.resume_from = self.resume_from, None
        trainer = self.module.trainer
        if trainer is None or not self.stream.plan.train:
            return self.module.epoch, 0
        if state is None:
            begun = trainer.fit_loop.epoch_progress.current.processed
            return begun if self.position is None else self.position["epoch"] + 1, 0
        within_epoch = trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
        if not within_epoch or not self.stream.batches_left(state["samples"]):
            return state["epoch"] + 1, 0
        return state["epoch"], state["samples"]

    def state_dict(self) -> dict[str, int]:
        """Where the current pass is."""
        return {**(self.position or {"epoch": 0, "samples": 0}), "together": self.stream.plan.together}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on from a position."""
        self.resume_from = dict(state)
        trainer = self.module.trainer
        if trainer is None or not self.stream.plan.train or state["together"] == self.stream.plan.together:
            return
        # Lightning counts batches, and these are of another size now.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.ready:
            shift = len(self.stream) - self.stream.batches_left(state["samples"]) - progress.ready
            for count in ("ready", "started", "processed", "completed"):
                setattr(progress, count, getattr(progress, count) + shift)


def _outlive_warnings(worker: int) -> None:
    """Let a worker go on where a signal tells all processes that their machine is about to be taken away.

    The training then wants its batches for the rest of a step. A SIGTERM of the training itself, which sends one to
    each worker that is left when it ends, still ends the worker; so does the training's sudden death. Processes that
    the worker starts, such as those of `pipe:`, outlive the warning, too. Where no one can tell who sent a signal
    (macOS), SIGTERM ends the worker whoever sent it.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "darwin":

        def end_with_the_training() -> None:
            while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in the threads still to come, too
        threading.Thread(target=end_with_the_training, daemon=True).start()
