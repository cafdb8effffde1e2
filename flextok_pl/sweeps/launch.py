"""Runs trials as processes of this machine, or as jobs of a Slurm cluster."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
import torch

from flextok_pl.sweeps.runner import Runner, TrialFolder


class LocalLauncher:
    """Runs each trial as a process of its own, which continues if the sweep's process ends.

    At most `workers` trials run at a time; they share the processor's cores unless OMP_NUM_THREADS is set.
    """

    mark = "pid"  # key in `job.json` of such a trial
    poll_seconds = 0.5

    def __init__(self, workers: int, gpus_per_trial: int = 0) -> None:
        self.threads = max(1, (os.cpu_count() or 1) // workers)
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        if len(visible) < workers * gpus_per_trial:
            raise ValueError(
                f"workers={workers} x gpus_per_trial={gpus_per_trial} needs more than the {len(visible)} GPUs here"
            )
        groups = [visible[i * gpus_per_trial : (i + 1) * gpus_per_trial] for i in range(workers)]
        self.gpus = [",".join(group) for group in groups if group]
        self._started: dict[Path, subprocess.Popen[bytes]] = {}

    def launch(self, folders: Sequence[TrialFolder]) -> None:
        """Start these trials."""
        for folder in folders:
            environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ}
            job: dict[str, Any] = {}
            if self.gpus:
                job["gpus"] = environment["CUDA_VISIBLE_DEVICES"] = self._free_gpus(folder)
            with (folder.path / "runner.txt").open("ab") as output:
                self._started[folder.path] = process = subprocess.Popen(
                    [sys.executable, "-m", "flextok_pl.sweeps.runner", str(folder.path.absolute())],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # so that Ctrl-C in the terminal reaches only the sweep
                )
            folder.write("job", {**job, "pid": process.pid})

    def _free_gpus(self, folder: TrialFolder) -> str:
        """The GPUs that no other trial has, also of trials that an earlier process of the sweep started."""
        others = [TrialFolder(file.parent) for file in folder.path.parent.glob("*/job.json")]
        running = [other for other in others if other.path != folder.path and self._lives(other)]
        taken = [(other.read("job") or {}).get("gpus") for other in running]
        return next(gpus for gpus in self.gpus if gpus not in taken)

    def _lives(self, folder: TrialFolder) -> bool:
        started = self._started.get(folder.path)
        return (started is not None and started.poll() is None) or folder.running

    def gone(self, folders: Collection[TrialFolder]) -> list[TrialFolder]:
        """The trials among these that no longer run."""
        return [folder for folder in folders if not self._lives(folder)]

    def leave(self, folders: Collection[TrialFolder]) -> str:
        """Let the trials of an interrupted sweep save themselves and stop; return a message."""
        for folder in folders:
            for name in ("job", "command"):  # the runner, or the command that a killed runner left behind
                process = folder.read(name)
                if process is not None and self._lives(folder):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process["pid"], signal.SIGTERM)
                        break
        while len(self.gone(folders)) < len(folders):
            time.sleep(0.2)
        return "the trials under way have saved themselves"


class SlurmLauncher:
    """Runs each trial as a job, and trials that start together as an array; submitit writes and submits the scripts.

    At SIGUSR2, which Slurm sends before the time limit, a job saves a checkpoint and returns to the queue. At SIGTERM
    it saves a checkpoint and ends. Without an executor it only watches jobs of earlier processes.
    """

    mark = "job"
    poll_seconds = 1.0
    controller_seconds = 5.0
    """Least time between queries to the controller, which all users share."""
    grace = 15.0
    """Seconds for which a job may be missing in `squeue` before it counts as gone."""

    def __init__(self, executor: submitit.AutoExecutor | None = None) -> None:
        self._executor = executor
        self._missing: dict[str, float] = {}
        self._asked = -math.inf

    def launch(self, folders: Sequence[TrialFolder]) -> None:
        """Submit these trials."""
        assert self._executor is not None
        jobs = self._executor.submit_array([Runner(folder.path.absolute()) for folder in folders])
        for folder, job in zip(folders, jobs, strict=True):
            folder.write("job", {"job": job.job_id})

    def gone(self, folders: Collection[TrialFolder]) -> list[TrialFolder]:
        """The trials among these that are no longer in any queue."""
        jobs = {folder.path: str((folder.read("job") or {"job": ""})["job"]) for folder in folders}
        if jobs and shutil.which("squeue") is None:
            raise ValueError(
                f"{min(jobs).name} is a Slurm job, but there is no `squeue` here to check it; run this on a machine "
                "that submits jobs"
            )
        if not jobs or time.monotonic() - self._asked < self.controller_seconds:
            return []
        self._asked = time.monotonic()
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        listed = subprocess.run(command, capture_output=True, text=True)
        if listed.returncode:  # the controller is busy or restarts: ask again later
            return []
        now, queued = time.monotonic(), set(listed.stdout.split())
        for job in jobs.values():
            if job in queued:
                self._missing.pop(job, None)
            else:
                self._missing.setdefault(job, now)
        return [f for f in folders if now - self._missing.get(jobs[f.path], now) > self.grace or not jobs[f.path]]

    def leave(self, folders: Collection[TrialFolder]) -> str:
        """Leave jobs as they are; return a message."""
        jobs = " ".join(str((folder.read("job") or {}).get("job")) for folder in folders)
        return f"jobs continue; `scancel {jobs}` ends them" if jobs else "no job is under way"


Launcher = LocalLauncher | SlurmLauncher
"""Starts trials, and checks whether those of its kind still run, whichever process started them."""


def slurm_executor(folder: Path, parameters: Mapping[str, Any], workers: int) -> submitit.AutoExecutor:
    """Make an executor that submits jobs with submitit's `parameters`, at most `workers` of an array at a time.

    All nodes must see the folder, which holds scripts and logs of jobs.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("launcher=slurm: there is no `sbatch` here; start the sweep where jobs are submitted")
    executor = submitit.AutoExecutor(folder, cluster="slurm")
    try:
        executor.update_parameters(slurm_array_parallelism=workers, **parameters)
    except (ValueError, TypeError, NameError, AssertionError) as error:  # submitit raises all of them
        raise ValueError(f"slurm={dict(parameters)}: {error}") from error
    return executor
