"""A training step does not wait for its device, from the arrival of a batch to the start of the next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretended_device import DEVICE, PretendedDevice, pretended_device
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA, Throughput
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.modules import PriorModule, TokenizerModule, VAEModule

STEPS = 4
EVERY = 3  # steps between logs


class Sequences(pl.LightningDataModule):
    """Batches of two samples with everything that a module may want."""

    batch_size = 2
    tokenizer = {"sha256": "a" * 16, "vocab_size": 50, "num_tokens": 8}
    classes = ()

    def train_dataloader(self) -> DataLoader:
        random = torch.Generator().manual_seed(0)
        batch: Any = {
            "image": torch.rand(2, 3, 32, 32, generator=random) * 2 - 1,
            "tokens": torch.randint(50, (2, 8), generator=random),
            "label": torch.tensor([0, 1]),
            "key": ["a", "b"],
        }
        return DataLoader([batch] * STEPS, batch_size=None)


class Accelerator(CPUAccelerator):
    """One that takes the pretended device."""

    def setup_device(self, device: torch.device) -> None:
        """There is nothing to set up."""


class Watch(pl.Callback):
    """Watches steps that are not logged, but for the first, which makes what lasts."""

    def __init__(self, device: PretendedDevice) -> None:
        self.device = device

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.device.watching = trainer.global_step > 0 and (trainer.global_step + 1) % EVERY != 0

    def on_train_epoch_end(self, *_: Any) -> None:
        self.device.watching = False


def waits(module: pl.LightningModule, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """What waits in a training; nothing is exported."""
    monkeypatch.setattr(type(module), "on_train_end", lambda self: None)
    monkeypatch.setattr("flextok_pl.callbacks.throughput._peak_flops", lambda trainer: None)
    with pretended_device(monkeypatch) as device:
        pl.Trainer(
            strategy=SingleDeviceStrategy(DEVICE, accelerator=Accelerator()),
            max_steps=STEPS,
            log_every_n_steps=EVERY,
            logger=False,
            enable_checkpointing=False,
            callbacks=[Watch(device), EMA(), Throughput()],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **options,
        ).fit(module, Sequences())
    return device.waits


def prior(**options: Any) -> PriorModule:
    net = PriorConfig(num_classes=2, num_tokens=8, vocab_size=50, depth=2, width=32, head_dim=16)
    return PriorModule(net, warmup_steps=0, **options)


def vae(**options: Any) -> VAEModule:
    net = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    return VAEModule(net, warmup_steps=0, **options)


def tokenizer(**options: Any) -> TokenizerModule:
    return TokenizerModule(FlexTokConfig.preset("tiny"), warmup_steps=0, **options)


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "prior": prior,
    "vae": vae,
    "vae with a discriminator": lambda: vae(gan_weight=0.5, discriminator_width=8),
    "tokenizer": tokenizer,
}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits(MODULES[name](), tmp_path, monkeypatch, gradient_clip_val=1.0) == []
