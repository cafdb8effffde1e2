"""The loader of an epoch, which resumes within the epoch as if the run had never stopped."""

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
    """The interface of a data module that the loader needs."""

    epoch: int
    trainer: Any


class EpochLoader(DataLoader[Batch]):
    """A loader that sets the epoch of its stream, workers included, and resumes within it.

    Lightning stores `state_dict` in its checkpoints. The position is a number of samples of each bucket, so a run can
    resume with other numbers of processes, workers and samples per batch.
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
        self.position: tuple[int, list[int]] | None = None  # epoch, and samples of each bucket so far
        self.resume_from: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator decides the start when the first batch is asked for: a resumed Trainer makes its iterators before
        # it restores its progress.
        epoch, taken = self.position = self._next_start()
        self.stream.start_at(epoch, taken)
        for batch, (bucket, _) in zip(super().__iter__(), self.stream.steps(epoch, [*taken]), strict=False):
            taken[bucket] += self.stream.plan.together
            yield batch

    def _next_start(self) -> tuple[int, list[int]]:
        """Epoch of the next pass, and the samples of it that were already seen.

        Under a Trainer the passes are counted here: Lightning's own count is too high after `max_steps` ended a run
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
        """Position of the current pass: `samples` of each shape, or one number without shapes."""
        names = [bucket.name for bucket in self.stream.data.buckets]
        epoch, taken = self.position or (0, [0] * len(names))
        samples = taken[0] if names == [""] else dict(zip(names, taken, strict=True))
        return {"epoch": epoch, "samples": samples, "together": self.stream.plan.together}

    def _taken(self, state: Mapping[str, Any]) -> list[int]:
        """Samples of each bucket before a position."""
        names = [bucket.name for bucket in self.stream.data.buckets]
        samples = state["samples"] if isinstance(state["samples"], dict) else {"": state["samples"]}
        if samples.keys() != {*names}:
            was, now = (", ".join(filter(None, each)) or "null" for each in (samples, names))
            raise ValueError(
                f"the checkpoint is within an epoch with data.shapes={was}, and {now} cannot take the rest of it; "
                "finish the epoch with the former, or start again from its weights (model.init_from)"
            )
        return [samples[name] for name in names]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next pass at a position."""
        self.resume_from = dict(state)
        trainer = self.module.trainer
        if trainer is None or not self.stream.plan.train or state["together"] == self.stream.plan.together:
            return
        # Lightning counts batches, which have another size now.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.ready:
            shift = len(self.stream) - self.stream.batches_left(self._taken(state)) - progress.ready
            for count in ("ready", "started", "processed", "completed"):
                setattr(progress, count, getattr(progress, count) + shift)


def _outlive_warnings(worker: int) -> None:
    """Keep a worker alive when a signal warns all processes that their machine is about to be taken away.

    The training then still needs batches for the rest of a step. A SIGTERM from the training itself, which it sends to
    its workers at its end, still ends the worker; so does the training's sudden death. Processes that the worker
    starts, such as those of `pipe:`, also survive the warning. Where the sender of a signal is unknown (macOS), SIGTERM
    always ends the worker.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "darwin":

        def end_with_the_training() -> None:
            while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # also in later threads
        threading.Thread(target=end_with_the_training, daemon=True).start()
