"""What an error leaves behind: its traceback in the run's folder, and no process."""

from __future__ import annotations

import atexit
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from flextok_pl.contracts import run_folder


class Failure(Callback):
    """After an error, write `error_rank<n>.txt` to the run's folder, and end the processes that this one started.

    Lightning ends all where one of those fails, but not where the first does, which started them: they would wait in
    their next collective until its timeout. Whoever starts all processes (torchrun, srun with --kill-on-bad-exit) does
    it himself.

    Args:
        is_worth_a_file: whether a place in the program says more of an error than its text.
    """

    def __init__(self, is_worth_a_file: Callable[[BaseException], bool]) -> None:
        self.is_worth_a_file = is_worth_a_file
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder while all ranks do: it is a broadcast, which waits for those that have failed."""
        self._folder = run_folder(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write, and see to the end."""
        if self._folder is not None and isinstance(exception, Exception) and self.is_worth_a_file(exception):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"error_rank{trainer.global_rank}.txt"
            file.write_text("".join(traceback.format_exception(exception)), encoding="utf-8")
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            atexit.register(end, launcher.procs)  # once the error has been shown


def end(processes: Sequence[subprocess.Popen[bytes]], patience: float = 3.0) -> None:
    """Give processes some seconds to end by themselves, as those that met the same error do, and kill the others."""
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
