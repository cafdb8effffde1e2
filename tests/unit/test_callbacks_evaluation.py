"""Every n-th validation, however they are timed, and over interruptions."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from flextok_pl.callbacks import CodebookReport, GenerationFID, ReconstructionFID
from flextok_pl.callbacks.evaluation import EvaluationCallback

SAMPLE = {"image": torch.zeros(3, 2, 2), "key": "one"}


class Nothing(LightningModule):
    """Learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Diary(EvaluationCallback):
    """Remembers the steps of its validations."""

    def __init__(self, every):
        self.every_n_validations, self.steps, self.reported = every, [], 0

    def check(self, trainer, pl_module):
        pass

    def begin(self, trainer, pl_module, split):
        self.steps.append(trainer.global_step)

    def measure(self, pl_module, batch, batch_idx):
        pass

    def report(self, trainer, pl_module, split):
        self.reported += 1


def fit(tmp_path, diary, steps=6, ckpt_path=None):
    """An epoch has three steps, and a validation is due after each."""
    loader = DataLoader([SAMPLE] * 3)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[diary],
        default_root_dir=tmp_path,
        max_steps=steps,
        val_check_interval=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Nothing(), loader, loader, ckpt_path=ckpt_path)
    return trainer


def test_validations_are_counted_over_an_interruption(tmp_path):
    diary = Diary(2)
    fit(tmp_path, diary)
    assert diary.reported == 3 and diary.steps == [2, 4, 6], (
        "not those of every second epoch, nor the one before training"
    )
    fit(tmp_path, Diary(2), steps=3).save_checkpoint(tmp_path / "three.ckpt")
    diary = Diary(2)
    trainer = fit(tmp_path, diary, ckpt_path=tmp_path / "three.ckpt")
    assert diary.steps == [4, 6]
    trainer.validate(Nothing(), DataLoader([SAMPLE]), verbose=False)
    assert diary.steps == [4, 6, 6], "outside a training always"


def test_never_in_a_training(tmp_path):
    diary = Diary(0)
    fit(tmp_path, diary)
    assert diary.steps == []


@pytest.mark.parametrize("callback", [CodebookReport, GenerationFID, ReconstructionFID])
def test_the_former_name_is_taken_with_a_warning(callback):
    with pytest.warns(FutureWarning, match="now called every_n_validations"):
        assert callback(every_n_epochs=3).every_n_validations == 3
    with pytest.raises(ValueError, match="every_n_validations=-1"):
        callback(every_n_validations=-1)
