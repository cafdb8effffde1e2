"""`experiments/cluster/train.sbatch` under a real Slurm: preempted, requeued, and as good as undisturbed."""

import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "cluster" / "train.sbatch"
STEPS = 100
ENDED = ("FAILED", "CANCELLED", "TIMEOUT")


EXPERIMENT = ROOT / "experiments" / "tokenizer" / "tiny.yaml"


def options(shards: Path) -> list[str]:
    """Those of a training of the tiny experiment."""
    return [
        *("--data.train", str(shards / "train"), "--data.val", "null", "--data.batch_size", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.max_steps", str(STEPS)),
        *("--trainer.enable_progress_bar", "false", "--checkpoint.every_n_train_steps", "20"),
        *("--rfid", "null", "--codebook", "null", "--throughput", "null", "--preemption.check_every_n_steps", "3"),
    ]


def run_of(folder: Path, name: str) -> Path:
    return folder / "runs" / "tokenizer" / "tiny" / name


class Job:
    """That training submitted with two tasks, in the run `mine`."""

    def __init__(self, folder: Path, shards: Path, cluster: dict[str, str]) -> None:
        self.folder, self.cluster = folder, cluster
        submit = ["sbatch", "--parsable", "--job-name=mine", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10"]
        self.id = self.ask(*submit, str(SCRIPT), str(EXPERIMENT), *options(shards))
        self.run = run_of(folder, "mine")

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, cwd=self.folder, env=self.cluster, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.ask("scontrol", "show", "job", self.id, "-o").split()
        return dict(item.split("=", 1) for item in shown if "=" in item)[name]

    def log(self) -> str:
        """What the job has printed."""
        return "".join(file.read_text() for file in self.folder.glob(f"slurm-*-{self.id}.out"))

    def wait(self, *states: str, seconds: int = 240) -> None:
        """Until the job is in one of these states."""
        deadline = time.monotonic() + seconds
        while (state := self.fact("JobState")) not in states:
            assert time.monotonic() < deadline and state not in ENDED, f"{state}\n{self.log()}"
            time.sleep(0.5)

    def preempted(self, since: int) -> int:
        """Preempt it once it has saved a step after this one; returns the step at which it has stopped."""
        deadline = time.monotonic() + 240
        while max((int(file.stem[4:]) for file in self.run.glob("checkpoints/step*.ckpt")), default=0) <= since:
            assert time.monotonic() < deadline and self.fact("JobState") not in ENDED, self.log()
            time.sleep(0.2)
        self.ask("scancel", "--signal=USR1", self.id)
        self.wait("PENDING")
        saved: int = torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        assert 20 <= saved < STEPS and not (self.run / "tokenizer.safetensors").exists()
        assert f"SIGUSR1: stopped at step {saved}, " in self.log() and "in the queue again" in self.log()
        return saved


def test_a_preempted_job_ends_as_another(
    image_shards: Path, tmp_path: Path, cluster: dict[str, str], start_ranks: Any
) -> None:
    """It is preempted, cancelled and submitted anew as another job, preempted again, and goes on by itself."""
    first = Job(tmp_path, image_shards, cluster)
    saved = first.preempted(0)
    second = Job(tmp_path, image_shards, cluster)
    assert second.fact("JobState") == "PENDING" and second.fact("Reason") == "Dependency", "two would write in one run"
    first.ask("scancel", first.id)
    first.wait("CANCELLED")
    assert second.preempted(saved) > saved
    second.ask("scontrol", "update", f"JobId={second.id}", "StartTime=now")  # Slurm waits two minutes by itself
    second.wait("COMPLETED")
    assert second.fact("Restarts") == "1"
    assert "runs/tokenizer/tiny/mine has no checkpoint yet" in first.log() and "no checkpoint" not in second.log()

    whole = start_ranks(
        tmp_path, 2, ["fit", "--config", str(EXPERIMENT), "--trainer.devices=2", *options(image_shards)]
    )
    for rank in whole:
        rank.join(240)
    ends = [load_file(run_of(tmp_path, name) / "tokenizer.safetensors") for name in ("mine", "version_0")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), "bit-equal"


def test_what_a_job_hands_on(tmp_path: Path, cluster: dict[str, str]) -> None:
    """Its name, its tasks and their cores, and what the site's file says, to a command that shows it."""
    shown = tmp_path / "bin" / "flextok"
    shown.parent.mkdir()
    shown.write_text('#!/bin/sh\necho "$NCCL_SOCKET_IFNAME $INSIDE $SLURM_CPUS_PER_TASK $SLURM_STEP_NUM_TASKS $@"\n')
    shown.chmod(0o755)
    site = tmp_path / "experiments" / "cluster" / "site.sh"
    site.parent.mkdir(parents=True)
    site.write_text("module() { false; }\nmodule load cuda\nexport NCCL_SOCKET_IFNAME=ib0\ninside=(env INSIDE=yes)\n")
    environment = {**cluster, "PATH": f"{shown.parent}:{cluster['PATH']}", "SBATCH_ACCOUNT": "ours"}
    submit = [
        "sbatch",
        "--wait",
        "--job-name=mine",
        "--cpus-per-task=2",
        "--time=1",
        str(SCRIPT),
        "an.yaml",
        "--x",
        "y z",
    ]
    subprocess.run(submit, cwd=tmp_path, env=environment, check=True)
    (log,) = tmp_path.glob("slurm-mine-*.out")
    expected = "--config an.yaml --run mine --ckpt_path last --trainer.num_nodes 1 --trainer.devices 1 --x y z"
    assert log.read_text() == f"ib0 yes 2 1 fit {expected}\n"
    asked = subprocess.check_output(["scontrol", "show", "job", log.stem.rsplit("-")[-1]], env=cluster, text=True)
    assert "Account=ours" in asked
