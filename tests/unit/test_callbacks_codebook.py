"""CodebookReport on tokens that are known."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from flextok_pl.callbacks import CodebookReport
from flextok_pl.data import ShardDataModule


class KnownTokens:
    num_registers = 2
    config = SimpleNamespace(vocab_size=16)

    def tokenize(self, images, num_tokens=None):
        number = images[:, 0, 0, 0].long()
        return torch.stack([number % 2, 8 + number], 1)

    def detokenize(self, tokens, **options):
        raise AssertionError("the report needs the encoder only")


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.reconstructor = KnownTokens()

    def training_step(self, batch, batch_idx):
        return self.weight

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(tmp_path, callback, module=None, key="image"):
    samples = [{key: torch.full((3, 2, 2), float(i)), "key": str(i)} for i in range(8)]
    loader = DataLoader(samples, batch_size=3)
    logger = TensorBoardLogger(tmp_path, name="tb")
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=logger,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module or Module(), loader, loader)
    return trainer, EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()


def test_use_entropy_and_perplexity(tmp_path):
    callback = CodebookReport()
    trainer, events = fit(tmp_path, callback)
    # Position 0: two ids, 1 bit. Position 1: eight ids, 3 bits. Together 10 ids; half of the mass is on two.
    assert callback.values == pytest.approx(
        {"val/codes/distinct": 10, "val/codes/use": 10 / 16, "val/codes/entropy": 2, "val/codes/perplexity": 8}
    )
    assert trainer.callback_metrics["val/codes/use"].item() == pytest.approx(10 / 16)
    assert events.Scalars("val/codes/entropy")[0].value == pytest.approx(2)
    assert events.Images("val/codes/entropy_by_position")[0].width == 600


def test_a_test_leaves_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    samples = [{"image": torch.full((3, 2, 2), float(i)), "key": str(i), "label": i % 2} for i in range(8)]
    callback = CodebookReport(output_dir=f"~/{tmp_path.name}")
    Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False).test(
        Module(), DataLoader(samples, batch_size=3), verbose=False
    )
    assert callback.values["test/codes/perplexity"] == pytest.approx(8)
    records = json.loads((tmp_path / "codes.json").read_text())
    by_name = {(r["metric"], r.get("position")): r["value"] for r in records}
    assert by_name["codes_distinct", None] == 10 and by_name["position_entropy", 2] == pytest.approx(3)
    assert by_name["class_information", 1] > 0.5, "the first token is the class; with 8 samples not quite 1 bit"
    assert by_name["class_information", 2] == 0, "every id occurs once, so it tells no more than for permuted labels"
    assert Image.open(tmp_path / "codes.png").height == 500


def test_only_some_batches(tmp_path):
    callback = CodebookReport(max_batches=1)
    fit(tmp_path, callback)
    assert callback.values["val/codes/distinct"] == 5


def test_what_does_not_fit(tmp_path):
    module = Module()
    module.reconstructor = None
    with pytest.raises(MisconfigurationException, match="Module has no `reconstructor`"):
        fit(tmp_path, CodebookReport(), module)
    with pytest.raises(MisconfigurationException, match="has no image"):
        fit(tmp_path, CodebookReport(), key="latent")
    with pytest.raises(ValueError, match="max_batches=0"):
        CodebookReport(max_batches=0)


def test_a_validation_set_without_images_stops_a_training_at_its_start(monkeypatch):
    data = ShardDataModule(val="latents")
    index = SimpleNamespace(fields=("latent", "label"), where="shards/latents")
    monkeypatch.setattr(ShardDataModule, "shard_set", lambda self, split: SimpleNamespace(indices=[index]))
    with pytest.raises(MisconfigurationException, match=r"shards/latents has no image, .*'latent'.*data\.val"):
        CodebookReport().on_fit_start(SimpleNamespace(datamodule=data), Module())
    CodebookReport(every_n_validations=0).on_fit_start(SimpleNamespace(datamodule=data), Module())
