"""`experiments/cluster/train.sbatch` under a real Slurm: preempted, requeued, and as good as undisturbed."""

import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "cluster" / "train.sbatch"
ENDED = ("FAILED", "CANCELLED", "TIMEOUT")


class Job:
    """A submitted training of the tiny experiment by two tasks."""

    def __init__(self, folder: Path, shards: Path, cluster: dict[str, str]) -> None:
        self.folder, self.cluster = folder, cluster
        folder.mkdir()
        options = [
            *("--data.train", str(shards / "train"), "--data.val", "null", "--data.batch_size", "4"),
            *("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.max_steps", "200"),
            *("--trainer.enable_progress_bar", "false", "--checkpoint.every_n_train_steps", "20"),
            *("--rfid", "null", "--codebook", "null", "--preemption.check_every_n_steps", "3"),
        ]
        submit = ["sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10"]
        experiment = str(ROOT / "experiments" / "tokenizer" / "tiny.yaml")
        self.id = self.ask(*submit, str(SCRIPT), experiment, *options)
        self.run = folder / "runs" / "tokenizer" / "tiny" / f"version_{self.id}"

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
        return "".join(file.read_text() for file in self.folder.glob("slurm-*.out"))

    def wait(self, *states: str, seconds: int = 240) -> None:
        """Until the job is in one of these states."""
        deadline = time.monotonic() + seconds
        while (state := self.fact("JobState")) not in states:
            assert time.monotonic() < deadline and state not in ("FAILED", "CANCELLED", "TIMEOUT"), (
                f"{state}\n{self.log()}"
            )
            time.sleep(0.5)

    def wait_for_checkpoint(self) -> None:
        """Until there is a checkpoint."""
        deadline = time.monotonic() + 240
        while not list(self.run.glob("checkpoints/step*.ckpt")):
            assert time.monotonic() < deadline and self.fact("JobState") not in ENDED, self.log()
            time.sleep(0.2)


def test_a_preempted_job_ends_as_another(image_shards: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    preempted = Job(tmp_path / "preempted", image_shards, cluster)
    preempted.wait_for_checkpoint()
    preempted.ask("scancel", "--signal=USR1", preempted.id)
    preempted.wait("PENDING")
    saved = torch.load(preempted.run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 20 <= saved < 200 and not (preempted.run / "tokenizer.safetensors").exists()
    assert f"SIGUSR1: stopped at step {saved}, " in preempted.log() and "in the queue again" in preempted.log()
    preempted.ask("scontrol", "update", f"JobId={preempted.id}", "StartTime=now")  # Slurm waits two minutes by itself
    preempted.wait("COMPLETED")
    assert preempted.fact("Restarts") == "1" and f"{preempted.run}/checkpoints/last.ckpt" in preempted.log()

    whole = Job(tmp_path / "whole", image_shards, cluster)
    whole.wait("COMPLETED")
    assert whole.fact("Restarts") == "0"
    ends = [load_file(job.run / "tokenizer.safetensors") for job in (preempted, whole)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), "bit-equal"
