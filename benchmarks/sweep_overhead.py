"""Seconds that a trial of a sweep takes beyond its training: starting processes, imports, storage.

The tiny tokenizer of `experiments/tokenizer/tiny.yaml` trains on the demo's pictures for the same number of steps

- by a call in a process that has trained before and has imported everything: only the training;
- by `flextok fit` in its own process;
- as the trials of `flextok sweep`, one at a time: the seconds from the first trial's start to the last one's end.

    python benchmarks/sweep_overhead.py --json benchmarks/results/sweep_overhead_cpu.json
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from report import median_seconds, write_results

from flextok_pl.cli import main as flextok

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--trials", type=int, default=6)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--device", default="cpu", help="device; the CPU, whose processes start slowly")
parser.add_argument("--json", default=None, help="file to write the results to")

EXPERIMENT = Path("experiments/tokenizer/tiny.yaml").absolute()


def overrides(steps: int) -> dict[str, object]:
    return {
        "rfid": None,
        "codebook": None,
        "trainer.max_steps": steps,
        "trainer.enable_progress_bar": False,
        "trainer.check_val_every_n_epoch": None,
        "trainer.val_check_interval": steps,
        "metrics_log": {},
    }


def fit_arguments(folder: str, steps: int) -> list[str]:
    options = [f"--{name}={json.dumps(value)}" for name, value in overrides(steps).items()]
    return ["fit", f"--config={EXPERIMENT}", f"--trainer.logger.init_args.save_dir={folder}", *options]


def train_here(folder: str, steps: int) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        flextok(fit_arguments(folder, steps))


def train_apart(folder: str, steps: int) -> None:
    subprocess.run([sys.executable, "-m", "flextok_pl", *fit_arguments(folder, steps)], check=True, stdout=sys.stderr)


def run_sweep(folder: str, steps: int, trials: int) -> tuple[float, float]:
    """Seconds of a trial, and of the rest of the command: its start, checks of the space, tables and pictures."""
    file = Path(folder) / "overhead.yaml"
    content = {
        "experiment": str(EXPERIMENT),
        "overrides": {name: value for name, value in overrides(steps).items() if name != "metrics_log"},
        "metric": "val/loss",
        "space": {"model.lr": [1e-3 * (1 + i) for i in range(trials)]},
        "search": "grid",
        "folder": folder,
    }
    file.write_text(json.dumps(content))  # JSON is YAML
    began = time.perf_counter()
    command = [sys.executable, "-m", "flextok_pl", "sweep", str(file), "--check=false"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    total = time.perf_counter() - began
    journal = str(Path(folder) / "overhead" / "journal.log")
    done = optuna.load_study(study_name="overhead", storage=JournalStorage(JournalFileBackend(journal))).trials
    spent = (done[-1].datetime_complete - done[0].datetime_start).total_seconds()
    return spent / trials, total - spent


def main() -> None:
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "training": partial(train_here, folder, options.steps),
            "command": partial(train_apart, folder, options.steps),
        }
        seconds = median_seconds(calls, options.repeats, options.device)
        trial, rest = run_sweep(folder, options.steps, options.trials)
    results = {
        "training_seconds": seconds["training"],
        "flextok_fit_seconds": seconds["command"],
        "trial_seconds": trial,
        "overhead_per_trial_seconds": trial - seconds["training"],
        "of_which_the_sweep": trial - seconds["command"],
        "once_per_sweep_seconds": rest,
    }
    write_results("sweep_overhead", vars(options), results, options.json)


if __name__ == "__main__":
    main()
