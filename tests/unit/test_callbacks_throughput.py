"""Throughput on training whose speed is set by sleeping."""

import csv
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from flextok_pl.callbacks import Throughput


class SlowData(Dataset):
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 24

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return {"image": torch.zeros(3, 2, 2), "key": str(index)}


class SlowModule(LightningModule):
    def __init__(self, seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seconds = seconds

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        return self.weight

    def validation_step(self, batch, batch_idx):
        time.sleep(0.3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def logged(tmp_path, data_seconds, step_seconds, every_n_steps=4, **options):
    logger = CSVLogger(tmp_path)
    Trainer(
        accelerator="cpu",
        callbacks=[Throughput(every_n_steps)],
        logger=logger,
        max_epochs=2,
        log_every_n_steps=50,
        val_check_interval=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    ).fit(SlowModule(step_seconds), DataLoader(SlowData(data_seconds), 2), DataLoader(SlowData(0.0), 24))
    rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())
    return [{name: float(value) for name, value in row.items()} for row in rows if row["train/images_per_s"]]


def test_rate_and_share_without_validation(tmp_path):
    rows = logged(tmp_path, data_seconds=0.01, step_seconds=0.02)  # per batch of 2: 20 ms of data, 20 ms of step
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    for row in rows:
        assert 10 < row["train/images_per_s"] <= 2 / 0.02 * 1.5
        assert 0.15 < row["train/data_share"] < 0.75


def test_windows_are_of_optimizer_steps(tmp_path):
    rows = logged(tmp_path, 0.0, 0.0, every_n_steps=2, accumulate_grad_batches=3, limit_val_batches=0)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]


def test_a_module_that_waits_for_nothing(tmp_path):
    rows = logged(tmp_path, data_seconds=0.0, step_seconds=0.05)
    assert max(row["train/data_share"] for row in rows) < 0.4
    assert all(row["train/images_per_s"] <= 40 for row in rows)


def test_operations_per_second(tmp_path, monkeypatch):
    monkeypatch.setattr(SlowModule, "flops_per_sample", 2e12, raising=False)
    rows = logged(tmp_path, data_seconds=0.0, step_seconds=0.01)
    for row in rows:
        assert row["train/tflops_per_s"] == pytest.approx(2 * row["train/images_per_s"])
        assert "train/mfu" not in row, "nobody knows the peak of this CPU"


def test_utilisation_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(SlowModule, "flops_per_sample", 2e12, raising=False)
    monkeypatch.setattr("flextok_pl.callbacks.throughput._peak_flops", lambda trainer: 1e15)
    for row in logged(tmp_path, data_seconds=0.0, step_seconds=0.01):
        assert row["train/mfu"] == pytest.approx(row["train/images_per_s"] * 2e12 / 1e15)


def test_options():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Throughput(0)
