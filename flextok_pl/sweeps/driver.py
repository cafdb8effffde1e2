"""Gets trials from Optuna, has a launcher run them, and reports to Optuna how they end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from flextok_pl.files import write_file
from flextok_pl.sweeps.launch import Launcher, LocalLauncher, SlurmLauncher, slurm_executor
from flextok_pl.sweeps.runner import TrialFolder, exclusive
from flextok_pl.sweeps.sweep import Sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the driver reports trials itself

MOST_LAUNCHES = 10
"""Starts of a trial without progress after which it counts as failed."""


def find_study(sweep: Sweep) -> optuna.Study | None:
    """The trials of a sweep, which must have started with the same options; None before its start."""
    if not sweep.root.exists() or (sweep.storage is None and not _journal(sweep).exists()):
        return None
    try:
        study = optuna.load_study(study_name=sweep.name, storage=_storage(sweep))
    except KeyError:
        return None
    before = study.user_attrs.get("fixed", {})
    if not before:  # killed between the two lines of `start_study`
        study.set_user_attr("fixed", sweep.fixed())
    for option, value in sweep.fixed().items():
        if json.dumps(before.get(option, value), sort_keys=True) != json.dumps(value, sort_keys=True):  # 1 is not true
            raise ValueError(
                f"{option}={json.dumps(value)}, but {sweep.root} was started with {json.dumps(before[option])}; "
                "give the new sweep another name by --name"
            )
    return study


def start_study(sweep: Sweep) -> optuna.Study:
    """Start a sweep, with no trials yet."""
    sweep.root.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=_storage(sweep), study_name=sweep.name, direction=sweep.direction)
    study.set_user_attr("fixed", sweep.fixed())
    return study


def _journal(sweep: Sweep) -> Path:
    return sweep.root / "journal.log"


def _storage(sweep: Sweep) -> BaseStorage | str:
    return sweep.storage or JournalStorage(JournalFileBackend(str(_journal(sweep))))


def _sampler(sweep: Sweep, existing: int) -> BaseSampler:
    """Make the sampler of points; after a restart it does not draw the earlier ones again."""
    if isinstance(sweep.search, BaseSampler):
        return sweep.search
    seed = sweep.seed + existing
    if sweep.search == "tpe":
        startup = min(10, max(1, sweep.num_trials // 4))  # Optuna's own 10 would leave short searches to chance
        some = any(parameter.when for parameter in sweep.points.parameters.values())
        return TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True, group=some, multivariate=some)
    return RandomSampler(seed=seed)


class Driver:
    """Runs a sweep to its end.

    It is the only process that writes to the study. You may kill it and start it again at any time: the trials
    themselves are in their folders. `say` prints a line. `check` is called before the sweep starts; if it raises an
    error, nothing is left behind.
    """

    def __init__(
        self, sweep: Sweep, say: Callable[[str], None], check: Callable[[Sweep], None] = lambda sweep: None
    ) -> None:
        self.sweep, self.say = sweep, say
        # The other one knows trials from a time when the sweep had that launcher.
        self.launcher: Launcher
        self._other: Launcher
        if sweep.launcher == "local":
            self.launcher, self._other = LocalLauncher(sweep.workers, sweep.gpus_per_trial), SlurmLauncher()
        else:
            executor = slurm_executor(sweep.root / "slurm", sweep.slurm, sweep.workers)
            self.launcher, self._other = SlurmLauncher(executor), LocalLauncher(sweep.workers)
        found = find_study(sweep)
        if found is None:
            check(sweep)
        self.study = found or start_study(sweep)
        self.study.sampler = _sampler(sweep, len(self.study.trials))
        self.study.pruner = sweep.pruner or optuna.pruners.NopPruner()
        self._under_way: dict[int, tuple[Trial, TrialFolder]] = {}

    def run(self) -> None:
        """Start and watch trials until all have ended; no other process may run this sweep."""
        with _only_one(self.sweep.root / "driver.lock"):
            try:
                if self.sweep.search == "grid":
                    self._enqueue()
                for left in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):  # by a killed process
                    self._take(Trial(self.study, left._trial_id), "goes on")
                while self._fill() or self._under_way:
                    time.sleep(self.launcher.poll_seconds)
                    self._watch()
            except KeyboardInterrupt:
                fates = "; ".join(launcher.leave(folders) for launcher, folders in self._by_launcher())
                raise ValueError(f"interrupted: {fates}; run the same command to go on") from None

    def _enqueue(self) -> None:
        """Give the study the points of the grid that it lacks; Optuna's own test takes near numbers for equal."""
        trials = self.study.get_trials(deepcopy=False)
        points = [self.sweep.points.exact(trial.system_attrs.get("fixed_params", trial.params)) for trial in trials]
        there = {frozenset(point.items()) for point in points}
        for point in self.sweep.points.grid()[: self.sweep.num_trials]:
            if frozenset(point.items()) not in there:
                self.study.enqueue_trial(point)

    def _by_launcher(self) -> list[tuple[Launcher, list[TrialFolder]]]:
        """The running trials by launcher; trials that nobody has started yet are the current launcher's."""
        folders = [folder for _, folder in self._under_way.values()]
        others = [folder for folder in folders if self._other.mark in (folder.read("job") or {})]
        own = [folder for folder in folders if folder not in others]
        return [(self.launcher, own), *([(self._other, others)] if others else [])]

    def _fill(self) -> bool:
        """Start as many trials as there is room for; return whether some are left."""
        counted = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
        left = self.sweep.num_trials - len(counted)
        room = self.sweep.workers - len(self._under_way)
        new = [self._take(self.study.ask(), "starts") for _ in range(min(left, room))]
        if new:
            self._launch(new)
        return left > 0

    def _take(self, trial: Trial, word: str) -> TrialFolder:
        """Mark a trial as running, and write its folder if it does not exist."""
        point = self.sweep.points.suggest(trial)
        folder = self.sweep.trial_folder(trial.number, point)
        if folder.read("trial") is None:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_file(folder.path / "command.sh", self.sweep.script(point, folder.path.name))
            folder.write("trial", self.sweep.trial_plan(trial.number, point, folder.path.name))
        self._under_way[trial.number] = (trial, folder)
        self.say(f"trial {trial.number} {word}: {folder.path.name}")
        return folder

    def _launch(self, folders: list[TrialFolder]) -> None:
        for folder in folders:
            launch = {"time": datetime.now().isoformat(timespec="seconds"), "step": folder.step()}
            folder.write("launches", {"launches": [*folder.launches(), launch]})
        self.launcher.launch(folders)

    def _watch(self) -> None:
        """Collect what trials have measured and how they ended, and start lost ones again."""
        for number, (trial, folder) in list(self._under_way.items()):
            self._report(trial, folder)
            result = folder.read("result")
            if result is not None:
                self._tell(trial, result)
                del self._under_way[number]
        lost = []
        for folder in [gone for launcher, folders in self._by_launcher() for gone in launcher.gone(folders)]:
            if folder.read("result") is not None:  # it has ended since
                continue
            step = folder.step()
            vain = sum(launch["step"] >= step for launch in folder.launches())
            if vain >= MOST_LAUNCHES:
                reason = f"its process was lost {vain} times without getting beyond step {step}; see {folder.log}"
                folder.write("result", {"state": "failed", "reason": reason})
            else:
                self.say(f"{folder.path.name} is no longer running; starting it again from its last checkpoint")
                lost.append(folder)
        if lost:
            self._launch(lost)

    def _report(self, trial: Trial, folder: TrialFolder) -> None:
        """Report to Optuna what the first seed has measured so far, and stop the trial if Optuna prunes it."""
        if self.sweep.pruner is None or folder.stop_file.exists():
            return
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for entry in folder.measured(f"version_{self.sweep.seeds[0]}"):
            value = entry["metrics"].get(self.sweep.metric)
            if value is None or entry["stage"] != "fit" or entry["step"] in known:
                continue
            trial.report(value, entry["step"])
            if trial.should_prune():
                self.say(f"trial {trial.number} is stopped: {self.sweep.metric}={value:.6g} at step {entry['step']}")
                folder.stop_file.touch()
                return

    def _tell(self, trial: Trial, result: dict[str, Any]) -> None:
        """Report how a trial has ended."""
        if result["state"] == "complete":
            for run, metrics in result["metrics"].items():
                trial.set_user_attr(run, metrics)
            self.study.tell(trial, result["value"])
            best = self.study.best_trial
            self.say(
                f"trial {trial.number}: {self.sweep.metric}={result['value']:.6g} after {result['seconds']:.0f} s; "
                f"best so far trial {best.number}, {best.value:.6g}"
            )
        elif result["state"] == "pruned":
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_user_attr("reason", result["reason"])
            self.study.tell(trial, state=TrialState.FAIL)
            self.say(f"trial {trial.number} failed: {result['reason']}")


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Keep other processes from running the same sweep."""
    deadline = time.monotonic() + 1  # a process that was killed while it started another holds it a little longer
    while time.monotonic() < deadline:
        with exclusive(lock) as handle:
            if handle is not None:
                yield
                return
        time.sleep(0.05)
    raise ValueError(f"another process runs this sweep: it holds {lock}; wait for it, or end it")
