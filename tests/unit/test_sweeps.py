"""A sweep's trials, with short commands in place of trainings: each is accounted for, whatever ends when."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
import pytest
import yaml
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.sweeps.driver import Driver, _only_one, find_study
from flextok_pl.sweeps.files import load_yaml
from flextok_pl.sweeps.launch import LocalLauncher, SlurmLauncher, slurm_executor
from flextok_pl.sweeps.results import rows, status_table, write_results
from flextok_pl.sweeps.runner import TrialFolder, outcome, read_metrics
from flextok_pl.sweeps.sweep import Sweep

# A training: logs the value of x at each step, saves how far it is, and goes on from there. Some values end it, or its
# runner.
TRAINING = """
import json, os, signal, sys, time
folder, x, steps, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run = f"{folder}/version_{seed}"
os.makedirs(run, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
at = int(open(f"{run}/at").read()) if os.path.exists(f"{run}/at") else 0
print("starts at", at, flush=True)
if x == 77:
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit()
for step in range(at + 1, steps + 1):
    if x < 0 and step == 2:
        print("ValueError: x is negative", flush=True)
        sys.exit(1)
    value = float("nan") if x == 99 else x + 1 / step + seed
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write(json.dumps({"stage": "fit", "epoch": 0, "step": step, "metrics": {"loss": value}}) + "\\n")
    open(f"{run}/at", "w").write(str(step))
    if x == 66:
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit()
    time.sleep(float(os.environ.get("STEP_SECONDS", "0.01")))
print("done", flush=True)
"""


@dataclass
class Quick(Sweep):
    """A sweep of such trainings."""

    steps: int = 3

    def trial_plan(self, number, point, name):
        plan = super().trial_plan(number, point, name)
        x = self.points.options(point)["x"]
        folder = str(self.root / name)
        plan["commands"] = [
            [sys.executable, "-c", TRAINING, folder, str(x), str(self.steps), str(seed)] for seed in self.seeds
        ]
        return plan


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(LocalLauncher, "poll_seconds", 0.05)


@pytest.fixture
def sweep(tmp_path):
    experiment = tmp_path / "unused.yaml"
    experiment.write_text("model: {lr: 0.1}\n")

    def make(**options):
        given = {"experiment": str(experiment), "metric": "loss", "space": {"x": [3.0, 1.0, 2.0]}, "search": "grid"}
        return Quick(**{**given, "folder": str(tmp_path), "name": "quick", **options})

    return make


def run(sweep):
    said = []
    driver = Driver(sweep, said.append)
    driver.run()
    return driver.study, said


@contextmanager
def meanwhile(action):
    """Act in a thread of its own."""
    thread = threading.Thread(target=action)
    thread.start()
    yield
    thread.join()


def log(sweep, trial):
    return (sweep.trial_folder(trial.number, trial.params).path / "log.txt").read_text()


def test_a_grid_is_run_in_order_and_written_down(sweep):
    here = sweep(seeds=[0, 10], workers=2)
    study, said = run(here)
    assert [trial.params["x"] for trial in study.trials] == [3.0, 1.0, 2.0]
    assert [trial.value for trial in study.trials] == pytest.approx([3 + 1 / 3 + 5, 1 + 1 / 3 + 5, 2 + 1 / 3 + 5])
    assert study.best_params == {"x": 1.0} and any("best so far trial 1" in line for line in said)
    found = list(rows(here, study))
    assert [(row["trial"], row["seed"], row["state"]) for row in found] == [
        (number, seed, "complete") for number in range(3) for seed in (0, 10)
    ]
    assert found[3]["loss"] == pytest.approx(11 + 1 / 3) and found[3]["run"].endswith("0001_x=1/version_10")
    write_results(here, study)
    with (here.root / "results.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in found]
    names = ("best_so_far", "parallel_coordinates", "importance", "slices")
    drawn = [Image.open(here.root / f"{name}.png").convert("RGB") for name in names]
    assert len({picture.tobytes() for picture in drawn}) == len(names), "each is another picture"
    assert all(len(picture.getcolors(1 << 20)) > 20 and picture.width > 500 for picture in drawn)
    assert status_table(here, study).row_count == 3
    again, said = run(here)
    assert len(again.trials) == 3 and not said, "nothing is left to do"


def test_trials_may_be_kept_in_a_database(sweep, tmp_path):
    here = sweep(storage=f"sqlite:///{tmp_path}/trials.db")
    study, _ = run(here)
    assert (tmp_path / "trials.db").exists() and not (here.root / "journal.log").exists()
    assert study.best_params == {"x": 1.0} and len(find_study(here).trials) == 3


def test_points_that_are_near_or_equal_in_python_are_each_run(sweep):
    space = {"x": [0.99999, 0.999999, 1, 1.0]}
    here = sweep(space=space, steps=1)
    study, _ = run(here)
    assert [trial.params["x"] for trial in study.trials] == [0.99999, 0.999999, "1", "1.0"]
    assert [row["x"] for row in rows(here, study)] == [0.99999, 0.999999, "1", "1.0"]
    names = [here.trial_folder(trial.number, trial.params).path.name for trial in study.trials]
    assert names == ["0000_x=0.99999", "0001_x=0.999999", "0002_x=1", "0003_x=1.0"]
    assert len(run(sweep(space=space, steps=1))[0].trials) == 4, "and none a second time"
    with pytest.raises(ValueError, match="was started with"):
        run(sweep(space={"x": [0.99999, 0.999999, True, 1.0]}, steps=1))


def test_more_trials_may_be_asked_for_later_and_nothing_else_changed(sweep):
    space = {"x": {"low": 0.0, "high": 9.0}}
    first = run(sweep(space=space, search="random", trials=2))[0].trials
    more, _ = run(sweep(space=space, search="random", trials=5))
    assert len(more.trials) == 5 and len({trial.params["x"] for trial in more.trials}) == 5, "no point is drawn again"
    assert [trial.params for trial in more.trials[:2]] == [trial.params for trial in first]
    with pytest.raises(ValueError, match=r"metric=\"other\", but .* with \"loss\"; give the new sweep another name"):
        run(sweep(space=space, search="random", trials=5, metric="other"))


def test_an_experiment_may_not_say_something_else_later(sweep, tmp_path):
    run(sweep(trials=1))
    (tmp_path / "unused.yaml").write_text("# What is a comment?\nmodel:\n  lr: 0.1\n")
    assert len(run(sweep(trials=2))[0].trials) == 2
    (tmp_path / "unused.yaml").write_text("model: {lr: 0.2}\n")
    with pytest.raises(ValueError, match="content of experiment=.*, but .* with .*; give the new sweep another name"):
        run(sweep(trials=3))


def test_a_failed_trial_keeps_its_reason_and_its_log_and_is_run_again(sweep):
    here = sweep(space={"x": [1.0, -1.0, 99.0]}, retries=2)
    study, said = run(here)
    _, failed, nan = study.trials
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert failed.user_attrs["reason"] == "ValueError: x is negative" and log(here, failed).count("negative") == 3
    assert log(here, failed).split("\n")[:3] == ["starts at 0", "ValueError: x is negative", "starts at 1"]
    assert nan.user_attrs["reason"] == "metric=loss is nan" and log(here, nan).count("done") == 1
    assert any("trial 1 failed: ValueError: x is negative" in line for line in said)
    never, _ = run(sweep(space={"x": [1.0]}, metric="other", name="never"))
    assert never.trials[0].user_attrs["reason"] == "metric=other was never logged; there are loss"


def test_a_bad_trial_is_pruned(sweep, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.3")
    pruner = optuna.pruners.ThresholdPruner(upper=3.4)  # 3 + 1/2 is above it, 3 + 1/3 would not be
    here = sweep(space={"x": [1.0, 3.0]}, pruner=pruner, steps=8, workers=2)
    study, said = run(here)
    good, bad = study.trials
    assert (good.state.name, bad.state.name) == ("COMPLETE", "PRUNED")
    assert any("trial 1 is stopped: loss=4 at step 1" in line for line in said)
    assert "done" not in log(here, bad) and bad.intermediate_values[1] == 4.0
    assert len(good.intermediate_values) >= 3


def test_a_killed_driver_leaves_trials_that_the_next_one_takes_in(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    here = sweep(space={"x": [float(i) for i in range(6)]}, workers=2, steps=6)
    pid = os.fork()
    if pid == 0:
        Driver(here, lambda line: None).run()
        os._exit(0)
    folders = [here.trial_folder(number, {"x": float(number)}) for number in range(6)]
    until(lambda: folders[1].read("result") is not None and folders[2].measured("version_0"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    study, said = run(here)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
    assert [trial.value for trial in study.trials] == pytest.approx([i + 1 / 6 for i in range(6)])
    assert all(log(here, trial).count("done") == 1 for trial in study.trials), "none runs twice"
    assert any("goes on" in line for line in said)


@pytest.mark.parametrize("whom", ["runner", "runner, asked", "command", "command, asked"])
def test_a_trial_that_is_ended_from_outside_goes_on(sweep, whom, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    here = sweep(space={"x": [1.0]}, steps=10)
    folder = here.trial_folder(0, {"x": 1.0})

    def end():
        until(lambda: len(folder.measured("version_0")) >= 2)
        process = folder.read("command" if "command" in whom else "job")["pid"]
        os.kill(process, signal.SIGTERM if "asked" in whom else signal.SIGKILL)

    with meanwhile(end):
        study, said = run(here)
    (trial,) = study.trials
    text = log(here, trial)
    assert trial.value == pytest.approx(1.1)
    assert [entry["step"] for entry in folder.measured("version_0")] == list(range(1, 11))
    if whom == "runner":  # what it has left behind ends by itself, and only then comes the next one
        assert text == "starts at 0\ndone\nstarts at 10\ndone\n" and len(folder.launches()) == 2
    elif whom == "command":
        assert folder.read("state")["failures"] == ["killed (SIGKILL), most likely out of memory"]
    else:
        assert not folder.read("state")["failures"] and any("no longer running" in line for line in said)
    if whom != "runner":
        assert text.count("starts at") == 2 and text.count("done") == 1


def test_a_trial_is_given_up_once_no_start_gets_it_further(sweep, monkeypatch):
    monkeypatch.setattr("flextok_pl.sweeps.driver.MOST_LAUNCHES", 3)
    here = sweep(space={"x": [66.0, 77.0]}, workers=2, steps=6)  # ended after each step, and before the first one
    study, _ = run(here)
    slow, stuck = study.trials
    assert slow.state.name == "COMPLETE" and log(here, slow).count("starts at") == 7
    assert stuck.state.name == "FAIL" and log(here, stuck).count("starts at") == 3
    assert stuck.user_attrs["reason"].startswith("its process was lost 3 times without getting beyond step 0; see /")


def test_an_interrupted_sweep_lets_its_trials_save_themselves(sweep, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    here = sweep(space={"x": [1.0, 2.0]}, steps=10, workers=2)
    folders = [here.trial_folder(number, {"x": number + 1.0}) for number in range(2)]

    def interrupt():
        until(lambda: all(folder.measured("version_0") for folder in folders))
        os.kill(os.getpid(), signal.SIGINT)

    wanted = "interrupted: the trials under way have saved themselves; run the same command"
    with meanwhile(interrupt), pytest.raises(ValueError, match=wanted):
        run(here)
    assert not any(folder.running or folder.read("result") for folder in folders)
    study, _ = run(here)
    assert all(trial.state.name == "COMPLETE" and log(here, trial).count("starts") == 2 for trial in study.trials)


def test_a_sweep_runs_once_at_a_time(sweep):
    here = sweep()
    first = Driver(here, lambda line: None)
    with _only_one(here.root / "driver.lock"), pytest.raises(ValueError, match="another process runs this sweep"):
        first.run()


def test_a_lock_is_waited_for_that_a_killed_process_leaves_for_a_moment(tmp_path):
    holds, released = threading.Event(), []

    def hold():
        with _only_one(tmp_path / "lock"):
            holds.set()
            time.sleep(0.3)
            released.append(True)

    with meanwhile(hold):
        holds.wait()
        with _only_one(tmp_path / "lock"):
            assert released


def test_gpus_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(ValueError, match="workers=2 x gpus_per_trial=2 needs more than the 3 GPUs here"):
        LocalLauncher(2, 2)
    launcher = LocalLauncher(3, 1)
    folders = []
    for number in range(3):
        folder = TrialFolder(tmp_path / str(number))
        folder.path.mkdir()
        show = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; sleep 0.3"]
        folder.write("trial", {"commands": [show], "cwd": ".", "runs": [], "metric": "x", "retries": 0})
        folders.append(folder)
    launcher.launch(folders)
    until(lambda: all((f.path / "log.txt").exists() and (f.path / "log.txt").read_text() for f in folders))
    assert {(f.path / "log.txt").read_text().strip() for f in folders} == {"4", "5", "6"}
    until(lambda: len(launcher.gone(folders)) == 3)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm that only keeps what is submitted, in `script`, and lists the jobs that are in `queue`."""
    place = tmp_path / "slurm"
    place.mkdir()
    (place / "queue").touch()
    commands = {
        "sbatch": f"cp $1 {place}/script; echo Submitted batch job 7",
        "squeue": f"cat {place}/queue",
        "srun": "exit 1",
    }
    for name, command in commands.items():
        (place / name).write_text(f"#!/bin/sh\n{command}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def some_folders(tmp_path, count):
    folders = [TrialFolder(tmp_path / str(number)) for number in range(count)]
    for folder in folders:
        folder.path.mkdir()
    return folders


def test_jobs_are_submitted_as_an_array_with_what_they_need(slurm, tmp_path):
    parameters = {"mem_gb": 500, "timeout_min": 60, "gpus_per_node": 8, "slurm_partition": "main"}
    launcher = SlurmLauncher(slurm_executor(tmp_path / "jobs", parameters, 2))
    folders = some_folders(tmp_path, 3)
    launcher.launch(folders)
    script = (slurm / "script").read_text()
    for option in ("mem=500GB", "time=60", "gpus-per-node=8", "partition=main", "array=0-2%2"):
        assert f"#SBATCH --{option}\n" in script
    assert [folder.read("job") for folder in folders] == [{"job": f"7_{number}"} for number in range(3)]


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"slurm_partitoin": "main"}, "slurm={'slurm_partitoin': 'main'}: Unknown argument 'partitoin'"),
        ({"memory": 3}, "slurm={'memory': 3}: .*'memory'"),
        ({"mem_gb": "500G"}, "slurm={'mem_gb': '500G'}: Parameter \"mem_gb\" expected"),
    ],
)
def test_what_submitit_does_not_know(slurm, tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        slurm_executor(tmp_path / "jobs", parameters, 2)


def begin(sweep):
    """Leave what a driver does that is killed once it has started its first trials."""
    driver = Driver(sweep, lambda line: None)
    for point in sweep.points.grid():
        driver.study.enqueue_trial(point)
    driver._fill()


def test_jobs_are_waited_for_when_a_sweep_goes_on_here(sweep, slurm, monkeypatch):
    monkeypatch.setattr(SlurmLauncher, "controller_seconds", 0.0)
    monkeypatch.setattr(SlurmLauncher, "grace", 0.2)
    begin(sweep(launcher="slurm", workers=2))
    (slurm / "queue").write_text("7_0\n7_1\n")
    ends, cancelled, new = [sweep().trial_folder(number, {"x": x}) for number, x in enumerate([3.0, 1.0, 2.0])]
    too_early = []

    def jobs():
        subprocess.run([sys.executable, "-m", "flextok_pl.sweeps.runner", str(ends.path)], check=True)
        until(lambda: new.read("result") is not None)
        too_early.extend({"pid"} & set(cancelled.read("job")))
        (slurm / "queue").write_text("")

    with meanwhile(jobs):
        study, _ = run(sweep(workers=2))
    assert not too_early and [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert all(log(sweep(), trial).count("starts") == 1 for trial in study.trials), "none runs twice"
    assert "job" in ends.read("job") and "pid" in cancelled.read("job") and "pid" in new.read("job")


def test_jobs_cannot_be_waited_for_without_slurm(sweep, slurm, monkeypatch):
    begin(sweep(launcher="slurm", workers=2))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="0000_x=3 is a Slurm job, but there is no `squeue` here"):
        run(sweep(workers=2))


def test_processes_are_waited_for_when_a_sweep_goes_on_with_slurm(sweep, slurm, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    given = {"space": {"x": [1.0]}, "steps": 10}
    begin(sweep(**given))
    study, said = run(sweep(**given, launcher="slurm"))
    assert said[0] == "trial 0 goes on: 0000_x=1" and study.best_value == pytest.approx(1.1)
    assert log(sweep(), study.trials[0]).count("starts") == 1 and not (slurm / "script").exists()


def test_trials_of_both_kinds_are_left_when_a_sweep_is_interrupted(sweep, slurm, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    begin(sweep(launcher="slurm", workers=1))
    (slurm / "queue").write_text("7\n")
    local = sweep(workers=2, steps=50).trial_folder(1, {"x": 1.0})

    def interrupt():
        until(lambda: local.measured("version_0"))
        os.kill(os.getpid(), signal.SIGINT)

    wanted = "saved themselves; jobs continue; `scancel 7` ends them"
    with meanwhile(interrupt), pytest.raises(ValueError, match=wanted):
        run(sweep(workers=2, steps=50))
    assert not local.running and local.read("result") is None


def test_lines_of_a_killed_process(tmp_path):
    file = tmp_path / "metrics.jsonl"
    entries = [
        {"stage": "fit", "step": 1, "metrics": {"a": 1.0}},
        {"stage": "fit", "step": 1, "metrics": {"a": 2.0, "b": 3.0}},
    ]
    file.write_text(json.dumps(entries[0]) + '\n{"stage": "fi\n' + json.dumps(entries[1]) + "\n")
    assert read_metrics(file) == [{"stage": "fit", "step": 1, "metrics": {"a": 2.0, "b": 3.0}}]
    assert read_metrics(tmp_path / "none") == []


def test_a_test_counts_for_its_own_seed(tmp_path):
    for seed in (0, 1):
        for folder, entry in (
            (".", {"stage": "fit", "step": 5, "metrics": {"loss": 7.0}}),
            ("test/version_0", {"stage": "test", "step": 0, "metrics": {"fid": 9.0}}),
            ("test/version_1", {"stage": "test", "step": 0, "metrics": {"fid": seed + 1.0}}),  # after a failure
        ):
            file = tmp_path / f"version_{seed}" / folder / "metrics.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(entry) + "\n")
    found = outcome(TrialFolder(tmp_path), {"runs": ["version_0", "version_1"], "metric": "fid"})
    assert found["value"] == 1.5 and found["metrics"]["version_1"] == {"loss": 7.0, "fid": 2.0}


def test_the_script_of_a_trial(sweep, tmp_path):
    here = sweep(seeds=[3], test=True, overrides={"trainer.max_steps": 5, "rfid": None})
    text = here.script({"x": 1.0}, "0000_x=1")
    fit, test = [line for line in text.splitlines() if " -m flextok_pl " in line]
    assert " fit " in fit and " test " in test
    for part in ("--trainer.max_steps=5", "--rfid=null", "--x=1.0", "--model.seed=3"):
        assert part in fit and part in test
    shown = subprocess.run(["bash", "-c", f"out='a b'; printf '%s\n' {test}"], stdout=subprocess.PIPE, text=True)
    run = "0000_x=1/version_3"
    place = [f"--trainer.logger.init_args.{each}" for each in ("save_dir=a b", f"name={run}/test", "version=null")]
    assert {*place, f"--ckpt_path=a b/{run}/checkpoints"} <= set(shown.stdout.splitlines())
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"workers": 0}, "workers=0 must be at least 1"),
        (
            {"experiment": ["none.yaml"]},
            "experiment=none.yaml is not a file; give one relative to the sweep's, or",
        ),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be different"),
        ({"search": "tpe"}, "trials=null: search=tpe draws points without end"),
        ({"overrides": {"x": 1}}, "'x' is in space and in overrides"),
        ({"overrides": {"y": float("inf")}}, "overrides: y=inf must be a finite number"),
        ({"space": {"model.seed": [1, 2]}}, "'model.seed' is set by the sweep itself"),
        ({"slurm": {"timeout_min": 3}}, "launcher=local; choose --launcher slurm, or --slurm {}"),
        ({"space": {"x": {"low": 0.0, "high": 1.0}}}, "x needs a step"),
        ({"scaling": "y"}, r"scaling=y is not a parameter of space; use one of \['x'\]"),
        ({"scaling": "x", "direction": "maximize"}, "direction=maximize; leave scaling out, or choose a metric"),
        (
            {"scaling": "y", "space": {"x": [1, 2], "y": {"choices": [3, 4], "when": {"x": 1}}}},
            "scaling=y has a `when`; name a parameter of space that each trial has",
        ),
    ],
)
def test_what_a_sweep_cannot_be(sweep, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(**options)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "FILE is missing"),
        (["none.yaml"], "there is no file none.yaml"),
        (["status", "sweep.yaml"], "sweep holds no sweep yet; start one by `flextok sweep FILE`"),
        (["sweep.yaml", "--trials", "0"], "sweep.yaml: trials=0 must be at least 1"),
        (["sweep.yaml", "--launcher", "slurm"], "there is no `sbatch` here"),
    ],
)
def test_errors_of_the_command(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    content = {"experiment": "e.yaml", "metric": "loss", "space": {"x": [1, 2]}, "search": "grid"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "e.yaml").touch()
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *given])
    assert message in f"{stop.value}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("space: {x: [1]}\nmetric: a\nspace: {x: [2]}", "line 3: the key space is there as space already"),
        ("space: {x: {options: {1: {}, 1.0: {}}}}", "line 1: the key 1.0 is there as 1 already; leave one of them out"),
        ("space: [", "cannot be read as YAML"),
    ],
)
def test_files_that_say_something_twice(tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_yaml(tmp_path / "sweep.yaml")


def test_numbers_in_files_are_those_of_the_command_line(tmp_path):
    (tmp_path / "sweep.yaml").write_text("<<: {a: 1}\nb: [1e-4, 1E+3, 010, on, 2024-01-01, '1', 1_000]\n'1': 0\n1: 0\n")
    assert load_yaml(tmp_path / "sweep.yaml") == {
        "a": 1,
        "b": [0.0001, 1000.0, 8, True, "2024-01-01", "1", 1000],
        "1": 0,
        1: 0,
    }


def test_a_check_that_fails_leaves_nothing_behind(sweep):
    def check(sweep):
        raise ValueError("the metric is not logged")

    wrong = sweep(metric="los", direction="maximize")
    with pytest.raises(ValueError, match="not logged"):
        Driver(wrong, print, check)
    assert find_study(wrong) is None and not wrong.root.exists()
    study, _ = run(sweep())
    assert study.best_params == {"x": 1.0} and len(study.trials) == 3
    Driver(sweep(), print, check)  # what was started is not checked again


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
