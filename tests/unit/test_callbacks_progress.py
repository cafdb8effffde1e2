"""The bar and the lines of a training, by a clock that the test moves."""

import math
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from flextok_pl.callbacks.progress import StepBar, StepLines


class Falling(LightningModule):
    """Its loss is 1 / step, and each batch takes two seconds."""

    def __init__(self, seconds: Iterator[float] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.now = 0.0

    def training_step(self, batch, batch_idx):
        self.now += 2.0
        loss = self.weight * 0 + 1 / (self.global_step + 1)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.now += 100.0

    def on_validation_epoch_end(self):
        self.log("val/loss", torch.tensor(0.125), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(tmp_path, module, callback, **options):
    """Six batches of four an epoch."""
    data = DataLoader([{"image": torch.zeros(1)}] * 24, batch_size=4)
    Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_steps": 9, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "limit_val_batches": 0, **options},
    ).fit(module, data, data)


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_line_for_each_log_and_for_the_end(tmp_path, capsys):
    module = Falling()
    fit(tmp_path, module, StepLines(0.0, lambda: module.now))
    assert lines(capsys) == [
        "step 2/9  loss 0.5  2 images/s  0:00:28 left",
        "step 4/9  loss 0.25  2 images/s  0:00:20 left",
        "step 6/9  loss 0.1667  2 images/s  0:00:12 left",
        "step 8/9  loss 0.125  2 images/s  0:00:04 left",
        "step 9/9  loss 0.1111  2 images/s  0:00:00 left",
    ]


def test_lines_are_not_too_many_and_validations_take_none_of_the_speed(tmp_path, capsys):
    module = Falling()
    fit(tmp_path, module, StepLines(10.0, lambda: module.now), limit_val_batches=1, max_steps=6)
    assert lines(capsys) == [
        "step 2/6  loss 0.5  2 images/s  0:00:16 left",
        "step 3  val/loss 0.125",
        "step 4/6  loss 0.25  2 images/s  0:00:58 left",
        "step 6/6  loss 0.1667  2 images/s  0:00:00 left",
        "step 6  val/loss 0.125",
    ]
    module = Falling()
    fit(tmp_path, module, StepLines(10.0, lambda: module.now))
    assert [line.split()[1] for line in lines(capsys)] == ["2/9", "6/9", "9/9"]
    module = Falling()
    fit(tmp_path, module, StepLines(0.0, lambda: module.now), log_every_n_steps=0)
    assert [line.split()[1] for line in lines(capsys)] == ["9/9"], "without logs, the last one"


def test_a_training_without_an_end(tmp_path, capsys):
    module = Falling()
    fit(tmp_path, module, StepLines(0.0, lambda: module.now), max_steps=-1, max_epochs=1, accumulate_grad_batches=1)
    assert lines(capsys)[-1] == "step 6/6  loss 0.1667  2 images/s  0:00:00 left"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "estimated_stepping_batches", property(lambda self: math.inf))
        module = Falling()
        fit(tmp_path, module, StepLines(0.0, lambda: module.now), max_epochs=1)
    assert lines(capsys)[0] == "step 2  loss 0.5  2 images/s"


def test_the_bar_counts_optimizer_steps_of_the_whole_training(tmp_path):
    seen = []

    class Watched(StepBar):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            bar = self.train_progress_bar
            seen.append((bar.desc, bar.n, bar.total))

    fit(tmp_path, Falling(), Watched(), max_steps=5)
    assert [n for _, n, _ in seen] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert {(desc, total) for desc, _, total in seen} == {("Training: ", 5)}
