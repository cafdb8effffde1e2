"""After an error, writes its traceback to the run's folder and ends all processes."""

from __future__ import annotations

import atexit
import subprocess
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from flextok_pl.contracts import run_folder
from flextok_pl.errors import is_for_the_user


class Failure(Callback):
    """After an error, end the processes that this one started, and write `error_rank<n>.txt` to the run's folder.

    Errors that the user can fix leave no file, as their message is enough. Lightning ends all processes if one that was
    started fails. It does not if the first one fails, which started them: the others would wait in their next
    collective until its timeout. torchrun, and srun with --kill-on-bad-exit, end them themselves.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder while all ranks do: this is a broadcast, which would wait for ranks that have failed."""
        self._folder = run_folder(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the file, and end the other processes."""
        if self._folder is not None and isinstance(exception, Exception) and not is_for_the_user(exception):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"error_rank{trainer.global_rank}.txt"
            file.write_text("".join(traceback.format_exception(exception)), encoding="utf-8")
        started = getattr(trainer.strategy.launcher, "procs", ())
        atexit.register(end, [each for each in started if isinstance(each, subprocess.Popen)])  # after the traceback


def end(processes: Sequence[subprocess.Popen[bytes]], patience: float = 3.0) -> None:
    """Give processes some seconds to end, as those with the same error do, and kill the others."""
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
