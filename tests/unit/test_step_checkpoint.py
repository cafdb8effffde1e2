"""When a training saves itself, and what it does first when it goes on from there."""

import signal
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from flextok_pl.runtime import Preempted, Preemption, StepCheckpoint, Trainer

EPOCH = 5  # batches


class Learner(pl.LightningModule):
    """Learns nothing; its `val/loss` falls from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val/loss", torch.tensor(-float(self.global_step)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Killed(Exception):
    """Stands in for a kill."""


class Diary(pl.Callback):
    """What happened, with step and epoch; it stops the training at the given event.

    "told of" the event sends a signal there instead.
    """

    def __init__(self, last: tuple[str, int] | None) -> None:
        self.last = last
        self.events: list[tuple[str, int, int]] = []

    def note(self, name: str, trainer: pl.Trainer) -> None:
        if self.last == (name, trainer.global_step):
            raise Killed
        if self.last == (f"told of {name}", trainer.global_step):
            signal.raise_signal(signal.SIGUSR1)
        self.events.append((name, trainer.global_step, -1 if name == "end" else trainer.current_epoch))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("batch", trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("validation", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("epoch end", trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("end", trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        assert not trainer.fit_loop._should_accumulate(), "gradients are lost"


def fit(
    folder: Path, last: tuple[str, int] | None = None, every: int = 1, on_exception: bool = False, **options: Any
) -> list[tuple[str, int, int]]:
    """Train, from the newest checkpoint on, until the given event."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"dirpath": folder, "auto_insert_metric_name": False, "enable_version_counter": False}
    diary = Diary(last)
    checkpoint = StepCheckpoint(
        filename="step{step}",
        monitor="step",
        mode="max",
        save_top_k=-1,
        save_last="link",
        every_n_train_steps=every,
        save_on_exception=on_exception,
        **common,
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            diary,
            Preemption(requeue=False),
            checkpoint,
            StepCheckpoint(filename="best", monitor="val/loss", **common),
        ],
        **options,
    )
    data, val = (DataLoader(TensorDataset(torch.zeros(size, 2)), 1) for size in (EPOCH, 1))
    with suppress(Killed, Preempted):
        trainer.fit(Learner(), data, val, ckpt_path="last")
    return diary.events


def test_python_programs_save_as_the_experiments_do() -> None:
    base = yaml.safe_load((Path(__file__).parents[2] / "experiments" / "base.yaml").read_text())
    facts = [vars(each) for each in (StepCheckpoint(**base["checkpoint"]), StepCheckpoint.of_newest())]
    assert str(facts[0]) == str(facts[1])


def steps_saved(folder: Path) -> set[int]:
    return {int(file.stem.removeprefix("step")) for file in folder.glob("step*.ckpt")}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"check_val_every_n_epoch": 2},
        {"max_epochs": 2, "max_steps": -1},
        {"val_check_interval": 2},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_going_on_does_what_was_to_come(options: dict[str, Any], accumulated: int, tmp_path: Path) -> None:
    """Wherever a training is killed: every validation and end of an epoch, at its step and in its epoch."""
    options = {"max_steps": 12 // accumulated, "accumulate_grad_batches": accumulated, **options}
    whole = fit(tmp_path / "whole", **options)
    assert {"validation", "epoch end"} <= {name for name, *_ in whole}
    best = torch.load(tmp_path / "whole" / "best.ckpt", weights_only=True)["global_step"]
    for (before, *_), (name, step, _) in pairwise(whole):
        if before == name:
            continue
        folder = tmp_path / f"{name} {step}"
        events = [*fit(folder, (name, step), **options), *fit(folder, **options)]
        assert list(dict.fromkeys(events)) == list(dict.fromkeys(whole)), (name, step)
        assert torch.load(folder / "best.ckpt", weights_only=True)["global_step"] == best, (name, step)
        assert steps_saved(folder) == steps_saved(tmp_path / "whole")
        assert fit(folder, **options)[-1][0] == "end", "it ends again"
        if name == "validation":  # and also where it is left at a signal, after its first batch
            folder = tmp_path / f"told {step}"
            events = fit(folder, ("told of validation", step), every=0, **options)
            assert events[-1][:2] == ("validation", step), "it is left at once"
            events += fit(folder, every=0, **options)
            assert list(dict.fromkeys(events)) == list(dict.fromkeys(whole)), step
            assert torch.load(folder / "best.ckpt", weights_only=True)["global_step"] == best, step


def test_nothing_is_validated_twice(tmp_path: Path) -> None:
    """Once `best` has been saved at a validation that was due."""
    options = {"max_steps": 5, "val_check_interval": 5, "check_val_every_n_epoch": None}
    fit(tmp_path, ("validation", 5), **options)
    assert fit(tmp_path, **options) == [("validation", 5, 0), ("epoch end", 5, 0), ("end", 5, -1)]
    assert "validation" not in {name for name, *_ in fit(tmp_path, **options)}
    assert ("validation", 5, 0) not in fit(tmp_path, **{**options, "max_steps": 6})


def test_saved_at_every_step_to_save_at(tmp_path: Path) -> None:
    """Also at an epoch's last, whether or not a validation follows."""
    options = {"accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "max_steps": 12, "every": 3}
    events = fit(tmp_path, val_check_interval=7, **options)
    assert steps_saved(tmp_path) == {3, 6, 9, 12}
    assert [step for name, step, _ in events if name == "validation"] == [4, 8]


def test_validated_after_the_step(tmp_path: Path) -> None:
    """Each third batch, of five to an epoch: the first one is within the second step, which ends with the fourth."""
    options = {"accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "max_steps": 7}
    events = fit(tmp_path, val_check_interval=3, **options)
    assert [step for name, step, _ in events if name == "validation"] == [2, 4, 5, 7]


def test_ending_again_saves_nothing(tmp_path: Path) -> None:
    options = {"max_steps": 4, "val_check_interval": 3, "check_val_every_n_epoch": None}
    fit(tmp_path, **options)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert (tmp_path / "last.ckpt").is_symlink() and steps_saved(tmp_path) == {1, 2, 3, 4}
    fit(tmp_path, **options)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize(("event", "saved"), [(("batch", 3), {2}), (("validation", 3), {2, 3})])
def test_saved_on_an_exception(event: tuple[str, int], saved: set[int], tmp_path: Path) -> None:
    """Unless that comes within a batch."""
    options = {"max_steps": 4, "every": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}
    fit(tmp_path, event, on_exception=True, **options)
    assert steps_saved(tmp_path) == saved
