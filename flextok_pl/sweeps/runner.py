"""Runs one trial of a sweep: its commands in order, until it is done, stopped, or has failed too often.

    python -m flextok_pl.sweeps.runner FOLDER

The folder of a trial holds all that is needed to run it: `trial.json` says what to do, `log.txt` has what the commands
print, `state.json` the progress, and `result.json` the end. Run again after an interruption, the trial continues from
the last checkpoint. Nothing heavy is imported here, as each trial pays for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flextok_pl.files import write_file
from flextok_pl.posix import fcntl

METRICS = "metrics.jsonl"
"""File that the callback `MetricsLog` writes in the folder of a run."""

TEST = "test"
"""Folder in that of a run for its tests: `version_0`, and the next number for each that is started again."""

ASKED_TO_STOP = {
    sign * (base + number) for number in (signal.SIGTERM, signal.SIGUSR1) for base, sign in ((128, 1), (0, -1))
}
"""Exit codes of a training that a signal has stopped."""


class TrialError(Exception):
    """A command of a trial has failed; the message says why."""


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[int | None]:
    """Hold a file as long as the yielded handle is open in any process; None if another one holds it."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


@dataclass(frozen=True)
class TrialFolder:
    """The files of a trial, in its folder `path`."""

    path: Path

    def read(self, name: str) -> dict[str, Any] | None:
        """Read one of its JSON files; None if it does not exist."""
        try:
            return json.loads((self.path / f"{name}.json").read_text())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        write_file(self.path / f"{name}.json", json.dumps(content, indent=2) + "\n")

    @property
    def stop_file(self) -> Path:
        """Exists once the sweep wants the runner to stop, as the trial is not worth going on with."""
        return self.path / "stop"

    @property
    def log(self) -> Path:
        """The output of its commands."""
        return self.path / "log.txt"

    @property
    def running(self) -> bool:
        """Whether a runner on this machine, or a command that it left behind, holds the trial."""
        with exclusive(self.path / "lock") as handle:
            return handle is None

    def measured(self, run: str) -> list[dict[str, Any]]:
        """What a run of this trial and its test have logged, in order.

        Steps that were logged again after a resumption come once.
        """
        folder = self.path / run
        return read_metrics(folder / METRICS, *sorted(folder.glob(f"{TEST}/*/{METRICS}")))

    def launches(self) -> list[dict[str, Any]]:
        """Its starts: the `time` of each, and the `step` reached before."""
        return (self.read("launches") or {"launches": []})["launches"]  # type: ignore[no-any-return]

    def step(self) -> int:
        """Steps of all its runs together that have been logged or saved."""
        total = 0
        for run in self.path.glob("version_*"):
            saved = [re.fullmatch(r"step(\d+)\.ckpt", file.name) for file in run.glob("checkpoints/*")]
            logged = [entry["step"] for entry in self.measured(run.name)]
            total += max([0, *logged, *(int(match[1]) for match in saved if match)])
        return total


