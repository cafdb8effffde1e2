"""The loader of an epoch: it tells its stream where to start, and a run goes on within an epoch as if never stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
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

    Lightning stores `state_dict` in its checkpoints and hands it back. The position is a number of samples of each
    bucket, so that a run may go on with other numbers of processes, workers and samples per batch.
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
        self.position: tuple[int, list[int]] | None = None  # epoch, and samples of each bucket that have come
        self.resume_from: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so that the start is decided when the first batch is asked for: a resumed Trainer makes its
        # iterators before it has restored its progress.
        epoch, taken = self.position = self._next_start()
        self.stream.start_at(epoch, taken)
        for batch, (bucket, _) in zip(super().__iter__(), self.stream.steps(epoch, [*taken]), strict=False):
            taken[bucket] += self.stream.plan.together
            yield batch

    def _next_start(self) -> tuple[int, list[int]]:
        """Epoch at which the next pass starts, and how many of its samples have been seen.

        Under a Trainer the passes are counted here: Lightning's own count runs ahead when `max_steps` ended a run
        within an epoch.
        """
        state, self.resume_from = self.resume_from, None
        trainer, none = self.module.trainer, [0] * len(self.stream.data.buckets)
        if trainer is None or not self.stream.plan.train:
            return self.module.epoch, none
        if state is None:
            begun = trainer.fit_loop.epoch_progress.current.processed
            return begun if self.position is None else self.position[0] + 1, none
        within_epoch = trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
        if not within_epoch or not self.stream.batches_left(self._taken(state)):
            return state["epoch"] + 1, none
        return state["epoch"], self._taken(state)

    def state_dict(self) -> dict[str, Any]:
        """Where the current pass is; `samples` of each shape, or one number without shapes."""
        names = [bucket.name for bucket in self.stream.data.buckets]
        epoch, taken = self.position or (0, [0] * len(names))
        samples = taken[0] if names == [""] else dict(zip(names, taken, strict=True))
        return {"epoch": epoch, "samples": samples, "together": self.stream.plan.together}

    def _taken(self, state: Mapping[str, Any]) -> list[int]:
        """Samples of each bucket that have come at a position."""
        names = [bucket.name for bucket in self.stream.data.buckets]
        samples = state["samples"] if isinstance(state["samples"], dict) else {"": state["samples"]}
        if samples.keys() != {*names}:
            was, now = (", ".join(filter(None, each)) or "null" for each in (samples, names))
            raise ValueError(
                f"the checkpoint is within an epoch with data.shapes={was}, of which {now} cannot take what is left; "
                "finish the epoch with the former, or start anew from its weights (model.init_from)"
            )
        return [samples[name] for name in names]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on from a position."""
        self.resume_from = dict(state)
        trainer = self.module.trainer
        if trainer is None or not self.stream.plan.train or state["together"] == self.stream.plan.together:
            return
        # Lightning counts batches, and these are of another size now.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.ready:
            shift = len(self.stream) - self.stream.batches_left(self._taken(state)) - progress.ready
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
