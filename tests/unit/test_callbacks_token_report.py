"""TokenReport on losses that are known."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from flextok_pl.callbacks import TokenReport

K = 5


class Known(LightningModule):
    """Sample n costs n bits at the first position, one more at each further one, and hits the even positions."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        bits = batch["n"][:, None] + torch.arange(K)
        return {"loss": self.weight, "nll": bits * math.log(2), "correct": (torch.arange(K) % 2 == 0).expand_as(bits)}

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(tmp_path, module, **options):
    loader = DataLoader([{"n": float(i)} for i in range(7)], batch_size=3)
    logger = TensorBoardLogger(tmp_path, name="tb")
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[TokenReport()],
        logger=logger,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, loader, loader)
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()


def test_windows_are_of_optimizer_steps(tmp_path):
    events = fit(tmp_path, Known(), log_every_n_steps=1, accumulate_grad_batches=2)
    values = [(event.step, event.value) for event in events.Scalars("train/bits/001")]
    assert values == [(1, pytest.approx(2.5)), (2, pytest.approx(6.0))], "two batches, and what is left"
    assert "train/bits/001" not in fit(tmp_path, Known(), log_every_n_steps=0, limit_val_batches=0).Tags()["scalars"]


def test_bits_and_accuracy_by_position(tmp_path):
    events = fit(tmp_path, Known(), log_every_n_steps=2)
    for position in (1, 2, 4, 5):
        (value,) = events.Scalars(f"val/bits/{position:03d}")
        assert value.value == pytest.approx(3 + position - 1), "the mean over seven samples, the last batch is smaller"
        assert events.Scalars(f"val/accuracy/{position:03d}")[0].value == position % 2
    (train,) = events.Scalars("train/bits/001")
    assert (train.step, train.value) == (2, pytest.approx(2.5)), "the first two batches"
    assert events.Tags()["images"] == ["val/tokens_by_position"]
    charts = EventAccumulator(f"{events.path}/charts/positions").Reload()
    assert "custom_scalars__config__" in charts.Tags()["tensors"]
    curve = {each.step: each.value for each in charts.Scalars("val: tokens against position/bits")}
    assert curve == pytest.approx({position: 2 + position for position in range(1, 6)}), "at every position"


def test_other_modules_are_refused(tmp_path):
    class Other(Known):
        def training_step(self, batch, batch_idx):
            return self.weight

    with pytest.raises(MisconfigurationException, match="positions: null"):
        fit(tmp_path, Other())
