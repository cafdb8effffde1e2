"""Throughput on training whose speed a clock of its own sets."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from flextok_pl.callbacks import Throughput


class Clock:
    """Stands still but for what it is told."""

    def __init__(self):
        self.now = 100.0

    def sleep(self, seconds):
        self.now += seconds


class SlowData(Dataset):
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.clock.sleep(self.seconds)
        return {"image": torch.zeros(3, 2, 2), "key": str(index)}


class SlowModule(LightningModule):
    def __init__(self, clock, seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.clock, self.seconds = clock, seconds

    def training_step(self, batch, batch_idx):
        self.clock.sleep(self.seconds)
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.clock.sleep(0.3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def logged(tmp_path):
    """Trains with given seconds to load a sample and to take a step; returns what was logged."""

    def train(data_seconds, step_seconds, every_n_steps=4, **options):
        clock, logger, callback = Clock(), CSVLogger(tmp_path), Throughput(every_n_steps)
        callback.clock = lambda: clock.now
        Trainer(
            accelerator="cpu",
            callbacks=[callback],
            logger=logger,
            max_epochs=2,
            log_every_n_steps=50,
            val_check_interval=4,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        ).fit(
            SlowModule(clock, step_seconds),
            DataLoader(SlowData(clock, data_seconds), 2),
            DataLoader(SlowData(clock, 0.0), 24),
        )
        rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())
        return [{name: float(value) for name, value in row.items()} for row in rows if row["train/images_per_s"]]

    return train


def test_rate_and_share_without_validation(logged):
    rows = logged(data_seconds=0.01, step_seconds=0.06)  # per batch of 2: 20 ms of data, 60 ms of step
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    for row in rows:  # the first batch of a window follows a validation, which counts for nothing
        assert row["train/data_share"] == pytest.approx(3 * 0.02 / (4 * 0.06 + 3 * 0.02))
        assert row["train/images_per_s"] == pytest.approx(8 / (4 * 0.06 + 3 * 0.02))


def test_windows_are_of_optimizer_steps(logged):
    rows = logged(0.0, 0.01, every_n_steps=2, accumulate_grad_batches=3, limit_val_batches=0)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]


def test_a_module_that_waits_for_nothing(logged):
    for row in logged(data_seconds=0.0, step_seconds=0.05):
        assert row["train/data_share"] == 0
        assert row["train/images_per_s"] == pytest.approx(40)


def test_operations_per_second(logged, monkeypatch):
    monkeypatch.setattr(SlowModule, "flops_per_sample", 2e12, raising=False)
    for row in logged(data_seconds=0.0, step_seconds=0.05):
        assert row["train/tflops_per_s"] == pytest.approx(80)
        assert "train/mfu" not in row, "nobody knows the peak of this CPU"


def test_utilisation_where_the_peak_is_known(logged, monkeypatch):
    monkeypatch.setattr(SlowModule, "flops_per_sample", 2e12, raising=False)
    monkeypatch.setattr("flextok_pl.callbacks.throughput._peak_flops", lambda trainer: 1e15)
    for row in logged(data_seconds=0.0, step_seconds=0.05):
        assert row["train/mfu"] == pytest.approx(40 * 2e12 / 1e15)


def test_options():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Throughput(0)


def test_a_training_without_logs(tmp_path):
    callback, options = Throughput(), {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, max_steps=2, log_every_n_steps=0, **options
    )
    trainer.fit(SlowModule(Clock(), 0.1), DataLoader(SlowData(Clock(), 0.0), 2))
    assert callback.latest == {}