def read_metrics(*files: Path) -> list[dict[str, Any]]:
    """Read the lines of `MetricsLog`s: `stage`, `step`, `metrics`; for each step the later values count."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (line for file in files if file.exists() for line in file.read_text().splitlines()):
        with contextlib.suppress(json.JSONDecodeError):  # a line that a killed process has not finished
            entry = json.loads(line)
            found.setdefault((entry["stage"], entry["step"]), entry)["metrics"] |= entry["metrics"]
    return sorted(found.values(), key=lambda entry: (entry["stage"] == "test", entry["step"]))


@dataclass
class Runner:
    """Runs the trial of a folder; a callable that submitit can queue again."""

    path: Path
    _child: subprocess.Popen[bytes] | None = None
    _interrupted: bool = False

    def __call__(self) -> None:
        """Run what is left to do."""
        folder = TrialFolder(self.path)
        with exclusive(self.path / "lock") as handle:
            if handle is None:
                print(f"{self.path} is already running")
            elif folder.read("result") is None:
                result = self._attempts(folder, handle)
                if result is not None:
                    folder.write("result", result)

    def checkpoint(self) -> Any:
        """Stop with a checkpoint, and queue the job again; submitit calls this before the job loses its machine."""
        from submitit.helpers import DelayedSubmission

        self.interrupt()
        if self._child is not None:
            self._child.terminate()
            # Not `wait`, whose lock the code below this signal handler may hold.
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Runner(self.path))

    def interrupt(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Let the running command save itself and stop, and end without a result."""
        self._interrupted = True

    def _attempts(self, folder: TrialFolder, handle: int) -> dict[str, Any] | None:
        """Run all commands, again after a failure; None if interrupted."""
        plan = folder.read("trial")
        assert plan is not None, f"{folder.path} is not a trial"
        state = folder.read("state") or {"finished": 0, "failures": [], "seconds": 0.0}
        while True:
            try:
                while state["finished"] < len(plan["commands"]):
                    began = time.monotonic()
                    try:
                        ended = self._command(folder, plan["commands"][state["finished"]], plan["cwd"], handle)
                    finally:
                        state["seconds"] += time.monotonic() - began
                    state["finished"] += ended == "done"
                    folder.write("state", state)
                    if ended == "interrupted":
                        return None
                    if ended == "stopped":
                        return {"state": "pruned", "seconds": state["seconds"]}
                return {"state": "complete", "seconds": state["seconds"], **outcome(folder, plan)}
            except TrialError as error:
                state["failures"].append(str(error))
                folder.write("state", state)
                if len(state["failures"]) > plan["retries"]:
                    return {"state": "failed", "seconds": state["seconds"], "reason": str(error)}

    def _command(self, folder: TrialFolder, command: Sequence[str], cwd: str, handle: int) -> str:
        """Run a command: `done`, `stopped` by the sweep, or `interrupted` by a signal."""
        with folder.log.open("ab") as log:
            start = log.tell()
            # The command holds the lock, too: if this process is killed, nobody starts the trial a second time before
            # the command has ended.
            self._child = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env=_environment(),
                pass_fds=[handle],
                # Slurm sends it to all processes of a job; the job's own one then stops the command by SIGTERM.
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        folder.write("command", {"pid": self._child.pid})
        told = False
        while self._child.poll() is None:
            if not told and (self._interrupted or folder.stop_file.exists()):
                told = True
                self._child.terminate()
            time.sleep(0.2)
        code, self._child = self._child.returncode, None
        if code == 0:
            return "done"
        if folder.stop_file.exists() and not self._interrupted:
            return "stopped"
        if self._interrupted or code in ASKED_TO_STOP:
            return "interrupted"
        raise TrialError(_reason(code, folder.log.read_bytes()[start:].decode(errors="replace")))


def outcome(folder: TrialFolder, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a finished trial: the mean `value` of the sweep's metric, and last `metrics` of each run."""
    last: dict[str, dict[str, float]] = {}
    for run in plan["runs"]:
        last[run] = {}
        for entry in folder.measured(run):
            last[run] |= entry["metrics"]
        value = last[run].get(plan["metric"])
        if value is None:
            raise TrialError(f"metric={plan['metric']} was never logged; there are {', '.join(sorted(last[run]))}")
        if not math.isfinite(value):
            raise TrialError(f"metric={plan['metric']} is {value}")
    values = [metrics[plan["metric"]] for metrics in last.values()]
    return {"value": math.fsum(values) / len(values), "metrics": last}


def _environment() -> dict[str, str]:
    """This process's environment, without variables that make a training act as one of several Slurm tasks."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_", "PMIX_", "SUBMITIT_"))}
    if "SLURM_CPUS_PER_TASK" in os.environ:
        environment.setdefault("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
    return environment


def _reason(code: int, log: str) -> str:
    """The reason for a failed command, in one line."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "killed (SIGKILL), most likely out of memory"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"flextok .*error: |\w*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [f"exit code {code}, and nothing printed"])[-1]


def main() -> None:
    """Run the trial in the given folder."""
    runner = Runner(Path(sys.argv[1]))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, runner.interrupt)
    runner()


if __name__ == "__main__":
    main()
