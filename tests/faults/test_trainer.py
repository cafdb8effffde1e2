"""`flextok_pl.Trainer` in ten lines of Python keeps what `flextok fit` does: killed and given again, it goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from flextok_pl import ShardDataModule, TokenizerModule, Trainer
from flextok_pl.config import FlexTokConfig
from flextok_pl.runtime import StepCheckpoint

SCRIPT = """
import os, signal, sys
import torch
from lightning.pytorch import Callback
from flextok_pl import FlexTokConfig, ShardDataModule, TokenizerModule, Trainer
from flextok_pl.callbacks import EMA
from flextok_pl.runtime import StepCheckpoint

shards, moment, number = sys.argv[1], *map(int, sys.argv[2:])

class Told(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == moment:
            os.kill(os.getpid(), number)

torch.manual_seed(0)
module = TokenizerModule(FlexTokConfig.preset("tiny"), warmup_steps=2)
data = ShardDataModule(train=f"{shards}/train", val=f"{shards}/val", batch_size=4, num_workers=1, image_size=32)
callbacks = [Told(), EMA(), StepCheckpoint.of_newest(every_n_train_steps=2)]
options = {"max_steps": 10, "accumulate_grad_batches": 2, "accelerator": "cpu"}
Trainer(default_root_dir="run", callbacks=callbacks, **options).fit(module, data, ckpt_path="last")
"""


def run(folder: Path, shards: Path, moment: int = -1, number: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script in an interpreter of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCRIPT, str(shards), str(moment), str(number)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def fork(folder: Path, shards: Path, moment: int = -1, number: int = 0) -> tuple[int | None, str]:
    """Run the script in a fork, which need not import anything again; returns its exit status and what it prints."""
    folder.mkdir(exist_ok=True)

    def child() -> None:
        os.chdir(folder)
        sys.argv = ["-c", str(shards), str(moment), str(number)]
        with open("said.txt", "w") as sys.stdout, open("errors.txt", "w") as sys.stderr:
            exec(SCRIPT, {"__name__": "__main__"})

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(240)
    return process.exitcode, (folder / "said.txt").read_text()


def test_a_script_goes_on(image_shards: Path, tmp_path: Path) -> None:
    """Killed, then told to stop, it ends with the weights, averages and optimizer state of one that ran through."""
    status, said = fork(tmp_path / "whole", image_shards)
    assert status == 0 and "no checkpoint in run/checkpoints yet" in said
    folder = tmp_path / "stopped"
    assert fork(folder, image_shards, 5, signal.SIGKILL)[0] == -signal.SIGKILL
    told = run(folder, image_shards, 6, signal.SIGTERM)
    assert told.returncode == 128 + signal.SIGTERM, told.stderr
    assert "stopped/run/checkpoints/step0000004.ckpt" in told.stdout and "Traceback" not in told.stderr
    assert "SIGTERM: stopped at step 7, with run/checkpoints/last.ckpt to resume from" in told.stderr
    assert not list(folder.rglob("error_rank*")) and not list(folder.rglob("*.safetensors"))
    assert fork(folder, image_shards)[0] == 0
    files = {str(file.relative_to(folder)) for file in folder.rglob("*.ckpt")}
    assert files == {f"run/checkpoints/{name}.ckpt" for name in ("last", "step0000008", "step0000010")}

    runs = [tmp_path / "whole" / "run", folder / "run"]
    first, second = (torch.load(each / "checkpoints" / "last.ckpt", weights_only=True) for each in runs)
    for key in ("state_dict", "current_model_state"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(value, second[key][name]) for name, value in first[key].items())
    states = [each["optimizer_states"][0]["state"] for each in (first, second)]
    assert all(torch.equal(value, states[1][n][name]) for n, own in states[0].items() for name, value in own.items())
    exported = [load_file(each / "tokenizer.safetensors") for each in runs]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


def fit(
    folder: Path, trainer: type[pl.Trainer], data: ShardDataModule, steps: int, ckpt_path: str | None = None
) -> None:
    torch.manual_seed(0)
    module = TokenizerModule(FlexTokConfig.preset("tiny"), warmup_steps=0, min_lr_ratio=1.0)
    trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, datamodule=data, ckpt_path=ckpt_path)


def test_the_same_without_it(image_shards: Path, tmp_path: Path) -> None:
    """Lightning's Trainer trains our modules to the same weights, and reads the checkpoints of ours, as ours reads its.

    A damaged one ours refuses.
    """
    data = ShardDataModule(train=str(image_shards / "train"), batch_size=8, num_workers=0, image_size=32)
    fit(tmp_path / "ours", Trainer, data, 3)
    fit(tmp_path / "lightning", pl.Trainer, data, 3)
    ours, (other,) = tmp_path / "ours" / "checkpoints" / "last.ckpt", (tmp_path / "lightning").rglob("*.ckpt")
    for way, file in ((pl.Trainer, ours), (Trainer, other)):
        fit(tmp_path / f"{way.__module__} goes on", way, data, 5, file)
    ends = [torch.load(file, weights_only=True) for file in tmp_path.glob("* goes on/**/*step*5.ckpt")]
    assert len(ends) == 2 and all(
        torch.equal(v, ends[1]["state_dict"][name]) for name, v in ends[0]["state_dict"].items()
    )
    file = ours.resolve()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="last.ckpt is damaged .*or `last` for the newest whole one"):
        fit(tmp_path / "damaged", Trainer, data, 5, ours)


def test_what_is_given_stays(tmp_path: Path) -> None:
    own = StepCheckpoint(save_top_k=0)
    trainer = Trainer(callbacks=own, logger=False, accelerator="cpu", default_root_dir=tmp_path)
    assert trainer.checkpoint_callbacks == [own] and trainer.loggers == []
    assert Trainer(barebones=True, accelerator="cpu").checkpoint_callbacks == []
    assert Trainer(enable_checkpointing=False, accelerator="cpu", logger=False).checkpoint_callbacks == []
