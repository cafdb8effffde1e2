"""A sweep of real trainings, here and under a real Slurm: whatever ends when, every trial is accounted for, once.

Five trials, two at a time. One learning rate is so large that the loss becomes NaN, which fails; one is so small that
it is pruned. The process that runs the sweep is interrupted here and killed under Slurm, and started again, and one
training preempted. tests/unit/test_sweeps.py tries each way to end under either launcher with quick commands.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from flextok_pl.cli import main

ROOT = Path(__file__).parents[2]
GOOD, SLOW, BROKEN = [1e-3, 2e-3, 3e-3], 1e-7, 1e20
RATES = [*GOOD[:2], BROKEN, GOOD[2], SLOW]


class Running:
    """A sweep's folder, and the process that runs it."""

    def __init__(self, folder: Path, shards: Path, launcher: str, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        sweep = {
            "experiment": str(ROOT / "experiments" / "tokenizer" / "tiny.yaml"),
            "overrides": {
                "data.train": str(shards / "train"),
                "data.val": str(shards / "val"),
                "data.batch_size": 4,
                "rfid": None,
                "codebook": None,
                "throughput": None,  # which would count operations in each of the processes
                "trainer.accelerator": "cpu",
                "trainer.max_steps": 120,
                "trainer.limit_val_batches": 1,
                "trainer.check_val_every_n_epoch": None,
                "trainer.val_check_interval": 30,
                "trainer.enable_progress_bar": False,
                "checkpoint.every_n_train_steps": 30,
            },
            "metric": "val/loss",
            "space": {"model.lr": RATES},
            "search": "grid",
            "pruner": {
                "class_path": "optuna.pruners.ThresholdPruner",
                "init_args": {"upper": 1.5, "n_warmup_steps": 40},
            },
            "workers": 2,
            "launcher": launcher,
        }
        if launcher == "slurm":
            sweep["slurm"] = {"timeout_min": 10, "cpus_per_task": 1, "slurm_signal_delay_s": 30}
        self.file = folder / "rates.yaml"
        self.file.write_text(yaml.safe_dump(sweep))
        self.root = folder / "runs" / "sweeps" / "rates"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "driver.txt").open("ab") as output:
            command = [sys.executable, "-m", "flextok_pl", "sweep", str(self.file)]
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        return self.process

    def said(self) -> str:
        return (self.folder / "driver.txt").read_text()

    def trial(self, number: int) -> Path:
        return next(iter(self.root.glob(f"{number:04d}_*")), self.root / "none")

    def log(self, number: int) -> str:
        file = self.trial(number) / "log.txt"
        return file.read_text() if file.exists() else ""

    def content(self, number: int, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.trial(number) / f"{name}.json").read_text())
        return found

    def until(self, condition: Callable[[], object], seconds: int = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and (self.process is None or not self.process.poll()), self.said()
            time.sleep(0.1)

    def measured(self, number: int) -> bool:
        return (self.trial(number) / "version_0" / "metrics.jsonl").exists()


@pytest.fixture(params=["local", "slurm"])
def sweep(request: pytest.FixtureRequest, tmp_path: Path, image_shards: Path) -> Iterator[Running]:
    environment = dict(os.environ)
    if request.param == "slurm":
        environment = request.getfixturevalue("cluster")
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    running = Running(tmp_path, image_shards, request.param, environment)
    yield running
    if running.process is not None and running.process.poll() is None:
        running.process.kill()


@pytest.mark.long
def test_every_trial_is_accounted_for(
    sweep: Running,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = request.node.callspec.params["sweep"] == "local"
    driver = sweep.start()
    sweep.until(lambda: sweep.measured(0) and sweep.measured(1))
    if local:
        driver.terminate()  # or Ctrl-C, which is ignored below a shell's background job
        assert driver.wait(timeout=120) == 1
        assert "the trials under way have saved themselves; the same command goes on" in sweep.said()
    else:
        driver.kill()
        driver.wait()

    driver = sweep.start()
    sweep.until(lambda: sweep.measured(3))
    assert not (sweep.trial(3) / "result.json").exists(), "preempted while it trains"
    if local:
        os.kill(sweep.content(3, "job")["pid"], signal.SIGTERM)
    else:  # as Slurm does before a time limit; it would let a requeued job wait for two minutes
        job = sweep.content(3, "job")["job"]
        subprocess.run(["scancel", "--signal=USR2", job], env=sweep.environment, check=True)
        asked = ["squeue", "--noheader", "--format=%T", "--jobs", job]
        sweep.until(lambda: "PENDING" in subprocess.check_output(asked, env=sweep.environment, text=True))
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=sweep.environment, check=True)
    assert driver.wait(timeout=600) == 0, sweep.said()

    storage = JournalStorage(JournalFileBackend(str(sweep.root / "journal.log")))
    trials = optuna.load_study(study_name="rates", storage=storage).trials
    assert [trial.params["model.lr"] for trial in trials] == RATES
    states = {trial.params["model.lr"]: trial.state.name for trial in trials}
    assert states == {**dict.fromkeys(GOOD, "COMPLETE"), SLOW: "PRUNED", BROKEN: "FAIL"}
    for trial in trials:
        log = sweep.log(trial.number)
        ends = log.count("tokenizer exported")
        if trial.state.name == "COMPLETE":
            assert ends == 1, f"trial {trial.number} is trained to its end once\n{log}"
            assert trial.value == sweep.content(trial.number, "result")["value"] < 1.5
        else:
            assert ends == 0, log
    (failed,) = [trial for trial in trials if trial.state.name == "FAIL"]
    assert "the loss is nan" in failed.user_attrs["reason"] or "the loss is inf" in failed.user_attrs["reason"]
    assert len(sweep.content(failed.number, "state")["failures"]) == 2, "it was run again once"
    assert "SIGTERM: stopped at step" in sweep.log(3) and "going on with" in sweep.log(3)

    again = sweep.folder / "again"
    subprocess.run(
        ["bash", str(sweep.trial(3) / "command.sh"), str(again)], env=sweep.environment, check=True, capture_output=True
    )
    lines = next(again.rglob("metrics.jsonl")).read_text().splitlines()
    assert json.loads(lines[-1])["metrics"]["val/loss"] == trials[3].value, "as if it had not been preempted"

    monkeypatch.chdir(sweep.folder)
    monkeypatch.setenv("COLUMNS", "200")
    main(["sweep", "status", str(sweep.file)])
    table = capsys.readouterr().out
    assert table.count("complete") == len(GOOD) and table.count("pruned") == 1 and "the loss is" in table
    assert (sweep.root / "results.csv").read_text().count("\n") == 1 + len(RATES)
