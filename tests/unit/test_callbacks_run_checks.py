"""RunChecks on trainings that log what they are told."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA, RunChecks

BAD = {"val/loss": 1.0, "val/loss_other_tokens": 1.0, "val/mse/k=001": 0.2, "val/mse/k=064": 0.2}
GOOD = {"val/loss": 1.0, "val/loss_other_tokens": 1.5, "val/mse/k=001": 0.2, "val/mse/k=064": 0.1}


class Module(LightningModule):
    def __init__(self, logged, scale=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.logged, self.scale, self.encoded = logged, scale, 0

    def latents(self, batch):
        self.encoded += len(batch["image"])
        return self.scale * batch["image"]

    def training_step(self, batch, batch_idx):
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.log_dict(self.logged)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def said(tmp_path, module, callback, *others, epochs=4, ckpt_path=None, **options):
    """The checks that a training with a validation after each epoch has warned of."""
    images = torch.randn(24, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"image": image} for image in images], batch_size=4)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback, *others],
        logger=False,
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    texts = [str(each.message) for each in caught if "docs/doctor.md#" in str(each.message)]
    assert all(f"docs/doctor.md#{text.split(':')[0]})" in text for text in texts)
    return [text.split(":")[0] for text in texts]


def test_each_is_said_once(tmp_path):
    callback = RunChecks()
    assert said(tmp_path, Module(BAD, scale=5.0), callback, enable_checkpointing=False) == [
        "latent-scale",
        "token-use",
        "budgets",
    ]
    assert callback.said == ["latent-scale", "token-use", "budgets"]


def test_a_sound_training_is_left_alone(tmp_path):
    module = Module(GOOD)
    assert said(tmp_path, module, RunChecks(), EMA(0.5), enable_checkpointing=False) == []
    assert module.encoded == 4, "a few pictures, once"


def test_an_average_that_lags_is_said(tmp_path):
    assert said(tmp_path, Module(GOOD), RunChecks(), EMA(0.999), enable_checkpointing=False) == ["ema-lag"]


def test_nothing_is_said_of_what_is_yet_to_be_learned(tmp_path):
    assert said(tmp_path, Module(BAD), RunChecks(start_at=1.0), enable_checkpointing=False) == ["token-use", "budgets"]
    early = RunChecks(start_at=1.0)
    assert said(tmp_path, Module(BAD), early, max_steps=20, enable_checkpointing=False) == []
    assert said(tmp_path, Module(BAD | {"val/x": float("nan")}), early, max_steps=20, enable_checkpointing=False) == [
        "finite"
    ]


def test_a_run_that_goes_on_says_it_no_more(tmp_path):
    said(tmp_path, Module(BAD), RunChecks(), epochs=2)
    (file,) = tmp_path.rglob("*.ckpt")
    again = RunChecks()
    assert said(tmp_path, Module(BAD), again, epochs=3, ckpt_path=str(file), enable_checkpointing=False) == []
    assert again.said == ["token-use", "budgets"]


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"start_at=2 must be a share"):
        RunChecks(start_at=2)
